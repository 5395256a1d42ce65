"""The start of a box, outside it: new namespaces, the users inside them, and the first process there.

Run as a script (see `starting`); never imported by who uses a box. It ends when the box ends, and the box ends when it
does: the supervisor inside is the first process of its namespace, and the kernel takes all others, every mount and
every file with it.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import socket
import traceback
from pathlib import Path
from typing import Any

from . import cgroup, kernel
from .supervisor import GUEST, serve
from .wire import send


def main(text: str) -> int:
    """Start the box that the JSON `text` describes; returns the supervisor's exit status."""
    config = json.loads(text)
    owner = os.pidfd_open(os.getppid())
    control = socket.socket(fileno=int(config["control"]))
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with contextlib.suppress(OSError, ValueError):  # each branch is some descriptors; guests get fewer
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    try:
        cgroup.join(config["cgroup"], os.getpid())
        base = _enter(config)
        child = os.fork()
        if child == 0:
            kernel.prctl(kernel.PR_SET_PDEATHSIG, signal.SIGKILL)
            return _serve(config, control, owner, base)
    except Exception as error:
        _say(control, "not_isolated", error)
        return 1
    control.close()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) & 0xFF


def _serve(config: dict[str, Any], control: socket.socket, owner: int, base: int) -> int:
    try:
        serve(config, control, owner, base)
    except Exception as error:
        _say(control, "box_failed", error)
        return 1
    return 0


def _say(control: socket.socket, code: str, error: Exception) -> None:
    detail = str(error) if isinstance(error, OSError) else "".join(traceback.format_exception(error))[-2000:]
    send(control, {"error": code, "message": detail})


def _enter(config: dict[str, Any]) -> int:
    """Leave for new namespaces; a descriptor of the workspace as the box's lowest layer (-1: an empty one)."""
    user, group = os.getuid(), os.getgid()
    flags = kernel.NEW_USER | kernel.NEW_MOUNT | kernel.NEW_PID | kernel.NEW_IPC | kernel.NEW_UTS
    flags |= 0 if config["network"] else kernel.NEW_NET
    workspace = config["workspace"]
    if user != 0:
        kernel.unshare(flags)
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{GUEST} {user} 1")
        Path("/proc/self/gid_map").write_text(f"{GUEST} {group} 1")
        return os.open(workspace, os.O_PATH | os.O_DIRECTORY) if workspace else -1
    outside = _free_user()
    base = _shown_as(workspace, outside) if workspace else -1
    ready, mapped = os.pipe(), os.pipe()
    target = os.getpid()
    helper = os.fork()
    if helper == 0:  # stays outside, where it may write the maps
        os.read(ready[0], 1)
        for kind in ("uid_map", "gid_map"):
            Path(f"/proc/{target}/{kind}").write_text(f"0 0 1\n{GUEST} {outside} 1")
        os.write(mapped[1], b"1")
        os._exit(0)
    kernel.unshare(flags)
    os.write(ready[1], b"1")
    os.close(mapped[1])
    if os.read(mapped[0], 1) != b"1":
        raise OSError(1, "the user namespace could not be mapped")
    os.waitpid(helper, 0)
    for fd in (*ready, mapped[0]):
        os.close(fd)
    return base


def _shown_as(folder: str, outside: int) -> int:
    """A detached read-only mount of `folder` in which its owner is the user `outside`, so that guests own it."""
    owner = os.stat(folder)
    tree = kernel.clone_tree(folder)
    users = _user_namespace(f"{owner.st_uid} {outside} 1", f"{owner.st_gid} {outside} 1")
    kernel.read_only_owned_by(tree, users)
    os.close(users)
    return tree


def _user_namespace(uids: str, gids: str) -> int:
    """A descriptor of a user namespace with these maps."""
    made, done = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        kernel.unshare(kernel.NEW_USER)
        os.write(made[1], b"1")
        os.read(done[0], 1)
        os._exit(0)
    os.close(made[1])
    try:
        if os.read(made[0], 1) != b"1":
            raise OSError(1, "user namespaces are not allowed here")
        Path(f"/proc/{child}/uid_map").write_text(uids)
        Path(f"/proc/{child}/gid_map").write_text(gids)
        return os.open(f"/proc/{child}/ns/user", os.O_RDONLY)
    finally:
        for fd in (made[0], *done):
            os.close(fd)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def _free_user() -> int:
    """A user number that is likely nobody's, within what this user namespace can express: its process limit then
    counts only this box.
    """
    ranges = [line.split() for line in Path("/proc/self/uid_map").read_text().splitlines()]
    first, count = max(((int(r[0]), int(r[2])) for r in ranges), key=lambda r: r[1])
    if count < 4096:
        raise OSError(1, "there are no spare user numbers to run the code as")
    low = first + min(count // 2, 1_000_000)
    return low + os.getpid() % min(1_000_000, count - count // 2 - 1)
