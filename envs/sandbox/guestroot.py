"""What a guest sees: a read-only root of the system's own libraries, /proc of its box, a few devices, and its volumes.

Runs in the supervisor, once a box. Nothing of the host's files is visible beyond the folders named here: no home, no
/etc but what the C library needs, no socket.
"""

from __future__ import annotations

import os
from pathlib import Path

from . import kernel

SYSTEM = (
    "/usr", "/lib", "/lib64", "/lib32", "/bin", "/sbin", "/etc/ld.so.cache", "/etc/ld.so.conf", "/etc/ld.so.conf.d",
    "/etc/alternatives", "/etc/localtime", "/etc/mime.types", "/etc/ssl/certs", "/etc/ssl/openssl.cnf", "/nix/store",
)  # fmt: skip
NETWORK = ("/etc/resolv.conf", "/etc/hosts", "/etc/nsswitch.conf")
DEVICES = ("null", "zero", "full", "random", "urandom")


def build(
    room: Path, workspace: int, prefixes: tuple[str, ...], network: bool, size: str, guest: int
) -> tuple[tuple[int, str], ...]:
    """Mount a memory-backed file system over `room` and build in it `root` (what guests see) and `layers/base`.

    `workspace`: descriptor of the user's folder (-1: an empty one). `size`: options of the memory-backed file system
    that holds all layers. Gives the folders that a volume hides from guests, and that are to be shown on top of it: a
    descriptor and the place of each. Raises `OSError`.
    """
    for path in prefixes:
        if f"{path}/".startswith("/workspace/"):
            raise OSError(22, f"{path} must be visible, but in a box /workspace is the agent's: use a Python elsewhere")
    wanted = dict.fromkeys((*SYSTEM, *(NETWORK if network else ()), *_outermost(prefixes)))
    sources = {path: _opened(path) for path in (*wanted, *(f"/dev/{name}" for name in DEVICES))}
    kernel.mount("none", "/", None, kernel.RECURSIVE | kernel.PRIVATE)
    kernel.mount("espalier", str(room), "tmpfs", kernel.NO_SUID | kernel.NO_DEV, f"mode=711,{size}")
    root, base = room / "root", room / "layers" / "base"
    root.mkdir()
    kernel.mount("none", str(root), "tmpfs", kernel.NO_SUID | kernel.NO_DEV, "size=1m,mode=755")
    for path, fd in sources.items():
        if fd >= 0:
            _bind(path, fd, root, writable=path.startswith("/dev/"))
    (root / "proc").mkdir()
    for name in ("workspace", "tmp"):
        (root / name).mkdir(exist_ok=True)
        (base / name).mkdir(parents=True)
    _names(root, guest)
    shared = base / "tmp" / "shm"
    shared.mkdir()
    for folder in (base / "tmp", shared):
        folder.chmod(0o1777)
    kernel.mount("proc", str(root / "proc"), "proc", kernel.NO_SUID | kernel.NO_DEV | kernel.NO_EXEC, "hidepid=4")
    if workspace >= 0:
        _attach_workspace(workspace, base / "workspace")
    else:
        os.chown(base / "workspace", guest, guest)
    hidden = [path for path, fd in sources.items() if fd >= 0 and path.startswith("/tmp/")]
    for path in hidden:
        (base / path[1:]).mkdir(parents=True, exist_ok=True)
    return tuple((os.open(root / path[1:], os.O_PATH | os.O_CLOEXEC), path) for path in hidden)


def _outermost(paths: tuple[str, ...]) -> list[str]:
    """Those that lie in none of the others."""
    kept: list[str] = []
    for path in sorted(paths, key=len):
        if not any(f"{path}/".startswith(f"{other}/") for other in kept):
            kept.append(path)
    return kept


def _attach_workspace(fd: int, target: Path) -> None:
    try:
        kernel.attach(fd, str(target))
    except OSError:  # an ordinary folder's descriptor, not a detached mount
        kernel.mount(f"/proc/self/fd/{fd}", str(target), None, kernel.BIND)
        _make_read_only(target)
    os.close(fd)


def _opened(path: str) -> int:
    """A descriptor of `path` itself (a link is not followed); -1 where there is none."""
    try:
        return os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return -1


def _bind(path: str, fd: int, root: Path, writable: bool) -> None:
    target = root / path[1:]
    target.parent.mkdir(parents=True, exist_ok=True)
    here = f"/proc/self/fd/{fd}"
    link = _link_of(fd)
    if link is not None:
        target.symlink_to(link)
        os.close(fd)
        return
    if target.exists():
        os.close(fd)
        return
    if os.path.isdir(here):
        target.mkdir()
    else:
        target.touch()
    kernel.mount(here, str(target), None, kernel.BIND | kernel.RECURSIVE)
    os.close(fd)
    if not writable:
        _make_read_only(target)


def _link_of(fd: int) -> str | None:
    try:
        return os.readlink("", dir_fd=fd)
    except OSError:
        return None


def _make_read_only(path: Path) -> None:
    flags, kept = os.statvfs(path).f_flag, 0
    for shown, flag in ((os.ST_NODEV, kernel.NO_DEV), (os.ST_NOEXEC, kernel.NO_EXEC), (os.ST_NOATIME, 0x400),
                        (os.ST_NODIRATIME, 0x800), (os.ST_RELATIME, 0x200000)):  # fmt: skip
        kept |= flag if flags & shown else 0  # a remount in a user namespace must repeat what the mount below has
    again = kernel.REMOUNT | kernel.BIND | kernel.READ_ONLY | kernel.NO_SUID
    kernel.mount("none", str(path), None, again | kept)


def _names(root: Path, guest: int) -> None:
    """The few files that programs ask for names."""
    etc = root / "etc"
    etc.mkdir(exist_ok=True)
    (etc / "passwd").write_text(f"root:x:0:0::/:/bin/sh\nguest:x:{guest}:{guest}::/tmp:/bin/sh\n")
    (etc / "group").write_text(f"root:x:0:\nguest:x:{guest}:\n")
    dev = root / "dev"
    dev.mkdir(exist_ok=True)
    (dev / "shm").symlink_to("/tmp/shm")
    for name, target in (("fd", "/proc/self/fd"), ("stdin", "fd/0"), ("stdout", "fd/1"), ("stderr", "fd/2")):
        (dev / name).symlink_to(target)
    for place in ("var/tmp", "run"):
        (root / place).parent.mkdir(exist_ok=True)
        (root / place).symlink_to("/tmp")


def enter(room: Path, guest: int) -> None:
    """In a new guest process: leave the host's files behind and stop being anybody."""
    kernel.unshare(kernel.NEW_MOUNT)
    kernel.mount("none", "/", None, kernel.RECURSIVE | kernel.PRIVATE)
    root = str(room / "root")
    kernel.mount(root, root, None, kernel.BIND | kernel.RECURSIVE)
    os.chdir(root)
    kernel.pivot_root(".", ".")  # the old root lies over the new one now
    kernel.unmount(".")
    os.chdir("/")
    kernel.mount("none", "/", None, kernel.REMOUNT | kernel.BIND | kernel.READ_ONLY | kernel.NO_SUID | kernel.NO_DEV)
    if os.getuid() != guest:
        kernel.prctl(8, 1)  # PR_SET_KEEPCAPS: the one capability that is kept is chosen below
        os.setgroups([])
        os.setresgid(guest, guest, guest)
        os.setresuid(guest, guest, guest)
    kernel.keep_only_mounting()
    kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1)
    os.umask(0o022)
