"""Fewer memory areas: what makes the fork of an interpreter with many libraries a third faster.

fork(2) copies a process's areas one by one and links each with those of all other copies. A library is mapped in five:
what is only read, before and behind its code; the code; what the loader fills in and then protects; its variables.
Areas that are neighbours in memory and in their file and have the same rights are one to the kernel. So what is only
read may be run as well, and what the loader had protected may be written again; code stays as it is. That protection
hardens a program against its input; in a box the input is a program. A library's variables, those that its file has
values for and those that it has none for, become one area by being copied: nobody else unmaps them, and nothing runs
meanwhile that could write to them.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import signal
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from . import renew

MOST_VARIABLES = 1 << 20
"""Bytes of a library's variables that are copied at most."""

_READ, _WRITE, _RUN = 1, 2, 4
_LOADED = 1
_libc = ctypes.PyDLL(None)


class _Area(NamedTuple):
    start: int
    end: int
    rights: bytes
    offset: int
    file: tuple[bytes, bytes]


_NO_FILE = (b"00:00", b"0")


def join() -> None:
    """Join the areas of libraries that this process has loaded since. Where that cannot be only speed is lost."""
    with contextlib.suppress(Exception, KeyboardInterrupt):  # no memory, no descriptor, a call that is to end just now
        _join()


def _join() -> None:
    joined = [
        _libc.mprotect(ctypes.c_void_p(start), ctypes.c_size_t(end - start), rights) == 0
        for start, end, rights in _continued(_areas())
    ]
    replace = renew.replacer() if any(joined) else None
    if replace is None:
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    try:
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        if len(os.listdir("/proc/self/task")) == 1:
            replace([(start, end - start, _READ | _WRITE) for start, end in _separate(_areas(), _variables())])
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _areas() -> list[_Area]:
    found = []
    for line in Path("/proc/self/maps").read_bytes().splitlines():
        place, rights, offset, device, inode, *_name = line.split(None, 5)
        start, end = (int(part, 16) for part in place.split(b"-"))
        found.append(_Area(start, end, rights, int(offset, 16), (device, inode)))
    return found


def _continued(areas: list[_Area]) -> Iterator[tuple[int, int, int]]:
    """Start and end of each area that is only read and continues one with more rights, and the other's rights."""
    for before, behind in pairwise(areas):
        if before.file != behind.file or before.file == _NO_FILE or before.end != behind.start:
            continue
        if before.offset + before.end - before.start != behind.offset:
            continue
        match before.rights, behind.rights:
            case b"r--p", b"rw-p":
                yield before.start, before.end, _READ | _WRITE
            case b"r--p", b"r-xp":
                yield before.start, before.end, _READ | _RUN
            case b"r-xp", b"r--p":
                yield behind.start, behind.end, _READ | _RUN


class _Header(ctypes.Structure):
    """Elf64_Phdr."""

    _fields_ = [
        ("type", ctypes.c_uint32), ("flags", ctypes.c_uint32), ("offset", ctypes.c_uint64), ("start", ctypes.c_uint64),
        ("physical", ctypes.c_uint64), ("file", ctypes.c_uint64), ("size", ctypes.c_uint64), ("align", ctypes.c_uint64),
    ]  # fmt: skip


class _Loaded(ctypes.Structure):
    """The first fields of dl_phdr_info."""

    _fields_ = [
        ("base", ctypes.c_uint64),
        ("name", ctypes.c_char_p),
        ("headers", ctypes.POINTER(_Header)),
        ("count", ctypes.c_uint16),
    ]


def _variables() -> list[tuple[int, int]]:
    """Start and end of what each library may write to, whole pages, as its file's headers tell."""
    found = []

    def note(loaded: ctypes._Pointer[_Loaded], _size: int, _data: int | None) -> int:
        library = loaded.contents
        for header in library.headers[: library.count]:
            if header.type == _LOADED and header.flags & _WRITE:
                start = library.base + header.start
                end = start + header.size
                found.append((start // mmap.PAGESIZE * mmap.PAGESIZE, -(-end // mmap.PAGESIZE) * mmap.PAGESIZE))
        return 0

    kind = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.POINTER(_Loaded), ctypes.c_size_t, ctypes.c_void_p)
    _libc.dl_iterate_phdr(kind(note), None)
    return found


def _separate(areas: list[_Area], variables: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Those that a file still backs in part, that are not too large, and that may be written to throughout."""
    for start, end in variables:
        inside = [area for area in areas if area.start < end and start < area.end]
        whole = sum(min(area.end, end) - max(area.start, start) for area in inside) == end - start
        backed = any(area.file != _NO_FILE for area in inside)
        if whole and backed and end - start <= MOST_VARIABLES and all(area.rights == b"rw-p" for area in inside):
            yield start, end
