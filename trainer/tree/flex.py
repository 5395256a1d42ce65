"""Attention over a `TokenTree` by torch's FlexAttention (arXiv 2412.05496): one kernel over all pairs of tokens, which
skips blocks in which no pair counts and asks about each pair only where some do.

Always true: a block that is skipped has no pair that counts, a block that is not asked about has no other.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from .core import TokenTree

BLOCK = 128
"""Queries, and keys, of a block."""


def blocks(tree: TokenTree, window: int | None = None, size: int = BLOCK) -> BlockMask:
    """Which blocks a kernel computes: those where all pairs count, and those where some do; `visible` in `tiles.py`
    says which.
    """
    ends, positions, count = tree.ends, tree.positions, tree.unique
    keys = torch.arange(count, device=ends.device)[None]
    lowest = torch.arange(0, count, size, device=ends.device)[:, None]
    highest = lowest + size - 1  # of the last block behind the last token, where nothing ends: it is never full
    some, every = (keys <= highest) & (lowest < ends), (keys <= lowest) & (highest < ends)
    if window is not None:
        by_block = _by_block(positions[None], size, -1)[0]
        nearest = by_block.where(by_block >= 0, count).amin(1, keepdim=True)
        farthest = by_block.amax(1, keepdim=True)
        some &= nearest - positions < window
        every &= farthest - positions < window
    partly, fully = _by_block(some, size, False).any(-1), _by_block(every, size, False).all(-1)

    oldest = positions if window is None else positions - window  # the compiler takes tensors better than numbers

    def counts(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = (key <= query) & (query < ends[key])
        return seen if window is None else seen & (oldest[query] < positions[key])

    return BlockMask.from_kv_blocks(
        *_listed(partly & ~fully), *_listed(fully), BLOCK_SIZE=size, mask_mod=counts, seq_lengths=(count, count)
    )


def _by_block(rows: Tensor, size: int, blank: float) -> Tensor:
    """(rows, tokens) as (rows, blocks, size), the last block filled up."""
    filled = torch.nn.functional.pad(rows, (0, -rows.size(1) % size), value=blank)
    return filled.view(rows.size(0), -1, size)


def _listed(which: Tensor) -> tuple[Tensor, Tensor]:
    """How many key blocks each query block has, and their indices first."""
    indices = which.int().argsort(dim=-1, descending=True, stable=True)
    return which.sum(-1, dtype=torch.int32)[None, None], indices.int()[None, None]


def attend(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, scale: float) -> Tensor:
    """q: (1, heads, tokens, size); k, v: (1, key heads, tokens, size). Returns (1, tokens, heads, size). On the CPU
    FlexAttention has no backward pass and raises NotImplementedError where one would be needed.
    """
    found = _kernel(q.device.type)(q, k, v, block_mask=mask, scale=scale, enable_gqa=q.size(1) != k.size(1))
    return found.transpose(1, 2)


@cache
def _kernel(device: str) -> Callable[..., Tensor]:
    # without `dynamic` it would be compiled anew for every number of tokens
    plain: Callable[..., Tensor] = flex_attention
    return plain if device == "cpu" else torch.compile(plain, dynamic=True)
