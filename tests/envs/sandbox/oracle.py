"""The oracle of the model test: the same operations on a plain folder and a plain namespace, kept by full copies.

`STEP` runs one operation, `LOOK` describes everything that a snapshot must bring back; both are source code, run by the
box's interpreter and by `Oracle` alike.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
from pathlib import Path
from typing import Any

PRELUDE = '''
import errno, hashlib, io, json, mmap, os, random, shutil, stat

class World:
    """What an operation may touch: files below the working folder, open files, a list, a generator."""
    def __init__(self):
        self.files, self.numbers, self.rng = {}, [], random.Random(0)

def move(a, b):
    try:
        os.rename(a, b)
    except OSError as error:  # a folder of a lower layer: by design; mv(1) and shutil.move do the same
        if error.errno != errno.EXDEV:
            raise
        if os.path.exists(b):
            os.rmdir(b)
        shutil.copytree(a, b, symlinks=True)
        shutil.rmtree(a)

def perform(world, name, *a):
    try:
        OPERATIONS[name](world, *a)
    except shutil.Error:
        return "shutil"
    except OSError as error:
        return errno.errorcode.get(error.errno, str(error))
    return "ok"

def write(w, p, text):
    with open(p, "w") as f: f.write(text)
def append(w, p, text):
    with open(p, "a") as f: f.write(text)
def truncate(w, p, size): os.truncate(p, size)
def sparse(w, p, at):
    with open(p, "r+b") as f: f.seek(at); f.write(b"end")
def mapped(w, p, at, text):
    with open(p, "r+b") as f:
        size = os.fstat(f.fileno()).st_size
        if size > at + len(text):
            with mmap.mmap(f.fileno(), size) as m: m[at:at + len(text)] = text.encode()
def remove(w, p): os.remove(p)
def rmtree(w, p): shutil.rmtree(p)
def again(w, p): shutil.rmtree(p); os.mkdir(p)
def mkdir(w, p): os.mkdir(p)
def rename(w, a, b): move(a, b)
def symlink(w, a, b): os.symlink(a, b)
def link(w, a, b): os.link(a, b); os.remove(a)
def chmod(w, p, mode): os.chmod(p, mode)
def xattr(w, p, text): os.setxattr(p, "user.note", text.encode())
def utime(w, p, t): os.utime(p, ns=(t, t), follow_symlinks=False)
def opened(w, p, key, mode):
    if key in w.files: w.files.pop(key)[0].close()
    w.files[key] = (io.FileIO(p, mode), mode)
def through(w, key, text):
    if key in w.files: w.files[key][0].write(text.encode())
def seek(w, key, at):
    if key in w.files: w.files[key][0].seek(at)
def read(w, key, n):
    if key in w.files: w.numbers.append(len(w.files[key][0].read(n)))
def close(w, key):
    if key in w.files: w.files.pop(key)[0].close()
def number(w, n): w.numbers.append(n)
def draw(w): w.numbers.append(w.rng.randrange(1000))
def enter(w, p): os.chdir(p)
def back(w): os.chdir(TOP)

OPERATIONS = {f.__name__: f for f in (write, append, truncate, sparse, mapped, remove, rmtree, again, mkdir, rename,
    symlink, link, chmod, xattr, utime, opened, through, seek, read, close, number, draw, enter, back)}

def look(world, top, exact):
    """Everything below `top`, and the interpreter's part. `exact`: times too (only one world's own before and after
    can have the same)."""
    tree = {}
    for folder, names, files in os.walk(top):
        for name in [*names, *files]:
            path = os.path.join(folder, name)
            s = os.lstat(path)
            kind = stat.S_IFMT(s.st_mode)
            what = [kind, stat.S_IMODE(s.st_mode)]
            if kind == stat.S_IFREG:
                with open(path, "rb") as f: data = f.read()
                what += [s.st_size, hashlib.sha256(data).hexdigest()]
                what.append([os.getxattr(path, k).decode() for k in sorted(os.listxattr(path)) if k.startswith("user.note")])
            elif kind == stat.S_IFLNK:
                what.append(os.readlink(path))
            if exact:
                what.append(s.st_mtime_ns)
            tree[os.path.relpath(path, top)] = what
    files = {k: [f.tell(), mode] for k, (f, mode) in sorted(world.files.items())}
    try:
        here = os.path.relpath(os.getcwd(), top)
    except FileNotFoundError:
        here = "gone"
    return {"tree": tree, "files": files, "numbers": world.numbers[-50:], "rng": hashlib.sha256(repr(world.rng.getstate()).encode()).hexdigest(), "cwd": here, "env": os.environ.get("MODEL_ENV")}
'''


class Oracle:
    """The same world in this process, on a folder of its own; a snapshot is a full copy."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.kept = folder, folder.parent / "kept"
        self.kept.mkdir()
        self.space: dict[str, Any] = {"TOP": str(folder)}
        exec(PRELUDE, self.space)
        self.world = self.space["World"]()
        self.snapshots: dict[int, tuple[Path, Any]] = {}
        self.cwd = str(folder)

    def perform(self, operation: list[Any]) -> str:
        """Carry it out; "ok" or the error's name."""
        with self._here():
            return str(self.space["perform"](self.world, *operation))

    def look(self) -> Any:
        """What `look` says here."""
        with self._here():
            return json.loads(json.dumps(self.space["look"](self.world, str(self.folder), False)))

    @contextlib.contextmanager
    def _here(self) -> Any:
        outside = os.getcwd()
        try:
            os.chdir(self.cwd)
            yield
            self.cwd = os.getcwd()
        finally:
            os.chdir(outside)

    def renamed_unseen(self) -> bool:
        """Whether a file is open under a name that is gone, and has another."""
        return any(_path_of(f) is None and os.fstat(f.fileno()).st_nlink for f, _ in self.world.files.values())

    def snapshot(self, number: int) -> None:
        """Keep a full copy as `number`."""
        copy = self.kept / str(number)
        shutil.copytree(self.folder, copy, symlinks=True)
        files = {k: (f.name, mode, f.tell(), _path_of(f)) for k, (f, mode) in self.world.files.items()}
        data = {k: _contents(f) for k, (f, _) in self.world.files.items()}
        state = (list(self.world.numbers), self.world.rng.getstate(), files, data, self.cwd)
        self.snapshots[number] = (copy, state)

    def rollback(self, number: int) -> None:
        """Return to the full copy `number`."""
        copy, (numbers, rng, files, data, cwd) = self.snapshots[number]
        for f, _ in self.world.files.values():
            f.close()
        shutil.rmtree(self.folder)
        shutil.copytree(copy, self.folder, symlinks=True)
        self.world.numbers, self.cwd = list(numbers), cwd
        self.world.rng.setstate(rng)
        self.world.files = {}
        for key, (_, mode, at, path) in files.items():
            gone = path is None
            target = str(self.kept / f"gone-{key}") if gone else path
            if gone:
                Path(target).write_bytes(data[key])
            f = io.FileIO(target, "r+" if mode == "w+" else mode)
            f.seek(at)
            self.world.files[key] = (f, mode)
            if gone:
                os.remove(target)


def _path_of(f: Any) -> str | None:
    path = os.readlink(f"/proc/self/fd/{f.fileno()}")
    return None if path.endswith(" (deleted)") else path


def _contents(f: Any) -> bytes:
    return Path(f"/proc/self/fd/{f.fileno()}").read_bytes()
