"""Where a box's control group goes: below a group that this process is in, never out of reach of a limit on it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from espalier.envs.sandbox import Box, Limits, cgroup


@pytest.fixture
def unified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Files as those of version 2: a group handed to this user, and in it the one that this process is in. A kernel
    refuses controllers below a group with processes, so here its file cannot be written; and it reads back without "+".
    """
    (tmp_path / "cgroup.controllers").write_text("memory pids")
    own = tmp_path / "handed" / "run"
    (own / "cgroup.subtree_control").mkdir(parents=True)
    for folder, name in ((own, "memory.max"), (own, "pids.max")):
        (folder / name).write_text("max\n")
    monkeypatch.setattr(cgroup, "ROOT", tmp_path)
    monkeypatch.setattr(cgroup, "_own", lambda kind: own)
    says = cgroup._says
    monkeypatch.setattr(cgroup, "_says", lambda file: says(file).replace("+", ""))
    return own


def test_version_2_takes_the_group_above_when_the_own_one_has_processes(unified: Path) -> None:
    (folder,) = cgroup.make(Limits().plain())
    assert Path(folder).parent == unified.parent
    assert int((Path(folder) / "memory.max").read_text()) > 0


def test_version_2_takes_none_where_a_limit_would_be_left(unified: Path) -> None:
    (unified / "memory.max").write_text("1000000\n")
    assert cgroup.make(Limits().plain()) == []


@pytest.mark.skipif(not Path("/sys/fs/cgroup/memory/memory.limit_in_bytes").exists(), reason="no version 1 here")
def test_version_1_stays_below_the_group_of_this_process(boxes_work: None) -> None:
    def group(pid: int) -> str:
        lines = Path(f"/proc/{pid}/cgroup").read_text().splitlines()
        return next(line.split(":", 2)[2] for line in lines if line.split(":")[1] == "memory")

    with Box() as box:
        if not any("/memory/" in folder for folder in box._family.groups):
            pytest.skip("no group can be made here")
        assert group(box._family.process.pid).startswith(group(os.getpid()).rstrip("/") + "/espalier-box-")
