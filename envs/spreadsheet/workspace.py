"""The workbook an agent has in hand: an engine's book, the journal of edits, and what tools ask of both.

Always true: an edit is applied whole or not at all (a refused one leaves the book as it was); after every committed
edit the book is recalculated; the journal replayed on the starting workbook gives the present one.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..core import ToolError
from ..repair import shorten, similar
from ..tools import ToolMistake
from .edits import Edit, formats_now
from .engines.base import Book, Engine, EngineError, Value
from .interpreter import CodeRunner
from .refs import BadReference, RangeRef, Rect, cell_name, parse_range, quote_sheet, split_list
from .text import date_kind, value_literal

FILE_NAME = "data.xlsx"
DAYS_1904 = 1_462
"""Days between the two epochs workbooks count from."""
SHOWN = 4
"""Cells a writing tool shows of what it wrote."""
RECALC_BUDGET_S = 5.0
"""CPU seconds one recalculation may take; an edit that makes it slower is undone."""


@dataclass(frozen=True)
class Opened:
    """A starting workbook, shared by the episodes that start from it.

    `package`: its checked bytes; `snapshot`: the engine's state; `sheets`: (name, used rectangle, visibility) in order;
    `formats`: number formats by cell, filled as cells are seen; `notes`: what was taken out of the package, in
    sentences.
    """

    package: bytes
    snapshot: bytes
    sheets: tuple[tuple[str, Rect | None, str], ...]
    formats: dict[tuple[str, int, int], str]
    notes: tuple[str, ...] = ()


class Workspace:
    """One open workbook and its journal. `load` starts over.

    `met`: limits of time or memory that tools have met; whoever reports them clears it.
    """

    def __init__(self, engine: Engine, code: CodeRunner | None = None) -> None:
        self.engine = engine
        self.code = code or CodeRunner()
        self._start: Opened | None = None
        self.journal: tuple[Edit, ...] = ()
        self.history = ""
        self.met: list[str] = []
        self._book: Book | None = None
        self._extents: dict[str, Rect | None] = {}
        self._formats: dict[tuple[str, int, int], str] = {}

    @property
    def book(self) -> Book:
        """The open book."""
        if self._book is None:
            raise RuntimeError("no workbook is open")
        return self._book

    @property
    def notes(self) -> tuple[str, ...]:
        """What was noted of the starting package."""
        return () if self._start is None else self._start.notes

    def load(
        self, start: Opened, state: bytes | None = None, journal: tuple[Edit, ...] = (), history: str = ""
    ) -> None:
        """Begin at `start`, or continue from an engine's `state` and the journal that led there (digest: `history`)."""
        self._start = start
        self._book = self.engine.restore(start.snapshot if state is None else state)
        self.journal = journal
        self.history = history
        self._extents = {} if journal else {name: rect for name, rect, _ in start.sheets}
        self._formats = start.formats if all(edit.keeps_formats for edit in journal) else {}

    def commit(
        self,
        edit: Edit,
        accept: Callable[[Book], None] | None = None,
        explain: Callable[[EngineError], ToolMistake] | None = None,
    ) -> None:
        """Apply `edit`, recalculate, and note it in the journal.

        `accept` looks at the result and raises to refuse it; `explain` words what the engine refused. Whatever is
        raised, the book is as it was before.
        """
        before = self.book.snapshot()
        try:
            edit.apply(self.book)
            started = time.thread_time()
            self.book.recalculate()
            if time.thread_time() - started > RECALC_BUDGET_S:
                self.met.append("time of a recalculation")
                raise mistake(
                    "too_costly",
                    f"recalculating the workbook after this took more than {RECALC_BUDGET_S:g} s, so it was undone",
                    hint="Name the cells that hold data instead of whole columns or rows.",
                )
            if accept is not None:
                accept(self.book)
        except EngineError as error:
            self._book = self.engine.restore(before)
            raise (explain(error) if explain is not None else mistake("refused", str(error))) from error
        except BaseException:
            self._book = self.engine.restore(before)
            raise
        self.journal = (*self.journal, edit)
        self.history = hashlib.sha256(f"{self.history}\n{edit!r}".encode()).hexdigest()
        self._extents = {}
        if not edit.keeps_formats:
            self._formats = {}

    def replay(self, journal: tuple[Edit, ...]) -> None:
        """Apply another workspace's journal to this one's start, without recalculating. Raises `EngineError`."""
        for edit in journal:
            edit.apply(self.book)
        self.journal = journal
        self._extents, self._formats = {}, {}

    def export(self) -> bytes:
        """The workbook as .xlsx: the original package, changed where the book differs."""
        from .export import export_package  # parses XML: only who exports pays for it

        if self._start is None:
            raise RuntimeError("no workbook is open")
        looks = [look for look in formats_now(self.journal) if look.style]
        return export_package(self._start.package, self.engine.restore(self._start.snapshot), self.book, looks)

    def sheet_names(self) -> list[str]:
        """Sheets in order."""
        return [info.name for info in self.book.sheets()]

    def sheet(self, name: str | None, field: str = "sheet_name") -> str:
        """The sheet meant by `name`: case does not matter, None is the first. Raises `ToolMistake` for an unknown
        one.
        """
        names = self.sheet_names()
        if name is None:
            return names[0]
        wanted = name.strip().strip("'").replace("''", "'")
        for known in names:
            if known == name or known.casefold() == wanted.casefold():
                return known
        guess = similar(wanted, {n: n for n in names}) or names[0]
        raise mistake(
            "unknown_sheet",
            f"there is no sheet named {shorten(name)!r}",
            field=field,
            received=shorten(name),
            expected="one of " + ", ".join(names[:20]),
            patch={field: guess},
        )

    def extent(self, sheet: str) -> Rect | None:
        """The smallest rectangle that holds every non-empty cell, or None."""
        if sheet not in self._extents:
            self._extents[sheet] = used_rect(self.book, sheet)
        return self._extents[sheet]

    def extents(self) -> list[tuple[str, Rect | None, str]]:
        """(sheet, used rectangle, visibility) of every sheet, in order."""
        return [(info.name, self.extent(info.name), info.state) for info in self.book.sheets()]

    def target(
        self, text: str, sheet_name: str | None, field: str = "range", among: Sequence[str] | None = None
    ) -> tuple[str, Rect]:
        """The one rectangle that `text` names; `among`: the list it stands in, if any. Raises `ToolMistake`."""
        try:
            return self.targets(text, sheet_name, field, limit=1)[0]
        except ToolMistake as found:
            patch = found.error.suggestions[0].get("arguments", {}) if found.error.suggestions else {}
            if among is None or field not in patch:
                raise
            fixed = [patch[field] if other is text else other for other in among]
            raise ToolMistake(replace(found.error, suggestions=({"arguments": {field: fixed}},))) from found

    def targets(
        self, text: str, sheet_name: str | None, field: str = "range", limit: int = 20
    ) -> list[tuple[str, Rect]]:
        """The rectangles of a comma list, each with its sheet. Raises `ToolMistake`."""
        items = split_list(text)
        if not items or len(items) > limit:
            raise mistake(
                "bad_range",
                f"{field!r} names {len(items)} ranges; {'one is' if limit == 1 else f'1 to {limit} are'} allowed",
                field=field,
                received=shorten(text),
                expected="a range such as A1:B2",
                patch={field: ",".join(items[:limit])} if items else self._whole(field, sheet_name),
            )
        return [self._one(item, items, sheet_name, field) for item in items]

    def _one(self, item: str, items: list[str], sheet_name: str | None, field: str) -> tuple[str, Rect]:
        try:
            ref = parse_range(item)
        except BadReference as bad:
            patch = None
            if bad.suggestion is not None:
                patch = {field: ",".join(bad.suggestion if other is item else other for other in items)}
            raise mistake(
                "bad_range",
                str(bad),
                field=field,
                received=shorten(item),
                expected="a range such as A1:B2",
                patch=patch,
            ) from bad
        if ref.sheet is None:
            return self.sheet(sheet_name), ref.rect
        try:
            return self.sheet(ref.sheet, field), ref.rect
        except ToolMistake as unknown:
            guess = self.nearest(ref.sheet)
            fixed = ",".join(str(RangeRef(guess, ref.rect)) if other is item else other for other in items)
            raise mistake(
                "unknown_sheet",
                unknown.error.message,
                field=field,
                received=shorten(item),
                expected=unknown.error.expected,
                patch={field: fixed},
            ) from unknown

    def nearest(self, name: str) -> str:
        """The sheet spelt most like `name`, else the first."""
        names = self.sheet_names()
        return similar(name, {n: n for n in names}) or names[0]

    def _whole(self, field: str, sheet_name: str | None) -> Mapping[str, Any]:
        return {field: str(self.extent(self.sheet(sheet_name)) or "A1")}

    def qualified(self, sheet: str) -> str:
        """ "Sheet!" with quotes where needed."""
        return quote_sheet(sheet) + "!"

    def number_format(self, sheet: str, row: int, column: int) -> str:
        """The number format of a cell."""
        key = (sheet, row, column)
        found = self._formats.get(key)
        if found is None:
            found = self._formats[key] = self.book.number_format(sheet, row, column)
        return found

    def item(
        self, sheet: str, row: int, column: int, value: Value, *, details: str = "", head: str = "", bare: bool = False
    ) -> str:
        """A cell as the agent reads it, `value@ref{details}`; `head` is a sheet's name with "!", `bare` leaves the
        value out.
        """
        shown = "" if bare else self.literal(sheet, row, column, value)
        item = f"{shown}@{head}{cell_name(row, column)}"
        return f"{item}{{{details}}}" if details else item

    def literal(self, sheet: str, row: int, column: int, value: Value) -> str:
        """A value as the agent reads it; a number with a date format is a date."""
        if type(value) is not float:
            return value_literal(value)
        code = self.number_format(sheet, row, column)
        if self.book.date1904 and date_kind(code):
            value += DAYS_1904
        return value_literal(value, code)

    def shown(self, sheet: str, rect: Rect) -> str:
        """The first four cells of a rectangle as `value@ref`, and how many there are when that is not all."""
        items: list[str] = []
        right = min(rect.right, rect.left + SHOWN - 1)
        for row in range(rect.top, min(rect.bottom, rect.top + SHOWN - 1) + 1):
            for column, value in enumerate(self.book.values(sheet, row, rect.left, row, right)[0], rect.left):
                if len(items) < SHOWN:
                    items.append(self.item(sheet, row, column, value))
        return " ".join(items) + (f" ... ({rect.cells} cells)" if rect.cells > len(items) else "")


def mistake(
    code: str,
    message: str,
    *,
    field: str | None = None,
    received: Any = None,
    expected: str | None = None,
    hint: str | None = None,
    patch: Mapping[str, Any] | None = None,
    retryable: bool = True,
) -> ToolMistake:
    """A `ToolMistake` whose one suggestion patches the call's arguments with `patch`."""
    suggestions = ({"arguments": dict(patch)},) if patch else ()
    return ToolMistake(ToolError(code, message, field, received, expected, retryable, hint, suggestions))


def used_rect(book: Book, sheet: str) -> Rect | None:
    """The smallest rectangle of `sheet` that holds every non-empty cell, or None."""
    cells = book.cells(sheet)
    if not cells:
        return None
    columns = [column for _, column in cells]
    rows = [row for row, _ in cells]
    return Rect(min(rows), min(columns), max(rows), max(columns))
