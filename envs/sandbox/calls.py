"""Code that runs in guests: output read, time, processor and memory watched, and what does not end, ended.

Runs in the supervisor. Always true: a call is answered once; while it runs nothing else happens on its seat.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from . import guests, processes
from .guests import Guest
from .wire import WireError, send

LOOK_EVERY_S = 0.2
GRACE_S = 5.0
"""Seconds that an interrupted interpreter has before it is ended."""
ANSWER_S = 1.0
"""Seconds for the rest of an answer that has begun; it is sent in one piece, and all other boxes wait meanwhile."""


@dataclass
class Call:
    """A call in progress; `done` gets its answer, with "lost" when the guest is gone or has to go."""

    op: str
    guest: Guest
    done: Callable[[dict[str, Any]], None]
    pipe: int
    deadline: float
    cpu_seconds: float
    most: int
    cpu_before: float
    output: bytearray = field(default_factory=bytearray)
    total: int = 0
    stopped: str = ""
    kill_at: float = 0.0
    looked: float = 0.0


class Calls:
    """All calls in progress. `branch`: the processes of a guest's branch."""

    def __init__(self, selector: selectors.BaseSelector, memory: int, branch: Callable[[Guest], list[int]]) -> None:
        self._selector, self._memory, self._branch = selector, memory, branch
        self._running: list[Call] = []

    def __len__(self) -> int:
        return len(self._running)

    def start(self, guest: Guest, message: dict[str, Any], done: Callable[[dict[str, Any]], None]) -> Call:
        """Let a guest run something. Raises `WireError` when it is gone."""
        reading, writing = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        os.set_blocking(writing, True)
        try:
            send(guest.connection, {key: message[key] for key in ("op", "code", "show")}, (writing,))
        except WireError:
            os.close(reading)
            raise
        finally:
            os.close(writing)
        now = time.monotonic()
        seconds, cpu, most = float(message["seconds"]), float(message["cpu_seconds"]), int(message["most"])
        call = Call(message["op"], guest, done, reading, now + seconds, cpu, most, self._cpu(guest), looked=now)
        self._running.append(call)
        self._selector.register(reading, selectors.EVENT_READ, lambda _fd: self._read(call))
        self._selector.register(guest.connection, selectors.EVENT_READ, lambda _fd: self._answered(call))
        return call

    def forget(self, call: Call) -> None:
        """Its seat is gone: it will not be answered."""
        if call in self._running:
            self._leave(call)

    def look_after(self) -> None:
        """Stop what is over its bounds; to be called often."""
        now = time.monotonic()
        for call in list(self._running):
            if call.stopped:
                if now > call.kill_at:
                    self._lost(call, call.stopped)
            elif now > call.deadline:
                self._stop(call, "time")
            elif now - call.looked > LOOK_EVERY_S:
                call.looked = now
                if self._cpu(call.guest) - call.cpu_before > call.cpu_seconds:
                    self._stop(call, "cpu")
                elif self._held(call.guest) > self._memory:
                    self._stop(call, "memory")

    def _read(self, call: Call) -> bool:
        """Take some of what is in the pipe; whether there was any."""
        try:
            chunk = os.read(call.pipe, 65_536)
        except BlockingIOError:
            return False
        if not chunk:
            self._selector.unregister(call.pipe)
            return False
        call.total += len(chunk)
        call.output += chunk[: max(0, call.most - len(call.output))]
        return True

    def _read_rest(self, call: Call) -> None:
        """What is in the pipe by now; a process left behind may write on, so no more than that."""
        end = time.monotonic() + GRACE_S
        while call.pipe in self._selector.get_map() and self._read(call) and time.monotonic() < end:
            pass

    def _answered(self, call: Call) -> None:
        try:
            told, fds = guests.hear(call.guest.connection, ANSWER_S)
        except WireError:
            self._lost(call, call.stopped or "crash")
            return
        for fd in fds:
            os.close(fd)
        status = told.get("status")
        self._read_rest(call)
        self._leave(call)
        call.done(self._answer(call, status if isinstance(status, int) else 1))

    def _lost(self, call: Call, why: str) -> None:
        call.stopped = why
        self._read_rest(call)
        self._leave(call)
        call.done({**self._answer(call, 1), "lost": 1})

    def _answer(self, call: Call, status: int) -> dict[str, Any]:
        text = bytes(call.output).decode("utf-8", "replace")
        return {"output": text, "cut": call.total - len(call.output), "status": status, "stopped": call.stopped}

    def _leave(self, call: Call) -> None:
        self._running.remove(call)
        for fd in (call.pipe, call.guest.connection.fileno()):
            if fd in self._selector.get_map():
                self._selector.unregister(fd)
        os.close(call.pipe)

    def _stop(self, call: Call, why: str) -> None:
        """End what the call started, and interrupt it; if that does not help, `look_after` gives the guest up."""
        call.stopped, call.kill_at = why, time.monotonic() + GRACE_S
        for pid in self._branch(call.guest):
            if pid != call.guest.pid:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        if call.op == "python":
            with contextlib.suppress(ProcessLookupError):
                os.kill(call.guest.pid, signal.SIGINT)

    def _cpu(self, guest: Guest) -> float:
        return sum(processes.cpu_of(pid) for pid in self._branch(guest))

    def _held(self, guest: Guest) -> int:
        branch = self._branch(guest)
        held = sum(processes.resident(pid) for pid in branch)
        return held if held <= self._memory else sum(processes.held_bytes(pid) for pid in branch)
