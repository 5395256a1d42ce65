from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from espalier.envs.sandbox import Box, BoxError, Limits


@pytest.fixture(scope="session")
def boxes_work(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Skips where this machine allows no box, and says why; where it allows namespaces, a box that fails is an error."""
    try:
        Box(tmp_path_factory.mktemp("empty")).close()
    except BoxError as error:
        if namespaces_allowed():
            raise
        pytest.skip(f"no box here: {error}")


def namespaces_allowed() -> bool:
    """What util-linux finds."""
    command = ["unshare", "--user", "--map-root-user", "--mount", "--pid", "--net", "--fork", "true"]
    return (
        shutil.which("unshare") is not None
        and subprocess.run(command, check=False, capture_output=True).returncode == 0
    )


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    folder = tmp_path / "workspace"
    (folder / "src").mkdir(parents=True)
    (folder / "a.txt").write_text("first\n")
    (folder / "src" / "mod.py").write_text("VALUE = 1\n")
    (folder / "src" / "deep").mkdir()
    (folder / "src" / "deep" / "leaf").write_bytes(bytes(range(256)) * 20)
    os.symlink("a.txt", folder / "link")
    return folder


@pytest.fixture
def box(boxes_work: None, workspace: Path) -> Iterator[Box]:
    with Box(workspace, Limits(seconds=20)) as made:
        yield made


@pytest.fixture(autouse=True)
def no_process_left() -> Iterator[None]:
    """No test leaves a zombie or a child behind; a box that was merely forgotten takes a moment to end."""
    yield
    end = time.monotonic() + 60
    while (left := _boxes_below()) and time.monotonic() < end:
        time.sleep(0.02)
    assert not left


def _boxes_below() -> list[str]:
    found = []
    for listed in Path("/proc/self/task").glob("*/children"):  # a child is its thread's
        with contextlib.suppress(OSError):
            found += [
                w for w in listed.read_text().split() if b"espalier_box" in Path(f"/proc/{w}/cmdline").read_bytes()
            ]
    return found
