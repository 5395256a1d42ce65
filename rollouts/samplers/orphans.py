"""Ends processes with the one that uses them, however that ends: kill -9 too.

A guard is a process of its own that waits for the end of a pipe which only its owner holds. When that comes without a
word of farewell, it kills what it was told to watch; a process that has taken over a number since is left alone.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Sequence

import psutil

_GUARD = """
import json, sys
import psutil
watched = []
for line in sys.stdin:
    watched = json.loads(line)
for pid, born in watched:
    try:
        process = psutil.Process(pid)
        if abs(process.create_time() - born) < 1.0:
            process.kill()
    except psutil.NoSuchProcess:
        pass
"""
STOP_SECONDS = 10.0


class Guard:
    """Watches processes for this one."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", _GUARD], stdin=subprocess.PIPE, text=True, start_new_session=True
        )

    def watch(self, processes: Sequence[psutil.Process]) -> None:
        """Watch these, and no others any more."""
        if self._process.stdin is None:
            return
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps([(p.pid, p.create_time()) for p in processes]) + "\n")
            self._process.stdin.flush()

    def close(self) -> None:
        """Watch nothing any more. Closing twice is allowed."""
        self.watch([])
        if self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
            self._process.stdin = None
        self._process.wait(STOP_SECONDS)
