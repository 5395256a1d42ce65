"""The tree of snapshots: frozen copies, what they cost, who stands ready to go on from them, and who has to go.

Runs in the supervisor. Always true: a snapshot that is in `templates` is whole; memory is bounded by what was measured;
what nobody waits for (spares, merging, measuring, deleting) is done by `chore`, a piece at a time.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from . import guests, processes
from .guests import Guest, Home, Template
from .layers import Layers

PRISTINE = 0
"""The number of the first snapshot: a fresh interpreter on the user's files."""

MOST_UNWANTED = 64
"""Snapshots without a handle that may wait for spare time to go."""

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EAGAIN, errno.ENOMEM)
REAP_SECONDS = 2.0

RENEW_ABOVE = 10
"""Forks in a row before a frozen copy gets pages of its own."""


class Tree:
    """The snapshots of one box, by number, and the live guests' process numbers."""

    def __init__(self, home: Home, layers: Layers, limits: dict[str, Any]) -> None:
        self.home, self.layers, self.limits = home, layers, limits
        self.templates: dict[int, Template] = {}
        self.live: set[int] = set()
        self.dying: set[int] = set()  # killed, and not reaped yet
        self._next = PRISTINE
        self._wanted: list[int] = []
        self._unmeasured: list[int] = []
        self._unwanted: list[int] = []

    def pids(self) -> set[int]:
        """Guests, spares and frozen copies, those included that are just ending."""
        spares = {t.spare.pid for t in self.templates.values() if t.spare is not None}
        return {t.pid for t in self.templates.values()} | self.live | self.dying | spares

    def add(self, guest: Guest, plain: bool) -> Template:
        """Freeze a guest. Raises `Refused`, `NotPlain`, `GuestGone`, `OSError`."""
        template = guests.freeze(self.home, self.layers, guest, self._next, plain)
        if template.refused:
            self.dying.add(template.pid)
            guests.end_template(self.layers, template, self.pids())
            raise guests.Refused(template.refused)
        self._next += 1
        self.templates[template.number] = template
        self._unmeasured.append(template.number)
        return template

    def remove(self, number: int) -> bool:
        """Let a snapshot go; False where there is none, or it is the first one."""
        template = self.templates.pop(number, None) if number != PRISTINE else None
        if template is None:
            return False
        self.dying.add(template.pid)
        guests.end_template(self.layers, template, self.pids())
        return True

    def let_go(self, numbers: Iterable[int]) -> None:
        """Nobody has a handle to these any more: they go in spare time, and at once where that does not come."""
        self._unwanted += numbers
        while len(self._unwanted) > MOST_UNWANTED:
            self.remove(self._unwanted.pop(0))

    def want(self, number: int) -> None:
        """Somebody has a handle to this one again."""
        self._unwanted = [other for other in self._unwanted if other != number]

    def touch(self, template: Template) -> None:
        """It is gone back to: worth keeping, and, the second time, a copy that stands ready."""
        template.used = time.monotonic()
        template.hot += 1
        if template.hot > 1 and self.limits["spares"] and template.number not in self._wanted:
            self._wanted.append(template.number)

    def go_on(self, template: Template) -> tuple[Guest, bool]:
        """A live guest that goes on from a snapshot, and whether it stood ready. Raises `GuestGone`, `OSError`."""
        guest, template.spare = template.spare, None
        warm = guest is not None
        if guest is None:
            guest = guests.fork(self.home, self.layers, template)
        self.live.add(guest.pid)
        return guest, warm

    def go_on_with_files(self, template: Template, guest: Guest) -> Guest:
        """The interpreter of a plain snapshot with the files of `guest`, which then ends. Raises `GuestGone`,
        `OSError`.
        """
        mounts = guest.mounted.items()
        stacks = {name: self.layers.short(name, (*mount.stack, mount.layer)) for name, mount in mounts}
        self.layers.hold(stacks.values())
        try:
            made = self._fork_in_place_of(guest, replace(template, stacks=stacks))
        finally:
            self.layers.release(stacks.values())
        self.live.add(made.pid)
        self.end(guest)
        return made

    def go_back(self, template: Template, guest: Guest) -> tuple[Guest, bool]:
        """A guest that goes on from a snapshot in the place of `guest`, which is ended first where there is no room for
        both and by the caller otherwise; and whether it stood ready. Raises `GuestGone`, `OSError`.
        """
        if template.spare is not None:
            return self.go_on(template)
        made = self._fork_in_place_of(guest, template)
        self.live.add(made.pid)
        return made, False

    def _fork_in_place_of(self, guest: Guest, template: Template) -> Guest:
        try:
            return guests.fork(self.home, self.layers, template)
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise
        self.end(guest)
        while self.layers.chores:
            self.layers.chore()
        deadline = time.monotonic() + REAP_SECONDS
        while True:  # who was killed counts until it is reaped
            self.reap()
            try:
                return guests.fork(self.home, self.layers, template)
            except OSError as error:
                if error.errno not in NO_ROOM or time.monotonic() > deadline:
                    raise
                time.sleep(0.005)

    def reap(self) -> None:
        """Take note of who has ended."""
        with contextlib.suppress(ChildProcessError):
            while pid := os.waitpid(-1, os.WNOHANG)[0]:
                self.dying.discard(pid)

    def end(self, guest: Guest) -> None:
        """A live guest, and all that its branch runs, ends."""
        self.live.discard(guest.pid)
        self.dying.add(guest.pid)
        guests.end(self.layers, guest, self.pids())

    def prepare(self, template: Template) -> None:
        """Have a copy stand ready. Raises `GuestGone`, `OSError`."""
        if template.spare is None:
            self._make_room_for_spare()
            template.spare = guests.fork(self.home, self.layers, template)

    def measured(self) -> int:
        """Bytes that only the frozen copies hold."""
        for template in self.templates.values():
            template.cost = template.cost or processes.private_bytes(template.pid)
        return sum(template.cost for template in self.templates.values())

    @property
    def chores(self) -> bool:
        """Whether there is work that nobody waits for."""
        return bool(self._wanted or self._unmeasured or self._unwanted or self.layers.chores)

    def chore(self, in_use: set[int | None]) -> None:
        """One piece of it. `in_use`: snapshots that seats stand at. Raises `GuestGone`, `OSError`."""
        if self._wanted:
            template = self.templates.get(self._wanted.pop())
            if template is not None:
                self.prepare(template)
        elif self._unmeasured:
            template = self.templates.get(self._unmeasured.pop())
            if template is not None:
                if template.lineage > RENEW_ABOVE:
                    self.dying.add(template.pid)
                    guests.renew(template)
                    self.dying.discard(template.pid)
                template.cost = processes.private_bytes(template.pid)
            self._make_room(in_use)
        elif self._unwanted:
            self.remove(self._unwanted.pop(0))
        else:
            self.layers.chore()

    def _make_room_for_spare(self) -> None:
        spared = sorted((t for t in self.templates.values() if t.spare), key=lambda t: t.used)
        for template in spared[: max(0, len(spared) + 1 - self.limits["spares"])]:
            spare, template.spare = template.spare, None
            if spare is not None:
                self.end(spare)

    def bound(self, in_use: set[int | None]) -> None:
        """Keep to the number of snapshots where no spare time comes."""
        if len(self.templates) > self.limits["snapshots"]:
            self._make_room(in_use)

    def _make_room(self, in_use: set[int | None]) -> None:
        """Let the least valuable snapshots go while there are too many, or they hold too much memory."""
        while len(self.templates) > 1:
            held = sum(t.cost for t in self.templates.values())
            if len(self.templates) <= self.limits["snapshots"] and held <= self.limits["snapshot_memory"]:
                return
            free = [t for t in self.templates.values() if t.number not in in_use and t.number != PRISTINE]
            if not free:
                return
            self.remove(min(free, key=lambda t: (t.hot, t.used)).number)
