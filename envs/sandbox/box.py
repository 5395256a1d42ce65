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
import contextlib
import json
import os
import site
import socket
import subprocess
import sys
import sysconfig
import weakref
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from . import cgroup
from .wire import WireError, receive, send

_START_SECONDS = 60.0
_REPLY_SECONDS = 60.0
_END_SECONDS = 5.0
_CHUNK = 4 << 20
_BOOT = (
    "import sys,types;p=types.ModuleType('espalier_box');p.__path__=[sys.argv[1]];sys.modules['espalier_box']=p;"
    "from espalier_box.{module} import main;sys.exit(main({argument}))"
)
_NO_THREADS = {"JE_ARROW_MALLOC_CONF": "background_thread:false"}
"""Without it pyarrow, which pandas imports, starts a thread that no snapshot could carry."""

_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}

Stopped = Literal["", "time", "cpu", "memory", "crash"]


class BoxError(RuntimeError):
    """The box itself failed; `code` is a short stable word."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code


class SnapshotIncomplete(BoxError):
    """The present state cannot be kept whole; `reasons` says what stands in the way. Nothing was kept."""

    def __init__(self, message: str, reasons: Sequence[str]) -> None:
        super().__init__("incomplete", message)
        self.reasons = tuple(reasons)


@dataclass(frozen=True)
class Limits:
    """What a box may use.

    `memory`: bytes that one branch's processes hold ("512M"); `pids`: processes at once; `cpu_seconds`: processor time
    of one call; `seconds`: wall-clock time of one call; `output`: bytes of a call's output that are kept; `files`,
    `inodes`: all that was written, in bytes and files; `snapshots`, `snapshot_memory`: frozen copies kept, and the
    bytes they hold, before the least valuable goes; `spares`: copies kept ready for a warm rollback.
    """

    memory: int | str = "1G"
    pids: int = 64
    cpu_seconds: float = 60.0
    seconds: float = 120.0
    output: int = 100_000
    files: int | str = "1G"
    inodes: int = 200_000
    snapshots: int = 256
    snapshot_memory: int | str = "1G"
    spares: int = 4

    def plain(self) -> dict[str, Any]:
        """The same with sizes in bytes. Raises `ValueError` for a size that is none."""
        return {
            **asdict(self),
            **{name: _bytes(getattr(self, name)) for name in ("memory", "files", "snapshot_memory")},
        }


@dataclass(frozen=True)
class Output:
    """What a call printed (standard output and error together), its exit status, and what ended it early.

    `cut`: bytes of output that were not kept. `restarted`: the interpreter had to be replaced by a fresh one, its
    variables are gone; files are as the call left them.
    """

    text: str
    status: int = 0
    stopped: Stopped = ""
    cut: int = 0
    restarted: bool = False


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
        if not self._known and self._failure is None:
            self._box._settle()
        if self._failure is not None:
            raise self._failure
        if not self._known:
            raise BoxError("closed", "the box was closed before the snapshot was made")
        return self._known[0]


class _Family:
    """What the branches of one box share: its process, its control group, snapshots to be dropped."""

    def __init__(self, process: subprocess.Popen[bytes], groups: list[str]) -> None:
        self.process = process
        self.handles: Counter[int] = Counter()
        self.dropped: deque[int] = deque()
        self.connections: set[socket.socket] = set()
        self.end = weakref.finalize(self, _abandon, process, groups, self.connections)

    def with_dropped(self, message: Mapping[str, Any]) -> Mapping[str, Any]:
        """A request that also says which snapshots nobody has a handle to any more."""
        if not self.dropped:
            return message
        gone = [self.dropped.popleft() for _ in range(len(self.dropped))]
        return {**message, "unwanted": [number for number in gone if not self.handles[number]]}


def _abandon(process: subprocess.Popen[bytes], groups: list[str], connections: set[socket.socket]) -> None:
    for connection in connections:
        connection.close()
    _end(process, groups)


def _end(process: subprocess.Popen[bytes], groups: list[str]) -> None:
    """A box whose last connection is closed ends by itself; one that does not is killed."""
    try:
        process.wait(timeout=_END_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    cgroup.remove(groups)


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
        self._python = "python" if live else "fresh"
        connection, family = _start(workspace, limits, python, visible, environment, network)
        self._join(limits, connection, family)
        connection.settimeout(_START_SECONDS)
        try:
            self._reply()
        except BaseException:
            self.close()
            raise
        connection.settimeout(_REPLY_SECONDS)

    def _join(self, limits: Limits, connection: socket.socket, family: _Family) -> None:
        self.limits, self._connection, self._family = limits, connection, family
        self._pending: deque[BoxSnapshot] = deque()
        self._closed = False
        connection.settimeout(_REPLY_SECONDS)
        family.connections.add(connection)

    def python(self, code: str, *, seconds: float | None = None, show: bool = True) -> Output:
        """Run statements in the live interpreter; `show`: the value of a last expression, too. Raises `BoxError`."""
        return self._run(self._python, code, seconds, show)

    def shell(self, command: str, *, seconds: float | None = None) -> Output:
        """Run a shell command in the interpreter's working directory and environment. Raises `BoxError`."""
        return self._run("shell", command, seconds)

    def _run(self, op: str, code: str, seconds: float | None, show: bool = False) -> Output:
        message = _run_message(self.limits, op, code, seconds, show)
        self._send(message)
        self._connection.settimeout(message["seconds"] + _REPLY_SECONDS)
        try:
            return _output(self._reply())
        finally:
            if not self._closed:
                self._connection.settimeout(_REPLY_SECONDS)

    def snapshot(self, *, wait: bool = True) -> BoxSnapshot:
        """Keep the present state. `wait=False`: return at once, and find out at the handle's next use.

        Raises `SnapshotIncomplete` when the state cannot be kept whole.
        """
        made = BoxSnapshot(self)
        self._send({"op": "snapshot"})
        self._pending.append(made)
        weakref.finalize(made, _forget, made._known, self._family).atexit = False
        if wait:
            _ = made.number
        return made

    def _keep(self, told: Mapping[str, Any]) -> BoxSnapshot:
        made = BoxSnapshot(self)
        weakref.finalize(made, _forget, made._known, self._family).atexit = False
        self._know(made, told)
        return made

    def _know(self, made: BoxSnapshot, told: Mapping[str, Any]) -> None:
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
        made._python = self._python
        made._join(self.limits, ours, self._family)
        return made

    def restart(self, snapshot: BoxSnapshot | None = None) -> None:
        """End everything that runs here; a fresh interpreter (or that of `snapshot`) goes on with the present files.

        Raises `BoxError` ("not_plain") when that interpreter holds files or pipes open.
        """
        self._ask({"op": "restart", "snapshot": self._own(snapshot) if snapshot is not None else None})

    def prepare(self, snapshot: BoxSnapshot) -> None:
        """Have a copy of `snapshot` stand ready, so that the next rollback to it is warm."""
        self._ask({"op": "prepare", "snapshot": self._own(snapshot)})

    def drop(self, snapshot: BoxSnapshot) -> None:
        """Let a snapshot go now; one whose handle is collected goes by itself."""
        self._ask({"op": "drop", "snapshots": [self._own(snapshot)]})

    def read_file(self, path: str, *, most: int = 1 << 20) -> bytes:
        """At most `most` bytes of a file below /workspace or /tmp. Raises `OSError` as the guest would see it."""
        data = bytearray()
        while len(data) < most:
            wanted = min(most - len(data), _CHUNK)
            message = {"op": "read_file", "path": path, "most": wanted, "offset": len(data)}
            chunk = base64.b64decode(self._ask(message)["data"])
            data += chunk
            if len(chunk) < wanted:
                break
        return bytes(data)

    def write_file(self, path: str, data: bytes) -> None:
        """Write a file as the guest's user; missing folders are made. Raises `OSError`."""
        for at in range(0, max(len(data), 1), _CHUNK):
            chunk = base64.b64encode(data[at : at + _CHUNK]).decode()
            self._ask({"op": "write_file", "path": path, "data": chunk, "more": at > 0})

    def list_files(self, path: str = ".") -> list[tuple[str, str, int]]:
        """Entries of a folder: name, "file", "folder" or "link", and size in bytes. Raises `OSError`."""
        found = self._ask({"op": "list", "path": path})["entries"]
        return [(name, kind, size) for name, kind, size in found]

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
        return self._next_reply()

    def _settle(self) -> None:
        """Read the replies to snapshots that nobody has waited for."""
        while self._pending:
            made = self._pending.popleft()
            try:
                told = self._next_reply()
                self._know(made, told)
            except BoxError as error:
                made._failure = error
                if self._closed:
                    raise

    def _next_reply(self) -> dict[str, Any]:
        try:
            told, fds = receive(self._connection)
        except WireError as error:
            self.close()
            raise BoxError("box_gone", f"the box is gone or hangs: {error}") from error
        for fd in fds:
            os.close(fd)
        if "error" in told:
            raise _error(told)
        return told


def _forget(known: list[int], family: _Family) -> None:
    """A handle was collected: its snapshot goes with the last one."""
    for number in known:
        family.handles[number] -= 1
        if not family.handles[number]:
            family.dropped.append(number)


def _error(told: Mapping[str, Any]) -> Exception:
    code, message = str(told["error"]), str(told.get("message", ""))
    if code == "incomplete":
        return SnapshotIncomplete(message, told.get("reasons", []))
    if code == "file":
        return OSError(int(told["errno"]), message)
    return BoxError(code, message)


def _run_message(limits: Limits, op: str, code: str, seconds: float | None, show: bool = False) -> dict[str, Any]:
    wait = limits.seconds if seconds is None else seconds
    return {
        "op": op, "code": code, "show": show, "seconds": wait, "cpu_seconds": limits.cpu_seconds, "most": limits.output,
    }  # fmt: skip


def _output(told: Mapping[str, Any]) -> Output:
    return Output(told["output"], told["status"], told["stopped"], told["cut"], told["restarted"])


def _start(
    workspace: str | os.PathLike[str] | None,
    limits: Limits,
    python: str | None,
    visible: Sequence[str],
    environment: Mapping[str, str] | None,
    network: bool,
) -> tuple[socket.socket, _Family]:
    """A connection to a new box, whose first message will be "ready" or an error."""
    if sys.platform != "linux":
        raise BoxError("not_isolated", "a box needs Linux's namespaces and overlay file systems")
    folder = Path(workspace).resolve() if workspace is not None else None
    if folder is not None and not folder.is_dir():
        raise FileNotFoundError(f"the workspace {folder} is not a folder")
    ours, theirs = socket.socketpair()
    with theirs:
        process, groups = _launch(folder, limits, theirs, python, visible, environment, network)
    return ours, _Family(process, groups)


def _launch(
    folder: Path | None,
    limits: Limits,
    control: socket.socket,
    python: str | None,
    visible: Sequence[str],
    environment: Mapping[str, str] | None,
    network: bool,
) -> tuple[subprocess.Popen[bytes], list[str]]:
    here = str(Path(__file__).parent)
    plain = limits.plain()
    groups = cgroup.make(plain)
    config = {
        "control": control.fileno(),
        "workspace": str(folder) if folder is not None else None,
        "limits": plain,
        "network": network,
        "cgroup": groups,
        "visible": [here, *(visible or _own_folders())],
        "command": [
            python or sys.executable, "-P", "-B", "-c", _BOOT.format(module="worker", argument="3"), here
        ],
        "environment": {
            "PATH": f"{Path(python or sys.executable).parent}:/usr/local/bin:/usr/bin:/bin", "HOME": "/tmp",
            "TMPDIR": "/tmp", "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1",
            "MKL_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", **_NO_THREADS,
            **(environment or {}),
        },
    }  # fmt: skip
    boot = _BOOT.format(module="launch", argument="sys.argv[2]")
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", boot, here, json.dumps(config)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=None if os.environ.get("ESPALIER_BOX_DEBUG") else subprocess.DEVNULL,
        pass_fds=(control.fileno(),),
        env={"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8"},
        start_new_session=True,
    )
    return process, groups


def _own_folders() -> list[str]:
    """Folders of this Python and its packages, as far as they are not the system's own."""
    found = [sys.prefix, sys.base_prefix, *site.getsitepackages(), str(Path(sys.executable).resolve().parent.parent)]
    found += [path for key, path in sysconfig.get_paths().items() if key in ("stdlib", "purelib", "platlib")]
    kept: list[str] = []
    for path in sorted(dict.fromkeys(found), key=len):
        if (
            path not in ("/usr", "/")
            and Path(path).is_dir()
            and not any(path.startswith(k + "/") for k in ("/usr", *kept))
        ):
            kept.append(path)
    return kept


def _bytes(size: int | str) -> int:
    if isinstance(size, int):
        return size
    with contextlib.suppress(ValueError, KeyError, IndexError):
        return int(float(size[:-1]) * _UNITS[size[-1].upper()]) if size[-1].isalpha() else int(size)
    raise ValueError(f"{size!r} is not a size: give bytes, or a number with K, M or G")
