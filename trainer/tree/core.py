"""`TokenTree`: the rows of a micro-batch as a radix tree over exact token ids, every shared token in it once.

Tokens stand in depth-first order, so that what follows from a token is the range up to its `ends`, and a query sees a
key exactly if `key <= query < ends[key]`. Always true: the path to a row's last token spells the row, and positions run
along paths; a token that is predicted stands in no row of its own, its log-probability comes from the token before it
on the path; whatever belongs to a row (advantage, recorded log-probability, weight) stays with the row: only
log-probabilities are shared, `expand` hands them to every row that has them.

Everything position-wise is exact on such a row of tokens; attention is `attention.py`'s.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from ..batch import Row

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
    for at, ids, shared in in_order(rows, share):
        ends[path[shared:]] = size  # these have no further descendants
        fresh = len(ids) - shared
        tokens[size : size + fresh] = ids[shared:]
        positions[size : size + fresh] = np.arange(shared, len(ids))
        path = np.concatenate([path[:shared], np.arange(size, size + fresh)])
        paths[at], size = path, size + fresh
    ends[path] = size

    before: list[Ids] = [path[_trained(row) - 1] for row, path in zip(rows, paths, strict=True)]
    after: list[Ids] = [np.asarray(row.tokens, np.int64)[_trained(row)] for row in rows]
    every = np.stack([np.concatenate(before), np.concatenate(after)])
    pairs, expand = np.unique(every, axis=1, return_inverse=True)
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


def in_order(rows: Sequence[Row], share: bool = True) -> Iterator[tuple[int, Ids, int]]:
    """The rows depth-first: index, ids of all tokens but the last, and how many the row shares with the one before."""
    keys = [row.tokens[:-1] for row in rows]
    before = np.empty(0, np.int64)
    for at in sorted(range(len(rows)), key=lambda i: (keys[i], rows[i].trajectory)) if share else range(len(rows)):
        ids = np.asarray(keys[at], np.int64)
        yield at, ids, common(before, ids) if share else 0
        before = ids


def common(a: Ids, b: Ids) -> int:
    """How many tokens two sequences begin with alike."""
    length = min(len(a), len(b))
    differs = a[:length] != b[:length]
    return int(differs.argmax()) if differs.any() else length


def _trained(row: Row) -> Ids:
    return np.flatnonzero(np.asarray(row.mask, bool))
