"""IronCalc, the default engine: embedded, fast, its whole state is one byte string.

Always true here: text is stored literally; TODAY, NOW, RAND and RANDBETWEEN are pinned to the engine's clock and seed;
locale en, time zone UTC. A file is written only when a package is opened (IronCalc reads nothing but paths): a private
temporary one, gone before `open` returns. Volatile calls are stored as calls of workbook names (`_espalier.today()`),
because IronCalc's own clock cannot be set; `formula` gives them back as they were written. A recalculation is priced
first (`cost`): above the budget it is refused, and where the price cannot be known it runs in a process of its own.
"""

from __future__ import annotations

import json
import re
import struct
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from ..cost import MAX_BOOK_COST, formula_cost
from ..formulas import FormulaRefused, refuse_formula
from ..lexer import solid_tokens, tokens
from .base import CellError, Content, EngineError, SheetInfo, SheetState, StoredFormula, Value
from .guard import shared_guard
from .packages import calculation_parts, reads_1904
from .volatile import DEFAULT_CLOCK, pin, pinned_names, unpin, uses_volatile

if TYPE_CHECKING:
    from ironcalc import Model

_MAX_ROW, _MAX_COLUMN = 1_048_576, 16_384
_MAX_TEXT = 32_767
_ROW_NUMBER = re.compile(r"(?<=[A-Za-z$])\d+(?![\d(.A-Za-z_])")

_TRIFLE = 2_500
_At = tuple[int, int, int]
"""(sheet index, row, column)."""

T = TypeVar("T")


def _guard(what: str, call: Callable[[], T]) -> T:
    """Run `call`; whatever IronCalc raises (a Rust panic included) becomes an `EngineError`."""
    try:
        return call()
    except (KeyboardInterrupt, SystemExit, GeneratorExit, EngineError):
        raise
    except Exception as error:
        raise EngineError(f"{what}: {error}") from None
    except BaseException as error:  # pyo3's PanicException is not an Exception
        raise EngineError(f"{what}: the engine stopped ({type(error).__name__})") from None


def _shape(formula: str) -> str:
    """`formula` with every row number 1: what the cells of a fill have in common."""
    return _ROW_NUMBER.sub("1", formula)


@lru_cache(maxsize=8192)
def _refuse_unsafe(shape: str) -> None:
    """Raise `EngineError` for what could crash the engine or reaches outside; the price is looked at elsewhere."""
    try:
        refuse_formula(shape)
    except FormulaRefused as refused:
        if refused.code != "too_costly":
            raise EngineError(refused.message) from None


_MEANING = frozenset({"cell", "columns", "rows", "name", "call", "number", "string", "sheet", "error", "bracket"})


@lru_cache(maxsize=8192)
def _syntax_error(shape: str) -> bool:
    """Whether IronCalc cannot read a formula, or finds a wrong number of arguments; tried on an empty book.

    IronCalc closes open brackets and leaves out what it does not understand at the end (`=A1 A2` becomes `=A1`), so the
    formula it has understood must have as many pieces as the one it was given. Table references mean nothing in an
    empty book and are left to the recalculation.
    """
    import ironcalc

    # Whole columns and rows cost much and mean nothing here; so small ranges stand for them.
    shape = "=" + "".join("A1:A1" if t.kind in ("columns", "rows") else t.text for t in tokens(shape))
    parts = solid_tokens(shape)
    if any(t.kind == "bracket" for t in parts):
        return any(b.kind == "bracket" and a.kind == "cell" for a, b in pairwise(parts))
    if sum((t.text == "(") - (t.text == ")") for t in parts) != 0:
        return True
    if not formula_cost(unpin(shape)).bounded:
        shape = f"=IF(FALSE,({shape[1:]}),0)"  # read it without running it
        parts = solid_tokens(shape)
    scratch = ironcalc.create("scratch")
    for name, body in pinned_names(DEFAULT_CLOCK, 0):
        scratch.new_defined_name(name, None, body)
    scratch.update_cell_with_formula(0, 1, 1, shape)
    scratch.evaluate()
    understood = solid_tokens(scratch.get_cell_formula(0, 1, 1) or "=")
    pieces, kept = (sum(t.kind in _MEANING for t in found) for found in (parts, understood))
    return bool(scratch.get_cell_value(0, 1, 1) == "#ERROR!") or pieces != kept


class IronCalcBook:
    """A workbook in IronCalc; made by `IronCalc`, not by hand."""

    def __init__(self, model: Model, date1904: bool = False, prices: Mapping[_At, int] | None = None) -> None:
        self._model = model
        self.date1904 = date1904
        # Cells whose formula costs more than a trifle (visits), or what cannot be known (-1).
        self._prices: dict[_At, int] = dict(prices or {})
        self._index: dict[str, int] = {}
        self._reindex()

    def sheets(self) -> Sequence[SheetInfo]:
        """Sheets in order."""
        model = self._model
        found = []
        for index, properties in enumerate(model.get_worksheets_properties()):
            _, bottom, _, right = model.get_sheet_dimensions(index)
            if bottom == right == 1 and model.is_empty_cell(index, 1, 1):
                bottom = right = 0
            found.append(SheetInfo(properties["name"], properties["state"], bottom, right, properties["sheet_id"]))
        return found

    def cells(self, sheet: str) -> Sequence[tuple[int, int]]:
        """(row, column) of every cell with content, row by row."""
        index = self._sheet(sheet)
        empty = self._model.is_empty_cell
        return sorted((r, c) for s, r, c in self._model.get_all_cells() if s == index and not empty(s, r, c))

    def contents(self, sheet: str) -> dict[tuple[int, int], Content]:
        """What was put into each non-empty cell, by (row, column); cells that an array fills are not among them."""
        index, model = self._sheet(sheet), self._model
        cells = [(row, column) for s, row, column in model.get_all_cells() if s == index]
        formulas = {at: text for at in cells if (text := model.get_cell_formula(index, *at)) is not None}
        arrays = self._arrays(index, cells) if formulas else {}
        found: dict[tuple[int, int], Content] = {}
        for at in cells:
            array = arrays.get(at)
            if at in formulas:
                found[at] = StoredFormula(unpin(formulas[at]), array)
            elif array is None and (value := self._value(index, *at)) is not None:
                found[at] = value
        return found

    def value(self, sheet: str, row: int, column: int) -> Value:
        """The value of a cell as of the last recalculation."""
        index = self._sheet(sheet)
        _check_cell(row, column)
        return self._value(index, row, column)

    def values(self, sheet: str, top: int, left: int, bottom: int, right: int) -> list[list[Value]]:
        """Values of a rectangle, row by row; shape (bottom-top+1, right-left+1)."""
        index = self._sheet(sheet)
        _check_cell(top, left)
        _check_cell(bottom, right)
        columns = range(left, right + 1)
        return [[self._value(index, row, column) for column in columns] for row in range(top, bottom + 1)]

    def formula(self, sheet: str, row: int, column: int) -> str | None:
        """The formula with its leading "=", or None."""
        index = self._sheet(sheet)
        _check_cell(row, column)
        text = self._model.get_cell_formula(index, row, column)
        return None if text is None else unpin(text)

    def number_format(self, sheet: str, row: int, column: int) -> str:
        """The Excel number format code of a cell, "general" when it has none."""
        index = self._sheet(sheet)
        _check_cell(row, column)
        return str(self._model.get_cell_style(index, row, column)["num_fmt"])

    def set_number_format(self, sheet: str, row: int, column: int, code: str) -> None:
        """Give a cell a number format code."""
        index = self._sheet(sheet)
        _check_cell(row, column)
        style = self._model.get_cell_style(index, row, column)
        style["num_fmt"] = code
        _guard("the number format was refused", lambda: self._model.set_cell_style(index, row, column, style))

    def merged(self, sheet: str) -> Sequence[tuple[int, int, int, int]]:
        """Merged rectangles as (top, left, bottom, right)."""
        found = self._model.get_merged_cells(self._sheet(sheet))
        return [(m["row"], m["column"], m["row"] + m["height"] - 1, m["column"] + m["width"] - 1) for m in found]

    def set_value(self, sheet: str, row: int, column: int, value: Value) -> None:
        """Store a constant literally: text that begins with "=" stays text; None clears."""
        index, model = self._sheet(sheet), self._model
        _check_cell(row, column)
        if isinstance(value, str) and len(value) > _MAX_TEXT:
            raise EngineError(f"a cell holds at most {_MAX_TEXT} characters, this text has {len(value)}")
        self._vacate(index, row, column)
        self._prices.pop((index, row, column), None)
        if value is None:
            return
        if isinstance(value, bool):
            _guard("the cell cannot be written", lambda: model.update_cell_with_bool(index, row, column, value))
        elif isinstance(value, (int, float)):
            _guard(
                "the cell cannot be written", lambda: model.update_cell_with_number(index, row, column, float(value))
            )
        elif isinstance(value, CellError):
            _guard("the cell cannot be written", lambda: model.set_user_input(index, row, column, value.code))
        else:
            _guard("the cell cannot be written", lambda: model.update_cell_with_text(index, row, column, value))

    def set_formula(self, sheet: str, row: int, column: int, formula: str) -> None:
        """Store a formula (leading "="); raises `EngineError` when it does not parse or must not run."""
        index = self._sheet(sheet)
        _check_cell(row, column)
        if not formula.startswith("="):
            raise EngineError("a formula begins with =")
        _refuse_unsafe(_shape(formula))
        stored = pin(formula) if uses_volatile(formula) else formula
        if _syntax_error(_shape(stored)):  # a fill differs from its neighbour in row numbers only: one trial for all
            raise EngineError(
                f"the formula {formula!r} cannot be read: check commas, brackets and the number of arguments"
            )
        self._vacate(index, row, column)
        self._price((index, row, column), formula)
        _guard("the formula was refused", lambda: self._model.update_cell_with_formula(index, row, column, stored))

    def recalculate(self) -> None:
        """Recalculate everything (IronCalc has no incremental mode). Raises `EngineError` above the budget."""
        prices = self._prices.values()
        total = sum(price for price in prices if price > 0)
        if total > MAX_BOOK_COST:
            raise EngineError(
                f"recalculating the workbook would visit about {total:,} cells; at most {MAX_BOOK_COST:,} are allowed. "
                "Name the cells that hold data instead of whole columns or rows, or fill fewer cells"
            )
        if -1 in prices:
            self._replace(shared_guard().recalculate(_guard("no state", self._model.to_bytes)))
        else:
            _guard("the recalculation failed", self._model.evaluate)

    def insert_rows(self, sheet: str, row: int, count: int = 1) -> None:
        """Insert `count` empty rows before `row`; references follow."""
        self._shift(sheet, row, count, 1, "insert_rows")

    def delete_rows(self, sheet: str, row: int, count: int = 1) -> None:
        """Delete `count` rows from `row` on."""
        self._shift(sheet, row, count, 1, "delete_rows")

    def insert_columns(self, sheet: str, column: int, count: int = 1) -> None:
        """Insert `count` empty columns before `column`; references follow."""
        self._shift(sheet, 1, count, column, "insert_columns")

    def delete_columns(self, sheet: str, column: int, count: int = 1) -> None:
        """Delete `count` columns from `column` on."""
        self._shift(sheet, 1, count, column, "delete_columns")

    def add_sheet(self, name: str, index: int | None = None) -> None:
        """Add an empty sheet at position `index` (from 0; None: at the end)."""
        _guard("the sheet cannot be added", lambda: self._model.add_sheet(name))
        self._reindex()
        if index is not None:
            self.move_sheet(name, index)

    def rename_sheet(self, sheet: str, new_name: str) -> None:
        """Rename a sheet; references in formulas follow."""
        index = self._sheet(sheet)
        _guard("the sheet cannot be renamed", lambda: self._model.rename_sheet(index, new_name))
        self._reindex()

    def delete_sheet(self, sheet: str) -> None:
        """Delete a sheet; references to it become #REF!."""
        index = self._sheet(sheet)
        self._keep_one_visible(index)
        _guard("the sheet cannot be deleted", lambda: self._model.delete_sheet(index))
        self._reindex()
        self.price_all()

    def copy_sheet(self, sheet: str, new_name: str) -> None:
        """Copy a sheet (cells and formats, no charts) under a new name, to the place after the original."""
        import ironcalc

        index = self._sheet(sheet)
        if new_name.casefold() in self._index:
            raise EngineError(f"there is a sheet named {new_name!r} already")
        model = self._model  # the copy is made by the user model, which alone can duplicate
        user = _guard("the sheet cannot be copied", lambda: ironcalc.create_user_model_from_bytes(model.to_bytes()))
        before = {p["name"] for p in user.get_worksheets_properties()}
        _guard("the sheet cannot be copied", lambda: user.duplicate_sheet(index))
        names = [p["name"] for p in user.get_worksheets_properties()]
        made = next(i for i, name in enumerate(names) if name not in before)
        _guard("the sheet cannot be copied", lambda: user.rename_sheet(made, new_name))
        self._replace(user.to_bytes())
        self.price_all()

    def move_sheet(self, sheet: str, index: int) -> None:
        """Move a sheet to position `index` (from 0)."""
        import ironcalc

        position = self._sheet(sheet)
        if not 0 <= index < len(self._index):
            raise EngineError(
                f"there is no position {index}: the workbook has {len(self._index)} sheets, counted from 0"
            )
        if index == position:
            return
        model = self._model
        user = _guard("the sheet cannot be moved", lambda: ironcalc.create_user_model_from_bytes(model.to_bytes()))
        _guard("the sheet cannot be moved", lambda: user.move_sheet(position, index))
        self._replace(user.to_bytes())
        self.price_all()

    def set_sheet_state(self, sheet: str, state: SheetState) -> None:
        """Show or hide a sheet."""
        index = self._sheet(sheet)
        if state != "visible":
            self._keep_one_visible(index)
        _guard("the sheet's visibility cannot be changed", lambda: self._model.set_sheet_state(index, state))

    def snapshot(self) -> bytes:
        """The whole state as bytes."""
        header: dict[str, object] = {"date1904": self.date1904} if self.date1904 else {}
        if self._prices:
            header["prices"] = [(*at, price) for at, price in self._prices.items()]
        head = json.dumps(header).encode()
        return struct.pack("<I", len(head)) + head + _guard("no snapshot", self._model.to_bytes)

    def _vacate(self, index: int, row: int, column: int) -> None:
        """Empty a cell, before something else is written there too: IronCalc 0.9.1 writes over an array's first cell
        without taking away what the array filled, and over a cell within an array until the next recalculation only.

        A dynamic array gives up the cells that it filled, as in Excel; of an array entered over several cells no part
        can be changed alone, so that raises `EngineError`.
        """
        model = self._model
        if not model.is_empty_cell(index, row, column):
            refused = "a cell of an array formula that was entered over several cells cannot be changed alone"
            _guard(refused, lambda: model.clear_cell_contents(index, row, column))

    def _arrays(self, index: int, cells: Sequence[tuple[int, int]]) -> dict[tuple[int, int], tuple[int, int]]:
        """(rows, columns) of the array at each anchor, (0, 0) for the cells it fills; only the user model tells."""
        import ironcalc

        user = ironcalc.create_user_model_from_bytes(self._model.to_bytes())
        found = {}
        for row, column in cells:
            structure = user.get_cell_array_structure(index, row, column)
            if isinstance(structure, dict):
                ((kind, shape),) = structure.items()
                found[row, column] = (shape[1], shape[0]) if kind.endswith("Anchor") else (0, 0)
        return found

    def _value(self, index: int, row: int, column: int) -> Value:
        value: str | float | bool | None = self._model.get_cell_value(index, row, column)
        if isinstance(value, str) and value.startswith("#"):
            from ironcalc import CellType

            error = self._model.get_cell_type(index, row, column) == CellType.ErrorValue
            return CellError(value) if error else value
        return value

    def price_all(self) -> None:
        """Price every formula anew: those of a file, or after cells moved. What must not run raises `EngineError`."""
        self._prices = {}
        for s, row, column in self._model.get_all_cells():
            formula = self._model.get_cell_formula(s, row, column)
            if formula is not None:
                self._price((s, row, column), formula)

    def _price(self, at: _At, formula: str) -> None:
        cost = formula_cost(formula)
        if not cost.bounded:
            self._prices[at] = -1
        elif cost.visits > _TRIFLE:
            self._prices[at] = cost.visits
        else:
            self._prices.pop(at, None)

    def _sheet(self, name: str) -> int:
        index = self._index.get(name)
        if index is None:
            index = self._index.get(name.casefold())
        if index is None:
            names = ", ".join(repr(p["name"]) for p in self._model.get_worksheets_properties())
            raise EngineError(f"there is no sheet named {name!r}; the workbook has {names}")
        return index

    def _reindex(self) -> None:
        self._index = {p["name"].casefold(): i for i, p in enumerate(self._model.get_worksheets_properties())}

    def _replace(self, state: bytes) -> None:
        import ironcalc

        self._model = ironcalc.load_from_bytes(state)
        self._reindex()

    def _keep_one_visible(self, index: int) -> None:
        others = [p for i, p in enumerate(self._model.get_worksheets_properties()) if i != index]
        if not any(p["state"] == "visible" for p in others):
            raise EngineError("a workbook keeps at least one visible sheet")

    def _shift(self, sheet: str, row: int, count: int, column: int, method: str) -> None:
        index = self._sheet(sheet)
        _check_cell(row, column)
        if count < 1:
            raise EngineError("the count of rows or columns is at least 1")
        by_row = method.endswith("rows")
        start = row if by_row else column
        before = self.contents(sheet)
        priced = bool(self._prices)
        _guard(f"{method.replace('_', ' ')} failed", lambda: getattr(self._model, method)(index, start, count))
        # IronCalc 0.9.1 types what it moves in again: the text "=1+1" would become a formula, 1/3 lose its last digits.
        for (r, c), content in before.items():
            at = r if by_row else c
            if isinstance(content, StoredFormula) or at < start:
                continue
            moved = at + count if method.startswith("insert") else at - count
            if moved >= start:
                where = (moved, c) if by_row else (r, moved)
                if self._model.get_cell_formula(index, *where) is not None or self._value(index, *where) != content:
                    self.set_value(sheet, *where, content)
        if priced:
            self.price_all()


@dataclass(frozen=True, slots=True)
class IronCalc:
    """The engine; `clock` (UTC) is what TODAY and NOW give, `seed` draws RAND."""

    clock: datetime = DEFAULT_CLOCK
    seed: int = 0

    @property
    def name(self) -> str:
        """ "ironcalc"."""
        return "ironcalc"

    @property
    def version(self) -> str:
        """The installed version."""
        import ironcalc

        return str(ironcalc.__version__)

    def open(self, package: bytes) -> IronCalcBook:
        """Open an .xlsx package (already checked for safety)."""
        import ironcalc

        slim, date1904 = calculation_parts(package), reads_1904(package)
        with tempfile.TemporaryDirectory(prefix="espalier-") as folder:
            path = Path(folder) / "book.xlsx"  # the file's name is part of the model, and so of every digest
            path.write_bytes(slim)
            model = _guard("the workbook cannot be opened", lambda: ironcalc.load_from_xlsx(str(path), "en", "UTC"))
        _pin_volatile(model, self.clock, self.seed)
        book = IronCalcBook(model, date1904)
        book.price_all()
        book.recalculate()
        return book

    def restore(self, snapshot: bytes) -> IronCalcBook:
        """A book as it was when `snapshot` was taken."""
        import ironcalc

        size = struct.unpack_from("<I", snapshot)[0]
        header = json.loads(snapshot[4 : 4 + size])
        model = _guard("the snapshot cannot be restored", lambda: ironcalc.load_from_bytes(snapshot[4 + size :]))
        prices = {(s, r, c): price for s, r, c, price in header.get("prices", ())}
        return IronCalcBook(model, header.get("date1904", False), prices)


def _check_cell(row: int, column: int) -> None:
    if not (1 <= row <= _MAX_ROW and 1 <= column <= _MAX_COLUMN):
        raise EngineError(
            f"row {row}, column {column} lies outside the sheet (rows 1-{_MAX_ROW}, columns 1-{_MAX_COLUMN})"
        )


def _pin_volatile(model: Model, clock: datetime, seed: int) -> None:
    """Define the pinned names and rewrite the volatile formulas that came with the file; an array formula stays one."""
    import ironcalc

    for name, body in pinned_names(clock, seed):
        with suppress(Exception):  # there already: a package exported by us and opened again
            model.new_defined_name(name, None, body)
    found = [(at, model.get_cell_formula(*at)) for at in model.get_all_cells()]
    volatile = [(at, pin(formula)) for at, formula in found if formula is not None and uses_volatile(formula)]
    user = ironcalc.create_user_model_from_bytes(model.to_bytes()) if volatile else None
    for at, formula in volatile:
        structure = user.get_cell_array_structure(*at) if user is not None else None
        style = model.get_cell_style(*at)
        if isinstance(structure, dict) and "ArrayAnchor" in structure:
            (sheet, row, column), (width, height) = at, structure["ArrayAnchor"]
            model.range_clear_contents(sheet, row, column, row + height - 1, column + width - 1)
            model.set_user_array_formula(*at, width, height, formula)
        else:
            model.update_cell_with_formula(*at, formula)
        model.set_cell_style(*at, style)
