"""A process's shared memory mappings, as the kernel lists them.

Those through which a guest only reads a file of the read-only system are left out: a fork may share them.
"""

from __future__ import annotations

import ctypes
import os
import struct
from pathlib import Path

Mapping = tuple[int, int, int, int, int, str]
"""Start, end, protection, offset in the file, its inode and its name."""

_libc = ctypes.PyDLL(None, use_errno=True)


def shared(path: str) -> list[Mapping]:
    """Shared mappings in the `maps` file at `path`, by one query each where the kernel has that (6.11)."""
    with Path(path).open("rb") as listing:
        try:
            found = _queried(listing.fileno())
        except OSError:
            found = _listed(listing.read())
    return [m for m in found if m[2] & 2 or not m[5].startswith("/") or m[5].startswith(("/workspace/", "/tmp/"))]


def _queried(fd: int) -> list[Mapping]:
    found: list[Mapping] = []
    name = ctypes.create_string_buffer(4096)
    at, only_shared, next_one = 0, 0x08, 0x10
    while True:
        query = ctypes.create_string_buffer(
            struct.pack("QQQQQQQQIIIIQQ", 104, only_shared | next_one, at, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0)[:104], 104
        )
        struct.pack_into("I", query, 80, len(name))
        struct.pack_into("Q", query, 88, ctypes.addressof(name))
        if _libc.ioctl(fd, ctypes.c_ulong(0xC0686611), query) != 0:
            number = ctypes.get_errno()
            if number == 2:  # ENOENT: no further one
                return found
            raise OSError(number, os.strerror(number))
        start, end, flags, _page, offset, inode = struct.unpack_from("QQQQQQ", query, 24)
        path = os.fsdecode(name.value) if struct.unpack_from("I", query, 80)[0] else ""
        found.append((start, end, flags & 7, offset, inode, path))
        at = end


def _listed(text: bytes) -> list[Mapping]:
    found = []
    for line in text.splitlines():
        if line.split(b" ", 2)[1][3:4] == b"s":
            place, rights, offset, _device, inode, *name = line.split(None, 5)
            start, end = (int(part, 16) for part in place.split(b"-"))
            protection = sum(bit for mark, bit in ((b"r", 1), (b"w", 2), (b"x", 4)) if mark in rights)
            file = os.fsdecode(name[0]) if name else ""
            found.append((start, end, protection, int(offset, 16), int(inode), file))
    return found
