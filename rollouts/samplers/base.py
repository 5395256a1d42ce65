"""What every sampler must do.

Always true of an implementation: token ids in, token ids out; each sampled token comes with the log-probability of the
distribution that it was drawn from; a request runs wholly on the version it names; a version, once published, never
changes; every wait has a deadline.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

from ..types import PolicyVersion

PUBLISH_SECONDS = 300.0
"""Until a version is served; long enough for an engine that is being started again."""

TRAINING = "training"
"""The trust domain of rollouts whose tasks belong to whoever trains."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to draw a token. `temperature=0` is greedy; `top_p=1` and `top_k=0` leave the distribution whole."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0


@dataclass(frozen=True, slots=True)
class SampleRequest:
    """One turn to sample.

    `key` is the random key of (run, episode, turn), 64 bits; token t of the turn draws from (key, t) and from nothing
    else. `session` names the episode: a sampler may keep its KV cache between turns until `end_session`. `group` names
    episodes that begin with one prompt: of several engines one reads it for all (empty: for this episode alone).
    `deadline_s` is seconds from now. `trust_domain` says whose data this is: nothing computed for one domain is reused
    by another.
    """

    session: str
    prompt: tuple[int, ...]
    version: int
    key: int
    max_tokens: int
    stop: tuple[int, ...]
    params: SamplingParams = SamplingParams()
    deadline_s: float = 120.0
    trust_domain: str = TRAINING
    group: str = ""


@dataclass(frozen=True, slots=True)
class Sample:
    """What was sampled: `tokens` (a stop token, if met, is the last), `logprobs` nats, aligned with tokens.

    Log-probabilities are of the tempered distribution (greedy: of temperature 1), which is what the trainer computes.
    Where top-p or top-k cut it, a sampler says whether they are of what was there before (the embedded sampler) or of
    what was left (vLLM).
    """

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish: Literal["stop", "length"]
    version: int


class SamplerError(RuntimeError):
    """The sampler could not serve a request; `retryable` says whether the same request may succeed later."""

    def __init__(self, message: str, *, retryable: bool = False) -> None:
        super().__init__(message)
        self.retryable = retryable


def check_size(request: SampleRequest, max_tokens: int) -> None:
    """Raise `SamplerError` unless prompt and sample of `request` are there and fit into `max_tokens` together."""
    if not request.prompt or request.max_tokens < 1:
        raise SamplerError(f"session {request.session!r}: a request needs a prompt and at least one token to sample.")
    if len(request.prompt) + request.max_tokens > max_tokens:
        raise SamplerError(
            f"session {request.session!r}: {len(request.prompt)} prompt tokens and {request.max_tokens} to sample "
            f"exceed the sampler's max_tokens = {max_tokens}; raise it or sample fewer."
        )


@runtime_checkable
class Sampler(Protocol):
    """Makes tokens. Versions enter by `publish`, are held by leases while episodes use them, and leave by `retire`."""

    async def publish(self, version: PolicyVersion) -> None:
        """Load `version` beside those being served; raises `SamplerError` when it cannot be read. Then it is
        `latest`.
        """

    @property
    def latest(self) -> int:
        """The number of the version published last."""

    def lease(self, version: int) -> AbstractContextManager[int]:
        """Hold `version` while an episode uses it."""

    async def retire(self, version: int) -> None:
        """Let `version` go once its last lease has ended."""

    async def sample(self, request: SampleRequest) -> Sample:
        """Sample one turn. Raises `SamplerError`, or `TimeoutError` at the deadline."""

    async def end_session(self, session: str) -> None:
        """Free what was kept for `session`; unknown sessions are ignored."""

    async def close(self) -> None:
        """Stop and free everything; pending requests get a `SamplerError`."""


@runtime_checkable
class Sleeper(Protocol):
    """A sampler that can give the memory of its card back while nothing is sampled."""

    sleeps: bool
    """Whether it should, in this run."""

    async def sleep(self) -> None:
        """Give it back. Raises `SamplerError` while requests are running."""

    async def wake(self) -> None:
        """Take it again; needed before the next publish or sample."""
