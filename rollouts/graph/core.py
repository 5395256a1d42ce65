"""OperationGraph: which operation leads from which environment state to which, so that it need be done only once.

A node is a state of an environment, an edge an operation carried out in it: the next state, what was observed, the
reward, the end. Always true: a state's name includes its namespace (environment, code, task, seed, options), so that
namespaces share nothing; a state is named by its digest where the environment gives one, else by the history that led
there; an edge that is found is what the environment would have answered, as far as its digests and the effects of its
tools are true. What turns out not to be (`distrust`) takes the whole namespace with it, which starts again with names
by history and without the tools that were caught. No environment is touched here, and no randomness.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from typing import Any

from ...envs.core import Task
from ..envpool import Opening
from .operation import FORM, Key, Operation, Outcome, key, may_keep, observed
from .states import Traits
from .store import EdgeRow, GraphStore, SpaceRow

EDGE_BYTES, SPACE_BYTES, BODY_BYTES = 600, 2500, 200
"""What an edge, a namespace and a body count for in memory, beside what they hold (measured)."""
MOST_REMEMBERED = 10_000
"""Namespaces that are not in memory any more and of which something is remembered without the file."""
MOST_NOTES = 100
EVERYTHING = "*"
"""In `SpaceRow.demoted`: nothing of the task is shared, not even its start."""


@dataclass(slots=True)
class GraphCounts:
    """What has been asked and done. Of the operations asked for (resets and turns):
    `requested == hits + coalesced + executed + bypassed + failed`, whenever nothing is in flight.

    `replayed`, `verified`: operations that were carried out besides, to come to a state, and to check the graph.
    `restored`: kept states that environments were brought to. `mismatches`: checks that found something else than what
    was kept. `live`, `live_most`: environments now, and the most at once.
    """

    requested: int = 0
    hits: int = 0
    coalesced: int = 0
    executed: int = 0
    bypassed: int = 0
    failed: int = 0
    replayed: int = 0
    restored: int = 0
    verified: int = 0
    mismatches: int = 0
    live: int = 0
    live_most: int = 0

    def since(self, before: GraphCounts) -> dict[str, int]:
        """What was counted since `before`; of `live` and `live_most` the present value."""
        now, then = asdict(self), asdict(before)
        return {name: now[name] - (0 if name.startswith("live") else then[name]) for name in now}


@dataclass(slots=True, eq=False)
class Space:
    """A namespace in memory. `name`: of its present generation, part of every state's name."""

    row: SpaceRow
    traits: Traits
    name: Key
    edges: dict[tuple[Key, Key], EdgeRow] = field(default_factory=dict)
    active: int = 0
    full: bool = False
    planting: asyncio.Lock = field(default_factory=asyncio.Lock)

    def node(self, parent: Key, op: Key, digest: str | None) -> Key:
        """The name of the state behind an operation."""
        if self.row.by_digest and digest is not None:
            return key("state", self.name, digest)
        return key("history", self.name, parent, op)

    def keeps(self, made: Operation) -> bool:
        """Whether the outcome of an operation may be kept and shared."""
        return may_keep(made, self.traits.effects, self.row.demoted, self.row.by_digest)


class OperationGraph:
    """See the module. For one event loop. `most_bytes`: of memory; with `store`, more is on disk."""

    def __init__(self, store: GraphStore | None = None, *, most_bytes: int = 256 << 20) -> None:
        self.store = store
        self.counts = GraphCounts()
        self.notes: list[str] = []
        self._most_bytes = most_bytes
        self._spaces: OrderedDict[Key, Space] = OrderedDict()
        self._bodies: OrderedDict[bytes, bytes] = OrderedDict()
        self._bytes = 0
        self._space_bytes = 0
        self._unloaded: set[Key] = set()
        self._distrusted: OrderedDict[Key, SpaceRow] = OrderedDict()
        self._trouble_said = False

    @property
    def held_bytes(self) -> int:
        """Held in memory, about."""
        return self._bytes + self._space_bytes

    # namespaces

    def space(self, identity: str, env: str, task: Task, seed: int, options: Mapping[str, Any]) -> Space | None:
        """The namespace of a task; None for a task or options that cannot be written down, which share nothing."""
        said = task_text(task, options)
        if said is None:
            return None
        id = key(str(FORM), identity, env, said, str(seed))
        found = self._spaces.get(id)
        if found is None:
            found = self._load(id) or _empty(SpaceRow(id, env, task.id, seed))
            known = self._distrusted.pop(id, None)
            if known is not None and set(known.demoted) - set(found.row.demoted):  # no file has it
                found = _empty(known)
            self._make_room(_size(found))
            self._spaces[id] = found
            self._space_bytes += _size(found)
        self._spaces.move_to_end(id)
        return found

    def _load(self, id: Key) -> Space | None:
        if self.store is None:
            return None
        if id in self._unloaded:
            self._flush()
        kept = self.store.space(id)
        if kept is None:
            return None
        row, edges = kept
        try:
            made = replace(_empty(row), traits=_traits(row.traits))
        except (TypeError, ValueError):
            self.store.corrupted += 1
            return None
        self.store.touch(id)
        room = max(0, self._most_bytes // 2 - SPACE_BYTES) // EDGE_BYTES
        made.edges = {(edge.node, edge.op): edge for edge in edges[:room]}
        return made

    def begun(self, space: Space, opening: Opening, traits: Traits, digest: str | None, seconds: float) -> bytes:
        """A task was started: what every later start of it gives, as it is kept. Raises `ValueError` for what cannot
        be.
        """
        body, essence = opening_body(opening)
        self._keep_body(space, body)
        by_digest = digest is not None and not space.row.demoted
        space.traits = traits
        space.row = replace(
            space.row, opening=_digest(body), essence=essence, cost=seconds, by_digest=by_digest,
            traits=json.dumps(asdict(traits)),
        )  # fmt: skip
        space.row = replace(space.row, root=space.node(b"", key("reset"), digest))
        if self.store is not None:
            self.store.put_space(space.row)
        return body

    def opening(self, space: Space) -> Opening | None:
        """What a start gives; None when it is not known."""
        if space.row.root is None or space.row.opening is None:
            return None
        body = self.body(space.row.opening)
        return opening_of(body) if body is not None else None

    # edges

    def find(self, space: Space, node: Key, op: Key) -> tuple[EdgeRow, bytes] | None:
        """The edge of an operation in a state, and the body of its outcome."""
        edge = space.edges.get((node, op))
        if edge is None:
            return None
        body = self.body(edge.body)
        if body is None:  # let go, or broken on disk: it is done again
            self._drop(space, edge)
            return None
        return edge, body

    def add(self, space: Space, node: Key, op: Operation, after: Key, made: Outcome, seconds: float) -> EdgeRow:
        """Keep what came of an operation."""
        edge = EdgeRow(node, op.id, after, made.digest, made.essence, made.ended, made.reward, seconds)
        if (node, op.id) not in space.edges:
            if not self._make_room(EDGE_BYTES):
                if not space.full:
                    self.say(f"task {space.row.task}: graph.memory_mb is used up; what is new is not kept")
                space.full = True
                return edge
            self._space_bytes += EDGE_BYTES
        space.edges[node, op.id] = edge
        self._keep_body(space, made.body)
        if self.store is not None:
            self.store.put_operation(space.row.id, op.id, op.text)
            self.store.put_edge(space.row.id, edge)
        return edge

    def visited(self, space: Space, trail: list[tuple[Key, Key]], reward: float) -> None:
        """An episode has ended that went through these edges; one without a verdict tells nothing of them."""
        if self.store is not None:
            self.store.touch(space.row.id)
        if self.store is not None and math.isfinite(reward):
            for node, op in trail:
                self.store.add_visit(space.row.id, node, op, reward)

    def unshared(self, space: Space) -> None:
        """Nothing of the namespace can be shared, as long as it is in memory."""
        space.row = replace(space.row, demoted=(EVERYTHING,))

    def distrust(self, space: Space, tools: tuple[str, ...], why: str) -> None:
        """Something in the namespace was not as it was kept: the tools are never shared again in it, states are named
        by history, and everything that it held is dropped.
        """
        self.counts.mismatches += 1
        demoted = tuple(sorted({*space.row.demoted, *(tools or ("",))}))
        self.say(
            f"task {space.row.task}: {', '.join(tools) or 'the end of an episode'} gave {why} when it was done again; "
            "it is no longer shared there"
        )
        self._space_bytes -= EDGE_BYTES * len(space.edges)
        space.edges.clear()
        generation = space.row.generation + 1
        space.row = replace(
            space.row, generation=generation, demoted=demoted, by_digest=False, root=None, opening=None, essence=None
        )
        space.name = key("space", space.row.id, str(generation))
        if self.store is not None:
            self.store.clear(space.row.id)
            self.store.put_space(space.row)

    def say(self, note: str) -> None:
        """Note something that a person should know; the last `MOST_NOTES` are kept."""
        self.notes.append(note)
        del self.notes[:-MOST_NOTES]

    def told(self) -> list[str]:
        """What a person should know, since this was last asked; from whichever thread."""
        if self.store is not None and self.store.trouble and not self._trouble_said:
            self._trouble_said = True
            self.say(self.store.trouble)
        found = list(self.notes)
        del self.notes[: len(found)]
        return found

    # memory

    def body(self, digest: bytes) -> bytes | None:
        """The body with this digest, from memory or from disk."""
        found = self._bodies.get(digest)
        if found is not None:
            self._bodies.move_to_end(digest)
            return found
        if self.store is None:
            return None
        found = self.store.body(digest)
        if found is not None:
            self._hold(digest, found)
        return found

    def _keep_body(self, space: Space, body: bytes) -> None:
        digest = _digest(body)
        self._hold(digest, body)
        if self.store is not None:
            self.store.put_body(space.row.id, digest, body)

    def _hold(self, digest: bytes, body: bytes) -> None:
        if digest not in self._bodies:
            self._bodies[digest] = body
            self._bytes += len(body) + BODY_BYTES
            self._make_room()

    def _make_room(self, more: int = 0) -> bool:
        """Let go of what was not used for longest until the rest, and `more` of namespaces and edges, fits; whether
        these do: they have half of it at most.
        """
        most = self._most_bytes
        if self._space_bytes + more > most // 2:
            for id in [id for id, space in self._spaces.items() if not space.active]:
                self._unload(id)
                if self._space_bytes + more <= most // 2:
                    break
        while self._bodies and self.held_bytes + more > most:
            _, body = self._bodies.popitem(last=False)
            self._bytes -= len(body) + BODY_BYTES
        return self._space_bytes + more <= most // 2

    def _unload(self, id: Key) -> None:
        space = self._spaces.pop(id)
        self._space_bytes -= _size(space)
        self._unloaded.add(id)
        if len(self._unloaded) > MOST_REMEMBERED:
            self._flush()
        if space.row.demoted:
            self._distrusted[id] = replace(space.row, root=None, opening=None, essence=None)
            while len(self._distrusted) > MOST_REMEMBERED:
                self._distrusted.popitem(last=False)

    def _flush(self) -> None:
        """Have everything that was unloaded in the file."""
        if self.store is not None:
            self.store.flush()
        self._unloaded.clear()

    def _drop(self, space: Space, edge: EdgeRow) -> None:
        if space.edges.pop((edge.node, edge.op), None) is not None:
            self._space_bytes -= EDGE_BYTES
        if self.store is not None:
            self.store.drop_edge(space.row.id, edge.node, edge.op)

    def close(self) -> None:
        """Write what is left. Closing twice is allowed."""
        if self.store is not None:
            self.store.close()


def _size(space: Space) -> int:
    return SPACE_BYTES + EDGE_BYTES * len(space.edges)


def _empty(row: SpaceRow) -> Space:
    return Space(row, Traits(), key("space", row.id, str(row.generation)))


def _traits(text: str) -> Traits:
    return Traits(**json.loads(text))


def opening_body(opening: Opening) -> tuple[bytes, bytes]:
    """A start as bytes, and the digest of what must come again (its messages and tools). Raises `ValueError`."""
    observation, info, tools = opening
    messages = list(observation.messages)
    try:
        body = json.dumps([messages, dict(info), tools], separators=(",", ":")).encode()
        core = json.dumps([messages, tools], separators=(",", ":")).encode()
    except (TypeError, RecursionError) as error:
        raise ValueError(f"this start cannot be written down: {error}") from error
    if json.loads(core) != [messages, tools]:
        raise ValueError("this start is another one after it was written down")
    return body, _digest(core)


def opening_of(body: bytes) -> Opening:
    """The start again, its caller's own."""
    messages, info, tools = json.loads(body)
    return observed(messages, None), info, tools


def _digest(body: bytes) -> bytes:
    return sha256(body).digest()


def task_text(task: Task, options: Mapping[str, Any]) -> str | None:
    """Everything a start depends on beside the environment and the seed; None when it cannot be written down.

    A task with a `digest` (a hex string over all of it) is named by that.
    """
    digest = getattr(task, "digest", None)
    rest = {name: value for name, value in options.items() if name != "task"}
    try:
        said = digest if isinstance(digest, str) and digest else json.dumps(asdict(task), sort_keys=True)
        return json.dumps([task.id, task.family, said, rest], sort_keys=True)
    except (TypeError, ValueError, RecursionError):
        return None
