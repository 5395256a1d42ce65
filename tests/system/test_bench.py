import json
import math
import platform
import subprocess
import sys
from pathlib import Path

import pytest
from espalier.trainer.bench import find_results
from espalier.trainer.cli import main

ROOT = Path(__file__).resolve().parents[2]
KEYS = {"claim", "date", "machine", "versions", "seeds", "command", "figures", "runs"}


@pytest.fixture
def bench(monkeypatch):
    """The shared module, imported as a benchmark imports it."""
    monkeypatch.syspath_prepend(str(ROOT / "results"))
    import _bench

    return _bench


@pytest.fixture
def checkout(tmp_path):
    """A checkout with one benchmark in it."""
    (tmp_path / "results" / "toy").mkdir(parents=True)
    (tmp_path / "results" / "_bench.py").write_bytes((ROOT / "results" / "_bench.py").read_bytes())
    (tmp_path / "results" / "toy" / "measure.py").write_text(
        "from _bench import start\n"
        "bench = start(__file__, 'a toy')\n"
        "value = bench.arm({'x': 1}, lambda: print('measured') or 2.5)\n"
        "bench.finish('toys are quick', [0], {'speed': value, 'held': True}, [{'value': value}])\n"
    )
    return tmp_path


def espalier_bench(checkout, *words):
    command = [sys.executable, "-P", "-m", "espalier.trainer.cli", "bench", *words]
    return subprocess.run(command, cwd=checkout, capture_output=True, text=True, timeout=120)


def test_a_benchmark_writes_its_figures_in_the_envelope(checkout):
    done = espalier_bench(checkout, "toy")
    assert done.returncode == 0, done.stderr
    found = json.loads((checkout / "results" / "toy" / "figures.json").read_text())
    assert set(found) == KEYS and found["figures"] == {"speed": 2.5, "held": 1}
    assert found["command"] == "espalier bench toy" and found["seeds"] == [0]


def test_quick_and_json_leave_the_folder_alone(checkout):
    assert espalier_bench(checkout, "toy", "--quick").returncode == 0
    assert espalier_bench(checkout, "toy", "--json", "out.json").returncode == 0
    assert not (checkout / "results" / "toy" / "figures.json").exists()
    assert set(json.loads((checkout / "out.json").read_text())) == KEYS


def test_a_finished_arm_is_not_measured_again_and_quick_ones_stay_apart(checkout):
    assert "measured" in espalier_bench(checkout, "toy").stdout
    assert "measured" not in espalier_bench(checkout, "toy").stdout
    assert "measured" in espalier_bench(checkout, "toy", "--quick").stdout


def test_a_benchmark_imports_the_files_beside_it(checkout):
    folder = checkout / "results" / "toy"
    (folder / "beside.py").write_text("WORD = 'found'")
    (folder / "measure.py").write_text("import _bench\nimport beside\nprint(beside.WORD)\n")
    assert espalier_bench(checkout, "toy").stdout.strip() == "found"


def test_the_device_reaches_the_benchmark(checkout):
    script = checkout / "results" / "toy" / "measure.py"
    script.write_text("import sys\nprint(sys.argv[1:])\n")
    assert (
        espalier_bench(checkout, "toy", "--device", "cuda", "--quick").stdout.strip()
        == "['--quick', '--device', 'cuda']"
    )
    assert espalier_bench(checkout, "toy").stdout.strip() == "[]"
    wrong = espalier_bench(checkout, "toy", "--device", "tpu")
    assert wrong.returncode != 0 and "tpu" in wrong.stderr


def test_what_ran_on_a_gpu_stands_apart_and_is_kept_apart(checkout, bench, monkeypatch):
    monkeypatch.setattr(bench, "_has_cuda", lambda: True)
    script = str(checkout / "results" / "toy" / "measure.py")
    for device, place in (("cpu", "figures.json"), ("cuda", "cuda/figures.json")):
        one = bench.start(script, "a toy", ["--device", device])
        assert one.device == device
        value = one.arm({"x": 1}, lambda device=device: device)
        one.finish("c", [0], {"gpu": value == "cuda"}, [])
        found = json.loads((checkout / "results" / "toy" / place).read_text())
        assert found["figures"] == {"gpu": int(device == "cuda")}
        assert found["command"] == "espalier bench toy" + (" --device cuda" if device == "cuda" else "")
    assert bench.start(script, "a toy", ["--device", "cuda", "--quick"]).folder is None


def test_what_was_kept_at_another_commit_says_so(checkout, bench, monkeypatch, capsys):
    one = bench.start(str(checkout / "results" / "toy" / "measure.py"), "a toy", [])
    monkeypatch.setattr(bench, "commit", lambda: "first")
    assert [one.arm({"x": 1}, lambda: 5), one.arm({"x": 1}, lambda: 6)] == [5, 5]
    assert not capsys.readouterr().err
    monkeypatch.setattr(bench, "commit", lambda: "second")
    assert one.arm({"x": 1}, lambda: 6) == 5
    assert "kept from commit first" in capsys.readouterr().err


def test_a_device_that_is_not_there_or_has_no_meaning_is_one_sentence(checkout, bench, monkeypatch):
    script = str(checkout / "results" / "toy" / "measure.py")
    monkeypatch.setattr(bench, "_has_cuda", lambda: False)
    with pytest.raises(SystemExit, match="no CUDA device"):
        bench.start(script, "a toy", ["--device", "cuda"])
    monkeypatch.setattr(bench, "_has_cuda", lambda: True)
    with pytest.raises(SystemExit, match="toy runs no model"):
        bench.start(script, "a toy", ["--device", "cuda"], devices=("cpu",))
    assert not (checkout / "results" / "toy" / "cuda").exists()


def test_a_benchmark_that_fails_fails_the_command(checkout):
    (checkout / "results" / "toy" / "measure.py").write_text("import sys; sys.exit(7)")
    assert espalier_bench(checkout, "toy").returncode == 7


def test_outside_a_checkout_it_says_so(tmp_path, monkeypatch, capfd):
    assert find_results(tmp_path, tmp_path / "site-packages" / "espalier" / "trainer" / "bench.py") is None
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("espalier.trainer.bench.find_results", lambda here, package: None)
    assert main(["bench", "learning"]) == 1
    assert "checkout" in capfd.readouterr().err


def test_the_machine_is_described_without_naming_it(bench):
    text = json.dumps(bench.envelope("c", [0], {"x": 1.0}, [], "cmd"))
    assert platform.node() not in text or len(platform.node()) < 3
    assert str(Path.home()) not in text and str(ROOT) not in text
    assert bench.machine()["cores"] >= 1 and bench.machine()["memory_gb"] > 0


@pytest.mark.parametrize("value", [math.nan, math.inf, "fast", None])
def test_a_figure_is_a_finite_number(bench, value):
    with pytest.raises(ValueError, match="figure x"):
        bench.envelope("c", [], {"x": value}, [], "cmd")


def test_contenders_alternate_and_take_turns_at_going_first(bench):
    order = []
    names = {name: (lambda name=name: order.append(name) or float(len(order))) for name in "abc"}
    found = bench.alternate(names, 3)
    assert order == list("abcbcacab") and {name: len(values) for name, values in found.items()} == dict.fromkeys(
        "abc", 3
    )


def test_the_sweep_takes_the_best_median_not_the_best_value(bench):
    speeds = {1: iter([5.0, 5.0, 5.0]), 2: iter([9.0, 1.0, 1.0])}
    sweep = bench.sweep_threads(lambda threads: next(speeds[threads]), [1, 2])
    assert sweep.best == 1 and sweep.rows[1] == (2, (9.0, 1.0, 1.0))
