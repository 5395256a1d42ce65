"""The copy mode: no isolation, and none pretended; its limits hold, and nothing is left."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from espalier.envs.sandbox import Box, BoxError, CopyBox

WORK = """
import sys
from pathlib import Path
from espalier.envs.sandbox import CopyBox, Limits
with CopyBox(sys.argv[1], Limits(seconds=20, pids=16, memory="300M")) as box:
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


def test_root_is_refused() -> None:
    if os.getuid() != 0:
        pytest.skip("only root is refused")
    with pytest.raises(BoxError, match="root"):
        CopyBox()


def test_it_holds_what_it_promises(workspace: Path) -> None:
    command = [sys.executable, "-c", WORK, str(workspace)]
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
