"""What a machine allows, found out by doing it; and said where it is refused."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from espalier.envs.sandbox.survey import survey

LOOK = """
import json
from dataclasses import asdict
from espalier.envs.sandbox import BoxError, CopyBox
from espalier.envs.sandbox.survey import survey
found = asdict(survey())
try:
    CopyBox().close()
    found["copies"] = True
except BoxError:
    found["copies"] = False
print(json.dumps(found))
"""


def test_where_a_box_works_the_mode_is_full(boxes_work: None) -> None:
    found = survey()
    assert (found.mode, found.why_not) == ("full", "")
    assert "userxattr" in found.overlay


def test_where_namespaces_are_refused_it_says_so(boxes_work: None) -> None:
    if shutil.which("unshare") is None or not Path("/proc/sys/user/max_user_namespaces").exists():
        pytest.skip("no way to refuse namespaces here")
    inside = f"echo 0 > /proc/sys/user/max_user_namespaces && exec {sys.executable} -c {shlex.quote(LOOK)}"
    done = subprocess.run(
        ["unshare", "-Ur", "sh", "-c", inside], capture_output=True, text=True, timeout=60, check=False
    )
    found = json.loads(done.stdout or "null")
    assert found is not None, done.stderr
    assert (
        found["mode"] == ("copy" if found["copies"] else "none")
        and found["why_not"]
        and found["user_namespaces"] == "at most 0"
    )
