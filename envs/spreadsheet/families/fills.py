"""Families that fill a column: row_formula, flag, share, lookup, summary."""

from __future__ import annotations

import random

from ..refs import Rect
from . import words
from .drafts import Overlay, Parts, draw_subject
from .layout import Cells, Probe, Table, draw_table, with_decoy
from .sketch import Sketch
from .split import Split

ASK_HEADER_CHANCE = 0.4


def _beside(table: Table) -> Rect:
    """The column directly right of the table, along its data rows."""
    return Rect(table.first, table.right + 1, table.last, table.right + 1)


def _header(table: Table, text: str) -> Cells:
    return {(table.sheet, table.header_row, table.right + 1): text}


def draw_row_formula(rng: random.Random, split: Split) -> Parts:
    """T4: a new column from two others, now and then with its header to be written too."""
    kind = rng.choice("*-+/")
    asked, other = draw_subject(rng, split, "row_formula", words.NUMBERS)
    add, avoid = with_decoy(rng, (asked, other))
    table = draw_table(rng, split, (asked, other, *add), avoid)
    header, ask_header = rng.choice(words.COLUMN_LABELS), rng.random() < ASK_HEADER_CHANCE
    target = _beside(table)
    if ask_header:
        target = Rect(table.header_row, target.left, target.bottom, target.right)
    sketch = Sketch(
        "row_formula",
        kind,
        table.sheet,
        target,
        table.first,
        table.last,
        value=table.column(asked),
        other=table.column(other),
        words=(header,) if ask_header else (),
    )
    phrases = words.OPERATIONS[kind]
    return Parts(
        table,
        sketch,
        words.FILL_FRAMES,
        tuple(p + " under the header {h}" for p in phrases) if ask_header else phrases,
        {"x": asked, "y": other, "h": header},
        overlay=None if ask_header else lambda rng, case, cells: _header(table, header),
        decoy=table.column(words.RELATED[asked]) if words.RELATED[asked] != other else 0,
        finds=(asked, other),
    )


def draw_flag(rng: random.Random, split: Split) -> Parts:
    """T5: one of two words for each row, by a limit that stands in a cell."""
    kind, verdict = rng.choice("><"), rng.choice(words.VERDICTS)
    asked, label = draw_subject(rng, split, "flag", words.LIMITS)
    add, avoid = with_decoy(rng, (asked,))
    table = draw_table(rng, split, (asked, *add), avoid)
    value, row, column = table.column(asked), table.first, table.right + 3
    sketch = Sketch(
        "flag",
        kind,
        table.sheet,
        _beside(table),
        table.first,
        table.last,
        value=value,
        cell=(row, column),
        words=verdict,
    )

    def overlay(rng: random.Random, case: int, cells: Cells) -> Cells:
        # below the first row both verdicts occur, so that a limit which slips down is noticed
        later = sorted(int(cells[table.sheet, at, value]) for at in range(table.first + 1, table.last + 1))
        middle = later[len(later) // 2]
        limit = max(1, middle - 1) if kind == ">" else middle + 1
        found = _header(table, words.FLAG)
        return found | {(table.sheet, row - 1, column): label, (table.sheet, row, column): limit}

    return Parts(
        table,
        sketch,
        words.FLAG_FRAMES,
        words.FLAGS[kind],
        {"x": asked, "l": label, "a": verdict[0], "b": verdict[1]},
        overlay=overlay,
        decoy=table.column(words.RELATED[asked]),
        finds=(asked, label),
    )


def draw_share(rng: random.Random, split: Split) -> Parts:
    """T6: each row's share of the sum, or a running total."""
    kind = rng.choice(("share", "running"))
    asked, _ = draw_subject(rng, split, "share", (kind,))
    add, avoid = with_decoy(rng, (asked,))
    table = draw_table(rng, split, (asked, *add), avoid)
    label = words.SHARE if kind == "share" else words.TOTAL
    return Parts(
        table,
        Sketch("share", kind, table.sheet, _beside(table), table.first, table.last, value=table.column(asked)),
        words.FILL_FRAMES,
        words.SHARES[kind],
        {"x": asked},
        Probe(asked),
        lambda rng, case, cells: _header(table, label),
        decoy=table.column(words.RELATED[asked]),
        finds=(asked,),
    )


def draw_lookup(rng: random.Random, split: Split) -> Parts:
    """T7: for each row, the value that a second sheet lists for its key."""
    sheet = rng.choice(words.LOOKUP_SHEETS)
    asked, key_header = draw_subject(rng, split, "lookup", tuple(words.KEYS))
    related = words.RELATED[asked]
    table = draw_table(rng, split, (key_header,), (asked, related), least_rows=5)
    values = [asked, related] if rng.random() < 0.6 else [asked]
    rng.shuffle(values)
    keys = words.KEYS[key_header]
    top, left = rng.randint(1, 3), 1  # in column A, so that the index can be read off the letter
    area = Rect(top + 1, left, top + len(keys), left + len(values))
    sketch = Sketch(
        "lookup",
        "VLOOKUP",
        table.sheet,
        _beside(table),
        table.first,
        table.last,
        key=table.column(key_header),
        lookup=(sheet, area, values.index(asked) + 2),
    )
    return Parts(
        table,
        sketch,
        words.FILL_FRAMES,
        words.LOOKUPS,
        {"x": asked, "k": key_header, "s": sheet},
        overlay=_second_sheet(table, sketch, key_header, tuple(values)),
        decoy=values.index(related) + 2 if related in values else 0,
        lookup_sheets=(sheet,),
        finds=(key_header, asked),
    )


def _second_sheet(table: Table, sketch: Sketch, key_header: str, values: tuple[str, ...]) -> Overlay:
    if sketch.lookup is None:
        raise ValueError("a lookup needs the table it looks in")
    sheet, area, _ = sketch.lookup
    keys = words.KEYS[key_header]

    def overlay(rng: random.Random, case: int, cells: Cells) -> Cells:
        order = rng.sample(keys, len(keys))
        if case == 1 and order == sorted(order):
            order.reverse()  # an approximate match needs a sorted list
        found = _header(table, words.COLUMN_LABELS[0])
        # each key is asked for below the first row, where a table that slips down has lost it
        rows = rng.sample(range(table.first + 1, table.last + 1), len(keys))
        found |= {(table.sheet, row, sketch.key): key for row, key in zip(rows, keys, strict=True)}
        found |= {(sheet, area.top - 1, area.left + at): header for at, header in enumerate((key_header, *values))}
        for row, key in enumerate(order, area.top):
            found[sheet, row, area.left] = key
            found |= {(sheet, row, area.left + 1 + at): rng.randint(1, 99) for at in range(len(values))}
        return found

    return overlay


def draw_summary(rng: random.Random, split: Split) -> Parts:
    """T9: a small table of sums by key, with a grand total."""
    asked, key_header = draw_subject(rng, split, "summary", tuple(words.KEYS))
    add, avoid = with_decoy(rng, (asked,))
    table = draw_table(rng, split, (asked, key_header, *add), avoid, least_rows=5)
    keys = words.KEYS[key_header]
    left = table.right + 2
    target = Rect(table.first, left + 1, table.first + len(keys), left + 1)
    sketch = Sketch(
        "summary",
        "SUMIF",
        table.sheet,
        target,
        table.first,
        table.last,
        value=table.column(asked),
        key=table.column(key_header),
    )

    def overlay(rng: random.Random, case: int, cells: Cells) -> Cells:
        sheet, order = table.sheet, rng.sample(keys, len(keys))
        rows = rng.sample(range(table.first, table.last + 1), len(keys))
        found: Cells = {(sheet, row, sketch.key): key for row, key in zip(rows, keys, strict=True)}
        if case == 1:  # a range that slips down loses the first data row for the second group
            order.remove(
                first := str(found.get((sheet, table.first, sketch.key), cells[sheet, table.first, sketch.key]))
            )
            order.insert(1, first)
        found |= {(sheet, table.header_row, left): words.GROUP, (sheet, table.header_row, left + 1): words.TOTAL}
        found |= {(sheet, row, left): key for row, key in enumerate((*order, words.ALL), target.top)}
        return found

    return Parts(
        table,
        sketch,
        words.FILL_FRAMES,
        words.SUMMARIES,
        {"x": asked, "g": key_header, "a": words.ALL},
        Probe(asked),
        overlay,
        decoy=table.column(words.RELATED[asked]),
        finds=(key_header, words.GROUP, asked),
    )
