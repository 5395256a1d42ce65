"""The launcher of a `CopyBox` call, run as a script: limits, then the command; nothing it starts outlives it.

python -I -S bare.py '[{"memory": BYTES, "cpu": S, "pids": N, "file": BYTES}, ["command", ...]]'
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import sys
from pathlib import Path

PR_SET_CHILD_SUBREAPER = 36


def main(text: str) -> int:
    """Run the command; its exit status."""
    limits, command = json.loads(text)
    if sys.platform == "linux":  # processes that leave the session stay our children, where they are found and ended
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    child = os.fork()
    if child == 0:
        for which, value in ((resource.RLIMIT_AS, limits["memory"]), (resource.RLIMIT_CPU, limits["cpu"]),
                             (resource.RLIMIT_FSIZE, limits["file"]), (resource.RLIMIT_CORE, 0),
                             (resource.RLIMIT_NPROC, _threads_of_user() + limits["pids"])):  # fmt: skip
            resource.setrlimit(which, (value, value))
        os.execvpe(command[0], command, dict(os.environ))
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    children = Path(f"/proc/self/task/{os.getpid()}/children")
    while children.exists() and (left := children.read_text().split()):
        for number in left:
            os.kill(int(number), signal.SIGKILL)
        for _ in left:
            os.wait()
    return status if status >= 0 else 128 - status


def _threads_of_user() -> int:
    """Threads this user runs now: the limit counts all of them."""
    total = 0
    for entry in Path("/proc").iterdir() if sys.platform == "linux" else ():
        if entry.name.isdigit():
            try:
                total += len(list((entry / "task").iterdir())) if entry.stat().st_uid == os.getuid() else 0
            except OSError:
                continue
    return total


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
