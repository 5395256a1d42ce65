"""Guest processes, as the supervisor handles them: started, frozen, forked, ended.

Runs in the supervisor. Nothing that a guest says is believed further than itself: process numbers are checked against
the kernel's own account, replies are bounded JSON, and a guest that does not keep to the handshake is killed. Every
wait here has a deadline.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import socket
import time
from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import filter, guestroot, kernel, maps, processes
from .layers import VOLUMES, Layers, Mounted, Stacks
from .wire import DONE, FORK, FREEZE, NOT_PLAIN, RENEW, WireError, encode, receive, send

HANDSHAKE_SECONDS = 10.0
MOST_OF_GUEST = 1 << 16
MOST_ROUNDS = 1000
NICE = 5
"""How far guests rank below the orchestrator."""
_CATCHABLE = signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}


class Refused(Exception):
    """A state cannot be kept whole; `reasons` says why."""

    def __init__(self, reasons: list[str]) -> None:
        super().__init__("; ".join(reasons))
        self.reasons = reasons


class NotPlain(Exception):
    """A guest has something to carry over after all (a timer)."""


class GuestGone(Exception):
    """A guest process ended, hung or broke the protocol."""


@dataclass
class Guest:
    """A process that runs an agent's code (or is ready to), and the layer that it writes."""

    pid: int
    connection: socket.socket
    mounted: Mounted
    namespace: int  # a descriptor of its mount namespace
    lineage: int = 0  # forks between it and the last process with pages of its own
    ended: bool = False
    lowered: bool = False  # whether its session ranks below others


@dataclass
class Template:
    """A frozen copy, and the frozen layers that belong to it."""

    number: int
    pid: int
    connection: socket.socket
    stacks: Stacks
    plain: bool  # whether there is nothing to carry over but the working directory
    used: int = 0  # when it was last made or gone back to, in such events
    ready: float = 0.0  # when the guest could go on after it
    lineage: int = 0
    hot: float = 0.0  # how often it was gone back to, long ago counting less
    spare: Guest | None = None
    refused: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Home:
    """The supervisor's own place: its mount namespace, and where a box's files are."""

    namespace: int
    room: Path
    guest: int
    hidden: tuple[tuple[int, str], ...] = ()  # folders that a volume hides, and where guests see them all the same


def start(
    home: Home,
    layers: Layers,
    command: list[str],
    environment: Mapping[str, str],
    limits: list[tuple[int, int]],
) -> tuple[Guest, int]:
    """The first guest, and the descriptor on which its signals are decided. Raises `OSError`, `GuestGone`."""
    mounted = layers.mount(dict.fromkeys(VOLUMES, ()))
    ours, theirs = _pair()
    pid = os.fork()
    if pid == 0:
        _become(home, theirs, command, environment, limits)
    theirs.close()
    message, fds = _heard(ours)
    if "error" in message or not fds:
        raise GuestGone(str(message.get("error", "the first process did not start")))
    told, _ = _heard(ours)
    if "ready" not in told:
        raise GuestGone(f"the interpreter did not start: {told.get('error', '')}")
    space = _namespace(pid)  # not before its exec, which makes the process one of this user namespace
    guest = Guest(pid, ours, mounted, space)
    _attach(home, guest, mounted)
    send(ours, {"op": "moved"})
    return guest, fds[0]


def _become(
    home: Home,
    connection: socket.socket,
    command: list[str],
    environment: Mapping[str, str],
    limits: list[tuple[int, int]],
) -> None:
    """In the first guest process: everything that holds it in, then its interpreter. Never returns."""
    try:
        os.setsid()
        os.nice(NICE)
        guestroot.enter(home.room, home.guest)
        for which, value in limits:
            resource.setrlimit(which, (value, value))
        kernel.restrict_mounting()
        listener = filter.install()
        send(connection, {"listener": 1}, (listener,))
        os.close(listener)
        nothing = os.open("/dev/null", os.O_RDWR)
        for stream in range(3):
            os.dup2(nothing, stream)
        os.dup2(connection.detach(), 3)
        connection = socket.socket(fileno=3)
        os.closerange(4, 4096)
        os.set_inheritable(3, True)
        for number in _CATCHABLE:  # a background job ignores SIGINT, and exec hands that down
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        os.execve(command[0], command, dict(environment))
    except BaseException as error:
        with contextlib.suppress(WireError, OSError):
            send(connection, {"error": f"{type(error).__name__}: {error}"})
    os._exit(1)


def is_plain(guest: Guest, known: Container[int]) -> bool:
    """Whether a waiting guest holds nothing that a fork would share: one thread, no child, no descriptor but its
    streams on /dev/null and its socket, no shared memory, no timer.
    """
    here = f"/proc/{guest.pid}"
    try:
        if processes.started_by(guest.pid, known) or processes.children_of(guest.pid):
            return False
        if len(os.listdir(f"{here}/task")) != 1:
            return False
        links = [os.readlink(f"{here}/fd/{fd}") for fd in os.listdir(f"{here}/fd")]
        if sorted(links)[:3] != ["/dev/null"] * 3 or len(links) != 4:
            return False
        if Path(f"{here}/timers").exists() and Path(f"{here}/timers").read_bytes():
            return False
        return not maps.shared(f"{here}/maps")
    except OSError:
        return False


def freeze(home: Home, layers: Layers, guest: Guest, number: int, plain: bool, known: Container[int]) -> Template:
    """Leave a frozen copy of `guest`, which goes on in new layers where it had written to its own. `known`: guests and
    frozen copies; the guest's branch has no other process whose parent is gone. Raises `Refused` (it goes on as it
    was), `GuestGone`.
    """
    connection = guest.connection
    ours, theirs = _pair()
    with theirs:
        _ask(connection, FREEZE if plain else encode({"op": "freeze"}), theirs)
    written = {name: mount for name, mount in guest.mounted.items() if layers.changed(name, mount) or not plain}
    stacks = {name: mount.stack for name, mount in guest.mounted.items()}
    stacks |= {name: layers.short(name, (*mount.stack, mount.layer)) for name, mount in written.items()}
    fresh, no_room = _mounted(layers, {name: stacks[name] for name in written})  # while the guest forks
    try:
        told, _ = _heard(connection)
        if told.get("op") == NOT_PLAIN:
            raise NotPlain
        if told.get("op") != DONE:
            raise Refused(_reasons(told))
        if not plain and (frozen := _heard(ours)[0]).get("op") != "frozen":
            raise GuestGone("its copy failed: " + "; ".join(_reasons(frozen)))
        pid = _newborn(known, guest)
        if no_room is not None:
            _go_on_without(guest, pid, plain)
            raise Refused([f"no room for another layer ({no_room.strerror})"])
        _attach(home, guest, fresh)
    except (Refused, NotPlain, GuestGone):
        layers.drop(fresh)
        ours.close()  # a copy that was made ends with it
        raise
    except OSError as error:  # it may see a part of its new layers by now
        layers.drop(fresh)
        ours.close()
        raise GuestGone(f"its new layers could not be attached ({error})") from error
    guest.mounted = {**guest.mounted, **fresh}
    ready = time.perf_counter()
    layers.hold(stacks.values())
    template = Template(number, pid, ours, stacks, plain, lineage=guest.lineage + 1)
    template.ready = ready
    if not plain:
        _ask(connection, encode({"op": "moved"}))
        told, _ = _heard(connection)
        template.ready = time.perf_counter()
        if told.get("op") != "ready":
            template.refused = _reasons(told)
    try:
        layers.freeze(written)
    except OSError:
        template.refused.append("a file or a mapping was still open for writing in what was to be frozen")
    layers.drop(written)
    return template


def _mounted(layers: Layers, stacks: Stacks) -> tuple[Mounted, OSError | None]:
    """Fresh layers, or why there are none: the handshake that is under way is finished all the same."""
    try:
        return layers.mount(stacks), None
    except OSError as error:
        return {}, error


def _go_on_without(guest: Guest, copy: int, plain: bool) -> None:
    """Its frozen copy ends, and the guest goes on in the layers that it has."""
    processes.kill(copy)
    with contextlib.suppress(ChildProcessError):
        os.waitpid(copy, 0)
    if not plain:
        _ask(guest.connection, encode({"op": "moved"}))
        if (told := _heard(guest.connection)[0]).get("op") != "ready":
            raise GuestGone("; ".join(_reasons(told)))


def fork(home: Home, layers: Layers, template: Template) -> Guest:
    """A guest that goes on from `template`, in layers of its own. Raises `GuestGone`, `OSError`."""
    ours, theirs = _pair()
    with theirs:
        _ask(template.connection, FORK, theirs)
    mounted: Mounted = {}
    try:
        mounted = layers.mount({name: layers.short(name, stack) for name, stack in template.stacks.items()})
        pid = _told_number(ours)
        guest = Guest(pid, ours, mounted, _namespace(pid), template.lineage + 1)
        _attach(home, guest, mounted)
        if not template.plain:
            _ask(ours, encode({"op": "moved"}))
            told, _ = _heard(ours)
            if told.get("op") != "ready":
                raise GuestGone("; ".join(_reasons(told)))
    except (GuestGone, OSError):
        layers.drop(mounted)
        ours.close()  # the fork ends with it
        raise
    return guest


def renew(template: Template) -> None:
    """Put a copy with pages of its own in a frozen copy's place, so that its forks are fast again (see `renew`).

    Where that fails it stays as it is.
    """
    ours, theirs = _pair()
    try:
        with theirs:
            _ask(template.connection, RENEW, theirs)
        pid = _told_number(ours)
    except GuestGone:
        ours.close()
        return
    template.connection.close()
    processes.kill(template.pid)
    template.pid, template.connection, template.lineage = pid, ours, 0


def end(layers: Layers, guest: Guest, known: Container[int]) -> None:
    """Kill a guest and all that its branch runs; its layer is let go. `known`: guests and frozen copies. Safe to
    repeat.
    """
    if guest.ended:
        return
    guest.ended = True
    guest.connection.close()
    space = processes.namespace_of(guest.pid)
    started = processes.started_by(guest.pid, known)
    processes.kill(guest.pid)
    for _ in range(MOST_ROUNDS):  # who forks faster than it is killed is met again
        if not started:
            break
        for pid in started:
            processes.kill(pid)
        started = processes.in_namespace(space, known)
    os.close(guest.namespace)
    layers.drop(guest.mounted)


def end_template(layers: Layers, template: Template, known: Container[int]) -> None:
    """Kill a frozen copy and its spare."""
    template.connection.close()
    processes.kill(template.pid)
    if template.spare is not None:
        end(layers, template.spare, known)
        template.spare = None
    layers.release(template.stacks.values())


def _attach(home: Home, guest: Guest, mounted: Mounted) -> None:
    """Show a guest these layers, in its own mount namespace."""
    if not mounted:
        return
    hidden = [(kernel.clone_mount(fd), path) for fd, path in home.hidden] if "tmp" in mounted else []
    try:
        kernel.setns(guest.namespace, kernel.NEW_MOUNT)
        for name, mount in mounted.items():
            with contextlib.suppress(OSError):  # nothing is there yet
                kernel.unmount(VOLUMES[name])
            kernel.attach(mount.fd, VOLUMES[name])
        for fd, path in hidden:
            with contextlib.suppress(OSError):  # the guest took the place away
                kernel.attach(fd, path)
    finally:
        kernel.setns(home.namespace, kernel.NEW_MOUNT)
        for fd, _ in hidden:
            os.close(fd)


def _namespace(pid: int) -> int:
    try:
        return os.open(f"/proc/{pid}/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise GuestGone(f"the process in the box is gone ({error})") from error


def _pair() -> tuple[socket.socket, socket.socket]:
    ours, theirs = socket.socketpair()
    ours.settimeout(HANDSHAKE_SECONDS)
    return ours, theirs


def _ask(connection: socket.socket, message: bytes, handed: socket.socket | None = None) -> None:
    try:
        socket.send_fds(connection, [message], [handed.fileno()] if handed is not None else [])
    except OSError as error:
        raise GuestGone(f"the process in the box is gone ({error})") from error


def hear(connection: socket.socket, seconds: float = HANDSHAKE_SECONDS) -> tuple[dict[str, Any], list[int]]:
    """A guest's message: short, and whole within `seconds`, or not at all. Raises `WireError`."""
    try:
        return receive(connection, most=MOST_OF_GUEST, seconds=seconds)
    finally:
        if connection.fileno() >= 0:
            connection.settimeout(HANDSHAKE_SECONDS)


def _heard(connection: socket.socket) -> tuple[dict[str, Any], list[int]]:
    try:
        return hear(connection)
    except WireError as error:
        raise GuestGone(f"the process in the box is gone or hung ({error})") from error


def _told_number(connection: socket.socket) -> int:
    """The number that a new process tells, checked to be a child of this one: a guest may name any. Raises `OSError`
    for a negative one, the error that kept it from being born.
    """
    try:
        pid = int(connection.recv(8))
    except (OSError, ValueError) as error:
        raise GuestGone(f"the process in the box is gone or hangs ({error})") from error
    if -4096 < pid < 0:
        raise OSError(-pid, os.strerror(-pid))
    if pid <= 1 or processes.parent_of(pid) != 1:
        raise GuestGone("the process in the box broke the protocol")
    return pid


def _newborn(known: Container[int], guest: Guest) -> int:
    """The one child of the guest's branch that is not known: a frozen copy, whatever the guest says."""
    space = processes.namespace_of(guest.pid)
    born = [pid for pid in processes.children_of(1) if pid not in known and processes.namespace_of(pid) == space]
    if len(born) != 1:
        raise GuestGone("the process in the box broke the protocol")
    return born[0]


def _reasons(told: Mapping[str, Any]) -> list[str]:
    found = told.get("refused")
    return [str(reason)[:200] for reason in found[:20]] if isinstance(found, list) else ["unknown"]
