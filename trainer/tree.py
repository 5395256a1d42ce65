"""`TokenTree`: the rows of a micro-batch as a radix tree over exact token ids, every shared token in it once.

Tokens stand in depth-first order, so that what follows from a token is the range up to its `ends`, and a query sees a
key exactly if `key <= query < ends[key]`. Always true: the path to a row's last token spells the row, and positions run
along paths; a token that is predicted stands in no row of its own, its log-probability comes from the token before it
on the path; whatever belongs to a row (advantage, recorded log-probability, weight) stays with the row: only
log-probabilities are shared, `expand` hands them to every row that has them.

Everything position-wise is exact on such a row of tokens; attention is `tree_attention.py`'s.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray

from .batch import Row

Ids = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class TokenTree:
    """What one forward pass computes. Shapes, all int64:

    tokens, positions, ends: (unique,); `positions` counts along the path, `ends` is the index behind the last token
    that follows from this one.
    predictors, targets: (predicted,), each pair once: the index of the token before, and the token to be predicted.
    expand: (trained,), where in `targets` each trained token of the rows is, row by row.

    `total`: tokens that a pass over whole rows computes.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    ends: torch.Tensor
    predictors: torch.Tensor
    targets: torch.Tensor
    expand: torch.Tensor
    total: int

    @property
    def unique(self) -> int:
        """Tokens that are computed."""
        return self.tokens.numel()

    def to(self, device: torch.device) -> TokenTree:
        """The same tree on another device."""
        return TokenTree(
            self.tokens.to(device),
            self.positions.to(device),
            self.ends.to(device),
            self.predictors.to(device),
            self.targets.to(device),
            self.expand.to(device),
            self.total,
        )

    def nodes(self) -> list[Node]:
        """The radix tree's nodes in depth-first order: longest runs of tokens of which each has only the next one as
        its child.
        """
        ends, positions = self.ends.cpu().numpy(), self.positions.cpu().numpy()
        follows = (positions[1:] == positions[:-1] + 1) & (ends[1:] == ends[:-1])
        starts = np.concatenate([[0], np.flatnonzero(~follows) + 1]).tolist() if len(ends) else []
        stops = [*starts[1:], len(ends)]
        return [Node(start, stop, int(ends[start])) for start, stop in zip(starts, stops, strict=True)]


@dataclass(frozen=True, slots=True)
class Node:
    """Tokens `[start, stop)`; those of its descendants are `[stop, end)`."""

    start: int
    stop: int
    end: int


def grow(rows: Sequence[Row], share: bool = True) -> TokenTree:
    """The tree of `rows`; with `share=False` a forest in which each row stands by itself (packed, nothing shared)."""
    paths: list[Ids] = [np.empty(0, np.int64)] * len(rows)
    tokens, positions, ends = (np.empty(sum(len(row.tokens) - 1 for row in rows), np.int64) for _ in range(3))
    size, path = 0, np.empty(0, np.int64)
    for at, ids, shared in _in_order(rows, share):
        ends[path[shared:]] = size  # these have no further descendants
        fresh = len(ids) - shared
        tokens[size : size + fresh] = ids[shared:]
        positions[size : size + fresh] = np.arange(shared, len(ids))
        path = np.concatenate([path[:shared], np.arange(size, size + fresh)])
        paths[at], size = path, size + fresh
    ends[path] = size

    before: list[Ids] = [path[_trained(row) - 1] for row, path in zip(rows, paths, strict=True)]
    after: list[Ids] = [np.asarray(row.tokens, np.int64)[_trained(row)] for row in rows]
    pairs = np.stack([np.concatenate([*before, []]), np.concatenate([*after, []])]).astype(np.int64)
    pairs, expand = np.unique(pairs, axis=1, return_inverse=True)
    return TokenTree(
        _tensor(tokens[:size]),
        _tensor(positions[:size]),
        _tensor(ends[:size]),
        _tensor(pairs[0]),
        _tensor(pairs[1]),
        _tensor(expand.reshape(-1)),
        len(tokens),
    )


def _tensor(array: Ids) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))


def cut(rows: Sequence[Row], budget: int, processes: int = 1) -> list[list[Row]]:
    """`rows` as micro-batches of at most `budget` tokens each, shared ones counted once (a row alone may have more):
    in as few rounds of `processes` as that allows, about equally large. Neighbours in the tree stay together; a
    cut is made where it separates least.
    """
    ordered = [(rows[at], len(ids), shared) for at, ids, shared in _in_order(rows)]
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
    return sum(len(ids) - shared for _, ids, shared in _in_order(rows))


def telling(rows: Sequence[Row], count: int) -> list[Row]:
    """A few rows on which a wrong tree would show: `count` neighbours that share much and part much, and the longest
    row. No two are equal, none is the beginning of another, but the longest.
    """
    longest = max(rows, key=lambda row: len(row.tokens))
    ordered = [(rows[at], ids) for at, ids, _ in _in_order(rows)]
    pairs = pairwise(ordered)
    ordered = [first for first, then in pairs if _common(first[1], then[1]) < len(first[1])] + ordered[-1:]
    shown = [0]
    for (_, a), (_, b) in pairwise(ordered):
        shared = _common(a, b)
        shown.append(min(shared, len(a) - shared, len(b) - shared))
    best = max(range(len(ordered)), key=lambda i: sum(shown[i + 1 : i + count]))
    few = [row for row, _ in ordered[best : best + count]]
    return few if any(row.tokens[:-1] == longest.tokens[:-1] for row in few) else [*few, longest]


def _in_order(rows: Sequence[Row], share: bool = True) -> Iterator[tuple[int, Ids, int]]:
    """The rows depth-first: index, ids of all tokens but the last, and how many the row shares with the one before."""
    keys = [row.tokens[:-1] for row in rows]
    before = np.empty(0, np.int64)
    for at in sorted(range(len(rows)), key=lambda i: (keys[i], rows[i].trajectory)) if share else range(len(rows)):
        ids = np.asarray(keys[at], np.int64)
        yield at, ids, _common(before, ids) if share else 0
        before = ids


def _common(a: Ids, b: Ids) -> int:
    length = min(len(a), len(b))
    differs = a[:length] != b[:length]
    return int(differs.argmax()) if differs.any() else length


def _trained(row: Row) -> Ids:
    return np.flatnonzero(np.asarray(row.mask, bool))
