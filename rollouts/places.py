"""Room for so many at once; who waits is let in by rank."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from heapq import heappop, heappush
from itertools import count


class Places:
    """`count` places. Of those who wait, the lowest rank goes first, and within a rank who came first.

    Always true: while a place is free nobody waits; a place that was given to someone who was cancelled meanwhile goes
    to the next.
    """

    def __init__(self, number: int) -> None:
        self._free = number
        self._came = count()
        self._waiting: list[tuple[int, int, asyncio.Future[None]]] = []

    @asynccontextmanager
    async def held(self, rank: int) -> AsyncIterator[None]:
        """Wait for a place and hold it."""
        await self._take(rank)
        try:
            yield
        finally:
            self._give()

    async def _take(self, rank: int) -> None:
        if self._free:
            self._free -= 1
            return
        given = asyncio.get_running_loop().create_future()
        heappush(self._waiting, (rank, next(self._came), given))
        try:
            await given
        except asyncio.CancelledError:
            if given.done() and not given.cancelled():
                self._give()
            raise

    def _give(self) -> None:
        self._free += 1
        while self._free and self._waiting:
            given = heappop(self._waiting)[2]
            if not given.done():
                given.set_result(None)
                self._free -= 1
