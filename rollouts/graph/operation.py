"""What one turn is to the operation graph: a canonical operation, its class, and the outcome as it is kept.

Always true: canonical form loses nothing that an environment may tell by (the order of arguments, 1 against 1.0, text
where the environment does not promise to ignore it), so that equal operations are equal to it; what cannot be written
as JSON is no operation; an outcome read back is the outcome that was kept, byte for byte.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from hashlib import blake2b, sha256
from typing import Any, cast

from ...envs.core import Action, Message, Observation, ToolCall
from ...envs.tools import MAX_CALL_CHARS
from ..envpool import StepResult

FORM = 1
"""Of keys and outcomes; another number, another graph."""

Key = bytes
"""16 bytes that name a namespace, a state or an operation."""


def key(*parts: bytes | str) -> Key:
    """A key of `parts`; their borders count."""
    made = blake2b(digest_size=16)
    for part in parts:
        data = part if isinstance(part, bytes) else part.encode("utf-8", "surrogatepass")
        made.update(len(data).to_bytes(8, "little") + data)
    return made.digest()


@dataclass(frozen=True, slots=True)
class Operation:
    """`text` is the canonical form, `id` its key, `action` what the environment gets, `tools` the names called.

    `ids`: the ids of the calls as the policy's turn has them, which `action` has not where they are only echoed.
    """

    id: Key
    text: str
    action: Action
    tools: tuple[str, ...]
    malformed: bool
    ids: tuple[str, ...] | None


def operation(action: Action, by_calls: bool) -> Operation | None:
    """The operation that `action` stands for; None when it cannot be written down. `by_calls`: see `AgentEnv`."""
    ids: tuple[str, ...] | None = None
    if by_calls:
        ids = tuple(call.id for call in action.tool_calls)
        action = Action("", tuple(_bare(call, at) for at, call in enumerate(action.tool_calls)))
    said = [[call.name, call.arguments, call.raw, call.id] for call in action.tool_calls]
    try:
        if not _lossless(said):
            return None
        text = _WRITTEN.encode([action.text, said])
    except (TypeError, ValueError, RecursionError):
        return None
    names = tuple(dict.fromkeys(call.name for call in action.tool_calls))
    malformed = any(call.arguments is None for call in action.tool_calls)
    return Operation(key("operation", text), text, action, names, malformed, ids)


def _bare(call: ToolCall, at: int) -> ToolCall:
    """The call without what is only echoed or was parsed already. A `raw` too long to be looked into says something."""
    parsed = call.arguments is not None and len(call.raw) <= MAX_CALL_CHARS
    return replace(call, raw="" if parsed else call.raw, id=str(at) if call.id else "")


def _lossless(value: object) -> bool:
    """Whether JSON keeps the keys apart: 1 and "1" become one."""
    if isinstance(value, Mapping):
        return all(isinstance(name, str) and _lossless(item) for name, item in value.items())
    return all(map(_lossless, value)) if isinstance(value, list | tuple) else True


def _plain(value: object) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"{type(value).__name__} is not JSON")


_WRITTEN = json.JSONEncoder(separators=(",", ":"), default=_plain)
_MEMOISED = frozenset({"pure", "reads", "writes"})


def may_keep(made: Operation, effects: Mapping[str, str], demoted: Iterable[str], by_digest: bool) -> bool:
    """Whether the outcome is a function of state and operation, as far as is known.

    A tool counts by its effect; one whose randomness comes from the environment's generator ("chance") where the
    state's digest covers that. A turn that ends the episode, or is a mistake, is answered by the environment, which may
    look at whatever its tools look at: it counts as the worst of them.
    """
    allowed = _MEMOISED | {"chance"} if by_digest else _MEMOISED
    bad = frozenset(demoted)
    known = [effects.get(name) for name in made.tools]
    if not made.tools or made.malformed or None in known:
        return all(effect in allowed for effect in effects.values()) and not bad
    return all(effect in allowed for effect in known) and not bad.intersection(made.tools)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of an operation. `body` is the whole as canonical bytes; `essence` the digest of what must come again:
    messages, reward, flags (what `info` says beside them may differ, a measured time for instance).
    """

    body: bytes
    essence: bytes
    ended: bool
    reward: float

    @property
    def digest(self) -> bytes:
        """sha256 of the body."""
        return sha256(self.body).digest()


def outcome(result: StepResult) -> Outcome | None:
    """To be kept; None for what must not be: no verdict, a turn that may go otherwise next time, what is not JSON."""
    observation, reward, terminated, truncated, info = result
    if math.isnan(reward) or info.get("ungraded") or info.get("unrepeatable"):
        return None
    core = [list(observation.messages), float(reward).hex(), bool(terminated), bool(truncated)]
    try:
        essence = sha256(json.dumps(core, separators=(",", ":")).encode()).digest()
        body = json.dumps([*core, dict(info)], separators=(",", ":"), allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError):
        return None
    if json.loads(body)[0] != core[0]:  # a message that JSON changes
        return None
    return Outcome(body, essence, bool(terminated or truncated), float(reward))


def result_of(body: bytes, ids: tuple[str, ...] | None) -> StepResult:
    """The step's result again, with the ids of these calls in its messages. Raises `ValueError` for what is none."""
    try:
        messages, reward, terminated, truncated, info = json.loads(body)
        value = float.fromhex(reward)
    except (TypeError, ValueError) as error:
        raise ValueError(f"this is not a kept outcome: {error}") from error
    return observed(messages, ids), value, terminated, truncated, info


def observed(messages: Iterable[Mapping[str, Any]], ids: tuple[str, ...] | None) -> Observation:
    """The observation with the ids that the calls really have."""
    if ids is None:
        return Observation(tuple(cast(Message, dict(message)) for message in messages))
    real = {str(at): id for at, id in enumerate(ids) if id}
    told = []
    for message in messages:
        named = message.get("tool_call_id")
        told.append({**message, "tool_call_id": real.get(named, named)} if named is not None else dict(message))
    return Observation(tuple(cast(Message, message) for message in told))


def essence_of(body: bytes) -> bytes:
    """The digest of what must come again, out of a kept outcome."""
    core = json.loads(body)[:4]
    return sha256(json.dumps(core, separators=(",", ":")).encode()).digest()
