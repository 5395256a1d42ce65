"""Many boxes at once on one thread, and nothing left when a call is cancelled."""

from __future__ import annotations

import asyncio
import gc
import inspect
import os
import signal
import threading
from pathlib import Path

import pytest
from espalier.envs.sandbox import AsyncBox, Box, BoxError, Limits, SnapshotIncomplete

from .test_kill import _alive, _gone, _tree


async def test_it_does_what_a_box_does(boxes_work: None, workspace: Path) -> None:
    async with await AsyncBox.start(workspace) as box:
        await box.python("x = 1")
        here = await box.snapshot()
        await box.shell("rm a.txt")
        await box.python("x = 2")
        async with await box.branch(here) as other:
            await box.rollback(here)
            assert (await other.python("x")).text == (await box.python("x")).text == "1\n"
            assert (await other.shell("cat a.txt")).text == "first\n"
        await box.python("import socket; s = socket.socket()")
        with pytest.raises(SnapshotIncomplete, match="socket"):
            await box.snapshot()


def test_it_has_all_that_a_box_has() -> None:
    def public(kind: type) -> set[str]:
        return {name for name in vars(kind) if not name.startswith("_")}

    assert public(AsyncBox) == public(Box) | {"start"}
    for name in public(Box):
        ours, theirs = (inspect.signature(getattr(kind, name)).parameters for kind in (AsyncBox, Box))
        assert list(ours) == list(theirs), name


async def test_files_and_snapshots_are_managed_as_in_a_box(boxes_work: None, workspace: Path) -> None:
    async with await AsyncBox.start(workspace) as box:
        data = bytes(range(256)) * 20_000  # more than one message
        await box.write_file("made/deep", data)
        assert await box.read_file("made/deep", most=len(data)) == data
        assert await box.list_files("made") == [("deep", "file", len(data))]
        with pytest.raises(FileNotFoundError):
            await box.read_file("missing")
        await box.python("x = 1")
        here = await box.snapshot()
        assert not await box.changed()
        await box.prepare(here)
        await box.shell("touch new")
        assert await box.changed() and await box.rollback(here)
        await box.python("x = 2")
        await box.restart(here)
        assert (await box.python("x")).text == "1\n"
        assert (await box.stats())["snapshots"] == 2
        await box.drop(here)
        with pytest.raises(BoxError, match="no_snapshot"):
            await box.rollback(here)


async def test_a_masked_snapshot_is_made_before_the_next_call(boxes_work: None, workspace: Path) -> None:
    async with await AsyncBox.start(workspace) as box:
        await box.python("x = 1")
        here = await box.snapshot(wait=False)
        with pytest.raises(BoxError, match="not_known_yet"):
            _ = here.number
        other = await box.snapshot(wait=False)
        await box.rollback(here)
        assert other.number == here.number
        await box.python("x = 2; import socket; s = socket.socket()")
        refused = await box.snapshot(wait=False)
        assert (await box.python("s.close(); x")).text == "2\n"
        with pytest.raises(SnapshotIncomplete, match="socket"):
            await box.rollback(refused)
        await box.rollback(here)
        assert (await box.python("x")).text == "1\n"


async def test_a_forgotten_box_does_not_hold_up_the_loop(boxes_work: None, workspace: Path) -> None:
    """Its first process is stopped, so it cannot end by itself: whoever collects the box would wait for it."""
    box = await AsyncBox.start(workspace)
    pids = _tree(box._box._family.process.pid)
    os.kill(pids[0], signal.SIGSTOP)
    del box
    gc.collect()
    assert any(_alive(pid) for pid in pids)  # nobody has waited until it could be killed
    assert _gone(pids)


@pytest.mark.parametrize("count", [24, pytest.param(120, marks=pytest.mark.long)])
async def test_many_at_once_on_one_thread(boxes_work: None, workspace: Path, count: int) -> None:
    async def one(n: int) -> str:
        async with await AsyncBox.start(workspace, Limits(memory="200M")) as box:
            await box.python(f"import time; x = {n}")
            here = await box.snapshot()
            await box.python("x = 0; time.sleep(0.3)")
            await box.rollback(here)
            assert threading.active_count() < before + 34  # a loop closes boxes on 32 at most
            return (await box.python("x")).text

    before = threading.active_count()
    assert await asyncio.gather(*(one(n) for n in range(count))) == [f"{n}\n" for n in range(count)]


async def test_a_cancelled_call_leaves_nothing(boxes_work: None, workspace: Path) -> None:
    box = await AsyncBox.start(workspace)
    pids = _tree(box._box._family.process.pid)
    call = asyncio.create_task(box.shell("sleep 60"))
    await asyncio.sleep(0.3)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    with pytest.raises(BoxError, match="closed"):
        await box.python("1")
    await box.close()
    assert _gone(pids)


async def test_starting_is_cancelled_cleanly(boxes_work: None, workspace: Path) -> None:
    for delay in (0.01, 0.1):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(delay):
                async with await AsyncBox.start(workspace):
                    await asyncio.sleep(10)
