"""Attention of the embedded sampler: every row of a batch stores its key and value, then looks at what it may see.

What always holds: a row's result depends on its own query and on the tokens it sees, in their order, and on nothing
else in the batch. On a CPU the loops below are compiled (by numba), because an episode's keys are too few and their
number too varied for batched matrix products to be fast; elsewhere torch's own attention runs over gathered keys.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from .torch_cache import Cache, Ints, Rows
from .torch_model import Attend

_GATHERED = 1 << 26
"""Numbers gathered at once, keys and values together, where torch attends (256 MiB in float32)."""
_ROWS_A_THREAD = 8
"""Rows that are worth a thread of their own."""


@dataclass(frozen=True, slots=True)
class Sight:
    """What each row of a batch sees, (rows,) each: the first `prefix_seen` tokens of row `prefix` of the prefixes, then
    the first `lane_seen` tokens of `lane`. The last of these is the row itself. A row that sees nothing is padding.
    """

    prefix: Ints
    prefix_seen: Ints
    lane: Ints
    lane_seen: Ints


class Attention:
    """Attention over one cache. On a CPU `threads` threads share a batch's rows; `close` ends them."""

    def __init__(self, cache: Cache, device: torch.device, threads: int) -> None:
        self._cache, self._device = cache, device
        self._threads = threads if device.type == "cpu" else 1
        self._team = ThreadPoolExecutor(self._threads - 1, "espalier-attention") if self._threads > 1 else None

    def over(self, sight: Sight) -> Attend:
        """The attention of a batch; the cache has room for what its rows store."""
        return self._compiled(sight) if self._device.type == "cpu" else self._gathered(sight)

    def close(self) -> None:
        """End the threads."""
        if self._team is not None:
            self._team.shutdown(wait=False)

    def _compiled(self, sight: Sight) -> Attend:
        cache, rows = self._cache, len(sight.lane)
        shape = cache.shape
        seen = (sight.prefix, sight.prefix_seen, sight.lane, sight.lane_seen)
        most = int((sight.prefix_seen + sight.lane_seen).max(initial=1))
        parts = min(self._threads, -(-rows // _ROWS_A_THREAD))
        borders = list(pairwise(i * rows // parts for i in range(parts + 1)))
        store, look = _loops()

        def attend(layer: int, heads: Tensor, values: Tensor) -> Tensor:
            stores = [s[layer].numpy() for s in (cache.prefixes.k, cache.prefixes.v, cache.lanes.k, cache.lanes.v)]
            given, found = heads.numpy(), torch.empty(rows, shape.heads * shape.head_dim)
            out = found.numpy()
            store(given, values.float().numpy(), shape.heads, *stores, *seen)

            def part(a: int, b: int) -> None:
                look(given, shape.heads, *stores, *seen, a, b, np.empty(most, np.float32), out)

            others = [self._team.submit(part, *border) for border in borders[1:]] if self._team else []
            part(*borders[0])
            for other in others:
                other.result()
            return found

        return attend

    def _gathered(self, sight: Sight) -> Attend:
        cache, shape = self._cache, self._cache.shape
        d, kv = shape.head_dim, shape.kv_heads
        writes = [(cache.lanes, *self._places(cache.lanes, sight.lane, sight.lane_seen))]
        of_prefix = np.where(sight.lane_seen == 0, sight.prefix_seen, 0)
        writes.append((cache.prefixes, *self._places(cache.prefixes, sight.prefix, of_prefix)))
        chunks = [(a, b, *self._keys(sight, a, b)) for a, b in self._chunks(sight)]

        def attend(layer: int, heads: Tensor, values: Tensor) -> Tensor:
            k, v = heads[:, shape.heads :], values.view(-1, kv, d)
            for store, rows, at in writes:
                store.write(layer, at, k[rows].reshape(-1, d), v[rows].reshape(-1, d))
            out = heads.new_zeros(len(sight.lane), shape.heads * d)
            for a, b, (prefix, p), (lane, n), mask in chunks:
                keys, vals = (
                    torch.cat([outer[prefix, :, :p], inner[lane, :, :n]], 2)
                    for outer, inner in zip(cache.prefixes.by_row(layer), cache.lanes.by_row(layer), strict=True)
                )
                q = heads[a:b, : shape.heads, None].to(keys.dtype)
                found = F.scaled_dot_product_attention(q, keys, vals, mask, scale=math.log(2), enable_gqa=True)
                out[a:b] = found.reshape(b - a, -1)
            return out

        return attend

    def _places(self, store: Rows, rows: Ints, seen: Ints) -> tuple[Tensor, Tensor]:
        """Which rows of the batch store a token in `store`, and the addresses where."""
        writing = np.flatnonzero(seen)
        at = store.addresses(rows[writing], seen[writing] - 1)
        return torch.from_numpy(writing).to(self._device), torch.from_numpy(at).to(self._device)

    def _chunks(self, sight: Sight) -> Iterator[tuple[int, int]]:
        widest = int(sight.prefix_seen.max(initial=0) + sight.lane_seen.max(initial=1))
        size = max(1, _GATHERED // (2 * widest * self._cache.shape.kv_heads * self._cache.shape.head_dim))
        rows = len(sight.lane)
        yield from ((a, min(a + size, rows)) for a in range(0, rows, size))

    def _keys(self, sight: Sight, a: int, b: int) -> tuple[tuple[Tensor, int], tuple[Tensor, int], Tensor]:
        """Prefix rows and lanes of a chunk, how much of each is gathered, and which of the keys each row sees."""
        p, n = int(sight.prefix_seen[a:b].max()), max(1, int(sight.lane_seen[a:b].max()))
        mask = np.concatenate(
            [np.arange(p) < sight.prefix_seen[a:b, None], np.arange(n) < sight.lane_seen[a:b, None]], 1
        )
        mask[~mask.any(1), 0] = True  # padding looks at anything, so that no sum is empty
        prefix, lane, sees = (
            torch.from_numpy(part).to(self._device) for part in (sight.prefix[a:b], sight.lane[a:b], mask)
        )
        return (prefix, p), (lane, n), sees[:, None, None]


@functools.cache
def _loops() -> tuple[Any, Any]:
    """`_store` and `_attend` compiled, without the interpreter lock.

    numba is loaded when it is first needed: where its llvmlite is loaded, vLLM 0.32's CPU workers fail to start. Sums
    may be reordered within a row (vectorised), the same way each time. Nothing is kept on disk: compiling takes a
    second or two, and a full disk could not stop it.
    """
    import numba

    compiled = numba.njit(nogil=True, error_model="numpy", fastmath={"reassoc", "contract", "nsz"})
    return compiled(_store), compiled(_attend)


F32 = NDArray[np.float32]


def _store(
    heads: F32, values: F32, q_heads: int, outer_k: F32, outer_v: F32, inner_k: F32, inner_v: F32,
    prefix: Ints, prefix_seen: Ints, lane: Ints, lane_seen: Ints,
) -> None:  # fmt: skip
    """Keys and values of a batch into the stores: (rows, heads, head_dim) and (rows, kv_heads * head_dim)."""
    kv, d = heads.shape[1] - q_heads, heads.shape[2]
    for r in range(heads.shape[0]):
        for j in range(kv):
            if lane_seen[r] > 0:
                inner_k[lane[r] * kv + j, lane_seen[r] - 1] = heads[r, q_heads + j]
                inner_v[lane[r] * kv + j, lane_seen[r] - 1] = values[r, j * d : (j + 1) * d]
            elif prefix_seen[r] > 0:
                outer_k[prefix[r] * kv + j, prefix_seen[r] - 1] = heads[r, q_heads + j]
                outer_v[prefix[r] * kv + j, prefix_seen[r] - 1] = values[r, j * d : (j + 1) * d]


def _attend(
    heads: F32, q_heads: int, outer_k: F32, outer_v: F32, inner_k: F32, inner_v: F32,
    prefix: Ints, prefix_seen: Ints, lane: Ints, lane_seen: Ints, first: int, last: int, weights: F32, out: F32,
) -> None:  # fmt: skip
    """Softmax attention of rows [first, last), scores in base 2, into `out` (rows, q_heads * head_dim)."""
    kv, d = heads.shape[1] - q_heads, heads.shape[2]
    group = q_heads // kv
    total = np.empty(d, np.float32)
    for r in range(first, last):
        p, n = prefix_seen[r], lane_seen[r]
        for h in range(q_heads):
            q = heads[r, h]
            outer, inner = prefix[r] * kv + h // group, lane[r] * kv + h // group
            top = np.float32(-np.inf)
            for t in range(p + n):
                k = outer_k[outer, t] if t < p else inner_k[inner, t - p]
                score = np.float32(0.0)
                for i in range(d):
                    score += q[i] * k[i]
                weights[t] = score
                top = max(top, score)
            whole = np.float32(0.0)
            total[:] = 0.0
            for t in range(p + n):
                weight = np.exp2(weights[t] - top)
                whole += weight
                v = outer_v[outer, t] if t < p else inner_v[inner, t - p]
                for i in range(d):
                    total[i] += weight * v[i]
            for i in range(d):
                out[r, h * d + i] = total[i] / whole if p + n > 0 else np.float32(0.0)
