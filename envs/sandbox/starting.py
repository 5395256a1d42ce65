"""The start of a box, seen from outside: its first process, what it may see, and its certain end."""

from __future__ import annotations

import _thread
import json
import os
import site
import socket
import subprocess
import sys
import sysconfig
import threading
import weakref
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from . import cgroup
from .terms import BoxError, Limits

END_SECONDS = 5.0
_BOOT = (
    "import sys,types;p=types.ModuleType('espalier_box');p.__path__=[sys.argv[1]];sys.modules['espalier_box']=p;"
    "from espalier_box.{module} import main;sys.exit(main({argument}))"
)
_NO_THREADS = {"JE_ARROW_MALLOC_CONF": "background_thread:false"}
"""Without it pyarrow, which pandas imports, starts a thread that no snapshot could carry."""


class Family:
    """What the branches of one box share: its process, its control group, snapshots to be dropped."""

    def __init__(self, process: subprocess.Popen[bytes], groups: list[str]) -> None:
        self.process, self.groups = process, groups
        self.handles: Counter[int] = Counter()
        self.dropped: deque[int] = deque()
        self.connections: set[socket.socket] = set()
        self._forgotten = weakref.finalize(self, _abandon, process, groups, self.connections)

    def end(self) -> None:
        """End the box, and wait until nothing of it is left. Safe to repeat."""
        if self._forgotten.detach():
            _close(self.connections)
            _end(self.process, self.groups)

    def with_dropped(self, message: Mapping[str, Any]) -> Mapping[str, Any]:
        """A request that also says which snapshots nobody has a handle to any more."""
        if not self.dropped:
            return message
        gone = [self.dropped.popleft() for _ in range(len(self.dropped))]
        return {**message, "unwanted": [number for number in gone if not self.handles[number]]}


def _abandon(process: subprocess.Popen[bytes], groups: list[str], connections: set[socket.socket]) -> None:
    """A box was collected without being closed: whoever happens to collect it does not wait, but at exit."""
    _close(connections)
    if threading.main_thread().is_alive():
        _thread.start_new_thread(_end, (process, groups))  # takes no lock that the collected thread may hold
    else:
        _end(process, groups)


def _close(connections: set[socket.socket]) -> None:
    for connection in list(connections):
        connection.close()


def _end(process: subprocess.Popen[bytes], groups: list[str]) -> None:
    """A box whose last connection is closed ends by itself; one that does not is killed."""
    try:
        process.wait(timeout=END_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    cgroup.remove(groups)


def start(
    workspace: str | os.PathLike[str] | None,
    limits: Limits,
    python: str | None,
    visible: Sequence[str],
    environment: Mapping[str, str] | None,
    network: bool,
) -> tuple[socket.socket, Family]:
    """A connection to a new box, whose first message will be "ready" or an error."""
    if sys.platform != "linux":
        raise BoxError("not_isolated", "a box needs Linux's namespaces and overlay file systems")
    folder = Path(workspace).resolve() if workspace is not None else None
    if folder is not None and not folder.is_dir():
        raise FileNotFoundError(f"the workspace {folder} is not a folder")
    ours, theirs = socket.socketpair()
    with theirs:
        process, groups = _launch(folder, limits, theirs, python, visible, environment, network)
    return ours, Family(process, groups)


def _launch(
    folder: Path | None,
    limits: Limits,
    control: socket.socket,
    python: str | None,
    visible: Sequence[str],
    environment: Mapping[str, str] | None,
    network: bool,
) -> tuple[subprocess.Popen[bytes], list[str]]:
    here = str(Path(__file__).parent)
    plain = limits.plain()
    groups = cgroup.make(plain)
    config = {
        "control": control.fileno(),
        "workspace": str(folder) if folder is not None else None,
        "limits": plain,
        "network": network,
        "cgroup": groups,
        "visible": [here, *(visible or _own_folders())],
        "command": [
            python or sys.executable, "-P", "-B", "-c", _BOOT.format(module="worker", argument="3"), here
        ],
        "environment": {
            "PATH": f"{Path(python or sys.executable).parent}:/usr/local/bin:/usr/bin:/bin", "HOME": "/tmp",
            "TMPDIR": "/tmp", "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1",
            "MKL_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", **_NO_THREADS,
            **(environment or {}),
        },
    }  # fmt: skip
    boot = _BOOT.format(module="launch", argument="sys.argv[2]")
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", boot, here, json.dumps(config)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=None if os.environ.get("ESPALIER_BOX_DEBUG") else subprocess.DEVNULL,
        pass_fds=(control.fileno(),),
        env={"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8"},
        start_new_session=True,
    )
    return process, groups


def _own_folders() -> list[str]:
    """Folders of this Python and its packages, as far as they are not the system's own."""
    found = [sys.prefix, sys.base_prefix, *site.getsitepackages(), str(Path(sys.executable).resolve().parent.parent)]
    found += [path for key, path in sysconfig.get_paths().items() if key in ("stdlib", "purelib", "platlib")]
    kept: list[str] = []
    for path in sorted(dict.fromkeys(found), key=len):
        if (
            path not in ("/usr", "/")
            and Path(path).is_dir()
            and not any(path.startswith(k + "/") for k in ("/usr", *kept))
        ):
            kept.append(path)
    return kept
