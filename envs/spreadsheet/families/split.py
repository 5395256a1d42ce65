"""Which tasks are held out.

A choice of structure is *reserved* when a fixed hash of it falls into one residue class; the hash depends on nothing
else (no seed), so no seed can move a task from one side to the other. Reserved are

* layouts: (header row, first column, data rows), one in four, and every table with more than 12 data rows;
* wordings: (frame, phrase), one in four;
* subjects: (column asked for, its neighbour in the question), one in four, and in each family every subject that asks
  for one of four words (`unasked`), other words in each.

A training task uses nothing that is reserved. A held-out task has a reserved layout AND a reserved wording, and a
reserved subject where its family has one. Since a layout fixes which cells are used and a wording fixes the instruction
but for names, no workbook and no instruction can occur on both sides, while each word, letter and row number of a
held-out task occurs in training.
"""

from __future__ import annotations

import zlib
from typing import Literal

from .sketch import FAMILIES
from .words import PAIRS

Split = Literal["train", "test"]

TRAIN_ROWS = (4, 12)
TEST_ROWS = (4, 16)


def reserved(*parts: object) -> bool:
    """Whether this combination belongs to the held-out side (one in four, by CRC-32 of its text)."""
    return zlib.crc32("|".join(map(str, parts)).encode()) % 4 == 0


def layout_split(header_row: int, first_column: int, rows: int) -> Split:
    """The side a layout belongs to."""
    return "test" if rows > TRAIN_ROWS[1] or reserved("layout", header_row, first_column, rows) else "train"


def wording_split(frame: str, phrase: str) -> Split:
    """The side a wording belongs to."""
    return "test" if reserved("wording", frame, phrase) else "train"


def unasked(family: str) -> frozenset[str]:
    """Headers that training tasks of a family show, and name beside the column asked for, but never ask for. Each is
    asked for in eight of the ten families.
    """
    at, half = FAMILIES.index(family), len(PAIRS) // 2
    return frozenset((*PAIRS[at], *PAIRS[(at + half) % len(PAIRS)]))


def subject_split(family: str, asked: str, beside: str) -> Split:
    """The side a subject belongs to: the column asked for and the word the question sets beside it."""
    return "test" if asked in unasked(family) or reserved("subject", asked, beside) else "train"
