"""An `EnvPool` whose episodes walk an operation graph, and hold an environment only where the graph does not know on.

Always true: an operation that is known is answered from the graph; one that is not is carried out once, by whoever
comes first, while those who come meanwhile wait for it; if that fails, one of them tries again, and if that fails too,
each for itself, so that everyone gets the failure of an environment that was asked for him. What may not be shared is
carried out in an environment of the episode's own, from there to its end. Failures, time-outs and what has no verdict
are never kept. An environment that is brought to a state is checked on its way: what it says must be what the graph
says. The sampler is not known here.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

from ..envs.core import Action, EnvFailure, Task
from .envpool import EnvRaised, Opening, StepResult
from .graph import OperationGraph, Space, opening_body
from .graph_live import KeptState, Live, LiveEnvs
from .operation import Key, Operation, key, observed, operation, outcome, result_of
from .statepool import StatePool
from .states import STATE_GONE, Came

T = TypeVar("T")

NOT_REPRODUCIBLE = "not_reproducible"
"""The kind of the `EnvFailure` of an episode whose state cannot be come to again: its environment is not deterministic,
though it says so."""
MOST_CHECKS = 256
"""Ended episodes that wait to be checked; beyond that they are not."""
CLOSE_SECONDS = 60.0
ALONE = 2
"""Failures of others after which an operation is carried out without them."""
EVERYTHING = "*"
"""In `SpaceRow.demoted`: nothing of the task is shared, not even its start."""


@dataclass(frozen=True, slots=True)
class Step:
    """An operation that an episode went through: from `node` to `next`; `seconds` it takes to carry it out."""

    node: Key
    op: Operation
    next: Key
    essence: bytes
    seconds: float


@dataclass(frozen=True, slots=True)
class Place:
    """Where an episode stands: how its task is started, and the operations since. `name`: of the namespace then."""

    space: Space
    name: Key
    task: str
    seed: int
    options: Mapping[str, Any]
    node: Key
    trail: tuple[Step, ...] = ()

    def after(self, step: Step) -> Place:
        """One operation on."""
        return Place(self.space, self.name, self.task, self.seed, self.options, step.next, (*self.trail, step))

    @property
    def seconds(self) -> float:
        """What coming here from nothing takes."""
        return self.space.row.cost + sum(step.seconds for step in self.trail)


@dataclass(slots=True, eq=False)
class Walker:
    """An episode's handle. `live`: its own environment, from where it may share no more."""

    task: str
    place: Place | None = None
    live: Live | None = None
    reward: float = 0.0


@dataclass(slots=True, eq=False)
class _Done:
    """What carrying an operation out gave: `step` and `body` where it may be kept; else `live`, for the leader."""

    result: StepResult
    step: Step | None
    body: bytes = b""
    live: Live | None = None


@dataclass(slots=True, eq=False)
class _Flight(Generic[T]):
    """An operation that is being carried out, and how many wait for it."""

    task: asyncio.Future[T]
    waiting: int = 0
    leaderless: bool = False


class GraphPool:
    """See the module. `identity`: everything about the environment beside the task (see `identity`); `live`: most
    environments at once (0: one for each episode); `verify_share`: of the episodes whose every operation is carried out
    again when they have ended; `kept_bytes`: of kept states.
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
    ) -> None:
        self.pool, self.graph = pool, graph
        self.counts = graph.counts
        self._env_id, self._identity = env_id, identity
        self._most_live, self._verify_share = live, verify_share
        self._walkers = 0
        self.lives = LiveEnvs(pool, graph.counts, self._limit, kept_bytes)
        self._flights: dict[tuple[Key, Key, Key], _Flight[Any]] = {}
        self._due = 0.0
        self._checks: set[asyncio.Task[None]] = set()
        self._checking = asyncio.Lock()
        self._closed = False

    def _limit(self) -> int:
        return self._most_live or max(self._walkers, 1)

    # the EnvPool

    async def take(self, task: str) -> Walker:
        """A place for an episode; no environment yet."""
        if self._closed:
            raise EnvFailure("pool_closed", "the environments have been closed")
        self._walkers += 1
        return Walker(task)

    async def reset(self, handle: Walker, seed: int, options: dict[str, Any]) -> Opening:
        """See `EnvPool`."""
        self.counts.requested += 1
        task = options.get("task")
        space = None
        if isinstance(task, Task):
            space = self.graph.space(self._identity, self._env_id, task, seed, options)
        if space is None or EVERYTHING in space.row.demoted:
            return await self._reset_alone(handle, seed, options)
        space.active += 1
        handle.place = place = Place(space, space.name, handle.task, seed, options, b"")
        tries = 0
        while True:
            opening = self.graph.opening(space)
            if opening is not None and space.row.root is not None:
                self.counts.hits += 1
                break
            with self._counting_failure():
                led, opening = await self._once((space.name, b"", b""), tries, partial(self._start, place))
            if opening is not None and space.row.root is not None:
                self.counts.executed += led
                self.counts.coalesced += not led
                break
            tries += 1
        handle.place = Place(space, space.name, handle.task, seed, options, space.row.root)
        return opening

    async def step(self, handle: Walker, action: Action) -> StepResult:
        """See `EnvPool`."""
        self.counts.requested += 1
        with self._counting_failure():
            result = await self._step(handle, action)
        handle.reward += result[1]
        return result

    async def _step(self, handle: Walker, action: Action) -> StepResult:
        if handle.live is not None:
            result = await self.pool.step(handle.live.handle, action)
            self.counts.bypassed += 1
            return result
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
            led, done = await self._once(
                (place.name, place.node, made.id), tries, partial(self._carry_out, place, made)
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

    def _leaves(self, handle: Walker, end: Callable[[Live], None]) -> None:
        live, handle.live = handle.live, None
        if live is not None:
            end(live)
        if handle.place is not None:
            handle.place.space.active -= 1
            handle.place = None
        self._walkers -= 1
        self.lives.trim()

    async def close(self) -> None:
        """Finish the checks that are due, within `CLOSE_SECONDS`; close the environments and the graph."""
        if self._closed:
            return
        self._closed = True
        if self._checks:
            await asyncio.wait(self._checks, timeout=CLOSE_SECONDS)
        for task in [*self._checks, *(flight.task for flight in self._flights.values())]:
            task.cancel()
        await asyncio.gather(*self._checks, return_exceptions=True)
        self.lives.close()
        await self.pool.close()
        await asyncio.to_thread(self.graph.close)

    # once

    async def _once(
        self, name: tuple[Key, Key, Key], tries: int, work: Callable[[], Awaitable[T]]
    ) -> tuple[bool, T | None]:
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
                raise EnvFailure("pool_closed", "the environments have been closed") from None
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
                self._flights.pop(name, None)
                flight.task.cancel()

    def _landed(self, name: tuple[Key, Key, Key], flight: _Flight[Any], task: asyncio.Future[Any]) -> None:
        if self._flights.get(name) is flight:
            del self._flights[name]
        if not task.cancelled():
            task.exception()  # seen
        if flight.leaderless:
            self._abandon(task)

    def _abandon(self, task: asyncio.Future[Any]) -> None:
        """An environment that was meant for a leader who has gone."""
        done = None if task.cancelled() or task.exception() else task.result()
        if isinstance(done, _Done) and done.live is not None:
            live, done.live = done.live, None
            self.lives.drop(live)

    @contextmanager
    def _counting_failure(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.counts.failed += 1
            raise

    # carrying out

    async def _start(self, place: Place) -> Opening | None:
        """Start a task that the graph does not know."""
        space = place.space
        live = await self.lives.take(place.task)
        try:
            came, traits = await self.pool.begin(live.handle, place.seed, dict(place.options), True)
            if place.name != space.name:
                self.lives.give(live)
                return None
            self.graph.begun(space, came.result, traits, came.digest, came.seconds)
        except BaseException:
            self.lives.drop(live)
            raise
        assert space.row.root is not None
        self._settle(live, place, space.row.root, came, 0, anchor=traits.rollback and not traits.travels)
        return self.graph.opening(space)

    async def _carry_out(self, place: Place, made: Operation) -> _Done:
        """Carry out an operation that the graph does not know, and keep what may be kept."""
        space = place.space
        live, came = await self._from(place, made.action, self._worth(place))
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
            self._settle(live, place, after, came, len(place.trail) + 1)
        return _Done(came.result, step, body=found.body)

    async def _leave(self, handle: Walker, place: Place, action: Action) -> StepResult:
        """Go on in an environment of the episode's own."""
        handle.live, came = await self._from(place, action, False)
        self.counts.bypassed += 1
        result: StepResult = came.result
        return result

    async def _from(self, place: Place, action: Action, keep: bool) -> tuple[Live, Came]:
        """An environment that has carried out `action` where `place` is, now the caller's, and what came of it."""
        live, state = await self._reach(place)
        while True:
            try:
                return live, await self._go_on(live, state, action, keep)
            except BaseException as error:
                self.lives.drop(live)
                if state is None or not isinstance(error, EnvFailure) or error.kind != STATE_GONE:
                    raise
            self.lives.lost(state)
            live, state = await self._from_start(place), None

    async def _reset_alone(self, handle: Walker, seed: int, options: dict[str, Any]) -> Opening:
        """Start a task that nothing is shared of."""
        with self._counting_failure():
            handle.live = await self.lives.take(handle.task)
            opening = await self.pool.reset(handle.live.handle, seed, options)
        self.counts.bypassed += 1
        return opening

    # coming to a state

    async def _reach(self, place: Place) -> tuple[Live, KeptState | None]:
        """An environment that stands where `place` is, or is to be brought to the kept state there."""
        nodes = [*(step.node for step in place.trail), place.node]
        for at in range(len(place.trail), -1, -1):
            live, state = await self._near(place, nodes[at])
            if live is None:
                continue
            try:
                return live, await self._replay(live, state, place, at)
            except (EnvFailure, EnvRaised, TimeoutError) as error:
                self.lives.drop(live)
                if isinstance(error, EnvFailure) and error.kind == NOT_REPRODUCIBLE:
                    raise
                if state is not None:
                    self.lives.lost(state)
                break
            except BaseException:
                self.lives.drop(live)
                raise
        return await self._from_start(place), None

    async def _near(self, place: Place, node: Key) -> tuple[Live | None, KeptState | None]:
        """An environment that stands at `node`, or can be brought to what is kept of it; None where there is none."""
        space, lives = place.space, self.lives
        live = lives.standing(space, node)
        if live is not None:
            return live, None
        state = lives.kept(space, node)
        if state is None:
            return None, None
        live = lives.mover(space, state)
        if live is not None:
            return live, state
        if space.traits.travels:
            live = await lives.take(place.task)
            if self.pool.together(live.handle, state.home):
                return live, state
            lives.give(live)
            return None, None
        anchor = lives.anchor(space, state)
        if anchor is None:
            return None, None
        if not lives.room:
            return lives.use_anchor(anchor), state
        return await lives.branch(anchor, state), None

    async def _replay(self, live: Live, state: KeptState | None, place: Place, at: int) -> KeptState | None:
        """Carry out the operations of `place` from the one numbered `at` on, checking each; `state` while there were
        none.
        """
        for number in range(at, len(place.trail)):
            step = place.trail[number]
            keep = self._worth(place) and self.lives.kept(place.space, step.next) is None
            came = await self._go_on(live, state, step.op.action, keep)
            state = None
            self.counts.replayed += 1
            self._same(place, step, came)
            if came.kept is not None:
                self._keep(live, place, step.next, came)
        return state

    async def _from_start(self, place: Place, check: bool = False) -> Live:
        """An environment that has done everything since the start anew, checked at each operation."""
        live = await self.lives.take(place.task)
        try:
            came, _ = await self.pool.begin(live.handle, place.seed, dict(place.options), False)
            self._count_again(check)
            self._same_start(place, came)
            for step in place.trail:
                came = await self._go_on(live, None, step.op.action, False)
                self._count_again(check)
                self._same(place, step, came)
        except BaseException:
            self.lives.drop(live)
            raise
        return live

    def _count_again(self, check: bool) -> None:
        self.counts.verified += check
        self.counts.replayed += not check

    async def _go_on(self, live: Live, state: KeptState | None, action: Action, keep: bool) -> Came:
        if state is None:
            return await self.pool.go_on(live.handle, None, action, keep)
        self.lives.used(state)
        state.leases += 1
        try:
            came = await self.pool.go_on(live.handle, state.kept, action, keep)
        finally:
            state.leases -= 1
        self.counts.restored += 1
        return came

    def _same(self, place: Place, step: Step, came: Came) -> None:
        """What was done again must be what it was. Raises `EnvFailure` ("not_reproducible")."""
        found = outcome(came.result)
        if found is None:
            raise EnvFailure("no_verdict", "an operation that had an outcome had none when it was done again")
        if found.essence != step.essence:
            self._differs(place, step.op.tools, "another answer")
        if place.name == place.space.name and place.space.node(step.node, step.op.id, came.digest) != step.next:
            self._differs(place, step.op.tools, "another state")

    def _same_start(self, place: Place, came: Came) -> None:
        row = place.space.row
        if place.name != place.space.name or row.essence is None:
            return
        if opening_body(came.result)[1] != row.essence:
            self._differs(place, (EVERYTHING,), "another start")
        if place.space.node(b"", key("reset"), came.digest) != row.root:
            self._differs(place, (EVERYTHING,), "another state at the start")

    def _differs(self, place: Place, tools: tuple[str, ...], why: str) -> None:
        if place.name == place.space.name:
            self.lives.forget_all(place.name)
            self.graph.distrust(place.space, tools, why)
        raise EnvFailure(NOT_REPRODUCIBLE, f"the environment gave {why} when an operation was done again")

    # what stays where

    def _worth(self, place: Place) -> bool:
        current = place.name == place.space.name
        return current and self.lives.worth(place.space, place.seconds, len(place.trail))

    def _settle(self, live: Live, place: Place, node: Key, came: Came, steps: int, anchor: bool = False) -> None:
        """Keep the state behind an operation where that was asked for, and let the environment stand there."""
        if came.kept is not None:
            self._keep(live, place, node, came)
        self.lives.park(live, place.space, node, anchor=anchor)

    def _keep(self, live: Live, place: Place, node: Key, came: Came) -> None:
        if came.kept is not None:
            seconds = place.seconds + came.seconds
            self.lives.keep(live, place.space, node, came.kept, seconds, came.seconds_keeping)

    # checking

    def _check_later(self, place: Place) -> None:
        if self._closed or len(self._checks) >= MOST_CHECKS:
            self.graph.say("episodes end faster than their operations can be checked; some were not")
            return
        task = asyncio.ensure_future(self._check(place))
        self._checks.add(task)
        task.add_done_callback(self._checks.discard)

    async def _check(self, place: Place) -> None:
        """Carry out everything that an episode went through, in a fresh environment. What fails says nothing."""
        async with self._checking:
            if place.name != place.space.name:
                return
            place.space.active += 1
            try:
                self.lives.give(await self._from_start(place, check=True))
            except (EnvFailure, EnvRaised, TimeoutError):
                return
            finally:
                place.space.active -= 1

    async def settled(self) -> None:
        """Wait until every check that is due is done."""
        while self._checks:
            await asyncio.wait(set(self._checks))


def _being_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
