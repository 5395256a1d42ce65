"""LibreOffice, the optional referee: recalculates whole packages, faithfully and slowly, in processes of its own.

Always true: one process a profile and one document a process; macros never run, links are never updated, the user's own
profile is not touched; every document has a deadline and a memory bound, beyond which the whole process group is killed
and its profile thrown away; a profile serves at most `documents_per_profile` documents; no more than `processes` run at
once. Versions before 24.8 lack XLOOKUP, LET, FILTER and others and are refused.
"""

from __future__ import annotations

import os
import queue
import re
import shutil
import signal
import subprocess
import tempfile
import time
import weakref
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from uuid import uuid4

from .base import EngineError

MIN_VERSION = (24, 8)
_START_SECONDS = 60.0
_POLL_SECONDS = 0.02

# Recalculation on load "always" (0), macros never (3 is the highest security level), links never updated (1).
_SETTINGS = """<?xml version="1.0" encoding="UTF-8"?>
<oor:items xmlns:oor="http://openoffice.org/2001/registry">
<item oor:path="/org.openoffice.Office.Calc/Formula/Load">
<prop oor:name="OOXMLRecalcMode" oor:op="fuse"><value>0</value></prop></item>
<item oor:path="/org.openoffice.Office.Calc/Content/Update">
<prop oor:name="Link" oor:op="fuse"><value>1</value></prop></item>
<item oor:path="/org.openoffice.Office.Common/Security/Scripting">
<prop oor:name="MacroSecurityLevel" oor:op="fuse"><value>3</value></prop>
<prop oor:name="DisableMacrosExecution" oor:op="fuse"><value>true</value></prop>
<prop oor:name="DisableActiveContent" oor:op="fuse"><value>true</value></prop></item>
<item oor:path="/org.openoffice.Office.Common/Misc">
<prop oor:name="FirstRun" oor:op="fuse"><value>false</value></prop></item>
</oor:items>
"""


def find_libreoffice(binary: str | None = None) -> tuple[str, str]:
    """Path and version of LibreOffice, which is asked for it once a process. Raises `EngineError`, one sentence, when
    it is missing or older than 24.8.
    """
    path = shutil.which(binary) if binary else shutil.which("soffice") or shutil.which("libreoffice")
    if path is None:
        raise EngineError(f"LibreOffice is not installed ({binary or 'soffice'} was not found); install 24.8 or newer")
    match = re.search(r"(\d+)\.(\d+)(?:\.\d+)*", _said_version(path))
    if match is None:
        raise EngineError(f"{path} does not say its version; is it LibreOffice 24.8 or newer?")
    if (int(match[1]), int(match[2])) < MIN_VERSION:
        raise EngineError(f"LibreOffice {match[0]} is too old: it lacks XLOOKUP, LET and FILTER; install 24.8 or newer")
    return path, match[0]


@lru_cache(maxsize=8)
def _said_version(path: str) -> str:
    """What a program says of its version; empty where it cannot be started."""
    try:
        done = subprocess.run([path, "--version"], capture_output=True, timeout=_START_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.decode(errors="replace")


@dataclass
class _Seat:
    """A place in the pool: a profile folder, used by one process at a time."""

    folder: Path
    documents: int = 0
    process: subprocess.Popen[bytes] | None = None


@dataclass
class LibreOffice:
    """A pool of at most `processes` LibreOffice processes. Thread-safe. Use it as a context manager, or `close` it.

    Nothing is started, and no file is made, before the first workbook; what is left at the end of this process goes.
    `timeout` (seconds) bounds one document and the wait for a free seat each.
    """

    binary: str | None = None
    processes: int = 1
    timeout: float = 60.0
    documents_per_profile: int = 500
    max_rss_bytes: int = 1024**3
    _version: str = field(default="", init=False)
    _path: str = field(default="", init=False)
    _root: Path | None = field(default=None, init=False)
    _free: queue.Queue[_Seat] = field(init=False, repr=False)
    _seats: list[_Seat] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._path, self._version = find_libreoffice(self.binary)
        self._root = Path(tempfile.gettempdir()) / f"espalier-office-{uuid4().hex}"
        weakref.finalize(self, shutil.rmtree, self._root, ignore_errors=True)
        self._free = queue.Queue(self.processes)
        self._seats = [_Seat(self._root / f"profile{i}") for i in range(self.processes)]
        for seat in self._seats:
            self._free.put_nowait(seat)

    @property
    def name(self) -> str:
        """ "libreoffice"."""
        return "libreoffice"

    @property
    def version(self) -> str:
        """What the binary says of itself."""
        return self._version

    def recalculate(self, package: bytes) -> bytes:
        """The package with every cached value recalculated. Raises `EngineError`: too slow, too large, dead, busy."""
        if self._root is None:
            raise EngineError("the pool is closed")
        try:
            seat = self._free.get(timeout=self.timeout)
        except queue.Empty:
            raise EngineError(f"all {self.processes} LibreOffice processes are busy for {self.timeout:g} s") from None
        try:
            return self._convert(seat, package)
        finally:
            self._free.put(seat)

    def close(self) -> None:
        """Kill what runs and remove the profiles."""
        for seat in self._seats:
            _kill(seat)
        if self._root is not None:
            shutil.rmtree(self._root, ignore_errors=True)
            self._root = None

    def __enter__(self) -> LibreOffice:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _convert(self, seat: _Seat, package: bytes) -> bytes:
        assert self._root is not None
        self._root.mkdir(mode=0o700, exist_ok=True)
        self._prepare(seat)
        with tempfile.TemporaryDirectory(dir=self._root) as work:
            source, target = Path(work) / "book.xlsx", Path(work) / "out"
            source.write_bytes(package)
            command = [
                self._path, f"-env:UserInstallation={seat.folder.as_uri()}", "--headless", "--invisible", "--norestore",
                "--nologo", "--nodefault", "--nolockcheck", "--convert-to", "xlsx:Calc MS Excel 2007 XML",
                "--outdir", str(target), str(source),
            ]  # fmt: skip
            seat.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
                env={"HOME": str(seat.folder), "PATH": os.environ.get("PATH", ""), "LANG": "C.UTF-8", "TZ": "UTC"},
            )
            seat.documents += 1
            try:
                self._watch(seat)
            finally:
                _kill(seat)
            made = target / "book.xlsx"
            if not made.is_file():
                self._discard(seat)
                raise EngineError("LibreOffice ended without a result: it crashed, or cannot read the workbook")
            return made.read_bytes()

    def _watch(self, seat: _Seat) -> None:
        """Wait for the end of the process, within its time and memory."""
        process = seat.process
        deadline = time.monotonic() + self.timeout
        while process is not None and process.poll() is None:
            if time.monotonic() > deadline:
                self._discard(seat)
                raise EngineError(f"LibreOffice took more than {self.timeout:g} s for a workbook and was stopped")
            if _rss_bytes(process.pid) > self.max_rss_bytes:
                self._discard(seat)
                raise EngineError(f"LibreOffice needed more than {self.max_rss_bytes:,} bytes and was stopped")
            time.sleep(_POLL_SECONDS)

    def _prepare(self, seat: _Seat) -> None:
        if seat.documents >= self.documents_per_profile:
            self._discard(seat)
        settings = seat.folder / "user" / "registrymodifications.xcu"
        if not settings.exists():
            settings.parent.mkdir(parents=True, exist_ok=True)
            settings.write_text(_SETTINGS, encoding="utf-8")

    def _discard(self, seat: _Seat) -> None:
        """End the seat's process and start over with an empty profile (a killed one may be locked or broken)."""
        _kill(seat)
        shutil.rmtree(seat.folder, ignore_errors=True)
        seat.documents = 0


def _kill(seat: _Seat) -> None:
    """End the process and everything it started."""
    process, seat.process = seat.process, None
    if process is None:
        return
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    with suppress(subprocess.TimeoutExpired):
        process.wait(10)


def _rss_bytes(pid: int) -> int:
    """Resident memory of a process and its descendants."""
    import psutil

    total = 0
    with suppress(psutil.Error):
        parent = psutil.Process(pid)
        for process in [parent, *parent.children(recursive=True)]:
            with suppress(psutil.Error):
                total += process.memory_info().rss
    return total
