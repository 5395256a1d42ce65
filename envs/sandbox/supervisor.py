"""The first process of a box: it holds the tree of snapshots and serves the orchestrator's seats.

One thread, one loop, every wait with a deadline. A seat is a connection from outside with one live guest behind it;
seats run at once and do not see each other. The orchestrator is trusted, guests are not. The box ends with its last
seat, with the orchestrator's process, or when this process dies: the kernel then ends everything inside.
"""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import select
import selectors
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import files, filter, guestroot, guests, kernel
from .layers import Layers
from .wire import WireError, receive, send

GUEST = 1000
LOOK_EVERY_S = 0.2
CHORES_AFTER_S = 0.005
GRACE_S = 2.0
RENEW_ABOVE = 10
"""Forks in a row before a frozen copy gets pages of its own."""

PRISTINE = 0
"""The number of the first snapshot: a fresh interpreter on the user's files."""


class Mistake(Exception):
    """A request that cannot be met: `code` and words for the caller."""

    def __init__(self, code: str, message: str, **more: Any) -> None:
        super().__init__(message)
        self.reply = {"error": code, "message": message, **more}


@dataclass
class Running:
    """A call in progress on a seat."""

    op: str
    pipe: int
    deadline: float
    cpu_seconds: float
    most: int
    started_cpu: float
    output: bytearray
    total: int = 0
    stopped: str = ""
    kill_at: float = 0.0
    looked: float = 0.0


@dataclass
class Seat:
    """One connection from outside, the guest behind it, and the snapshot it last was equal to (None: changed since)."""

    connection: socket.socket
    guest: guests.Guest
    at: int | None
    running: Running | None = None
    plain: bool | None = None  # whether its guest holds nothing that a fork would share; None: not looked yet


def serve(config: dict[str, Any], control: socket.socket, owner: int, workspace: int) -> None:
    """Build the box and serve it until it is over. Tells the first seat "ready", or what went wrong."""
    try:
        supervisor = Supervisor(config, control, owner, workspace)
    except (OSError, guests.GuestGone) as error:
        send(control, {"error": "not_isolated", "message": str(error)})
        return
    send(control, {"ready": 1})
    supervisor.loop()


class Supervisor:
    """The state of one box."""

    def __init__(self, config: dict[str, Any], control: socket.socket, owner: int, workspace: int) -> None:
        room = Path("/tmp")
        limits = config["limits"]
        self.limits = limits
        size = f"size={limits['files']},nr_inodes={limits['inodes']}"
        guestroot.build(room, workspace, tuple(config["visible"]), config["network"], size, GUEST)
        # this process's own /proc: numbers of this box
        kernel.mount("proc", "/proc", "proc", kernel.NO_SUID | kernel.NO_DEV | kernel.NO_EXEC)
        self.home = guests.Home(os.open("/proc/self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC), room, GUEST)
        self.layers = Layers(room / "layers")
        guest, self.listener = guests.start(
            self.home, self.layers, config["command"], config["environment"], _rlimits(limits)
        )
        self.templates: dict[int, guests.Template] = {}
        self.parents: dict[int, int | None] = {}
        self._next = PRISTINE
        self.seats: dict[int, Seat] = {}
        self.selector = selectors.DefaultSelector()
        self.selector.register(owner, selectors.EVENT_READ, self._owner_gone)
        self.selector.register(self.listener, selectors.EVENT_READ, self._signal_asked)
        self._open_seat(control, guest, None)
        seat = self.seats[control.fileno()]
        self._snapshot(seat, {})
        self._wanted: list[int] = []
        self._unmeasured: list[int] = []

    # the loop

    def loop(self) -> None:
        """Serve until the last seat is closed."""
        while self.seats:
            busy = any(seat.running for seat in self.seats.values())
            wait = CHORES_AFTER_S if self._has_chores() else LOOK_EVERY_S if busy else 5.0
            events = self.selector.select(wait)
            for key, _ in events:
                if key.fd in self.selector.get_map():
                    key.data(key.fd)
            self._look_after_calls()
            self._reap()
            if not events:
                with contextlib.suppress(OSError, guests.GuestGone):  # no room, say: who needs it done will be told
                    self._chore()

    def _owner_gone(self, _fd: int) -> None:
        os._exit(0)

    def _open_seat(self, connection: socket.socket, guest: guests.Guest, at: int | None) -> None:
        connection.settimeout(60.0)
        self.seats[connection.fileno()] = Seat(connection, guest, at)
        self.selector.register(connection, selectors.EVENT_READ, self._request)

    def _close_seat(self, seat: Seat) -> None:
        self._stop_listening(seat)
        self.selector.unregister(seat.connection)
        del self.seats[seat.connection.fileno()]
        seat.connection.close()
        guests.end(self.layers, seat.guest, self._pids())

    def _request(self, fd: int) -> None:
        seat = self.seats[fd]
        try:
            message, fds = receive(seat.connection)
        except WireError:
            self._close_seat(seat)
            return
        handler: Callable[[Seat, dict[str, Any], list[int]], dict[str, Any] | None] | None
        handler = self._HANDLERS.get(str(message.get("op")))
        try:
            if handler is None:
                raise Mistake("unknown_request", f"no request {message.get('op')!r}")
            if seat.running is not None:
                raise Mistake("busy", "a call is still running here")
            reply = handler(self, seat, message, fds)
        except Mistake as mistake:
            reply = mistake.reply
        except guests.GuestGone as gone:
            reply = {"error": "guest_gone", "message": str(gone)}
        except OSError as error:
            code = "full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "box_failed"
            reply = {"error": code, "message": str(error)}
        for other in fds:
            with contextlib.suppress(OSError):
                os.close(other)
        if reply is not None:
            self._tell(seat, reply)

    def _tell(self, seat: Seat, reply: dict[str, Any]) -> None:
        try:
            send(seat.connection, reply)
        except WireError:
            self._close_seat(seat)

    # running code

    def _run(self, seat: Seat, message: dict[str, Any], _fds: list[int]) -> None:
        reading, writing = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        os.set_blocking(writing, True)
        seat.at = seat.plain = None
        try:
            send(seat.guest.connection, {"op": message["op"], "code": message["code"]}, (writing,))
        except WireError as error:
            os.close(reading)
            self._replace_guest(seat)
            raise guests.GuestGone(f"the interpreter is gone ({error}); a fresh one has been started") from error
        finally:
            os.close(writing)
        seat.running = Running(
            message["op"],
            reading,
            time.monotonic() + float(message["seconds"]),
            float(message["cpu_seconds"]),
            int(message["most"]),
            self._cpu(seat),
            bytearray(),
            looked=time.monotonic(),
        )
        self.selector.register(reading, selectors.EVENT_READ, lambda fd: self._output(seat))
        self.selector.register(seat.guest.connection, selectors.EVENT_READ, lambda fd: self._finished(seat))

    def _output(self, seat: Seat) -> None:
        call = seat.running
        if call is None:
            return
        try:
            chunk = os.read(call.pipe, 65_536)
        except BlockingIOError:
            return
        if not chunk:
            self.selector.unregister(call.pipe)
            return
        call.total += len(chunk)
        call.output += chunk[: max(0, call.most - len(call.output))]

    def _finished(self, seat: Seat) -> None:
        call = seat.running
        if call is None:
            return
        try:
            told, fds = receive(seat.guest.connection)
            for fd in fds:
                os.close(fd)
            status = told.get("status")
            status = status if isinstance(status, int) else 1
        except WireError:
            self._lost(seat, "crash")
            return
        while call.pipe in self.selector.get_map() and self._readable(call.pipe):
            self._output(seat)
        self._answer(seat, {"status": status, "stopped": call.stopped, "restarted": False})

    def _readable(self, pipe: int) -> bool:
        return bool(select.select([pipe], [], [], 0)[0])

    def _answer(self, seat: Seat, reply: dict[str, Any]) -> None:
        call = seat.running
        if call is None:
            return
        self._stop_listening(seat)
        text = bytes(call.output).decode("utf-8", "replace")
        self._tell(seat, {"output": text, "cut": call.total - len(call.output), **reply})

    def _stop_listening(self, seat: Seat) -> None:
        call, seat.running = seat.running, None
        if call is None:
            return
        for fd in (call.pipe, seat.guest.connection.fileno()):
            if fd in self.selector.get_map():
                self.selector.unregister(fd)
        os.close(call.pipe)

    def _look_after_calls(self) -> None:
        now = time.monotonic()
        for seat in list(self.seats.values()):
            call = seat.running
            if call is None:
                continue
            if call.stopped:
                if now > call.kill_at:
                    self._lost(seat, call.stopped)
                continue
            if now > call.deadline:
                self._stop(seat, "time")
            elif now - call.looked > LOOK_EVERY_S:
                call.looked = now
                if self._cpu(seat) - call.started_cpu > call.cpu_seconds:
                    self._stop(seat, "cpu")
                elif self._memory(seat) > self.limits["memory"]:
                    self._stop(seat, "memory")

    def _stop(self, seat: Seat, why: str) -> None:
        """End what the call started, and interrupt it; if that does not help, `_look_after_calls` ends the guest."""
        call = seat.running
        if call is None:
            return
        call.stopped, call.kill_at = why, time.monotonic() + GRACE_S
        for pid in self._branch(seat):
            if pid != seat.guest.pid:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        if call.op == "python":
            with contextlib.suppress(ProcessLookupError):
                os.kill(seat.guest.pid, signal.SIGINT)

    def _lost(self, seat: Seat, why: str) -> None:
        """The interpreter is gone or has to go: a fresh one goes on with the files as they are."""
        if seat.running is not None:
            seat.running.stopped = why
        while seat.running is not None and seat.running.pipe in self.selector.get_map():
            if not self._readable(seat.running.pipe) or seat.running.total > 10 * seat.running.most:
                break
            self._output(seat)
        call = seat.running
        if call is not None and seat.guest.connection.fileno() in self.selector.get_map():
            self.selector.unregister(seat.guest.connection)
        self._replace_guest(seat)
        self._answer(seat, {"status": 1, "stopped": why, "restarted": True})

    def _replace_guest(self, seat: Seat) -> None:
        old, pristine = seat.guest, self.templates[PRISTINE]
        stacks = {
            name: self.layers.short(name, (*mount.stack, mount.layer)) for name, mount in old.mounted.items()
        }
        self.layers.hold(stacks.values())
        guests.end(self.layers, old, self._pids())
        fresh = guests.Template(-1, pristine.pid, pristine.connection, stacks, plain=True)
        try:
            seat.guest = guests.fork(self.home, self.layers, fresh)
        finally:
            self.layers.release(stacks.values())
        seat.at, seat.plain = None, True

    def _branch(self, seat: Seat) -> list[int]:
        return [seat.guest.pid, *guests.started_by(seat.guest.pid, self._pids())]

    def _cpu(self, seat: Seat) -> float:
        return sum(_cpu_of(pid) for pid in self._branch(seat))

    def _memory(self, seat: Seat) -> int:
        branch = self._branch(seat)
        held = sum(_resident(pid) for pid in branch)  # counts pages that forks share once each: an upper bound
        return held if held <= self.limits["memory"] else sum(guests.held_bytes(pid) for pid in branch)

    # snapshots

    def _snapshot(self, seat: Seat, _message: dict[str, Any], _fds: list[int] | None = None) -> dict[str, Any]:
        if seat.at is not None and seat.at in self.templates:
            return {"snapshot": seat.at, "same": 1}
        if seat.plain is None:
            seat.plain = guests.is_plain(seat.guest, self._pids())
        try:
            template = self._freeze(seat)
        except guests.Refused as refused:
            raise Mistake("incomplete", str(refused), reasons=refused.reasons) from refused
        except guests.GuestGone:
            self._replace_guest(seat)
            raise
        if template.refused:
            guests.end_template(self.layers, template, self._pids())
            raise Mistake("incomplete", "; ".join(template.refused), reasons=template.refused)
        self._next += 1
        self.templates[template.number] = template
        if hasattr(self, "_unmeasured"):
            self._unmeasured.append(template.number)
        seat.at = template.number
        return {"snapshot": template.number, "pause_us": round(template.paused * 1e6)}

    def _freeze(self, seat: Seat) -> guests.Template:
        if seat.plain:
            try:
                return guests.freeze(self.home, self.layers, seat.guest, self._next, plain=True)
            except guests.NotPlain:
                seat.plain = False
        self._nothing_runs(seat)
        return guests.freeze(self.home, self.layers, seat.guest, self._next, plain=False)

    def _nothing_runs(self, seat: Seat) -> None:
        """Raises `Mistake` for a process that outlived its parent in this branch (the guest's own children it looks
        for itself).
        """
        left = guests.started_by(seat.guest.pid, self._pids())
        if left:
            self._reap()
            left = [pid for pid in left if guests.parent_of(pid) == 1]
        if left:
            reasons = [f"the running process {pid}" for pid in left]
            raise Mistake("incomplete", "; ".join(reasons), reasons=reasons)

    def _pids(self) -> set[int]:
        """Guests, spares and frozen copies."""
        spares = {t.spare.pid for t in self.templates.values() if t.spare is not None}
        return {t.pid for t in self.templates.values()} | {s.guest.pid for s in self.seats.values()} | spares

    def _known(self, number: object) -> guests.Template:
        found = self.templates.get(number) if isinstance(number, int) else None
        if found is None:
            raise Mistake("no_snapshot", f"there is no snapshot {number} (any more)")
        found.used = time.monotonic()
        found.hot += 1
        return found

    def _continue_from(self, template: guests.Template) -> tuple[guests.Guest, bool]:
        spare, template.spare = template.spare, None
        if template.number not in self._wanted and template.hot > 1:
            self._wanted.append(template.number)
        if spare is not None:
            return spare, True
        return guests.fork(self.home, self.layers, template), False

    def _rollback(self, seat: Seat, message: dict[str, Any], _fds: list[int]) -> dict[str, Any] | None:
        template = self._known(message.get("snapshot"))
        try:
            guest, warm = self._continue_from(template)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EAGAIN, errno.ENOMEM):
                raise
            return self._rollback_first_ending(seat, template)
        old, seat.guest, seat.at, seat.plain = seat.guest, guest, template.number, template.plain
        self._tell(seat, {"rolled_back": template.number, "warm": int(warm)})
        guests.end(self.layers, old, self._pids())
        return None

    def _rollback_first_ending(self, seat: Seat, template: guests.Template) -> dict[str, Any]:
        """There is no room beside what is rolled back: that goes first."""
        guests.end(self.layers, seat.guest, self._pids() - {seat.guest.pid})
        while self.layers.chores:
            self.layers.chore()
        seat.guest = guests.fork(self.home, self.layers, template)
        seat.at, seat.plain = template.number, template.plain
        return {"rolled_back": template.number, "warm": 0}

    def _make_branch(self, _seat: Seat, message: dict[str, Any], fds: list[int]) -> dict[str, Any]:
        if not fds:
            raise Mistake("unknown_request", "a branch needs a connection of its own")
        template = self._known(message.get("snapshot"))
        guest, warm = self._continue_from(template)
        self._open_seat(socket.socket(fileno=fds.pop(0)), guest, template.number)
        return {"branched": template.number, "warm": int(warm)}

    def _drop(self, _seat: Seat, message: dict[str, Any], _fds: list[int]) -> dict[str, Any]:
        dropped = 0
        for number in message.get("snapshots", []):
            template = self.templates.pop(number, None) if number != PRISTINE else None
            if template is not None:
                guests.end_template(self.layers, template, self._pids())
                dropped += 1
        return {"dropped": dropped}

    # files, seen as the guest sees them

    def _file(self, seat: Seat, message: dict[str, Any], _fds: list[int]) -> dict[str, Any]:
        change = message["op"] == "write_file"
        if change:
            seat.at = None
        try:
            return files.serve({n: m.fd for n, m in seat.guest.mounted.items()}, message, GUEST)
        except OSError as error:
            name = errno.errorcode.get(error.errno or 0, "EIO")
            return {"error": "file", "errno": name, "message": os.strerror(error.errno or 5)}

    def _stats(self, seat: Seat, _message: dict[str, Any], _fds: list[int]) -> dict[str, Any]:
        for template in self.templates.values():
            template.cost = template.cost or guests.private_bytes(template.pid)
        return {
            "snapshots": len(self.templates),
            "snapshot_bytes": sum(t.cost for t in self.templates.values()),
            "layers": len(self.layers),
            "depth": max(len(mount.stack) for mount in seat.guest.mounted.values()),
            "spares": sum(t.spare is not None for t in self.templates.values()),
            "processes": len(guests.others()),
        }

    def _spare(self, _seat: Seat, message: dict[str, Any], _fds: list[int]) -> dict[str, Any]:
        template = self._known(message.get("snapshot"))
        if template.spare is None:
            template.spare = guests.fork(self.home, self.layers, template)
        return {"spare": template.number}

    _HANDLERS: dict[str, Callable[..., dict[str, Any] | None]] = {  # noqa: RUF012
        "python": _run, "shell": _run, "snapshot": _snapshot, "rollback": _rollback, "branch": _make_branch,
        "drop": _drop, "spare": _spare, "stats": _stats, "read_file": _file, "write_file": _file, "list": _file,
    }  # fmt: skip

    # in spare time

    def _has_chores(self) -> bool:
        return bool(self._wanted or self._unmeasured or self.layers.chores or self._not_looked())

    def _not_looked(self) -> Seat | None:
        return next((s for s in self.seats.values() if s.running is None and s.plain is None), None)

    def _chore(self) -> None:
        """One piece of work that nobody waits for."""
        seat = self._not_looked()
        if seat is not None:
            seat.plain = guests.is_plain(seat.guest, self._pids())
        elif self._wanted:
            template = self.templates.get(self._wanted.pop())
            if template is not None and template.spare is None and not template.refused:
                self._make_room_for_spare()
                template.spare = guests.fork(self.home, self.layers, template)
        elif self._unmeasured:
            template = self.templates.get(self._unmeasured.pop())
            if template is not None:
                if template.lineage > RENEW_ABOVE:
                    guests.renew(template)
                template.cost = guests.private_bytes(template.pid)
            self._make_room()
        else:
            self.layers.chore()

    def _make_room_for_spare(self) -> None:
        spared = sorted((t for t in self.templates.values() if t.spare), key=lambda t: t.used)
        for template in spared[: max(0, len(spared) + 1 - self.limits["spares"])]:
            spare, template.spare = template.spare, None
            if spare is not None:
                guests.end(self.layers, spare, self._pids())

    def _make_room(self) -> None:
        """Let the least valuable snapshots go while there are too many, or they hold too much memory."""
        while len(self.templates) > 1:
            held = sum(t.cost for t in self.templates.values())
            if len(self.templates) <= self.limits["snapshots"] and held <= self.limits["snapshot_memory"]:
                return
            here = {seat.at for seat in self.seats.values()} | {PRISTINE}
            free = [t for t in self.templates.values() if t.number not in here]
            if not free:
                return
            worst = min(free, key=lambda t: (t.hot, t.used))
            del self.templates[worst.number]
            guests.end_template(self.layers, worst, self._pids())

    def _reap(self) -> None:
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass

    # signals between guests

    def _signal_asked(self, listener: int) -> None:
        asked = filter.next_question(listener)
        if asked is None:
            return
        mark, sender, _number, arguments = asked
        target = _signed(arguments[0])
        seat = next((s for s in self.seats.values() if sender in self._branch(s)), None)
        allowed = self._branch(seat) if seat is not None else []
        if target == -1:
            signal_number = _signed(arguments[1])
            for pid in allowed:
                if pid != sender and signal_number:
                    with contextlib.suppress(OSError):
                        os.kill(pid, signal_number)
            filter.answer(listener, mark, None, done=True)
        elif target == 0 or target in allowed or (target < -1 and self._own_group(-target, allowed)):
            filter.answer(listener, mark, None)
        elif target > 0 and self._thread_of(target, sender):
            filter.answer(listener, mark, None)
        else:
            filter.answer(listener, mark, errno.ESRCH)

    def _own_group(self, group: int, allowed: list[int]) -> bool:
        members = [pid for pid in guests.others() if _group_of(pid) == group]
        return bool(members) and all(pid in allowed for pid in members)

    def _thread_of(self, thread: int, sender: int) -> bool:
        return os.path.exists(f"/proc/{sender}/task/{thread}")


def _group_of(pid: int) -> int:
    try:
        return os.getpgid(pid)
    except OSError:
        return -1


def _signed(value: int) -> int:
    value &= 0xFFFFFFFF
    return value - (1 << 32) if value >= 1 << 31 else value


def _cpu_of(pid: int) -> float:
    try:
        parts = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(parts[11]) + int(parts[12])) / os.sysconf("SC_CLK_TCK")
    except (OSError, IndexError):
        return 0.0


def _resident(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096
    except (OSError, IndexError):
        return 0


def _rlimits(limits: dict[str, Any]) -> list[tuple[int, int]]:
    return [
        (resource.RLIMIT_AS, max(4 * limits["memory"], 4 << 30)),
        (resource.RLIMIT_NPROC, limits["pids"] + limits["snapshots"] + limits["spares"] + 8),
        (resource.RLIMIT_NOFILE, 1024),
        (resource.RLIMIT_CORE, 0),
    ]

