"""A control group for a box, where this user may make one: memory and processes of all its guests together.

Version 1 (one folder a controller) and version 2 (one folder). Always true: a group is made where no limit that holds
for this process can be left. Without one the limits of each process hold, and the supervisor adds up what a call uses,
and what it leaves running.
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
    memory = limits["memory"] + limits["snapshot_memory"] + limits["files"]
    pids = limits["pids"] + limits["snapshots"] + limits["spares"] + 8
    if (ROOT / "cgroup.controllers").exists():
        values = {"memory.max": memory, "pids.max": pids}
        return next(([made] for parent in _parents() if (made := _group(parent, values))), [])
    wanted = {"memory": {"memory.limit_in_bytes": memory}, "pids": {"pids.max": pids}}
    return [made for kind, values in wanted.items() if (made := _group(_own(kind), values))]


def _group(parent: Path, values: dict[str, int]) -> str:
    """A new group below `parent`; "" where there can be none."""
    sweep(parent)
    folder = parent / f"{PREFIX}{os.getpid()}-{os.urandom(4).hex()}"
    try:
        folder.mkdir()
        for name, value in values.items():
            (folder / name).write_text(str(value))
    except OSError:
        with contextlib.suppress(OSError):
            folder.rmdir()
        return ""
    return str(folder)


def _own(kind: str) -> Path:
    """This process's group of one controller (""; version 2), as far as it is in sight."""
    lines = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    path = next((path for _, kinds, path in lines if kind in kinds.split(",")), "/")
    found = ROOT / kind / path.lstrip("/")
    return found if found.is_dir() else ROOT / kind


def _parents() -> list[Path]:
    """Where version 2 may take a group. It gives controllers only to children of a group that has no processes: of the
    one above, say, if that was handed to this user, and the own one limits nothing.
    """
    own = _own("")
    places = [own]
    if own != ROOT and all(_says(own / name) in ("max", "") for name in ("memory.max", "memory.high", "pids.max")):
        places.append(own.parent)
    for place in places:
        with contextlib.suppress(OSError):
            (place / "cgroup.subtree_control").write_text("+memory +pids")
    return [p for p in places if {"memory", "pids"} <= set(_says(p / "cgroup.subtree_control").split())]


def _says(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError:
        return ""


def join(folders: list[str], pid: int) -> None:
    """Put a process, and all it will start, into the group, where this user may move it there."""
    for folder in folders:
        with contextlib.suppress(PermissionError):
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
