"""Admit work only while it can still be trained on: sampling runs ahead of training, but never in vain.

Batch b is trained by the policy that b - 1 updates made, version b - 1 where each batch is one version. What is sampled
for it by version v is then b - 1 - v versions old. So a batch may begin as soon as the version that samples it is at
most `max_staleness` behind the one that it will be trained by, and what has begun never grows older than that: nothing
is discarded (pace, don't discard).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Pace:
    """How far sampling may run ahead. `max_staleness` 0: batch after batch, in turns with training."""

    max_staleness: int

    def __post_init__(self) -> None:
        if self.max_staleness < 0:
            raise ValueError(f"max_staleness must not be negative, but is {self.max_staleness}")

    def admits(self, batch: int, version: int) -> bool:
        """Whether the work of `batch` (counted from 1) may begin with `version` now."""
        return self.staleness(batch, version) <= self.max_staleness

    @staticmethod
    def staleness(batch: int, version: int) -> int:
        """How many updates lie between the version that samples and the policy that `batch` is trained by."""
        return batch - 1 - version
