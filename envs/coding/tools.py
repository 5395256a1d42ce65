"""The tools of a coding task: a shell, a live interpreter, files, tests, and submit."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Annotated, NoReturn

from pydantic import Field

from ..core import ToolError
from ..sandbox import Box, BoxError, BoxSnapshot, Output, Stopped
from ..tools import ToolMistake, tool
from . import testing

MOST_TEXT = 20_000
"""Characters of an answer."""
MOST_EDITED = 4 << 20
"""Bytes of a file that `edit_file` changes."""

Path = Annotated[str, Field(min_length=1, max_length=4096, examples=["notes.txt"], description="Below /workspace.")]
Text = Annotated[str, Field(max_length=500_000, examples=["x = 1\n"])]

_VARYING = re.compile(
    r"\b(?:date|time|datetime|perf_counter|uptime|ps|top|free|df|vmstat|getpid|hostname|mktemp|tempfile|random|urandom"
    r"|RANDOM|secrets|uuid\w*|shuf|stat|st_mtime|getmtime|ls\s+-\w*l\w*)\b|\$\$|\bid\("
)
"""What names a clock, chance, or this machine's state in a command or in code; too much rather than too little."""

_TOOK = re.compile(
    r"(\b\d+ (?:passed|failed|errors?|skipped|deselected|xfailed|xpassed|warnings?)\b[^\n]*? in"
    r"|\bno tests ran in|\bRan \d+ tests? in) \d+\.\d+s"
)
"""How long tests took, which is another time each time: shown as 0.00s."""


@dataclass
class Desk:
    """What the tools work on: the box of the episode, and how long a call may take. `stopped`: limits that were met;
    `varying`: words of the calls by which the same calls may go otherwise next time; `undone`: commands that only
    looked, so that the box is as it was before them.
    """

    box: Box
    seconds: float
    stopped: list[str] = field(default_factory=list)
    varying: list[str] = field(default_factory=list)
    undone: int = 0

    def shell(self, command: str) -> Output:
        """Run a command; one that writes no file and leaves no process is undone, so that it has changed nothing, in
        the interpreter neither.
        """
        self.varying += _VARYING.findall(command)
        before = self._here()
        out = self.box.shell(command, seconds=self.seconds)
        if before is not None and not out.stopped and not out.restarted and not self.box.changed():
            self.box.rollback(before)
            self.undone += 1
        return out

    def _here(self) -> BoxSnapshot | None:
        try:
            return self.box.snapshot()
        except BoxError as error:
            if error.code not in ("incomplete", "full"):
                raise
            return None


def _mistake(code: str, message: str, hint: str | None = None, field: str | None = None) -> NoReturn:
    raise ToolMistake(ToolError(code, message, field=field, hint=hint))


def _stopped(by: Stopped, desk: Desk) -> str:
    desk.stopped.append(by)
    why = {"time": f"after {desk.seconds:g} s", "cpu": "its processor time was up", "memory": "it used too much memory"}
    return f"[stopped: {why.get(by, 'it crashed')}]"


def _told(out: Output, desk: Desk) -> str:
    text = _TOOK.sub(r"\1 0.00s", out.text)
    text = text if len(text) <= MOST_TEXT else text[:MOST_TEXT] + "\n... (cut)"
    notes = []
    if out.cut:
        notes.append(f"[{out.cut} more bytes of output were dropped]")
    if out.stopped:
        notes.append(_stopped(out.stopped, desk))
    if out.restarted:
        notes.append("[the interpreter was restarted: its variables are gone, files are kept]")
    elif out.status and not out.stopped:
        notes.append(f"[exit status {out.status}]")
    return "\n".join(filter(None, (text.rstrip("\n"), *notes))) or "(no output)"


def _file_mistake(path: str, error: OSError) -> NoReturn:
    said = {
        FileNotFoundError: ("not_found", f"there is no file {path}"),
        IsADirectoryError: ("is_a_folder", f"{path} is a folder"),
        NotADirectoryError: ("not_a_folder", f"{path} is not a folder, or leads through a file"),
        PermissionError: ("not_allowed", f"{path} may not be read or changed"),
    }
    code, message = said.get(type(error), ("file_error", f"{path}: {error.strerror}"))
    _mistake(code, message, hint="list_files shows what is there.", field="path")


@tool(
    effect="writes", blocking=True, other_names=("bash", "sh", "execute", "terminal", "run"), aliases={"cmd": "command"}
)
def shell(desk: Desk, command: Annotated[str, Field(min_length=1, max_length=50_000, examples=["ls"])]) -> str:
    """Run a shell command in the interpreter's working directory; its output."""
    return _told(desk.shell(command), desk)


@tool(effect="writes", blocking=True, other_names=("ipython", "exec", "run_python"), aliases={"source": "code"})
def python(desk: Desk, code: Annotated[str, Field(min_length=1, max_length=50_000, examples=["1 + 1"])]) -> str:
    """Run Python in an interpreter that stays: variables and imports are kept. The last expression's value is shown."""
    desk.varying += _VARYING.findall(code)
    return _told(desk.box.python(code, seconds=desk.seconds), desk)


@tool(effect="reads", other_names=("cat", "open_file", "view", "read"), aliases={"file": "path", "filename": "path"})
def read_file(desk: Desk, path: Path) -> str:
    """The text of a file."""
    try:
        data = desk.box.read_file(path, most=4 * MOST_TEXT)
    except OSError as error:
        _file_mistake(path, error)
    text = data.decode("utf-8", "replace")
    return text if len(text) <= MOST_TEXT else text[:MOST_TEXT] + "\n... (cut)"


@tool(
    effect="writes", other_names=("create_file", "save_file", "write"),
    aliases={"file": "path", "filename": "path", "text": "content", "contents": "content", "code": "content"},
)  # fmt: skip
def write_file(desk: Desk, path: Path, content: Text) -> str:
    """Write a file, whole; folders are made."""
    try:
        desk.box.write_file(path, content.encode())
    except OSError as error:
        _file_mistake(path, error)
    return f"wrote {len(content.encode())} bytes"


@tool(
    effect="writes", other_names=("replace", "str_replace", "edit", "patch"),
    aliases={"file": "path", "filename": "path", "old_str": "old", "new_str": "new", "search": "old", "replace": "new"},
)  # fmt: skip
def edit_file(
    desk: Desk,
    path: Path,
    old: Annotated[str, Field(min_length=1, max_length=100_000, examples=["x = 1"])],
    new: Annotated[str, Field(max_length=100_000, examples=["x = 2"])],
) -> str:
    """Replace the one place of a file that reads `old` by `new`."""
    try:
        data = desk.box.read_file(path, most=MOST_EDITED + 1)
        if len(data) > MOST_EDITED:
            hint = "Change it with the shell or with Python."
            _mistake("too_large", f"{path} is larger than {MOST_EDITED} bytes", hint=hint, field="path")
        text = data.decode("utf-8")
        count = text.count(old)
        if count == 0:
            _mistake("not_found", f"{path} has no such text", hint="read_file shows it as it is.", field="old")
        if count > 1:
            _mistake(
                "ambiguous", f"{path} has that text {count} times", hint="Give more of its surroundings.", field="old"
            )
        desk.box.write_file(path, text.replace(old, new).encode())
    except UnicodeDecodeError:
        _mistake("not_text", f"{path} is not text", field="path")
    except OSError as error:
        _file_mistake(path, error)
    return "replaced"


@tool(effect="reads", other_names=("ls", "dir", "list_dir"), aliases={"folder": "path", "directory": "path"})
def list_files(desk: Desk, path: Annotated[str, Field(max_length=4096, examples=["."])] = ".") -> str:
    """The entries of a folder; a folder's name ends in /."""
    try:
        found = desk.box.list_files(path)
    except OSError as error:
        _file_mistake(path, error)
    marks = {"folder": "/", "link": "@"}
    return "\n".join(name + marks.get(kind, f"  {size}") for name, kind, size in found) or "(empty)"


@tool(effect="writes", blocking=True, other_names=("test", "pytest", "tests"))
def run_tests(desk: Desk) -> str:
    """Run the tests that are in the workspace."""
    try:
        found = testing.run_visible(desk.box, desk.seconds)
    except ValueError as error:
        return f"[{error}]"
    if isinstance(found, str):
        return _stopped(found, desk)
    lines = [f"{r.name}: {r.outcome}" + (f": {r.message}" if r.outcome == "failed" else "") for r in found.shown]
    if found.total > len(lines):
        lines.append(f"... ({found.total - len(lines)} more are not listed)")
    if found.end is None:
        lines.append("[the tests were ended before their end: the code under test left the process]")
    elif not found.total:
        return "no tests were found"
    return "\n".join([*lines, f"{found.passed} of {found.total} passed"])


@tool(effect="writes", ends=True, context=True, other_names=("finish", "done", "end"))
def submit(desk: Desk) -> str:
    """Hand the work in; this ends the episode."""
    return "submitted"


TOOLS = (shell, python, read_file, write_file, edit_file, list_files, run_tests, submit)
