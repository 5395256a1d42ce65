"""What this machine allows a box, and which mode is left: for `espalier doctor` and for people.

full: `Box`, and with it `Box(live=False)`, for who wants snapshots that nothing in memory can stand in the way of.
copy: `CopyBox`, where namespaces or overlays are not to be had. none: that neither. Every probe asks the kernel by
doing the thing.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from . import cgroup, kernel
from .box import Box
from .copying import CopyBox
from .terms import BoxError, Limits

Mode = Literal["full", "copy", "none"]


@dataclass(frozen=True)
class Survey:
    """`mode`: the best that works here; `why_not`: what stands in the way of a full one. The rest is what was found."""

    mode: Mode
    why_not: str
    overlay: str
    user_namespaces: str
    landlock: str
    cgroup: str
    criu: str


def survey() -> Survey:
    """Look at this machine; takes as long as a box takes to start."""
    why_not, overlay = _full()
    mode: Mode = "full"
    if why_not:
        mode, why_not = _less(why_not)
    return Survey(mode, why_not, overlay, _user_namespaces(), _landlock(), _cgroup(), _criu())


def _full() -> tuple[str, str]:
    """Why no full box can be had ("" if one can), and the options of its overlay."""
    try:
        with Box(limits=Limits(seconds=20)) as box:
            box.python("x = 1")
            here = box.snapshot()
            box.python("x = 2")
            box.rollback(here)
            if box.python("x").text != "1\n":
                return "a rollback did not bring a variable back", ""
            line = box.shell("grep ' /workspace overlay' /proc/mounts").text
    except BoxError as error:
        return str(error).removeprefix(f"{error.code}: "), ""
    found = [
        word for word in re.split(r"[ ,]", line) if word.startswith(("userxattr", "redirect_dir", "index", "metacopy"))
    ]
    return "", ", ".join(found)


def _less(why_not: str) -> tuple[Mode, str]:
    """What is left where no full box can be had, and why not more."""
    try:
        with CopyBox(limits=Limits(seconds=20)) as box:
            out = box.python("print(1)")
            return ("copy", why_not) if out.text == "1\n" else ("none", f"{why_not}; {out.text.strip()[-200:]}")
    except (BoxError, OSError) as error:
        return "none", f"{why_not}; {str(error).removeprefix('not_isolated: ')}"


def _user_namespaces() -> str:
    if sys.platform != "linux":
        return "not on this system"
    limit = Path("/proc/sys/user/max_user_namespaces")
    count = limit.read_text().strip() if limit.exists() else "unknown"
    for name in ("kernel/unprivileged_userns_clone", "kernel/apparmor_restrict_unprivileged_userns"):
        switch = Path("/proc/sys") / name
        if switch.exists():
            count += f", {name} = {switch.read_text().strip()}"
    return f"at most {count}"


def _landlock() -> str:
    try:
        return f"version {kernel.syscall(kernel.LANDLOCK_CREATE, None, 0, 1, name='landlock')}"
    except OSError:
        return "none (mounts are held by the system-call filter alone)"


def _cgroup() -> str:
    version = "version 2" if (cgroup.ROOT / "cgroup.controllers").exists() else "version 1"
    if not cgroup.ROOT.exists():
        return "none: limits hold for each process, and for a running call together"
    folders = cgroup.make(Limits().plain())
    cgroup.remove(folders)
    names = sorted({Path(folder).parent.name for folder in folders})
    return f"{version}, " + (f"groups can be made ({', '.join(names)})" if folders else "no group can be made here")


def _criu() -> str:
    path = shutil.which("criu")
    if path is None:
        return "not installed (not used)"
    done = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=20, check=False)
    return f"{done.stdout.split(chr(10))[0].strip() or 'unknown version'} (not used)"
