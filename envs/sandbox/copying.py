"""CopyBox: where no overlay and no namespace is to be had (a default container, macOS): a copied folder, no isolation.

What is lost against `Box`, and never pretended: the code runs as this user, sees what this user sees and has its
network; a snapshot and a rollback copy the whole workspace; no interpreter stays between calls; /tmp is the machine's
own. For root the code runs as a user that has nothing but the workspace, since no limit holds root. What holds: the
user's folder is never written to, calls are bounded in time, memory, output and (on Linux) processes, and everything
that a call started is ended with it. On Linux that is so when this process is killed, too; the folder that it leaves
behind is removed by the next box.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import weakref
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

from .terms import BoxError, Limits, Output, Stopped

LOOK_EVERY_S = 0.1
PREFIX = "espalier-code-"
FIRST_USER, USERS = 61_184, 4_000
"""Numbers that systems keep for users that come and go."""


@dataclass(frozen=True, eq=False)
class CopySnapshot:
    """A full copy of a workspace."""

    folder: Path


class CopyBox:
    """A box without isolation; see the module for what it is not. `python`: the interpreter for the code.

    Raises `BoxError` ("not_isolated") where root cannot have the code run as another user.
    """

    def __init__(
        self,
        workspace: str | os.PathLike[str] | None = None,
        limits: Limits | None = None,
        *,
        python: str | None = None,
    ) -> None:
        self.limits = limits or Limits()
        self._plain, self._python = self.limits.plain(), python or sys.executable
        self._user = FIRST_USER + os.getpid() % USERS if os.getuid() == 0 else None
        _sweep(Path(tempfile.gettempdir()))
        self._room, lock = _room(open_to_others=self._user is not None)
        self._end = weakref.finalize(self, _remove, self._room, lock)
        self._folder = self._room / "workspace"
        if workspace is None:
            self._folder.mkdir()
        else:
            shutil.copytree(workspace, self._folder, symlinks=True)
        if self._user is not None:
            self._try_out()

    def _try_out(self) -> None:
        """Whether the other user can run anything here."""
        why = ""
        try:
            self._give()
            out = self._run([self._python, "-I", "-S", "-c", "import os; os.listdir(os.environ['HOME'])"], "", None)
            if out.status or out.stopped:
                why = out.text.strip().rpartition("\n")[2] or out.stopped or f"exit status {out.status}"
        except OSError as error:
            why = str(error)
        if why:
            self.close()
            message = "the code of root has to run as another user, for whom limits hold, and for whom"
            raise BoxError("not_isolated", f"{message} {self._python} does not run in {self._folder.parent}: {why}")

    def _give(self) -> None:
        """The workspace belongs to who runs in it."""
        if self._user is not None:
            for at, folders, files in os.walk(self._folder):
                for name in (".", *folders, *files):
                    os.chown(os.path.join(at, name), self._user, self._user, follow_symlinks=False)

    def python(self, code: str, *, seconds: float | None = None, show: bool = False) -> Output:
        """Run Python in a process of its own; it shows what it prints, whatever `show` says."""
        return self._run([self._python, "-B", "-"], code, seconds)

    def shell(self, command: str, *, seconds: float | None = None) -> Output:
        """Run a shell command in the workspace."""
        return self._run(["/bin/sh", "-c", command], "", seconds)

    def _run(self, command: list[str], text: str, seconds: float | None) -> Output:
        wait = self.limits.seconds if seconds is None else seconds
        limits = {"memory": 4 * self._plain["memory"], "cpu": int(self.limits.cpu_seconds) + 1,
                  "pids": self.limits.pids, "file": self._plain["files"]}  # fmt: skip
        told = json.dumps([limits, os.getpid(), self._user, command])
        launcher = [sys.executable, "-I", "-S", str(Path(__file__).with_name("bare.py")), told]
        with tempfile.TemporaryFile() as out:
            process = subprocess.Popen(
                launcher,
                cwd=self._folder,
                stdin=subprocess.PIPE,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={"PATH": os.environ.get("PATH", "/usr/bin:/bin"), "HOME": str(self._folder), "LANG": "C.UTF-8",
                     "OMP_NUM_THREADS": "1"},
            )  # fmt: skip
            try:
                with contextlib.suppress(BrokenPipeError):
                    if process.stdin is not None:
                        process.stdin.write(text.encode())
                        process.stdin.close()
                stopped = self._watch(process, wait)
            finally:
                _kill(process)
            size = out.seek(0, os.SEEK_END)
            out.seek(0)
            kept = out.read(self.limits.output)
        return Output(kept.decode("utf-8", "replace"), abs(process.returncode), stopped, size - len(kept))

    def _watch(self, process: subprocess.Popen[bytes], seconds: float) -> Stopped:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(LOOK_EVERY_S)
                return ""
            if sum(_resident(p) for p in _descendants(process.pid)) > self._plain["memory"]:
                return "memory"
        return "time"

    def snapshot(self) -> CopySnapshot:
        """Copy the workspace. Raises `OSError` for what may not be read."""
        folder = Path(tempfile.mkdtemp(prefix="kept-", dir=self._room))
        shutil.copytree(self._folder, folder, symlinks=True, dirs_exist_ok=True, copy_function=self._copy)
        return CopySnapshot(folder)

    def _copy(self, source: str, to: str) -> None:
        self._allowed(os.lstat(source), source)
        shutil.copy2(source, to, follow_symlinks=False)

    def _allowed(self, found: os.stat_result, path: str) -> None:
        """Root reads and writes only what is the code's own: a hard link may lead to another's file."""
        if self._user is not None and found.st_uid != self._user:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)

    def rollback(self, snapshot: CopySnapshot) -> None:
        """Copy a snapshot back. Raises `BoxError` ("foreign_snapshot")."""
        if snapshot.folder.parent != self._room:
            raise BoxError("foreign_snapshot", "this snapshot was made by another box")
        shutil.rmtree(self._folder)
        shutil.copytree(snapshot.folder, self._folder, symlinks=True)
        self._give()

    def read_file(self, path: str, *, most: int = 1 << 20) -> bytes:
        """At most `most` bytes of a plain file of the workspace. Raises `OSError`."""
        fd = os.open(self._inside(path), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        with os.fdopen(fd, "rb") as file:
            self._allowed(os.fstat(fd), path)
            return file.read(most)

    def write_file(self, path: str, data: bytes) -> None:
        """Write a plain file of the workspace. Raises `OSError`."""
        target = self._inside(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            fd = os.open(target, os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except FileNotFoundError:
            fd = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
            if self._user is not None:
                for made in (target, *(p for p in target.parents if p.is_relative_to(self._folder.resolve()))):
                    os.chown(made, self._user, self._user)
        with os.fdopen(fd, "wb") as file:
            self._allowed(os.fstat(fd), path)
            file.truncate(0)
            file.write(data)

    def _inside(self, path: str) -> Path:
        target = (self._folder / path.removeprefix("/workspace/")).parent.resolve() / Path(path).name
        if not target.is_relative_to(self._folder.resolve()):
            raise FileNotFoundError(2, "No such file or directory", path)
        return target

    def close(self) -> None:
        """Remove the copies. Safe to repeat."""
        self._end()

    def __enter__(self) -> CopyBox:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _room(*, open_to_others: bool) -> tuple[Path, int]:
    """A folder of this process's own, and the lock on it that says so for as long as this process lives."""
    made = Path(tempfile.mkdtemp(prefix="espalier-new-"))
    lock = os.open(made, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    room = made.rename(made.with_name(made.name.replace("espalier-new-", PREFIX)))  # under this name it is swept
    if open_to_others:
        room.chmod(0o711)
    return room, lock


def _remove(room: Path, lock: int) -> None:
    shutil.rmtree(room, ignore_errors=True)
    os.close(lock)


def _sweep(folder: Path) -> None:
    """Remove what dead processes of this user have left."""
    for left in folder.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):
            if left.lstat().st_uid != os.getuid():
                continue
            lock = os.open(left, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(left, ignore_errors=True)
            finally:
                os.close(lock)


def _resident(process: psutil.Process) -> int:
    with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
        return int(process.memory_info().rss)
    return 0


def _descendants(pid: int) -> list[psutil.Process]:
    try:
        return list(psutil.Process(pid).children(recursive=True))
    except psutil.NoSuchProcess:
        return []


def _kill(process: subprocess.Popen[Any]) -> None:
    """End a launcher and all that it started; orphans are its children, so that they are found."""
    for _ in range(100):
        started = _descendants(process.pid)
        for child in started:
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                child.kill()
        if process.poll() is not None or not started:
            break
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, 9)
    process.wait(timeout=30)
