"""A task before it is issued: structure, words, instruction, and the cells of its four cases.

A draft needs no engine: `issue` turns it into a task once two engines agree on the answers. Drawing is a pure function
of the random generator. What a family decides is its `Parts` (in `single` and `fills`); what is the same for all of
them happens here.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache

from . import words
from .layout import CASES, Cells, Probe, Table, fill
from .sketch import Sketch
from .split import Split, subject_split, unasked, wording_split

NOTE_CHANCE = 0.15
UNASKED_CHANCE = 0.25
"""How often a held-out task asks for a word that training tasks of its family never ask for."""

Overlay = Callable[[random.Random, int, Cells], Cells]
"""(random generator, case, cells of the table) -> cells to lay over them: labels, limits, a second sheet, keys that
must occur.
"""


@dataclass(frozen=True, slots=True)
class Draft:
    """A task without its answers. `cells` holds one workbook a case (an issued task keeps its draft without them);
    sheet 0 is the one that is answered on.

    `decoy` is the column easily taken for `sketch.value` (0: none; in a lookup, its index in the table looked in),
    `frame` the frame of the instruction, `finds` the headers that an expert looks for before it acts, in the order in
    which its formula needs them.
    """

    family: str
    instruction: str
    sheets: tuple[str, ...]
    cells: tuple[Cells, ...]
    sketch: Sketch
    frame: str
    decoy: int
    table: Table
    finds: tuple[str, ...]

    @property
    def answer_position(self) -> str:
        """The answer cells as SpreadsheetBench writes them."""
        return f"{self.sketch.sheet}!{self.sketch.target}"


@dataclass(frozen=True, slots=True)
class Parts:
    """What a family decides. `names` fill the phrase; `blanks` is a header whose column has gaps; `second` a table
    beside the first.
    """

    table: Table
    sketch: Sketch
    frames: tuple[str, ...]
    phrases: tuple[str, ...]
    names: Mapping[str, str]
    probe: Probe = field(default_factory=Probe)
    overlay: Overlay | None = None
    blanks: str = ""
    decoy: int = 0
    second: Table | None = None
    lookup_sheets: tuple[str, ...] = ()
    finds: tuple[str, ...] = ()


def assemble(rng: random.Random, split: Split, family: str, parts: Parts) -> Draft:
    """Choose the wording and fill in the four cases."""
    table, sketch = parts.table, parts.sketch
    frame, phrase = rng.choice(_wordings(parts.frames, parts.phrases, split))
    note = rng.choice(words.NOTES) if table.header_row > 1 and rng.random() < NOTE_CHANCE else ""
    cases = []
    for case in range(CASES):
        cells = fill(rng, table, case, parts.probe, parts.blanks)
        if parts.second is not None:
            cells |= fill(rng, parts.second, case, Probe())
        if note:
            cells[table.sheet, table.header_row - 1, table.left] = note
        cases.append(cells | parts.overlay(rng, case, cells) if parts.overlay else cells)
    text = frame.format(phrase=phrase.format(**parts.names), target=sketch.target)
    sheets = (table.sheet, *parts.lookup_sheets)
    instruction = text[0].upper() + text[1:]
    return Draft(family, instruction, sheets, tuple(cases), sketch, frame, parts.decoy, table, parts.finds)


@cache
def _wordings(frames: tuple[str, ...], phrases: tuple[str, ...], split: Split) -> tuple[tuple[str, str], ...]:
    return tuple((f, p) for f in frames for p in phrases if wording_split(f, p) == split)


def draw_subject(rng: random.Random, split: Split, family: str, beside: Sequence[str]) -> tuple[str, str]:
    """A (column of numbers asked for, word beside it) of the split, for a task of `family`."""
    pairs = [(a, b) for a in words.NUMBERS for b in beside if a != b and subject_split(family, a, b) == split]
    new = [pair for pair in pairs if pair[0] in unasked(family)]
    known = [pair for pair in pairs if pair[0] not in unasked(family)]
    return rng.choice(new if new and (not known or rng.random() < UNASKED_CHANCE) else known)


def draw_key(rng: random.Random, split: Split, family: str) -> tuple[str, str]:
    """(key, its header) of the split: the subject of a question that counts rows."""
    return rng.choice([(k, h) for h, keys in words.KEYS.items() for k in keys if subject_split(family, k, h) == split])
