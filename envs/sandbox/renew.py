"""Fresh pages for a frozen copy: what makes the fork of a long lineage as fast as that of a first one.

Each fork links the memory areas of parent and child, and a fork of a fork walks all links: after a hundred rollbacks
each deeper than the last, one takes ten times longer. Replacing every private area by a copy of itself cuts the links.
Python cannot do that to the heap it runs on, so a few machine instructions do it that touch neither heap nor stack
between copying an area and putting the copy in its place. Where they are not known nothing is done: only speed is lost.

The instructions are gcc -O2 -fPIC -fomit-frame-pointer -fcf-protection=none of

    struct range { unsigned long start, size, protection; };
    long refresh(struct range *r, long n) {
        for (long i = 0; i < n; i++) {
            long made = mmap(0, r[i].size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
            if ((unsigned long)made >= -4095UL) return i;
            memcpy((void *)made, (void *)r[i].start, r[i].size);                     // rep movsb
            if (r[i].protection != 3) mprotect(made, r[i].size, r[i].protection);
            long at = mremap(made, r[i].size, r[i].size, MREMAP_MAYMOVE | MREMAP_FIXED, r[i].start);
            if (at != r[i].start) return i;
        }
        return n;
    }

with each call made in place, as a system call.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
from collections.abc import Iterator
from pathlib import Path

_X86 = bytes.fromhex(
    "41574989f741564155415455534885f60f8eb20000004889fb4531e441be0900000041bd03000000eb5f660f1f440000488b33488b4b084889c7"
    "f3a4488b53104883fa037414488b73084531d24531c0b80a0000004889ef0f05488b53084c8b0341ba030000004531c9b8190000004889ef4889"
    "d60f05483903753a4983c4014883c3184d39e7743f488b730841ba220000004531c931ff49c7c0ffffffff4c89f04c89ea0f054889c5483d00f0"
    "ffff0f867affffff5b4c89e05d415c415d415e415fc30f1f40004d89fc5b5d4c89e0415c415d415e415fc3"
)
_CODE = {"x86_64": _X86}
_LEFT_ALONE = {b"gd", b"lo", b"io", b"pf", b"ht", b"sh", b"wf", b"dc", b"sl"}
"""Areas that grow, are locked, belong to a device, are huge, shared, not inherited or sealed."""
_STRIDE = 1 << 20
"""Bytes of an area that are copied or left alone together: a BLAS reserves a gigabyte and uses little of it."""


def refresh() -> int:
    """Replace what is used of this process's private areas by copies; in how many parts. Needs one thread."""
    code = _CODE.get(os.uname().machine)
    if code is None:
        return 0
    page = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    page.write(code)
    address = ctypes.addressof(ctypes.c_char.from_buffer(page))
    call = ctypes.PYFUNCTYPE(ctypes.c_long, ctypes.c_void_p, ctypes.c_long)(address)
    text = Path("/proc/self/smaps").read_bytes()
    with Path("/proc/self/pagemap").open("rb", buffering=0) as pages:
        areas = [part for area in _private(text) for part in _used(pages.fileno(), *area)]
    listed = ctypes.create_string_buffer(b"".join(struct.pack("QQQ", *area) for area in areas))
    return int(call(ctypes.addressof(listed), len(areas)))


def _used(pages: int, start: int, size: int, protection: int) -> Iterator[tuple[int, int, int]]:
    """The parts of an area that have pages (in memory or swapped out), as the kernel's `pagemap` says."""
    marks = os.pread(pages, size // mmap.PAGESIZE * 8, start // mmap.PAGESIZE * 8)[7::8]  # the top byte of each entry
    at, step = 0, _STRIDE // mmap.PAGESIZE
    while at < len(marks):
        end = at
        while end < len(marks) and max(marks[end : end + step]) >= 0x40:
            end = min(end + step, len(marks))
        if end > at:
            yield start + at * mmap.PAGESIZE, (end - at) * mmap.PAGESIZE, protection
        at = end + step if end < len(marks) else end


def _private(smaps: bytes) -> list[tuple[int, int, int]]:
    """Areas with pages of their own: (start, size, protection)."""
    found: list[tuple[int, int, int]] = []
    area: tuple[int, int, int] | None = None
    own = False
    for line in smaps.splitlines():
        first = line.split(None, 1)[0]
        if not first.endswith(b":"):
            place, rights, *_ = line.split(None, 2)
            start, end = (int(part, 16) for part in place.split(b"-"))
            usable = (
                rights[:1] == b"r" and rights[2:4] == b"-p" and not line.rstrip().endswith(b"]")
            ) or line.endswith(b"[heap]")
            area = (start, end - start, 1 | (2 if rights[1:2] == b"w" else 0)) if usable else None
            own = False
        elif first == b"Anonymous:":
            own = int(line.split()[1]) > 0
        elif first == b"VmFlags:" and area is not None and own and not _LEFT_ALONE & set(line.split()[1:]):
            found.append(area)
    return found
