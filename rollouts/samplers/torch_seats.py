"""Who sits where: which session holds which lane, which prefix row serves whom, and what is kept of those that had to
leave.

What always holds: a session's tokens are its prefix (the first prompt without its last token, shared with every session
that starts the same) followed by its lane; that border is chosen by the session's first prompt and moves only when a
prompt breaks with the prefix, so it does not depend on what was cached. What is cached belongs to one (version number,
digest) and is found by that key alone. A session between turns may lose its seat to one that waits; the copies kept for
its return, and those of prefixes, are bounded in tokens.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from .base import SamplerError
from .torch_cache import Cache, Saved

MAX_SESSIONS = 65536

Key = tuple[int, str]


class Name(NamedTuple):
    """What a kept copy is a copy of: a prefix (of a version, with its tokens) or a session's lane (by its name)."""

    key: Key | None
    tokens: tuple[int, ...] = ()
    session: str = ""


@dataclass(slots=True, eq=False)
class Prefix:
    """A prefix row; `ready` of its tokens are computed, `users` running sessions read it."""

    key: Key
    tokens: tuple[int, ...]
    row: int
    ready: int = 0
    users: int = 0

    @property
    def whole(self) -> bool:
        """Whether all of it is computed."""
        return self.ready == len(self.tokens)


@dataclass(slots=True, eq=False)
class Session:
    """An episode. `cached`: the tokens after the prefix whose keys and values exist, in `lane` or as a kept copy."""

    name: str
    prefix: tuple[int, ...] | None = None
    key: Key | None = None
    lane: int | None = None
    cached: list[int] = field(default_factory=list)
    busy: bool = False


@dataclass(slots=True, eq=False)
class Seat:
    """What a running request holds. `pending`: the prompt's tokens that are still to be fed, at least one."""

    session: Session
    prefix: Prefix
    lane: int
    pending: list[int]
    reused: int

    @property
    def length(self) -> int:
        """Tokens before the one that is fed next."""
        return len(self.prefix.tokens) + len(self.session.cached)


class Pool:
    """Copies of rows, least recently used out first; `bound` tokens at most."""

    def __init__(self, bound: int) -> None:
        self._bound = bound
        self._held: OrderedDict[Name, Saved] = OrderedDict()
        self._sorted: dict[Key, list[tuple[int, ...]]] = {}  # the prefixes kept of each version
        self.tokens = 0

    def put(self, name: Name, saved: Saved) -> None:
        """Keep `saved`, dropping the oldest for it, or itself if it exceeds the bound."""
        self.pop(name)
        self._held[name] = saved
        self.tokens += saved.length
        if name.key:
            insort(self._sorted.setdefault(name.key, []), name.tokens)
        while self.tokens > self._bound:
            self.pop(next(iter(self._held)))

    def get(self, name: Name) -> Saved | None:
        """The copy kept as `name`, which stays."""
        if name in self._held:
            self._held.move_to_end(name)
        return self._held.get(name)

    def pop(self, name: Name) -> Saved | None:
        """The copy kept as `name`, which goes."""
        saved = self._held.pop(name, None)
        if saved is None:
            return None
        self.tokens -= saved.length
        if name.key:
            kept = self._sorted[name.key]
            del kept[bisect_left(kept, name.tokens)]
            if not kept:
                del self._sorted[name.key]
        return saved

    def drop(self, key: Key) -> None:
        """Let all prefixes of a version go."""
        for tokens in list(self._sorted.get(key, ())):
            self.pop(Name(key, tokens))

    def nearest(self, key: Key, tokens: tuple[int, ...]) -> tuple[Name, int]:
        """The kept prefix of a version that agrees with `tokens` longest, and for how long (0: none does).

        In sorted order that is one of the two neighbours of `tokens`.
        """
        kept = self._sorted.get(key, [])
        at = bisect_left(kept, tokens)
        lengths = [(_common(other, tokens), other) for other in kept[max(0, at - 1) : at + 1]]
        length, best = max(lengths, default=(0, tokens))
        return Name(key, best), length


class Seats:
    """All lanes and prefix rows of a cache. Only the engine's thread touches it."""

    def __init__(self, cache: Cache, slots: int, cache_tokens: int) -> None:
        self._cache = cache
        self._pool = Pool(cache_tokens)
        self._sessions: dict[str, Session] = {}
        self._lanes: list[Session | None] = [None] * slots
        self._idle: OrderedDict[str, Session] = OrderedDict()  # seated without a request, longest first
        self._prefixes: list[Prefix | None] = [None] * slots
        self.parked = 0
        self.restored = 0

    def open(self, name: str) -> Session:
        """The session called `name`, new if need be. Raises `SamplerError` when it is busy or too many are open."""
        session = self._sessions.get(name)
        if session is None:
            if len(self._sessions) >= MAX_SESSIONS:
                raise SamplerError(f"{MAX_SESSIONS} sessions are open; end_session those that are over.")
            session = self._sessions[name] = Session(name)
        if session.busy:
            raise SamplerError(
                f"session {name!r} already has a request under way; a session samples one turn at a time."
            )
        session.busy = True
        return session

    def sit(self, session: Session, key: Key, prompt: tuple[int, ...]) -> Seat | None:
        """Seat a session that wants to go on from `prompt` with version `key`; None: every lane is running."""
        tokens = session.prefix
        if tokens is None or len(tokens) >= len(prompt) or prompt[: len(tokens)] != tokens:
            tokens = session.prefix = prompt[:-1]
            self._lose(session)
        if session.key != key:
            session.key = key
            self._lose(session)
        lane = session.lane if session.lane is not None else self._find_lane(session)
        if lane is None:
            return None
        self._idle.pop(session.name, None)
        rest = prompt[len(tokens) :]
        kept = _common(session.cached, rest[:-1])
        del session.cached[kept:]
        prefix = self._find_prefix(key, tokens)
        prefix.users += 1
        return Seat(session, prefix, lane, list(rest[kept:]), kept + prefix.ready)

    def rise(self, session: Session, seat: Seat | None) -> None:
        """The session's request is over; it stays in its lane until another needs it."""
        session.busy = False
        if seat:
            seat.prefix.users -= 1
        if session.lane is not None:
            self._idle[session.name] = session

    def keep(self, prefix: Prefix) -> None:
        """Keep a copy of a prefix that is whole."""
        self._pool.put(Name(prefix.key, prefix.tokens), self._cache.prefixes.save(prefix.row, prefix.ready))

    def forget(self, name: str) -> None:
        """Let a session go that has no request under way; unknown ones are ignored."""
        session = self._sessions.pop(name, None)
        if session is None:
            return
        self._lose(session)
        self._idle.pop(name, None)
        if session.lane is not None:
            self._lanes[session.lane] = None

    def drop(self, key: Key) -> None:
        """Let go what was computed with a version that nobody runs on."""
        self._pool.drop(key)
        for row, held in enumerate(self._prefixes):
            if held and held.key == key and not held.users:
                self._prefixes[row] = None

    def _find_lane(self, session: Session) -> int | None:
        lane = next((i for i, holder in enumerate(self._lanes) if holder is None), None)
        if lane is None:
            if not self._idle:
                return None
            lane = self._park(next(iter(self._idle.values())))
        self._lanes[lane], session.lane = session, lane
        saved = self._pool.pop(Name(None, session=session.name))
        if saved is None:
            session.cached = []
        else:
            self._cache.lanes.load(lane, saved, len(session.cached))
            self.restored += 1
        return lane

    def _park(self, session: Session) -> int:
        """Take an idle session's lane, keeping a copy of what it holds while the pool has room."""
        if session.lane is None:
            raise RuntimeError(f"session {session.name!r} has no lane to give up; this is a bug")
        lane, session.lane = session.lane, None
        self._pool.put(Name(None, session=session.name), self._cache.lanes.save(lane, len(session.cached)))
        self._idle.pop(session.name, None)
        self._lanes[lane] = None
        self.parked += 1
        return lane

    def _lose(self, session: Session) -> None:
        """Forget a session's keys and values; its lane, if it has one, stays its own."""
        session.cached = []
        self._pool.pop(Name(None, session=session.name))

    def _find_prefix(self, key: Key, tokens: tuple[int, ...]) -> Prefix:
        for held in self._prefixes:
            if held and held.key == key and held.tokens == tokens:
                return held
        # There is a free row: there are as many rows as lanes, and a running session reads one.
        row = next(i for i, held in enumerate(self._prefixes) if held is None or not held.users)
        name, ready = self._pool.nearest(key, tokens)
        saved = self._pool.get(name) if ready else None
        if saved is not None:
            self._cache.prefixes.load(row, saved, ready)
        prefix = self._prefixes[row] = Prefix(key, tokens, row, ready)
        return prefix


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the longest common prefix."""
    size = min(len(a), len(b))
    differ = np.flatnonzero(np.asarray(a[:size], np.int64) != np.asarray(b[:size], np.int64))
    return int(differ[0]) if len(differ) else size
