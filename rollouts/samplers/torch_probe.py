"""Whether this machine's BLAS computes a row the same way whatever the number of rows: what batch invariance rests on.

No standard promises it. It holds for MKL's float32 products from four rows on (measured), and is checked here for the
very shapes that a model uses, on the threads that will use them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .torch_model import Shape

_ROWS = (8, 24, 64)
_MOST = 128
_WIDEST = 8192  # columns of a vocabulary that are tried


def rows_agree(shape: Shape, rows: tuple[int, ...] = _ROWS) -> bool:
    """True when each of these numbers of rows gives the same bits as many rows, for all matrix shapes of `shape`."""
    d, q_width = shape.head_dim, shape.heads * shape.head_dim
    sizes = [
        (shape.hidden, q_width + shape.kv_heads * 2 * d),
        (q_width, shape.hidden),
        (shape.hidden, 2 * shape.intermediate),
        (shape.intermediate, shape.hidden),
        (shape.hidden, min(shape.vocab, _WIDEST)),
    ]
    random = torch.Generator().manual_seed(0)  # its own: the trainer may be drawing from the global one
    with torch.inference_mode():
        return all(_agree(*size, rows, random) for size in sizes)


def _agree(inner: int, outer: int, rows: tuple[int, ...], random: torch.Generator) -> bool:
    a, b = torch.randn(_MOST, inner, generator=random), torch.randn(outer, inner, generator=random)
    x, b_t = torch.randn(_MOST, outer, generator=random), b.t().contiguous()
    whole, added = F.linear(a, b), torch.addmm(x, a, b_t)
    return all(
        torch.equal(F.linear(a[:n], b), whole[:n]) and torch.equal(torch.addmm(x[:n], a[:n], b_t), added[:n])
        for n in rows
    )
