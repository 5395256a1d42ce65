"""Layers: what a branch has written, as overlay file systems stacked on the user's folder.

Runs in the supervisor. Always true: a layer is written by one branch, through one mount, and after `freeze` by nobody;
a stack is a tuple of frozen layers, lowest first; a layer is deleted when no stack and no branch uses it.
"""

from __future__ import annotations

import os
import shutil
import stat
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from . import kernel

VOLUMES = {"workspace": "/workspace", "tmp": "/tmp"}
"""What a guest can write to: name and where it sees it."""

MERGE_ABOVE, MERGE_TO = 20, 8
"""Layers of a stack above which the lower ones are merged in spare time, and how many are left as they are."""

MOST_LAYERS = 40
"""Layers of a stack at most: the kernel takes 255 characters for their names."""

OPAQUE = "user.overlay.opaque"

Stack = tuple[int, ...]
Stacks = dict[str, Stack]
"""Frozen layers by volume."""


@dataclass
class Mount:
    """One volume of a branch: its own layer, the frozen ones under it, and the mount (detached, or attached since)."""

    layer: int
    stack: Stack
    fd: int
    untouched: tuple[object, ...]  # how its folder looked when nothing had been written


Mounted = dict[str, Mount]
"""A branch's mounts by volume."""


class Layers:
    """All layers of a box, below `root`, which holds base/VOLUME, upper/VOLUME/NUMBER and work/VOLUME/NUMBER.

    Raises `OSError` where the kernel cannot keep layers.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._next = 0
        self._users: Counter[int] = Counter()
        self._merged: dict[Stack, int] = {}
        self._due: list[tuple[str, Stack]] = []
        self._doomed: list[int] = []
        for name in VOLUMES:
            for part in ("upper", "work"):
                (root / part / name).mkdir(parents=True)
        try:  # what marks a folder that was removed and made again
            os.setxattr(root, OPAQUE, b"y")
        except OSError as error:
            raise OSError(error.errno, "tmpfs keeps no user attributes here (it does from Linux 6.6 on)") from error

    def __len__(self) -> int:
        return len(self._users)

    def hold(self, stacks: Iterable[Stack]) -> None:
        """One more user of each layer of `stacks`."""
        for stack in stacks:
            self._users.update(stack)

    def release(self, stacks: Iterable[Stack]) -> None:
        """One user less of each; those that nobody uses any more are deleted by `chore`."""
        for layer in (layer for stack in stacks for layer in stack):
            self._users[layer] -= 1
            if self._users[layer] <= 0:
                del self._users[layer]
                self._doomed.append(layer)
        stale = [self._merged.pop(s) for s in list(self._merged) if s[-1] not in self._users]
        if stale:
            self.release([tuple(stale)])

    def mount(self, stacks: Stacks) -> Mounted:
        """A fresh layer on each of `stacks`, held together with it, and its mount (not attached anywhere yet)."""
        made: Mounted = {}
        try:
            for name, stack in stacks.items():
                made[name] = self._mount(name, stack)
        except OSError:
            self.drop(made)
            raise
        return made

    def _mount(self, name: str, stack: Stack) -> Mount:
        layer = self._next
        self._next += 1
        word = _word(layer)
        work = f"../../work/{name}/{word}"
        base = f"../../base/{name}"
        os.chdir(self.root / "upper" / name)
        lower = [_word(number) for number in reversed(stack)]
        try:
            _like(lower[0] if lower else base, word)
            os.mkdir(work)
            below = ":".join((*lower, base))
            fd = kernel.new_mount("overlay", ("userxattr",), lowerdir=below, upperdir=word, workdir=work)
        except OSError:
            self._doomed.append(layer)
            raise
        self.hold([stack, (layer,)])
        return Mount(layer, stack, fd, _look(word))

    def drop(self, mounted: Mounted) -> None:
        """A branch is over, or goes on with other mounts (these live on where somebody uses them)."""
        for mount in mounted.values():
            os.close(mount.fd)
            self.release([mount.stack, (mount.layer,)])

    def changed(self, name: str, mount: Mount) -> bool:
        """Whether anything has been written to the volume through this mount."""
        return _look(self.root / "upper" / name / _word(mount.layer)) != mount.untouched

    def freeze(self, mounted: Mounted) -> None:
        """Make the layers read-only for everybody, by the kernel. Raises `OSError` while anybody could write there."""
        for mount in mounted.values():
            kernel.read_only_superblock(mount.fd)

    def short(self, name: str, stack: Stack) -> Stack:
        """The same contents in fewer layers, as far as lower ones have been merged; never more than `MOST_LAYERS`."""
        for length in range(len(stack), 1, -1):
            if (known := self._merged.get(stack[:length])) is not None:
                stack = (known, *stack[length:])
                break
        if len(stack) > MOST_LAYERS:
            stack = (self._merge(name, stack[:-MERGE_TO]), *stack[-MERGE_TO:])
        elif len(stack) > MERGE_ABOVE:
            self._due.append((name, stack[:-MERGE_TO]))
        return stack

    @property
    def chores(self) -> bool:
        """Whether there is something to merge or to delete."""
        return bool(self._due or self._doomed)

    def chore(self) -> None:
        """Merge one stack, or delete one unused layer."""
        if not self._due:
            self._sweep()
            return
        name, stack = self._due.pop()
        if stack not in self._merged and all(layer in self._users for layer in stack):
            self._merge(name, stack)

    def _sweep(self) -> None:
        if not self._doomed:
            return
        word = _word(self._doomed.pop())
        for name in VOLUMES:
            for part in ("upper", "work"):
                shutil.rmtree(self.root / part / name / word, ignore_errors=True)

    def _merge(self, name: str, stack: Stack) -> int:
        layer = self._next
        self._next += 1
        folder = self.root / "upper" / name
        merged, top = folder / _word(layer), folder / _word(stack[-1])
        try:
            merged.mkdir()
            for number in stack:
                _put_over(folder / _word(number), merged)
            _same_attributes(top, merged)
        except OSError:
            self._doomed.append(layer)
            raise
        self._merged[stack] = layer
        self.hold([(layer,)])
        return layer


def _look(upper: str | Path) -> tuple[object, ...]:
    """All that a write anywhere in a layer changes in its topmost folder: an entry, or something of its own. The change
    time alone would not do: it may be as coarse as a whole step is short.
    """
    found = os.stat(upper)
    with os.scandir(upper) as entries:
        empty = next(entries, None) is None
    notes = tuple(key for key in os.listxattr(upper) if not key.startswith("user.overlay."))
    return empty, found.st_mode, found.st_uid, found.st_gid, found.st_mtime_ns, found.st_ctime_ns, notes


def _word(number: int) -> str:
    """A layer's number in few characters: the kernel takes at most 255 for all lower folders."""
    digits = "0123456789abcdefghijklmnopqrstuvwxyz"
    text = ""
    while True:
        number, rest = divmod(number, 36)
        text = digits[rest] + text
        if number == 0:
            return text


def _like(model: str | Path, made: str | Path) -> None:
    """Make the folder `made` with owner, mode, times and attributes of `model`."""
    os.mkdir(made)
    _same_attributes(model, made)


def _same_attributes(model: str | Path, made: str | Path) -> None:
    was = os.lstat(model)
    os.chown(made, was.st_uid, was.st_gid, follow_symlinks=False)
    os.chmod(made, stat.S_IMODE(was.st_mode))
    for key in os.listxattr(model, follow_symlinks=False):
        if key.startswith("user.") and not key.startswith("user.overlay."):
            os.setxattr(made, key, os.getxattr(model, key, follow_symlinks=False), follow_symlinks=False)
    os.utime(made, ns=(was.st_atime_ns, was.st_mtime_ns))


def _put_over(upper: Path, merged: Path) -> None:
    """Apply the layer `upper` to `merged`, which stands for all layers below it: files are linked, whiteouts kept
    (there is a lower layer still), opaque folders replace what stood there.
    """
    for entry in os.scandir(upper):
        target = merged / entry.name
        if not entry.is_dir(follow_symlinks=False):
            _remove(target)
            os.link(entry.path, target, follow_symlinks=False)
            continue
        there = target.is_dir() and not target.is_symlink()
        hidden = not there and os.path.lexists(target)  # a file or a whiteout hid what lies lower still
        opaque = _is_opaque(entry.path)
        if opaque or not there:
            _remove(target)
            target.mkdir()
        if opaque or hidden:
            os.setxattr(target, OPAQUE, b"y")
        _put_over(Path(entry.path), target)
        _same_attributes(entry.path, target)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif os.path.lexists(path):
        path.unlink()


def _is_opaque(path: str) -> bool:
    try:
        return os.getxattr(path, OPAQUE) == b"y"
    except OSError:
        return False
