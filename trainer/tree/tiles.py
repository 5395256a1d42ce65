"""Which attention calls a `TokenTree` takes: rectangles of queries and keys that cover each pair exactly once.

In depth-first order the descendants of a node are the range behind it, so all of them meet its keys in one call without
gathering anything, and attention over a path is the sum of such calls. Always true: every pair of a token and one on
its path (itself included) stands in one tile, no other pair counts; every token is query and key of exactly one tile
with `first`, so that these may write where all others add.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from .core import Node, TokenTree

MERGING = 24
"""Pairs that cost a query as much as adding a call's result to what it has."""

MASKED = 1 << 22
"""Most pairs that a subtree has as a single call, with its mask."""


@dataclass(frozen=True, slots=True)
class Tile:
    """Queries `[q, q_stop)` against keys `[k, k_stop)`: all pairs, only `causal` ones, or those of a mask."""

    q: int
    q_stop: int
    k: int
    k_stop: int
    causal: bool = False
    masked: bool = False
    first: bool = True


@dataclass(frozen=True, slots=True)
class _Part:
    """Tiles for the tokens of neighbouring subtrees among themselves; `cost` in pairs."""

    start: int
    end: int
    cost: float
    tiles: tuple[Tile, ...]

    @property
    def size(self) -> int:
        return self.end - self.start


def tiles(tree: TokenTree, call: float) -> tuple[Tile, ...]:
    """The cheapest cover that this finds, where a call costs as much as `call` pairs: small subtrees become one masked
    call, large ones a call for their root's tokens and one for all descendants' queries against these.
    """
    parts: list[_Part] = []  # of the nodes seen whose parent is yet to come, the leftmost last
    for node in reversed(tree.nodes()):
        below: list[_Part] = []
        while parts and parts[-1].start < node.end:
            below.append(parts.pop())
        parts.append(_part(node, _merged(below, call), call))
    found = _merged(parts[::-1], call)
    every = [tile for part in found for tile in part.tiles]
    return tuple(sorted(every, key=lambda tile: not tile.first))


def _part(node: Node, below: Sequence[_Part], call: float) -> _Part:
    own, rest = node.stop - node.start, node.end - node.stop
    tile = Tile(node.start, node.stop, node.start, node.stop, causal=True)
    cost = own * (own + 1) / 2 + call
    if not below:
        return _Part(node.start, node.end, cost, (tile,))
    whole = _block(node.start, node.end, call)
    cost += rest * (own + MERGING) + call + sum(part.cost for part in below)
    if whole.cost <= cost:
        return whole
    across = Tile(node.stop, node.end, node.start, node.stop, first=False)
    return _Part(node.start, node.end, cost, (tile, across, *(tile for part in below for tile in part.tiles)))


def _block(start: int, end: int, call: float) -> _Part:
    pairs = (end - start) ** 2
    cost = pairs + call if pairs <= MASKED else math.inf
    return _Part(start, end, cost, (Tile(start, end, start, end, masked=True),))


def _merged(parts: Sequence[_Part], call: float) -> list[_Part]:
    """Neighbours that are one call each made one call together, where that is cheaper."""
    found: list[_Part] = []
    for part in parts:
        if found and len(part.tiles) == len(found[-1].tiles) == 1:
            both = _block(found[-1].start, part.end, call)
            if both.cost <= found[-1].cost + part.cost:
                found[-1] = both
                continue
        found.append(part)
    return found


def windowed(found: Sequence[Tile], positions: torch.Tensor, window: int) -> tuple[Tile, ...]:
    """The tiles where a query sees no key that is `window` or more positions before it."""
    kept: list[Tile] = []
    for tile in found:
        queries, keys = positions[tile.q : tile.q_stop], positions[tile.k : tile.k_stop]
        if int(queries.max() - keys.min()) < window:
            kept.append(tile)
        elif tile.first or int(queries.min() - keys.max()) < window:
            kept.append(replace(tile, causal=False, masked=True))
    return tuple(kept)


def visible(tree: TokenTree, tile: Tile, window: int | None = None) -> torch.Tensor:
    """Which pairs of a tile count: (queries, keys) bool. A key stands on the query's path, less than `window` before
    it.
    """
    queries = torch.arange(tile.q, tile.q_stop, device=tree.ends.device)[:, None]
    keys = torch.arange(tile.k, tile.k_stop, device=tree.ends.device)[None]
    seen = (keys <= queries) & (queries < tree.ends[tile.k : tile.k_stop])
    if window is not None:
        apart = tree.positions[tile.q : tile.q_stop, None] - tree.positions[None, tile.k : tile.k_stop]
        seen &= apart < window
    return seen
