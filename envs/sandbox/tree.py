"""The tree of snapshots: frozen copies, what they cost, who stands ready to go on from them, and who has to go.

Runs in the supervisor. Always true: a snapshot that is in `templates` is whole; what nobody waits for (spares, merging,
measuring, deleting) is done by `chore`, a piece at a time.

Memory that only frozen copies hold grows after a snapshot, as the guest rewrites what it shares with them: some
processes are weighed again after each step, and all of them before any snapshot goes for its memory.
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
from .processes import Weight

PRISTINE = 0
"""The number of the first snapshot: a fresh interpreter on the user's files."""

MOST_UNWANTED = 64
"""Snapshots without a handle that may wait for spare time to go."""

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EAGAIN, errno.ENOMEM)
REAP_SECONDS = 2.0
MOST_DYING = 4
"""Killed processes that may take room from a snapshot; on a busy machine it takes a while until they are gone."""

RENEW_ABOVE = 10
"""Forks in a row before a frozen copy gets pages of its own."""

LOOKS = 4
"""Processes weighed in the spare time after a step, those first that were not weighed for longest."""

HALF_LIFE = 64
"""Snapshots and rollbacks after which what a snapshot was worth counts half."""


class Tree:
    """The snapshots of one box, by number, and the live guests' process numbers."""

    def __init__(self, home: Home, layers: Layers, limits: dict[str, Any]) -> None:
        self.home, self.layers, self.limits = home, layers, limits
        self.templates: dict[int, Template] = {}
        self.live: set[int] = set()
        self.dying: set[int] = set()  # killed, and not reaped yet
        self._next = PRISTINE
        self._wanted: list[int] = []
        self._made: list[int] = []
        self._unwanted: list[int] = []
        self._uses = 0
        self._weights: dict[int, Weight] = {}  # by process, in the order of weighing
        self._looks = 0  # how many are still to be weighed
        self._all_weighed = False  # whether those are all

    def pids(self) -> set[int]:
        """Guests, spares and frozen copies, those included that are just ending."""
        spares = {t.spare.pid for t in self.templates.values() if t.spare is not None}
        return {t.pid for t in self.templates.values()} | self.live | self.dying | spares

    def add(self, guest: Guest, plain: bool) -> Template:
        """Freeze a guest. Raises `Refused`, `NotPlain`, `GuestGone`, `OSError`."""
        template = guests.freeze(self.home, self.layers, guest, self._next, plain, self.pids())
        if template.refused:
            self.dying.add(template.pid)
            guests.end_template(self.layers, template, self.pids())
            raise guests.Refused(template.refused)
        self._next += 1
        self.templates[template.number] = template
        self._made.append(template.number)
        template.used = self._use()
        self.stepped()
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
        template.hot = self._worth(template)
        template.used = self._use()
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

    def _use(self) -> int:
        self._uses += 1
        return self._uses

    def _worth(self, template: Template) -> float:
        """One for its making and one for each time it was gone back to, fading."""
        return float((1 + template.hot) * 0.5 ** ((self._uses - template.used) / HALF_LIFE))

    def stepped(self) -> None:
        """A guest has done something: what the frozen copies hold may have grown."""
        self._looks = max(self._looks, LOOKS)

    def measured(self) -> int:
        """Bytes that only the frozen copies, and spares, hold; all processes are weighed anew."""
        for pid in self._present():
            self._weigh(pid)
        return self._held()

    def _present(self) -> list[int]:
        """All processes of the box; the weights of others are forgotten."""
        present = [pid for pid in processes.others() if pid not in self.dying]
        for gone in self._weights.keys() - set(present):
            del self._weights[gone]
        return present

    def _weigh(self, pid: int) -> None:
        self._weights.pop(pid, None)
        self._weights[pid] = processes.weight(pid)

    def _held(self) -> int:
        """Bytes, by the last weights: all that is there, less what runs holds (exact while one guest runs, and an upper
        bound when there are more).
        """
        kept = {t.pid for t in self.templates.values()} | {t.spare.pid for t in self.templates.values() if t.spare}
        running = [weight for pid, weight in self._weights.items() if pid not in kept]
        alone, shared = sum(w.private for w in running), max((w.whole - w.private for w in running), default=0)
        return max(0, sum(w.share for w in self._weights.values()) - alone - shared)

    def _look(self, in_use: set[int | None]) -> None:
        """Weigh one process; with the last one, let snapshots go if they hold too much and all weights are new."""
        present = self._present()
        order = {pid: at for at, pid in enumerate(self._weights)}
        self._weigh(min(present, key=lambda pid: order.get(pid, -1)))
        self._looks -= 1
        if self._looks > 0 or self._held() <= self.limits["snapshot_memory"]:
            return
        if not self._all_weighed or self._make_room_in_memory(in_use):
            self._looks, self._all_weighed = len(present), True
            return
        self._all_weighed = False

    @property
    def chores(self) -> bool:
        """Whether there is work that nobody waits for."""
        return bool(self._wanted or self._made or self._unwanted or self.layers.chores or self._looks)

    def chore(self, in_use: set[int | None]) -> None:
        """One piece of it. `in_use`: snapshots that seats stand at. Raises `GuestGone`, `OSError`."""
        if self._wanted:
            template = self.templates.get(self._wanted.pop())
            if template is not None:
                self.prepare(template)
        elif self._made:
            template = self.templates.get(self._made.pop())
            if template is not None and template.lineage > RENEW_ABOVE:
                self.dying.add(template.pid)
                guests.renew(template)
                self.dying.discard(template.pid)
            self._make_room(in_use)
        elif self._unwanted:
            self.remove(self._unwanted.pop(0))
        elif self.layers.chores:
            self.layers.chore()
        else:
            self._look(in_use)

    def _make_room_for_spare(self) -> None:
        spared = sorted((t for t in self.templates.values() if t.spare), key=lambda t: t.used)
        for template in spared[: max(0, len(spared) + 1 - self.limits["spares"])]:
            spare, template.spare = template.spare, None
            if spare is not None:
                self.end(spare)

    def bound(self, in_use: set[int | None]) -> None:
        """Keep to the number of snapshots where no spare time comes; those killed count until they are reaped."""
        if len(self.templates) > self.limits["snapshots"]:
            self._make_room(in_use)
        deadline = time.monotonic() + REAP_SECONDS
        while len(self.dying) > MOST_DYING and time.monotonic() < deadline:
            time.sleep(0.001)
            self.reap()

    def _make_room(self, in_use: set[int | None]) -> None:
        """Let the least valuable snapshots go while there are too many."""
        while len(self.templates) > self.limits["snapshots"] and (free := self._free(in_use)):
            self.remove(min(free, key=lambda t: (self._worth(t), t.used)).number)

    def _make_room_in_memory(self, in_use: set[int | None]) -> bool:
        """Let those go that are worth least for what they weigh, by the last weights; whether there was one."""
        over = self._held() - self.limits["snapshot_memory"]
        free = self._free(in_use)
        free.sort(key=lambda t: (self._worth(t) / max(self._share(t), 1), t.used), reverse=True)
        gone = False
        while over > 0 and free:
            template = free.pop()
            over -= max(self._share(template), 1)
            gone = self.remove(template.number)
        return gone

    def _share(self, template: Template) -> int:
        pids = [template.pid, *([template.spare.pid] if template.spare else [])]
        return sum(self._weights[pid].share for pid in pids if pid in self._weights)

    def _free(self, in_use: set[int | None]) -> list[Template]:
        return [t for t in self.templates.values() if t.number not in in_use and t.number != PRISTINE]
