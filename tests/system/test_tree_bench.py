"""`bench tree` runs end to end, and its contenders compute the same."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
from espalier.trainer.tree.core import grow
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parents[2]
HERE = ROOT / "results" / "tree"
FIGURES = {
    "bound_share_min",
    "ratio_group8",
    "ratio_bin16",
    "ratio_irr16",
    "ratio_none8",
    "activations_bin16",
    "processed_over_unique_max",
    "grad_error_max",
}


@pytest.fixture(scope="module")
def modules():
    sys.path.insert(0, str(HERE))
    try:
        found = {}
        for name in ("workloads", "contenders"):
            spec = importlib.util.spec_from_file_location(f"tree_{name}", HERE / f"{name}.py")
            found[name] = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(found[name])
    finally:
        sys.path.remove(str(HERE))
        sys.modules.pop("workloads", None)
    return found


def test_the_workloads_share_what_they_say(modules):
    found = {}
    for name, make in modules["workloads"].WORKLOADS.items():
        rows = make(1)
        assert rows == make(1)
        assert {row.advantage > 0 for row in rows} == {True, False}
        found[name] = grow(rows, share=False).unique / grow(rows).unique
    assert found == pytest.approx({"group8": 3.35, "bin16": 4.10, "irr16": 4.03, "none8": 1.0}, abs=0.01)


def test_contenders_have_one_gradient(modules):
    contenders = modules["contenders"].Contenders(modules["contenders"].TINY, "cpu")
    rows = contenders.recorded(modules["workloads"].WORKLOADS["bin16"](16))
    grads = {name: contenders.step(name, rows)[-1] for name in (*modules["contenders"].NAMES, "forced")}
    largest = grads["packed"].abs().max()
    assert largest > 0
    for name, grad in grads.items():
        assert float((grad - grads["packed"]).abs().max() / largest) < 1e-5, name
    assert any("tree" in micro for micro in contenders.window("tree", rows, 0).micro)
    assert contenders.window("padded", rows, 8).micro[0]["prompt"] > 1
    before, after = contenders.saved(rows, False), contenders.saved(rows, True)
    assert before / after > 3.5


def test_operations_are_those_that_torch_counts(modules):
    """The formula behind the bound, but for what torch does not count: attention on the CPU (2 products forward and 5
    backward, 2 operations a pair and element each), and the vocabulary's product that is added in place.
    """
    shape, operations = modules["contenders"].TINY, modules["contenders"].operations
    contenders = modules["contenders"].Contenders(shape, "cpu")
    rows = contenders.recorded(modules["workloads"].WORKLOADS["bin16"](16))
    contenders.step("tree", rows)  # compares the paths
    for name, share in (("packed", False), ("tree", True)):
        tree = grow(rows, share)
        pairs = int((tree.positions + 1).sum())
        attention = shape.layers * 7 * 2 * shape.heads * shape.head * pairs
        in_place = 2 * shape.hidden * modules["workloads"].VOCAB * tree.targets.numel()
        with FlopCounterMode(display=False) as counter:
            contenders.step(name, rows)
        # nothing is pulled back through the first layer's first matrices
        expected = operations(tree, shape) - attention - in_place
        assert counter.get_total_flops() == pytest.approx(expected, rel=0.05)


def test_a_quick_run_gives_every_figure(bench_alone):
    folder = bench_alone("tree")
    command = [sys.executable, "-P", "-m", "espalier.trainer.cli", "bench", "tree", "--quick", "--json", "out.json"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((folder / "out.json").read_text())
    assert set(found["figures"]) >= FIGURES
    assert found["figures"]["grad_error_max"] <= 1e-5
    assert found["figures"]["processed_over_unique_max"] <= 1.1
    assert found["figures"]["activations_bin16"] >= 3.5
    assert str(folder) not in json.dumps(found)
