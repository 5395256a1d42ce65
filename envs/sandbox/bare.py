"""The launcher of a `CopyBox` call, run as a script: limits, then the command; nothing it starts outlives it.

python -I -S bare.py '[{"memory": BYTES, "cpu": S, "pids": N, "file": BYTES}, OWNER, USER, ["command", ...]]'

OWNER: the process that asked; on Linux the call ends with it. USER: the number of the user to become, null to stay.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import sys
from pathlib import Path

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 36, 38
LINUX = sys.platform == "linux"


def main(text: str) -> int:
    """Run the command; its exit status."""
    limits, owner, user, command = json.loads(text)
    if LINUX:  # processes that leave the session stay our children, where they are found and ended
        libc = ctypes.CDLL(None)
        libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        signal.signal(signal.SIGTERM, _leave)
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
        if os.getppid() != owner:
            return 1
    try:
        child = os.fork()
        if child == 0:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            _become(limits, user)
            os.execvpe(command[0], command, dict(os.environ))
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    finally:
        _end_all()
    return status if status >= 0 else 128 - status


def _leave(_signal: int, _frame: object) -> None:
    sys.exit(1)


def _become(limits: dict[str, int], user: int | None) -> None:
    """Take the limits, and another user's place. Processes are bounded on Linux alone, where they can be counted."""
    wanted = [(resource.RLIMIT_AS, limits["memory"]), (resource.RLIMIT_CPU, limits["cpu"]),
              (resource.RLIMIT_FSIZE, limits["file"]), (resource.RLIMIT_CORE, 0)]  # fmt: skip
    if LINUX:
        runs_as = os.getuid() if user is None else user
        wanted.append((resource.RLIMIT_NPROC, _threads_of(runs_as) + limits["pids"]))
    for which, value in wanted:
        resource.setrlimit(which, (value, value))
    if user is not None:
        os.setgroups([])
        os.setgid(user)
        os.setuid(user)
        if LINUX:
            ctypes.CDLL(None).prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)


def _end_all() -> None:
    children = Path(f"/proc/self/task/{os.getpid()}/children")
    while children.exists() and (left := children.read_text().split()):
        for number in left:
            os.kill(int(number), signal.SIGKILL)
        for _ in left:
            os.wait()


def _threads_of(user: int) -> int:
    """Threads that `user` runs now: the limit counts all of them."""
    total = 0
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                total += len(list((entry / "task").iterdir())) if entry.stat().st_uid == user else 0
            except OSError:
                continue
    return total


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
