"""The tool code_interpreter: Python on a copy of the workbook; what the code changes in the file comes back as edits.

The changes enter the journal as constants and formulas of single cells, so a perturbed copy gets what was written, not
what the code would have computed there. Charts and formatting made by code are not taken over (number formats of
changed cells are).
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from ..tools import tool
from .edits import Batch, Edit, Format, ManageSheet, SetCells
from .engines.base import Book, Content, EngineError
from .fields import Path, check_path
from .interpreter import CodeResult
from .package import PackageError, check_package
from .refs import Rect
from .workspace import Workspace, mistake

MAX_CODE = 50_000
MAX_CHANGED = 300_000


@tool(
    effect="writes",
    blocking=True,
    other_names=("python", "run_python", "execute_code", "run_code", "code", "exec", "interpreter"),
    aliases={"source": "code", "script": "code", "python": "code", "program": "code"},
)
def code_interpreter(
    space: Workspace,
    code: Annotated[str, Field(max_length=MAX_CODE, min_length=1, examples=["print(1 + 1)"])],
    path: Path = None,
) -> str:
    """Run Python in a fresh process beside data.xlsx (openpyxl is there, a network is not). What it saves there is
    kept.
    """
    check_path(path)
    before = space.export()
    result = space.code.run(code, before)
    if result.refused is not None or result.stopped is not None:
        space.met.append(f"code_interpreter: {result.stopped or result.refused}")
    if result.refused is not None:
        raise mistake(
            "unavailable",
            f"code_interpreter is not available here: {result.refused}",
            retryable=False,
            hint="Use the other tools.",
        )
    note = _status(result, space)
    if result.package is not None and result.package != before:
        changed, notes = _take_back(space, result.package)
        note += "; ".join(
            (f"[data.xlsx: {changed} cells changed" if changed else "[data.xlsx: nothing changed", *notes)
        )
        note += "]"
    text = result.output.rstrip("\n")
    return f"{text}\n{note}" if text and note else text or note or "(no output)"


def _status(result: CodeResult, space: Workspace) -> str:
    limits = space.code.limits
    if result.stopped == "time":
        return f"[stopped after {limits.seconds:g} s; data.xlsx is as before]"
    if result.stopped == "memory":
        return f"[stopped above {limits.memory_mb} MB of memory; data.xlsx is as before]"
    return f"[exit status {result.status}] " if result.status else ""


def _take_back(space: Workspace, package: bytes) -> tuple[int, list[str]]:
    """Commit what differs between the workbook and `package`; how many cells that is, and what else is to be said."""
    try:
        checked = check_package(package)
        after = space.engine.open(checked.data)
    except (PackageError, EngineError) as error:
        raise mistake(
            "bad_workbook",
            f"the data.xlsx that the code left cannot be used: {error}",
            hint="Save it with openpyxl; the workbook is as it was before.",
        ) from error
    edits, changed = differences(space.book, after)
    if changed > MAX_CHANGED:
        raise mistake("too_many_cells", f"the code changed {changed} cells; at most {MAX_CHANGED} are taken over")
    if edits:
        space.commit(edits[0] if len(edits) == 1 else Batch(tuple(edits)))
    return changed, [note for note in checked.notes if note not in space.notes]


def differences(before: Book, after: Book) -> tuple[list[Edit], int]:
    """Edits that turn `before` into `after` as far as sheets, contents and number formats go; and the cells changed."""
    had = {info.name: info for info in before.sheets()}
    has = {info.name: info for info in after.sheets()}
    edits: list[Edit] = [ManageSheet("create", name) for name in has if name not in had]
    changed = 0
    for name in has:
        cells, formats = _sheet_differences(before if name in had else None, after, name)
        changed += len(cells)
        edits.extend([SetCells(name, tuple(cells))] if cells else [])
        edits.extend(formats)
    gone = [ManageSheet("delete", name) for name in had if name not in has]
    changed += sum(len(before.cells(edit.sheet)) for edit in gone)
    for name in has:
        if name in had and had[name].state != has[name].state:
            edits.append(ManageSheet("unhide" if has[name].state == "visible" else "hide", name))
    return [*edits, *gone], changed


def _sheet_differences(
    before: Book | None, after: Book, name: str
) -> tuple[list[tuple[int, int, Content]], list[Edit]]:
    old = before.contents(name) if before is not None else {}
    new = after.contents(name)
    cells: list[tuple[int, int, Content]] = []
    formats: list[Edit] = []
    for at in sorted(at for at in old.keys() | new.keys() if old.get(at) != new.get(at)):
        cells.append((*at, new.get(at)))
        had = before.number_format(name, *at).lower() if before is not None else "general"
        if (code := after.number_format(name, *at)).lower() != had:
            formats.append(Format(name, Rect(*at, *at), (("number_format", code),)))
    return cells, formats


CODING = (code_interpreter,)
