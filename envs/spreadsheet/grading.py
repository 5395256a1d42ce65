"""Grading: the answer cells of a live book against golden values, with a second engine's opinion on every formula.

Always true: a verdict is given only on values the engines agree on. Where they differ on an answer cell a referee
decides, two of three; without one, or when all three differ, the verdict is None and must be dropped, never read as a
failure. Answer cells that hold constants need no second opinion, since no engine computes them.
"""

from __future__ import annotations

import hashlib
import io
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from threading import Lock
from xml.etree.ElementTree import ParseError

from .answers import BadAnswerPosition, normalise, parse_answer_position, same
from .engines.base import Book, Content, Engine, EngineError, Referee, StoredFormula
from .package import PackageError
from .task import CellKey, Comparable

__all__ = [
    "BadAnswerPosition",
    "CrossCheck",
    "Grader",
    "Verdict",
    "compare",
    "golden_values",
    "grade",
    "normalise",
    "parse_answer_position",
    "same",
]

_NOT_COMPUTED = ("#N/IMPL!", "#NAME?", "#ERROR!")
"""Values by which an engine may say that it lacks something, rather than what Excel would show."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """`passed` is None when there is no verdict: `disputed` names the cells that no majority settled.

    `mismatches` of `cells` answer cells differ from the golden ones (as far as they are settled); `engines` are name
    and version of those who were asked.
    """

    passed: bool | None
    mismatches: int
    cells: int
    engines: Mapping[str, str]
    disputed: tuple[CellKey, ...] = ()


def golden_values(package: bytes, answer_position: str) -> dict[CellKey, Comparable]:
    """The normalised values of the answer cells in a solved workbook, from its cached values; the package was checked.

    For loading tasks only: it reads the file with openpyxl, as SpreadsheetBench's own script does, and is slow. Raises
    `BadAnswerPosition`, or `PackageError` ("unreadable") when openpyxl cannot read the package.
    """
    import openpyxl

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # openpyxl warns of parts it does not keep; nothing is saved here
        try:
            book = openpyxl.load_workbook(io.BytesIO(package), data_only=True)
        except (ValueError, TypeError, KeyError, AttributeError, IndexError, zipfile.BadZipFile, ParseError) as error:
            raise PackageError("unreadable", f"the workbook cannot be read: {error}") from error
    sheets = {sheet.title: sheet for sheet in book.worksheets}
    extents = {name: (sheet.max_row, sheet.max_column) for name, sheet in sheets.items()}
    default = book.sheetnames[0]
    found: dict[CellKey, Comparable] = {}
    for key in parse_answer_position(answer_position, default, extents):
        cell = sheets[key[0]]._cells.get(key[1:])  # .cell() would create every empty one
        found[key] = None if cell is None else _of_openpyxl(cell.value)
    return found


def _of_openpyxl(value: object) -> Comparable:
    """SpreadsheetBench's own rule on a value as openpyxl gives it."""
    import datetime as dt

    if isinstance(value, dt.datetime):
        delta = value - dt.datetime(1899, 12, 30)
        return float(round(delta.days + delta.seconds / 86_400, 0))
    if isinstance(value, dt.time):
        return str(value)[:-3]
    if isinstance(value, (dt.timedelta, dt.date)):
        return f"\x00{value!r}"
    if value is None or isinstance(value, (bool, int, float, str)):
        return normalise(float(value) if isinstance(value, int) else value)
    return str(value)


def answers(book: Book, keys: Collection[CellKey], formats: Book | None = None) -> dict[CellKey, Comparable]:
    """Normalised values of cells; number formats and merged areas are taken from `formats` (the book itself if None).

    Cells of a sheet that is not there are None, as are those hidden under a merged area (openpyxl reads them so).
    """
    layout = book if formats is None else formats
    present = {info.name.casefold() for info in layout.sheets()}
    covered = {name: _covered(layout, name) for name in {key[0] for key in keys} if name.casefold() in present}
    found: dict[CellKey, Comparable] = {}
    for key in keys:
        sheet, row, column = key
        if sheet not in covered or (row, column) in covered[sheet]:
            found[key] = None
            continue
        value = book.value(*key)
        numeric = isinstance(value, float) and not isinstance(value, bool)
        found[key] = normalise(value, layout.number_format(*key) if numeric else "General", layout.date1904)
    return found


def _covered(book: Book, sheet: str) -> frozenset[tuple[int, int]]:
    """Cells under a merged area, its first cell excepted."""
    return frozenset(
        (row, column)
        for top, left, bottom, right in book.merged(sheet)
        for row in range(top, bottom + 1)
        for column in range(left, right + 1)
        if (row, column) != (top, left)
    )


def compare(book: Book, golden: Mapping[CellKey, Comparable]) -> list[CellKey]:
    """The answer cells whose values in `book` differ from the golden ones."""
    found = answers(book, golden)
    return [key for key, value in golden.items() if not same(found[key], value)]


def book_contents(book: Book) -> dict[CellKey, Content]:
    """What was put into every non-empty cell of a book."""
    return {(info.name, *at): c for info in book.sheets() for at, c in book.contents(info.name).items()}


class CrossCheck:
    """A second engine's book of one starting workbook, kept open; each use sets only the cells that changed.

    Not thread-safe. After a sheet was added, or an edit was refused half-way, `spent` says that it must be made anew.
    """

    def __init__(self, engine: Engine, package: bytes, start: Book) -> None:
        self.engine = engine
        self.start = book_contents(start)
        self.spent = False
        self._book = engine.open(package)
        self._sheets = {info.name.casefold() for info in self._book.sheets()}
        self._applied: set[CellKey] = set()
        # Formualizer reads the array formulas of a file as plain ones, but takes them right when they are set.
        for key, content in self.start.items():
            if isinstance(content, StoredFormula) and content.array is not None:
                self._set(key, content)

    def answers(
        self, live: Book, keys: Collection[CellKey], now: Mapping[CellKey, Content] | None = None
    ) -> dict[CellKey, Comparable]:
        """Normalised values of `keys` as the second engine computes them from the contents of `live` (`now`, if known).

        Raises `EngineError` when it cannot take the contents or the recalculation.
        """
        now = book_contents(live) if now is None else now
        changed = {key for key in now.keys() | self.start.keys() if now.get(key) != self.start.get(key)}
        self.spent, was_spent = True, self.spent
        for key in self._applied - changed:
            self._set(key, self.start.get(key))
        for key in changed:
            if key[0].casefold() not in self._sheets:
                if key not in now:
                    continue
                self._book.add_sheet(key[0])
                self._sheets.add(key[0].casefold())
                was_spent = True
            self._set(key, now.get(key))
        self._applied = changed
        self._book.recalculate()
        self.spent = was_spent
        return answers(self._book, keys, formats=live)

    def _set(self, key: CellKey, content: Content) -> None:
        if isinstance(content, StoredFormula):
            self._book.set_formula(*key, content.text)
        else:
            self._book.set_value(*key, content)


def grade(
    book: Book,
    golden: Mapping[CellKey, Comparable],
    *,
    engine: Engine,
    check: CrossCheck | None = None,
    referee: Referee | None = None,
    export: Callable[[], bytes] | None = None,
) -> Verdict:
    """The verdict on a live, recalculated `book`.

    `check`: the second opinion (None: `engine` alone decides). `referee` with `export` (the live book as a package):
    asked only about cells on which the two differ.
    """
    return _decide(_compare(book, golden, engine, check), golden, referee, export)


@dataclass(frozen=True, slots=True)
class _Opinions:
    """Values by the engine and by the second one, the cells on which they differ, and who was asked."""

    first: dict[CellKey, Comparable]
    second: Mapping[CellKey, Comparable]
    disputed: set[CellKey]
    asked: dict[str, str]


def _compare(book: Book, golden: Mapping[CellKey, Comparable], engine: Engine, check: CrossCheck | None) -> _Opinions:
    found = _Opinions(answers(book, golden), {}, set(), {engine.name: engine.version})
    contents = book_contents(book) if check is not None else {}
    computed = _computed(book, golden, contents)
    if check is None or not computed:
        return found
    with suppress(EngineError):
        found = replace(found, second=check.answers(book, computed, contents))
    found.asked[check.engine.name] = check.engine.version
    for key in computed:
        lacking = _unsupported(found.first[key], golden[key], contents.get(key), check.start.get(key))
        if lacking or _differ(found.first, found.second, key):
            found.disputed.add(key)
    return found


def _decide(
    found: _Opinions,
    golden: Mapping[CellKey, Comparable],
    referee: Referee | None,
    export: Callable[[], bytes] | None,
) -> Verdict:
    values, disputed = found.first, found.disputed
    if disputed and referee is not None and export is not None:
        found.asked[referee.name] = referee.version
        disputed = disputed - _settle(values, found.second, disputed, referee, export)
    wrong = [key for key, value in golden.items() if key not in disputed and not same(values[key], value)]
    passed = None if disputed else not wrong
    return Verdict(passed, len(wrong), len(golden), found.asked, tuple(sorted(disputed)))


def _computed(book: Book, keys: Collection[CellKey], contents: Mapping[CellKey, Content]) -> list[CellKey]:
    """Those of `keys` whose value an engine computes: formulas, and cells that an array fills."""
    if not contents:
        return []
    folded = {name.casefold(): name for name in {sheet for sheet, _, _ in contents}}
    found = []
    for key in keys:
        sheet = folded.get(key[0].casefold())
        if sheet is None:
            continue
        content = contents.get((sheet, key[1], key[2]))
        if isinstance(content, StoredFormula) or (content is None and book.value(*key) is not None):
            found.append(key)
    return found


def _differ(first: Mapping[CellKey, Comparable], second: Mapping[CellKey, Comparable], key: CellKey) -> bool:
    a, b = first[key], second.get(key, ...)
    both_nan = a != a and b != b
    return not both_nan and not (type(a) is type(b) and a == b)


def _unsupported(value: Comparable, golden: Comparable, content: Content, start: Content) -> bool:
    """Whether the value says that both engines lack something: anywhere, or by a name in a formula that was there
    before the agent came (a name that the agent made up is the agent's mistake).
    """
    if value not in _NOT_COMPUTED or same(value, golden):
        return False
    return value == "#N/IMPL!" or (content is not None and content == start)


def _settle(
    values: dict[CellKey, Comparable],
    second: Mapping[CellKey, Comparable],
    disputed: Collection[CellKey],
    referee: Referee,
    export: Callable[[], bytes],
) -> set[CellKey]:
    """Cells on which two of three agree; `values` gets the majority's value."""
    try:
        third = cached_values(referee.recalculate(export()), disputed)
    except EngineError:
        return set()
    settled = set()
    for key in disputed:
        if same(third[key], values[key]):
            settled.add(key)
        elif key in second and same(third[key], second[key]):
            values[key] = second[key]
            settled.add(key)
    return settled


def cached_values(package: bytes, keys: Collection[CellKey]) -> dict[CellKey, Comparable]:
    """Normalised cached values of cells in a package; None for those of sheets that are not there."""
    import openpyxl

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        book = openpyxl.load_workbook(io.BytesIO(package), data_only=True)
    sheets = {sheet.title.casefold(): sheet for sheet in book.worksheets}
    found: dict[CellKey, Comparable] = {}
    for key in keys:
        sheet = sheets.get(key[0].casefold())
        cell = None if sheet is None else sheet._cells.get(key[1:])
        found[key] = None if cell is None else _of_openpyxl(cell.value)
    return found


@dataclass
class Grader:
    """Grades books of many tasks, keeping the last `capacity` cross-checks open (least recently used go first).

    Thread-safe: cross-checks are used one at a time, and nobody waits for another's referee. `crosscheck` and
    `referee` may be None.
    """

    engine: Engine
    crosscheck: Engine | None = None
    referee: Referee | None = None
    capacity: int = 64
    _checks: OrderedDict[str, CrossCheck] = field(default_factory=OrderedDict, repr=False)
    _lock: Lock = field(default_factory=Lock, repr=False)

    def grade(
        self,
        book: Book,
        package: bytes,
        golden: Mapping[CellKey, Comparable],
        *,
        start: Callable[[], Book] | None = None,
        digest: str | None = None,
        export: Callable[[], bytes] | None = None,
    ) -> Verdict:
        """The verdict on `book`, which started from `package` (its sha256: `digest`).

        `start` gives the starting book when a package is first met (None: it is opened).
        """
        with self._lock:
            check = self._check(package, start, digest)
            found = _compare(book, golden, self.engine, check)
            if check is not None and check.spent:
                self._checks.pop(digest or _digest(package), None)
        return _decide(found, golden, self.referee, export)

    def _check(self, package: bytes, start: Callable[[], Book] | None, digest: str | None) -> CrossCheck | None:
        if self.crosscheck is None:
            return None
        key = digest or _digest(package)
        found = self._checks.get(key)
        if found is None:
            found = CrossCheck(self.crosscheck, package, start() if start is not None else self.engine.open(package))
            self._checks[key] = found
            while len(self._checks) > self.capacity:
                self._checks.popitem(last=False)
        self._checks.move_to_end(key)
        return found


def _digest(package: bytes) -> str:
    return hashlib.sha256(package).hexdigest()
