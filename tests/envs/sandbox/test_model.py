"""Random programs of file and interpreter operations, snapshots, rollbacks and branches, against full copies.

Differences that are by design, and no others: an unprivileged rename of a folder that lies in a lower layer fails with
EXDEV (the operation copies then, as mv does), and hard links part when one of them is written to (so an operation
leaves only one name). A file that is open under a removed name and has another is refused, always and nothing else.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from espalier.envs.sandbox import Box, Limits, SnapshotIncomplete
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from .oracle import PRELUDE, Oracle

PATHS = ("a", "b", "d", "d/a", "d/b", "d/e", "d/e/a", "f", "f/a", "g")
KEYS = ("x", "y")
SYSTEM_PYTHON = "/usr/bin/python3"
WEIGHTS = {
    "write": 8, "append": 6, "truncate": 2, "sparse": 2, "mapped": 3, "remove": 4, "rmtree": 2, "again": 3, "mkdir": 5,
    "rename": 6, "symlink": 2, "link": 1, "chmod": 2, "xattr": 2, "utime": 2, "opened": 4, "through": 4, "seek": 2,
    "read": 2, "close": 2, "number": 3, "draw": 2, "enter": 1, "back": 2,
}  # fmt: skip


def operation(rng: random.Random) -> list[Any]:
    """One operation, as JSON."""
    name = rng.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
    path, text, key = rng.choice(PATHS), rng.choice(("one", "two" * 50, "")) + str(rng.randrange(9)), rng.choice(KEYS)
    arguments: dict[str, list[Any]] = {
        "write": [path, text], "append": [path, text], "truncate": [path, rng.randrange(200)],
        "sparse": [path, rng.randrange(100_000)], "mapped": [path, rng.randrange(100), text], "remove": [path],
        "rmtree": [path], "again": [path], "mkdir": [path], "rename": [path, rng.choice(PATHS)],
        "symlink": [rng.choice(PATHS), path], "link": [path, rng.choice(PATHS)],
        "chmod": [path, rng.choice((0o700, 0o755, 0o711))], "xattr": [path, text], "utime": [path, rng.randrange(10**18)],
        "opened": [path, key, rng.choice(("r", "r+", "w+", "a+"))], "through": [key, text],
        "seek": [key, rng.randrange(50)], "read": [key, rng.randrange(20)], "close": [key],
        "number": [rng.randrange(100)], "draw": [], "enter": [rng.choice(("d", "f", "."))], "back": [],
    }  # fmt: skip
    return [name, *arguments[name]]


def run(seed: int, count: int, folder: Path, python: str | None = None) -> int:
    """`count` operations by `seed` on a box and its oracle; how many there were. Raises `AssertionError`."""
    rng = random.Random(seed)
    workspace, model = folder / "workspace", folder / "model"
    for made in (workspace, model):
        (made / "d").mkdir(parents=True)
        (made / "a").write_text("start")
        (made / "d" / "a").write_text("deep")
    oracle = Oracle(model)
    done = 0
    with Box(workspace, Limits(seconds=60), python=python) as first:
        box = first
        box.python(PRELUDE)
        box.python("TOP = '/workspace'; world = World()")
        handles: dict[int, Any] = {}
        exact: dict[int, Any] = {}
        while done < count:
            batch = [operation(rng) for _ in range(rng.randrange(1, 8))]
            out = box.python(
                f"print(json.dumps([perform(world, *o) for o in json.loads({json.dumps(json.dumps(batch))})]))"
            )
            assert out.status == 0, out.text
            mine = [oracle.perform(o) for o in batch]
            assert json.loads(out.text) == mine, (seed, batch, out.text, mine)
            done += len(batch)
            choice = rng.random()
            if choice < 0.45:
                number = len(handles)
                if oracle.renamed_unseen():
                    with pytest.raises(SnapshotIncomplete, match="which has other names"):
                        box.snapshot()
                    closing = [["close", key] for key in KEYS]
                    box.python(f"for operation in {closing}: perform(world, *operation)")
                    assert [oracle.perform(operation) for operation in closing] == ["ok", "ok"]
                handles[number] = box.snapshot()
                oracle.snapshot(number)
                exact[number] = _look(box, True)
                done += 1
            elif choice < 0.75 and handles:
                number = rng.choice(list(handles))
                if choice < 0.55:
                    branch = box.branch(handles[number])
                    if box is not first:
                        box.close()
                    box = branch
                else:
                    box.rollback(handles[number])
                oracle.rollback(number)
                assert _look(box, True) == exact[number], (seed, number)
                done += 1
            assert _look(box, False) == oracle.look(), (seed, batch)
        if box is not first:
            box.close()
    return done


def _look(box: Box, exact: bool) -> Any:
    out = box.python(f"print(json.dumps(look(world, '/workspace', {exact})))")
    assert out.status == 0, out.text
    return json.loads(out.text)


@settings(max_examples=4, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
@given(st.integers(0, 2**32))
def test_random_programs_end_as_on_full_copies(
    boxes_work: None, tmp_path_factory: pytest.TempPathFactory, seed: int
) -> None:
    run(seed, 120, tmp_path_factory.mktemp("model"))


@pytest.mark.long
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("user", ["root", "nobody"])
def test_ten_thousand_operations(boxes_work: None, user: str) -> None:
    folder = Path(tempfile.mkdtemp(prefix="model-", dir="/tmp"))  # another user must get there
    command = [sys.executable, str(Path(__file__).parent / "many.py"), "5000", str(folder)]
    if user == "nobody":
        if os.getuid() != 0 or shutil.which("setpriv") is None:
            pytest.skip("this user cannot become another one")
        if not Path(SYSTEM_PYTHON).exists():
            pytest.skip(f"this Python may lie where another user cannot read it, and there is no {SYSTEM_PYTHON}")
        folder.chmod(0o777)
        command.append(SYSTEM_PYTHON)
        # outside the box it may read this Python wherever it is installed, and has no other right
        command = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--inh-caps=-all,+dac_read_search",
                   "--ambient-caps=-all,+dac_read_search", *command]  # fmt: skip
    try:
        subprocess.run(command, check=True, timeout=2900)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
