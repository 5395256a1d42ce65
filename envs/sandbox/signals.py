"""Whom a guest may signal: what its own branch runs, and nobody else. The kernel asks, the supervisor decides."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable

from . import filter, processes


def decide(listener: int, branch_of: Callable[[int], list[int]]) -> None:
    """Answer one question. `branch_of`: the processes of the branch that a process belongs to."""
    asked = filter.next_question(listener)
    if asked is None:
        return
    mark, sender, _call, arguments = asked
    target, number = _signed(arguments[0]), _signed(arguments[1])
    allowed = branch_of(sender)
    if target == -1:  # everybody it may reach: sent from here, where a frozen copy cannot be hit
        for pid in allowed:
            if pid != sender and number:
                with contextlib.suppress(OSError):
                    os.kill(pid, number)
        filter.answer(listener, mark, None, done=True)
    elif target == 0 or target in allowed or _own_group(-target, allowed) or _own_thread(target, sender):
        filter.answer(listener, mark, None)
    else:
        filter.answer(listener, mark, errno.ESRCH)


def _own_group(group: int, allowed: list[int]) -> bool:
    if group <= 1:
        return False
    members = [pid for pid in processes.others() if processes.group_of(pid) == group]
    return bool(members) and all(pid in allowed for pid in members)


def _own_thread(thread: int, sender: int) -> bool:
    return thread > 0 and os.path.exists(f"/proc/{sender}/task/{thread}")


def _signed(value: int) -> int:
    value &= 0xFFFFFFFF
    return value - (1 << 32) if value >= 1 << 31 else value
