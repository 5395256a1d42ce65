"""check_agent_env: a small honest environment passes, and every way of breaking it is caught by name."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from typing import Any

import gymnasium
import pytest
from espalier.envs.check import ContractViolation, check_agent_env
from espalier.envs.core import Action, AgentEnv, EnvFailure, Message, Observation, Snapshot, Task, ToolCall
from espalier.envs.spaces import ActionSpace, ObservationSpace
from espalier.envs.tools import Tool, Toolset, tool
from espalier.envs.turn import run_calls


class State:
    def __init__(self) -> None:
        self.total = 0
        self.noise = 0


@tool(effect="writes")
def add(state: State, amount: int) -> str:
    """Add to the total."""
    state.total += amount
    return str(state.total + state.noise)


@tool(effect="writes", ends=True)
def finish(state: State) -> str:
    """End."""
    return "done"


class Counter(AgentEnv):
    """Counts; all that a contract asks, in little."""

    def __init__(self) -> None:
        self.state = State()
        self.over = True
        self._tools = Toolset((add, finish)).bind(self.state)
        self.action_space = ActionSpace(self._tools)
        self.observation_space = ObservationSpace()

    @property
    def tools(self) -> Sequence[Tool]:
        return self._tools.tools

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        super().reset(seed=seed)
        self.state.total, self.over = 0, False
        self.state.noise = int(self.np_random.integers(1000))
        return Observation((Message(role="user", content=f"add {self.state.noise}"),)), {"task": Task("t", "add")}

    def step(self, action: Action) -> Any:
        if self.over:
            raise RuntimeError("call reset() first")
        result = run_calls(self._tools, action.tool_calls)
        self.over = result.ended or not action.tool_calls
        self.state.noise = int(self.np_random.integers(1000))
        return Observation(result.messages), float(self.over), self.over, False, {"tool_errors": result.errors}

    def state_digest(self) -> str:
        return hashlib.sha256(repr(self._everything()).encode()).hexdigest()

    def snapshot(self) -> Snapshot:
        return Snapshot("counter", self.state_digest(), self._everything())

    def rollback(self, snapshot: Snapshot) -> None:
        if snapshot.env_id != "counter":
            raise EnvFailure("foreign_snapshot", "not a counter's")
        self.state.total, self.state.noise, self.over, self.np_random.bit_generator.state = snapshot.state

    def branch(self, snapshot: Snapshot) -> AgentEnv:
        made = type(self)()
        made.rollback(snapshot)
        return made

    def _everything(self) -> Any:
        return self.state.total, self.state.noise, self.over, self.np_random.bit_generator.state


def test_an_honest_environment_passes_every_rule() -> None:
    passed = check_agent_env(Counter)
    assert {"seeding", "sample_valid", "mistakes", "rollback_future", "branch_apart", "digest_equal"} <= set(passed)


class NoCapabilities(AgentEnv):
    """Without snapshots there is nothing to be dishonest about."""

    def __init__(self) -> None:
        self.inner = Counter()
        self.action_space, self.observation_space = self.inner.action_space, self.inner.observation_space

    @property
    def tools(self) -> Sequence[Tool]:
        return self.inner.tools

    def reset(self, **options: Any) -> Any:
        return self.inner.reset(**options)

    def step(self, action: Action) -> Any:
        return self.inner.step(action)


def test_capabilities_are_optional() -> None:
    passed = check_agent_env(NoCapabilities)
    assert "rollback_future" not in passed and "digest_equal" not in passed


class StepsBeforeReset(Counter):
    def __init__(self) -> None:
        super().__init__()
        self.over = False


class StepsAfterTheEnd(Counter):
    started = False

    def reset(self, **options: Any) -> Any:
        self.started = True
        return super().reset(**options)

    def step(self, action: Action) -> Any:
        if self.started:
            self.over = False
        return super().step(action)


class IgnoresTheSeed(Counter):
    fresh = itertools.count()

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        return super().reset(seed=next(self.fresh), options=options)


class RemembersTheLastEpisode(Counter):
    episodes = 0

    def step(self, action: Action) -> Any:
        observation, reward, terminated, truncated, info = super().step(action)
        self.episodes += terminated
        return observation, reward + self.episodes, terminated, truncated, info


class RaisesForMistakes(Counter):
    def step(self, action: Action) -> Any:
        for call in action.tool_calls:
            self._tools.by_name[call.name]
        return super().step(action)


class EndsOnMistakes(Counter):
    def step(self, action: Action) -> Any:
        observation, reward, terminated, truncated, info = super().step(action)
        self.over = terminated or info["tool_errors"] > 0
        return observation, reward, self.over, truncated, info


class ShowsTracebacks(Counter):
    def step(self, action: Action) -> Any:
        observation, *rest, info = super().step(action)
        if info["tool_errors"]:
            text = '{"error": {"code": "x", "message": "Traceback (most recent call last)"}}'
            observation = Observation(tuple({**m, "content": text} for m in observation.messages))
        return observation, *rest, info


class LosesAnAnswer(Counter):
    def step(self, action: Action) -> Any:
        observation, *rest = super().step(action)
        return Observation(observation.messages[1:]), *rest


class ForgetsToCountErrors(Counter):
    def step(self, action: Action) -> Any:
        return *super().step(action)[:-1], {"tool_errors": 0}


class InfiniteReward(Counter):
    def step(self, action: Action) -> Any:
        observation, _, *rest = super().step(action)
        return observation, float("inf"), *rest


class NanWithoutAReason(Counter):
    def step(self, action: Action) -> Any:
        observation, _, *rest = super().step(action)
        return observation, float("nan"), *rest


class GoesOnWithoutACall(Counter):
    def step(self, action: Action) -> Any:
        observation, reward, _, truncated, info = super().step(action)
        self.over = False
        return observation, reward, False, truncated, info


class SamplesNonsense(Counter):
    def __init__(self) -> None:
        super().__init__()

        class Bad(ActionSpace):
            def sample(self, mask: Any = None, probability: Any = None) -> Action:
                return Action("", (ToolCall("add", {"amount": "many"}),))

        self.action_space = Bad(self._tools)


class NarrowObservations(Counter):
    def __init__(self) -> None:
        super().__init__()

        class Narrow(ObservationSpace):
            def contains(self, x: Any) -> bool:
                return False

        self.observation_space = Narrow()


class ForgetsTheGenerator(Counter):
    def rollback(self, snapshot: Snapshot) -> None:
        kept = self.np_random.bit_generator.state
        super().rollback(snapshot)
        self.np_random.bit_generator.state = kept


class ForgetsTheTotal(Counter):
    def rollback(self, snapshot: Snapshot) -> None:
        kept = self.state.total
        super().rollback(snapshot)
        self.state.total = kept + 1


class BranchesIntoItself(Counter):
    def branch(self, snapshot: Snapshot) -> AgentEnv:
        self.rollback(snapshot)
        return self


class TakesForeignSnapshots(Counter):
    def rollback(self, snapshot: Snapshot) -> None:
        if snapshot.env_id == "counter":
            super().rollback(snapshot)


class ConstantDigest(Counter):
    def state_digest(self) -> str:
        return "0" * 64


class DigestOfIdentity(Counter):
    def state_digest(self) -> str:
        return super().state_digest() + str(id(self))


class ClosesOnce(Counter):
    closed = False

    def close(self) -> None:
        if self.closed:
            raise RuntimeError("closed already")
        self.closed = True


class NoTask(Counter):
    def reset(self, **options: Any) -> Any:
        return super().reset(**options)[0], {}


class KindInEvaluations(Counter):
    kind = False

    def reset(self, *, options: dict[str, Any] | None = None, **more: Any) -> Any:
        self.kind = "evaluation" in (options or {})
        return super().reset(options=options, **more)

    def step(self, action: Action) -> Any:
        observation, reward, *rest = super().step(action)
        return observation, reward + self.kind, *rest


BROKEN = {
    StepsBeforeReset: "reset_first",
    StepsAfterTheEnd: "after_end",
    IgnoresTheSeed: "seeding",
    RemembersTheLastEpisode: "seeding_again",
    RaisesForMistakes: "mistakes",
    EndsOnMistakes: "mistakes_go_on",
    ShowsTracebacks: "no_traceback",
    LosesAnAnswer: "tool_messages",
    ForgetsToCountErrors: "tool_errors",
    InfiniteReward: "reward",
    NanWithoutAReason: "reward",
    GoesOnWithoutACall: "no_call_ends",
    SamplesNonsense: "sample_valid",
    NarrowObservations: "observation_space",
    ForgetsTheGenerator: "rollback_digest",
    ForgetsTheTotal: "rollback_future",
    BranchesIntoItself: "branch_apart",
    TakesForeignSnapshots: "foreign_snapshot",
    ConstantDigest: "digest_differs",
    DigestOfIdentity: "digest_equal",
    ClosesOnce: "close",
    NoTask: "task",
    KindInEvaluations: "evaluation",
}


@pytest.mark.parametrize(("broken", "rule"), BROKEN.items(), ids=lambda v: v if isinstance(v, str) else v.__name__)
def test_each_way_of_breaking_the_contract_is_caught(broken: type[Counter], rule: str) -> None:
    with pytest.raises(ContractViolation) as caught:
        check_agent_env(broken)
    violations = {v.rule: v for v in caught.value.violations}
    assert rule in violations and violations[rule].hint
    assert rule in str(caught.value)


def test_something_else_than_an_agent_environment_is_said_to_be_one() -> None:
    with pytest.raises(ContractViolation, match="Subclass AgentEnv"):
        check_agent_env(lambda: gymnasium.make("CartPole-v1"))  # type: ignore[arg-type, return-value]
