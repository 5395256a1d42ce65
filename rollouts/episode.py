"""One episode as a pure state machine: events in, requests out; no clock, no input or output.

    begin -> NeedSample -> sampled -> NeedStep -> stepped -> NeedSample -> ... -> Ended

Always true: the machine ends exactly once, as a `Trajectory` or a `Failure`; the spans of a trajectory are what the
sampler was shown and what it made, token for token, and a sequence ends with a sampled turn (what no turn was sampled
behind is not part of it).

A budget that runs out truncates, and `on_overflow` says what that means: reward 0 ("failure"), the environment's
verdict on what there is, which a `NeedStep` without a call and with `grading=True` asks for ("grade"), or a failure
that is dropped and counted ("drop"). A turn that hit its length limit was never an action: its tokens stay in the
record, the environment does not see them, and the episode ends; `cut_turns` says whether they are masked
(`trained=False`) or trained. A reward of NaN is no verdict, so it becomes `Failure(UNGRADED)`, whatever else happened.

A branch begins where another episode sampled a turn, behind exactly the tokens that this one was sampled behind, and
ends for itself; what it has from its parent is in its record, masked.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Any

from ..configs.schema import EpisodeSection, Overflow
from ..envs.core import Action, Message, Observation, Task
from .render import ChatRenderer, Fork
from .samplers.base import Sample
from .types import EndReason, Failure, FailureKind, Origin, TokenSequence, TokenSpan, Trajectory, Turn, plain_info


@dataclass(frozen=True, slots=True)
class NeedSample:
    """Sample turn `turn` behind `prompt`, at most `max_tokens`."""

    prompt: tuple[int, ...]
    max_tokens: int
    turn: int


@dataclass(frozen=True, slots=True)
class NeedStep:
    """Carry out `action`. `grading`: the episode is truncated and this only asks for a verdict."""

    action: Action
    grading: bool = False


@dataclass(frozen=True, slots=True)
class Ended:
    """The episode is over."""

    outcome: Trajectory | Failure


Request = NeedSample | NeedStep | Ended


class EpisodeOrderError(RuntimeError):
    """An event came that the machine had not asked for: a bug of the caller's."""


@dataclass(frozen=True, slots=True)
class EpisodeSpec:
    """What an episode is, before it runs. `seed` is the environment's."""

    id: str
    group: str
    task: Task
    env: str
    seed: int
    version: int


def episode_key(run: str, episode_id: str, turn: int) -> int:
    """The random key of a turn, 64 bits: blake2b over (run, episode, turn). Token t of the turn draws from (key, t)."""
    text = json.dumps([run, episode_id, turn]).encode()
    return int.from_bytes(blake2b(text, digest_size=8).digest(), "little")


def environment_seed(seed: int, task_id: str) -> int:
    """The environment's seed, 31 bits: the same for all episodes of a task, whose starts must be equal."""
    text = json.dumps([seed, task_id]).encode()
    return int.from_bytes(blake2b(text, digest_size=4, person=b"environment").digest(), "little") >> 1


@dataclass(frozen=True, slots=True)
class _Standing:
    """What an episode was, beside its tokens, when it asked for a turn: to branch from there."""

    history: int
    info: Mapping[str, Any]
    reward: float
    tool_errors: int
    calls: int


class _Builder:
    """A sequence in the making."""

    def __init__(self, prompt: Sequence[int]) -> None:
        self.tokens: list[int] = list(prompt)
        self.logprobs: list[float] = []
        self.spans: list[TokenSpan] = [TokenSpan(0, len(prompt), "prompt")]

    def context(self, runs: Sequence[tuple[Origin, int]], tokens: Sequence[int]) -> None:
        at = len(self.tokens)
        for origin, length in runs:
            self.spans.append(TokenSpan(at, at + length, origin))
            at += length
        self.tokens.extend(tokens)

    def turn(self, sample: Sample, trained: bool) -> int:
        """Add a sample; the index of its span."""
        start = len(self.tokens)
        self.spans.append(TokenSpan(start, start + len(sample.tokens), "sampled", sample.version, trained))
        self.tokens.extend(sample.tokens)
        self.logprobs.extend(sample.logprobs)
        return len(self.spans) - 1

    def inherited(self, stop: int | None = None) -> _Builder:
        """A copy up to span `stop` for a branch, which trains nothing of it."""
        spans = [replace(span, trained=span.origin != "sampled") for span in self.spans[:stop]]
        made = _Builder(self.tokens[: spans[-1].stop])
        made.spans = spans
        made.logprobs = self.logprobs[: sum(s.stop - s.start for s in spans if s.origin == "sampled")]
        return made

    def build(self) -> TokenSequence | None:
        """The sequence up to its last sampled span; None when nothing was sampled in it."""
        spans = list(self.spans)
        while spans and spans[-1].origin != "sampled":
            spans.pop()
        if not spans:
            return None
        return TokenSequence(tuple(self.tokens[: spans[-1].stop]), tuple(spans), tuple(self.logprobs))


class Episode:
    """See the module. `request` is what the machine waits for; an event it does not wait for raises
    `EpisodeOrderError`.

    Every event carries `elapsed`, seconds since the episode began, so that the machine needs no clock.
    """

    def __init__(
        self,
        spec: EpisodeSpec,
        budget: EpisodeSection,
        renderer: ChatRenderer,
        on_overflow: Overflow | None = None,
        branchable: bool = False,
    ) -> None:
        """`on_overflow` overrides the budget's (an evaluation never drops what the policy did not finish).

        `branchable`: what it was before each turn is remembered, so that others can leave it there.
        """
        self.spec = spec
        self.request: Request | None = None
        self._budget = budget
        self._overflow = on_overflow or budget.on_overflow
        self._renderer = renderer
        self._tools: list[dict[str, Any]] = []
        self._history: list[dict[str, Any]] = []
        self._sequences: list[_Builder] = []
        self._turns: list[Turn] = []
        self._info: dict[str, Any] = {}
        self._reward = 0.0
        self._tool_errors = 0
        self._calls = 0
        self._first_prompt = 0
        self._elapsed = 0.0
        self._truncated: EndReason | None = None
        self._branchable = branchable
        self._before: list[_Standing] = []  # each turn
        self._parent: str | None = None
        self._left_at = 0

    def branch(self, spec: EpisodeSpec, turn: int) -> Episode:
        """Another episode, which begins where this one sampled `turn` (at least 1) and samples it anew.

        Raises `ValueError` for a turn that was not sampled here, or not remembered, and for another task, seed or
        version.
        """
        if not self._branchable or not max(self._left_at, 1) <= turn < len(self._turns):
            raise ValueError(f"episode {self.spec.id} has no turn {turn} of its own to be left at")
        if replace(spec, id=self.spec.id) != self.spec:
            raise ValueError(f"{spec.id} is another kind of episode than {self.spec.id}")
        made = Episode(spec, self._budget, self._renderer, self._overflow, branchable=True)
        there, left = self._turns[turn], self._before[turn]
        made._tools = self._tools
        made._history = self._history[: left.history]
        made._sequences = [whole.inherited() for whole in self._sequences[: there.sequence]]
        made._sequences.append(self._sequences[there.sequence].inherited(there.span))
        made._turns = [replace(t, seconds_sampling=0.0, seconds_env=0.0) for t in self._turns[:turn]]
        made._info, made._reward = dict(left.info), left.reward
        made._tool_errors, made._calls = left.tool_errors, left.calls
        made._first_prompt = self._first_prompt
        made._before = self._before[:turn]
        made._parent, made._left_at = self.spec.id, turn
        made._next_sample(0.0)
        return made

    def begin(
        self,
        observation: Observation,
        tools: Sequence[Mapping[str, Any]],
        info: Mapping[str, Any],
        system_prompt: str = "",
        elapsed: float = 0.0,
    ) -> Request:
        """The environment was reset. `tools` in OpenAI's shape."""
        if self.request is not None:
            raise EpisodeOrderError("the episode has already begun")
        self._tools = [dict(t) for t in tools]
        self._info.update(plain_info(info))
        opening: list[Message] = [{"role": "system", "content": system_prompt}] if system_prompt else []
        opening.extend(observation.messages)
        self._history = [dict(m) for m in opening]
        prompt = self._renderer.first_prompt(opening, self._tools)
        self._first_prompt = len(prompt)
        if len(prompt) > self._budget.max_prompt_tokens:
            limit = self._budget.max_prompt_tokens
            return self.fail(
                FailureKind.OVERFLOW,
                f"the first prompt has {len(prompt)} tokens, episode.max_prompt_tokens is {limit}",
            )
        self._sequences.append(_Builder(prompt))
        return self._next_sample(elapsed)

    def sampled(self, sample: Sample, elapsed: float, seconds: float = 0.0) -> Request:
        """A turn was sampled; it took `seconds`."""
        if not isinstance(self.request, NeedSample):
            raise EpisodeOrderError(f"a sample was not asked for; the episode waits for {self.request!r:.80}")
        wrong = _wrong_with(sample, self.request, self.spec.version)
        if wrong:
            return self.fail(FailureKind.SAMPLER, wrong)
        prompt = self.request.prompt
        cut = sample.finish == "length"
        sequence = self._sequences[-1]
        span = sequence.turn(sample, trained=not cut or self._budget.cut_turns == "train")
        action = Action() if cut else self._renderer.parse(sample.tokens, prompt, len(self._turns))
        self._history.append(self._renderer.assistant_message(sample.tokens, prompt))
        self._calls += len(action.tool_calls)
        self._turns.append(
            Turn(
                sequence=len(self._sequences) - 1,
                span=span,
                text=self._renderer.decode(sample.tokens),
                calls=tuple(_call_record(c) for c in action.tool_calls),
                results=(),
                seconds_sampling=seconds,
            )
        )
        self._elapsed = elapsed
        if cut:
            return self._truncate(EndReason.MAX_TOKENS)
        self.request = NeedStep(action)
        return self.request

    def stepped(
        self,
        observation: Observation,
        reward: float,
        terminated: bool,
        truncated: bool,
        info: Mapping[str, Any],
        elapsed: float,
        seconds: float = 0.0,
    ) -> Request:
        """The environment carried out the action; it took `seconds`."""
        if not isinstance(self.request, NeedStep):
            raise EpisodeOrderError(f"a step was not asked for; the episode waits for {self.request!r:.80}")
        grading = self.request.grading
        self._elapsed = elapsed
        self._info.update(plain_info(info))
        if math.isnan(reward) or info.get("ungraded"):
            return self.fail(
                FailureKind.UNGRADED, f"no verdict: {info.get('ungraded') or 'the reward is not a number'}"
            )
        self._reward += float(reward)
        if grading:
            return self._end(self._truncated or EndReason.ENV_TRUNCATED)
        errors = info.get("tool_errors", 0)
        self._tool_errors += int(errors) if isinstance(errors, int | float) else 0
        results = tuple(str(m.get("content", "")) for m in observation.messages)
        last = self._turns[-1]
        self._turns[-1] = Turn(last.sequence, last.span, last.text, last.calls, results, last.seconds_sampling, seconds)
        if terminated:
            return self._end(EndReason.DONE)
        if truncated:
            self._truncated = EndReason.ENV_TRUNCATED
            return self._end(EndReason.ENV_TRUNCATED)
        if len(self._turns) >= self._budget.max_turns:
            return self._truncate(EndReason.MAX_TURNS)
        return self._extend(observation, elapsed)

    def out_of_time(self, elapsed: float) -> Request:
        """`max_seconds` passed while a sample was awaited."""
        if not isinstance(self.request, NeedSample):
            raise EpisodeOrderError("only a wait for a sample can run out of an episode's time")
        self._elapsed = elapsed
        if self._overflow == "failure":  # what the sampler did not give in time is not the policy's miss
            return self.fail(FailureKind.SAMPLER_TIMEOUT, "max_seconds passed while a sample was awaited", True)
        return self._truncate(EndReason.MAX_SECONDS)

    def fail(self, kind: FailureKind, message: str, retryable: bool = False) -> Ended:
        """End as a failure of ours; in any state but the last."""
        if isinstance(self.request, Ended):
            raise EpisodeOrderError(f"the episode has already ended; it cannot also fail ({kind}: {message})")
        spec = self.spec
        self.request = Ended(Failure(spec.id, spec.group, spec.task.id, kind, message, retryable))
        return self.request

    def _extend(self, observation: Observation, elapsed: float) -> Request:
        """Put the environment's answer behind the last turn; if the template forks, in a new sequence."""
        builder = self._sequences[-1]
        sampled = builder.spans[-1]
        extension = self._renderer.extend(
            builder.tokens[: sampled.start],
            builder.tokens[sampled.start :],
            observation.messages,
            self._tools,
            self._history,
        )
        self._history.extend(dict(m) for m in observation.messages)
        if isinstance(extension, Fork):
            self._sequences.append(_Builder(extension.tokens))
        else:
            builder.context(extension.runs, extension.tokens)
        return self._next_sample(elapsed)

    def _next_sample(self, elapsed: float) -> Request:
        self._elapsed = elapsed
        if elapsed >= self._budget.max_seconds:
            return self._truncate(EndReason.MAX_SECONDS)
        builder = self._sequences[-1]
        room = self._budget.max_tokens - len(builder.tokens)
        if room <= 0:
            return self._truncate(EndReason.MAX_TOKENS)
        if self._branchable:
            self._before.append(
                _Standing(len(self._history), dict(self._info), self._reward, self._tool_errors, self._calls)
            )
        self.request = NeedSample(tuple(builder.tokens), min(room, self._budget.max_turn_tokens), len(self._turns))
        return self.request

    def _truncate(self, reason: EndReason) -> Request:
        """A budget ran out. Ask for a verdict only where it counts, and never when no turn of its own was sampled."""
        self._truncated = reason
        if len(self._turns) == self._left_at:
            kind = FailureKind.SAMPLER_TIMEOUT if reason is EndReason.MAX_SECONDS else FailureKind.OVERFLOW
            return self.fail(kind, f"{reason}: the budget was spent before anything was sampled", retryable=True)
        if self._overflow != "grade":
            self._reward = 0.0
            return self._end(reason)
        self.request = NeedStep(Action(), grading=True)
        return self.request

    def _end(self, reason: EndReason) -> Ended:
        if reason is not EndReason.DONE and self._overflow == "drop":
            return self.fail(
                FailureKind.OVERFLOW, f"{reason} after {len(self._turns)} turns (episode.on_overflow = drop)"
            )
        spec = self.spec
        sequences = tuple(s for s in (b.build() for b in self._sequences) if s is not None)
        counts = {
            "prompt_tokens": self._first_prompt,
            "calls": self._calls,
            "tool_errors": self._tool_errors,
        }
        trajectory = Trajectory(
            id=spec.id,
            group=spec.group,
            task=spec.task.id,
            family=spec.task.family,
            env=spec.env,
            seed=spec.seed,
            sequences=sequences,
            turns=tuple(self._turns),
            reward=self._reward,
            end=reason,
            instruction=spec.task.instruction,
            info={**self._info, **counts},
            parent=self._parent,
            left_at=self._left_at,
        )
        self.request = Ended(trajectory)
        return self.request


def _wrong_with(sample: Sample, request: NeedSample, version: int) -> str:
    """What makes a sample unusable, or nothing: what a sampler says is checked before it is trained on."""
    if not sample.tokens:
        return "the sampler returned no token"
    if len(sample.tokens) > request.max_tokens:
        return f"the sampler returned {len(sample.tokens)} tokens where at most {request.max_tokens} were asked for"
    if len(sample.tokens) != len(sample.logprobs):
        return f"the sampler returned {len(sample.logprobs)} log-probabilities for {len(sample.tokens)} tokens"
    if not all(map(math.isfinite, sample.logprobs)):
        return "the sampler returned a log-probability that is not finite"
    if sample.version != version:
        return f"the sampler used version {sample.version}, the episode holds {version}"
    return ""


def _call_record(call: Any) -> dict[str, Any]:
    record = {"id": call.id, "name": call.name, "arguments": None if call.arguments is None else dict(call.arguments)}
    return record if call.arguments is not None else {**record, "raw": call.raw}
