"""Many boxes at once on one thread, and nothing left when a call is cancelled."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from espalier.envs.sandbox import AsyncBox, BoxError, Limits, SnapshotIncomplete

from .test_kill import _gone, _tree


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


async def test_many_at_once_on_one_thread(boxes_work: None, workspace: Path) -> None:
    async def one(n: int) -> str:
        async with await AsyncBox.start(workspace, Limits(memory="200M")) as box:
            await box.python(f"import time; x = {n}")
            here = await box.snapshot()
            await box.python("x = 0; time.sleep(0.3)")
            await box.rollback(here)
            return (await box.python("x")).text

    assert await asyncio.gather(*(one(n) for n in range(24))) == [f"{n}\n" for n in range(24)]


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
