"""Attention over a `TokenTree`.

Each tile (`tiles.py`) is one call of a kernel (`kernels.py`); results over different keys are put together by their
softmax denominators, and backward calls the same tiles with the final denominator (the arithmetic of FlashAttention,
arXiv 2205.14135, and of ring attention, arXiv 2310.01889, across the levels of a tree). Always true: keys and values
are neither gathered nor repeated for heads; saved for backward are the inputs, the result and the denominators, nothing
a segment.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from . import flex
from .core import TokenTree
from .kernels import Kernel, Pairs, kernel_for, wide
from .tiles import Tile, tiles, visible, windowed

CALL_OPERATIONS = {"cpu": 2e6}
"""Floating-point operations in the time that a call costs beside its work, by kind of device."""

Backend = Literal["tiles", "flex", "dense"]
"""By tiles, by FlexAttention, or with the mask of all pairs."""


@dataclass(eq=False)
class Layout:
    """A tree as the attention of one model sees it; made for a pass, used by every layer of it.

    `work`: operations a pair of query and key takes in one layer's forward pass (4 x heads x head size).
    """

    tree: TokenTree
    work: int
    backend: Backend = "tiles"
    _tiles: dict[int | None, tuple[Tile, ...]] = field(default_factory=dict)
    _masks: dict[tuple[Tile, torch.dtype], Tensor] = field(default_factory=dict)
    _blocks: dict[int | None, BlockMask] = field(default_factory=dict)
    _depth: int = 0

    def __post_init__(self) -> None:
        self._depth = int(self.tree.positions.max()) + 1

    def tiles(self, window: int | None) -> tuple[Tile, ...]:
        """The calls of a layer; `window` None where it reaches over every path."""
        if window not in self._tiles:
            call = CALL_OPERATIONS.get(self.tree.tokens.device.type, 5e8) / self.work
            found = tiles(self.tree, call)
            self._tiles[window] = found if window is None else windowed(found, self.tree.positions.cpu(), window)
        return self._tiles[window]

    def blocks(self, window: int | None) -> BlockMask:
        """The same for FlexAttention."""
        if window not in self._blocks:
            self._blocks[window] = flex.blocks(self.tree, window)
        return self._blocks[window]

    def window(self, asked: int | None) -> int | None:
        """A layer's sliding window, None where no path is longer."""
        return None if asked is None or asked >= self._depth else asked

    def pairs(self, tile: Tile, window: int | None, dtype: torch.dtype, scale: float) -> Pairs:
        """What a kernel is told about a tile."""
        return Pairs(tile.causal, self._mask(tile, window, dtype) if tile.masked else None, scale)

    def _mask(self, tile: Tile, window: int | None, dtype: torch.dtype) -> Tensor:
        """Kept where every layer needs it."""
        kept = self._masks.get((tile, dtype)) if window is None else None
        if kept is not None:
            return kept
        seen = visible(self.tree, tile, window)
        made = torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, -torch.inf)
        if window is None:
            self._masks[tile, dtype] = made
        return made


class _TreeAttention(torch.autograd.Function):
    """q: (1, heads, tokens, size); k, v: (1, key heads, tokens, size). Returns (1, tokens, heads, size)."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layout: Layout,
        window: int | None,
        scale: float,
        kernel: Kernel,
    ) -> Tensor:
        heads, count, length = k.size(1), q.size(1) // k.size(1), q.size(2)
        sums = wide(q.dtype)
        queries, keys, values = _by_key_head(q, k, v)
        result = q.new_empty(length, heads * count, v.size(3), dtype=sums)
        out = result.transpose(0, 1).unflatten(0, (heads, count))
        lse = q.new_empty(heads, count, length, dtype=sums)
        for tile in layout.tiles(window):
            at, of = slice(tile.q, tile.q_stop), slice(tile.k, tile.k_stop)
            pairs = layout.pairs(tile, window, q.dtype, scale)
            new, new_lse = kernel.forward(queries[:, :, at], keys[:, :, of], values[:, :, of], pairs)
            if tile.first:
                out[:, :, at], lse[:, :, at] = new, new_lse
                continue
            if pairs.mask is not None:  # a query that sees no key here
                new_lse = new_lse.masked_fill(pairs.mask.isneginf().all(-1), -torch.inf)
            both = torch.logaddexp(lse[:, :, at], new_lse)
            kept, added = (lse[:, :, at] - both).exp_(), (new_lse - both).exp_()
            out[:, :, at].mul_(kept[..., None]).addcmul_(new.to(sums), added[..., None].expand_as(new))
            lse[:, :, at] = both
        final = result[None].to(q.dtype)
        ctx.save_for_backward(q, k, v, final, lse)
        ctx.rest = (layout, window, scale, kernel)
        return final

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, final, lse = ctx.saved_tensors
        layout, window, scale, kernel = ctx.rest
        heads, count = lse.shape[:2]
        sums = wide(q.dtype)
        queries, keys, values = _by_key_head(q, k, v)
        out, pulled = (t[0].transpose(0, 1).unflatten(0, (heads, count)) for t in (final, grad))
        dq, dk, dv = (torch.empty(t.shape, dtype=sums, device=t.device) for t in (queries, k[0], v[0]))
        for tile in layout.tiles(window):
            at, of = slice(tile.q, tile.q_stop), slice(tile.k, tile.k_stop)
            parts = kernel.backward(
                pulled[:, :, at],
                queries[:, :, at],
                keys[:, :, of],
                values[:, :, of],
                out[:, :, at],
                lse[:, :, at],
                layout.pairs(tile, window, q.dtype, scale),
            )
            for into, where, part in ((dq, at, parts[0]), (dk, of, _summed(parts[1])), (dv, of, _summed(parts[2]))):
                place = into[..., where, :]
                if tile.first:
                    place.copy_(part)
                else:
                    place.add_(part)
        return dq.flatten(0, 1)[None].to(q.dtype), dk[None].to(k.dtype), dv[None].to(v.dtype), None, None, None, None


def _by_key_head(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Views of shape (key heads, queries a key head, tokens, size); keys and values are repeated without a copy."""
    heads, count = k.size(1), q.size(1) // k.size(1)
    repeated = (t[0].unsqueeze(1).expand(heads, count, *t.shape[2:]) for t in (k, v))
    return q[0].unflatten(0, (heads, count)), *repeated


def _summed(part: Tensor) -> Tensor:
    """Over the queries of a key head."""
    return part[:, 0] if part.size(1) == 1 else part.sum(1)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: Layout,
    window: int | None = None,
    scale: float | None = None,
    kernel: Kernel | None = None,
) -> Tensor:
    """Attention of a packed tree: q (1, heads, tokens, size), k and v (1, key heads, tokens, size), all with positions
    along paths. Returns (1, tokens, heads, size).
    """
    scale = q.size(-1) ** -0.5 if scale is None else scale
    window = layout.window(window)
    if layout.backend == "dense":
        length = q.size(2)
        seen = visible(layout.tree, Tile(0, length, 0, length), window)
        return torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=seen[None, None], scale=scale, enable_gqa=q.size(1) != k.size(1)
        ).transpose(1, 2)
    if layout.backend == "flex":
        return flex.attend(q, k, v, layout.blocks(window), scale)
    made: Tensor = _TreeAttention.apply(  # type: ignore[no-untyped-call]
        q, k, v, layout, window, scale, kernel or kernel_for(q.device)
    )
    return made
