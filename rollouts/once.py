"""Single flight: what several ask for at the same time is done once, and nobody's end is another's.

Always true: it goes on as long as anybody waits for it, whoever began it; its failure is told to whoever began it, and
the others may try again; after two failures of others a caller does it alone.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Hashable
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

T = TypeVar("T")

ALONE = 2
"""Failures of others after which an operation is carried out without them."""


@dataclass(slots=True, eq=False)
class _Flight(Generic[T]):
    """An operation that is being carried out, and how many wait for it."""

    task: asyncio.Future[T]
    waiting: int = 0
    leaderless: bool = False


class Once:
    """See the module. `abandoned` gets what was made for a caller who began it and has gone; `closed` makes the error
    of those who wait when it is closed.
    """

    def __init__(self, abandoned: Callable[[Any], None], closed: Callable[[], Exception]) -> None:
        self._abandoned, self._closed = abandoned, closed
        self._flights: dict[Hashable, _Flight[Any]] = {}

    def __len__(self) -> int:
        return len(self._flights)

    async def close(self, seconds: float) -> None:
        """End what is under way, within `seconds`; whoever waits is told so."""
        tasks = [flight.task for flight in self._flights.values()]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=seconds)

    async def do(self, name: Hashable, tries: int, work: Callable[[], Awaitable[T]]) -> tuple[bool, T | None]:
        """Whether this call led, and what `work` gave to whoever led; None when it failed him and this call followed.

        It goes on as long as anybody waits for it. `tries`: how often it has failed others; then it is done alone.
        """
        if tries >= ALONE:
            return True, await work()
        flight = self._flights.get(name)
        led = flight is None
        if flight is None:
            flight = self._flights[name] = _Flight(asyncio.ensure_future(work()))
            flight.task.add_done_callback(partial(self._landed, name, flight))
        flight.waiting += 1
        try:
            return led, await asyncio.shield(flight.task)
        except asyncio.CancelledError:
            flight.leaderless |= led
            if flight.task.cancelled() and not _being_cancelled():
                raise self._closed() from None
            if flight.leaderless and flight.task.done():
                self._abandon(flight.task)
            raise
        except Exception:
            if led:
                raise
            return False, None
        finally:
            flight.waiting -= 1
            if not flight.waiting and not flight.task.done():
                if self._flights.get(name) is flight:
                    del self._flights[name]
                flight.task.cancel()

    def _landed(self, name: Hashable, flight: _Flight[Any], task: asyncio.Future[Any]) -> None:
        if self._flights.get(name) is flight:
            del self._flights[name]
        if not task.cancelled():
            task.exception()  # seen
        if flight.leaderless:
            self._abandon(task)

    def _abandon(self, task: asyncio.Future[Any]) -> None:
        if not task.cancelled() and task.exception() is None:
            self._abandoned(task.result())


def _being_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
