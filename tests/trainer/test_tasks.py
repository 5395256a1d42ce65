"""Drawing tasks, alarms and the metrics file."""

import json
import shutil
from collections import Counter

import pytest
import toy
from espalier.configs.schema import AlarmSection, EnvSection
from espalier.envs.core import Task
from espalier.trainer.alarms import check
from espalier.trainer.errors import UserError
from espalier.trainer.metrics import Recorder
from espalier.trainer.tasks import draw, load, read
from hypothesis import given
from hypothesis import strategies as st

TASKS = [Task(f"t{i}", "") for i in range(20)]


@given(st.integers(0, 99), st.integers(0, 99), st.integers(1, 50))
def test_a_draw_is_fixed_by_seed_and_step(seed, step, count):
    drawn = draw(TASKS, count, seed=seed, step=step)
    assert len(drawn) == count
    assert drawn == draw(TASKS, count, seed=seed, step=step)
    assert max(Counter(t.id for t in drawn).values()) == -(-count // len(TASKS)), "each once while there are enough"


def test_steps_and_seeds_differ():
    draws = {tuple(t.id for t in draw(TASKS, 5, seed=seed, step=step)) for seed in range(3) for step in range(3)}
    assert len(draws) == 9


def test_uniform_and_difficulty():
    stats = {t.id: [50.0, {0: 0.0, 1: 25.0, 2: 50.0}[i % 3]] for i, t in enumerate(TASKS)}
    uniform: Counter = Counter()
    hard: Counter = Counter()
    for step in range(400):
        uniform.update(int(t.id[1:]) % 3 for t in draw(TASKS, 3, seed=0, step=step))
        hard.update(int(t.id[1:]) % 3 for t in draw(TASKS, 3, seed=0, step=step, stats=stats))
    assert uniform[1] / 1200 == pytest.approx(7 / 20, abs=0.05)
    assert hard[1] > 0.75 * 1200, "half solved is what is learnt from"
    assert hard[0] > 20, "never solved is still looked at"
    assert hard[2] > 20, "always solved is still looked at"


def test_a_task_never_seen_is_taken_to_be_as_hard_as_its_family():
    tasks = [Task(f"{family}{i}", "", family) for family in ("solved", "half", "hopeless") for i in range(20)]
    stats = {f"{f}0": [400.0, won] for f, won in (("solved", 400.0), ("half", 200.0), ("hopeless", 0.0))}
    drawn: Counter = Counter()
    for step in range(200):
        drawn.update(t.family for t in draw(tasks, 5, seed=0, step=step, stats=stats))
    assert drawn["half"] > 0.7 * 1000 and min(drawn.values()) > 20


def test_a_folder_of_coding_tasks_is_known_by_what_is_in_it(tmp_path):
    one = tmp_path / "mine" / "task-1"
    for name, text in (("instruction.md", "Mend it."), ("workspace/m.py", "a = 1"), ("tests/test_m.py", "import m")):
        (one / name).parent.mkdir(parents=True, exist_ok=True)
        (one / name).write_text(text)

    def found(folder):
        return read(EnvSection(id="espalier/CodeSandbox-v0", tasks=str(folder)), "all", 0, 10)

    first = found(tmp_path / "mine")
    copied = found(shutil.copytree(tmp_path / "mine", tmp_path / "again" / "mine"))
    assert (first.name, first.sha256, len(first.tasks)) == ("mine all", copied.sha256, 1)
    (one / "workspace" / "m.py").write_text("a = 2")
    assert found(tmp_path / "mine").sha256 != first.sha256


def test_tasks_of_any_environment_come_from_seeds():
    section = EnvSection(id="other/Env-v0")
    train, test = load(section, "train", 3, 5), load(section, "test", 3, 5)
    assert len({t.id for t in [*train, *test]}) == 10
    assert train == load(section, "train", 3, 5)


def row(**values):
    fine = {"step": 4, "entropy": 1.0, "kl": 0.0, "sampled_tokens_mean": 20.0, "trained_tokens": 9}
    return {**fine, "invalid_call_share": 0.1, **values}


def test_alarms():
    section = AlarmSection()
    assert check(row(), section, 10.0) == []
    wrong = {
        "entropy": {"entropy": 0.001},
        "kl": {"kl": 3.0},
        "length": {"sampled_tokens_mean": 50.0},
        "invalid_calls": {"invalid_call_share": 0.95},
        "logprob_gap": {"logprob_gap_mean": 0.2},
    }
    for name, values in wrong.items():
        [alarm] = check(row(**values), section, 10.0)
        assert alarm.alarm == name
        assert alarm.message.startswith("step 4: ")
        assert alarm.stops == (name == "logprob_gap")
        assert check(row(**values), AlarmSection(stop=True), 10.0)[0].stops
    assert check(row(logprob_gap_mean=0.2), section, 10.0, replayed=True) == []
    assert [a.alarm for a in check(row(**{k: v for d in wrong.values() for k, v in d.items()}), section, 10.0)] == list(
        wrong
    )
    nothing = {"step": 1, "entropy": 0.0, "trained_tokens": 0, "sampled_tokens_mean": None, "invalid_call_share": 0.0}
    assert check(nothing, section, None) == [], "a step that trained on nothing says nothing about entropy"


def test_metrics_begin_behind_the_checkpoint(tmp_path):
    config = toy.run_config(tmp_path, tmp_path)
    heard = []
    recorder = Recorder(tmp_path, config, heard.append)
    recorder.emit("train", step=1, loss=float("nan"), parts={"a": float("inf"), "b": 1.0})
    kept = recorder.position
    recorder.emit("train", step=2)
    recorder.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "tra')  # what a kill in the middle of a write leaves
    recorder = Recorder(tmp_path, config, heard.append, kept)
    recorder.emit("train", step=3)
    recorder.close()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows] == [1, 3]
    assert rows[0]["loss"] is None
    assert rows[0]["parts"] == {"a": None, "b": 1.0}
    assert [r["step"] for r in heard] == [1, 2, 3]
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match="shorter than its checkpoint"):
        Recorder(tmp_path, config, None, kept)


@pytest.mark.long
def test_wandb_offline(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    config = toy.run_config(tmp_path, tmp_path, tracking={"wandb": "offline"})
    recorder = Recorder(tmp_path, config)
    recorder.emit("train", step=1, loss=0.5, reward_by_family={"sum": 0.25})
    recorder.emit("eval", step=1, mode="greedy", pass1=0.5)
    recorder.close()
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
