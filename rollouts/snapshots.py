"""Environments that can be branched in mid-episode, for groups that grow as trees.

Always true: what an episode was answered before it is branched is never carried out again for the branch; a branch
stands exactly where its parent stood at a mark, and neither sees what the other does from there; where an environment
cannot be kept there is no mark, and nothing is emulated.

`SnapshotPool` is the plain way: a snapshot behind each step of the episodes that are watched. `GraphPool` has another:
a mark is a place in the operation graph.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from ..envs.core import Action, EnvFailure
from .envpool import Opening, StepResult
from .graph.statepool import StatePool
from .graph.states import STATE_GONE, Kept


@runtime_checkable
class BranchPool(Protocol):
    """An `EnvPool` whose episodes can be branched."""

    def watch(self, handle: Any) -> None:
        """From its next step on, keep what it takes to branch from this episode until its handle is given back."""

    def mark(self, handle: Any) -> Any | None:
        """Where the episode stands now; None where it cannot be branched."""

    def rest(self, handle: Any) -> None:
        """Its episode has ended well; until it is given back it is branched from, and does nothing else."""

    async def branch(self, handle: Any, mark: Any) -> Any:
        """A handle for another episode, which goes on from `mark` of `handle`. Raises as `EnvPool` says."""


@dataclass(slots=True, eq=False)
class Held:
    """An episode's environment and what is kept of it. `last`: the state it is in, where that is kept. `branching`: an
    environment is used by one at a time; `lost`: it failed at that, or was left in the middle of it.
    """

    inner: Any
    watched: bool = False
    kept: list[Kept] = field(default_factory=list)
    last: Kept | None = None
    branching: asyncio.Lock = field(default_factory=asyncio.Lock)
    lost: bool = False


class SnapshotPool:
    """An `EnvPool` and `BranchPool` in front of a `StatePool`."""

    def __init__(self, pool: StatePool) -> None:
        self._pool = pool

    async def take(self, task: str) -> Held:
        """See `EnvPool`."""
        return Held(await self._pool.take(task))

    async def reset(self, handle: Held, seed: int, options: dict[str, Any]) -> Opening:
        """See `EnvPool`."""
        return await self._pool.reset(handle.inner, seed, options)

    async def step(self, handle: Held, action: Action) -> StepResult:
        """See `EnvPool`."""
        if not handle.watched:
            return await self._pool.step(handle.inner, action)
        came = await self._pool.go_on(handle.inner, None, action, True)
        handle.last = came.kept
        if came.kept is not None:
            handle.kept.append(came.kept)
        result: StepResult = came.result
        return result

    def watch(self, handle: Held) -> None:
        """See `BranchPool`."""
        handle.watched = True

    def mark(self, handle: Held) -> Kept | None:
        """See `BranchPool`."""
        return handle.last

    def rest(self, handle: Held) -> None:
        """See `BranchPool`. It is what branches are made from."""

    async def branch(self, handle: Held, mark: Kept) -> Held:
        """See `BranchPool`."""
        async with handle.branching:
            if handle.lost:
                raise EnvFailure("branch_failed", "the environment failed while it was branched")
            try:
                return Held(await self._pool.fork(handle.inner, mark))
            except BaseException as error:
                handle.lost = not (isinstance(error, EnvFailure) and error.kind == STATE_GONE)
                raise

    def give(self, handle: Held) -> None:
        """See `EnvPool`."""
        self._forget(handle)
        (self._pool.drop if handle.lost else self._pool.give)(handle.inner)

    def drop(self, handle: Held) -> None:
        """See `EnvPool`."""
        self._forget(handle)
        self._pool.drop(handle.inner)

    def _forget(self, handle: Held) -> None:
        for kept in handle.kept:
            self._pool.forget(handle.inner, kept)
        handle.kept, handle.last = [], None

    async def close(self) -> None:
        """See `EnvPool`."""
        await self._pool.close()
