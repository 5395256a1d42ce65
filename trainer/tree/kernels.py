"""Attention of one tile (`tiles.py`): some queries against some keys, forward and backward, with the logarithm of the
softmax's denominator, by which results over different keys are put together.

Shapes: q, out, grad (key heads, queries a key head, queries, size); k, v (key heads, queries a key head, keys, size),
lse (key heads, queries a key head, queries).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

SCORES_AT_ONCE = 1 << 25
"""Most scores that the plain kernel holds at a time."""


@dataclass(frozen=True, slots=True, eq=False)
class Pairs:
    """Which pairs of a query and a key count, and by what their product is multiplied. `mask` is added to the scores:
    (queries, keys), 0 or -inf.
    """

    causal: bool
    mask: Tensor | None
    scale: float


class Kernel(Protocol):
    """Computes one tile."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, pairs: Pairs) -> tuple[Tensor, Tensor]:
        """Result and logarithm of the denominator."""

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, pairs: Pairs
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of q, k and v (those of k and v by query head); `out` and `lse` are over all keys of a query."""


class Fused:
    """torch's own flash attention for CPUs, the kernel behind `scaled_dot_product_attention` there."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, pairs: Pairs) -> tuple[Tensor, Tensor]:
        """See `Kernel`."""
        added = None if pairs.mask is None else pairs.mask[None, None]
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, pairs.causal, attn_mask=added, scale=pairs.scale
        )
        return out, lse

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, pairs: Pairs
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `Kernel`."""
        added = None if pairs.mask is None else pairs.mask[None, None]
        dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, out, lse, 0.0, pairs.causal, attn_mask=added, scale=pairs.scale
        )
        return dq, dk, dv


class Plain:
    """Matrix products and a softmax, on any device; a part of the queries at a time."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, pairs: Pairs) -> tuple[Tensor, Tensor]:
        """See `Kernel`."""
        outs, lses = [], []
        for part in _parts(q, k):
            scores = _scores(q, k, pairs, part)
            lse = scores.logsumexp(-1)
            weights = (scores - lse.nan_to_num(neginf=0.0)[..., None]).exp()
            outs.append((weights.to(v.dtype) @ v).to(q.dtype))
            lses.append(lse)
        return torch.cat(outs, 2), torch.cat(lses, 2)

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, pairs: Pairs
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `Kernel`."""
        dq = torch.empty_like(q)
        shape = (*q.shape[:2], k.size(2))
        dk, dv = (lse.new_zeros(*shape, size) for size in (q.size(3), v.size(3)))
        for part in _parts(q, k):
            weights = (_scores(q, k, pairs, part) - lse[:, :, part, None]).exp()
            g = grad[:, :, part]
            delta = (g * out[:, :, part]).sum(-1, keepdim=True, dtype=lse.dtype)
            pulled = (g @ v.transpose(-1, -2)).to(lse.dtype)
            ds = (weights * (pulled - delta) * pairs.scale).to(q.dtype)
            dq[:, :, part] = ds @ k
            dk += ds.transpose(-1, -2) @ q[:, :, part]
            dv += weights.to(g.dtype).transpose(-1, -2) @ g
        return dq, dk, dv


def _parts(q: Tensor, k: Tensor) -> list[slice]:
    step = max(1, SCORES_AT_ONCE // (q.size(0) * q.size(1) * k.size(2)))
    return [slice(i, i + step) for i in range(0, q.size(2), step)]


def _scores(q: Tensor, k: Tensor, pairs: Pairs, part: slice) -> Tensor:
    scores = (q[:, :, part] @ k.transpose(-1, -2)).to(wide(q.dtype)) * pairs.scale
    if pairs.causal:
        keys = torch.arange(k.size(2), device=q.device)
        scores = scores.masked_fill(keys > keys[part, None], -torch.inf)  # as many queries as keys
    return scores if pairs.mask is None else scores + pairs.mask[part]


def kernel_for(device: torch.device) -> Kernel:
    """The fastest kernel of a device."""
    return Fused() if device.type == "cpu" else Plain()


def wide(dtype: torch.dtype) -> torch.dtype:
    """What sums of this dtype are kept in."""
    return torch.float64 if dtype == torch.float64 else torch.float32
