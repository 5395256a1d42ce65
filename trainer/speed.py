"""What a card can do at most, said before a run begins: tokens sampled and trained a second.

Limits by arithmetic, not measurements. Decoding reads all weights, and every episode's keys and values, once for each
step in which each episode gets a token. A forward pass costs 2 operations a weight and token (Kaplan et al. 2020, arXiv
2001.08361, section 2.1), the backward pass through a frozen base 2 more (no gradient of the weights), and computing
activations again 2 more.
"""

from __future__ import annotations

from dataclasses import dataclass

UTILISATION = 0.4
"""Share of a card's operations that training reaches where it goes well."""


@dataclass(frozen=True, slots=True)
class Card:
    """Data-sheet values: bytes a second of memory, dense bfloat16 operations a second."""

    name: str
    bandwidth: float
    operations: float


CARDS = (
    Card("B200", 8.0e12, 2250e12),
    Card("H200", 4.8e12, 989e12),
    Card("H100 PCIe", 2.0e12, 756e12),
    Card("H100 NVL", 3.9e12, 835e12),
    Card("H100", 3.35e12, 989e12),
    Card("A100-SXM4-40GB", 1.555e12, 312e12),
    Card("A100-PCIE-40GB", 1.555e12, 312e12),
    Card("A100", 2.039e12, 312e12),
    Card("L40S", 0.864e12, 362e12),
    Card("L4", 0.3e12, 121e12),
    Card("A10", 0.6e12, 125e12),
    Card("RTX 4090", 1.008e12, 165e12),
    Card("RTX 3090", 0.936e12, 71e12),
)
"""The first whose name is part of a device's name is that device."""


def find_card(device: str) -> Card | None:
    """The card behind a device's name, None for one that is not listed."""
    words = f" {device} "
    return next((card for card in CARDS if f" {card.name} " in words or f" {card.name}-" in words), None)


def sampled_limit(card: Card, weights: float, cached: float, episodes: int) -> float:
    """Tokens a second that `episodes` decoded together can get: `weights` bytes, and `cached` bytes of each episode's
    keys and values, are read for one token of each.
    """
    return episodes * card.bandwidth / (weights + episodes * cached)


def trained_limit(card: Card, parameters: int, recomputed: bool) -> float:
    """Tokens a second that training a LoRA adapter of a frozen base of `parameters` weights gets at `UTILISATION`."""
    return UTILISATION * card.operations / ((6 if recomputed else 4) * parameters)
