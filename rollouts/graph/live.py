"""The live environments behind an operation graph: where each one stands, what is kept of states, who goes first.

Always true: an environment is used by one at a time; there are never more of them than `limit()`; kept states hold at
most `most_bytes`, and the one that is worth least goes first (GreedyDual-Size-Frequency, Cherkasova 1998: clock +
frequency * seconds to come there again / bytes), one in use never; losing an environment or a kept state costs time and
never correctness.
"""

from __future__ import annotations

import asyncio
import heapq
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from typing import Any

from ...envs.core import EnvFailure
from .core import MOST_REMEMBERED, GraphCounts, Space
from .operation import Key
from .statepool import StatePool
from .states import STATE_GONE, Kept

Place = tuple[Key, Key]
"""A namespace's name and a node."""

HOP_SECONDS = 3e-4
"""What handing one operation to an environment takes beside the operation."""


@dataclass(slots=True, eq=False)
class Live:
    """A live environment. `family`: it and its branches. `space`, `node`: where it stands while nobody uses it.

    `anchor`: it stays where it stands, to branch from.
    """

    handle: Any
    family: int
    space: Space | None = None
    node: Key = b""
    anchor: bool = False


@dataclass(slots=True, eq=False)
class KeptState:
    """A kept state of a node. `leases`: who is about to go on from it."""

    kept: Kept
    place: Place
    home: Any
    family: int
    seconds: float
    frequency: int = 1
    priority: float = 0.0
    leases: int = 0


class LiveEnvs:
    """See the module. `limit`: environments at once, now."""

    def __init__(self, pool: StatePool, counts: GraphCounts, limit: Callable[[], int], most_bytes: int) -> None:
        self.pool = pool
        self._counts = counts
        self._limit = limit
        self._most_bytes = most_bytes
        self._bytes = 0
        self._clock = 0.0
        self._parked: OrderedDict[Live, None] = OrderedDict()
        self._families: dict[int, int] = {}
        self._kept: dict[Place, KeptState] = {}
        self._ranks: list[tuple[float, int, Place]] = []
        self._bound: dict[int, set[Place]] = {}  # by family, where kept states go with it
        self._numbers = count()
        self._freed = asyncio.Event()
        self._keeping: dict[Key, float] = {}
        self._closed = False

    @property
    def kept_bytes(self) -> int:
        """Held by kept states."""
        return self._bytes

    # environments

    async def take(self, task: str) -> Live:
        """A new environment, in no known state; waits while there are as many as there may be."""
        await self._place()
        try:
            live = Live(await self.pool.take(task), next(self._numbers))
        except BaseException:
            self._count(-1)
            raise
        self._families[live.family] = 1
        return live

    async def branch(self, anchor: Live, state: KeptState) -> Live | None:
        """A second environment at a kept state, from one that is parked; None when that does not work."""
        self._parked.pop(anchor, None)
        state.leases += 1
        try:
            await self._place()
            try:
                made = Live(await self.pool.fork(anchor.handle, state.kept), anchor.family)
            except BaseException:
                self._count(-1)
                raise
        except Exception as error:
            gone = isinstance(error, EnvFailure) and error.kind == STATE_GONE
            if gone and state.place[1] != anchor.node:
                self._park(anchor)  # nothing is wrong with it
                self.lost(state)
            else:
                self.drop(anchor)
            return None
        except BaseException:
            self.drop(anchor)
            raise
        finally:
            state.leases -= 1
        self._families[made.family] += 1
        self._park(anchor)
        return made

    async def _place(self) -> None:
        while self._counts.live >= self._limit():
            self._refuse_when_closed()
            victim = self._victim()
            if victim is not None:
                self._parked.pop(victim)
                self.give(victim)
            else:
                await self.freed()
        self._refuse_when_closed()
        self._count(+1)

    async def freed(self) -> None:
        """Wait until an environment is parked or gone; for how long, its caller decides."""
        self._refuse_when_closed()
        self._freed.clear()
        await self._freed.wait()

    def _refuse_when_closed(self) -> None:
        if self._closed:
            raise EnvFailure("pool_closed", "the environments have been closed")

    def _victim(self) -> Live | None:
        """Who is needed least: of a task that nobody works on, then the one parked for longest, anchors last."""

        def rank(live: Live) -> tuple[bool, bool]:
            return live.space is not None and live.space.active > 0, live.anchor

        return min(self._parked, key=rank, default=None)

    def park(self, live: Live, space: Space, node: Key, anchor: bool = False) -> None:
        """An environment stands at `node` and waits for whoever goes on from there."""
        live.space, live.node, live.anchor = space, node, anchor
        self._park(live)

    def _park(self, live: Live) -> None:
        if self._closed:
            self.give(live)
            return
        self._parked[live] = None
        self._freed.set()
        self.trim()

    def trim(self) -> None:
        """Give back what is more than may be."""
        while self._counts.live > self._limit() and (victim := self._victim()) is not None:
            self._parked.pop(victim)
            self.give(victim)

    def give(self, live: Live) -> None:
        """An environment is fit for anything else."""
        self._left(live)
        self.pool.give(live.handle)

    def drop(self, live: Live) -> None:
        """An environment failed, or was left in the middle of something."""
        self._parked.pop(live, None)
        self._left(live)
        self.pool.drop(live.handle)

    def _left(self, live: Live) -> None:
        self._families[live.family] -= 1
        if not self._families[live.family]:
            del self._families[live.family]
            for place in self._bound.pop(live.family, set()):
                self._forget(place)
        self._count(-1)

    def _count(self, more: int) -> None:
        self._counts.live += more
        if more < 0:
            self._freed.set()
        self._counts.live_most = max(self._counts.live_most, self._counts.live)

    def standing(self, space: Space, node: Key) -> Live | None:
        """A parked environment that stands at `node`, now its caller's."""
        for live in list(self._parked):
            if live.space is space and live.node == node and not live.anchor:
                if self.pool.alive(live.handle):
                    return self._unpark(live)
                self.drop(live)
        return None

    def mover(self, space: Space, state: KeptState) -> Live | None:
        """A parked environment that can be brought to `state`, now its caller's."""
        for live in self._parked:
            if not live.anchor and self._fits(space, live, state):
                return self._unpark(live)
        return None

    def anchor(self, space: Space, state: KeptState) -> Live | None:
        """The anchor that can branch into `state`; still parked."""
        for live in self._parked:
            if live.anchor and live.space is space and self._fits(space, live, state):
                return live
        return None

    def use_anchor(self, anchor: Live) -> Live:
        """The anchor itself, which is none any more: for want of room for a branch."""
        anchor.anchor = False
        return self._unpark(anchor)

    def room(self) -> bool:
        """Whether a branch may be had without waiting, and without any anchor's end."""
        return self._counts.live < self._limit() or any(not live.anchor for live in self._parked)

    def _fits(self, space: Space, live: Live, state: KeptState) -> bool:
        if not self.pool.alive(live.handle) or not self.pool.together(live.handle, state.home):
            return False
        return live.family == state.family or space.traits.travels

    def _unpark(self, live: Live) -> Live:
        self._parked.pop(live)
        return live

    def close(self) -> None:
        """Give back what is parked; who waits for an environment is told."""
        self._closed = True
        self._freed.set()
        for live in list(self._parked):
            self._parked.pop(live)
            self.give(live)

    # kept states

    def worth(self, space: Space, seconds: float, steps: int) -> bool:
        """Whether to keep a state that is `seconds` and `steps` away from the start: when coming there again, as likely
        as it is, takes longer than keeping it.
        """
        if not space.traits.rollback:
            return False
        likely = 0.5 if space.active > 1 or space.traits.travels else 0.1
        again = likely * (seconds + HOP_SECONDS * (steps + 1))
        return again > self._keeping.get(space.row.id, 0.0)

    def keep(self, live: Live, space: Space, node: Key, kept: Kept, seconds: float, keeping: float) -> None:
        """`node` is kept; coming there again would take `seconds`, keeping it took `keeping`."""
        if len(self._keeping) > MOST_REMEMBERED:
            self._keeping.clear()
        before = self._keeping.get(space.row.id)
        self._keeping[space.row.id] = keeping if before is None else 0.9 * before + 0.1 * keeping
        place = (space.name, node)
        if place in self._kept:
            self.pool.forget(live.handle, kept)
            return
        state = KeptState(kept, place, live.handle, live.family, seconds + HOP_SECONDS)
        self._kept[place] = state
        if not space.traits.travels:
            self._bound.setdefault(live.family, set()).add(place)
        self._bytes += kept.size
        self._rank(state)
        self._make_room()

    def kept(self, space: Space, node: Key) -> KeptState | None:
        """What is kept of `node`, where it is still there."""
        state = self._kept.get((space.name, node))
        if state is not None and not self.pool.alive(state.home):
            self._forget(state.place)
            return None
        return state

    def used(self, state: KeptState) -> None:
        """Somebody went on from a kept state."""
        state.frequency += 1
        self._rank(state)

    def lost(self, state: KeptState) -> None:
        """A kept state turned out not to be there."""
        if self._kept.get(state.place) is state:
            self._forget(state.place)

    def forget_all(self, name: Key) -> None:
        """Nothing of a namespace is needed any more, by its name."""
        for place in [p for p in self._kept if p[0] == name]:
            self._forget(place)

    def _rank(self, state: KeptState) -> None:
        state.priority = self._clock + state.frequency * state.seconds / max(state.kept.size, 1)
        heapq.heappush(self._ranks, (state.priority, state.kept.number, state.place))
        if len(self._ranks) > 4 * len(self._kept) + 64:  # mostly ranks of before
            self._ranks = [(one.priority, one.kept.number, place) for place, one in self._kept.items()]
            heapq.heapify(self._ranks)

    def _make_room(self) -> None:
        """Let the least valuable go until the rest fits; what is leased stays."""
        leased = []
        while self._bytes > self._most_bytes and self._ranks:
            rank = heapq.heappop(self._ranks)
            state = self._kept.get(rank[2])
            if state is None or (state.priority, state.kept.number) != rank[:2]:
                continue
            if state.leases:
                leased.append(rank)
                continue
            self._clock = state.priority
            self._forget(state.place)
        for rank in leased:
            heapq.heappush(self._ranks, rank)

    def _forget(self, place: Place) -> None:
        state = self._kept.pop(place)
        self._bytes -= state.kept.size
        self._bound.get(state.family, set()).discard(place)
        self.pool.forget(state.home, state.kept)
