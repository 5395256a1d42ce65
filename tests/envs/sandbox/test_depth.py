"""Long chains: depth is unbounded in practice, layers merge, and what is frozen stays as it was."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import re
import resource
import time
from pathlib import Path

import psutil
import pytest
from espalier.envs.sandbox import Box, Limits

WALK = """
import os, hashlib
def digest(top):
    h = hashlib.sha256()
    for folder, names, files in os.walk(top):
        names[:] = sorted(n for n in names if not os.path.ismount(os.path.join(folder, n)))  # this Python, perhaps
        for name in sorted([*names, *files]):
            path = os.path.join(folder, name)
            s = os.lstat(path)
            h.update(f"{path} {s.st_mode} {s.st_mtime_ns} ".encode())
            if os.path.islink(path): h.update(os.readlink(path).encode())
            elif os.path.isfile(path):
                h.update(f"{s.st_size} {os.listxattr(path)}".encode() + open(path, 'rb').read())
    return h.hexdigest()
"""
CHANGE = """
import shutil
def change(n):
    k = n % 7
    os.makedirs(f"dir{k}/sub", exist_ok=True)
    open(f"dir{k}/sub/file{n % 5}", "w").write(f"{n}")
    open(f"log", "a").write(f"{n}\\n")
    if n % 3 == 0: shutil.rmtree(f"dir{(k + 1) % 7}", ignore_errors=True)
    if n % 4 == 0: open(f"dir{k}/new{n}", "w").close()
    if n % 5 == 0 and os.path.exists(f"dir{k}/sub/file{n % 5}"): os.chmod(f"dir{k}/sub/file{n % 5}", 0o700)
    if n % 6 == 0:
        shutil.rmtree("src", ignore_errors=True); os.mkdir("src"); os.symlink("../log", "src/log")
    if n % 11 == 0: os.path.isdir("src") and shutil.rmtree("src"); open("/tmp/t", "a").write("x")
"""


def _walk(box: Box) -> str:
    out = box.python("digest('/workspace'), digest('/tmp'), n")
    assert out.status == 0, out.text
    return out.text


@pytest.mark.parametrize("count", [60, pytest.param(550, marks=pytest.mark.long)])
def test_a_chain_through_merges_keeps_every_state(boxes_work: None, workspace: Path, count: int) -> None:
    rng = random.Random(0)
    with Box(workspace, Limits(snapshots=1000, snapshot_memory="8G", pids=64)) as box:
        box.python(WALK + CHANGE)
        kept, seen = [], []
        for n in range(count):
            assert box.python(f"n = {n}; change(n)").status == 0
            kept.append(box.snapshot())
            seen.append(_walk(box))
        depth = box.stats()["depth"]
        assert depth < 45, "layers were not merged"
        for n in [0, count - 1, *rng.sample(range(count), min(count, 40))]:
            box.rollback(kept[n])
            assert _walk(box) == seen[n], n


def test_a_long_lineage_holds_what_it_uses_of_what_it_reserved(boxes_work: None, workspace: Path) -> None:
    """A BLAS reserves a gigabyte. Fresh pages (see `renew`) are made of those that are there, and keep what they hold."""
    reserve = "far = mmap.mmap(-1, 1 << 30, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)"
    with Box(workspace, Limits(snapshots=8)) as box:
        box.python(f"import mmap; {reserve}; far[0] = 1; far[300 << 20] = 2; far[-1] = 3")
        here = box.snapshot()
        for level in range(14):
            box.rollback(here)
            assert box.python(f"far[{level} << 22] += 1; far[0], far[300 << 20], far[-1]").status == 0
            here = box.snapshot()
            time.sleep(0.05)
        assert box.python("far[0], far[300 << 20], far[-1], far[13 << 22], far[14 << 22]").text == "(2, 2, 3, 1, 0)\n"
        held = []
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):  # a snapshot that nobody has a handle to may just be going
                held.append(process.memory_info().rss)
    assert max(held) < 256 << 20


@pytest.mark.parametrize("levels", [25, pytest.param(300, marks=pytest.mark.long)])
def test_rollback_upon_rollback_goes_as_deep_as_one_likes(boxes_work: None, workspace: Path, levels: int) -> None:
    with Box(workspace, Limits(snapshots=8)) as box:
        box.python(WALK + "held = bytearray(20 << 20); total = 0; n = 0")
        here = box.snapshot()
        for n in range(levels):
            box.rollback(here)
            assert (
                box.python(f"total += {n}; held[{n}] = 1; n = {n}; open('log', 'a').write('x'); sum(held)").text
                == f"{n + 1}\n"
            )
            here = box.snapshot()
            if n % 5 == 0:
                time.sleep(0.02)  # lets the box do its chores, as a model's thinking would
        box.rollback(here)
        assert box.python("total, os.path.getsize('log')").text == f"({sum(range(levels))}, {levels})\n"


@pytest.mark.skipif(os.getuid() != 0, reason="only root can look into a box from outside")
def test_no_frozen_layer_ever_changes(boxes_work: None, workspace: Path) -> None:
    rng = random.Random(1)
    with Box(workspace) as box:
        box.python(WALK + CHANGE)
        kept, hashes, room = [], {}, _room(box)
        f = "f = open('log', 'a+'); f.write('open'); f.flush(); g = open('/tmp/g', 'w')"
        box.python(f)
        for n in range(60):
            box.python(f"n = {n}; change(n); f.write('more'); f.flush(); g.write('x' * 9000)")
            kept.append(box.snapshot())
            mounts = re.findall(r" /(\w+) overlay .*?lowerdir=([^,]+)", box.shell("cat /proc/mounts").text)
            frozen = {f"{volume}/{word}" for volume, words in mounts for word in words.split(":")}
            for name, digest in _layers(room).items():
                if name in frozen:
                    hashes.setdefault(name, (n, digest))
            if n % 4 == 3:
                box.rollback(rng.choice(kept))
            now = _layers(room)
            for name, (when, digest) in hashes.items():
                if name in now and now[name] != digest:
                    end = time.monotonic() + 30
                    while name in _layers(room):  # one that nobody uses any more may just be going
                        assert time.monotonic() < end, (name, when, n)
                        time.sleep(0.1)
    assert len(hashes) > 50
    os.close(int(room.name))


def _room(box: Box) -> Path:
    """Where the layers are; opened once, since the first process visits its guests' mount namespaces."""
    launcher = box._family.process.pid
    first = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()[0]
    return Path(f"/proc/self/fd/{os.open(f'/proc/{first}/root/tmp/layers/upper', os.O_PATH)}")


def _layers(room: Path) -> dict[str, str]:
    """Hashes of all layers."""
    found = {}
    for volume in room.iterdir():
        for layer in volume.iterdir():
            h = hashlib.sha256()
            with contextlib.suppress(FileNotFoundError):  # one that nobody uses any more is going just now
                for folder, names, files in sorted(os.walk(layer)):
                    for name in sorted([*names, *files]):
                        path = Path(folder) / name
                        s = path.lstat()
                        h.update(f"{path.name} {s.st_mode} {s.st_mtime_ns} {s.st_size}".encode())
                        if path.is_file() and not path.is_symlink():
                            h.update(path.read_bytes())
            found[f"{volume.name}/{layer.name}"] = h.hexdigest()
    return found


def test_a_box_of_many_branches_has_descriptors_enough(boxes_work: None, workspace: Path) -> None:
    """Each keeps about five in the supervisor, whatever whoever started the box may open."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    if before[1] != resource.RLIM_INFINITY and before[1] < 4096:
        pytest.skip(f"a process may open {before[1]} descriptors here")
    resource.setrlimit(resource.RLIMIT_NOFILE, (512, before[1]))
    try:
        box = Box(workspace, Limits(pids=900))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    with box, contextlib.ExitStack() as branches:
        box.python("x = 7")
        here = box.snapshot()
        made = [branches.enter_context(box.branch(here)) for _ in range(280)]
        left_running = "import subprocess; p = subprocess.Popen(['sleep', '9']); print(x)"  # it holds the output open
        assert made[-1].python(left_running).text == "7\n"
        supervisor = psutil.Process(box._family.process.pid).children()[0]
        assert supervisor.num_fds() > 1024  # more than select() takes
        assert box.python("print(x)").text == "7\n"
