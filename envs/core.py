"""The contract between an agent and its world.

An `AgentEnv` is a `gymnasium.Env` whose actions are what a language model said (text and tool calls, already parsed)
and whose observations are the chat messages that answer it. Always true here:

* an agent's mistake is answered by a `ToolError` in the observation and never raised;
* a failure of ours is raised as `EnvFailure` and never turned into a reward;
* a reward of NaN with `info["ungraded"]` means "no verdict": it must be dropped, never read as a number;
* snapshots are optional. `capabilities(env)` says what an environment can do; nothing is emulated in silence.
"""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, TypedDict, runtime_checkable

import gymnasium

if TYPE_CHECKING:
    from .tools import Tool

Role = Literal["system", "user", "assistant", "tool"]


class Message(TypedDict, total=False):
    """One chat message in OpenAI's shape; `tool_call_id` and `name` stand on tool results."""

    role: Role
    content: str
    name: str
    tool_call_id: str


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One call as the policy wrote it. `arguments is None`: it could not be parsed, and `raw` says what stood there."""

    name: str
    arguments: Mapping[str, Any] | None
    raw: str = ""
    id: str = ""


@dataclass(frozen=True, slots=True)
class Action:
    """What the policy said in one turn, parsed. No tool call means: it has finished."""

    text: str = ""
    tool_calls: tuple[ToolCall, ...] = ()


@dataclass(frozen=True, slots=True)
class Observation:
    """The messages that answer an action (or open an episode), in order."""

    messages: tuple[Message, ...] = ()


@dataclass(frozen=True, slots=True)
class ToolError:
    """A mistake of the agent's, told so that a machine could mend it.

    Applying `suggestions[0]` (a JSON patch of argument names to values, `{"arguments": {...}}` or `{"name": ...}`) to
    the call is the intended mechanical repair. Never carries a traceback, a path of the host or anything of the answer.
    """

    code: str
    message: str
    field: str | None = None
    received: Any = None
    expected: str | None = None
    retryable: bool = True
    hint: str | None = None
    suggestions: tuple[Mapping[str, Any], ...] = ()

    def to_json(self) -> str:
        """One compact JSON object, `{"error": {...}}`, without empty fields."""
        body = {k: v for k, v in asdict(self).items() if v not in (None, (), [])}
        return json.dumps({"error": body}, ensure_ascii=False, default=str, separators=(", ", ": "))


class EnvFailure(RuntimeError):
    """The environment itself failed (not the agent): `kind` is a short stable word, e.g. "engine_crashed"."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(f"{kind}: {message}")
        self.kind = kind


@dataclass(frozen=True, slots=True)
class Task:
    """One problem, data only. `id` is unique within a data set and stable across runs; `family` groups reports."""

    id: str
    instruction: str
    family: str = ""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A handle to a whole environment state; `state` is opaque and belongs to the environment class that made it.

    `size`: bytes that it holds, 0 where that is not known.
    """

    env_id: str
    digest: str
    state: Any = field(repr=False, compare=False, hash=False)
    size: int = field(default=0, compare=False)


@runtime_checkable
class Rollbackable(Protocol):
    """Optional capability: return to, or continue from, an earlier state. Complete or an error, never a part."""

    def snapshot(self) -> Snapshot:
        """Keep the present state."""

    def rollback(self, snapshot: Snapshot) -> None:
        """Return to `snapshot`. Raises `EnvFailure("foreign_snapshot")` when it is not this environment's."""

    def branch(self, snapshot: Snapshot) -> gymnasium.Env[Any, Any]:
        """A second environment that continues from `snapshot`; neither sees the other's later changes."""


@runtime_checkable
class Digestible(Protocol):
    """Optional capability: a digest that is equal exactly when the states are (random generator included)."""

    def state_digest(self) -> str:
        """Hex sha256 of the whole state."""


Capability = Literal["rollback", "digest"]


def capabilities(env: gymnasium.Env[Any, Any]) -> frozenset[Capability]:
    """What `env` can do beyond the contract: it, or what it wraps. A plain Gymnasium environment gets snapshots from
    `copied.SnapshotByCopy`, which says why where it cannot.
    """
    found: set[Capability] = set()
    layer: gymnasium.Env[Any, Any] | None = env
    while layer is not None:
        if isinstance(layer, Rollbackable):
            found.add("rollback")
        if isinstance(layer, Digestible):
            found.add("digest")
        layer = layer.env if isinstance(layer, gymnasium.Wrapper) else None
    return frozenset(found)


class AgentEnv(gymnasium.Env[Observation, Action]):
    """A Gymnasium environment that a language model can act in; one instance, one episode at a time.

    `reset(options={"task": Task})` starts that task; without it the environment draws one by its seeded generator. In
    an evaluation `options` also says `"evaluation": True`; the reward of an episode must not depend on it.
    `terminated` means that the agent ended the episode (it submitted, or answered without a call); `truncated` that a
    limit did.
    """

    acts_by_calls: ClassVar[bool] = False
    """Promise: what a turn does depends on the names and arguments of its calls alone (on `raw` too where a call could
    not be parsed); text beside them is not read, ids are only echoed. Turns that differ in the rest are then one
    operation."""
    snapshots_travel: ClassVar[bool] = False
    """Promise: every environment made alike takes a snapshot of any other; else only its origin and its branches do."""

    @property
    @abstractmethod
    def tools(self) -> Sequence[Tool]:
        """The tools offered in this episode, in a stable order."""

    @abstractmethod
    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Start an episode. `info["task"]` is the `Task` in play.

        Call `super().reset(seed=seed)` first: it seeds `self.np_random`.
        """
        super().reset(seed=seed)
        return Observation(), {}

    @abstractmethod
    def step(self, action: Action) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Carry out one turn: run the calls, answer each by one tool message in the order of the calls.

        `info["tool_errors"]` counts calls answered by a `ToolError`. `info["unrepeatable"]` says why the same turn
        might go otherwise next time (a time limit was met), where it might; such a turn is never kept. Raises
        `EnvFailure` for a failure of ours.
        """
