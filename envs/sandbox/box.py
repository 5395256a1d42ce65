"""Box: code in a sandbox that can be rolled back in a millisecond, files and interpreter together.

    with Box(workspace="repo/") as box:
        box.python("x = 1")
        here = box.snapshot()
        box.shell("rm -rf src")
        box.rollback(here)

Always true: a rollback is complete or an error; the user's folder is never written to; every call has a deadline;
when the box is closed, or this process dies, nothing of it is left.
"""

from __future__ import annotations

import base64
import os
import socket
import weakref
from collections import deque
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from .starting import Family, start
from .terms import BoxError, Limits, Output, error_of, output_of, run_request
from .wire import WireError, receive, send

START_SECONDS = 60.0
REPLY_SECONDS = 60.0
_CHUNK = 4 << 20

Pieces = Generator[dict[str, Any], dict[str, Any] | None, bytes]
"""Requests that belong together: each is yielded, its reply sent in."""


@dataclass(eq=False)
class BoxSnapshot:
    """A handle to a whole state of a box: files, interpreter, offsets, working directory, environment, generators.

    Made by `Box.snapshot(wait=False)` it may not be known yet whether the state could be kept: `number` waits for it.
    """

    _box: Box = field(repr=False)
    _known: list[int] = field(default_factory=list)
    _failure: BoxError | None = None
    pause_us: int = 0

    @property
    def number(self) -> int:
        """Which snapshot of its box this is. Raises `SnapshotIncomplete`, `BoxError`."""
        if not self._known and self._failure is None and not self._box._closed:
            if self._box._connection.gettimeout() == 0:
                raise BoxError("not_known_yet", "await another call of the box first: it settles this snapshot, too")
            self._box._settle()
        if self._failure is not None:
            raise self._failure
        if not self._known:
            raise BoxError("closed", "the box was closed before the snapshot was made")
        return self._known[0]


class Box:
    """One branch of a sandbox: a workspace, a live Python interpreter, and programs, all behind one connection.

    `workspace`: folder that the box starts from and never writes to; it must not change while the box lives. `visible`:
    further folders that guests may read. `environment`: variables for guests. `network`: whether they reach one.
    `live=False`: no interpreter that stays, each call of `python` is a program of its own; a snapshot then is of files,
    working directory and environment, and nothing that a call did in memory can stand in its way.
    Raises `BoxError` ("not_isolated") where this machine does not allow it.
    """

    def __init__(
        self,
        workspace: str | os.PathLike[str] | None = None,
        limits: Limits | None = None,
        *,
        python: str | None = None,
        visible: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
        network: bool = False,
        live: bool = True,
    ) -> None:
        limits = limits or Limits()
        self._join(limits, live, *start(workspace, limits, python, visible, environment, network))
        connection = self._connection
        connection.settimeout(START_SECONDS)
        try:
            self._reply()
        except BaseException:
            self.close()
            raise
        connection.settimeout(REPLY_SECONDS)

    def _join(self, limits: Limits, live: bool, connection: socket.socket, family: Family) -> None:
        self.limits, self.live, self._connection, self._family = limits, live, connection, family
        self._pending: deque[BoxSnapshot] = deque()
        self._closed = False
        connection.settimeout(REPLY_SECONDS)
        family.connections.add(connection)
        weakref.finalize(self, _leave, connection, family.connections).atexit = False

    def python(self, code: str, *, seconds: float | None = None, show: bool = True) -> Output:
        """Run statements in the live interpreter; `show`: the value of a last expression, too. Raises `BoxError`."""
        return self._run("python" if self.live else "fresh", code, seconds, show)

    def shell(self, command: str, *, seconds: float | None = None) -> Output:
        """Run a shell command in the interpreter's working directory and environment. Raises `BoxError`."""
        return self._run("shell", command, seconds)

    def _run(self, op: str, code: str, seconds: float | None, show: bool = False) -> Output:
        message = run_request(self.limits, op, code, seconds, show)
        self._send(message)
        self._connection.settimeout(message["seconds"] + REPLY_SECONDS)
        try:
            return output_of(self._reply())
        finally:
            if not self._closed:
                self._connection.settimeout(REPLY_SECONDS)

    def snapshot(self, *, wait: bool = True) -> BoxSnapshot:
        """Keep the present state. `wait=False`: return at once, and find out at the handle's next use.

        Raises `SnapshotIncomplete` when the state cannot be kept whole.
        """
        made = self._new_handle()
        self._send({"op": "snapshot"})
        self._pending.append(made)
        if wait:
            _ = made.number
        return made

    def _new_handle(self) -> BoxSnapshot:
        made = BoxSnapshot(self)
        weakref.finalize(made, _forget, made._known, self._family).atexit = False
        return made

    def _settle_one(self, made: BoxSnapshot, told: Mapping[str, Any]) -> None:
        if "error" in told:
            failure = error_of(told)
            made._failure = failure if isinstance(failure, BoxError) else BoxError("box_failed", str(failure))
            return
        made.pause_us = int(told.get("pause_us", 0))
        made._known.append(int(told["snapshot"]))
        self._family.handles[made._known[0]] += 1

    def rollback(self, snapshot: BoxSnapshot) -> bool:
        """Return to `snapshot`; whether a copy stood ready. Raises `BoxError` ("no_snapshot": it was let go)."""
        return bool(self._ask({"op": "rollback", "snapshot": self._own(snapshot)})["warm"])

    def branch(self, snapshot: BoxSnapshot) -> Box:
        """A second box that goes on from `snapshot`; both run, neither sees the other. Raises `BoxError`."""
        number = self._own(snapshot)
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                self._ask({"op": "branch", "snapshot": number}, (theirs.fileno(),))
            except BaseException:
                ours.close()
                raise
        made = Box.__new__(Box)
        made._join(self.limits, self.live, ours, self._family)
        return made

    def restart(self, snapshot: BoxSnapshot | None = None) -> None:
        """End everything that runs here; a fresh interpreter (or that of `snapshot`) goes on with the present files.

        Raises `BoxError` ("not_plain") when that interpreter holds files or pipes open.
        """
        self._ask({"op": "restart", "snapshot": self._own(snapshot) if snapshot is not None else None})

    def changed(self) -> bool:
        """Whether anything was written to files, or any process left running, since the last snapshot or rollback. What
        the interpreter has in memory is not looked at.
        """
        return bool(self._ask({"op": "changed"})["changed"])

    def prepare(self, snapshot: BoxSnapshot) -> None:
        """Have a copy of `snapshot` stand ready, so that the next rollback to it is warm."""
        self._ask({"op": "prepare", "snapshot": self._own(snapshot)})

    def drop(self, snapshot: BoxSnapshot) -> None:
        """Let a snapshot go now; one whose handle is collected goes by itself."""
        self._ask({"op": "drop", "snapshots": [self._own(snapshot)]})

    def read_file(self, path: str, *, most: int = 1 << 20) -> bytes:
        """At most `most` bytes of a file below /workspace or /tmp. Raises `OSError` as the guest would see it."""
        return self._by_pieces(reading(path, most))

    def write_file(self, path: str, data: bytes) -> None:
        """Write a file as the guest's user; missing folders are made. Raises `OSError`."""
        self._by_pieces(writing(path, data))

    def _by_pieces(self, pieces: Pieces) -> bytes:
        told: dict[str, Any] | None = None
        while True:
            try:
                message = pieces.send(told)
            except StopIteration as done:
                return bytes(done.value)
            told = self._ask(message)

    def list_files(self, path: str = ".") -> list[tuple[str, str, int]]:
        """Entries of a folder: name, "file", "folder" or "link", and size in bytes. Raises `OSError`."""
        return entries_of(self._ask({"op": "list", "path": path}))

    def stats(self) -> dict[str, int]:
        """How much the box holds: snapshots and the bytes that only they hold, layers, processes, spares."""
        return {key: int(value) for key, value in self._ask({"op": "stats"}).items()}

    def close(self) -> None:
        """End this branch; with its last branch the box ends, and everything in it. Safe to repeat."""
        self._abandon()
        if not self._family.connections:
            self._family.end()

    def _abandon(self) -> None:
        """End this branch without waiting for what follows from it."""
        self._closed = True
        self._connection.close()
        self._family.connections.discard(self._connection)

    def __enter__(self) -> Box:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # the connection

    def _own(self, snapshot: BoxSnapshot) -> int:
        if snapshot._box._family is not self._family:
            raise BoxError("foreign_snapshot", "this snapshot was made by another box")
        return snapshot.number

    def _ask(self, message: Mapping[str, Any], fds: Sequence[int] = ()) -> dict[str, Any]:
        self._send(message, fds)
        return self._reply()

    def _send(self, message: Mapping[str, Any], fds: Sequence[int] = ()) -> None:
        if self._closed:
            raise BoxError("closed", "the box is closed")
        try:
            send(self._connection, self._family.with_dropped(message), fds)
        except WireError as error:
            self.close()
            raise BoxError("box_gone", f"the box is gone: {error}") from error

    def _reply(self) -> dict[str, Any]:
        self._settle()
        told = self._next_reply()
        if "error" in told:
            raise error_of(told)
        return told

    def _settle(self) -> None:
        """Read the replies to snapshots that nobody has waited for."""
        while self._pending:
            made = self._pending.popleft()
            try:
                self._settle_one(made, self._next_reply())
            except BoxError as error:
                made._failure = error
                raise

    def _next_reply(self) -> dict[str, Any]:
        try:
            told, fds = receive(self._connection)
        except WireError as error:
            self.close()
            raise BoxError("box_gone", f"the box is gone or hangs: {error}") from error
        for fd in fds:
            os.close(fd)
        return told


def reading(path: str, most: int) -> Pieces:
    """The requests that read a file, each made of the reply to the one before; gives its bytes."""
    data = bytearray()
    while len(data) < most:
        wanted = min(most - len(data), _CHUNK)
        told = yield {"op": "read_file", "path": path, "most": wanted, "offset": len(data)}
        chunk = base64.b64decode((told or {})["data"])
        data += chunk
        if len(chunk) < wanted:
            break
    return bytes(data)


def writing(path: str, data: bytes) -> Pieces:
    """The requests that write one."""
    for at in range(0, max(len(data), 1), _CHUNK):
        chunk = base64.b64encode(data[at : at + _CHUNK]).decode()
        yield {"op": "write_file", "path": path, "data": chunk, "more": at > 0}
    return b""


def entries_of(told: Mapping[str, Any]) -> list[tuple[str, str, int]]:
    """What the reply to "list" says."""
    return [(name, kind, size) for name, kind, size in told["entries"]]


def _leave(connection: socket.socket, connections: set[socket.socket]) -> None:
    """A box was collected without being closed: its branch ends."""
    connection.close()
    connections.discard(connection)


def _forget(known: list[int], family: Family) -> None:
    """A handle was collected: its snapshot goes with the last one."""
    for number in known:
        family.handles[number] -= 1
        if not family.handles[number]:
            family.dropped.append(number)
