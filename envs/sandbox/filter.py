"""The guest's system-call filter (seccomp): what is refused, and what the supervisor decides.

A guest must not make namespaces (in a new one it would be root), look into other processes, or hold memory that no
limit counts. Signals are decided by the supervisor, call by call: a guest may signal what its own branch started, and
nothing else. What a filter can see are numbers, never memory, so what it allows cannot change under it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import struct

from . import kernel

_DENIED = (
    "setns", "mount", "umount2", "chroot", "pivot_root", "memfd_create", "shmget", "msgget", "semget", "ptrace", "bpf",
    "perf_event_open", "add_key", "request_key", "keyctl", "io_uring_setup", "process_vm_readv", "process_vm_writev",
    "pidfd_send_signal", "pidfd_getfd", "process_madvise", "kcmp", "swapon", "sethostname", "setdomainname",
    "userfaultfd", "process_mrelease", "quotactl", "fanotify_init",
)  # fmt: skip
_SAME_EVERYWHERE = (428, 429, 430, 431, 432, 433, 442)  # the mount calls of 5.2 and later
_ONLY_ITSELF = {"prlimit64": 0, "sched_setaffinity": 0, "sched_setscheduler": 0, "sched_setparam": 0,
                "sched_setattr": 0, "setpriority": 1, "ioprio_set": 1, "move_pages": 0, "migrate_pages": 0}  # fmt: skip
"""Calls about a process, and which argument names it: allowed where that is 0, the caller."""
SIGNALS = ("kill", "tkill", "tgkill", "rt_sigqueueinfo", "rt_tgsigqueueinfo")

_LOAD, _EQUAL, _AT_LEAST, _ANY_OF, _GIVE = 0x20, 0x15, 0x35, 0x45, 0x06  # BPF: LD, JEQ, JGE, JSET, RET
_ALLOW, _REFUSE, _MISSING, _KILL, _ASK = 0x7FFF0000, 0x00050001, 0x00050026, 0x80000000, 0x7FC00000
_RECEIVE, _SEND = 0xC0502100, 0xC0182101
_CONTINUE = 1


def install() -> int:
    """Filter this process and all it starts; the descriptor on which the supervisor is asked. Cannot be undone."""
    code = ctypes.create_string_buffer(program())
    filters = struct.pack("HxxxxxxP", len(code.raw) // 8, ctypes.addressof(code))
    return kernel.call("seccomp", 1, 1 << 3, filters)  # SET_MODE_FILTER, NEW_LISTENER


def program() -> bytes:
    """The filter for this architecture."""
    machine = kernel.machine()
    calls = machine.calls
    steps = [(_LOAD, 0, 0, 4), (_EQUAL, 1, 0, machine.audit), (_GIVE, 0, 0, _KILL), (_LOAD, 0, 0, 0)]
    steps += [(_AT_LEAST, 0, 1, 0x40000000), (_GIVE, 0, 0, _REFUSE)]  # the x32 numbers
    for number in (*(calls[name] for name in _DENIED), *_SAME_EVERYWHERE):
        steps += [(_EQUAL, 0, 1, number), (_GIVE, 0, 0, _REFUSE)]
    for name in SIGNALS:
        steps += [(_EQUAL, 0, 1, calls[name]), (_GIVE, 0, 0, _ASK)]
    # how many processes there may be is the supervisor's to say: the hard limit has room for frozen copies
    steps += [(_EQUAL, 0, 3, calls["setrlimit"]), (_LOAD, 0, 0, 16), (_EQUAL, 0, 1, resource.RLIMIT_NPROC)]
    steps += [(_GIVE, 0, 0, _REFUSE), (_LOAD, 0, 0, 0)]
    steps += [(_EQUAL, 0, 7, calls["prlimit64"]), (_LOAD, 0, 0, 24), (_EQUAL, 0, 5, resource.RLIMIT_NPROC)]
    steps += [(_LOAD, 0, 0, 32), (_EQUAL, 0, 2, 0), (_LOAD, 0, 0, 36), (_EQUAL, 1, 0, 0), (_GIVE, 0, 0, _REFUSE)]
    steps += [(_LOAD, 0, 0, 0)]
    for name, index in _ONLY_ITSELF.items():
        number = calls[name]
        steps += [(_EQUAL, 0, 4, number), (_LOAD, 0, 0, 16 + 8 * index), (_EQUAL, 1, 0, 0), (_GIVE, 0, 0, _REFUSE)]
        steps += [(_GIVE, 0, 0, _ALLOW)]
    # clone3's flags are in memory: said not to exist, so that clone is used
    steps += [(_EQUAL, 0, 1, kernel.CLONE3), (_GIVE, 0, 0, _MISSING)]
    steps += [(_EQUAL, 0, 3, calls["clone"]), (_LOAD, 0, 0, 16), (_ANY_OF, 0, 1, kernel.NEW_ANYTHING)]
    steps += [(_GIVE, 0, 0, _REFUSE), (_LOAD, 0, 0, 0)]
    # a branch's own mount namespace is the one thing that the runtime asks for itself (see worker.py)
    steps += [(_EQUAL, 0, 3, calls["unshare"]), (_LOAD, 0, 0, 16), (_EQUAL, 1, 0, kernel.NEW_MOUNT)]
    steps += [(_GIVE, 0, 0, _REFUSE), (_GIVE, 0, 0, _ALLOW)]
    return b"".join(struct.pack("HBBI", *step) for step in steps)


def next_question(listener: int) -> tuple[int, int, int, tuple[int, ...]] | None:
    """A signal that a guest wants to send: (mark, its process number, call number, arguments); None: nobody asks."""
    data = ctypes.create_string_buffer(80)
    try:
        _ioctl(listener, _RECEIVE, data)
    except OSError:  # the asker was killed meanwhile
        return None
    mark, pid, _flags, number, _arch, _at, *arguments = struct.unpack("QIIiIQ6Q", data.raw)
    return mark, pid, number, tuple(arguments)


def answer(listener: int, mark: int, error: int | None, done: bool = False) -> None:
    """Let the call happen (None), or say that it failed with `error`; `done`: that it has happened."""
    flags = 0 if done or error else _CONTINUE
    with contextlib.suppress(OSError):  # the asker was killed meanwhile
        _ioctl(listener, _SEND, ctypes.create_string_buffer(struct.pack("QqiI", mark, 0, -(error or 0), flags), 24))


def _ioctl(fd: int, request: int, data: ctypes.Array[ctypes.c_char]) -> None:
    libc = ctypes.PyDLL(None, use_errno=True)
    if libc.ioctl(fd, ctypes.c_ulong(request), data) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"ioctl: {os.strerror(number)}")
