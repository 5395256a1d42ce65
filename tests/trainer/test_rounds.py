"""The synchronous source: a step in which everything fails ends the run, and says what happened."""

import asyncio
import json
import threading
from contextlib import contextmanager
from importlib.util import find_spec
from itertools import pairwise

import pytest
import toy
from espalier.configs.schema import RunConfig
from espalier.envs.core import Task
from espalier.rollouts.render import RenderError
from espalier.rollouts.runner import GroupSpec
from espalier.rollouts.samplers.base import SamplerError, Sleeper
from espalier.rollouts.samplers.torch import TorchSampler
from espalier.rollouts.store import StoreError
from espalier.rollouts.types import Failure, FailureKind, Group
from espalier.trainer import tasks as tasklists
from espalier.trainer.checkpoint import Progress
from espalier.trainer.errors import UserError
from espalier.trainer.loop import train
from espalier.trainer.policy import PolicyStore
from espalier.trainer.rollout_side import RolloutSide
from espalier.trainer.rounds import SyncSource, describe
from espalier.trainer.sampling import make_pool, make_sampler
from pydantic import ValidationError


class DeadSide:
    """A rollout side whose sampler has died."""

    def chains(self, chains, version, enough):
        return [[self.group(spec) for spec in chain] for chain in chains]

    def rest(self):
        pass

    def group(self, spec):
        failure = Failure("x", spec.id, spec.task.id, FailureKind.SAMPLER, "engine died.")
        return Group(spec.id, spec.task.id, (), (failure,))


class IdleSide(DeadSide):
    """Control: nothing failed, there is just nothing to train on."""

    def graph_figures(self):
        return {}

    def group(self, spec):
        return Group(spec.id, spec.task.id, ())


def source(side):
    return SyncSource(RunConfig(), side, [Task(str(i), "") for i in range(64)], Progress())


def test_a_step_in_which_every_episode_fails_ends_the_run_with_the_reason():
    with pytest.raises(
        UserError, match=r"step 1: all \d+ episodes failed \(\d+ sampler\); the first said: engine died"
    ):
        source(DeadSide()).next(1)
    assert source(IdleSide()).next(1) is not None


class ChainsSeen(IdleSide):
    """Notes the chains it is asked for."""

    def chains(self, chains, version, enough):
        self.seen = chains
        return super().chains(chains, version, enough)


def test_each_place_of_a_batch_has_its_own_replacements_drawn_beforehand():
    side, again = ChainsSeen(), ChainsSeen()
    source(side).sample(3)
    source(again).sample(3)
    assert side.seen == again.seen, "what ends first decides nothing"
    config = RunConfig().trainer
    assert [len(chain) for chain in side.seen] == [1 + config.max_refills] * config.groups
    specs = [spec for chain in side.seen for spec in chain]
    assert len({spec.id for spec in specs}) == len(specs)
    assert {spec.id for chain in side.seen for spec in chain[:1]} == {f"run/3/{i}" for i in range(config.groups)}
    other = ChainsSeen()
    source(other).sample(4)
    assert [c[0].task for c in other.seen] != [c[0].task for c in side.seen]


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed here")
@pytest.mark.parametrize("kind", ["vllm", "vllm-server"])
def test_a_sampler_that_is_not_installed_is_one_sentence_with_the_command(toy_base, kind):
    with pytest.raises(UserError, match="not installed: pip install"):
        make_sampler(RunConfig(sampler={"kind": kind}), toy_base)


def test_a_url_is_for_a_server():
    with pytest.raises(ValidationError, match=r"sampler\.url is only for"):
        RunConfig(sampler={"kind": "vllm", "url": "http://127.0.0.1:8000"})
    with pytest.raises(ValidationError, match="url"):
        RunConfig(sampler={"kind": "vllm-server", "url": "ftp://x"})


class Dormant(TorchSampler):
    """The embedded sampler on a card that it has by turns: notes what happened in which order."""

    sleeps = True
    seen = ()
    busy = 2

    async def sleep(self):
        self.busy -= 1
        if self.busy > 0:  # its last cancelled requests are on their way out
            raise SamplerError("1 requests are running; vLLM cannot sleep now.", retryable=True)
        self.seen += ("sleep",)
        await asyncio.sleep(0.05)

    async def wake(self):
        self.seen += ("wake",)
        await asyncio.sleep(0.05)

    async def publish(self, version):
        self.seen += ("publish",)
        await super().publish(version)

    async def sample(self, request):
        self.seen += ("sample",) if self.seen[-1] != "sample" else ()
        return await super().sample(request)


class Shaky(TorchSampler):
    """Fails the episodes in `fails`; `asked`: all that came, in order."""

    fails = frozenset()
    asked = ()

    async def sample(self, request):
        self.asked += (request.session,)
        if request.session in self.fails:
            raise SamplerError("it broke")
        return await super().sample(request)


@contextmanager
def shaky(base, folder, *fails):
    config = toy.run_config(base, folder)
    sampler = Shaky(base, slots=8, threads=1, max_tokens=440)
    sampler.fails = frozenset(fails)
    tasks = tasklists.load(config.env, "train", 0, 8)
    side = RolloutSide(config, base, sampler, make_pool(config, tasks), folder / "run")
    try:
        side.publish(PolicyStore(folder / "policies", base).base_version)
        yield side, sampler, GroupSpec("g", tasks[0], 4)
    finally:
        side.close()


def test_episodes_that_fail_are_replaced_and_counted(toy_base, tmp_path):
    """Two of four, then one of the two that stand in for them; a second round makes the group whole."""
    with shaky(toy_base, tmp_path / "whole", "g/1", "g/2", "g/5") as (side, sampler, spec):
        (group,) = side.groups([spec], 0)
        assert [t.id for t in group.trajectories] == ["g/0", "g/3", "g/4", "g/6"]
        assert [f.id for f in group.failures] == ["g/1", "g/2", "g/5"]
        assert {t.group for t in group.trajectories} == {"g"} and len({t.seed for t in group.trajectories}) == 1
        assert describe([group])["episodes"] == 7 and describe([group])["failures"] == {"sampler": 3}
        kept = side.store.group("g")
        assert [t.id for t in kept.trajectories] == [t.id for t in group.trajectories], "a replay sees all of it"
        sampler.asked = ()
        assert [t.id for t in side.groups([spec], 0)[0].trajectories] == [t.id for t in group.trajectories]
        assert not sampler.asked, "a group that is whole is taken as it is"


def test_a_resumed_run_replaces_with_the_same_episodes(toy_base, tmp_path):
    """Killed once the group was stored, before or between the rounds."""
    with shaky(toy_base, tmp_path / "whole", "g/1", "g/2", "g/5") as (side, _, spec):
        (whole,) = side.groups([spec], 0)
    for begun in (4, 6):
        with shaky(toy_base, tmp_path / str(begun), "g/1", "g/2", "g/5") as (side, sampler, spec):
            numbers = {f"g/{i}" for i in range(begun)}
            trajectories = tuple(t for t in whole.trajectories if t.id in numbers)
            side.store.append(
                Group("g", spec.task.id, trajectories, tuple(f for f in whole.failures if f.id in numbers))
            )
            (group,) = side.groups([spec], 0)
            assert [(t.id, t.sequences) for t in group.trajectories] == [
                (t.id, t.sequences) for t in whole.trajectories
            ]
            assert set(sampler.asked) == {f"g/{i}" for i in range(begun, 7)}


def test_replacing_ends_after_as_many_rounds_as_allowed(toy_base, tmp_path):
    with shaky(toy_base, tmp_path, *(f"g/{i}" for i in range(1, 99))) as (side, sampler, spec):
        (group,) = side.groups([spec], 0)
        assert len(group.trajectories) == 1 and len(group.failures) == 3 + 3 + 3
        sampler.asked = ()
        side.groups([spec], 0)
        assert not sampler.asked, "nor does it begin anew"
    with shaky(toy_base, tmp_path / "all", *(f"g/{i}" for i in range(99))) as (side, _, spec):
        (group,) = side.groups([spec], 0)
        assert len(group.failures) == 4, "where all fail another task is next"


@pytest.mark.parametrize("cause", ["renderer", "store"])
def test_a_side_that_cannot_be_made_closes_its_sampler(toy_base, tmp_path, cause):
    """Otherwise an engine would outlive the sentence that says why."""
    config = toy.run_config(toy_base, tmp_path)
    sampler = TorchSampler(toy_base, slots=2, threads=1, max_tokens=440)
    base, folder = tmp_path / "base", tmp_path / "run"
    base.mkdir()
    if cause == "store":
        base = toy_base
        folder.mkdir()
        (folder / "trajectories").mkdir()
        (folder / "trajectories" / "trajectories.sqlite").write_text("no database" * 100)
    with pytest.raises(RenderError if cause == "renderer" else StoreError):
        RolloutSide(config, base, sampler, make_pool(config, tasklists.load(config.env, "train", 0, 8)), folder)
    with pytest.raises(SamplerError, match="closed"):
        asyncio.run(sampler.publish(PolicyStore(tmp_path / "policies", toy_base).base_version))
    assert "espalier-rollouts" not in {thread.name for thread in threading.enumerate()}


@pytest.mark.parametrize("sleeps", [True, False])
def test_the_sampler_sleeps_while_the_trainer_works_where_they_have_the_card_by_turns(toy_base, tmp_path, sleeps):
    config = toy.run_config(toy_base, tmp_path)
    sampler = Dormant(toy_base, slots=8, threads=1, max_tokens=440)
    sampler.sleeps = sleeps
    assert isinstance(sampler, Sleeper)
    tasks = tasklists.load(config.env, "train", 0, 8)
    side = RolloutSide(config, toy_base, sampler, make_pool(config, tasks), tmp_path / "run")
    turned = 0.0
    try:
        side.publish(PolicyStore(tmp_path / "policies", toy_base).base_version)
        for step in range(2):
            groups = side.groups([GroupSpec(f"toy/{step}/0", tasks[0], 2)], 0)
            assert len(groups[0].trajectories) == 2
            side.rest()
            stall, turned = side.seconds_turning - turned, side.seconds_turning
            assert (stall >= (0.1 if step else 0.05)) == sleeps, "falling asleep, and before that waking"
        side.evaluate(tasks[:2], 0, 0, greedy=True)
        side.rest()
        side.publish(PolicyStore(tmp_path / "policies", toy_base).base_version)
    finally:
        side.close()
    awake = ["publish", *["sample", "sleep", "wake"] * 3, "publish"]
    assert list(sampler.seen) == (awake if sleeps else ["publish", "sample", "publish"])


def test_turning_is_told_apart_from_publishing(toy_base, tmp_path, monkeypatch):
    """Each step ends with the sampler awake again; that it woke to be given a version counts once."""

    class Slow(Dormant):
        async def wake(self):
            await super().wake()
            await asyncio.sleep(0.5)

    def slow(*_):
        return Slow(toy_base, slots=8, threads=1, max_tokens=440)

    monkeypatch.setattr("espalier.trainer.rollout_side.make_sampler", slow)
    evaluation = {"tasks": 2, "every": 0, "greedy": False}
    train(toy.run_config(toy_base, tmp_path, trainer={"steps": 3}, eval=evaluation))
    found = [json.loads(line) for line in (tmp_path / "toy" / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in found if row["kind"] == "train"]
    phases = [name for name in steps[0] if name.startswith("seconds_")]
    assert {"seconds_rollout", "seconds_train", "seconds_publish", "seconds_checkpoint"} < set(phases)
    for before, row in pairwise(steps):
        assert row["seconds_turning"] >= 0.6
        assert sum(row[name] for name in phases) <= row["time"] - before["time"] + 1e-3
