"""A spreadsheet task as data."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from ..core import Task

Comparable = None | float | str
"""A cell value after SpreadsheetBench's normalisation; see `grading`."""

CellKey = tuple[str, int, int]
"""(sheet, row, column), counted from 1."""


@dataclass(frozen=True)
class Case:
    """One workbook to solve (`package`: .xlsx bytes) and the answer cells' values, which the agent never sees."""

    package: bytes
    golden: Mapping[CellKey, Comparable]

    @cached_property
    def digest(self) -> str:
        """Hex sha256 of the package."""
        return hashlib.sha256(self.package).hexdigest()


@dataclass(frozen=True)
class SpreadsheetTask(Task):
    """The agent works on `cases[0]`; its edits, replayed, must hold on all of them (hard), or on a share of them
    (soft).
    """

    answer_position: str = ""
    cases: tuple[Case, ...] = ()

    @cached_property
    def digest(self) -> str:
        """Hex sha256 of what an episode depends on, answers included."""
        digest = hashlib.sha256(repr((self.id, self.instruction, self.answer_position)).encode())
        for case in self.cases:
            digest.update(case.digest.encode())
            digest.update(repr(sorted(case.golden.items(), key=lambda item: item[0])).encode())
        return digest.hexdigest()
