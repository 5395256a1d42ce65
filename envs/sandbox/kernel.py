"""Linux system calls that Python 3.11 does not know, by ctypes: mounts, namespaces, capabilities, seccomp, Landlock.

Only the standard library, no state, and every function raises `OSError` with the call's name. The supervisor and the
guest's runtime run this module too, in interpreters that have no Espalier.
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Callable, Sequence
from typing import NamedTuple

NEW_MOUNT, NEW_UTS, NEW_IPC = 0x00020000, 0x04000000, 0x08000000
NEW_USER, NEW_PID, NEW_NET, NEW_CGROUP = 0x10000000, 0x20000000, 0x40000000, 0x02000000
NEW_ANYTHING = NEW_MOUNT | NEW_UTS | NEW_IPC | NEW_USER | NEW_PID | NEW_NET | NEW_CGROUP
READ_ONLY, NO_SUID, NO_DEV, NO_EXEC, REMOUNT = 0x1, 0x2, 0x4, 0x8, 0x20
BIND, RECURSIVE, PRIVATE = 0x1000, 0x4000, 0x40000
DETACH = 2
CAP_SYS_ADMIN = 21
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_NO_NEW_PRIVS, PR_GET_TID_ADDRESS, PR_CAP_AMBIENT = 1, 4, 38, 40, 47
AMBIENT_RAISE, AMBIENT_CLEAR_ALL = 2, 4

_CLOEXEC = 0o2000000
_EMPTY_PATH, _AT_FDCWD = 0x1000, -100

# Calls with the same number on every architecture that Espalier knows.
OPEN_TREE, MOVE_MOUNT, FSOPEN, FSCONFIG, FSMOUNT, FSPICK = 428, 429, 430, 431, 432, 433
CLONE3, OPENAT2, MOUNT_SETATTR = 435, 437, 442
LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT = 444, 445, 446


class Machine(NamedTuple):
    """Numbers of one processor architecture: its mark in seccomp's data, and system calls by name."""

    audit: int
    calls: dict[str, int]


_X86 = {
    "pivot_root": 155, "clone": 56, "unshare": 272, "setns": 308, "mount": 165, "umount2": 166, "chroot": 161,
    "memfd_create": 319, "shmget": 29, "ptrace": 101, "bpf": 321, "perf_event_open": 298, "add_key": 248,
    "request_key": 249, "keyctl": 250, "io_uring_setup": 425, "process_vm_readv": 310, "process_vm_writev": 311,
    "msgget": 68, "semget": 64, "prlimit64": 302, "setrlimit": 160, "setpriority": 141, "sched_setaffinity": 203,
    "sched_setscheduler": 144, "sched_setparam": 142, "sched_setattr": 314, "ioprio_set": 251, "kill": 62,
    "tkill": 200, "tgkill": 234, "rt_sigqueueinfo": 129, "rt_tgsigqueueinfo": 297, "pidfd_send_signal": 424,
    "pidfd_getfd": 438, "process_madvise": 440, "kcmp": 312, "swapon": 167, "sethostname": 170, "setdomainname": 171,
    "capset": 126, "seccomp": 317, "userfaultfd": 323, "process_mrelease": 448, "move_pages": 279,
    "migrate_pages": 256, "quotactl": 179, "fanotify_init": 300,
}  # fmt: skip
_ARM = {
    "pivot_root": 41, "clone": 220, "unshare": 97, "setns": 268, "mount": 40, "umount2": 39, "chroot": 51,
    "memfd_create": 279, "shmget": 194, "ptrace": 117, "bpf": 280, "perf_event_open": 241, "add_key": 217,
    "request_key": 218, "keyctl": 219, "io_uring_setup": 425, "process_vm_readv": 270, "process_vm_writev": 271,
    "msgget": 186, "semget": 190, "prlimit64": 261, "setrlimit": 164, "setpriority": 140, "sched_setaffinity": 122,
    "sched_setscheduler": 119, "sched_setparam": 118, "sched_setattr": 274, "ioprio_set": 30, "kill": 129,
    "tkill": 130, "tgkill": 131, "rt_sigqueueinfo": 138, "rt_tgsigqueueinfo": 240, "pidfd_send_signal": 424,
    "pidfd_getfd": 438, "process_madvise": 440, "kcmp": 272, "swapon": 224, "sethostname": 161, "setdomainname": 162,
    "capset": 91, "seccomp": 277, "userfaultfd": 282, "process_mrelease": 448, "move_pages": 239,
    "migrate_pages": 238, "quotactl": 60, "fanotify_init": 262,
}  # fmt: skip
MACHINES = {"x86_64": Machine(0xC000003E, _X86), "aarch64": Machine(0xC00000B7, _ARM)}

# PyDLL: the interpreter lock stays held, so that no other thread runs between a call and its errno, or inside a fork.
_libc = ctypes.PyDLL(None, use_errno=True)
_syscall = _libc.syscall
_syscall.restype = ctypes.c_long


def machine() -> Machine:
    """This processor's numbers; raises `OSError` where they are not known."""
    found = MACHINES.get(os.uname().machine)
    if found is None:
        raise OSError(38, f"system calls of {os.uname().machine} are not known (x86_64 and aarch64 are)")
    return found


def syscall(number: int, *arguments: object, name: str = "") -> int:
    """A raw system call; raises `OSError` where it fails."""
    result = int(_syscall(ctypes.c_long(number), *(_plain(a) for a in arguments)))
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{name or number}: {os.strerror(error)}")
    return result


def _plain(value: object) -> object:
    return ctypes.c_long(value) if isinstance(value, int) else value


def call(name: str, *arguments: object) -> int:
    """A system call of this architecture by name."""
    return syscall(machine().calls[name], *arguments, name=name)


def prctl(option: int, *arguments: object) -> int:
    """prctl(2); missing arguments are 0."""
    padded = [*arguments, 0, 0, 0, 0][:4]
    result = int(_libc.prctl(option, *(_plain(a) if isinstance(a, int) else a for a in padded)))
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, f"prctl {option}: {os.strerror(error)}")
    return result


def unshare(flags: int) -> None:
    """unshare(2)."""
    call("unshare", flags)


def setns(fd: int, kind: int) -> None:
    """setns(2): enter the namespace behind `fd`."""
    call("setns", fd, kind)


def mount(source: str, target: str, kind: str | None, flags: int, data: str = "") -> None:
    """mount(2)."""
    call("mount", source.encode(), os.fsencode(target), kind.encode() if kind else None, flags, data.encode() or None)


def unmount(target: str) -> None:
    """umount2(2), detached: what is still used stays until it is not."""
    call("umount2", os.fsencode(target), DETACH)


def pivot_root(new: str, old: str) -> None:
    """pivot_root(2)."""
    call("pivot_root", os.fsencode(new), os.fsencode(old))


def new_mount(kind: str, flags: Sequence[str] = (), **options: str) -> int:
    """A detached mount of a new `kind` file system, as a file descriptor (fsopen, fsconfig, fsmount)."""
    context = syscall(FSOPEN, kind.encode(), 1, name="fsopen")
    try:
        for flag in flags:
            syscall(FSCONFIG, context, 0, flag.encode(), None, 0, name=f"fsconfig {flag}")
        for key, value in options.items():
            syscall(FSCONFIG, context, 1, key.encode(), os.fsencode(value), 0, name=f"fsconfig {key}={value}")
        syscall(FSCONFIG, context, 6, None, None, 0, name=f"fsconfig create {kind}")
        return syscall(FSMOUNT, context, 1, 0x2 | 0x4, name="fsmount")  # close on exec; no set-uid files, no devices
    finally:
        os.close(context)


def attach(fd: int, target: str) -> None:
    """move_mount(2): the detached mount `fd` appears at `target`."""
    syscall(MOVE_MOUNT, fd, b"", _AT_FDCWD, os.fsencode(target), 0x4, name="move_mount")


def clone_tree(path: str) -> int:
    """A detached copy of the mount that shows the folder `path` (open_tree), as a file descriptor."""
    return syscall(OPEN_TREE, _AT_FDCWD, os.fsencode(path), 1 | _CLOEXEC, name=f"open_tree {path}")


def clone_mount(fd: int) -> int:
    """A detached copy of the mount behind `fd`, with what is mounted below it."""
    return syscall(OPEN_TREE, fd, b"", 1 | _CLOEXEC | _EMPTY_PATH | 0x8000, name="open_tree")  # AT_RECURSIVE


def read_only_owned_by(fd: int, users: int) -> None:
    """Make the detached mount `fd` read-only, its owners mapped as the user namespace `users` says."""
    wanted = struct.pack("QQQQ", 0x00100000 | 0x1, 0, 0, users)  # MOUNT_ATTR_IDMAP | MOUNT_ATTR_RDONLY
    syscall(MOUNT_SETATTR, fd, b"", _EMPTY_PATH, wanted, len(wanted), name="mount_setattr")


def read_only_superblock(fd: int) -> None:
    """Make the whole file system behind the mount `fd` read-only; `OSError` (EBUSY) while anybody can write to it."""
    context = syscall(FSPICK, fd, b"", 1 | 8, name="fspick")
    try:
        syscall(FSCONFIG, context, 0, b"ro", None, 0, name="fsconfig ro")
        syscall(FSCONFIG, context, 7, None, None, 0, name="fsconfig reconfigure")
    finally:
        os.close(context)


def open_inside(root: int, path: str, flags: int, mode: int = 0) -> int:
    """openat2(2) that never leaves the tree below `root`, through links of any kind."""
    how = struct.pack("QQQ", flags | _CLOEXEC, mode, 0x10 | 0x02)  # RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS
    return syscall(OPENAT2, root, os.fsencode(path), how, len(how), name=f"openat2 {path}")


def keep_only_mounting() -> None:
    """Of all capabilities keep CAP_SYS_ADMIN, and let it survive one exec."""
    mask = 1 << CAP_SYS_ADMIN
    _capset(mask, mask, mask)
    prctl(PR_CAP_AMBIENT, AMBIENT_RAISE, CAP_SYS_ADMIN)


def let_no_program_inherit() -> None:
    """Programs executed from now on have no capability."""
    prctl(PR_CAP_AMBIENT, AMBIENT_CLEAR_ALL)
    _capset(1 << CAP_SYS_ADMIN, 1 << CAP_SYS_ADMIN, 0)


def _capset(effective: int, permitted: int, inheritable: int) -> None:
    header = struct.pack("II", 0x20080522, 0)
    low = struct.pack("III", *(value & 0xFFFFFFFF for value in (effective, permitted, inheritable)))
    high = struct.pack("III", *(value >> 32 for value in (effective, permitted, inheritable)))
    call("capset", header, low + high)


def restrict_mounting() -> bool:
    """Landlock: from here on no mount can be changed, no device made, and nobody outside be signalled or reached by an
    abstract socket (where the kernel knows that); False where the kernel has no Landlock.
    """
    try:
        version = syscall(LANDLOCK_CREATE, None, 0, 1, name="landlock")
    except OSError:
        return False
    make_char, make_block, refer = 1 << 6, 1 << 11, 1 << 13
    if version < 2:  # it would forbid every rename from one folder to another
        return False
    rules = struct.pack("QQQ", make_char | make_block | refer, 0, 0b11)[
        : 24 if version >= 6 else 16 if version >= 4 else 8
    ]
    ruleset = syscall(LANDLOCK_CREATE, rules, len(rules), 0, name="landlock_create_ruleset")
    root = os.open("/", os.O_PATH | os.O_CLOEXEC)
    syscall(LANDLOCK_ADD, ruleset, 1, struct.pack("<Qi", refer, root), 0, name="landlock_add_rule")
    syscall(LANDLOCK_RESTRICT, ruleset, 0, name="landlock_restrict_self")
    os.close(root)
    os.close(ruleset)
    return True


def sibling_fork() -> Callable[[], int]:
    """A function that is fork(2), but its child has the caller's parent: the caller's own waiting never meets it.

    Nothing registered with `os.register_at_fork` or pthread_atfork runs; the caller must have one thread, the one that
    this was called in. The C library's note of its thread number is corrected as its own fork does it.
    """
    address = ctypes.c_ulong()
    flags = 17 | 0x8000  # SIGCHLD | CLONE_PARENT
    try:
        prctl(PR_GET_TID_ADDRESS, ctypes.addressof(address))
        flags |= 0x01000000 | 0x00200000  # CLONE_CHILD_SETTID | CLONE_CHILD_CLEARTID
    except OSError:
        pass
    number, thread, zero = ctypes.c_long(machine().calls["clone"]), ctypes.c_long(address.value), ctypes.c_long(0)
    # the order on aarch64: flags, stack, parent_tid, tls, child_tid; elsewhere child_tid comes fourth
    rest = (zero, thread) if os.uname().machine == "aarch64" else (thread, zero)
    arguments = (number, ctypes.c_long(flags), zero, zero, *rest)

    def fork() -> int:
        child = int(_syscall(*arguments))
        if child < 0:
            error = ctypes.get_errno()
            raise OSError(error, f"fork: {os.strerror(error)}")
        return child

    return fork


def fork_for_handlers() -> int:
    """The C library's fork(2): what is registered with pthread_atfork runs, Python's own handlers do not."""
    return int(_libc.fork())
