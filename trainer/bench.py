"""`espalier bench NAME`: runs `results/NAME/measure.py` of the checkout one stands in.

An editable install counts as standing in the checkout that it was made from. The benchmark runs in a process of its
own, with `results/` (for `_bench`) and its own folder importable, and nothing of the root folders in the way of the
installed package.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from .errors import UserError


def run_bench(name: str, *, json_file: Path | None = None, quick: bool = False, device: str | None = None) -> int:
    """Run one benchmark, on `device` (None: its own default); returns its exit code. Raises `UserError` outside a
    checkout or for a wrong name.
    """
    results = find_results(Path.cwd(), Path(__file__).resolve())
    if results is None:
        raise UserError("bench runs in a checkout of Espalier: clone the repository and call it there.")
    script = results / name / "measure.py"
    if not script.is_file():
        known = sorted(path.parent.name for path in results.glob("*/measure.py"))
        raise UserError(f"there is no benchmark {name!r} in {results}; there are {', '.join(known) or 'none yet'}.")
    command = [sys.executable, "-P", str(script)]
    command += ["--json", str(json_file.absolute())] if json_file is not None else []
    command += ["--quick"] if quick else []
    command += ["--device", device] if device is not None else []
    paths = [str(results), str(script.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)}, check=False)
    return 130 if done.returncode < 0 else done.returncode


def find_results(here: Path, package: Path) -> Path | None:
    """The `results/` of a checkout around `here` (a folder), else of the one that holds `package` (a file)."""
    for folder in (here, *here.parents, *package.parents):
        if (folder / "results" / "_bench.py").is_file():
            return folder / "results"
    return None
