"""A control group for a box, where this user may make one: memory and processes of all its guests together.

Version 1 (one folder a controller) and version 2 (one folder). Without one the limits of each process hold, and the
supervisor adds up what a running call uses.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

ROOT = Path("/sys/fs/cgroup")
PREFIX = "espalier-box-"


def make(limits: dict[str, Any]) -> list[str]:
    """Folders of a fresh group with these limits, none where none can be made. Leftovers of dead boxes go first."""
    folders: list[str] = []
    for parent, values in _wanted(limits):
        sweep(parent)
        folder = parent / f"{PREFIX}{os.getpid()}-{os.urandom(4).hex()}"
        try:
            folder.mkdir()
            for name, value in values.items():
                (folder / name).write_text(str(value))
            folders.append(str(folder))
        except OSError:
            with contextlib.suppress(OSError):
                folder.rmdir()
    return folders


def _wanted(limits: dict[str, Any]) -> list[tuple[Path, dict[str, int]]]:
    memory = limits["memory"] + limits["snapshot_memory"] + limits["files"]
    pids = limits["pids"] + limits["snapshots"] + limits["spares"] + 8
    if (ROOT / "cgroup.controllers").exists():
        own = Path("/proc/self/cgroup").read_text().strip().rpartition("::")[2]
        return [(ROOT / own.lstrip("/"), {"memory.max": memory, "pids.max": pids})]
    return [(ROOT / "memory", {"memory.limit_in_bytes": memory}), (ROOT / "pids", {"pids.max": pids})]


def join(folders: list[str], pid: int) -> None:
    """Put a process, and all it will start, into the group."""
    for folder in folders:
        (Path(folder) / "cgroup.procs").write_text(str(pid))


def remove(folders: list[str]) -> None:
    """Remove an empty group; one that is not empty yet is left to the next box's `sweep`."""
    for folder in folders:
        with contextlib.suppress(OSError):
            Path(folder).rmdir()


def sweep(parent: Path) -> None:
    """Remove groups of boxes whose orchestrator is dead."""
    for left in parent.glob(f"{PREFIX}*-*"):
        owner = left.name[len(PREFIX) :].split("-")[0]
        if not Path(f"/proc/{owner}").exists():
            with contextlib.suppress(OSError):
                left.rmdir()
