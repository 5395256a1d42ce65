"""The tool find_cells. Patterns are a restricted kind of regular expression whose cost is bounded."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import Annotated, Literal

from pydantic import Field

from ..repair import shorten
from ..tools import tool
from .fields import Path, SheetName, check_path
from .refs import Rect
from .text import MAX_OUTPUT
from .workspace import Workspace, mistake

MAX_QUERY = 200
MAX_UNBOUNDED = 2
MAX_SEARCHED_TEXT = 256
BUDGET_S = 1.0
"""CPU seconds one search may take."""

_REFUSED = re.compile(r"\\[1-9]|\(\?|\)[*+?{]")
_UNBOUNDED = re.compile(r"(?<!\\)(?:[*+]|\{\d*,\})")


@tool(
    effect="reads",
    other_names=("search_cells", "find", "search", "find_cell", "find_value", "find_text"),
    aliases={"text": "query", "pattern": "query", "value": "query", "limit": "max_results", "sheet": "sheet_name"},
)
def find_cells(
    space: Workspace,
    query: Annotated[str, Field(max_length=MAX_QUERY, min_length=1, examples=["East", "12"])],
    match: Literal["contains", "equals", "prefix", "regex"] = "contains",
    search_in: Literal["values", "formulas", "both"] = "values",
    case_sensitive: bool = False,
    include_values: bool = True,
    result: Annotated[
        Literal["first", "all"], Field(alias="return", description="Only the first hit, or all.")
    ] = "all",
    max_results: Annotated[int, Field(ge=1, le=1_000)] = 20,
    range: Annotated[str | None, Field(description="Where to look.", max_length=2_000, examples=["A1:C20"])] = None,
    sheet_name: SheetName = None,
    path: Path = None,
) -> str:
    """Find cells by text or number, on every sheet unless one is named."""
    check_path(path)
    test = _matcher(query, match, case_sensitive)
    default = space.sheet(None)
    if range is not None:
        places: list[tuple[str, Rect | None]] = list(space.targets(range, sheet_name))
    else:
        chosen = [space.sheet(sheet_name)] if sheet_name is not None else space.sheet_names()
        places = [(name, space.extent(name)) for name in chosen]
    most = 1 if result == "first" else max_results
    hits = _search(space, places, test, search_in, most + 1, include_values, space.sheet(sheet_name) or default)
    more = len(hits) > most and result == "all"
    kept, used = [], 0
    for hit in hits[:most]:
        used += len(hit) + 1
        if used > MAX_OUTPUT - 60:
            more = True
            break
        kept.append(hit)
    if more:
        kept.append(f"... more than {len(kept)}")
    return "\n".join(kept) or "(no match)"


def _search(
    space: Workspace,
    places: list[tuple[str, Rect | None]],
    test: Callable[[str], bool],
    search_in: str,
    most: int,
    include_values: bool,
    home: str,
) -> list[str]:
    hits: list[str] = []
    started = time.thread_time()
    for sheet, rect in places:
        extent = space.extent(sheet)
        inside = rect.clip(extent) if rect and extent else None
        if inside is None:
            continue
        head = "" if sheet == home else space.qualified(sheet)
        values = space.book.values(sheet, inside.top, inside.left, inside.bottom, inside.right)
        for row, cells in enumerate(values, inside.top):
            for column, value in enumerate(cells, inside.left):
                if value is None:
                    continue
                formula = space.book.formula(sheet, row, column) if search_in != "values" else None
                shown = value if isinstance(value, str) else space.literal(sheet, row, column, value)
                if (search_in != "formulas" and test(shown)) or (formula is not None and test(formula)):
                    details = formula or ""
                    item = space.item(sheet, row, column, value, details=details, head=head, bare=not include_values)
                    hits.append(item)
                    if len(hits) >= most:
                        return hits
            if time.thread_time() - started > BUDGET_S:
                space.met.append("time of a search")
                raise mistake(
                    "too_costly",
                    "the search took too long and was stopped",
                    field="query",
                    hint="Name a smaller range or a simpler pattern.",
                )
    return hits


def _matcher(query: str, match: str, case_sensitive: bool) -> Callable[[str], bool]:
    if match == "regex":
        return _pattern(query, case_sensitive)
    fold: Callable[[str], str] = (lambda text: text) if case_sensitive else str.casefold
    wanted = fold(query)
    if match == "equals":
        return lambda text: fold(text) == wanted
    if match == "prefix":
        return lambda text: fold(text).startswith(wanted)
    return lambda text: wanted in fold(text)


def _pattern(query: str, case_sensitive: bool) -> Callable[[str], bool]:
    """A regular expression without repeated groups, look-around and back-references, at most two unbounded repeats."""
    if _REFUSED.search(query) or len(_UNBOUNDED.findall(query)) > MAX_UNBOUNDED:
        raise mistake(
            "bad_pattern",
            "this kind of pattern is not allowed",
            field="query",
            received=shorten(query),
            expected=f"no repeated groups, look-around or back-references; at most {MAX_UNBOUNDED} of * and +",
            patch={"match": "contains"},
        )
    try:
        compiled = re.compile(query, 0 if case_sensitive else re.IGNORECASE)
    except (re.error, RecursionError, OverflowError) as error:
        raise mistake(
            "bad_pattern",
            f"the pattern cannot be read: {error}",
            field="query",
            received=shorten(query),
            patch={"match": "contains"},
        ) from error
    return lambda text: compiled.search(text[:MAX_SEARCHED_TEXT]) is not None
