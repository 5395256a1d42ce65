"""A small real workbook, a task on it, and an environment that offers it."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from typing import Any

import openpyxl
import pytest
from espalier.envs.core import Action, ToolCall
from espalier.envs.spreadsheet.env import SpreadsheetEnv
from espalier.envs.spreadsheet.task import Case, SpreadsheetTask

ROWS = [["Region", "Units", "Price"], ["East", 12, 4.5], ["North East", 3, 2], ["West", 7, 1.25]]


def make_workbook(rows: list[list[Any]], top: int = 3, left: int = 2) -> bytes:
    """An .xlsx with `rows` on the sheet Data, a sheet Prices and an empty one whose name has a space."""
    book = openpyxl.Workbook()
    data = book.active
    data.title = "Data"
    for i, row in enumerate(rows):
        for j, value in enumerate(row):
            data.cell(top + i, left + j, value)
    prices = book.create_sheet("Prices")
    prices["A1"], prices["A2"], prices["B2"] = "key", "East", 9
    book.create_sheet("Empty Sheet")
    out = io.BytesIO()
    book.save(out)
    return out.getvalue()


@pytest.fixture(scope="session")
def task() -> SpreadsheetTask:
    """Total of Units into C8, with one perturbed copy."""
    other = [ROWS[0], ["East", 1, 4.5], ["North East", 2, 2], ["West", 4, 1.25]]
    cases = (
        Case(make_workbook(ROWS), {("Data", 8, 3): 22.0}),
        Case(make_workbook(other), {("Data", 8, 3): 7.0}),
    )
    return SpreadsheetTask("t1", "Put the total of Units below.", "sum", "Data!C8", cases)


@pytest.fixture(scope="session")
def workbook() -> Callable[..., bytes]:
    """Make a workbook of rows."""
    return make_workbook


class Driver:
    """An environment and the shortest way to call its tools."""

    def __init__(self, env: SpreadsheetEnv) -> None:
        self.env = env
        self.last: tuple[Any, ...] = ()

    def __call__(self, name: str, **arguments: Any) -> str:
        return self.do(ToolCall(name, arguments))

    def do(self, *calls: ToolCall) -> str:
        self.last = self.env.step(Action("", calls))
        return "\n".join(m["content"] for m in self.last[0].messages)


@pytest.fixture
def drive(task: SpreadsheetTask) -> Iterator[Callable[..., Driver]]:
    """Make an environment with `task` under way."""
    made: list[SpreadsheetEnv] = []

    def make(**options: Any) -> Driver:
        env = SpreadsheetEnv(options.pop("tasks", [task]), **options)
        made.append(env)
        env.reset(seed=0)
        return Driver(env)

    yield make
    for env in made:
        env.close()
