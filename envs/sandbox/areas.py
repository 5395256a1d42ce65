"""Fewer memory areas: what makes the fork of an interpreter with many libraries about twice as fast.

fork(2) copies a process's areas one by one and links each with those of all other copies. A library is mapped in five:
what is only read, before and behind its code; the code; what the loader fills in and then protects; its variables.
Areas that are neighbours in memory and in their file and have the same rights are one to the kernel. So what is only
read may be run as well, and what the loader had protected may be written again; code stays as it is. That protection
hardens a program against its input; in a box the input is a program. A library's variables and the heap next to them
become one area as well, by being copied.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from . import renew

_READ, _WRITE, _RUN = 1, 2, 4
_libc = ctypes.PyDLL(None)


class _Mapped(NamedTuple):
    start: int
    end: int
    rights: bytes
    offset: int
    inode: bytes


def join() -> None:
    """Join the areas of libraries that this process has loaded since. Where that cannot be only speed is lost."""
    with contextlib.suppress(Exception, KeyboardInterrupt):  # no memory, no descriptor, a call that is to end just now
        _join()


def _join() -> None:
    mapped = [_mapped(line) for line in Path("/proc/self/maps").read_bytes().splitlines()]
    changes = list(_continued(mapped))
    for start, end, rights in changes:
        _libc.mprotect(ctypes.c_void_p(start), ctypes.c_size_t(end - start), rights)
    if not changes or len(os.listdir("/proc/self/task")) > 1:
        return
    libraries = {area.inode for area in mapped if area.rights == b"r-xp"}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        renew.replace(list(_variables(renew.private(), libraries)))
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _continued(mapped: list[_Mapped]) -> Iterator[tuple[int, int, int]]:
    """Start and end of each area that is only read and continues one with more rights, and the other's rights."""
    for before, behind in pairwise(mapped):
        if before.inode != behind.inode or before.inode == b"0" or before.end != behind.start:
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


def _variables(areas: list[renew.Area], libraries: set[bytes]) -> Iterator[tuple[int, int, int]]:
    """Each library's variables with what lies next to them, where little is copied that was never used."""
    start = end = 0
    found = False
    for area in areas:
        writable = area.protection == _READ | _WRITE and area.inode in (b"0", *libraries)
        if not writable or 2 * area.own < area.size:
            continue
        if area.start != end:
            if found:
                yield start, end - start, _READ | _WRITE
            start, found = area.start, False
        end = area.start + area.size
        found = found or area.inode in libraries
    if found:
        yield start, end - start, _READ | _WRITE


def _mapped(line: bytes) -> _Mapped:
    place, rights, offset, _device, inode, *_name = line.split(None, 5)
    start, end = (int(part, 16) for part in place.split(b"-"))
    return _Mapped(start, end, rights, int(offset, 16), inode)
