"""Sampling goes on while the trainer works: never older than the bound, nothing thrown away, nothing trained twice."""

import json
import time
from dataclasses import replace

import pytest
import toy
from espalier.configs.schema import RunConfig
from espalier.rollouts.samplers.base import SamplerError
from espalier.rollouts.store import TrajectoryStore
from espalier.trainer.checkpoint import CheckpointStore
from espalier.trainer.loop import train
from espalier.trainer.rollout_side import RolloutSide
from pydantic import ValidationError


def run(base, out, staleness, **changes):
    schedule = {"kind": "async", "max_staleness": staleness, "checkpoint_every": 2}
    return toy.run_config(base, out, schedule=schedule, trainer={"steps": 6, **changes.pop("trainer", {})}, **changes)


def steps(folder):
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in found if row["kind"] == "train"]


def stored(folder):
    store = TrajectoryStore(folder / "trajectories", readonly=True)
    ids = store.ids()
    store.close()
    return ids


def consumed(folder):
    return CheckpointStore(folder / "checkpoints").newest().progress.consumed


@pytest.mark.parametrize("staleness", [1, 2])
def test_versions_are_as_old_as_allowed_and_no_older(toy_base, tmp_path, staleness):
    result = train(run(toy_base, tmp_path, staleness))
    rows = steps(tmp_path / "toy")
    assert result["steps"] == 6 and result["version"] == 6
    assert [row["step"] for row in rows] == list(range(1, 7))
    oldest = [row["staleness_max"] for row in rows]
    assert oldest[0] == 0 and max(oldest) == staleness, "sampling ran ahead, and not too far"
    assert all(row["sampled_by"] == row["step"] - 1 - row["staleness_max"] for row in rows)
    assert sorted(consumed(tmp_path / "toy")) == sorted(stored(tmp_path / "toy")), "nothing is discarded"


def test_versions_that_may_still_be_sampled_from_stay_on_the_disk(toy_base, tmp_path):
    kept = []

    def look(row):
        if row["kind"] == "train":
            kept.append(sorted(int(p.name[1:]) for p in (tmp_path / "toy" / "policies").glob("v*")))

    config = run(toy_base, tmp_path, 2, eval={"tasks": 2, "every": 0, "greedy": False})
    schedule = config.schedule.model_copy(update={"keep_recent": 1, "checkpoint_every": 100})
    train(config.model_copy(update={"schedule": schedule}), on_event=look)
    assert all({n - 2, n - 1} - {0, -1} <= set(have) for n, have in enumerate(kept, 1)), kept


def test_synchronously_nothing_is_stale(toy_base, tmp_path):
    train(toy.run_config(toy_base, tmp_path, trainer={"steps": 2}, eval={"tasks": 2, "every": 0, "greedy": False}))
    assert [row["staleness_max"] for row in steps(tmp_path / "toy")] == [0, 0]


def test_the_next_step_is_sampled_while_this_one_is_trained(toy_base, tmp_path):
    """Its trajectories are in the store before the trainer is done: a step that takes its time shows it."""
    seen = []

    def slow(row):
        if row["kind"] == "train" and row["step"] == 2:
            deadline = time.monotonic() + 60
            while not any(id.startswith("toy/3/") for id in stored(tmp_path / "toy")) and time.monotonic() < deadline:
                time.sleep(0.05)
            seen.extend(id for id in stored(tmp_path / "toy") if id.startswith("toy/3/"))

    train(run(toy_base, tmp_path, 1, trainer={"steps": 3}), on_event=slow)
    assert seen, "step 3 was sampled before step 2 was over"


class Killed(BaseException):
    """Stands for a kill -9."""


@pytest.mark.parametrize("when", [1, 3, 4])
def test_a_run_that_was_killed_goes_on_and_trains_nothing_twice(toy_base, tmp_path, when):
    def die(row):
        if row["kind"] == "train" and row["step"] == when:
            raise Killed

    config = run(toy_base, tmp_path, 2)
    with pytest.raises(Killed):
        train(config, on_event=die)
    acknowledged = set(stored(tmp_path / "toy"))
    result = train(config, resume=True)
    used = consumed(tmp_path / "toy")
    assert result["steps"] == 6 and len(used) == len(set(used))
    assert acknowledged <= set(used) == set(stored(tmp_path / "toy")), "what was stored is trained, once"
    assert max(row["staleness_max"] for row in steps(tmp_path / "toy")) <= 2


def test_each_version_is_compared_with_the_trainer_as_it_is_published(toy_base, tmp_path):
    train(run(toy_base, tmp_path, 2))
    rows = steps(tmp_path / "toy")
    assert max(row["staleness_max"] for row in rows) > 0
    assert all(0 < row["logprob_gap"] < 1e-4 for row in rows), "older versions sampled, and the gap is not theirs"


def test_a_sampler_that_serves_another_policy_ends_an_asynchronous_run(toy_base, tmp_path, monkeypatch):
    """As an engine would that goes on with an adapter from its cache."""
    serve = RolloutSide.publish
    first = []

    def stale(self, version):
        first.append(version)
        serve(self, replace(version, path=first[1].path, digest=first[1].digest) if len(first) > 1 else version)

    monkeypatch.setattr(RolloutSide, "publish", stale)
    config = run(toy_base, tmp_path, 2, alarms={"max_logprob_gap": 0.02}, trainer={"steps": 20})
    result = train(config)
    assert result["stopped"] == "alarm" and 1 < result["steps"] < 20
    gaps = [row["logprob_gap_mean"] for row in steps(tmp_path / "toy")]
    assert gaps[0] < 1e-4 and gaps[-1] > 0.02


def test_where_no_version_can_be_asked_the_gap_of_older_ones_is_not_taken_for_it(toy_base, tmp_path, monkeypatch):
    def fail(self, prompts, version):
        raise SamplerError("the engine is started again", retryable=True)

    monkeypatch.setattr(RolloutSide, "probe", fail)
    result = train(run(toy_base, tmp_path, 2, alarms={"max_logprob_gap": 1e-3}))
    rows = steps(tmp_path / "toy")
    assert result["stopped"] is None and max(row["staleness_max"] for row in rows) > 0
    assert not any("logprob_gap" in row for row in rows)


def test_stopping_early_leaves_nobody_running(toy_base, tmp_path):
    began = time.monotonic()
    result = train(run(toy_base, tmp_path, 2, trainer={"steps": 500}, eval={"tasks": 2, "every": 0, "deadline_s": 2.0}))
    assert result["stopped"] == "deadline" and time.monotonic() - began < 120


def test_more_versions_than_the_sampler_holds_are_refused():
    schedule = {"kind": "async", "max_staleness": 3}
    with pytest.raises(ValidationError, match=r"max_staleness = 3 keeps 5 versions in use, sampler.max_versions is 4"):
        RunConfig(schedule=schedule)
    RunConfig(schedule=schedule, sampler={"max_versions": 5})
