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
import selectors
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import files, guestroot, guests, kernel, processes, signals
from .calls import LOOK_EVERY_S, Call, Calls
from .layers import Layers
from .tree import NO_ROOM, PRISTINE, Tree
from .wire import WireError, receive, send

GUEST = 1000
"""The guest's user and group number, as seen inside."""

CHORES_AFTER_S = 0.005


class Mistake(Exception):
    """A request that cannot be met: `code` and words for the caller."""

    def __init__(self, code: str, message: str, **more: Any) -> None:
        super().__init__(message)
        self.reply = {"error": code, "message": message, **more}


@dataclass
class Seat:
    """One connection from outside, the guest behind it, and what is known of that guest's state."""

    connection: socket.socket
    guest: guests.Guest
    at: int | None = None  # the snapshot it is equal to; None: changed since
    plain: bool | None = None  # whether it holds nothing that a fork would share; None: not looked yet
    call: Call | None = None


def serve(config: dict[str, Any], control: socket.socket, owner: int, workspace: int) -> None:
    """Build the box and serve it until it is over. Tells the first seat "ready", or what went wrong."""
    try:
        supervisor = Supervisor(config, control, owner, workspace)
    except (OSError, guests.GuestGone, guests.Refused, guests.NotPlain) as error:
        send(control, {"error": "not_isolated", "message": str(error)})
        return
    send(control, {"ready": 1})
    supervisor.loop()


class Supervisor:
    """The state of one box."""

    def __init__(self, config: dict[str, Any], control: socket.socket, owner: int, workspace: int) -> None:
        room, limits = Path("/tmp"), config["limits"]
        size = f"size={limits['files']},nr_inodes={limits['inodes']}"
        hidden = guestroot.build(room, workspace, tuple(config["visible"]), config["network"], size, GUEST)
        # this process's own /proc: numbers of this box
        kernel.mount("proc", "/proc", "proc", kernel.NO_SUID | kernel.NO_DEV | kernel.NO_EXEC)
        home = guests.Home(os.open("/proc/self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC), room, GUEST, hidden)
        layers = Layers(room / "layers")
        self.tree = Tree(home, layers, limits)
        guest, listener = guests.start(home, layers, config["command"], config["environment"], _rlimits(limits))
        self.seats: dict[int, Seat] = {}
        self.selector = selectors.DefaultSelector()
        self.selector.register(owner, selectors.EVENT_READ, lambda _fd: os._exit(0))
        self.selector.register(listener, selectors.EVENT_READ, lambda fd: signals.decide(fd, self._branch_of))
        self.calls = Calls(self.selector, limits["memory"], self._branch)
        seat = self._open(control, guest)
        seat.at = self._freeze(seat).number

    def loop(self) -> None:
        """Serve until the last seat is closed."""
        while self.seats:
            chores = self.tree.chores or self._not_looked() is not None
            events = self.selector.select(CHORES_AFTER_S if chores else LOOK_EVERY_S if self.calls else 5.0)
            for key, _ in events:
                if key.fd in self.selector.get_map():
                    key.data(key.fd)
            self.calls.look_after()
            self.tree.reap()
            if not events:
                with contextlib.suppress(OSError, guests.GuestGone):  # no room, say: who needs it done will be told
                    self._chore()

    def _chore(self) -> None:
        seat = self._not_looked()
        if seat is not None:
            seat.plain = guests.is_plain(seat.guest, self.tree.pids())
        else:
            self.tree.chore({seat.at for seat in self.seats.values()})

    def _not_looked(self) -> Seat | None:
        waiting = (s for s in self.seats.values() if s.call is None and not s.guest.ended)
        return next((s for s in waiting if s.plain is None), None)

    # seats

    def _open(self, connection: socket.socket, guest: guests.Guest) -> Seat:
        connection.settimeout(60.0)
        seat = self.seats[connection.fileno()] = Seat(connection, guest)
        self.tree.live.add(guest.pid)
        self.selector.register(connection, selectors.EVENT_READ, self._request)
        return seat

    def _close(self, seat: Seat) -> None:
        if seat.call is not None:
            self.calls.forget(seat.call)
        self.selector.unregister(seat.connection)
        del self.seats[seat.connection.fileno()]
        seat.connection.close()
        self.tree.end(seat.guest)

    def _request(self, fd: int) -> None:
        seat = self.seats[fd]
        try:
            message, fds = receive(seat.connection)
        except WireError:
            self._close(seat)
            return
        reply = self._answer(seat, message, fds)
        for other in fds:
            os.close(other)
        if reply is not None:
            self._tell(seat, reply)

    def _answer(self, seat: Seat, message: dict[str, Any], fds: list[int]) -> dict[str, Any] | None:
        self.tree.let_go(message.get("unwanted", ()))
        handler = self._HANDLERS.get(str(message.get("op")))
        try:
            if handler is None:
                raise Mistake("unknown_request", f"no request {message.get('op')!r}")
            if seat.call is not None:
                raise Mistake("busy", "a call is still running here")
            if seat.guest.ended and message["op"] not in ("rollback", "branch", "drop", "prepare"):
                raise Mistake("guest_gone", "nothing runs in this branch any more: roll back to a snapshot")
            return handler(self, seat, message, fds)
        except Mistake as mistake:
            return mistake.reply
        except guests.GuestGone as gone:
            return {"error": "guest_gone", "message": str(gone)}
        except OSError as error:
            return {"error": "full" if error.errno in NO_ROOM else "box_failed", "message": str(error)}

    def _tell(self, seat: Seat, reply: dict[str, Any]) -> None:
        try:
            send(seat.connection, reply)
        except WireError:
            self._close(seat)

    def _branch(self, guest: guests.Guest) -> list[int]:
        return [guest.pid, *processes.started_by(guest.pid, self.tree.pids())]

    def _branch_of(self, pid: int) -> list[int]:
        branches = (self._branch(seat.guest) for seat in self.seats.values())
        return next((branch for branch in branches if pid in branch), [])

    # requests

    def _run(self, seat: Seat, message: dict[str, Any], _fds: list[int]) -> None:
        was = seat.at if seat.plain and message["op"] != "python" else None
        seat.at = seat.plain = None
        guest, known = seat.guest, len(self.tree.pids())
        processes.allow(guest.pid, self.tree.limits["pids"] + known)
        guest.lowered = guest.lowered or processes.lower(guest.pid)
        try:
            seat.call = self.calls.start(seat.guest, message, lambda told: self._ran(seat, told, was))
        except WireError as error:
            self._restart_from(seat, self.tree.templates[PRISTINE])
            raise guests.GuestGone(f"the interpreter is gone ({error}); a fresh one has been started") from error

    def _ran(self, seat: Seat, told: dict[str, Any], was: int | None) -> None:
        """A call is over; `was`: the snapshot that its guest was equal to, with nothing that a program could reach."""
        seat.call = None
        self.tree.stepped()
        if told.pop("quiet", False) and was is not None and not self._has_changed(seat):
            seat.at, seat.plain = was, True
        lost = told.pop("lost", False)
        if lost:
            try:
                self._restart_from(seat, self.tree.templates[PRISTINE])
            except (guests.GuestGone, OSError) as error:
                text = f"the interpreter is gone, and there is no fresh one ({error}): roll back to a snapshot"
                self.tree.end(seat.guest)
                self._tell(seat, {"error": "guest_gone", "message": text})
                return
        self._tell(seat, {**told, "restarted": bool(lost)})

    def _snapshot(self, seat: Seat, _message: dict[str, Any], _fds: list[int]) -> dict[str, Any]:
        if seat.at is not None and seat.at in self.tree.templates:
            self.tree.want(seat.at)
            return {"snapshot": seat.at, "same": 1}
        asked = time.perf_counter()
        try:
            template = self._freeze(seat)
        except guests.Refused as refused:
            raise Mistake("incomplete", str(refused), reasons=refused.reasons) from refused
        except guests.GuestGone:
            self._restart_from(seat, self.tree.templates[PRISTINE])
            raise
        seat.at = template.number
        return {"snapshot": template.number, "pause_us": round((template.ready - asked) * 1e6)}

    def _freeze(self, seat: Seat) -> guests.Template:
        self.tree.bound({other.at for other in self.seats.values()})
        processes.allow(seat.guest.pid, None)
        if seat.plain is None:
            seat.plain = guests.is_plain(seat.guest, self.tree.pids())
        if seat.plain:
            try:
                return self.tree.add(seat.guest, plain=True)
            except guests.NotPlain:
                seat.plain = False
        left = [pid for pid in self._branch(seat.guest)[1:] if processes.parent_of(pid) == 1]
        if left:  # its own children a guest looks for itself
            raise guests.Refused([f"the running process {pid}" for pid in left])
        return self.tree.add(seat.guest, plain=False)

    def _known(self, number: object) -> guests.Template:
        found = self.tree.templates.get(number) if isinstance(number, int) else None
        if found is None:
            raise Mistake("no_snapshot", f"there is no snapshot {number} (any more)")
        return found

    def _rollback(self, seat: Seat, message: dict[str, Any], _fds: list[int]) -> None:
        template = self._known(message.get("snapshot"))
        old = seat.guest
        self.tree.touch(template)
        seat.guest, warm = self.tree.go_back(template, old)
        seat.at, seat.plain = template.number, template.plain
        self._tell(seat, {"rolled_back": template.number, "warm": int(warm)})
        self.tree.end(old)

    def _make_branch(self, _seat: Seat, message: dict[str, Any], fds: list[int]) -> dict[str, Any]:
        if not fds:
            raise Mistake("unknown_request", "a branch needs a connection of its own")
        template = self._known(message.get("snapshot"))
        self.tree.touch(template)
        guest, warm = self.tree.go_on(template)
        seat = self._open(socket.socket(fileno=fds.pop(0)), guest)
        seat.at, seat.plain = template.number, template.plain
        return {"branched": template.number, "warm": int(warm)}

    def _restart(self, seat: Seat, message: dict[str, Any], _fds: list[int]) -> dict[str, Any]:
        wanted = message.get("snapshot")
        template = self._known(wanted if wanted is not None else PRISTINE)
        if not template.plain:
            raise Mistake("not_plain", "the interpreter of that snapshot holds open what lies in its own files")
        self._restart_from(seat, template)
        return {"restarted": 1}

    def _restart_from(self, seat: Seat, template: guests.Template) -> None:
        seat.guest = self.tree.go_on_with_files(template, seat.guest)
        seat.at, seat.plain = None, True

    def _drop(self, _seat: Seat, message: dict[str, Any], _fds: list[int]) -> dict[str, Any]:
        return {"dropped": sum(self.tree.remove(number) for number in message["snapshots"])}

    def _prepare(self, _seat: Seat, message: dict[str, Any], _fds: list[int]) -> dict[str, Any]:
        template = self._known(message.get("snapshot"))
        self.tree.prepare(template)
        return {"prepared": template.number}

    def _file(self, seat: Seat, message: dict[str, Any], _fds: list[int]) -> dict[str, Any]:
        if message["op"] == "write_file":
            seat.at = None
        try:
            return files.serve({name: mount.fd for name, mount in seat.guest.mounted.items()}, message, GUEST)
        except OSError as error:
            return {
                "error": "file",
                "errno": error.errno or errno.EIO,
                "message": os.strerror(error.errno or errno.EIO),
            }

    def _changed(self, seat: Seat, _message: dict[str, Any], _fds: list[int]) -> dict[str, Any]:
        return {"changed": int(self._has_changed(seat))}

    def _has_changed(self, seat: Seat) -> bool:
        written = any(self.tree.layers.changed(name, mount) for name, mount in seat.guest.mounted.items())
        return written or len(self._branch(seat.guest)) > 1

    def _stats(self, seat: Seat, _message: dict[str, Any], _fds: list[int]) -> dict[str, Any]:
        templates = self.tree.templates.values()
        return {
            "snapshots": len(templates),
            "snapshot_bytes": self.tree.measured(),
            "layers": len(self.tree.layers),
            "depth": max(len(mount.stack) for mount in seat.guest.mounted.values()),
            "spares": sum(t.spare is not None for t in templates),
            "processes": len(processes.others()),
        }

    _HANDLERS: dict[str, Callable[..., dict[str, Any] | None]] = {  # noqa: RUF012
        "python": _run, "fresh": _run, "shell": _run, "snapshot": _snapshot, "rollback": _rollback,
        "branch": _make_branch, "drop": _drop, "prepare": _prepare, "restart": _restart, "stats": _stats,
        "changed": _changed,
        "read_file": _file, "write_file": _file, "list": _file,
    }  # fmt: skip


def _rlimits(limits: dict[str, Any]) -> list[tuple[int, int]]:
    processes = limits["pids"] + limits["snapshots"] + limits["spares"] + 8  # frozen copies count too
    return [
        (resource.RLIMIT_AS, max(4 * limits["memory"], 4 << 30)),
        (resource.RLIMIT_NPROC, processes),
        (resource.RLIMIT_NOFILE, 1024),
        (resource.RLIMIT_CORE, 0),
    ]
