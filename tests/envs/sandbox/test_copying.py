"""The copy mode: no isolation, and none pretended; its limits hold, and nothing is left."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from espalier.envs.sandbox import Box, BoxError, CopyBox

WORK = """
import sys
from pathlib import Path
from espalier.envs.sandbox import CopyBox, Limits
with CopyBox(sys.argv[1], Limits(seconds=20, pids=16, memory="300M"), python=sys.argv[2]) as box:
    assert box.python("print(open('a.txt').read())").text == "first\\n\\n"
    here = box.snapshot()
    assert box.shell("rm -rf *; echo x > new; exit 4").status == 4
    box.rollback(here)
    assert box.read_file("a.txt") == b"first\\n"
    assert box.python("while True: pass", seconds=0.5).stopped == "time"
    assert box.shell("sleep 60 & echo started").text == "started\\n"
    assert box.python("import time\\nx = bytearray(400 << 20)\\nfor i in range(0, len(x), 4096): x[i] = 1\\ntime.sleep(5)").stopped == "memory"
    try:
        box.read_file("../../../../etc/passwd")
        raise AssertionError("read outside")
    except OSError:
        pass
    room = box._room
assert not room.exists()
print("held")
"""


ROOT = """
import os, sys
from pathlib import Path
from espalier.envs.sandbox import CopyBox, Limits
secret = Path(sys.argv[1]) / "secret"
secret.write_text("mine")
secret.chmod(0o600)
with CopyBox(sys.argv[1], Limits(seconds=20, pids=16, memory="300M"), python=sys.argv[2]) as box:
    assert box.python("import os; print(os.getuid())").text != "0\\n"
    assert box.shell(f"cat {secret} || echo refused").text.endswith("refused\\n")
    assert box.shell("ls ..; echo changed > a.txt && mkdir made && ln -s " + str(secret) + " made/link").status == 0
    assert "cannot fork" in box.shell("for i in $(seq 60); do sleep 5 & done; wait", seconds=10).text.lower()
    here = box.snapshot()
    box.rollback(here)
    box.write_file("new/file", b"1")
    box.write_file("new/file", b"22")
    assert box.shell("echo 3 >> new/file && cat new/file a.txt").text == "223\\nchanged\\n"
    for attempt in (lambda: box.write_file("made/link", b"x"), lambda: box.read_file("made/link")):
        try:
            attempt()
            raise AssertionError("followed a link")
        except OSError:
            pass
    os.link(secret, box._folder / "hard")
    for attempt in (lambda: box.write_file("hard", b"x"), lambda: box.read_file("hard"), box.snapshot):
        try:
            attempt()
            raise AssertionError("took what is not its own")
        except OSError:
            pass
assert secret.read_text() == "mine" and not box._room.exists()
print("held")
"""
KILLED = """
import sys
from espalier.envs.sandbox import CopyBox
box = CopyBox(sys.argv[1], python=sys.argv[2])
print(box._room, flush=True)
box.shell("(setsid sleep 300 &) ; sleep 300")
"""


@pytest.fixture
def interpreter() -> str:
    """One that another user may run, too."""
    if os.getuid() != 0:
        return sys.executable
    for path in (sys.executable, "/usr/bin/python3", "/usr/local/bin/python3"):
        with contextlib.suppress(BoxError):
            CopyBox(python=path).close()
            return path
    pytest.skip("no interpreter here that another user than root may run")


def started(script: str, workspace: Path, interpreter: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", script, str(workspace), interpreter]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_for_root_it_runs_as_somebody_who_has_nothing_else(workspace: Path, interpreter: str) -> None:
    if os.getuid() != 0:
        pytest.skip("only root becomes another user")
    done = started(ROOT, workspace, interpreter)
    assert done.stdout == "held\n", done.stderr
    done = started(WORK, workspace, interpreter)
    assert done.stdout == "held\n", done.stderr


def test_root_is_refused_where_nobody_else_can_run_anything() -> None:
    if os.getuid() != 0:
        pytest.skip("only root becomes another user")
    with pytest.raises(BoxError, match=r"not_isolated.*/missing/python does not run"):
        CopyBox(python="/missing/python")


def test_killing_the_process_ends_the_call_and_the_next_box_removes_the_folder(
    workspace: Path, interpreter: str
) -> None:
    command = [sys.executable, "-c", KILLED, str(workspace), interpreter]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    room = Path(process.stdout.readline().strip())
    while len(below := psutil.Process(process.pid).children(recursive=True)) < 4:
        time.sleep(0.05)
    with CopyBox(python=interpreter) as other:
        assert room.exists()  # its owner lives
        process.kill()
        process.wait()
        if sys.platform == "linux":
            assert not psutil.wait_procs(below, timeout=20)[1]
        CopyBox(python=interpreter).close()
        assert not room.exists() and other.shell("pwd").status == 0


def test_it_holds_what_it_promises(workspace: Path) -> None:
    command = [sys.executable, "-c", WORK, str(workspace), sys.executable]
    if os.getuid() == 0:
        if shutil.which("setpriv") is None:
            pytest.skip("root, and no setpriv to become somebody else with")
        for folder in (workspace, *workspace.parents):
            if str(folder).startswith("/tmp/") and len(folder.parts) > 2:
                folder.chmod(0o755)
        command = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--inh-caps=-all,+dac_read_search",
                   "--ambient-caps=-all,+dac_read_search", *command]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout == "held\n", done.stderr


def test_without_a_live_interpreter_a_call_leaves_nothing_in_memory(boxes_work: None, workspace: Path) -> None:
    with Box(workspace, live=False) as box:
        box.python("x = 1; import threading, time; threading.Thread(target=time.sleep, args=(0.1,)).start()")
        here = box.snapshot()
        assert "NameError" in box.python("x").text
        box.shell("rm a.txt")
        box.rollback(here)
        assert box.shell("cat a.txt").text == "first\n"
