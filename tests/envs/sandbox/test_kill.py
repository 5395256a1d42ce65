"""kill -9 of anything at any point: nothing is left behind, and what survives says what happened."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from espalier.envs.sandbox import Box, BoxError, Limits

WORK = """
import sys, random
from espalier.envs.sandbox import Box
box = Box(sys.argv[1])
box.python("import subprocess; held = bytearray(5 << 20)")
print("ready", flush=True)
kept = []
while True:
    box.shell("echo more >> log; sleep 0.01 & true")
    try: kept.append(box.snapshot())
    except Exception: pass
    if kept: box.rollback(kept[-1])
"""


def _tree(pid: int) -> list[int]:
    """`pid` and every process below it."""
    found = [pid]
    for task in _listing(Path(f"/proc/{pid}/task")):
        with contextlib.suppress(OSError):
            for child in (task / "children").read_text().split():
                found += _tree(int(child))
    return found


def _listing(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError:
        return []


def _gone(pids: list[int], seconds: float = 60.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if not any(_alive(pid) for pid in pids):
            return True
        time.sleep(0.02)
    return False


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def _traces(pid: int) -> set[str]:
    """Mounts that this process can see, and control groups of the boxes that process `pid` has started."""
    mounts = {line for line in Path("/proc/self/mountinfo").read_text().splitlines() if "espalier" in line}
    groups = (
        {str(p) for p in Path("/sys/fs/cgroup").glob(f"**/espalier-box-{pid}-*")}
        if Path("/sys/fs/cgroup").exists()
        else set()
    )
    return mounts | groups


@pytest.mark.parametrize("seed", range(3))
def test_killing_the_orchestrator_ends_everything(boxes_work: None, workspace: Path, seed: int) -> None:
    before = _traces(os.getpid())
    process = subprocess.Popen([sys.executable, "-c", WORK, str(workspace)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    time.sleep(random.Random(seed).random())
    pids = _tree(process.pid)
    assert len(pids) >= 4
    process.kill()
    process.wait()
    assert _gone(pids)
    end = time.monotonic() + 30
    while True:
        with Box(workspace) as box:  # its start removes what a dead orchestrator could not, once that has ended
            assert box.python("1").text == "1\n"
        if not (left := _traces(process.pid) - before) or time.monotonic() > end:
            break
    assert left == set()


@pytest.mark.parametrize("which", ["launcher", "supervisor"])
def test_killing_what_holds_a_box_ends_it_and_says_so(boxes_work: None, workspace: Path, which: str) -> None:
    with Box(workspace) as box:
        box.python("x = 1")
        box.snapshot()
        launcher = box._family.process.pid
        pids = _tree(launcher)
        os.kill(pids[0] if which == "launcher" else pids[1], signal.SIGKILL)
        with pytest.raises(BoxError, match="box_gone"):
            for _ in range(3):
                box.python("x")
        assert _gone(pids)


def test_killing_a_frozen_copy_is_an_error_of_that_snapshot_only(boxes_work: None, workspace: Path) -> None:
    with Box(workspace) as box:
        box.python("x = 1")
        first = box.snapshot()
        known = set(_tree(box._family.process.pid))
        box.python("x = 2")
        second = box.snapshot()
        box.python("x = 3")
        (frozen,) = set(_tree(box._family.process.pid)) - known
        os.kill(frozen, signal.SIGKILL)
        with pytest.raises(BoxError, match="guest_gone"):
            box.rollback(second)
        assert box.python("x").text == "3\n"
        box.rollback(first)
        assert box.python("x").text == "1\n"


def test_killing_the_interpreter_restarts_it_on_its_files(boxes_work: None, workspace: Path) -> None:
    with Box(workspace, Limits(seconds=20)) as box:
        box.python("x = 1; open('made', 'w').write('1')")
        here = box.snapshot()
        number = int(box.python("import os; os.getpid()").text)
        guest = next(p for p in _tree(box._family.process.pid) if _inner(p) == number)
        os.kill(guest, signal.SIGKILL)
        with contextlib.suppress(BoxError):  # found at the sending, or by the answer that does not come
            assert box.python("x").restarted
        assert box.python("open('made').read()").text == "'1'\n"
        box.rollback(here)
        assert box.python("x").text == "1\n"


def _inner(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("NSpid:"):
            return int(line.split()[-1])
    return 0


def test_closing_leaves_nothing(boxes_work: None, workspace: Path) -> None:
    before = _traces(os.getpid())
    box = Box(workspace)
    box.shell("sleep 60 & sleep 60 & true")
    pids = _tree(box._family.process.pid)
    box.close()
    assert _gone(pids) and _traces(os.getpid()) == before


def test_a_box_that_is_forgotten_ends_too(boxes_work: None, workspace: Path) -> None:
    box = Box(workspace)
    pids = _tree(box._family.process.pid)
    del box
    assert _gone(pids)
