"""Several samplers of one base as one, each on a card of its own.

Always true: a version is the latest only when all of them serve it; the episodes of a group that run at once stay with
one of them, where their prompt is cached, the one that had fewest groups when the first of them came; what can fail in
one of them fails alone.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager

from ..types import PolicyVersion
from .base import Sample, Sampler, SampleRequest, SamplerError


class ReplicatedSampler:
    """Implements `Sampler` by `samplers`, which it closes."""

    def __init__(self, samplers: Sequence[Sampler]) -> None:
        if not samplers:
            raise ValueError("a replicated sampler needs a sampler")
        self._samplers = tuple(samplers)
        self._latest: int | None = None
        self._groups: dict[str, str] = {}  # by session; without one, itself
        self._places: dict[str, int] = {}  # by group

    async def publish(self, version: PolicyVersion) -> None:
        """Load `version` in all of them; it becomes the latest if all can serve it. See `Sampler.publish`."""
        await _all(sampler.publish(version) for sampler in self._samplers)
        self._latest = version.number

    @property
    def latest(self) -> int:
        """The number of the version published last. Raises `SamplerError` before the first."""
        if self._latest is None:
            raise SamplerError("no version is published yet; publish one first.")
        return self._latest

    def lease(self, version: int) -> AbstractContextManager[int]:
        """Hold `version` in all of them: which one an episode asks is known when it asks."""
        return self._lease(version)

    @contextmanager
    def _lease(self, version: int) -> Iterator[int]:
        with ExitStack() as stack:
            for sampler in self._samplers:
                stack.enter_context(sampler.lease(version))
            yield version

    async def retire(self, version: int) -> None:
        """Let `version` go in all of them."""
        await _all(sampler.retire(version) for sampler in self._samplers)

    async def sample(self, request: SampleRequest) -> Sample:
        """Sample one turn where the session's earlier ones, and those of its group, were sampled."""
        group = self._groups.setdefault(request.session, request.group or request.session)
        if group not in self._places:
            load = Counter(self._places.values())
            self._places[group] = min(range(len(self._samplers)), key=lambda i: (load[i], i))
        return await self._samplers[self._places[group]].sample(request)

    async def end_session(self, session: str) -> None:
        """Free what was kept for `session`; unknown sessions are ignored."""
        group = self._groups.pop(session, None)
        if group is None:
            return
        place = self._places[group]
        if group not in self._groups.values():
            del self._places[group]
        await self._samplers[place].end_session(session)

    async def close(self) -> None:
        """Close all of them, also when one of them cannot be closed."""
        await _all(sampler.close() for sampler in self._samplers)


async def _all(work: Iterator[Awaitable[None]]) -> None:
    """Do all of it to its end; then raise what the first one that failed raised."""
    for result in await asyncio.gather(*work, return_exceptions=True):
        if isinstance(result, BaseException):
            raise result
