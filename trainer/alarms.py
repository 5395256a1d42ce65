"""Signs that a run is going wrong, said aloud. Pure: a row of numbers in, sentences out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..configs.schema import AlarmSection


@dataclass(frozen=True, slots=True)
class Alarm:
    """One bound that was crossed."""

    alarm: str
    value: float
    bound: float
    message: str
    stops: bool


def check(
    row: Mapping[str, Any], section: AlarmSection, first_length: float | None, replayed: bool = False
) -> list[Alarm]:
    """What is wrong with a "train" row. `first_length`: mean sampled tokens an episode of the first step. `replayed`:
    another run's policy sampled, so that its log-probabilities are another's.
    """
    found = []

    def say(name: str, value: float, bound: float, what: str) -> None:
        message = f"step {row.get('step')}: {what} ({value:.4g}, bound {bound:.4g})"
        found.append(Alarm(name, value, bound, message, section.stop or name == "logprob_gap"))

    entropy, kl, length = row.get("entropy"), row.get("kl"), row.get("sampled_tokens_mean")
    invalid = row.get("invalid_call_share")
    if entropy is not None and row.get("trained_tokens") and entropy < section.min_entropy:
        say("entropy", entropy, section.min_entropy, "entropy has collapsed; the policy hardly explores any more")
    if kl is not None and kl > section.max_kl:
        say("kl", kl, section.max_kl, "the policy has moved far from the one that sampled")
    if length is not None and first_length and length > first_length * section.max_length_ratio:
        say(
            "length",
            length / first_length,
            section.max_length_ratio,
            "episodes have grown far longer than at the start",
        )
    if invalid is not None and invalid > section.max_invalid_calls:
        say("invalid_calls", invalid, section.max_invalid_calls, "most calls are answered by an error")
    mismatches = (row.get("graph") or {}).get("mismatches", 0)
    if mismatches:
        say("graph", mismatches, 0, "operations gave something else when they were done again; see the row's notes")
    gap = row.get("logprob_gap_mean")
    if gap is not None and gap > section.max_logprob_gap and not replayed:
        say("logprob_gap", gap, section.max_logprob_gap, "sampler and trainer no longer compute the same policy")
    return found
