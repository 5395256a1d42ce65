"""What is counted while a batch is trained on: token sums on the device, read once at the end."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

_NOT_OURS = {"epoch", "step_time", "total_flos", "entropy", "entropy_coef", "policy_loss"}
"""Of TRL's log: meaningless here (of a micro-batch, before it is weighed), or counted better below."""


@dataclass
class Tally:
    """Sums over the updates of one batch, and what was logged about each of them."""

    sums: dict[str, torch.Tensor] = field(default_factory=dict)
    gaps: list[torch.Tensor] = field(default_factory=list)
    logs: list[Mapping[str, float]] = field(default_factory=list)
    started: float = field(default_factory=time.perf_counter)

    def add(
        self,
        logps: torch.Tensor,
        entropies: torch.Tensor,
        recorded: torch.Tensor,
        mask: torch.Tensor,
        fresh: bool = True,
    ) -> None:
        """Fold in one micro-batch; tensors are (rows, width), nats. `fresh`: before the first update of the batch, when
        policy and behaviour are the same but for what sampler and trainer compute differently.

        kl is the k3 estimate (joschu.net/blog/kl-approx.html) of KL(behaviour || policy): r - 1 - log r, r the ratio
        of policy to behaviour at tokens that the behaviour sampled.
        """
        difference = (logps.detach().float() - recorded) * mask
        new = {
            "tokens": mask.sum().double(),
            "entropy": (entropies.detach().double() * mask).sum(),
            "kl": ((torch.expm1(difference) - difference) * mask).sum().double(),
        }
        self.sums |= {name: value + self.sums.get(name, 0.0) for name, value in new.items()}
        if fresh:
            self.gaps.append(difference[mask.bool()].abs())

    def count(self, **numbers: int) -> None:
        """Add to sums that are read as they are."""
        for name, number in numbers.items():
            self.sums[name] = torch.tensor(float(number), dtype=torch.float64) + self.sums.get(name, 0.0)

    def on_cpu(self) -> Tally:
        """As it can be sent to another process."""
        sums = {name: value.cpu() for name, value in self.sums.items()}
        return replace(self, sums=sums, gaps=[gap.cpu() for gap in self.gaps])

    def add_all(self, tallies: Sequence[Tally]) -> None:
        """Become the sum of `tallies`, which were taken of other rows of the same batch."""
        names = sorted({name for tally in tallies for name in tally.sums})
        self.sums = {name: torch.stack([t.sums[name] for t in tallies if name in t.sums]).sum() for name in names}
        self.gaps = [gap for tally in tallies for gap in tally.gaps]

    def read(self) -> dict[str, float]:
        """Means a token, |policy - recorded| at fresh tokens, seconds since the start, and means of what TRL logged."""
        tokens = float(self.sums.get("tokens", 0.0))
        values = {
            "entropy": float(self.sums.get("entropy", 0.0)) / max(tokens, 1.0),
            "kl": float(self.sums.get("kl", 0.0)) / max(tokens, 1.0),
            **self.gap(),
            "trained_tokens": int(tokens),
            **{name: int(value) for name, value in sorted(self.sums.items()) if name.startswith("tokens_")},
        }
        for name in sorted({name for logs in self.logs for name in logs} - _NOT_OURS):
            seen = [logs[name] for logs in self.logs if isinstance(logs.get(name), int | float)]
            if seen:
                values["kl_reference" if name == "kl" else name] = sum(seen) / len(seen)
        values["seconds_train"] = time.perf_counter() - self.started
        return values

    def gap(self) -> dict[str, float]:
        """The distribution of |policy - recorded|: largest, mean, and the value that one token in a hundred exceeds."""
        seen = torch.cat(self.gaps) if self.gaps else torch.zeros(0)
        if not seen.numel():
            return {"logprob_gap": 0.0, "logprob_gap_mean": 0.0, "logprob_gap_p99": 0.0}
        rank = max(1, round(0.99 * seen.numel()))
        return {
            "logprob_gap": float(seen.max()),
            "logprob_gap_mean": float(seen.mean()),
            "logprob_gap_p99": float(seen.kthvalue(rank).values),
        }
