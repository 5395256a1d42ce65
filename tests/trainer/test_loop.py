"""Whole runs of a toy policy with the real sampler, runner, stores and trainer."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import toy
from espalier.configs.load import keys
from espalier.envs.core import EnvFailure
from espalier.rollouts.store import TrajectoryStore
from espalier.trainer.checkpoint import CheckpointStore
from espalier.trainer.durable import CorruptFolder
from espalier.trainer.errors import UserError
from espalier.trainer.loop import collect, train
from espalier.trainer.policy import PolicyStore
from espalier.trainer.resume import FREE
from espalier.trainer.rounds import SyncSource

PHASES = ("seconds_rollout", "seconds_turning", "seconds_train", "seconds_publish", "seconds_checkpoint")
TIMES = {"time", *PHASES, "tok_s", "seconds", "graph"}


def rows(folder, kind=None):
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in found if kind in (None, row["kind"])]


def timeless(folder):
    """What a run's metrics say apart from how long it took; phases repeat when a run is resumed."""
    return [{k: v for k, v in row.items() if k not in TIMES} for row in rows(folder) if row["kind"] != "phase"]


def adapters(folder, base):
    store = PolicyStore(folder / "policies", base)
    return {number: store.open(number).digest for number in store.list()}


def progress(folder):
    checkpoint = CheckpointStore(folder / "checkpoints").newest()
    return checkpoint.progress


@pytest.fixture(scope="module")
def whole(toy_base, tmp_path_factory):
    """An uninterrupted run of 5 steps: its folder and result."""
    out = tmp_path_factory.mktemp("whole")
    events = []
    config = toy.run_config(toy_base, out, trainer={"steps": 5})
    result = train(config, on_event=events.append)
    return out / "toy", result, events


def test_a_run_writes_what_it_did(whole, toy_base):
    folder, result, events = whole
    assert result["steps"] == 5
    assert result["version"] == 5
    assert set(result["before"]) == set(result["after"]) == {"sampled", "greedy"}
    assert rows(folder) == events, "the listener hears exactly what is written"
    train_rows = rows(folder, "train")
    assert [row["step"] for row in train_rows] == [1, 2, 3, 4, 5]
    for row in train_rows:
        assert row["groups_used"] <= 4
        assert row["episodes"] == 4 * (row["groups_used"] + row["groups_no_signal"])
        assert row["logprob_gap"] < 1e-4, "the sampler's log-probabilities are the trainer's"
        assert row["failures"] == {}
        assert 0 < row["trained_tokens"] <= row["sampled_tokens"]
    evals = [(row["step"], row["mode"]) for row in rows(folder, "eval")]
    assert evals == [(0, "sampled"), (0, "greedy"), (2, "sampled"), (4, "sampled"), (5, "sampled"), (5, "greedy")]
    assert json.loads((folder / "config.json").read_text())["name"] == "toy"


def test_a_run_says_where_its_seconds_went(whole):
    """The phases of a step follow one another: together they are no more than the time between two rows."""
    train_rows = rows(whole[0], "train")
    for before, row in pairwise(train_rows):
        assert min(row["seconds_rollout"], row["seconds_train"], row["seconds_publish"]) > 0
        assert sum(row[name] for name in PHASES) <= row["time"] - before["time"] + 1e-3
    every = 2  # the toy's schedule.checkpoint_every; a commit stands in the row behind it
    first, *others = (row["seconds_checkpoint"] > 0 for row in train_rows)
    assert first, "the commit before the first step"
    assert others == [row["step"] % every == 1 for row in train_rows[1:]]
    assert all(row["seconds_turning"] == 0 for row in train_rows), "this sampler never sleeps"


def test_a_run_says_what_it_shared(whole):
    """The toy's prompts are one tree; the first step compares it with the flat path."""
    folder, _, _ = whole
    for row in rows(folder, "train"):
        assert row["shared_prefix"] == "tree"
        assert row["tokens_processed"] <= 1.1 * row["tokens_unique"] < row["tokens_total"]
    [said] = [row for row in rows(folder, "phase") if "tree_error" in row]
    assert said["tree_error"] <= 1e-5


def test_a_tree_that_is_wrong_is_an_alarm_and_training_goes_on(toy_base, tmp_path, monkeypatch):
    monkeypatch.setattr("espalier.trainer.tree.sharing.LIMITS", {torch.float32: 0.0})
    evaluation = {"tasks": 2, "every": 0, "greedy": False}
    result = train(toy.run_config(toy_base, tmp_path, trainer={"steps": 2}, eval=evaluation))
    assert result["steps"] == 2
    [alarm] = rows(tmp_path / "toy", "alarm")
    assert alarm["alarm"] == "token_tree"
    assert "training goes on flat: tiles: its gradient is off by" in alarm["message"]
    assert all(row["shared_prefix"].startswith("flat: tiles: its gradient") for row in rows(tmp_path / "toy", "train"))


def test_a_tree_that_was_asked_for_and_cannot_be_is_an_alarm(toy_base, tmp_path):
    """LoRA has dropout: training goes on flat, but not in silence."""
    policy = {"lora": {"rank": 4, "alpha": 8, "dropout": 0.1}}
    evaluation = {"tasks": 2, "every": 0, "greedy": False}
    for asked, alarms in (("tree", 1), ("auto", 0)):
        settings = {"steps": 1, "shared_prefix": asked}
        train(toy.run_config(toy_base, tmp_path / asked, policy=policy, trainer=settings, eval=evaluation))
        found = rows(tmp_path / asked / "toy", "alarm")
        assert len(found) == alarms
        assert all("training goes on flat: dropout" in alarm["message"] for alarm in found)


def test_every_version_that_sampled_is_recorded_and_recent_ones_are_kept(whole, toy_base):
    folder, result, _ = whole
    kept = adapters(folder, toy_base)
    assert {4, 5} <= set(kept)
    assert result["best_version"] in {*kept, 0}
    with TrajectoryStoreOf(folder) as store:
        for trajectory in store:
            step = int(trajectory.group.split("/")[1])
            assert trajectory.versions == {step - 1}


def test_every_stored_trajectory_is_consumed_once(whole):
    folder, _, _ = whole
    consumed = progress(folder).consumed
    assert len(consumed) == len(set(consumed))
    with TrajectoryStoreOf(folder) as store:
        assert sorted(store.ids()) == sorted(consumed)


class TrajectoryStoreOf:
    def __init__(self, folder):
        self.store = TrajectoryStore(folder / "trajectories", readonly=True)

    def __enter__(self):
        return self.store

    def __exit__(self, *_):
        self.store.close()


class Killed(BaseException):
    """Stands for a kill -9: nothing of the run's own code handles it."""


@pytest.mark.parametrize("when", [("eval", 0), ("train", 1), ("train", 4)], ids=str)
def test_resume_equals_no_interruption(whole, toy_base, tmp_path, when):
    """Stopped dead in the middle of a step, after it published a version but before it was committed."""
    folder, result, _ = whole
    config = toy.run_config(toy_base, tmp_path, trainer={"steps": 5})

    def die(row):
        if (row["kind"], row.get("step")) == when:
            raise Killed

    with pytest.raises(Killed):
        train(config, on_event=die)
    resumed = train(config, resume=True)
    mine = tmp_path / "toy"
    assert timeless(mine) == timeless(folder)
    assert adapters(mine, toy_base) == adapters(folder, toy_base)
    assert progress(mine).consumed == progress(folder).consumed
    assert {k: resumed[k] for k in ("before", "after", "version")} == {
        k: result[k] for k in ("before", "after", "version")
    }
    with TrajectoryStoreOf(mine) as store, TrajectoryStoreOf(folder) as other:
        assert sorted(store.ids()) == sorted(other.ids())


def test_control_another_seed_is_another_run(whole, toy_base, tmp_path):
    folder, _, _ = whole
    train(
        toy.run_config(toy_base, tmp_path, seed=1, trainer={"steps": 1}, eval={"tasks": 2, "every": 0, "greedy": False})
    )
    assert rows(tmp_path / "toy", "train")[0]["sampled_tokens"] != rows(folder, "train")[0]["sampled_tokens"]


def test_a_finished_run_resumed_measures_only(whole, toy_base, tmp_path):
    import shutil

    folder, result, _ = whole
    shutil.copytree(folder, tmp_path / "toy")
    again = train(toy.run_config(toy_base, tmp_path, trainer={"steps": 5}), resume=True)
    assert again["after"] == result["after"]
    assert len(rows(tmp_path / "toy", "train")) == 5


def test_a_run_is_continued_with_what_it_trains_only(whole, toy_base, tmp_path):
    """A configuration that trains something else is refused with both values, and nothing of the run is touched."""
    import shutil

    folder, _, _ = whole
    shutil.copytree(folder, tmp_path / "toy")
    written = {name: (tmp_path / "toy" / name).read_bytes() for name in ("config.json", "metrics.jsonl")}
    other = {"trainer": {"steps": 5, "learning_rate": 1e-3}, "seed": 7, "episode": {"max_turns": 1}}
    with pytest.raises(UserError) as met:
        train(toy.run_config(toy_base, tmp_path, **other), resume=True)
    said = str(met.value)
    for words in ("trainer.learning_rate = 0.02 became 0.001", "seed = 0 became 7", "episode.max_turns = 2 became 1"):
        assert words in said
    assert "--name" in said and "\n" not in said and said.count(" became ") == 3
    assert {name: (tmp_path / "toy" / name).read_bytes() for name in written} == written
    free = {
        "trainer": {"steps": 6, "micro_batch": 4},
        "eval": {"tasks": 6, "greedy": False},
        "sampler": {"slots": 16},
        "schedule": {"checkpoint_every": 3},
        "graph": {"enabled": False},
    }
    assert train(toy.run_config(toy_base, tmp_path, **free), resume=True)["steps"] == 6
    assert len(rows(tmp_path / "toy", "train")) == 6


def test_what_may_change_on_resume_is_in_the_schema():
    names = [name for name, _ in keys()]
    for free in FREE:
        assert any(name.startswith(free) if free.endswith(".") else name == free for name in names), free


def test_a_run_is_not_overwritten(whole, toy_base):
    folder, _, _ = whole
    with pytest.raises(UserError, match="--resume"):
        train(toy.run_config(toy_base, folder.parent, trainer={"steps": 5}))


@pytest.mark.parametrize("when", [("phase", None), ("eval", 0), ("train", 1)], ids=str)
def test_a_run_that_did_no_step_does_not_block_the_corrected_command(whole, toy_base, tmp_path, when):
    """It is begun anew, and is the run that it would have been in an empty folder; one that did a step is not."""
    folder, result, _ = whole

    def fail(row):
        if (row["kind"], row.get("step")) == when:
            raise UserError("this fails")

    wrong = {"trainer": {"steps": 5, "learning_rate": 1.0}, "eval": {"tasks": 5, "every": 0}}
    with pytest.raises(UserError, match="this fails"):
        train(toy.run_config(toy_base, tmp_path, **wrong), on_event=fail)
    corrected = toy.run_config(toy_base, tmp_path, trainer={"steps": 5})
    mine = tmp_path / "toy"
    assert (mine / "config.json").is_file()
    if when == ("train", 1):
        with pytest.raises(UserError, match="already holds a run"):
            train(corrected)
        return
    assert train(corrected)["after"] == result["after"]
    assert timeless(mine) == timeless(folder)
    assert adapters(mine, toy_base) == adapters(folder, toy_base)


def test_what_stood_in_a_folder_before_the_run_stays(toy_base, tmp_path):
    """Folders of a user's own that are called like a run's are not taken for what a failed run left."""
    notes = [tmp_path / "toy" / name / "notes.txt" for name in ("policies", "checkpoints")]
    for note in notes:
        note.parent.mkdir(parents=True)
        note.write_text("mine")
    train(toy.run_config(toy_base, tmp_path, trainer={"steps": 1}))
    assert [note.read_text() for note in notes] == ["mine", "mine"]


def test_what_a_first_step_sampled_before_it_failed_is_neither_removed_nor_trained_on_by_another_configuration(
    whole, toy_base, tmp_path, monkeypatch
):
    folder, _, _ = whole
    with monkeypatch.context() as broken:
        broken.setattr("espalier.trainer.grpo.trainer.OnlineGRPOTrainer.training_step", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(toy.run_config(toy_base, tmp_path, trainer={"steps": 5}))
    with TrajectoryStoreOf(tmp_path / "toy") as store:
        sampled = store.ids()
    hotter = toy.run_config(toy_base, tmp_path, trainer={"steps": 5}, sampling={"temperature": 2.0})
    with pytest.raises(UserError, match="already holds a run"):
        train(hotter)
    with pytest.raises(UserError, match=r"sampling\.temperature = 1\.0 became 2\.0"):
        train(hotter, resume=True)
    train(toy.run_config(toy_base, tmp_path, trainer={"steps": 5}), resume=True)
    with TrajectoryStoreOf(tmp_path / "toy") as store:
        assert sampled and store.ids()[: len(sampled)] == sampled
    assert timeless(tmp_path / "toy") == timeless(folder)


def test_a_damaged_checkpoint_falls_back_to_the_one_before(whole, toy_base, tmp_path):
    import shutil

    folder, _, _ = whole
    shutil.copytree(folder, tmp_path / "toy")
    store = CheckpointStore(tmp_path / "toy" / "checkpoints")
    assert len(store.list()) == 2
    newest = tmp_path / "toy" / "checkpoints" / f"commit-{store.list()[-1]:08d}"
    (newest / "state.safetensors").write_bytes(b"broken")
    assert store.newest().progress.step == 4
    train(toy.run_config(toy_base, tmp_path, trainer={"steps": 5}), resume=True)
    assert timeless(tmp_path / "toy") == timeless(folder)
    for path in (tmp_path / "toy" / "checkpoints").glob("commit-*/state.safetensors"):
        path.write_bytes(b"broken")
    with pytest.raises(CorruptFolder, match=r"state\.safetensors"):
        store.newest()


def test_a_full_disk_leaves_the_last_checkpoint_usable(whole, toy_base, tmp_path):
    """No file may grow beyond what the first commit needed plus a little: a later write fails, in one sentence."""
    import resource

    folder, _, _ = whole
    config = toy.run_config(toy_base, tmp_path, trainer={"steps": 5})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(row):
        if (row["kind"], row.get("step")) == ("train", 3):
            resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))

    try:
        with pytest.raises(UserError, match=r"--resume") as caught:
            train(config, on_event=fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(caught.value)
    assert progress(tmp_path / "toy").step == 2
    train(config, resume=True)
    assert timeless(tmp_path / "toy") == timeless(folder)
    assert adapters(tmp_path / "toy", toy_base) == adapters(folder, toy_base)


def test_replay_trains_on_what_was_stored(whole, toy_base, tmp_path):
    folder, _, _ = whole
    config = toy.run_config(toy_base, tmp_path, trainer={"steps": 3})
    result = train(config, from_trajectories=folder)
    assert result["steps"] == 3
    assert result["after"] == {}
    first, original = rows(tmp_path / "toy", "train")[0], rows(folder, "train")[0]
    assert first["trained_tokens"] == original["trained_tokens"]
    assert first["loss"] == pytest.approx(original["loss"], abs=1e-6)
    assert first["logprob_gap"] < 1e-4, "the first batch was sampled by this very base"
    assert rows(tmp_path / "toy", "train")[2]["logprob_gap"] > 0
    consumed = progress(tmp_path / "toy").consumed
    assert len(consumed) == len(set(consumed))
    assert not (tmp_path / "toy" / "trajectories").exists()


@pytest.mark.long
def test_replay_ends_when_the_trajectories_do(whole, toy_base, tmp_path):
    folder, _, _ = whole
    with TrajectoryStoreOf(folder) as store:
        usable = sum(group.has_signal for group in store.groups())
    result = train(toy.run_config(toy_base, tmp_path, trainer={"steps": 50}), from_trajectories=folder / "trajectories")
    assert result["steps"] == -(-usable // 4)


def test_from_adapter_continues_it(whole, toy_base, tmp_path):
    folder, _, _ = whole
    adapter = PolicyStore(folder / "policies", toy_base).open(5).path
    short = {"tasks": 12, "every": 0}
    config = toy.run_config(toy_base, tmp_path, policy={"from_adapter": adapter}, trainer={"steps": 1}, eval=short)
    train(config)
    before = [row["pass1"] for row in rows(tmp_path / "toy", "eval") if row["step"] == 0]
    after = [row["pass1"] for row in rows(folder, "eval") if row["step"] == 5]
    assert before == after, "it begins where the other run ended"
    assert rows(tmp_path / "toy", "train")[0]["sampled_by"] == 1


def test_collecting_stores_and_trains_nothing(toy_base, tmp_path):
    config = toy.run_config(toy_base, tmp_path)
    (tmp_path / "toy").mkdir()
    first = collect(config, episodes=6)
    second = collect(config, episodes=8)
    assert (first["episodes"], second["episodes"]) == (8, 8)
    assert first["version"] == 0
    with TrajectoryStoreOf(tmp_path / "toy") as store:
        assert len(store) == 16
    assert not (tmp_path / "toy" / "policies").exists()
    with pytest.raises(UserError, match="already holds a run"):
        train(config)


def test_early_stop_serves_the_best(toy_base, tmp_path):
    """With a learning rate that destroys the policy, no evaluation beats the first."""
    config = toy.run_config(
        toy_base,
        tmp_path,
        trainer={"steps": 20, "learning_rate": 1.0, "max_grad_norm": 100.0},
        eval={"every": 1, "early_stop": 2, "every_tasks": 12},
    )
    result = train(config)
    assert result["stopped"] == "early_stop"
    assert result["steps"] < 20
    assert result["version"] == result["best_version"]
    best = max(row["pass1"] for row in rows(tmp_path / "toy", "eval") if 0 < row["step"] <= result["steps"])
    assert result["after"]["sampled"]["pass1"] == best


def test_alarms_are_said_and_can_stop(toy_base, tmp_path):
    config = toy.run_config(
        toy_base, tmp_path, trainer={"steps": 9}, alarms={"min_entropy": 50.0, "stop": True}, eval={"tasks": 2}
    )
    result = train(config)
    assert result["stopped"] == "alarm"
    assert result["steps"] == 1
    [alarm] = rows(tmp_path / "toy", "alarm")
    assert alarm["alarm"] == "entropy"
    assert "entropy has collapsed" in alarm["message"]


def test_the_deadline_ends_training_and_then_measures(toy_base, tmp_path):
    config = toy.run_config(toy_base, tmp_path, trainer={"steps": 500}, eval={"deadline_s": 0.2, "tasks": 2})
    result = train(config)
    assert result["stopped"] == "deadline"
    assert 0 < result["steps"] < 500
    assert result["after"]["sampled"]["n"] == 2


@pytest.mark.long
def test_learning(toy_base, tmp_path):
    """After some steps the policy does what the environment wants clearly more often than before."""
    config = toy.run_config(
        toy_base,
        tmp_path,
        trainer={"steps": 60, "groups": 8, "group_size": 8, "learning_rate": 5e-3},
        eval={"tasks": 100, "every": 0, "greedy": False},
    )
    result = train(config)
    assert result["after"]["sampled"]["pass1"] > result["before"]["sampled"]["pass1"] + 0.1


class Broken(toy.Letters):
    """Every step fails on our side."""

    def step(self, action):
        raise EnvFailure("engine_crashed", "the engine is gone")


def test_a_run_whose_episodes_all_fail_says_why(toy_base, tmp_path, monkeypatch):
    monkeypatch.setattr(toy.Letters, "step", Broken.step)
    with pytest.raises(UserError, match=r"none of 12 held-out tasks .*12 env"):
        train(toy.run_config(toy_base, tmp_path))
    # every episode asks the environment, those that a budget cut too
    changes = {"eval": {"tasks": 1, "greedy": False}, "episode": {"on_overflow": "grade"}}
    config = toy.run_config(toy_base, tmp_path, name="again", **changes)
    monkeypatch.setattr("espalier.trainer.run.Run._measure", lambda *_: {})
    with pytest.raises(UserError, match=r"step 1: all 48 episodes failed .*engine is gone"):
        train(config)


def test_a_card_that_is_full_is_one_sentence_and_the_run_goes_on_with_less(toy_base, tmp_path):
    """The forward pass of the second step finds no room."""
    armed = []

    class Source(SyncSource):
        def next(self, step):
            armed.extend([step] if step == 2 else [])
            return super().next(step)

    def full(module, _):
        if armed and module.training and torch.is_grad_enabled():
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total of ...")

    changes = {"trainer": {"steps": 2}, "schedule": {"checkpoint_every": 1}}
    hook = torch.nn.modules.module.register_module_forward_pre_hook(full)
    try:
        with pytest.raises(UserError) as met:
            train(toy.run_config(toy_base, tmp_path, **changes), make_source=Source)
    finally:
        hook.remove()
    said = str(met.value)
    assert "Tried to allocate 2.00 GiB); lower trainer.micro_batch" in said and "GPU 0" not in said
    assert "policy.gradient_checkpointing" in said and "policy.quantization" in said and "--resume" in said
    with_less = {**changes, "policy": {"gradient_checkpointing": True}}
    config = toy.run_config(toy_base, tmp_path, **{**with_less, "trainer": {"steps": 2, "micro_batch": 4}})
    assert train(config, resume=True)["steps"] == 2
    assert [row["step"] for row in rows(tmp_path / "toy", "train")] == [1, 2]


CHILD = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
import toy
from espalier.trainer.loop import train

config = toy.run_config(Path(sys.argv[2]), Path(sys.argv[3]), trainer={"steps": 5})
folder = config.out / config.name
train(config, resume=(folder / "config.json").exists(), on_event=lambda row: print(row["kind"], flush=True))
print("finished", flush=True)
"""


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", [1, 2])
def test_kill_minus_9_anywhere(whole, toy_base, tmp_path, seed):
    """Real processes, killed again and again at random moments until one gets through."""
    folder, _, _ = whole
    draw = random.Random(seed)
    arguments = [sys.executable, "-c", CHILD, str(Path(__file__).parent), str(toy_base), str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    kills = 0
    for _ in range(40):
        child = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, env=environment)
        for _ in range(draw.randint(1, 9) if kills < 8 else 1000):
            line = child.stdout.readline()
            if line in ("finished\n", ""):
                break
        if line == "finished\n":
            assert child.wait(60) == 0
            break
        assert line, "the child died by itself"
        time.sleep(draw.uniform(0, 0.1))
        os.kill(child.pid, signal.SIGKILL)
        child.wait(60)
        kills += 1
    else:
        pytest.fail("never finished")
    assert kills >= 3
    mine = tmp_path / "toy"
    assert timeless(mine) == timeless(folder)
    assert adapters(mine, toy_base) == adapters(folder, toy_base)
    assert progress(mine).consumed == progress(folder).consumed
