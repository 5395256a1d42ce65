"""Code that runs in guests: output read, time, processor and memory watched, and what does not end, ended.

Runs in the supervisor. Always true: a call is answered once; while it runs nothing else happens on its seat; what runs
on between calls is watched too.
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
REST_LOOK_EVERY_S = 1.0
"""Between looks at what runs while its seat rests."""
GRACE_S = 5.0
"""Seconds that an interrupted interpreter has before it is ended."""
ANSWER_S = 1.0
"""Seconds for the rest of an answer that has begun; it is sent in one piece, and all other boxes wait meanwhile."""


@dataclass
class Call:
    """A call in progress; `done` gets its answer, with "lost" when the guest is gone or has to go, and with "quiet"
    when it says that it only waited for another program.
    """

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


@dataclass
class Rest:
    """A guest between calls, with processes or threads that run on."""

    guest: Guest
    cpu_seconds: float
    cpu_before: float
    looked: float


class Calls:
    """All calls in progress, and what they left running. `branch`: the processes of a guest's branch."""

    def __init__(self, selector: selectors.BaseSelector, memory: int, branch: Callable[[Guest], list[int]]) -> None:
        self._selector, self._memory, self._branch = selector, memory, branch
        self._running: list[Call] = []
        self._resting: dict[int, Rest] = {}

    def __len__(self) -> int:
        return len(self._running) + len(self._resting)

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
        self._resting.pop(guest.pid, None)
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
        for rest in list(self._resting.values()):
            if now - rest.looked > REST_LOOK_EVERY_S:
                rest.looked = now
                self._look_at(rest)

    def _look_at(self, rest: Rest) -> None:
        """End what runs on beyond the limits: the processes left behind, or the interpreter where it has none."""
        guest = rest.guest
        if guest.ended or not self._runs_on(guest):
            del self._resting[guest.pid]
        elif self._cpu(guest) - rest.cpu_before > rest.cpu_seconds or self._held(guest) > self._memory:
            for pid in [pid for pid in self._branch(guest) if pid != guest.pid] or [guest.pid]:
                processes.kill(pid)

    def _runs_on(self, guest: Guest) -> bool:
        return len(self._branch(guest)) > 1 or processes.threads_of(guest.pid) > 1

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
        answer = self._answer(call, status if isinstance(status, int) else 1)
        call.done({**answer, "quiet": told.get("quiet") == 1 and not call.stopped})

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
        if self._runs_on(call.guest):
            now = time.monotonic()
            self._resting[call.guest.pid] = Rest(call.guest, call.cpu_seconds, self._cpu(call.guest), now)

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
