"""Reading and writing a guest's files from the supervisor, as the guest's user and never outside its volumes.

A path is resolved by the kernel inside the volume (openat2, RESOLVE_IN_ROOT), so that no link and no race with a
running guest leads out of it.
"""

from __future__ import annotations

import base64
import ctypes
import errno
import os
import posixpath
import stat
from typing import Any

from . import kernel
from .layers import VOLUMES

MOST_ENTRIES = 10_000
_libc = ctypes.PyDLL(None, use_errno=True)


def serve(mounts: dict[str, int], message: dict[str, Any], guest: int) -> dict[str, Any]:
    """Answer read_file, write_file or list. Raises `OSError` as the guest would see it."""
    root, path = _place(mounts, str(message["path"]))
    _libc.setfsgid(guest)
    _libc.setfsuid(guest)
    try:
        if message["op"] == "read_file":
            return _read(root, path, int(message["most"]), int(message["offset"]))
        if message["op"] == "write_file":
            return _write(root, path, base64.b64decode(message["data"]), bool(message["more"]))
        return _list(root, path)
    finally:
        _libc.setfsuid(os.getuid())
        _libc.setfsgid(os.getgid())


def _place(mounts: dict[str, int], path: str) -> tuple[int, str]:
    full = posixpath.normpath(posixpath.join("/workspace", path))
    for name, place in VOLUMES.items():
        if full == place or full.startswith(place + "/"):
            return mounts[name], full[len(place) + 1 :] or "."
    raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))


def _read(root: int, path: str, most: int, offset: int) -> dict[str, Any]:
    fd = kernel.open_inside(root, path, os.O_RDONLY | os.O_NONBLOCK)
    with os.fdopen(fd, "rb") as file:
        found = os.fstat(fd)
        if stat.S_ISDIR(found.st_mode):
            raise OSError(errno.EISDIR, os.strerror(errno.EISDIR))
        if not stat.S_ISREG(found.st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        file.seek(offset)
        return {"data": base64.b64encode(file.read(most)).decode()}


def _write(root: int, path: str, data: bytes, more: bool) -> dict[str, Any]:
    parent = posixpath.dirname(path)
    made = ""
    for part in parent.split("/") if parent else ():
        made = posixpath.join(made, part)
        try:
            os.close(kernel.open_inside(root, made, os.O_PATH | os.O_DIRECTORY))
        except FileNotFoundError:
            above = kernel.open_inside(root, posixpath.dirname(made) or ".", os.O_PATH | os.O_DIRECTORY)
            try:
                os.mkdir(posixpath.basename(made), 0o755, dir_fd=above)
            finally:
                os.close(above)
    fd = kernel.open_inside(
        root, path, os.O_WRONLY | os.O_CREAT | os.O_NONBLOCK | (os.O_APPEND if more else os.O_TRUNC), 0o644
    )
    with os.fdopen(fd, "wb") as file:
        file.write(data)
    return {"written": len(data)}


def _list(root: int, path: str) -> dict[str, Any]:
    fd = kernel.open_inside(root, path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        found = []
        with os.scandir(fd) as entries:
            for entry in entries:
                kind = "link" if entry.is_symlink() else "folder" if entry.is_dir(follow_symlinks=False) else "file"
                size = entry.stat(follow_symlinks=False).st_size if kind == "file" else 0
                found.append([entry.name, kind, size])
                if len(found) >= MOST_ENTRIES:
                    break
        return {"entries": sorted(found)}
    finally:
        os.close(fd)
