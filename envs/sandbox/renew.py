"""Fresh pages for a frozen copy: what makes the fork of a long lineage as fast as that of a first one.

Each fork links the memory areas of parent and child, and a fork of a fork walks all links: after a hundred rollbacks
each deeper than the last, one takes ten times longer. Replacing every private area by a copy of itself cuts the links.
Python cannot do that to the heap it runs on, so a few machine instructions do it that touch neither heap nor stack
between copying an area and putting the copy in its place. Where they are not known nothing is done: only speed is lost.

The instructions are gcc -O2 -fPIC -fomit-frame-pointer -fcf-protection=none -fno-stack-protector of

    struct range { unsigned long start, size, protection; };
    long replace(struct range *r, long n) {
        for (long i = 0; i < n; i++) {
            long room = mmap(0, r[i].size + 8192, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0), made = room + 4096;
            if ((unsigned long)room >= -4095UL) return i;
            if (mprotect(made, r[i].size, PROT_READ | PROT_WRITE) != 0) return i;
            memcpy((void *)made, (void *)r[i].start, r[i].size);                     // rep movsb
            if (r[i].protection != 3) mprotect(made, r[i].size, r[i].protection);
            long at = mremap(made, r[i].size, r[i].size, MREMAP_MAYMOVE | MREMAP_FIXED, r[i].start);
            if (at != r[i].start) return i;
            munmap(room, 4096);
            munmap(made + r[i].size, 4096);
        }
        return n;
    }

with each call made in place, as a system call. The pages before and behind a copy keep the kernel from noting its
pages together with a neighbour's: then each fork, and whoever looks for the users of a page, would go through both.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

_X86 = bytes.fromhex(
    "41574989f041564155415455534885f60f8e0f01000048897424f84889fb4531ff41be0b00000041bd00100000e9a0000000660f1f440000"
    "488b73084531d24531c0ba03000000488da800100000b80a0000004889ef0f054885c00f85a7000000488b33488b4b08f3a4488b53104883"
    "fa03740e488b7308b80a0000004889ef0f05488b53084c8b0341ba030000004531c9b8190000004889ef4889d60f0548390375644531d245"
    "31c031d24c89f04c89e74c89ee0f05488b7b084c89f04801ef0f054983c7014883c3184c397c24f8744e488b430831d241ba220000004531"
    "c949c7c0ffffffff4889d7488db000200000b8090000000f054989c4483d00f0ffff0f8630ffffff5b4c89f85d415c415d415e415fc3662e"
    "0f1f8400000000004c8b4424f84d89c75b5d4c89f8415c415d415e415fc3"
)
_CODE = {"x86_64": _X86}
_LEFT_ALONE = {b"gd", b"lo", b"io", b"pf", b"ht", b"sh", b"wf", b"dc", b"sl"}
"""Areas that grow, are locked, belong to a device, are huge, shared, not inherited or sealed."""
_STRIDE = 1 << 20
"""Bytes of an area that are copied or left alone together: a BLAS reserves a gigabyte and uses little of it."""


Part = tuple[int, int, int]
"""Start, size and protection."""


def refresh() -> int:
    """Replace what is used of this process's private areas by copies; in how many parts. Needs one thread."""
    replace = replacer()
    if replace is None:
        return 0
    text = Path("/proc/self/smaps").read_bytes()
    with Path("/proc/self/pagemap").open("rb", buffering=0) as pages:
        return replace([part for area in _private(text) for part in _used(pages.fileno(), *area)])


def replacer() -> Callable[[list[Part]], int] | None:
    """What puts a copy in the place of each part, one area whatever it was before, and says of how many; None where
    there is none for this processor. It needs one thread, parts that are there until the end, and no signal's handler
    meanwhile. It is to be made before parts are listed: it lies in an area of its own.
    """
    code = _CODE.get(os.uname().machine)
    if code is None:
        return None
    page = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    page.write(code)
    address = ctypes.addressof(ctypes.c_char.from_buffer(page))
    call = ctypes.PYFUNCTYPE(ctypes.c_long, ctypes.c_void_p, ctypes.c_long)(address)

    def replace(parts: list[Part]) -> int:
        listed = ctypes.create_string_buffer(b"".join(struct.pack("QQQ", *part) for part in parts))
        done = int(call(ctypes.addressof(listed), len(parts)))
        page.flush()  # it is mapped until here
        return done

    return replace


def _used(pages: int, start: int, size: int, protection: int) -> Iterator[Part]:
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


def _private(smaps: bytes) -> list[Part]:
    """Areas with pages of their own."""
    found: list[Part] = []
    area: Part | None = None
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
