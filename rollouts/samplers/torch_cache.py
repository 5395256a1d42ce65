"""Keys and values of the embedded sampler.

Two stores of rows: a *prefix* row holds a prompt that a whole group shares, a *lane* holds what one episode has seen
since. How many of a row's tokens exist is known to those who use it; what stands behind them is never read.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .torch_model import Shape

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Saved:
    """A copy of one row's first tokens: k and v, (layers, kv_heads, length, head_dim) each."""

    k: Tensor
    v: Tensor

    @property
    def length(self) -> int:
        """Tokens held."""
        return int(self.k.shape[2])


class Rows:
    """One store: `k` and `v`, (layers, rows * kv_heads, capacity, head_dim) each.

    The capacity grows when a row needs it, and stays.
    """

    def __init__(self, shape: Shape, rows: int, device: torch.device, dtype: torch.dtype) -> None:
        self.kv_heads = shape.kv_heads
        self._size = (shape.layers, rows * shape.kv_heads, shape.head_dim)
        self._kind = (device, dtype)
        self._allocate(_capacity(1))

    def _allocate(self, capacity: int) -> None:
        layers, rows, width = self._size
        self.capacity = capacity
        self.k, self.v = (_zeros((layers, rows, capacity, width), *self._kind) for _ in range(2))

    def by_row(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer, (rows, kv_heads, capacity, head_dim) each."""
        k, v = (store[layer].unflatten(0, (-1, self.kv_heads)) for store in (self.k, self.v))
        return k, v

    def addresses(self, rows: Ints, positions: Ints) -> Ints:
        """Where tokens are stored: (tokens * kv_heads,) indices for `write`."""
        heads = np.arange(self.kv_heads)
        return ((rows[:, None] * self.kv_heads + heads) * self.capacity + positions[:, None]).reshape(-1)

    def write(self, layer: int, addresses: Tensor, k: Tensor, v: Tensor) -> None:
        """Store keys and values, (tokens * kv_heads, head_dim) each."""
        for store, given in ((self.k, k), (self.v, v)):
            store[layer].flatten(0, 1).index_copy_(0, addresses, given.to(store.dtype))

    def grow(self, length: int) -> None:
        """Make room for rows of `length` tokens."""
        if length > self.capacity:
            k, v, old = self.k, self.v, self.capacity
            self._allocate(_capacity(length))
            self.k[:, :, :old] = k
            self.v[:, :, :old] = v

    def save(self, row: int, length: int) -> Saved:
        """A copy of the first `length` tokens of `row`."""
        k, v = self._row(row)
        return Saved(k[:, :, :length].clone(), v[:, :, :length].clone())

    def load(self, row: int, saved: Saved, length: int) -> None:
        """Make `row` hold the first `length` tokens of `saved`."""
        self.grow(length)
        k, v = self._row(row)
        k[:, :, :length] = saved.k[:, :, :length]
        v[:, :, :length] = saved.v[:, :, :length]

    def _row(self, row: int) -> tuple[Tensor, Tensor]:
        rows = slice(row * self.kv_heads, (row + 1) * self.kv_heads)
        return self.k[:, rows], self.v[:, rows]


@dataclass(frozen=True, slots=True)
class Cache:
    """Both stores of one engine."""

    shape: Shape
    prefixes: Rows
    lanes: Rows


def _capacity(length: int) -> int:
    """Tokens to make room for: small steps, because rows far apart in memory are slow to read."""
    return max(64, 1 << (length - 1).bit_length()) if length <= 1024 else -(-length * 5 // 4 // 256) * 256


def _zeros(size: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    if device.type == "cpu" and dtype == torch.float32:
        # numpy asks the system for zero pages that cost nothing until touched; torch.zeros would write them all.
        return torch.from_numpy(np.zeros(size, np.float32))
    return torch.zeros(size, device=device, dtype=dtype)
