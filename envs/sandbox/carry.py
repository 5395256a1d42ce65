"""What fork alone does not carry over: open files, pipes, shared memory, timers, finished children.

Runs in the guest. At a snapshot `inspect` looks at the process before it forks and says what stands in the way; the
frozen copy calls `settle`, and whoever goes on (the worker after a snapshot, a fork of the frozen copy after a
rollback) calls `adopt` once its own layers are attached. Always true: two processes of one family never share a file
offset, a pipe or a page of shared memory, and a frozen copy holds no descriptor through which its layer could be
written.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import gc
import os
import resource
import select
import signal
import stat
import struct
import subprocess
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

from . import kernel, maps

_TIMERS = (signal.ITIMER_REAL, signal.ITIMER_VIRTUAL, signal.ITIMER_PROF)
_MAP_SHARED, _MAP_SHARED_ANON, _MAP_FIXED = 0x01, 0x21, 0x10
_ACCESS = os.O_RDONLY | os.O_WRONLY | os.O_RDWR
_KEPT_FLAGS = _ACCESS | os.O_APPEND | os.O_NONBLOCK | os.O_DIRECTORY
MOST_UNLINKED = 64 << 20
"""Bytes of the largest unlinked file that a snapshot takes along in memory."""
MOST_NAMES = 100_000
"""Files among which another name of one is looked for."""

_libc = ctypes.PyDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
_libc.mremap.restype = ctypes.c_void_p
_libc.mremap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p)


@dataclass(frozen=True)
class OpenFile:
    """One descriptor of a file or folder. `contents`: of a file that was unlinked, which no name leads to any more.
    `file`: its device and number. `twin`: a lower descriptor of the same opening (dup), whose offset is the same.
    """

    fd: int
    path: str
    flags: int
    offset: int
    inheritable: bool
    contents: bytes | None
    file: tuple[int, int]
    twin: int | None


@dataclass(frozen=True)
class SharedMap:
    """One shared mapping: of a file (`path`, from `offset`), or of memory only (no path). `unlinked`: a semaphore's,
    whose file nothing but this mapping leads to; it becomes memory only.
    """

    start: int
    size: int
    protection: int
    path: str
    offset: int
    unlinked: bool = False


@dataclass
class Carried:
    """Everything about a process that a fork of it has to be given again."""

    cwd: str = ""
    files: list[OpenFile] = field(default_factory=list)
    pipes: dict[int, list[tuple[int, int, bool]]] = field(default_factory=dict)
    maps: list[SharedMap] = field(default_factory=list)
    timers: list[tuple[float, float]] = field(default_factory=list)
    forked: bool = False  # whether who adopts it is a fork of a frozen copy, and not the worker that was copied


def plain() -> Carried | None:
    """What a process holds that has no more than a working directory; None while it has a timer or a signal that
    waits, and where that folder is gone.
    """
    if signal.sigpending() or any(signal.getitimer(which)[0] for which in _TIMERS):
        return None
    try:
        return Carried(os.getcwd())
    except OSError:
        return None


def again(carried: Carried) -> Carried:
    """The same for a fork of the frozen copy."""
    return replace(carried, forked=True)


def inspect(own: frozenset[int]) -> tuple[Carried, list[str]]:
    """What this process holds, and what of it cannot be carried (in words). `own`: the runtime's descriptors."""
    reasons: list[str] = []
    carried = Carried()
    _threads(reasons)
    _children(reasons)
    try:
        carried.cwd = os.getcwd()
    except OSError:
        reasons.append("the working directory was deleted")
    open_now = sorted({int(word) for word in os.listdir("/proc/self/fd")} - own)
    if locks := [reason for fd in open_now if (reason := _held(fd))]:  # closing any descriptor of a file ends its locks
        return carried, [*reasons, *locks]
    for fd in open_now:
        _descriptor(fd, carried, reasons)
    for inode, ends in carried.pipes.items():
        if not _closed_or_ours(ends):
            reasons.append(f"pipe {inode}, whose other end is outside the interpreter")
    _shared_maps(carried, reasons)
    try:
        if Path("/proc/self/timers").read_bytes():
            reasons.append("a POSIX timer")
    except OSError:
        pass
    carried.timers = [signal.getitimer(which) for which in _TIMERS]
    if waiting := signal.sigpending():
        reasons.append(f"a blocked signal that waits (number {min(waiting):d})")
    return carried, reasons


def _threads(reasons: list[str]) -> None:
    """Threads of a BLAS end when the C library forks and come back with the next product; others cannot be kept."""
    if len(os.listdir("/proc/self/task")) == 1:
        return
    child = kernel.fork_for_handlers()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    for _ in range(50):
        if (left := len(os.listdir("/proc/self/task")) - 1) == 0:
            return
        time.sleep(0.0002)
    reasons.append(f"{left} thread{'s' if left > 1 else ''} beside the main one")


def _children(reasons: list[str]) -> None:
    """A finished child that nobody waited for is collected into its Popen object; a running one cannot be kept."""
    listed = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    if not listed:
        return
    started = {o.pid: o for o in gc.get_objects() if isinstance(o, subprocess.Popen)}
    for word in listed:
        pid = int(word)
        over = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
        if not over:
            reasons.append(f"the running process {pid}")
        elif pid in started:
            started[pid].poll()
        else:
            reasons.append(f"the finished process {pid}, which nobody waited for")


def _held(fd: int) -> str:
    """What cannot be carried of a descriptor, whatever it leads to, or nothing. Opens no file."""
    try:
        locked = "lock:" in Path(f"/proc/self/fdinfo/{fd}").read_text()
        path = os.readlink(f"/proc/self/fd/{fd}")
    except OSError:  # the one that listed the folder
        return ""
    if locked:
        return f"a lock on {path}"
    return f"descriptor {fd}, above its limit" if fd >= resource.getrlimit(resource.RLIMIT_NOFILE)[0] else ""


def _descriptor(fd: int, carried: Carried, reasons: list[str]) -> None:
    try:
        found, flags = os.fstat(fd), fcntl.fcntl(fd, fcntl.F_GETFL)
        path = os.readlink(f"/proc/self/fd/{fd}")
    except OSError:  # the one that listed the folder
        return
    inheritable = os.get_inheritable(fd)
    kind = stat.S_IFMT(found.st_mode)
    if kind == stat.S_IFIFO and path.startswith("pipe:"):
        carried.pipes.setdefault(found.st_ino, []).append((fd, flags, inheritable))
    elif kind in (stat.S_IFREG, stat.S_IFDIR) and not path.startswith("/proc/"):
        if reason := _file(fd, found, flags, path, inheritable, carried):
            reasons.append(reason)
    elif kind != stat.S_IFCHR:
        reasons.append(f"descriptor {fd} ({path})")


def _closed_or_ours(ends: list[tuple[int, int, bool]]) -> bool:
    """Whether nobody else has an end of this pipe: both kinds are ours, or the kernel says nobody has the other."""
    kinds = {flags & _ACCESS for _, flags, _ in ends}
    if kinds == {os.O_RDONLY, os.O_WRONLY}:
        return True
    over = {os.O_RDONLY: select.POLLHUP, os.O_WRONLY: select.POLLERR}.get(kinds.pop(), 0) if len(kinds) == 1 else 0
    poll = select.poll()
    poll.register(ends[0][0], 0)
    return any(event & over for _, event in poll.poll(0))


def _file(fd: int, found: os.stat_result, flags: int, path: str, inheritable: bool, carried: Carried) -> str:
    """Carry a file or a folder; why that cannot be, or nothing."""
    plain_file, offset, kept = stat.S_ISREG(found.st_mode), os.lseek(fd, 0, os.SEEK_CUR), flags & _KEPT_FLAGS
    if plain_file:
        kept &= ~os.O_DIRECTORY  # a part of O_TMPFILE
    elif offset:
        return f"the listing of the folder {path}, which has begun"
    contents = None
    if found.st_nlink == 0 or path.endswith(" (deleted)"):
        if found.st_nlink and plain_file and _named(path, found):
            return f"the file {path}, which has other names"
        if not plain_file or found.st_size > MOST_UNLINKED:
            return f"the deleted {'large file' if plain_file else 'folder'} {path}"
        contents = Path(f"/proc/self/fd/{fd}").read_bytes()
    elif reason := _lost(path, found, kept):
        return f"descriptor {fd}, whose file {path} {reason}"
    file = (found.st_dev, found.st_ino)
    alike = (other.fd for other in carried.files if (other.file, other.flags, other.offset) == (file, kept, offset))
    twin = next((other for other in alike if plain_file and _one_opening(other, fd, offset)), None)
    carried.files.append(OpenFile(fd, path, kept, offset, inheritable, contents, file, twin))
    return ""


def _named(path: str, found: os.stat_result) -> bool:
    """Whether an open file whose name `path` is gone has another where that was, or there is too much to look through.
    The count of its names does not tell (layers that are merged share their files), nor does its number alone (which a
    copy-up changes for one name and not for the other), but both have the times of one file.
    """
    left, times = MOST_NAMES, (found.st_size, found.st_mtime_ns, found.st_ctime_ns)
    for folder, _, names in os.walk(f"/{path.split('/')[1]}"):
        for name in names:
            left -= 1
            with contextlib.suppress(OSError):
                there = os.lstat(f"{folder}/{name}")
                same = (there.st_dev, there.st_ino) == (found.st_dev, found.st_ino)
                if left < 0 or same or (there.st_size, there.st_mtime_ns, there.st_ctime_ns) == times:
                    return True
    return False


def _lost(path: str, found: os.stat_result, flags: int) -> str:
    """Why `path` does not lead back to an open file; nothing where it does."""
    try:
        there = os.stat(path)
    except OSError:
        return "was replaced"
    if (there.st_dev, there.st_ino) != (found.st_dev, found.st_ino) and not _same_file(path, found):
        return "was replaced"
    try:
        os.close(os.open(path, flags))
        os.close(os.open(path, os.O_RDONLY))
    except OSError as error:
        return f"cannot be opened again ({error.strerror})"
    return ""


def _one_opening(one: int, other: int, offset: int) -> bool:
    """Whether both descriptors, at `offset` of one file, move together."""
    os.lseek(one, offset + 1, os.SEEK_SET)
    moved = os.lseek(other, 0, os.SEEK_CUR) == offset + 1
    os.lseek(one, offset, os.SEEK_SET)
    return moved


def _same_file(path: str, found: os.stat_result) -> bool:
    """Whether `path` still names what a descriptor has open, though a copy-up gave the name another number."""
    try:
        again = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        seen = os.fstat(again)
        return (seen.st_size, seen.st_mtime_ns, seen.st_mode) == (found.st_size, found.st_mtime_ns, found.st_mode)
    finally:
        os.close(again)


def _shared_maps(carried: Carried, reasons: list[str]) -> None:
    found = maps.shared("/proc/self/maps")
    inodes = [inode for *_, inode, _ in found]
    for start, end, protection, offset, inode, path in found:
        unlinked = False
        if path.startswith("/dev/zero") or path == "":
            path = ""
        elif path.endswith(" (deleted)"):
            if inodes.count(inode) > 1 or not (_semaphore(path, inode, carried) and _readable(start, end - start)):
                reasons.append(f"shared memory of the deleted file {path}")
                continue
            path, unlinked = "", True
        elif not path.startswith("/"):
            reasons.append(f"shared memory {path}")
            continue
        carried.maps.append(SharedMap(start, end - start, protection, path, offset, unlinked))


def _semaphore(path: str, inode: int, carried: Carried) -> bool:
    """Whether it is the memory of a C library's semaphore that nothing else leads to. A named one is made under another
    name, which is removed: its mapping is of a deleted file too.
    """
    if not path.startswith(("/tmp/shm/sem.", "/dev/shm/sem.")) or any(f.file[1] == inode for f in carried.files):
        return False
    with os.scandir(os.path.dirname(path)) as names:
        return all(name.stat(follow_symlinks=False).st_ino != inode for name in names)


def _readable(start: int, size: int) -> bool:
    """Whether all of it can be copied: its file may have become shorter."""
    with open("/proc/self/mem", "rb", buffering=0) as memory:
        try:
            return len(os.pread(memory.fileno(), size, start)) == size
        except OSError:
            return False


def settle(carried: Carried) -> None:
    """In the frozen copy: own pipes, own shared memory, and no way to write to a file."""
    _own_pipes(carried)
    _own_memory([m for m in carried.maps if not m.path])
    for file in carried.files:
        if file.contents is not None:
            _replace(file.fd, os.open(os.devnull, os.O_RDONLY), file.inheritable)
        elif file.flags & _ACCESS != os.O_RDONLY:
            _replace(file.fd, os.open(f"/proc/self/fd/{file.fd}", os.O_RDONLY), file.inheritable)
    for shared in carried.maps:
        if shared.path:
            fd = os.open(shared.path, os.O_RDONLY)
            _map(shared, 1, fd)
            os.close(fd)


def adopt(carried: Carried) -> None:
    """In who goes on, once its layers are attached: the same names, offsets and timers there."""
    os.chdir(carried.cwd)
    _own_memory([m for m in carried.maps if not m.path and (carried.forked or m.unlinked)])
    if carried.forked:
        kernel.prctl(kernel.PR_SET_DUMPABLE, 1)
        _own_pipes(carried)
        for which, (left, every) in zip(_TIMERS, carried.timers, strict=False):
            if left or every:
                signal.setitimer(which, left, every)
    unlinked: dict[tuple[int, int], int] = {}
    for file in carried.files:
        if file.twin is not None:
            os.dup2(file.twin, file.fd, file.inheritable)
            continue
        _replace(file.fd, _reopened(file, unlinked), file.inheritable)
        if file.contents is not None:
            unlinked.setdefault(file.file, file.fd)
    for shared in carried.maps:
        if shared.path:
            fd = os.open(shared.path, os.O_RDWR if shared.protection & 2 else os.O_RDONLY)
            _map(shared, shared.protection, fd)
            os.close(fd)


def _reopened(file: OpenFile, unlinked: dict[tuple[int, int], int]) -> int:
    """`unlinked`: the files without a name that are there again, and a descriptor of each."""
    if file.contents is None:
        fd = os.open(file.path, file.flags & ~os.O_APPEND if file.flags & os.O_DIRECTORY else file.flags)
    elif file.file in unlinked:
        fd = os.open(f"/proc/self/fd/{unlinked[file.file]}", file.flags)
    else:
        made = os.open("/tmp", os.O_TMPFILE | os.O_RDWR, 0o600)
        with os.fdopen(made, "wb", buffering=0) as again:
            if again.write(file.contents) != len(file.contents):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), file.path)
            fd = os.open(f"/proc/self/fd/{made}", file.flags)
    if file.offset:
        os.lseek(fd, file.offset, os.SEEK_SET)
    return fd


def _replace(fd: int, new: int, inheritable: bool) -> None:
    os.dup2(new, fd, inheritable)
    os.close(new)


def _own_pipes(carried: Carried) -> None:
    """New pipes with the same contents, which stay in the old ones (tee); an end that nobody has stays closed."""
    for ends in carried.pipes.values():
        size = fcntl.fcntl(ends[0][0], 1032)  # F_GETPIPE_SZ
        reading, writing = os.pipe()
        fcntl.fcntl(writing, 1031, size)
        for source in [fd for fd, flags, _ in ends if flags & _ACCESS == os.O_RDONLY][:1]:
            waiting = struct.unpack("i", fcntl.ioctl(source, 0x541B, b"\0" * 4))[0]  # FIONREAD
            if waiting and _libc.tee(source, writing, ctypes.c_size_t(size), 2) != waiting:
                raise OSError(5, "a pipe could not be copied")
        for fd, flags, inheritable in ends:
            again = reading if flags & _ACCESS == os.O_RDONLY else writing
            os.dup2(again, fd, inheritable)
            fcntl.fcntl(fd, fcntl.F_SETFL, flags)
        os.close(reading)
        os.close(writing)


def _own_memory(found: list[SharedMap]) -> None:
    """A copy in the place of shared memory, shared with who is forked from now on."""
    for shared in found:
        made = _libc.mmap(None, shared.size, 3, _MAP_SHARED_ANON, -1, 0)
        if made in (None, ctypes.c_void_p(-1).value):
            raise OSError(ctypes.get_errno(), "no memory to copy shared memory")
        if shared.protection & 1:
            ctypes.memmove(made, shared.start, shared.size)
        _libc.mprotect(ctypes.c_void_p(made), ctypes.c_size_t(shared.size), shared.protection)
        if _libc.mremap(made, shared.size, shared.size, 3, shared.start) != shared.start:
            raise OSError(ctypes.get_errno(), "shared memory could not be replaced")


def _map(shared: SharedMap, protection: int, fd: int) -> None:
    if _libc.mmap(shared.start, shared.size, protection, _MAP_SHARED | _MAP_FIXED, fd, shared.offset) != shared.start:
        raise OSError(ctypes.get_errno(), f"{shared.path} could not be mapped again")
