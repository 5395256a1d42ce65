"""The operation graph on disk: SQLite, one writer thread, bodies by digest.

Always true: a body that is read has the digest that it was stored under, else it is not there (and counted in
`corrupted`); what was written is there in whole transactions after a crash; nothing is unpickled; the file stays about
within its bound (whole namespaces go, the least recently used first). This is a cache: what cannot be written is left
out and said in `trouble`, and never stops a run.
"""

from __future__ import annotations

import json
import sqlite3
import threading
import time
import zlib
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

SCHEMA = "1"
BUSY_SECONDS = 10.0
_OF_SPACES = ("edges", "operations", "bodies", "visits")
BATCH_SECONDS = 0.05
FLUSH_SECONDS = 15.0
MOST_PENDING = 100_000
"""Records that wait for the writer; beyond that they are left out."""
MOST_PENDING_BYTES = 128 << 20
"""What they may hold."""
MOST_BODY = 64 << 20
CHECK_EVERY = 20
"""Batches between looks at the size of the file."""

_TABLES = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE spaces (
    id BLOB PRIMARY KEY, env TEXT NOT NULL, task TEXT NOT NULL, seed INTEGER NOT NULL, generation INTEGER NOT NULL,
    root BLOB, opening BLOB, essence BLOB, cost REAL NOT NULL, traits TEXT NOT NULL, by_digest INTEGER NOT NULL,
    demoted TEXT NOT NULL, used REAL NOT NULL
) WITHOUT ROWID;
CREATE TABLE edges (
    space BLOB NOT NULL, node BLOB NOT NULL, op BLOB NOT NULL, next BLOB NOT NULL, body BLOB NOT NULL,
    essence BLOB NOT NULL, ended INTEGER NOT NULL, reward REAL NOT NULL, cost REAL NOT NULL,
    PRIMARY KEY (space, node, op)
) WITHOUT ROWID;
CREATE TABLE operations (
    space BLOB NOT NULL, op BLOB NOT NULL, text TEXT NOT NULL, PRIMARY KEY (space, op)
) WITHOUT ROWID;
CREATE TABLE bodies (digest BLOB PRIMARY KEY, space BLOB NOT NULL, data BLOB NOT NULL);
CREATE INDEX bodies_of ON bodies (space);
CREATE TABLE visits (
    space BLOB NOT NULL, node BLOB NOT NULL, op BLOB NOT NULL, count INTEGER NOT NULL, reward REAL NOT NULL,
    PRIMARY KEY (space, node, op)
) WITHOUT ROWID
"""


class GraphStoreError(RuntimeError):
    """The file cannot be used, in one sentence."""


@dataclass(frozen=True, slots=True)
class SpaceRow:
    """A namespace: where it begins, what its environment says of itself, and what is no longer trusted."""

    id: bytes
    env: str
    task: str
    seed: int
    generation: int = 0
    root: bytes | None = None
    opening: bytes | None = None
    essence: bytes | None = None
    cost: float = 0.0
    traits: str = "{}"
    by_digest: bool = False
    demoted: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class EdgeRow:
    """An operation that was carried out in a state. `body`: digest of its outcome; `cost`: seconds it took."""

    node: bytes
    op: bytes
    next: bytes
    body: bytes
    essence: bytes
    ended: bool
    reward: float
    cost: float


class GraphStore:
    """See the module. Raises `GraphStoreError` for a file that cannot be used."""

    def __init__(self, path: Path, *, most_bytes: int = 1 << 30, readonly: bool = False) -> None:
        self.path = path
        self.corrupted = 0
        self.left_out = 0
        self.trouble = ""
        self._most_bytes = most_bytes
        self._lock = threading.Lock()
        try:
            if not readonly:
                path.parent.mkdir(parents=True, exist_ok=True)
            elif not path.is_file():
                raise GraphStoreError(f"there is no operation graph at {path}")
            self._reader = self._opened(readonly)
        except (sqlite3.Error, OSError) as error:
            raise self._unusable(error) from error
        self._waiting: deque[tuple[str, tuple[Any, ...]]] = deque()
        self._bodies: dict[bytes, bytes] = {}
        self._wake = threading.Condition()
        self._busy = self._closing = False
        self._pending_bytes = 0
        self._writer: threading.Thread | None = None
        if not readonly:
            self._writer = threading.Thread(target=self._write, name="espalier-graph", daemon=True)
            self._writer.start()

    def _opened(self, readonly: bool) -> sqlite3.Connection:
        """A connection to a file with the right tables. Who begins it at the same time is waited for."""
        until = time.monotonic() + BUSY_SECONDS
        while True:
            try:
                made = self._connect(readonly)
                try:
                    self._prepare(made, readonly)
                except BaseException:
                    made.close()
                    raise
                return made
            except sqlite3.OperationalError as error:  # changing the journal waits for nobody by itself
                if not _is_busy(error) or time.monotonic() > until:
                    raise
            time.sleep(0.05)

    def _unusable(self, error: Exception) -> GraphStoreError:
        return GraphStoreError(
            f"{self.path} cannot be used as an operation graph ({error}); it is a cache: remove it, or set graph.path"
        )

    def _connect(self, readonly: bool = False) -> sqlite3.Connection:
        made = sqlite3.connect(
            f"{self.path.absolute().as_uri()}?mode={'ro' if readonly else 'rwc'}",
            uri=True,
            timeout=BUSY_SECONDS,
            isolation_level=None,
            check_same_thread=False,
        )
        if not readonly:
            try:
                made.execute("PRAGMA journal_mode = WAL")
                made.execute("PRAGMA synchronous = NORMAL")
            except BaseException:
                made.close()
                raise
        return made

    def _prepare(self, database: sqlite3.Connection, readonly: bool) -> None:
        if not readonly:
            database.execute("BEGIN IMMEDIATE")
            if not database.execute("SELECT 1 FROM sqlite_master WHERE name = 'meta'").fetchone():
                for statement in _TABLES.split(";\n"):
                    database.execute(statement)
                database.execute("INSERT INTO meta VALUES ('schema', ?)", (SCHEMA,))
            database.execute("COMMIT")
        found = database.execute("SELECT value FROM meta WHERE key = 'schema'").fetchone()
        if found is None or found[0] != SCHEMA:
            raise GraphStoreError(
                f"{self.path} is an operation graph of another version of espalier; it is a cache: remove it, or set "
                "graph.path"
            )

    # reading

    def space(self, id: bytes) -> tuple[SpaceRow, list[EdgeRow]] | None:
        """A namespace with its edges; what still waits for the writer is not in it."""
        try:
            with self._lock:
                row = self._reader.execute(f"SELECT {_SPACE} FROM spaces WHERE id = ?", (id,)).fetchone()
                if row is None:
                    return None
                edges = self._reader.execute(f"SELECT {_EDGE} FROM edges WHERE space = ?", (id,)).fetchall()
        except sqlite3.Error as error:
            self._say(f"it cannot be read: {error}")
            return None
        try:
            return _space(row), [_edge(edge) for edge in edges]
        except ValueError:
            self.corrupted += 1
            return None

    def spaces(self) -> list[SpaceRow]:
        """All namespaces, the last used first. This and what follows raise `GraphStoreError`."""
        rows = self._rows(f"SELECT {_SPACE} FROM spaces ORDER BY used DESC, id")
        try:
            return [_space(row) for row in rows]
        except ValueError as error:
            raise self._unusable(error) from error

    def visits(self, id: bytes) -> dict[tuple[bytes, bytes], tuple[int, float]]:
        """How often each (node, operation) was gone through, and the rewards of those episodes, summed."""
        rows = self._rows("SELECT node, op, count, reward FROM visits WHERE space = ?", id)
        return {(bytes(node), bytes(op)): (int(count), float(reward)) for node, op, count, reward in rows}

    def operations(self, id: bytes) -> dict[bytes, str]:
        """The canonical text of each operation of a namespace."""
        rows = self._rows("SELECT op, text FROM operations WHERE space = ?", id)
        return {bytes(op): str(text) for op, text in rows}

    def _rows(self, query: str, *values: bytes) -> list[tuple[Any, ...]]:
        try:
            with self._lock:
                return self._reader.execute(query, values).fetchall()
        except sqlite3.Error as error:
            raise self._unusable(error) from error

    def body(self, digest: bytes) -> bytes | None:
        """The body with this sha256; None when it is not there or is not what was stored."""
        waiting = self._bodies.get(digest)
        if waiting is not None:
            return waiting
        try:
            with self._lock:
                row = self._reader.execute("SELECT data FROM bodies WHERE digest = ?", (digest,)).fetchone()
        except sqlite3.Error as error:
            self._say(f"it cannot be read: {error}")
            return None
        if row is None:
            return None
        data = _unpacked(bytes(row[0]))
        if data is None or sha256(data).digest() != digest:
            self.corrupted += 1
            self._put("DELETE FROM bodies WHERE digest = ?", (digest,))
            return None
        return data

    # writing: queued, done in batches by the one writer

    def put_space(self, row: SpaceRow) -> None:
        """Store or replace a namespace."""
        values = (
            row.id, row.env, row.task, row.seed, row.generation, row.root, row.opening, row.essence, row.cost,
            row.traits, int(row.by_digest), json.dumps(row.demoted), time.time(),
        )  # fmt: skip
        names = f"{_SPACE}, used".split(", ")
        newer = ", ".join(f"{name} = excluded.{name}" for name in names)
        self._put(  # what another process has found out since is not forgotten
            f"INSERT INTO spaces ({', '.join(names)}) VALUES ({_marks(13)}) ON CONFLICT DO UPDATE SET {newer} "
            "WHERE excluded.generation >= spaces.generation",
            values,
        )

    def touch(self, id: bytes) -> None:
        """A namespace was used."""
        self._put("UPDATE spaces SET used = ? WHERE id = ?", (time.time(), id))

    def put_edge(self, space: bytes, row: EdgeRow) -> None:
        """Store or replace an edge."""
        values = (
            space, row.node, row.op, row.next, row.body, row.essence, int(row.ended), row.reward, row.cost,
        )  # fmt: skip
        self._put(f"INSERT OR REPLACE INTO edges (space, {_EDGE}) VALUES ({_marks(9)})", values)

    def put_operation(self, space: bytes, op: bytes, text: str) -> None:
        """Store what an operation is, for who looks at the graph."""
        self._put("INSERT OR IGNORE INTO operations VALUES (?, ?, ?)", (space, op, text))

    def drop_edge(self, space: bytes, node: bytes, op: bytes) -> None:
        """Remove an edge."""
        self._put("DELETE FROM edges WHERE space = ? AND node = ? AND op = ?", (space, node, op))

    def put_body(self, space: bytes, digest: bytes, data: bytes) -> None:
        """Store a body, once."""
        if len(data) <= MOST_BODY and digest not in self._bodies:
            packed = zlib.compress(data, 1)
            self._bodies[digest] = data  # first: the writer takes it away again
            if not self._put("INSERT OR IGNORE INTO bodies VALUES (?, ?, ?)", (digest, space, packed), len(data)):
                self._bodies.pop(digest, None)

    def add_visit(self, space: bytes, node: bytes, op: bytes, reward: float) -> None:
        """An episode went through an edge, and was worth `reward` in the end."""
        self._put(
            "INSERT INTO visits VALUES (?, ?, ?, 1, ?) ON CONFLICT DO UPDATE SET count = count + 1, "
            "reward = reward + excluded.reward",
            (space, node, op, reward),
        )

    def clear(self, space: bytes) -> None:
        """Remove what a namespace holds."""
        for table in _OF_SPACES:
            self._put(f"DELETE FROM {table} WHERE space = ?", (space,))

    def _put(self, statement: str, values: tuple[Any, ...], held: int = 0) -> bool:
        """Queue a statement; whether it could be. `held`: bytes that are in memory for it until it is done."""
        if self._writer is None or self.trouble:
            return False
        with self._wake:
            size = held + sum(len(value) for value in values if isinstance(value, bytes | str))
            if len(self._waiting) >= MOST_PENDING or self._pending_bytes + size > MOST_PENDING_BYTES:
                self.left_out += 1
                return False
            self._pending_bytes += size
            self._waiting.append((statement, values))
            if not self._busy and len(self._waiting) == 1:
                self._wake.notify_all()
        return True

    def flush(self) -> None:
        """Wait until what was put so far is in the file."""
        if self._writer is None:
            return
        with self._wake:
            self._wake.wait_for(lambda: not self._waiting and not self._busy, FLUSH_SECONDS)

    def _write(self) -> None:
        """The writer's thread."""
        try:
            database = self._connect()
        except sqlite3.Error as error:
            self._say(str(error))
            return
        batches = 0
        while True:
            with self._wake:
                self._busy = False
                self._wake.notify_all()
                while not self._waiting and not self._closing:
                    self._wake.wait()
                if not self._waiting:
                    break
                if len(self._waiting) < 100 and not self._closing:
                    self._wake.wait(BATCH_SECONDS)  # more of it in one transaction
                batch, size = list(self._waiting), self._pending_bytes
                self._waiting.clear()
                self._busy = True
            try:
                self._commit(database, batch)
                with self._wake:
                    self._pending_bytes -= size
                batches += 1
                if batches % CHECK_EVERY == 1:
                    self._shrink(database)
            except Exception as error:  # whatever it is, the cache is what is done without
                with suppress(sqlite3.Error):
                    database.execute("ROLLBACK")
                if _is_busy(error) and not self._closing:  # another run is at it: later
                    with self._wake:
                        self._waiting.extendleft(reversed(batch))
                else:
                    self._say(f"nothing more is stored: {error}")
        database.close()

    def _commit(self, database: sqlite3.Connection, batch: list[tuple[str, tuple[Any, ...]]]) -> None:
        database.execute("BEGIN IMMEDIATE")
        for statement, values in batch:
            database.execute(statement, values)
        database.execute("COMMIT")
        for statement, values in batch:
            if statement.startswith("INSERT OR IGNORE INTO bodies"):
                self._bodies.pop(values[0], None)

    def _shrink(self, database: sqlite3.Connection) -> None:
        """Remove whole namespaces, the least recently used first, until there is room again."""
        if self._size(database) <= self._most_bytes:
            return
        database.execute("BEGIN IMMEDIATE")
        for table in _OF_SPACES:  # of namespaces that were removed while somebody worked on them
            database.execute(f"DELETE FROM {table} WHERE space NOT IN (SELECT id FROM spaces)")
        database.execute("COMMIT")
        if self._size(database) <= 0.8 * self._most_bytes:
            return
        ids = [row[0] for row in database.execute("SELECT id FROM spaces ORDER BY used")]
        for id in ids[:-1]:
            database.execute("BEGIN IMMEDIATE")
            for table in _OF_SPACES:
                database.execute(f"DELETE FROM {table} WHERE space = ?", (id,))
            database.execute("DELETE FROM spaces WHERE id = ?", (id,))
            database.execute("COMMIT")
            if self._size(database) <= 0.8 * self._most_bytes:
                return

    def _size(self, database: sqlite3.Connection) -> int:
        pages, free, size = (
            database.execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_count", "freelist_count", "page_size")
        )
        return int((pages - free) * size)

    def _say(self, trouble: str) -> None:
        self.trouble = self.trouble or f"{self.path}: {trouble}"
        with self._wake:
            self._busy = False
            self._waiting.clear()
            self._bodies.clear()
            self._wake.notify_all()

    def close(self) -> None:
        """Write what waits, and close. Closing twice is allowed."""
        with self._wake:
            self._closing = True
            self._wake.notify_all()
        if self._writer is not None:
            self._writer.join(FLUSH_SECONDS)
        with self._lock:
            self._reader.close()

    def __enter__(self) -> GraphStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


_SPACE = "id, env, task, seed, generation, root, opening, essence, cost, traits, by_digest, demoted"
_EDGE = "node, op, next, body, essence, ended, reward, cost"


def _is_busy(error: Exception) -> bool:
    code = getattr(error, "sqlite_errorcode", None)
    return isinstance(error, sqlite3.OperationalError) and code is not None and code & 0xFF == sqlite3.SQLITE_BUSY


def _marks(count: int) -> str:
    return ", ".join("?" * count)


def _space(row: tuple[Any, ...]) -> SpaceRow:
    id, env, task, seed, generation, root, opening, essence, cost, traits, by_digest, demoted = row
    return SpaceRow(
        id, env, task, seed, generation, root, opening, essence, cost, traits, bool(by_digest),
        tuple(json.loads(demoted)),
    )  # fmt: skip


def _edge(row: tuple[Any, ...]) -> EdgeRow:
    node, op, after, body, essence, ended, reward, cost = row
    return EdgeRow(node, op, after, body, essence, bool(ended), reward, cost)


def _unpacked(data: bytes) -> bytes | None:
    try:
        opened = zlib.decompressobj()
        found = opened.decompress(data, MOST_BODY)
    except zlib.error:
        return None
    return found if opened.eof else None
