"""An `EnvPool` whose episodes walk an operation graph, and hold an environment only where the graph does not know on.

Always true: an operation that is known is answered from the graph; one that is not is carried out once, by whoever
comes first, while those who come meanwhile wait for it; if that fails, one of them tries again, and if that fails too,
each for itself, so that everyone gets the failure of an environment that was asked for him. What may not be shared is
carried out in an environment of the episode's own, from there to its end. Failures, time-outs and what has no verdict
are never kept. An environment that is brought to a state is checked on its way: what it says must be what the graph
says. Who waits, for an environment or for who carries an operation out, waits `patience_s` at most. The sampler is not
known here.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from ...envs.core import Action, EnvFailure, Task
from ..envpool import EnvRaised, Opening, StepResult
from ..once import ALONE, Once
from .core import EVERYTHING, OperationGraph, opening_of
from .live import Live, LiveEnvs
from .operation import Operation, observed, operation, outcome, result_of
from .reach import Place, Reach, Step
from .statepool import StatePool
from .states import Came

MOST_CHECKS = 256
"""Ended episodes that wait to be checked; beyond that they are not."""
CLOSE_SECONDS = 15.0
"""For the checks that are still due, and to end what is under way."""


@dataclass(slots=True, eq=False)
class Walker:
    """An episode's handle. `live`: its own environment, from where it may share no more. `watched`: others may branch
    from it; `rooted`: for these an environment stays at the start of its task.
    """

    task: str
    place: Place | None = None
    live: Live | None = None
    reward: float = 0.0
    watched: bool = False
    rooted: bool = False


@dataclass(slots=True, eq=False)
class _Done:
    """What carrying an operation out gave: `step` and `body` where it may be kept; else `live`, for the leader."""

    result: StepResult
    step: Step | None
    body: bytes = b""
    live: Live | None = None


class GraphPool:
    """See the module. `identity`: everything about the environment beside the task (see `identity`); `live`: most
    environments at once (0: one for each episode); `verify_share`: of the episodes whose every operation is carried out
    again when they have ended; `kept_bytes`: of kept states; `patience_s`: most seconds until an operation that may be
    shared is answered, with all that is waited for and done again for it.
    """

    def __init__(
        self,
        pool: StatePool,
        graph: OperationGraph,
        *,
        env_id: str,
        identity: str,
        live: int = 0,
        verify_share: float = 0.01,
        kept_bytes: int = 256 << 20,
        patience_s: float = 1800.0,
    ) -> None:
        self.pool, self.graph = pool, graph
        self.counts = graph.counts
        self._env_id, self._identity = env_id, identity
        self._most_live, self._verify_share, self._patience = live, verify_share, patience_s
        self._walkers = 0
        self._rooted = 0
        self.lives = LiveEnvs(pool, graph.counts, self._limit, kept_bytes)
        self._reach = Reach(pool, graph, self.lives)
        self._once = Once(_abandon(self.lives), partial(EnvFailure, "pool_closed", "the environments have been closed"))
        self._due = 0.0
        self._checks: set[asyncio.Task[None]] = set()
        self._checking = asyncio.Lock()
        self._closed = False

    def _limit(self) -> int:
        return self._most_live or max(self._walkers + self._rooted, 1)

    # the EnvPool

    async def take(self, task: str) -> Walker:
        """A place for an episode; no environment yet."""
        if self._closed:
            raise EnvFailure("pool_closed", "the environments have been closed")
        self._walkers += 1
        return Walker(task)

    async def reset(self, handle: Walker, seed: int, options: dict[str, Any]) -> Opening:
        """See `EnvPool`."""
        async with self._in_time():
            return await self._reset(handle, seed, options)

    async def _reset(self, handle: Walker, seed: int, options: dict[str, Any]) -> Opening:
        self.counts.requested += 1
        task = options.get("task")
        space = None
        if isinstance(task, Task):
            space = self.graph.space(self._identity, self._env_id, task, seed, options)
        if space is None or EVERYTHING in space.row.demoted:
            return await self._reset_alone(handle, seed, options)
        space.active += 1
        tries = 0
        while True:
            place = handle.place = Place(space, space.name, handle.task, seed, options, b"")
            opening = self.graph.opening(space)
            if opening is not None:
                self.counts.hits += 1
                break
            with self._counting_failure():
                led, body = await self._once.do((space.name, b"", b""), tries, partial(self._start, place))
            if EVERYTHING in space.row.demoted:
                space.active -= 1
                handle.place = None
                return await self._reset_alone(handle, seed, options)
            if body is not None and place.name == space.name:
                self.counts.executed += led
                self.counts.coalesced += not led
                opening = opening_of(body)
                break
            tries += 1
        assert space.row.root is not None
        handle.place = replace(place, node=space.row.root)
        handle.rooted = handle.watched and space.traits.rollback and not space.traits.travels
        self._rooted += handle.rooted
        return opening

    async def step(self, handle: Walker, action: Action) -> StepResult:
        """See `EnvPool`."""
        self.counts.requested += 1
        with self._counting_failure():
            if handle.live is not None:
                result = await self.pool.step(handle.live.handle, action)
                self.counts.bypassed += 1
            else:
                async with self._in_time():
                    result = await self._step(handle, action)
        handle.reward += result[1]
        return result

    async def _step(self, handle: Walker, action: Action) -> StepResult:
        place = handle.place
        if place is None:
            raise RuntimeError("call reset() before step()")
        made = operation(action, place.space.traits.by_calls)
        if made is None or place.name != place.space.name or not place.space.keeps(made):
            return await self._leave(handle, place, action)
        tries = 0
        while True:
            found = self.graph.find(place.space, place.node, made.id)
            if found is not None:
                edge, body = found
                self.counts.hits += 1
                step = Step(place.node, made, edge.next, edge.essence, edge.cost)
                return self._went(handle, step, body)
            led, done = await self._once.do(
                (place.name, place.node, made.id), tries, partial(self._carry_out, place, made, handle.watched)
            )
            if done is None:  # who carried it out failed
                tries += 1
            elif done.step is not None:
                self.counts.executed += led
                self.counts.coalesced += not led
                return self._went(handle, done.step, done.body, made)
            elif led:
                handle.live, done.live = done.live, None
                self.counts.bypassed += 1
                observation, *rest = done.result
                return observed(observation.messages, made.ids), *rest  # type: ignore[return-value]
            else:
                tries = ALONE  # what may not be shared is carried out for each

    def _went(self, handle: Walker, step: Step, body: bytes, made: Operation | None = None) -> StepResult:
        if handle.place is not None:
            handle.place = handle.place.after(step)
        return result_of(body, (made or step.op).ids)

    # the BranchPool

    def watch(self, handle: Walker) -> None:
        """See `BranchPool`. The state behind each operation that it is the first to carry out is kept."""
        handle.watched = True

    def mark(self, handle: Walker) -> tuple[Place, float] | None:
        """See `BranchPool`: its place in the graph. None where states cannot be kept, or it is in the graph no more."""
        place = handle.place
        if place is None or handle.live is not None or place.name != place.space.name:
            return None
        return (place, handle.reward) if place.space.traits.rollback else None

    def rest(self, handle: Walker) -> None:
        """See `BranchPool`. An environment of its own is for others: its marks are places in the graph."""
        self._part_with(handle, self.lives.give)

    async def branch(self, handle: Walker, mark: tuple[Place, float]) -> Walker:
        """See `BranchPool`. No operation is asked for."""
        place, reward = mark
        made = await self.take(handle.task)
        made.place, made.reward = place, reward
        place.space.active += 1
        return made

    def give(self, handle: Walker) -> None:
        """The episode ended well."""
        place = handle.place
        if place is not None and place.trail and place.name == place.space.name:
            self.graph.visited(place.space, [(step.node, step.op.id) for step in place.trail], handle.reward)
            self._due += self._verify_share
            if self._due >= 1.0:
                self._due -= 1.0
                self._check_later(place)
        self._leaves(handle, self.lives.give)

    def drop(self, handle: Walker) -> None:
        """The episode failed, or was abandoned."""
        self._leaves(handle, self.lives.drop)

    def _part_with(self, handle: Walker, end: Callable[[Live], None]) -> None:
        live, handle.live = handle.live, None
        if live is not None:
            end(live)

    def _leaves(self, handle: Walker, end: Callable[[Live], None]) -> None:
        self._part_with(handle, end)
        if handle.place is not None:
            handle.place.space.active -= 1
            handle.place = None
        self._walkers -= 1
        self._rooted -= handle.rooted
        self.lives.trim()

    async def close(self) -> None:
        """Finish the checks that are due, within `CLOSE_SECONDS`; close the environments and the graph."""
        if self._closed:
            return
        self._closed = True
        until = time.monotonic() + CLOSE_SECONDS
        if self._checks:
            await asyncio.wait(self._checks, timeout=CLOSE_SECONDS)
        if self._checks:
            self.graph.say(f"{len(self._checks)} episodes had not been checked when the environments were closed")
        for task in self._checks:
            task.cancel()
        await self._once.close(max(1.0, until - time.monotonic()))
        await asyncio.gather(*self._checks, return_exceptions=True)
        self.lives.close()
        await self.pool.close()
        await asyncio.to_thread(self.graph.close)

    @asynccontextmanager
    async def _in_time(self) -> AsyncIterator[None]:
        limit = asyncio.timeout(self._patience)
        try:
            async with limit:
                yield
        except TimeoutError:
            if not limit.expired():
                raise
            raise TimeoutError(f"no environment could answer within {self._patience:g} s") from None

    @contextmanager
    def _counting_failure(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.counts.failed += 1
            raise

    # carrying out

    async def _start(self, place: Place) -> bytes | None:
        """Start a task that the graph does not know: the start as it is kept; None where it is not."""
        space = place.space
        live = await self.lives.take(place.task)
        try:
            came, traits = await self.pool.begin(live.handle, place.seed, dict(place.options), True)
            if place.name != space.name:
                self._unwanted(live, came)
                return None
            try:
                body = self.graph.begun(space, came.result, traits, came.digest, came.seconds)
            except ValueError:
                self.graph.unshared(space)
                self._unwanted(live, came)
                return None
        except BaseException:
            self.lives.drop(live)
            raise
        assert space.row.root is not None
        self._reach.settle(live, place, space.row.root, came, 0, anchor=traits.rollback and not traits.travels)
        return body

    def _unwanted(self, live: Live, came: Came) -> None:
        """An environment for whoever comes, and nothing of its state."""
        if came.kept is not None:
            self.pool.forget(live.handle, came.kept)
        self.lives.give(live)

    async def _carry_out(self, place: Place, made: Operation, watched: bool) -> _Done:
        """Carry out an operation that the graph does not know, and keep what may be kept."""
        space = place.space
        keep = watched and place.name == space.name and space.traits.rollback
        live, came = await self._reach.carried_out(place, made.action, keep or self._reach.worth(place))
        found = outcome(came.result)
        if found is None or place.name != space.name:
            if came.kept is not None:
                self.pool.forget(live.handle, came.kept)
            return _Done(came.result, None, live=live)
        after = space.node(place.node, made.id, came.digest)
        edge = self.graph.add(space, place.node, made, after, found, came.seconds)
        step = Step(place.node, made, after, edge.essence, came.seconds)
        if found.ended and not space.traits.rollback:
            self.lives.give(live)
        else:
            self._reach.settle(live, place, after, came, len(place.trail) + 1)
        return _Done(came.result, step, body=found.body)

    async def _leave(self, handle: Walker, place: Place, action: Action) -> StepResult:
        """Go on in an environment of the episode's own."""
        handle.live, came = await self._reach.carried_out(place, action, False)
        self.counts.bypassed += 1
        result: StepResult = came.result
        return result

    async def _reset_alone(self, handle: Walker, seed: int, options: dict[str, Any]) -> Opening:
        """Start a task that nothing is shared of."""
        with self._counting_failure():
            handle.live = await self.lives.take(handle.task)
            opening = await self.pool.reset(handle.live.handle, seed, options)
        self.counts.bypassed += 1
        return opening

    # checking

    def _check_later(self, place: Place) -> None:
        if self._closed or len(self._checks) >= MOST_CHECKS:
            self.graph.say("episodes end faster than their operations can be checked; some were not")
            return
        place.space.active += 1  # it stays in memory until then
        task = asyncio.ensure_future(self._check(place))
        self._checks.add(task)
        task.add_done_callback(self._checks.discard)

    async def _check(self, place: Place) -> None:
        """Carry out everything that an episode went through, in a fresh environment. What fails says nothing."""
        try:
            async with self._in_time(), self._checking:
                if place.name == place.space.name:
                    self.lives.give(await self._reach.from_start(place, check=True))
        except (EnvFailure, EnvRaised, TimeoutError):
            return
        finally:
            place.space.active -= 1

    async def settled(self) -> None:
        """Wait until every check that is due is done."""
        while self._checks:
            await asyncio.wait(set(self._checks))


def _abandon(lives: LiveEnvs) -> Callable[[Any], None]:
    """Drops the environment that was meant for a leader who has gone."""

    def abandon(done: Any) -> None:
        if isinstance(done, _Done) and done.live is not None:
            live, done.live = done.live, None
            lives.drop(live)

    return abandon
