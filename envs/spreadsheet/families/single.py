"""Families with one answer cell: total, stat, conditional, repair, multi_key."""

from __future__ import annotations

import random
from dataclasses import replace

from ..refs import Rect
from . import words
from .drafts import Overlay, Parts, draw_key, draw_subject
from .layout import CASES, Cells, Probe, Table, draw_table, with_decoy
from .sketch import Sketch, single_formula
from .split import Split

SECOND_TABLE_CHANCE = 0.12
_STATS = ("AVERAGE", "MAX", "MIN", "COUNT", "MEDIAN")
_REPAIRED = ("SUM", "SUM", "AVERAGE", "MAX", "MIN")


def draw_total(rng: random.Random, split: Split) -> Parts:
    """T1: the sum of a column."""
    return _aggregate(rng, split, "total", "SUM")


def draw_stat(rng: random.Random, split: Split) -> Parts:
    """T2: average, largest, smallest, count (over a column with gaps) or median of a column."""
    return _aggregate(rng, split, "stat", rng.choice(_STATS))


def draw_repair(rng: random.Random, split: Split) -> Parts:
    """T8: the answer cell holds a formula that stops short, starts late, or takes a wrong column or function."""
    parts = _aggregate(rng, split, "repair", rng.choice(_REPAIRED))
    return replace(parts, frames=words.REPAIR_FRAMES, overlay=_faulty_formula(rng, parts.table, parts.sketch))


def _aggregate(rng: random.Random, split: Split, family: str, kind: str) -> Parts:
    asked, _ = draw_subject(rng, split, family, ("",))
    add, avoid = with_decoy(rng, (asked,))
    table = draw_table(rng, split, (asked, *add), avoid)
    repair = family == "repair"
    second = None if add or repair else _second_table(rng, table, asked, ())
    target = _target(rng, table, beside=second is None, gap=not repair)
    return Parts(
        table,
        Sketch(family, kind, table.sheet, target, table.first, table.last, value=table.column(asked)),
        words.CELL_FRAMES,
        words.AGGREGATES[kind],
        {"x": asked},
        Probe(asked, low=kind == "MIN"),
        blanks=asked if kind == "COUNT" else "",
        decoy=_decoy(table, second, asked),
        second=second,
        finds=(asked,),
    )


def _decoy(table: Table, second: Table | None, asked: str) -> int:
    related = words.RELATED[asked]
    return table.column(related) or (second.column(related) if second else 0)


def _target(rng: random.Random, table: Table, *, beside: bool = True, gap: bool = True) -> Rect:
    """One answer cell: directly below the table, below with a gap, or beside it."""
    where = rng.choices(("adjacent", "gap", "beside"), (0.45, 0.2, 0.35))[0]
    if where == "beside" and beside:
        row, column = rng.randint(table.header_row, table.last - 1), table.right + 2
    else:
        row = table.last + (2 if where == "gap" and gap else 1)
        column = rng.randint(table.left, table.right)
    return Rect(row, column, row, column)


def _second_table(rng: random.Random, table: Table, asked: str, taken: tuple[str, ...]) -> Table | None:
    """Now and then a table as tall or shorter stands beside, with the related header."""
    if rng.random() >= SECOND_TABLE_CHANCE:
        return None
    key = rng.choice([k for k in words.KEYS if k not in table.headers and k not in taken])
    rows = rng.randint(3, table.rows)
    return Table(table.sheet, table.header_row, table.right + 2, rows, (key, words.RELATED[asked]))


def _faulty_formula(rng: random.Random, table: Table, sketch: Sketch) -> Overlay:
    others = [table.column(h) for h in table.headers if h in words.RELATED and table.column(h) != sketch.value]
    match rng.choice(["short", "late", "function", "column"] if others else ["short", "late", "function"]):
        case "short":
            wrong = replace(sketch, last=sketch.last - rng.randint(1, 2))
        case "late":
            wrong = replace(sketch, first=sketch.first + rng.randint(1, 2))
        case "column":
            wrong = replace(sketch, value=rng.choice(others))
        case _:
            wrong = replace(sketch, kind=rng.choice([k for k in (*_REPAIRED[1:], "COUNT") if k != sketch.kind]))
    formula = single_formula(wrong)
    return lambda rng, case, cells: {(sketch.sheet, sketch.target.top, sketch.target.left): formula}


def draw_conditional(rng: random.Random, split: Split) -> Parts:
    """T3: sum, count or average for a key, which the instruction names or (PICK) a cell holds."""
    kind = rng.choices(("SUMIF", "COUNTIF", "AVERAGEIF", "PICK"), (4, 2, 2, 2))[0]
    asked, key_header = draw_subject(rng, split, "conditional", tuple(words.KEYS))
    add, avoid = with_decoy(rng, (asked,))
    key = rng.choice(words.KEYS[key_header])
    if kind == "COUNTIF":
        key, key_header = draw_key(rng, split, "conditional")
        add = avoid = ()
    table = draw_table(rng, split, (asked, key_header, *add), avoid)
    plain = kind in ("SUMIF", "AVERAGEIF")
    second = _second_table(rng, table, asked, (key_header,)) if plain and not add else None
    target = _target(rng, table, beside=second is None and kind != "PICK")
    cell = (table.first, table.right + 2) if kind == "PICK" else (0, 0)
    sketch = Sketch(
        "conditional",
        kind,
        table.sheet,
        target,
        table.first,
        table.last,
        value=table.column(asked) if kind != "COUNTIF" else 0,
        key=table.column(key_header),
        cell=cell,
        words=(key,),
    )
    return Parts(
        table,
        sketch,
        words.CELL_FRAMES,
        words.CONDITIONALS[kind],
        {"x": asked, "k": key_header, "v": key, "l": words.PICK},
        Probe(asked, ((key_header, key),)),
        _pick(rng, table, sketch, key_header) if kind == "PICK" else None,
        decoy=_decoy(table, second, asked) if kind != "COUNTIF" else 0,
        second=second,
        finds={"COUNTIF": (key_header,), "PICK": (key_header, words.PICK, asked)}.get(kind, (key_header, asked)),
    )


def _pick(rng: random.Random, table: Table, sketch: Sketch, key_header: str) -> Overlay:
    """Another key is picked in each case; it stands at both ends of the table."""
    picks = rng.sample(words.KEYS[key_header], CASES)
    (row, column), key_column = sketch.cell, sketch.key

    def overlay(rng: random.Random, case: int, cells: Cells) -> Cells:
        found: Cells = {(table.sheet, end, key_column): picks[case] for end in (table.first, table.last)}
        return found | {(table.sheet, row - 1, column): words.PICK, (table.sheet, row, column): picks[case]}

    return overlay


def draw_multi_key(rng: random.Random, split: Split) -> Parts:
    """T10: sum or count under two conditions, or the number of different keys."""
    kind = rng.choices(("SUMIFS", "COUNTIFS", "DISTINCT"), (5, 3, 2))[0]
    asked, key_header = draw_subject(rng, split, "multi_key", tuple(words.KEYS))
    add, avoid = with_decoy(rng, (asked,)) if kind == "SUMIFS" else ((), ())
    key = rng.choice(words.KEYS[key_header])
    if kind == "COUNTIFS":
        key, key_header = draw_key(rng, split, "multi_key")
    other_header = rng.choice([k for k in words.KEYS if k != key_header])
    other = rng.choice(words.KEYS[other_header])
    table = draw_table(rng, split, (asked, key_header, other_header, *add), avoid)
    sketch = Sketch(
        "multi_key",
        kind,
        table.sheet,
        _target(rng, table),
        table.first,
        table.last,
        value=table.column(asked) if kind == "SUMIFS" else 0,
        key=table.column(key_header),
        other=table.column(other_header) if kind != "DISTINCT" else 0,
        words=(key, other),
    )
    return Parts(
        table,
        sketch,
        words.CELL_FRAMES,
        words.DOUBLE[kind],
        {"x": asked, "k": key_header, "v": key, "j": other_header, "w": other},
        Probe(asked, ((key_header, key), (other_header, other))),
        _distinct(rng, table, sketch, key_header) if kind == "DISTINCT" else None,
        decoy=_decoy(table, None, asked) if kind == "SUMIFS" else 0,
        finds={"DISTINCT": (key_header,), "COUNTIFS": (key_header, other_header)}.get(
            kind, (asked, key_header, other_header)
        ),
    )


def _distinct(rng: random.Random, table: Table, sketch: Sketch, key_header: str) -> Overlay:
    """The number of different keys changes from case to case, and one key stands only in an edge row."""
    sizes = rng.sample((2, 3, 4), 3)

    def overlay(rng: random.Random, case: int, cells: Cells) -> Cells:
        lone, *pool = rng.sample(words.KEYS[key_header], sizes[case % 3])
        edge = table.first if case == 2 else table.last
        rows = [row for row in range(table.first, table.last + 1) if row != edge]
        drawn = [*pool, *(rng.choice(pool) for _ in range(len(rows) - len(pool)))]
        rng.shuffle(drawn)
        found: Cells = {(table.sheet, row, sketch.key): key for row, key in zip(rows, drawn, strict=True)}
        return found | {(table.sheet, edge, sketch.key): lone}

    return overlay
