"""The vocabulary of rollouts as data. No torch here.

Always true: the spans of a `TokenSequence` are in order, touch, and cover its tokens exactly; log-probabilities and
policy versions exist for sampled tokens and for no others; every dispatched episode ends as exactly one `Trajectory` or
one `Failure`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal

Origin = Literal["prompt", "sampled", "tool", "template"]

MAX_INFO_CHARS = 200_000
"""Longest value of `info`, as JSON, that a trajectory keeps."""


@dataclass(frozen=True, slots=True)
class PolicyVersion:
    """An immutable version of the policy. `number` 0 is the base itself: no adapter, `path` is then the base's
    folder.
    """

    number: int
    digest: str
    path: Path
    base: str
    parent: int | None = None

    @property
    def is_base(self) -> bool:
        """Whether this is the base without an adapter."""
        return self.number == 0


@dataclass(frozen=True, slots=True)
class TokenSpan:
    """`[start, stop)` of a sequence's tokens, and where they came from.

    `trained=False` marks sampled tokens that are kept for the record and masked in training: those of a turn that a
    budget cut short, which the environment never saw as an action, and those that a branch has from its parent, in
    whose record they are trained.
    """

    start: int
    stop: int
    origin: Origin
    version: int | None = None
    trained: bool = True


@dataclass(frozen=True, slots=True)
class TokenSequence:
    """Exact token ids of one unbroken context.

    `logprobs` (nats, float32 range) runs over the sampled tokens only, in order: `len(logprobs) == number of sampled
    tokens`.
    """

    tokens: tuple[int, ...]
    spans: tuple[TokenSpan, ...]
    logprobs: tuple[float, ...]

    def __post_init__(self) -> None:
        at = 0
        sampled = 0
        for span in self.spans:
            if span.start != at or span.stop <= span.start:
                raise ValueError(
                    f"spans must be in order, touch and be non-empty; {span} starts where {at} was expected"
                )
            if (span.version is not None) != (span.origin == "sampled"):
                raise ValueError(f"a policy version belongs to sampled spans and only to them: {span}")
            sampled += (span.stop - span.start) if span.origin == "sampled" else 0
            at = span.stop
        if at != len(self.tokens):
            raise ValueError(f"spans cover {at} tokens of {len(self.tokens)}")
        if sampled != len(self.logprobs):
            raise ValueError(f"{len(self.logprobs)} log-probabilities for {sampled} sampled tokens")

    def sampled_mask(self) -> list[bool]:
        """One flag a token: True where the policy sampled it."""
        mask: list[bool] = []
        for span in self.spans:
            mask.extend([span.origin == "sampled"] * (span.stop - span.start))
        return mask

    def trained_mask(self) -> list[bool]:
        """One flag a token: True where the policy sampled it and the environment saw it. What a loss may touch."""
        mask: list[bool] = []
        for span in self.spans:
            mask.extend([span.origin == "sampled" and span.trained] * (span.stop - span.start))
        return mask


class EndReason(StrEnum):
    """Why an episode stopped; everything but `DONE` is a truncation."""

    DONE = "done"
    MAX_TURNS = "max_turns"
    MAX_TOKENS = "max_tokens"
    MAX_SECONDS = "max_seconds"
    ENV_TRUNCATED = "env_truncated"


@dataclass(frozen=True, slots=True)
class Turn:
    """One sample and what answered it. `sequence` and `span` (index into its spans) say where its tokens stand."""

    sequence: int
    span: int
    text: str
    calls: tuple[dict[str, Any], ...]
    results: tuple[str, ...]
    seconds_sampling: float = 0.0
    seconds_env: float = 0.0


@dataclass(frozen=True, slots=True)
class Trajectory:
    """The record of one episode. More than one sequence: the history forked (a template dropped earlier thinking).

    A branch names its `parent`, a trajectory of the same group, and `left_at`, the first turn that is its own (at least
    1); the turns before that are the parent's, token for token, and are not trained here. Raises `ValueError` where
    they would be.
    """

    id: str
    group: str
    task: str
    family: str
    env: str
    seed: int
    sequences: tuple[TokenSequence, ...]
    turns: tuple[Turn, ...]
    reward: float
    end: EndReason
    instruction: str = ""
    info: dict[str, Any] = field(default_factory=dict)
    parent: str | None = None
    left_at: int = 0

    def __post_init__(self) -> None:
        if (self.parent is None) != (self.left_at == 0) or not 0 <= self.left_at < max(len(self.turns), 1):
            raise ValueError(f"trajectory {self.id} cannot have left {self.parent} at turn {self.left_at}")
        if any(self._span(turn).trained for turn in self.turns[: self.left_at]):
            raise ValueError(f"trajectory {self.id} would train turns of its parent {self.parent} again")

    @property
    def truncated(self) -> bool:
        """Whether a limit, not the agent, ended it."""
        return self.end is not EndReason.DONE

    @property
    def sampled_tokens(self) -> int:
        """How many tokens the policy sampled for it; those of its parent's turns do not count."""
        return sum(len(s.logprobs) for s in self.sequences) - self.inherited_tokens

    @property
    def inherited_tokens(self) -> int:
        """How many sampled tokens it has from its parent."""
        return sum(span.stop - span.start for span in map(self._span, self.turns[: self.left_at]))

    @property
    def own_turns(self) -> int:
        """How many turns were sampled for it."""
        return len(self.turns) - self.left_at

    def _span(self, turn: Turn) -> TokenSpan:
        return self.sequences[turn.sequence].spans[turn.span]

    @property
    def versions(self) -> frozenset[int]:
        """The policy versions that sampled it."""
        return frozenset(span.version for s in self.sequences for span in s.spans if span.version is not None)


class FailureKind(StrEnum):
    """What went wrong on our side; none of these is a reward."""

    UNGRADED = "ungraded"
    ENV = "env"
    ENV_TIMEOUT = "env_timeout"
    SAMPLER = "sampler"
    SAMPLER_TIMEOUT = "sampler_timeout"
    OVERFLOW = "overflow"
    CANCELLED = "cancelled"
    INTERNAL = "internal"


@dataclass(frozen=True, slots=True)
class Failure:
    """An episode that gave no trajectory, and why. Dropped and counted."""

    id: str
    group: str
    task: str
    kind: FailureKind
    message: str
    retryable: bool = False


@dataclass(frozen=True, slots=True)
class Group:
    """Attempts at one task from one start, to be compared with each other; failed ones stand apart."""

    id: str
    task: str
    trajectories: tuple[Trajectory, ...]
    failures: tuple[Failure, ...] = ()

    @property
    def rewards(self) -> tuple[float, ...]:
        """Rewards in the order of `trajectories`."""
        return tuple(t.reward for t in self.trajectories)

    @property
    def has_signal(self) -> bool:
        """Whether any two rewards differ: without that a group has no gradient."""
        return len(set(self.rewards)) > 1


def plain_info(info: Mapping[str, Any]) -> dict[str, Any]:
    """What of `info` can be kept as JSON; the rest (the task object, arrays) and what is too long is left out."""
    kept: dict[str, Any] = {}
    for key, value in info.items():
        try:
            text = json.dumps(value, allow_nan=False)
        except (TypeError, ValueError, RecursionError):
            continue
        if len(text) <= MAX_INFO_CHARS:
            kept[str(key)] = json.loads(text)
    return kept
