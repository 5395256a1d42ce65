"""Memory that this process keeps for later: torch's on a card, the C library's on the CPU.

glibc fetches every tensor of 32 MB and more from the kernel anew, page by page, and hands it back when it is freed,
which can cost more than the operation on it. A trainer on a CPU keeps such memory instead, up to a bound.
"""

from __future__ import annotations

import ctypes
import sys
from functools import cache
from pathlib import Path

import psutil
import torch

KEPT_SHARE = 0.5
"""Most of the memory this process may have that it keeps between two micro-batches."""

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Numbers of mallopt's parameters, from glibc's malloc.h."""

CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def release_cached_memory() -> None:
    """Hand back the card's memory that torch keeps for later, so that another process can have it."""
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


@cache
def keep_freed_memory() -> bool:
    """From now on the C library keeps what this process frees, until `hand_back` finds that it is too much; False where
    it is not glibc and stays as it is (mallopt(3)).
    """
    if sys.platform != "linux":
        return False
    glibc = ctypes.CDLL(None)
    if not hasattr(glibc, "mallopt") or not hasattr(glibc, "malloc_trim"):
        return False
    return bool(glibc.mallopt(M_MMAP_MAX, 0) and glibc.mallopt(M_TRIM_THRESHOLD, -1))


def hand_back(share: float = KEPT_SHARE) -> None:
    """Let go of all that is kept where this process holds more than `share` of the memory it may have. For a process
    that keeps freed memory (see above), whenever little is in use.
    """
    if psutil.Process().memory_info().rss > share * memory_limit():
        ctypes.CDLL(None).malloc_trim(0)


@cache
def memory_limit() -> float:
    """Bytes that this process may have: the machine's, or its control group's where that is less."""
    limits = [psutil.virtual_memory().total]
    for path in CGROUP_LIMITS:
        text = Path(path).read_text(encoding="ascii").strip() if Path(path).is_file() else "max"
        limits += [int(text)] if text.isdigit() else []
    return float(min(limits))
