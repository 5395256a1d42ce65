"""The command line as a person meets it: real processes where the process matters, `main` where it does not."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from espalier.trainer.cli import main


def run(*words, cwd=None, env=None, timeout=120):
    command = [sys.executable, "-P", "-m", "espalier.trainer.cli", *words]
    full = {**os.environ, **(env or {})}
    return subprocess.run(command, cwd=cwd, env=full, capture_output=True, text=True, timeout=timeout)


@pytest.fixture
def call(capfd):
    """`main` with what it wrote: (exit code, standard output, standard error)."""

    def called(*words):
        try:
            code = main(list(words))
        except SystemExit as stop:
            code = stop.code
        out, err = capfd.readouterr()
        return code, out, err

    return called


def is_one_sentence(text):
    return text.startswith("espalier: ") and text.count("\n") == 1 and "Traceback" not in text and len(text) < 400


def test_help_names_every_command_and_the_shipped_configurations(call):
    code, out, _ = call("--help")
    assert code == 0
    for word in ("train", "rollout", "eval", "bench", "report", "inspect", "export", "envs", "make-policy", "doctor"):
        assert word in out
    assert "spreadsheet-tiny" in out and "spreadsheet-qwen3-4b" in out


def test_no_words_at_all_shows_the_help(call):
    code, out, _ = call()
    assert code == 0 and "usage: espalier" in out


@pytest.mark.parametrize(
    ("words", "said", "code"),
    [
        (["tarin"], "invalid choice: 'tarin'", 2),
        (["train"], "CONFIG", 2),
        (["train", "spreadshet-tiny"], "did you mean 'spreadsheet-tiny'", 2),
        (["train", "spreadsheet-tiny", "--trainer.stpes", "3"], "did you mean 'trainer.steps'", 2),
        (["train", "spreadsheet-tiny", "--trainer.steps"], "--trainer.steps needs a value", 2),
        (["train", "spreadsheet-tiny", "--resum"], "--resum", 2),
        (["eval", "spreadsheet-tiny", "--policy.dtype", "x"], "allowed are 'float32'", 2),
        (["rollout", "spreadsheet-tiny", "--episodes", "many"], "--episodes", 2),
        (["report", "no-such-run"], "no such run", 1),
        (["inspect", "no-such-run"], "no such run", 1),
        (["export", "no-such-run", "--to", "x"], "no such run", 1),
        (["export", "no-such-run"], "--to", 2),
        (["envs", "check"], "needs an ID", 1),
        (["envs", "check", "espalier/Nothing-v0"], "espalier/Nothing-v0", 1),
        (["bench", "no-such-benchmark"], "no benchmark 'no-such-benchmark'", 1),
        (["train", "spreadsheet-tiny", "--policy.base", "./no/such/model"], "./no/such/model", 1),
        (["train", "spreadsheet-tiny", "--policy.base", "Nobody/No-Model"], "hf download Nobody/No-Model", 1),
    ],
)
def test_what_a_user_got_wrong_is_one_sentence(call, tmp_path, monkeypatch, words, said, code):
    monkeypatch.chdir(tmp_path) if words[0] != "bench" else None
    got, out, err = call(*words)
    assert got == code and said in err and is_one_sentence(err), err
    assert out == ""


def test_json_errors_are_one_object_on_standard_output(call):
    code, out, err = call("report", "no-such-run", "--json")
    assert code == 1 and json.loads(out)["error"] == err.strip() and is_one_sentence(err)


def test_a_broken_run_folder_names_file_and_line(call, make_run):
    folder = make_run()
    with (folder / "metrics.jsonl").open("a") as file:
        file.write("not json\n")
    _, _, err = call("report", str(folder))
    assert is_one_sentence(err) and "metrics.jsonl: line 8" in err
    (folder / "config.json").write_text('{"nonsense": 1}')
    _, _, err = call("report", str(folder))
    assert is_one_sentence(err) and "config.json" in err and "nonsense" in err


def test_a_half_written_last_line_is_left_out(call, make_run):
    folder = make_run()
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')
    code, out, _ = call("report", str(folder))
    assert code == 0 and out.strip().endswith("report.html")


def test_a_full_disk_is_one_sentence(call, make_run):
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full on this system")
    folder = make_run()
    (folder / ".report.html.part").symlink_to("/dev/full")
    code, _, err = call("report", str(folder))
    assert code == 1 and is_one_sentence(err) and "disk is full" in err


@pytest.fixture
def model(tmp_path):
    """A folder that looks like a model until it is loaded."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"")
    return str(folder)


def test_a_run_folder_in_use_is_refused(call, make_run, model):
    folder = make_run(name="taken")
    words = ["train", "spreadsheet-tiny", "--policy.base", model, "--name", "taken", "--out", str(folder.parent)]
    code, _, err = call(*words)
    assert code == 1 and is_one_sentence(err) and "--resume" in err and "--name" in err


def test_resume_without_a_run_is_refused(call, tmp_path, model):
    words = ["train", "spreadsheet-tiny", "--policy.base", model, "--resume", "--out", str(tmp_path / "new")]
    code, _, err = call(*words)
    assert code == 1 and is_one_sentence(err) and "no run to continue" in err


def test_an_unwritable_place_is_one_sentence(call, tmp_path, model):
    (tmp_path / "file").write_text("")
    code, _, err = call("train", "spreadsheet-tiny", "--policy.base", model, "--out", str(tmp_path / "file"))
    assert code == 1 and is_one_sentence(err) and "--out" in err


def test_two_processes_cannot_write_one_run(make_run, call, model):
    folder = make_run(name="busy")
    code = (
        "import sys, time; from pathlib import Path; from espalier.trainer.runs import claim\n"
        f"with claim(Path({str(folder)!r}), resume=True): print('held', flush=True); time.sleep(600)"
    )
    holder = subprocess.Popen([sys.executable, "-P", "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline().strip() == "held"
        words = ["--name", "busy", "--out", str(folder.parent), "--policy.base", model, "--resume"]
        got, _, err = call("train", "spreadsheet-tiny", *words)
        assert got == 1 and is_one_sentence(err) and "another process" in err
    finally:
        holder.kill()
        holder.wait(timeout=30)


def test_from_adapter_and_overrides_reach_the_configuration(call, tmp_path, model):
    words = ["train", "spreadsheet-tiny", "--dry-run", "--json", "--policy.base", model, "--trainer.steps", "7"]
    code, out, _ = call(*words, "--from-adapter", str(tmp_path))
    found = json.loads(out)
    assert code == 1  # no adapter lies there
    assert found["config"]["trainer"]["steps"] == 7 and found["config"]["policy"]["from_adapter"] == str(tmp_path)
    assert any("adapter" in missing["what"] for missing in found["missing"])


def test_dry_run_of_the_4b_run_shows_the_plan_and_what_is_missing(call, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    code, out, _ = call("train", "spreadsheet-qwen3-4b", "--dry-run")
    assert code == 1 and "KV cache" in out and "hf download Qwen/Qwen3-4B" in out and "CUDA" in out
    assert list(tmp_path.iterdir()) == []


def test_json_holds_even_when_libraries_and_children_print():
    code = (
        "import os, sys, subprocess, argparse\n"
        "from espalier.trainer import cli, commands\n"
        "def noisy(args):\n"
        "    print('python'); os.write(1, b'fd'); subprocess.run(['echo', 'child']); return {'fine': True}\n"
        "commands.doctor = noisy\n"
        "sys.exit(cli.main(['doctor', '--json']))"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=60)
    assert json.loads(done.stdout) == {"fine": True}
    assert "python" in done.stderr and "fd" in done.stderr and "child" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_says_how_to_go_on(number):
    code = (
        "import signal, sys, time\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background job ignores it
        "from espalier.trainer import cli, commands\n"
        "def slow(args): print('begun', flush=True); time.sleep(60)\n"
        "commands.train = slow\n"
        "sys.exit(cli.main(['train', 'spreadsheet-tiny', '--seed', '3']))"
    )
    child = subprocess.Popen(
        [sys.executable, "-P", "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert child.stdout.readline().strip() == "begun"
    time.sleep(0.1)
    child.send_signal(number)
    _, err = child.communicate(timeout=30)
    assert child.returncode == 130 and is_one_sentence(err)
    assert "espalier train spreadsheet-tiny --seed 3 --resume" in err


def failing_command(body):
    code = (
        "import sys\nfrom espalier.trainer import cli, commands\n"
        f"exec(compile('def broken(args): {body}', 'x', 'exec'), {{'__name__': 'espalier.trainer.x'}}, locals())\n"
        "commands.doctor = broken\nsys.exit(cli.main(['doctor']))"
    )
    return subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("body", ["return 1 // 0", 'return int("x")', "raise RuntimeError(5)", "return min([])"])
def test_a_bug_of_ours_keeps_its_traceback(body):
    done = failing_command(body)
    assert done.returncode == 1 and "Traceback" in done.stderr


def test_a_sentence_raised_by_a_room_is_shown_as_one():
    done = failing_command('raise ValueError("policy.device = cuda, but there is none")')
    assert done.returncode == 1 and done.stderr == "espalier: policy.device = cuda, but there is none\n"


def test_the_installed_command_runs():
    program = Path(sys.executable).with_name("espalier")
    done = subprocess.run([str(program), "--version"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout.startswith("espalier ")


def test_envs_check_tells_what_held_or_what_broke(call, tmp_path, monkeypatch):
    code, out, _ = call("envs", "check", "espalier/Spreadsheet-v0", "--json")
    found = json.loads(out)
    assert code == 0 and found["broken"] == [] and len(found["held"]) > 5
    (tmp_path / "broken_env_for_a_test.py").write_text(
        "import gymnasium\n"
        "class Broken(gymnasium.Env):\n"
        "    tools = ()\n"
        "    def reset(self, *, seed=None, options=None): return 'no observation', {}\n"
        "    def step(self, action): return 'nothing', 'no reward', False, False, {}\n"
        "gymnasium.register('broken/Env-v0', Broken)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    code, out, _ = call("envs", "check", "broken_env_for_a_test:broken/Env-v0", "--json")
    assert code == 1 and json.loads(out)["broken"]


def test_envs_list_names_the_flagship_and_what_it_can(call):
    code, out, _ = call("envs", "list", "--json")
    found = {env["id"]: env for env in json.loads(out)["environments"]}
    assert code == 0 and found["espalier/Spreadsheet-v0"]["about"]
