"""Opened workbooks, kept as engine snapshots so that a reset is a restore. One bounded cache a process.

An entry is a pure function of (engine, package), so sharing it between environments shows nothing of one to another.
"""

from __future__ import annotations

import threading
from collections import OrderedDict

from .engines.base import Engine
from .package import check_package
from .task import Case
from .workspace import Opened, used_rect

MAX_BYTES = 256 * 1024 * 1024
"""Bytes of snapshots and packages the shared cache keeps; the ones used longest ago go first."""


class BookCache:
    """Least recently used; `get` opens what is missing. Thread-safe."""

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self.max_bytes = max_bytes
        self.bytes = 0
        self._entries: OrderedDict[str, Opened] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, engine: Engine, case: Case) -> Opened:
        """The opened workbook of `case`. Raises `EngineError`, or `PackageError` for one that is not safe to open."""
        key = f"{engine.name} {engine.version} {case.digest}"
        with self._lock:
            found = self._entries.get(key)
            if found is not None:
                self._entries.move_to_end(key)
                return found
        made = _open(engine, case.package)
        with self._lock:
            if key not in self._entries:
                self._entries[key] = made
                self.bytes += _size(made)
            while self.bytes > self.max_bytes and len(self._entries) > 1:
                self.bytes -= _size(self._entries.popitem(last=False)[1])
        return made


def _size(opened: Opened) -> int:
    return len(opened.snapshot) + len(opened.package)


def _open(engine: Engine, package: bytes) -> Opened:
    checked = check_package(package)
    book = engine.open(checked.data)
    sheets = tuple((info.name, used_rect(book, info.name), info.state) for info in book.sheets())
    return Opened(checked.data, book.snapshot(), sheets, {}, checked.notes)


_SHARED = BookCache()


def shared_cache() -> BookCache:
    """The process's cache."""
    return _SHARED
