"""Which rows run together: micro-batches cut along the tree, and the few rows that show whether a tree is right."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from ..batch import Row
from .core import common, in_order


def cut(rows: Sequence[Row], budget: int, processes: int = 1) -> list[list[Row]]:
    """`rows` as micro-batches of at most `budget` tokens each, shared ones counted once (a row alone may have more):
    in as few rounds of `processes` as that allows, about equally large. Neighbours in the tree stay together; a
    cut is made where it separates least.
    """
    ordered = [(rows[at], len(ids), shared) for at, ids, shared in in_order(rows)]
    unique = sum(length - shared for _, length, shared in ordered)
    rounds = -(-unique // (max(budget, 1) * processes))
    while True:
        count = rounds * processes
        for slack in (1.0, 1.1, 1.25, 1.5):
            parts = _cut(ordered, min(budget, round(slack * unique / count)))
            if len(parts) <= count or count >= len(rows):
                return parts
        rounds += 1


def _cut(ordered: Sequence[tuple[Row, int, int]], budget: int) -> list[list[Row]]:
    parts: list[list[Row]] = []
    while ordered:
        stop = _stop([(length, shared) for _, length, shared in ordered], budget)
        parts.append([row for row, _, _ in ordered[:stop]])
        ordered = ordered[stop:]
    return parts


def _stop(ordered: Sequence[tuple[int, int]], budget: int) -> int:
    """How many of the rows (length, tokens shared with the one before) make the next micro-batch: of the cuts between
    half of the budget and all of it, the last of those that separate least.
    """
    size, found, least = ordered[0][0], 1, -1
    for i, (length, shared) in enumerate(ordered[1:], 1):
        if least < 0 or size <= budget / 2 or shared <= least:
            found, least = i, shared
        size += length - shared
        if size > budget:
            return found
    return len(ordered)


def unique_tokens(rows: Sequence[Row]) -> int:
    """How many tokens the tree of `rows` has."""
    return sum(len(ids) - shared for _, ids, shared in in_order(rows))


def telling(rows: Sequence[Row], count: int) -> list[Row]:
    """A few rows on which a wrong tree would show: `count` neighbours that share much and part much, and the longest
    row. No two are equal, none is the beginning of another, but the longest.
    """
    longest = max(rows, key=lambda row: len(row.tokens))
    ordered = [(rows[at], ids) for at, ids, _ in in_order(rows)]
    pairs = pairwise(ordered)
    ordered = [first for first, then in pairs if common(first[1], then[1]) < len(first[1])] + ordered[-1:]
    shown = [0]
    for (_, a), (_, b) in pairwise(ordered):
        shared = common(a, b)
        shown.append(min(shared, len(a) - shared, len(b) - shared))
    best = max(range(len(ordered)), key=lambda i: sum(shown[i + 1 : i + count]))
    few = [row for row, _ in ordered[best : best + count]]
    return few if any(row.tokens[:-1] == longest.tokens[:-1] for row in few) else [*few, longest]
