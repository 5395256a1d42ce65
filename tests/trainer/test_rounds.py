"""The synchronous source: a step in which everything fails ends the run, and says what happened."""

from importlib.util import find_spec

import pytest
from espalier.configs.schema import RunConfig
from espalier.envs.core import Task
from espalier.rollouts.types import Failure, FailureKind, Group
from espalier.trainer.checkpoint import Progress
from espalier.trainer.errors import UserError
from espalier.trainer.rounds import SyncSource
from espalier.trainer.sampling import make_sampler
from pydantic import ValidationError


class DeadSide:
    """A rollout side whose sampler has died."""

    def chains(self, chains, version, enough):
        return [[self.group(spec) for spec in chain] for chain in chains]

    def group(self, spec):
        failure = Failure("x", spec.id, spec.task.id, FailureKind.SAMPLER, "engine died.")
        return Group(spec.id, spec.task.id, (), (failure,))


class IdleSide(DeadSide):
    """Control: nothing failed, there is just nothing to train on."""

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
