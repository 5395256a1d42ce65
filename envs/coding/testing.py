"""Running pytest in a box: the visible tests when the agent asks, the hidden ones when the episode is over.

The tests run in a fork of the box's interpreter, which has pytest loaded already; the result is names and outcomes, no
times and no addresses, so that equal code gets equal answers. Hidden tests are written only after the agent's last
turn, for an interpreter that has never run the agent's code, and everything the agent started is ended first.

The fork reports each test to its parent, which never runs the agent's code, behind a mark drawn for this run. A run
counts when it ends with pytest's own end, when every message has the mark, and when every test that the text of the
hidden tests names has passed: what is written into the pipe without the mark, and an end before the end, earn nothing.
The code under test still shares a process with pytest, as in every pytest run: a policy that writes code to reach into
pytest itself can forge an outcome, and what it wrote stands in its trajectory.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from ..core import EnvFailure
from ..sandbox import Box, BoxError, BoxSnapshot, Stopped

HIDDEN = "/tmp/hidden-tests"
MOST_MESSAGE = 300
MOST_SHOWN = 60_000
"""Bytes of the tests that are listed one by one, failed ones first; a box keeps 100,000 bytes of output."""
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
def _espalier_results(writing, mark, most):
    import json, os
    def tell(*row):
        left = mark + json.dumps(row).encode() + b"\\n"
        while left:
            left = left[os.write(writing, left):]
    class Results:
        def pytest_runtest_logreport(self, report):
            if report.when == "call" or report.failed or report.skipped:
                crash = getattr(report.longrepr, "reprcrash", None)
                text = crash.message if crash else str(report.longrepr or "")
                tell(report.nodeid, report.outcome, report.when, text[:most])
        def pytest_collectreport(self, report):
            if report.failed:
                text = str(report.longrepr).strip().splitlines()
                tell(report.nodeid or "collection", "failed", "collect", text[-1][:most] if text else "")
    return tell, Results()

def _espalier_tests(paths, root, most, left_out, named, room):
    import gc, json, os, sys
    reading, writing = os.pipe()
    mark = os.urandom(16).hex().encode()
    child = os.fork()
    if child == 0:
        gc.freeze()
        status = 3
        try:
            import pytest
            tell, results = _espalier_results(writing, mark, most)
            del mark
            for name, module in list(sys.modules.items()):
                if str(getattr(module, "__file__", None) or "").startswith(("/workspace", "/tmp")):
                    del sys.modules[name]
            os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
            os.chdir("/workspace")
            sys.path.insert(0, "/workspace")
            nothing = os.open(os.devnull, os.O_RDWR)
            for fd in map(int, os.listdir("/proc/self/fd")):
                if fd not in (writing, nothing):
                    os.dup2(nothing, fd, inheritable=fd < 3)
            options = ["-q", "-p", "no:cacheprovider", "-c", os.devnull, "--rootdir", root, "--confcutdir", root,
                       "--import-mode", "importlib", *paths]
            for name in left_out:
                options += ["-p", "no:" + name]
            tell(int(pytest.main(options, plugins=[results])))
            status = 0
        finally:
            os._exit(status)
    os.close(writing)
    rows, end, rest, more = [], None, b"", True
    while more and end is None:
        more = os.read(reading, 65536)
        *lines, rest = (rest + more).split(b"\\n")
        for line in lines:
            if not line.startswith(mark):
                more = b""
                break
            row = json.loads(line[len(mark):])
            if len(row) == 1:
                end = row[0]
                break
            rows.append(row)
        if len(rest) > 1 << 20:
            break
    os.close(reading)
    if end is None:
        try:
            os.kill(child, 9)
        except ProcessLookupError:
            pass
    os.waitpid(child, 0)
    named = dict.fromkeys(named, False)
    found = []
    for nodeid, outcome, when, text in rows:
        name = nodeid.partition("[")[0]
        if when == "setup" and outcome == "skipped" and name not in named:
            continue
        if outcome == "passed" and name in named:
            named[name] = True
        text = text if outcome == "failed" else ""
        found.append([nodeid.split("::")[-1][:most], outcome, text])
    shown = {}
    for wanted in (True, False):
        for number, row in enumerate(found):
            size = len(json.dumps(row)) + 2
            if (row[1] == "failed") == wanted and size <= room:
                room -= size
                shown[number] = row
    return json.dumps({
        "end": end, "passed": sum(row[1] == "passed" for row in found),
        "total": len(found), "missing": sum(not seen for seen in named.values()),
        "shown": [shown[number] for number in sorted(shown)],
    })
"""


@dataclass(frozen=True)
class TestResult:
    """One test: its name, "passed", "failed" or "skipped", and what it said."""

    name: str
    outcome: str
    message: str


@dataclass(frozen=True)
class TestRun:
    """One run of pytest. `shown`: the tests in their order, as many as there is room for, failed ones first.

    `end`: what pytest itself returned, None when the run was ended from within before its end. `missing`: hidden tests
    that did not pass although their text names them.
    """

    shown: tuple[TestResult, ...]
    passed: int
    total: int
    end: int | None
    missing: int

    @property
    def all_passed(self) -> bool:
        """Whether there were tests, all of them ran, and each of them passed."""
        return self.end == 0 and self.missing == 0 and 0 < self.passed == self.total


def preload(box: Box) -> None:
    """Load pytest into the box's interpreter. Raises `BoxError`: without it every solution would fail its tests."""
    out = box.python(_PRELOAD)
    if out.status or out.stopped:
        last = out.text.strip().rpartition("\n")[2] or f"ended by {out.stopped}"
        raise BoxError("no_pytest", f"pytest cannot be loaded in the box, so nothing can be graded: {last}")


def run_visible(box: Box, seconds: float) -> TestRun | Stopped:
    """The tests in the workspace, or what stopped them. Raises `ValueError` for an unreadable result."""
    return _run(box, ["/workspace"], "/workspace", seconds, ())


def run_hidden(box: Box, clean: BoxSnapshot, tests: Mapping[str, str], seconds: float) -> TestRun | Stopped:
    """The hidden tests on the workspace as it is, or what stopped them; ends everything that runs in the box. Raises
    `EnvFailure`.
    """
    try:
        box.restart(clean)
        box.shell(f"rm -rf {HIDDEN}")
        for name, text in tests.items():
            box.write_file(f"{HIDDEN}/{name}", text.encode())
        return _run(box, [HIDDEN], HIDDEN, seconds, sorted(_named(tests)))
    except (BoxError, OSError, ValueError) as error:
        raise EnvFailure("grading_failed", str(error)) from error


def _run(box: Box, paths: list[str], root: str, seconds: float, named: Sequence[str]) -> TestRun | Stopped:
    arguments = f"{paths!r}, {root!r}, {MOST_MESSAGE}, {_NOT_NEEDED!r}, {tuple(named)!r}, {MOST_SHOWN}"
    call = f"{_RUN}\nprint({_MARK!r} + _espalier_tests({arguments}) + {_MARK!r})\n"
    out = box.python(call, seconds=seconds)
    if out.stopped:
        return out.stopped
    try:
        told = json.loads(out.text.split(_MARK)[1])
        shown = tuple(TestResult(str(name), str(outcome), str(message)) for name, outcome, message in told["shown"])
        return TestRun(shown, told["passed"], told["total"], told["end"], told["missing"])
    except (ValueError, TypeError, LookupError) as error:
        last = out.text.strip().rpartition("\n")[2][-MOST_MESSAGE:]
        raise ValueError(f"the tests ran, but their results cannot be read: {last}") from error


_CHOOSING = ("__test__", "importorskip", "pytestmark", "pytest.skip(", "skipTest(", "SkipTest", "\ndel ")
"""What stands in the text of a file that may leave tests out."""


def _named(tests: Mapping[str, str]) -> set[str]:
    """The tests that pytest is certain to run, as their text names them: plain functions and methods of test files.

    What may be left out on purpose (skips, fixtures, hooks and marks that choose) is not among them.
    """
    for name, text in tests.items():
        if PurePosixPath(name).name == "conftest.py" and ("collect" in text or "skip" in text):
            return set()
    found: set[str] = set()
    for name, text in tests.items():
        path = PurePosixPath(name)
        is_test = path.suffix == ".py" and (path.stem.startswith("test_") or path.stem.endswith("_test"))
        if not is_test or len(path.parts) > 1 or any(word in text for word in _CHOOSING):
            continue
        try:
            body = ast.parse(text).body
        except (SyntaxError, ValueError, RecursionError):  # pytest will say so
            continue
        found |= {f"{name}::{test}" for test in _functions(body)}
        for part in body:
            if isinstance(part, ast.ClassDef) and _collected(part):
                found |= {f"{name}::{part.name}::{test}" for test in _functions(part.body)}
    return found


def _functions(body: Sequence[ast.stmt]) -> Iterator[str]:
    for part in body:
        if isinstance(part, ast.FunctionDef) and part.name.startswith("test") and _plain(part):
            yield part.name


def _collected(part: ast.ClassDef) -> bool:
    bases = [ast.unparse(base) for base in part.bases]
    makes = any(isinstance(p, ast.FunctionDef) and p.name in ("__init__", "__new__") for p in part.body)
    named = part.name.startswith("Test") and not bases
    return _plain(part) and not makes and not part.keywords and (named or bases == ["unittest.TestCase"])


def _plain(part: ast.FunctionDef | ast.ClassDef) -> bool:
    """Whether nothing stands before it but marks that leave no test out."""
    said = [ast.unparse(d) for d in part.decorator_list]
    return all(text.startswith("pytest.mark.") and "skip" not in text and "xfail" not in text for text in said)
