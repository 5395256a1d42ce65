"""What happened, durably: an append-only SQLite file of groups, trajectories and failures.

Always true: when `append` has returned, the group survives a kill -9 and a power cut (WAL, synchronous=FULL, one
transaction a group); before that nothing of it is there. An id stands for one content: appending the same again is a
no-op, another content is an error. Token ids and log-probabilities come back exactly. Nothing is ever changed or
deleted, and nothing is pickled.

Durations (`Turn.seconds_*`) and `info` do not belong to a trajectory's identity: a repeated run may differ in them.
"""

from __future__ import annotations

import json
import sqlite3
import threading
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from .types import EndReason, Failure, FailureKind, Group, TokenSequence, TokenSpan, Trajectory, Turn

SCHEMA = 1
_BUSY_SECONDS = 30.0

_TABLES = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
CREATE TABLE groups (seq INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, task TEXT NOT NULL) STRICT;
CREATE TABLE trajectories (
    seq INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, grp TEXT NOT NULL REFERENCES groups (id), task TEXT NOT NULL,
    family TEXT NOT NULL, reward REAL NOT NULL, "end" TEXT NOT NULL, digest BLOB NOT NULL, body BLOB NOT NULL,
    tokens BLOB NOT NULL, logprobs BLOB NOT NULL
) STRICT;
CREATE INDEX trajectories_of_group ON trajectories (grp);
CREATE TABLE failures (
    seq INTEGER PRIMARY KEY, id TEXT NOT NULL, grp TEXT NOT NULL REFERENCES groups (id), task TEXT NOT NULL,
    kind TEXT NOT NULL, message TEXT NOT NULL, retryable INTEGER NOT NULL, UNIQUE (id, kind, message)
) STRICT;
CREATE INDEX failures_of_group ON failures (grp);
"""


class StoreError(RuntimeError):
    """The store refused or could not do something; one sentence that says what to do."""


class TrajectoryStore:
    """See the module. May be used from several threads; several processes may read while one writes."""

    def __init__(self, path: Path, *, readonly: bool = False) -> None:
        """`path`: the file, or a folder in which it is (or will be) `trajectories.sqlite`."""
        self.path = path / "trajectories.sqlite" if path.is_dir() or not path.suffix else path
        self._lock = threading.Lock()
        if readonly and not self.path.is_file():
            raise StoreError(f"there are no trajectories at {self.path}")
        if not readonly:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._db = sqlite3.connect(
                f"{self.path.resolve().as_uri()}?mode={'ro' if readonly else 'rwc'}",
                uri=True,
                timeout=_BUSY_SECONDS,
                isolation_level=None,
                check_same_thread=False,
            )
            self._open(readonly)
        except sqlite3.Error as error:
            raise StoreError(f"{self.path} cannot be opened as a trajectory store: {error}") from error

    def _open(self, readonly: bool) -> None:
        if not readonly:
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = FULL")
            self._db.execute("BEGIN IMMEDIATE")
            if not self._db.execute("SELECT 1 FROM sqlite_master WHERE name = 'meta'").fetchone():
                for statement in _TABLES.split(";\n"):
                    self._db.execute(statement)
                self._db.execute("INSERT INTO meta VALUES ('schema', ?)", (str(SCHEMA),))
            self._db.execute("COMMIT")
        found = self._db.execute("SELECT value FROM meta WHERE key = 'schema'").fetchone()
        if found is None or found[0] != str(SCHEMA):
            raise StoreError(
                f"{self.path} has schema {found[0] if found else 'unknown'}, this version of espalier reads {SCHEMA}; "
                "use the version that wrote it, or another folder"
            )

    def append(self, group: Group) -> None:
        """Store `group`, all or nothing. Raises `StoreError` for an id with another content or a full disk."""
        rows = [_trajectory_row(t) for t in group.trajectories]
        with self._lock:
            try:
                self._db.execute("BEGIN IMMEDIATE")
                self._insert(group, rows)
                self._db.execute("COMMIT")
            except sqlite3.Error as error:
                self._rollback()
                raise StoreError(
                    f"group {group.id} could not be stored in {self.path} ({error}); everything stored before is safe: "
                    "free space on that disk, then continue with --resume"
                ) from error
            except BaseException:
                self._rollback()
                raise

    def _insert(self, group: Group, rows: list[tuple[Any, ...]]) -> None:
        known = self._db.execute("SELECT task FROM groups WHERE id = ?", (group.id,)).fetchone()
        if known is None:
            self._db.execute("INSERT INTO groups (id, task) VALUES (?, ?)", (group.id, group.task))
        elif known[0] != group.task:
            raise StoreError(f"group {group.id} is stored with task {known[0]}, not {group.task}; ids must be unique")
        for row in rows:
            stored = self._db.execute("SELECT digest FROM trajectories WHERE id = ?", (row[0],)).fetchone()
            if stored is None:
                self._db.execute(f"INSERT INTO trajectories ({_COLUMNS}) VALUES ({_MARKS})", row)
            elif stored[0] != row[_COLUMN_NAMES.index("digest")]:
                raise StoreError(f"trajectory {row[0]} is already stored with another content; ids must be unique")
        for f in group.failures:
            self._db.execute(
                "INSERT OR IGNORE INTO failures (id, grp, task, kind, message, retryable) VALUES (?, ?, ?, ?, ?, ?)",
                (f.id, group.id, f.task, f.kind.value, f.message, int(f.retryable)),
            )

    def _rollback(self) -> None:
        if self._db.in_transaction:
            self._db.execute("ROLLBACK")

    def get(self, id: str) -> Trajectory | Failure | None:
        """The trajectory `id`; if there is none, its last failure; else None."""
        with self._lock:
            row = self._db.execute(f"SELECT {_COLUMNS} FROM trajectories WHERE id = ?", (id,)).fetchone()
            if row is not None:
                return _trajectory(row)
            row = self._db.execute(f"SELECT {_FAILURE} FROM failures WHERE id = ? ORDER BY seq DESC", (id,)).fetchone()
        return None if row is None else _failure(row)

    def group(self, id: str) -> Group | None:
        """One group as stored; an episode that failed first and succeeded later counts as its trajectory only."""
        with self._lock:
            head = self._db.execute("SELECT task FROM groups WHERE id = ?", (id,)).fetchone()
            if head is None:
                return None
            rows = self._db.execute(f"SELECT {_COLUMNS} FROM trajectories WHERE grp = ? ORDER BY seq", (id,)).fetchall()
            failed = self._db.execute(f"SELECT {_FAILURE} FROM failures WHERE grp = ? ORDER BY seq", (id,)).fetchall()
        trajectories = tuple(_trajectory(row) for row in rows)
        good = {t.id for t in trajectories}
        failures = {f.id: f for f in map(_failure, failed) if f.id not in good}
        return Group(id, head[0], trajectories, tuple(failures.values()))

    def groups(self, ids: Iterable[str] | None = None) -> Iterator[Group]:
        """The groups `ids` in that order (`StoreError` if one is missing), or all in the order they were stored."""
        for id in self.group_ids() if ids is None else ids:
            group = self.group(id)
            if group is None:
                raise StoreError(f"group {id} is not in {self.path}")
            yield group

    def group_ids(self) -> list[str]:
        """All groups' ids in the order they were stored."""
        with self._lock:
            return [row[0] for row in self._db.execute("SELECT id FROM groups ORDER BY seq")]

    def ids(self) -> list[str]:
        """All trajectories' ids in the order they were stored."""
        with self._lock:
            return [row[0] for row in self._db.execute("SELECT id FROM trajectories ORDER BY seq")]

    def __iter__(self) -> Iterator[Trajectory]:
        """All trajectories in the order they were stored."""
        for id in self.ids():
            found = self.get(id)
            if isinstance(found, Trajectory):
                yield found

    def __len__(self) -> int:
        with self._lock:
            return int(self._db.execute("SELECT count(*) FROM trajectories").fetchone()[0])

    def close(self) -> None:
        """Close the file; everything appended is already there."""
        with self._lock:
            self._db.close()


_COLUMN_NAMES = ("id", "grp", "task", "family", "reward", '"end"', "digest", "body", "tokens", "logprobs")
_COLUMNS = ", ".join(_COLUMN_NAMES)
_MARKS = ", ".join("?" * len(_COLUMN_NAMES))
_FAILURE = "id, grp, task, kind, message, retryable"


def _trajectory_row(t: Trajectory) -> tuple[Any, ...]:
    tokens = b"".join(np.asarray(s.tokens, "<i4").tobytes() for s in t.sequences)
    logprobs = _floats([p for s in t.sequences for p in s.logprobs])
    turns = [asdict(turn) for turn in t.turns]
    kept: dict[str, Any] = {
        "env": t.env,
        "seed": t.seed,
        "instruction": t.instruction,
        "sequences": [[[s.start, s.stop, s.origin, s.version, s.trained] for s in q.spans] for q in t.sequences],
        "turns": turns,
        "info": t.info,
        **({} if t.parent is None else {"parent": t.parent, "left_at": t.left_at}),
    }
    timeless = [{**turn, "seconds_sampling": 0, "seconds_env": 0} for turn in turns]
    identity = {**kept, "info": None, "turns": timeless}
    head = (t.id, t.group, t.task, t.family, float(t.reward), t.end.value)
    digest = sha256(json.dumps([head, identity], sort_keys=True).encode() + tokens + logprobs).digest()
    return (*head, digest, zlib.compress(json.dumps(kept).encode(), 1), zlib.compress(tokens, 1), logprobs)


def _trajectory(row: tuple[Any, ...]) -> Trajectory:
    id, group, task, family, reward, end, _, body, tokens, logprobs = row
    kept = json.loads(zlib.decompress(body))
    ids = np.frombuffer(zlib.decompress(tokens), "<i4").tolist()
    values = _from_floats(logprobs)
    sequences = []
    at = past = 0
    for spans in kept["sequences"]:
        built = tuple(TokenSpan(*span) for span in spans)
        length = built[-1].stop if built else 0
        sampled = sum(s.stop - s.start for s in built if s.origin == "sampled")
        sequences.append(TokenSequence(tuple(ids[at : at + length]), built, tuple(values[past : past + sampled])))
        at, past = at + length, past + sampled
    turns = tuple(Turn(**{**t, "calls": tuple(t["calls"]), "results": tuple(t["results"])}) for t in kept["turns"])
    return Trajectory(
        id=id,
        group=group,
        task=task,
        family=family,
        env=kept["env"],
        seed=kept["seed"],
        sequences=tuple(sequences),
        turns=turns,
        reward=reward,
        end=EndReason(end),
        instruction=kept["instruction"],
        info=kept["info"],
        parent=kept.get("parent"),
        left_at=kept.get("left_at", 0),
    )


def _failure(row: tuple[Any, ...]) -> Failure:
    id, group, task, kind, message, retryable = row
    return Failure(id, group, task, FailureKind(kind), message, bool(retryable))


def _floats(values: list[float]) -> bytes:
    """float32 where that is exact (it is what samplers make), else float64; the first byte says which."""
    wide = np.asarray(values, "<f8")
    narrow = wide.astype("<f4")
    if np.array_equal(narrow.astype("<f8"), wide):
        return b"f" + narrow.tobytes()
    return b"d" + wide.tobytes()


def _from_floats(blob: bytes) -> list[float]:
    return [float(x) for x in np.frombuffer(blob[1:], "<f4" if blob[:1] == b"f" else "<f8")]
