"""Running pytest in a box: the visible tests when the agent asks, the hidden ones when the episode is over.

The tests run in a fork of the box's interpreter, which has pytest loaded already; the result is names and outcomes, no
times and no addresses, so that equal code gets equal answers. Hidden tests are written only after the agent's last
turn, for an interpreter that has never run the agent's code, and everything the agent started is ended first. The code
under test shares a process with them, as in every pytest run: a policy that writes code to forge their outcome can, and
what it wrote stands in its trajectory.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

from ..core import EnvFailure
from ..sandbox import Box, BoxError, BoxSnapshot

HIDDEN = "/tmp/hidden-tests"
MOST_MESSAGE = 300
_PRELOAD = """
import gc, importlib, json, os, pytest, sys
from _pytest import config as _config
for _name in getattr(_config, "default_plugins", ()):
    importlib.import_module("_pytest." + _name)
"""
_NOT_NEEDED = ("debugging", "faulthandler", "junitxml", "legacypath", "pastebin", "setuponly", "setupplan", "stepwise",
               "threadexception", "unraisableexception")  # fmt: skip
"""pytest's own plugins that change no outcome; without them a run takes two thirds of the time."""

_MARK = "\x1e"

_RUN = """
def _espalier_tests(paths, root, most, left_out):
    import gc, json, os, sys
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        gc.freeze()
        status = 3
        try:
            import pytest
            for name, module in list(sys.modules.items()):
                if str(getattr(module, "__file__", None) or "").startswith(("/workspace", "/tmp")):
                    del sys.modules[name]
            os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
            os.chdir("/workspace")
            sys.path.insert(0, "/workspace")
            nothing = os.open(os.devnull, os.O_RDWR)
            os.dup2(nothing, 1); os.dup2(nothing, 2)
            class Results:
                found = []
                def pytest_runtest_logreport(self, report):
                    if report.when == "call" or report.failed:
                        crash = getattr(report.longrepr, "reprcrash", None)
                        text = crash.message if crash else str(report.longrepr or "")
                        self.found.append([report.nodeid.split("::")[-1], report.outcome, text[:most]])
                def pytest_collectreport(self, report):
                    if report.failed:
                        text = str(report.longrepr).strip().splitlines()
                        self.found.append([report.nodeid or "collection", "failed", text[-1][:most] if text else ""])
            options = ["-q", "-p", "no:cacheprovider", "-c", os.devnull, "--rootdir", root, "--confcutdir", root,
                       "--import-mode", "importlib", *paths]
            for name in left_out:
                options += ["-p", "no:" + name]
            pytest.main(options, plugins=[Results()])
            os.write(writing, json.dumps(Results.found).encode()[:60000])
            status = 0
        finally:
            os._exit(status)
    os.close(writing)
    data = b""
    while chunk := os.read(reading, 65536):
        data += chunk
    os.close(reading)
    os.waitpid(child, 0)
    return data.decode()
"""


@dataclass(frozen=True)
class TestResult:
    """One test: its name, "passed", "failed" or "skipped", and what it said."""

    name: str
    outcome: str
    message: str


def preload(box: Box) -> None:
    """Load pytest into the box's interpreter. Raises `BoxError`: without it every solution would fail its tests."""
    out = box.python(_PRELOAD)
    if out.status or out.stopped:
        last = out.text.strip().rpartition("\n")[2] or f"ended by {out.stopped}"
        raise BoxError("no_pytest", f"pytest cannot be loaded in the box, so nothing can be graded: {last}")


def run_visible(box: Box, seconds: float) -> list[TestResult] | None:
    """The tests in the workspace; None when they did not end in time."""
    return _run(box, ["/workspace"], "/workspace", seconds)


def run_hidden(box: Box, clean: BoxSnapshot, tests: Mapping[str, str], seconds: float) -> list[TestResult] | None:
    """The hidden tests on the workspace as it is; ends everything that runs in the box. Raises `EnvFailure`."""
    try:
        box.restart(clean)
        box.shell(f"rm -rf {HIDDEN}")
        for name, text in tests.items():
            box.write_file(f"{HIDDEN}/{name}", text.encode())
        return _run(box, [HIDDEN], HIDDEN, seconds)
    except (BoxError, OSError) as error:
        raise EnvFailure("grading_failed", str(error)) from error


def _run(box: Box, paths: list[str], root: str, seconds: float) -> list[TestResult] | None:
    arguments = f"{paths!r}, {root!r}, {MOST_MESSAGE}, {_NOT_NEEDED!r}"
    call = f"{_RUN}\nprint({_MARK!r} + _espalier_tests({arguments}) + {_MARK!r})\n"
    out = box.python(call, seconds=seconds)
    parts = out.text.split(_MARK)
    if out.stopped or len(parts) != 3:
        return None
    try:
        found = json.loads(parts[1])
        return [TestResult(str(name), str(outcome), str(message)) for name, outcome, message in found]
    except (ValueError, TypeError):
        return []
