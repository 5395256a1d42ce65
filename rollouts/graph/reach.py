"""Bringing environments to the states of an operation graph: by standing there, by a kept state, by doing it all again.

Always true: the nearest start is taken (an environment that stands on the way, a kept state, else a reset), and what is
done again on the way must give what it gave before; if it does not, the namespace is distrusted and the episode ends as
a failure with a name. An environment that fails on its way is replaced by one from a reset, once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...envs.core import Action, EnvFailure
from ..envpool import EnvRaised, Opening
from .core import EVERYTHING, MOST_REMEMBERED, OperationGraph, Space, opening_body
from .live import KeptState, Live, LiveEnvs
from .operation import Key, Operation, key, outcome
from .statepool import StatePool
from .states import STATE_GONE, Came

NOT_REPRODUCIBLE = "not_reproducible"
"""The kind of the `EnvFailure` of an episode whose state cannot be come to again: its environment is not deterministic,
though it says so."""


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


class Reach:
    """See the module."""

    def __init__(self, pool: StatePool, graph: OperationGraph, lives: LiveEnvs) -> None:
        self.pool, self.graph, self.lives = pool, graph, lives
        self._counts = graph.counts
        self._barren: set[Key] = set()  # namespaces whose start cannot be kept

    async def carried_out(self, place: Place, action: Action, keep: bool) -> tuple[Live, Came]:
        """An environment that has carried out `action` where `place` is, now the caller's, and what came of it."""
        while True:  # as often as a kept state is gone
            live, state = await self.reach(place)
            try:
                return live, await self._go_on(live, state, action, keep)
            except BaseException as error:
                self.lives.drop(live)
                if state is None or not _gone(error):
                    raise
            self.lives.lost(state)

    async def reach(self, place: Place) -> tuple[Live, KeptState | None]:
        """An environment that stands where `place` is, or is to be brought to the kept state there."""
        nodes = [*(step.node for step in place.trail), place.node]
        await self._plant(place, nodes[0])
        at = len(place.trail)
        while at >= 0:
            live, state = await self._near(place, nodes[at])
            if live is None:
                at -= 1
                continue
            try:
                return live, await self._replay(live, state, place, at)
            except (EnvFailure, EnvRaised, TimeoutError) as error:
                self.lives.drop(live)
                if isinstance(error, EnvFailure) and error.kind == NOT_REPRODUCIBLE:
                    raise
                if state is None:
                    break
                self.lives.lost(state)
                if not _gone(error):
                    break
            except BaseException:
                self.lives.drop(live)
                raise
        return await self.from_start(place), None

    async def _plant(self, place: Place, root: Key) -> None:
        """Where kept states belong to a family: one environment at the start, for all others to branch from, instead of
        one from the start for each.
        """
        space = place.space
        if not space.traits.rollback or space.traits.travels or place.name != space.name:
            return
        async with space.planting:
            if space.name in self._barren or place.name != space.name or self.lives.kept(space, root) is not None:
                return
            live = await self.lives.take(place.task)
            try:
                came, _ = await self.pool.begin(live.handle, place.seed, dict(place.options), True)
                self._counts.replayed += 1
                self._same_start(live, place, came)
            except BaseException:
                self.lives.drop(live)
                raise
            if came.kept is None:
                if len(self._barren) > MOST_REMEMBERED:
                    self._barren.clear()
                self._barren.add(space.name)
            else:
                self.lives.keep(live, space, root, came.kept, came.seconds, came.seconds_keeping)
            self.lives.park(live, space, root, anchor=came.kept is not None)

    async def _near(self, place: Place, node: Key) -> tuple[Live | None, KeptState | None]:
        """An environment that stands at `node`, or can be brought to what is kept of it; None where there is none."""
        space, lives = place.space, self.lives
        while True:
            live = lives.standing(space, node)
            if live is not None:
                return live, None
            state = lives.kept(space, node)
            if state is None:
                return None, None
            live = lives.mover(space, state)
            if live is not None:
                return live, state
            anchor = lives.anchor(space, state)
            if space.traits.travels or anchor is not None:
                break
            await lives.freed()  # all of the family are at work; a new one would have to come here from the start
        if space.traits.travels:
            live = await lives.take(place.task)
            if self.pool.together(live.handle, state.home):
                return live, state
            lives.give(live)
            return None, None
        assert anchor is not None
        if not lives.room():
            return lives.use_anchor(anchor), state
        return await lives.branch(anchor, state), None

    async def _replay(self, live: Live, state: KeptState | None, place: Place, at: int) -> KeptState | None:
        """Carry out the operations of `place` from the one numbered `at` on, checking each; `state` while there were
        none.
        """
        for number in range(at, len(place.trail)):
            step = place.trail[number]
            keep = self.worth(place) and self.lives.kept(place.space, step.next) is None
            came = await self._go_on(live, state, step.op.action, keep)
            state = None
            self._counts.replayed += 1
            self._same(live, place, step, came)
            self._keep(live, place, step.next, came)
        return state

    async def from_start(self, place: Place, check: bool = False) -> Live:
        """An environment that has done everything since the start anew, checked at each operation."""
        live = await self.lives.take(place.task)
        try:
            came, _ = await self.pool.begin(live.handle, place.seed, dict(place.options), False)
            self._count_again(check)
            self._same_start(live, place, came)
            for step in place.trail:
                keep = not check and self.worth(place) and self.lives.kept(place.space, step.next) is None
                came = await self._go_on(live, None, step.op.action, keep)
                self._count_again(check)
                self._same(live, place, step, came)
                self._keep(live, place, step.next, came)
        except BaseException:
            self.lives.drop(live)
            raise
        return live

    def _count_again(self, check: bool) -> None:
        self._counts.verified += check
        self._counts.replayed += not check

    async def _go_on(self, live: Live, state: KeptState | None, action: Action, keep: bool) -> Came:
        if state is None:
            return await self.pool.go_on(live.handle, None, action, keep)
        self.lives.used(state)
        state.leases += 1
        try:
            came = await self.pool.go_on(live.handle, state.kept, action, keep)
        finally:
            state.leases -= 1
        self._counts.restored += 1
        return came

    def _same(self, live: Live, place: Place, step: Step, came: Came) -> None:
        """What was done again must be what it was. Raises `EnvFailure` ("not_reproducible"); then nothing is kept."""
        found = outcome(came.result)
        if found is None:
            self._unkept(live, came)
            raise EnvFailure("no_verdict", "an operation that had an outcome had none when it was done again")
        if found.essence != step.essence:
            self._differs(live, place, came, step.op.tools, "another answer")
        if place.name == place.space.name and place.space.node(step.node, step.op.id, came.digest) != step.next:
            self._differs(live, place, came, step.op.tools, "another state")

    def _same_start(self, live: Live, place: Place, came: Came) -> None:
        row = place.space.row
        if place.name != place.space.name or row.essence is None:
            return
        if _essence(came.result) != row.essence:
            self._differs(live, place, came, (EVERYTHING,), "another start")
        if place.space.node(b"", key("reset"), came.digest) != row.root:
            self._differs(live, place, came, (EVERYTHING,), "another state at the start")

    def _differs(self, live: Live, place: Place, came: Came, tools: tuple[str, ...], why: str) -> None:
        self._unkept(live, came)
        if place.name == place.space.name:
            self.lives.forget_all(place.name)
            self.graph.distrust(place.space, tools, why)
        raise EnvFailure(NOT_REPRODUCIBLE, f"the environment gave {why} when an operation was done again")

    def _unkept(self, live: Live, came: Came) -> None:
        if came.kept is not None:
            self.pool.forget(live.handle, came.kept)

    # what stays where

    def worth(self, place: Place) -> bool:
        """Whether the state behind the next operation is to be kept."""
        current = place.name == place.space.name
        return current and self.lives.worth(place.space, place.seconds, len(place.trail))

    def settle(self, live: Live, place: Place, node: Key, came: Came, steps: int, anchor: bool = False) -> None:
        """Keep the state behind an operation where that was asked for, and let the environment stand there."""
        self._keep(live, place, node, came)
        self.lives.park(live, place.space, node, anchor=anchor)

    def _keep(self, live: Live, place: Place, node: Key, came: Came) -> None:
        if place.name != place.space.name:
            self._unkept(live, came)
        elif came.kept is not None:
            seconds = place.seconds + came.seconds
            self.lives.keep(live, place.space, node, came.kept, seconds, came.seconds_keeping)


def _gone(error: BaseException) -> bool:
    return isinstance(error, EnvFailure) and error.kind == STATE_GONE


def _essence(opening: Opening) -> bytes | None:
    try:
        return opening_body(opening)[1]
    except ValueError:
        return None
