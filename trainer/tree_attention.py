"""Attention over a `TokenTree`, handed to models through transformers' registry of attention functions.

Each tile (`tree_tiles.py`) is one call of a kernel that returns its result with the logarithm of the softmax's
denominator, by which results over different keys are put together; backward calls the same tiles with the final
denominator (the arithmetic of FlashAttention, arXiv 2205.14135, and of ring attention, arXiv 2310.01889, across the
levels of a tree). Always true: keys and values are neither gathered nor repeated for heads; saved for backward are the
inputs, the result and the denominators, nothing a segment; without a tree the function is transformers' sdpa.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from .tree import TokenTree
from .tree_tiles import Tile, tiles, visible, windowed

NAME = "espalier_tree"
"""Its name in the registry."""

CALL_OPERATIONS = {"cpu": 2e6}
"""Floating-point operations in the time that a call costs beside its work, by kind of device."""

SCORES_AT_ONCE = 1 << 25
"""Most scores that the plain kernel holds at a time."""

Backend = Literal["tiles", "dense"]


class Unsuitable(RuntimeError):
    """A model asks for attention that the tree does not have; the message names it."""


@dataclass(eq=False)
class Layout:
    """A tree as the attention of one model sees it; made once for a micro-batch, used by every layer and pass.

    `work`: operations a pair of query and key takes in one layer's forward pass (4 x heads x head size).
    """

    tree: TokenTree
    work: int
    backend: Backend = "tiles"
    _tiles: dict[int | None, tuple[Tile, ...]] = field(default_factory=dict)
    _masks: dict[tuple[Tile, torch.dtype], torch.Tensor] = field(default_factory=dict)
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

    def window(self, asked: int | None) -> int | None:
        """A layer's sliding window, None where no path is longer."""
        return None if asked is None or asked >= self._depth else asked

    def mask(self, tile: Tile, window: int | None, dtype: torch.dtype) -> torch.Tensor | None:
        """What is added to the scores of a tile: (queries, keys), 0 or -inf. Kept where every layer needs it."""
        if not tile.masked:
            return None
        kept = self._masks.get((tile, dtype)) if window is None else None
        if kept is not None:
            return kept
        seen = visible(self.tree, tile, window)
        made = torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, -torch.inf)
        if window is None:
            self._masks[tile, dtype] = made
        return made


# ---- kernels: one tile; tensors are (key heads, queries a key head, tokens, head size), lse without the last


class Kernel(Protocol):
    """Computes one tile, forward and backward; in backward `out` and `lse` are those over all keys of a query."""

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, mask: torch.Tensor | None, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Result and logarithm of the denominator."""

    def backward(
        self,
        grad: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        causal: bool,
        mask: torch.Tensor | None,
        scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Gradients of q, k and v (those of k and v by query head)."""


class Fused:
    """torch's own flash attention for CPUs, the kernel behind `scaled_dot_product_attention` there."""

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, mask: torch.Tensor | None, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Kernel`."""
        added = None if mask is None else mask[None, None]
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, causal, attn_mask=added, scale=scale
        )
        return out, lse

    def backward(
        self,
        grad: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        causal: bool,
        mask: torch.Tensor | None,
        scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """See `Kernel`."""
        added = None if mask is None else mask[None, None]
        dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, out, lse, 0.0, causal, attn_mask=added, scale=scale
        )
        return dq, dk, dv


class Plain:
    """Matrix products and a softmax, on any device; a part of the queries at a time."""

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, mask: torch.Tensor | None, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Kernel`."""
        outs, lses = [], []
        for part in self._parts(q, k):
            scores = self._scores(q, k, causal, mask, scale, part)
            lse = scores.logsumexp(-1)
            weights = (scores - lse.nan_to_num(neginf=0.0)[..., None]).exp()
            outs.append((weights.to(v.dtype) @ v).to(q.dtype))
            lses.append(lse)
        return torch.cat(outs, 2), torch.cat(lses, 2)

    def backward(
        self,
        grad: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        causal: bool,
        mask: torch.Tensor | None,
        scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """See `Kernel`."""
        dq = torch.empty_like(q)
        shape = (*q.shape[:2], k.size(2))
        dk, dv = q.new_zeros(*shape, q.size(3)), q.new_zeros(*shape, v.size(3))
        for part in self._parts(q, k):
            weights = (self._scores(q, k, causal, mask, scale, part) - lse[:, :, part, None]).exp()
            g = grad[:, :, part]
            delta = (g * out[:, :, part]).sum(-1, keepdim=True, dtype=lse.dtype)
            pulled = (g @ v.transpose(-1, -2)).to(lse.dtype)
            ds = (weights * (pulled - delta) * scale).to(q.dtype)
            dq[:, :, part] = ds @ k
            dk += ds.transpose(-1, -2) @ q[:, :, part]
            dv += weights.to(g.dtype).transpose(-1, -2) @ g
        return dq, dk, dv

    def _parts(self, q: torch.Tensor, k: torch.Tensor) -> list[slice]:
        step = max(1, SCORES_AT_ONCE // (q.size(0) * q.size(1) * k.size(2)))
        return [slice(i, i + step) for i in range(0, q.size(2), step)]

    def _scores(
        self, q: torch.Tensor, k: torch.Tensor, causal: bool, mask: torch.Tensor | None, scale: float, part: slice
    ) -> torch.Tensor:
        scores = (q[:, :, part] @ k.transpose(-1, -2)).to(_wide(q.dtype)) * scale
        if causal:
            shape = (q.size(2), k.size(2))
            above = torch.ones(shape, dtype=torch.bool, device=q.device).triu(1)[part]
            scores = scores.masked_fill(above, -torch.inf)
        return scores if mask is None else scores + mask[part]


def kernel_for(device: torch.device) -> Kernel:
    """The fastest kernel of a device."""
    return Fused() if device.type == "cpu" else Plain()


def _wide(dtype: torch.dtype) -> torch.dtype:
    """What sums of this dtype are kept in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# ---- all tiles


class _TreeAttention(torch.autograd.Function):
    """q: (1, heads, tokens, size); k, v: (1, key heads, tokens, size). Returns (1, tokens, heads, size)."""

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layout: Layout,
        window: int | None,
        scale: float,
        kernel: Kernel,
    ) -> torch.Tensor:
        heads, count, length = k.size(1), q.size(1) // k.size(1), q.size(2)
        wide = _wide(q.dtype)
        queries, keys, values = _by_key_head(q, k, v)
        result = q.new_empty(length, heads * count, v.size(3), dtype=wide)
        out = result.transpose(0, 1).unflatten(0, (heads, count))
        lse = q.new_empty(heads, count, length, dtype=wide)
        for tile in layout.tiles(window):
            at, of = slice(tile.q, tile.q_stop), slice(tile.k, tile.k_stop)
            mask = layout.mask(tile, window, q.dtype)
            new, new_lse = kernel.forward(queries[:, :, at], keys[:, :, of], values[:, :, of], tile.causal, mask, scale)
            if tile.first:
                out[:, :, at], lse[:, :, at] = new, new_lse
                continue
            if mask is not None:  # a query that sees no key here
                new_lse = new_lse.masked_fill(mask.isneginf().all(-1), -torch.inf)
            both = torch.logaddexp(lse[:, :, at], new_lse)
            kept, added = (lse[:, :, at] - both).exp_(), (new_lse - both).exp_()
            out[:, :, at].mul_(kept[..., None]).addcmul_(new.to(wide), added[..., None].expand_as(new))
            lse[:, :, at] = both
        final = result[None].to(q.dtype)
        ctx.save_for_backward(q, k, v, final, lse)
        ctx.rest = (layout, window, scale, kernel)
        return final

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, final, lse = ctx.saved_tensors
        layout, window, scale, kernel = ctx.rest
        heads, count = lse.shape[:2]
        wide = _wide(q.dtype)
        queries, keys, values = _by_key_head(q, k, v)
        out, pulled = (t[0].transpose(0, 1).unflatten(0, (heads, count)) for t in (final, grad))
        dq, dk, dv = (torch.empty(t.shape, dtype=wide, device=t.device) for t in (queries, k[0], v[0]))
        for tile in layout.tiles(window):
            at, of = slice(tile.q, tile.q_stop), slice(tile.k, tile.k_stop)
            parts = kernel.backward(
                pulled[:, :, at],
                queries[:, :, at],
                keys[:, :, of],
                values[:, :, of],
                out[:, :, at],
                lse[:, :, at],
                tile.causal,
                layout.mask(tile, window, q.dtype),
                scale,
            )
            for into, where, part in ((dq, at, parts[0]), (dk, of, _summed(parts[1])), (dv, of, _summed(parts[2]))):
                place = into[..., where, :]
                if tile.first:
                    place.copy_(part)
                else:
                    place.add_(part)
        return dq.flatten(0, 1)[None].to(q.dtype), dk[None].to(k.dtype), dv[None].to(v.dtype), None, None, None, None


def _by_key_head(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Views of shape (key heads, queries a key head, tokens, size); keys and values are repeated without a copy."""
    heads, count = k.size(1), q.size(1) // k.size(1)
    repeated = (t[0].unsqueeze(1).expand(heads, count, *t.shape[2:]) for t in (k, v))
    return q[0].unflatten(0, (heads, count)), *repeated


def _summed(part: torch.Tensor) -> torch.Tensor:
    """Over the queries of a key head."""
    return part[:, 0] if part.size(1) == 1 else part.sum(1)


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: Layout,
    window: int | None = None,
    scale: float | None = None,
    kernel: Kernel | None = None,
) -> torch.Tensor:
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
    made: torch.Tensor = _TreeAttention.apply(  # type: ignore[no-untyped-call]
        q, k, v, layout, window, scale, kernel or kernel_for(q.device)
    )
    return made


# ---- transformers


def no_mask(device: torch.device) -> torch.Tensor:
    """What to pass as `attention_mask` with a tree. Models take a mask of four dimensions as it is; with none they
    would read the jumps of `position_ids` as the ends of packed sequences.
    """
    return torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=device)


def enable(model: PreTrainedModel) -> None:
    """Let `model`, which attends by sdpa, take a `tree` (a `Layout`) with a forward pass."""
    AttentionInterface.register(NAME, _registered)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)


def disable(model: PreTrainedModel) -> None:
    """Undo `enable`."""
    model.set_attn_implementation("sdpa")


def _registered(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    tree: Layout | None = None,
    **others: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """As transformers calls attention functions. Raises Unsuitable for what a tree has not."""
    if tree is None:
        if attention_mask is not None and attention_mask.numel() == 1 < query.size(2):
            raise Unsuitable("the model does not hand the tree down to its attention")
        result: Callable[..., tuple[torch.Tensor, torch.Tensor | None]] = sdpa_attention_forward
        return result(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **others)
    asked = {name for name in ("softcap", "s_aux", "position_bias") if others.get(name) is not None}
    if dropout:
        asked.add("dropout")
    if others.get("is_causal", getattr(module, "is_causal", True)) is False:
        asked.add("attention to what follows")
    if asked:
        raise Unsuitable(f"its attention has {', '.join(sorted(asked))}")
    return attend(query, key, value, tree, sliding_window, scaling), None
