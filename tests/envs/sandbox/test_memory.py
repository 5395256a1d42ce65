"""What frozen copies hold grows as the guest goes on, is measured as it grows, and stays bounded."""

from __future__ import annotations

import itertools
import time
from pathlib import Path

from espalier.envs.sandbox import Box, BoxError, BoxSnapshot, Limits

ARRAY = 40 << 20
BOUND = 150 << 20


def _rewrite(box: Box, value: int) -> None:
    assert box.python(f"held[::4096] = bytes([{value}]) * len(held[::4096])").status == 0


def _settled(box: Box, most: int) -> dict[str, int]:
    """The box's account once spare time has brought it below `most`, or has not in a long time."""
    end = time.monotonic() + 30
    while (found := box.stats())["snapshot_bytes"] > most and time.monotonic() < end:
        time.sleep(0.1)
    return found


def test_memory_is_counted_when_the_guest_rewrites_what_it_shared(boxes_work: None, workspace: Path) -> None:
    with Box(workspace, Limits(snapshot_memory="4G")) as box:
        box.python(f"held = bytearray({ARRAY})")
        kept, seen = [], []
        for value in range(4):
            _rewrite(box, value)
            kept.append(box.snapshot())
            time.sleep(0.1)
            seen.append(box.stats()["snapshot_bytes"])
        assert seen[0] < ARRAY  # the guest has it too
        assert all(3 * ARRAY > later - earlier > ARRAY // 2 for earlier, later in itertools.pairwise(seen))
        box.drop(kept[0])
        assert _settled(box, seen[-1] - ARRAY // 2)["snapshot_bytes"] < seen[-1] - ARRAY // 2


def test_pages_that_only_frozen_copies_share_are_counted_once(boxes_work: None, workspace: Path) -> None:
    with Box(workspace, Limits(snapshot_memory="4G")) as box:
        box.python(f"held = bytearray({ARRAY}); n = 0")
        _rewrite(box, 1)
        kept = []
        for _ in range(5):
            box.python("n += 1")
            kept.append(box.snapshot())
        assert box.stats()["snapshot_bytes"] < ARRAY
        _rewrite(box, 2)
        assert ARRAY <= box.stats()["snapshot_bytes"] < 2 * ARRAY
    del kept


def test_snapshots_go_when_what_they_hold_has_grown_over_the_bound(boxes_work: None, workspace: Path) -> None:
    with Box(workspace, Limits(snapshot_memory=BOUND)) as box:
        box.python(f"held = bytearray({ARRAY})")
        kept: list[BoxSnapshot] = []
        for value in range(12):
            _rewrite(box, value)
            kept.append(box.snapshot())
            assert _settled(box, BOUND)["snapshot_bytes"] <= BOUND
        assert box.stats()["snapshots"] < 7
        with_error = 0
        for value, here in enumerate(kept):
            try:
                box.rollback(here)
            except BoxError as error:
                assert error.code == "no_snapshot"
                with_error += 1
            else:
                assert box.python("held[0]").text == f"{value}\n"
        assert 12 > with_error >= 7


def test_a_light_snapshot_outlives_a_heavy_one(boxes_work: None, workspace: Path) -> None:
    """What goes first is worth least for its bytes, not merely the oldest."""
    with Box(workspace, Limits(snapshot_memory=BOUND)) as box:
        box.python("held = b''; x = 7")
        light = box.snapshot()
        box.python(f"held = bytearray({ARRAY})")
        kept = []
        for value in range(8):
            _rewrite(box, value)
            kept.append(box.snapshot())
            _settled(box, BOUND)
        box.rollback(light)
        assert box.python("x, len(held)").text == "(7, 0)\n"
