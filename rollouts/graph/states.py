"""Environment states as the operation graph needs them, where the environments live: digests, kept states, what tools
are declared to do.

Always true: a kept state is never changed by going on from it; one that the environment cannot keep whole is not kept;
what an environment cannot do is said by `Traits`, and never emulated.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import count
from typing import TYPE_CHECKING, Any, cast

from ...envs.core import Action, AgentEnv, Digestible, EnvFailure, Observation, Rollbackable, Snapshot
from ..types import plain_info

if TYPE_CHECKING:
    from ..envpool import Opening, StepResult

STATE_GONE = "state_gone"
"""The kind of the `EnvFailure` that says: this environment could not be brought to that state; it has done nothing."""
UNKNOWN_SIZE = 1 << 20
"""Bytes that a kept state counts for where the environment does not say."""


@dataclass(frozen=True, slots=True)
class Traits:
    """What an environment says of itself at a reset. `effects`: by the name of a tool; `digest`, `rollback`: what it
    can do; `by_calls`, `travels`: what it promises (see `AgentEnv`).
    """

    effects: Mapping[str, str] = field(default_factory=dict)
    digest: bool = False
    rollback: bool = False
    by_calls: bool = False
    travels: bool = False


@dataclass(frozen=True, slots=True)
class Kept:
    """A kept state: its number where it is, and the bytes it holds."""

    number: int
    size: int


@dataclass(frozen=True, slots=True)
class Came:
    """What came of a step or a reset (`result`), and the state behind it: its digest (None where the environment gives
    none) and the kept state, where it was asked for and could be kept. `seconds`: of the step, and of keeping.
    """

    result: Any
    digest: str | None
    kept: Kept | None
    seconds: float
    seconds_keeping: float = 0.0


@dataclass(frozen=True, slots=True)
class Made:
    """What a call into an environment made, before anybody has it: `snapshot` is kept only once somebody does."""

    came: Came
    snapshot: Snapshot | None = None


class States:
    """The kept states of one process. `begin`, `go_on` and `fork` block: to be called where environments are stepped;
    what they made is numbered by `had`, by whoever waited for it: what nobody waits for any more is not kept.
    """

    def __init__(self) -> None:
        self._kept: dict[int, Snapshot] = {}
        self._numbers = count()

    def had(self, made: Made) -> Came:
        """What came of a call, and the state behind it kept."""
        if made.snapshot is None:
            return made.came
        number = next(self._numbers)
        self._kept[number] = made.snapshot
        return replace(made.came, kept=Kept(number, made.snapshot.size or UNKNOWN_SIZE))

    def begin(
        self, env: AgentEnv, seed: int, options: Mapping[str, Any], keep: bool, terse: bool
    ) -> tuple[Made, Traits]:
        """See `StatePool`."""
        began = time.perf_counter()
        observation, info = env.reset(seed=seed, options=dict(options))
        spent = time.perf_counter() - began
        opening = plain_opening((observation, info, [tool.to_openai(terse=terse) for tool in env.tools]))
        return self._made(env, opening, spent, keep), traits_of(env)

    def go_on(self, env: AgentEnv, at: Kept | None, action: Action, keep: bool) -> Made:
        """See `StatePool`."""
        if at is not None:
            self._back(env, at)
        began = time.perf_counter()
        result = plain_step(env.step(action))
        spent = time.perf_counter() - began
        return self._made(env, result, spent, keep and not (result[2] or result[3]))

    def fork(self, env: AgentEnv, at: Kept) -> AgentEnv:
        """A branch of `env` at the kept state `at`."""
        found = self._find(at)
        try:
            return cast(AgentEnv, cast(Rollbackable, env).branch(found))
        except EnvFailure as error:
            raise EnvFailure(STATE_GONE, str(error)) from error

    def forget(self, number: int) -> None:
        """Let a kept state go."""
        self._kept.pop(number, None)

    def _back(self, env: AgentEnv, at: Kept) -> None:
        found = self._find(at)
        try:
            cast(Rollbackable, env).rollback(found)
        except EnvFailure as error:
            raise EnvFailure(STATE_GONE, str(error)) from error

    def _find(self, at: Kept) -> Snapshot:
        found = self._kept.get(at.number)
        if found is None:
            raise EnvFailure(STATE_GONE, "a kept state is not there any more")
        return found

    def _made(self, env: AgentEnv, result: Any, spent: float, keep: bool) -> Made:
        digest = _digest(env)
        if not keep or not isinstance(env, Rollbackable):
            return Made(Came(result, digest, None, spent))
        began = time.perf_counter()
        try:
            snapshot = env.snapshot()
        except Exception:  # it cannot be kept whole, so it is not kept
            snapshot = None
        return Made(Came(result, digest, None, spent, time.perf_counter() - began), snapshot)


def _digest(env: AgentEnv) -> str | None:
    if not isinstance(env, Digestible):
        return None
    try:
        found = env.state_digest()
    except Exception:  # then its states are named by their history
        return None
    return found if isinstance(found, str) else None


def traits_of(env: AgentEnv) -> Traits:
    """What `env` says of itself; to be asked after a reset."""
    return Traits(
        {tool.name: tool.effect for tool in env.tools},
        isinstance(env, Digestible),
        isinstance(env, Rollbackable),
        bool(getattr(env, "acts_by_calls", False)),
        bool(getattr(env, "snapshots_travel", False)),
    )


def plain_opening(opening: Opening) -> Opening:
    """What of a reset another process, and the graph, can keep."""
    observation, info, tools = opening
    return _plain(observation), plain_info(info), tools


def plain_step(result: StepResult) -> StepResult:
    """What of a step the runner looks at; the rest of `info` (a task, arrays) stays behind."""
    observation, reward, terminated, truncated, info = result
    kept = plain_info(info)
    for word in ("ungraded", "unrepeatable"):
        if info.get(word):
            kept.setdefault(word, str(info[word]))
    return _plain(observation), float(reward), bool(terminated), bool(truncated), kept


def _plain(observation: Observation) -> Observation:
    return Observation(tuple(observation.messages))
