"""CopyBox: where no overlay and no namespace is to be had (a default container, macOS): a copied folder, no isolation.

What is lost against `Box`, and never pretended: the code runs as this user, sees what this user sees and has its
network; a snapshot and a rollback copy the whole workspace; no interpreter stays between calls; /tmp is the machine's
own. What holds: the user's folder is never written to, calls are bounded in time, memory, processes and output, and
everything that a call started is ended with it.
"""

from __future__ import annotations

import contextlib
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


@dataclass(frozen=True, eq=False)
class CopySnapshot:
    """A full copy of a workspace."""

    folder: Path


class CopyBox:
    """A box without isolation; see the module for what it is not. Raises `BoxError` for root, whom no limit holds."""

    def __init__(self, workspace: str | os.PathLike[str] | None = None, limits: Limits | None = None) -> None:
        if os.getuid() == 0:
            raise BoxError("not_isolated", "without isolation the code would run as root, for whom no limit holds")
        self.limits = limits or Limits()
        self._plain = self.limits.plain()
        self._room = Path(tempfile.mkdtemp(prefix="espalier-code-"))
        self._end = weakref.finalize(self, shutil.rmtree, self._room, True)
        self._folder = self._room / "workspace"
        if workspace is None:
            self._folder.mkdir()
        else:
            shutil.copytree(workspace, self._folder, symlinks=True)

    def python(self, code: str, *, seconds: float | None = None, show: bool = False) -> Output:
        """Run Python in a process of its own; it shows what it prints, whatever `show` says."""
        return self._run([sys.executable, "-B", "-"], code, seconds)

    def shell(self, command: str, *, seconds: float | None = None) -> Output:
        """Run a shell command in the workspace."""
        return self._run(["/bin/sh", "-c", command], "", seconds)

    def _run(self, command: list[str], text: str, seconds: float | None) -> Output:
        wait = self.limits.seconds if seconds is None else seconds
        limits = {"memory": 4 * self._plain["memory"], "cpu": int(self.limits.cpu_seconds) + 1,
                  "pids": self.limits.pids, "file": self._plain["files"]}  # fmt: skip
        launcher = [sys.executable, "-I", "-S", str(Path(__file__).with_name("bare.py")), json.dumps([limits, command])]
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
        """Copy the workspace."""
        folder = Path(tempfile.mkdtemp(prefix="kept-", dir=self._room))
        shutil.copytree(self._folder, folder, symlinks=True, dirs_exist_ok=True)
        return CopySnapshot(folder)

    def rollback(self, snapshot: CopySnapshot) -> None:
        """Copy a snapshot back. Raises `BoxError` ("foreign_snapshot")."""
        if snapshot.folder.parent != self._room:
            raise BoxError("foreign_snapshot", "this snapshot was made by another box")
        shutil.rmtree(self._folder)
        shutil.copytree(snapshot.folder, self._folder, symlinks=True)

    def read_file(self, path: str, *, most: int = 1 << 20) -> bytes:
        """At most `most` bytes of a plain file of the workspace. Raises `OSError`."""
        fd = os.open(self._inside(path), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        with os.fdopen(fd, "rb") as file:
            return file.read(most)

    def write_file(self, path: str, data: bytes) -> None:
        """Write a file of the workspace. Raises `OSError`."""
        target = self._inside(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)

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
