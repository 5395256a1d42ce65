"""The processes of a box as the supervisor sees them: whose child, in which branch, how large, how busy."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
from collections.abc import Container
from pathlib import Path
from typing import NamedTuple

_PAGE = os.sysconf("SC_PAGE_SIZE")
_TICKS = os.sysconf("SC_CLK_TCK")


def started_by(pid: int, known: Container[int]) -> list[int]:
    """Processes of a guest's branch beside itself: what it started, and what outlived its parent."""
    orphans = [child for child in children_of(1) if child not in known]
    if not orphans and not children_of(pid):
        return []
    return [other for other in in_namespace(namespace_of(pid), known) if other != pid]


def in_namespace(space: str, known: Container[int]) -> list[int]:
    """Processes in a mount namespace that are not known; none in none ("")."""
    return [pid for pid in others() if space and pid not in known and namespace_of(pid) == space]


def others() -> list[int]:
    """Numbers of all processes of the box but this one."""
    return [int(word) for word in os.listdir("/proc") if word.isdigit() and word != "1"]


def namespace_of(pid: int) -> str:
    """Which mount namespace a process is in, and so which branch it belongs to; "" for none."""
    try:
        return os.readlink(f"/proc/{pid}/ns/mnt")
    except OSError:
        return ""


def children_of(pid: int) -> list[int]:
    """Children of all its threads; guests and frozen copies are this process's own, as orphans are."""
    found: list[int] = []
    with contextlib.suppress(OSError):
        for task in os.listdir(f"/proc/{pid}/task"):
            found += [int(word) for word in Path(f"/proc/{pid}/task/{task}/children").read_text().split()]
    return found


class Weight(NamedTuple):
    """Bytes of a process that no file backs: all of them, those that it alone has, and those that it shares counted in
    proportion.
    """

    whole: int
    private: int
    share: int


def weight(pid: int) -> Weight:
    """What a process weighs; nothing when it is gone."""
    found = _rollup(pid)
    whole = found.get("Anonymous", 0)
    return Weight(whole, min(whole, found.get("Private_Dirty", 0)), found.get("Pss_Anon", 0))


def held_bytes(pid: int) -> int:
    """Bytes that this process holds, those that it shares in proportion; 0 when it is gone."""
    return _rollup(pid).get("Pss", 0)


def _rollup(pid: int) -> dict[str, int]:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
        return {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}
    except (OSError, IndexError, ValueError):
        return {}


def parent_of(pid: int) -> int:
    """Its parent's number, 0 when it is gone."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
    except (OSError, IndexError, ValueError):
        return 0


def kill(pid: int) -> None:
    """At once, and no matter whether it is there."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def cpu_of(pid: int) -> float:
    """Seconds of processor time that it and the children that it waited for have used; 0 when it is gone."""
    try:
        parts = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        return sum(int(part) for part in parts[11:15]) / _TICKS
    except (OSError, IndexError):
        return 0.0


def allow(pid: int, most: int | None) -> None:
    """Let it start processes while all of its user are fewer than `most`, or than its hard limit (None)."""
    with contextlib.suppress(ProcessLookupError):
        hard = resource.prlimit(pid, resource.RLIMIT_NPROC)[1]
        resource.prlimit(pid, resource.RLIMIT_NPROC, (hard if most is None else min(most, hard), hard))


def threads_of(pid: int) -> int:
    """How many threads it has; 0 when it is gone."""
    try:
        return len(os.listdir(f"/proc/{pid}/task"))
    except OSError:
        return 0


def lower(pid: int) -> bool:
    """Where the kernel groups processes by session (autogroup), have this one's session rank below others as it ranks
    within it; whether that is settled. The kernel takes few such wishes at once.
    """
    try:
        Path(f"/proc/{pid}/autogroup").write_text(str(os.getpriority(os.PRIO_PROCESS, pid)))
    except BlockingIOError:
        return False
    except OSError:  # there is no such grouping here, or no such process
        pass
    return True


def resident(pid: int) -> int:
    """Bytes that it has in memory, shared ones too: an upper bound of what it holds; 0 when it is gone."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE
    except (OSError, IndexError):
        return 0


def group_of(pid: int) -> int:
    """Its process group; -1 when it is gone."""
    try:
        return os.getpgid(pid)
    except OSError:
        return -1
