"""What a step's work comes to, and what the machine can do at most: the two sides of a share.

Work is counted from the model's sizes, limits are measured by plain torch on the same device.

* A forward pass costs 2 operations a weight of the linear layers and token (Kaplan et al. 2020, arXiv 2001.08361,
  section 2.1); a backward pass 2 more through the frozen base, which gets no gradient, and 4 more for the adapter.
* Attention costs 4 operations forward and 8 backward for each head dimension and pair of tokens (Chowdhery et al. 2022,
  arXiv 2204.02311, appendix B). What is computed again in backward is no work of the model's, as there.
* The vocabulary is projected at sampled positions only: 2 operations forward and 2 backward a weight.
* Decoding reads the matrices once for each step in which every episode gets a token, and each episode's own keys and
  values.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

import torch
from espalier.trainer.shapes import Shape

WIDTH = {"float32": 4, "bfloat16": 2}
"""Bytes of a number."""


def train_operations(shape: Shape, adapter: int, tokens: float, pairs: float, targets: float, forwards: int) -> float:
    """Operations of an update over `tokens` with `pairs` of them attended to, of which `targets` are predicted:
    `forwards` passes, one of which is followed by its backward pass. `adapter`: its parameters.
    """
    weights, vocabulary = shape.linear_parameters(), shape.hidden_size * shape.vocab_size
    attention = shape.num_hidden_layers * shape.num_attention_heads * shape.head_dim
    forward = 2 * (weights + adapter) * tokens + 4 * attention * pairs + 2 * vocabulary * targets
    backward = (2 * weights + 4 * adapter) * tokens + 8 * attention * pairs + 2 * vocabulary * targets
    return forwards * forward + backward


def decode_bytes(shape: Shape, dtype: str, spans: Iterable[tuple[int, int]]) -> float:
    """Bytes read while all `spans` (start and stop of what was sampled, one an episode) are decoded side by side."""
    spans, width = list(spans), WIDTH[dtype]
    weights = width * (shape.linear_parameters() + shape.hidden_size * shape.vocab_size)
    read = sum(sum(range(start, stop)) for start, stop in spans)
    return float(max(stop - start for start, stop in spans) * weights + read * shape.kv_bytes_per_token(width))


def matmul_operations(dtype: str, device: str, threads: int) -> float:
    """Operations a second of a large matrix product, the best of some."""
    size = 8192 if device == "cuda" else 2048
    torch.set_num_threads(threads)
    a, b = (torch.randn(size, size, device=device, dtype=getattr(torch, dtype)) for _ in range(2))
    return 2.0 * size**3 / _shortest(lambda: a @ b, device)


def copy_bytes(device: str, threads: int) -> float:
    """Bytes read and written a second by a large copy, the best of some."""
    torch.set_num_threads(threads)
    source = torch.ones(2**30 if device == "cuda" else 2**28, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    return 2.0 * source.numel() / _shortest(lambda: target.copy_(source), device)


def measured(dtype: str, device: str, threads: tuple[int, int]) -> tuple[float, float]:
    """Operations and bytes a second; `threads` for either."""
    return matmul_operations(dtype, device, threads[0]), copy_bytes(device, threads[1])


def _shortest(work: Callable[[], object], device: str, times: int = 20) -> float:
    def once() -> float:
        began = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    once()
    return min(once() for _ in range(times))
