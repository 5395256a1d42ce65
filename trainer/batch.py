"""Rows: what the optimizer eats, made from trajectories.

Always true: a row is one token sequence of one trajectory, cut behind its last trained token; every sampled token but
those of a masked span (`TokenSpan.trained`) stands under the loss in exactly one row, with the log-probability recorded
when it was sampled.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch

from ..rollouts.samplers.base import Sample
from ..rollouts.types import Group, Trajectory
from .advantage import Baseline, Scale, advantages
from .tree_advantage import Compared, branches_of, leaf_advantages, turn_advantages

TOKEN_MEAN = frozenset({"grpo", "sapo"})
"""Losses that take the mean over a row's tokens first, so that each fork would count as much as a whole trajectory."""


@dataclass(frozen=True, slots=True)
class Row:
    """One sequence to train on. `mask` (what is under the loss) and `logprobs` (nats, 0 elsewhere) run over
    `tokens`. `share`: its part of its trajectory's trained tokens; 1 unless the trajectory forked, and the shares of a
    trajectory's rows add up to 1. `advantages`: one a token where turns are credited apart (trees), 0 where nothing is
    under the loss; empty: `advantage` everywhere.
    """

    tokens: tuple[int, ...]
    mask: tuple[bool, ...]
    logprobs: tuple[float, ...]
    advantage: float
    trajectory: str
    group: str
    share: float = 1.0
    advantages: tuple[float, ...] = ()

    @property
    def trained(self) -> int:
        """How many tokens of it are under the loss."""
        return sum(self.mask)

    def by_share(self) -> Row:
        """The row with its share in its advantages: for losses that are linear in these and count each row as one."""
        weighed = tuple(value * self.share for value in self.advantages)
        return replace(self, advantage=self.advantage * self.share, advantages=weighed)


@dataclass(frozen=True, slots=True)
class Batch:
    """What one step trains on. `consumed` are the ids of every trajectory that the step has used up, `stats` is for the
    metrics row.
    """

    step: int
    rows: tuple[Row, ...]
    consumed: tuple[str, ...] = ()
    stats: Mapping[str, Any] = field(default_factory=dict)


class BatchSource(Protocol):
    """Where batches come from: a synchronous round of sampling, a replay, a queue that others fill."""

    def next(self, step: int) -> Batch | None:
        """The batch of `step` (counted from 1), waiting for it at most as long as the source's own deadline. None:
        there are no more.
        """


def rows_of(trajectory: Trajectory, advantage: float, turns: Sequence[float] = ()) -> list[Row]:
    """One row a sequence that has tokens to train; forks of a trajectory have its advantage, and share its weight.

    `turns`: advantages of its own turns, where these differ.
    """
    rows: list[Row] = []
    credited = _credited(trajectory, turns) if turns else [()] * len(trajectory.sequences)
    for sequence, values in zip(trajectory.sequences, credited, strict=True):
        mask = sequence.trained_mask()
        if not any(mask):
            continue
        if mask[0]:
            raise ValueError(
                f"trajectory {trajectory.id} begins with a sampled token; a prompt of one token must precede it"
            )
        stop = len(mask) - mask[::-1].index(True)
        recorded = iter(sequence.logprobs)
        every = [next(recorded) if sampled else 0.0 for sampled in sequence.sampled_mask()]
        logprobs = tuple(value if trained else 0.0 for value, trained in zip(every, mask[:stop], strict=False))
        rows.append(
            Row(
                sequence.tokens[:stop],
                tuple(mask[:stop]),
                logprobs,
                advantage,
                trajectory.id,
                trajectory.group,
                advantages=values[:stop],
            )
        )
    whole = sum(row.trained for row in rows)
    return [replace(row, share=row.trained / whole) for row in rows] if len(rows) > 1 else rows


def sampled_row(prompt: Sequence[int], sample: Sample) -> Row:
    """One sample behind its prompt, of no trajectory."""
    lead = len(prompt)
    mask = (False,) * lead + (True,) * len(sample.tokens)
    return Row((*prompt, *sample.tokens), mask, (0.0,) * lead + sample.logprobs, 0.0, "", "")


def _credited(trajectory: Trajectory, turns: Sequence[float]) -> list[tuple[float, ...]]:
    """Of each sequence one number a token: that of the turn that sampled it, for own turns that are trained."""
    values = [[0.0] * len(sequence.tokens) for sequence in trajectory.sequences]
    for turn, value in zip(trajectory.turns[trajectory.left_at :], turns, strict=True):
        span = trajectory.sequences[turn.sequence].spans[turn.span]
        if span.trained:
            values[turn.sequence][span.start : span.stop] = [value] * (span.stop - span.start)
    return [tuple(of) for of in values]


def rows_of_groups(
    groups: Sequence[Group],
    scale: Scale,
    baseline: Baseline = "mean",
    compared: Compared = "tree",
    token_mean: bool = False,
) -> list[Row]:
    """The rows of all trajectories of `groups`, each with its advantage, those of a tree with one for each turn.

    `token_mean`: for a loss of `TOKEN_MEAN`, which divides by a row's tokens where a whole path's are meant.
    """
    values = advantages([group.rewards for group in groups], scale, baseline)
    places = [branches_of(group) for group in groups]
    leaves = leaf_advantages([group.rewards for group in groups], places, compared, scale, baseline)
    rows: list[Row] = []
    for group, chain, leaf, branches in zip(groups, values, leaves, places, strict=True):
        if all(branch.parent is None for branch in branches):
            rows += [row for t, value in zip(group.trajectories, chain, strict=True) for row in rows_of(t, value)]
            continue
        own = [sum(sum(s.trained_mask()) for s in t.sequences) for t in group.trajectories]
        if token_mean:
            paths = [n + t.inherited_tokens for n, t in zip(own, group.trajectories, strict=True)]
            leaf = [value / max(n, 1) for value, n in zip(leaf, paths, strict=True)]
        for t, n, turns in zip(group.trajectories, own, turn_advantages(leaf, branches), strict=True):
            rows += rows_of(t, 0.0, [value * n for value in turns] if token_mean else turns)
    return rows


def micro_batches(rows: Sequence[Row], size: int, by_group: bool = False) -> list[list[Row]]:
    """At most `size` rows each, of similar length so that little is padding; longest first, so that memory peaks at
    once. `by_group` keeps rows of different groups apart, so that those of one can share the pass over their prompt.
    """
    ordered = sorted(rows, key=lambda row: (-len(row.tokens), row.trajectory, row.tokens))
    parts: dict[str, list[Row]] = {}
    for row in ordered:
        parts.setdefault(row.group if by_group else "", []).append(row)
    return [part[i : i + size] for part in parts.values() for i in range(0, len(part), size)]


def dealt(parts: Sequence[Sequence[Row]], rank: int, count: int) -> list[list[Row]]:
    """The micro-batches among `parts` that process `rank` of `count` runs, each filled up to the rows of those that run
    beside it: TRL's losses exchange statistics by row, so that all processes need equally many. Filler is not trained.
    """
    mine: list[list[Row]] = []
    for i in range(0, len(parts), count):
        beside = parts[i : i + count]
        own = list(beside[rank]) if rank < len(beside) else []
        tokens = own[-1].tokens if own else beside[0][0].tokens[:2]
        blank = replace(
            (own or beside[0])[-1],
            tokens=tokens,
            mask=(False,) * len(tokens),
            logprobs=(0.0,) * len(tokens),
            advantages=(),
        )
        mine.append(own + [blank] * (max(map(len, beside)) - len(own)))
    return mine


def minibatches(rows: Sequence[Row], count: int, seed: int) -> list[list[Row]]:
    """`rows` dealt into at most `count` optimizer updates, whole groups in an order shuffled by `seed`, each to the
    update that has fewest rows so far: a group's rows balance each other and share their prompt.
    """
    if count == 1:
        return [list(rows)] if rows else []
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.group, []).append(row)
    generator = torch.Generator().manual_seed(seed)
    dealt = list(groups.values())
    parts: list[list[Row]] = [[] for _ in range(min(count, len(dealt)))]
    for i in torch.randperm(len(dealt), generator=generator).tolist():
        min(parts, key=len).extend(dealt[i])
    return parts


def collate(rows: Sequence[Row], pad: int, device: torch.device) -> dict[str, torch.Tensor]:
    """The tensors of one micro-batch, in the names that TRL's loss reads.

    The first token of each row is the "prompt" and all others the "completion", so that padding stands on the right
    only: causal attention then needs no mask, and a row's width is its own length. What is under the loss is said by
    `tool_mask` alone.

    Shapes: prompt_ids, prompt_mask (rows, 1); completion_ids, completion_mask, tool_mask (rows, width - 1) int64;
    sampling_per_token_logps (rows, width - 1) float32, nats; advantages (rows,) float32, with turns credited apart
    (rows, width - 1).
    """
    width = max(len(row.tokens) for row in rows)
    tokens = torch.full((len(rows), width), pad, dtype=torch.long)
    real = torch.zeros((len(rows), width), dtype=torch.long)
    sampled = torch.zeros((len(rows), width), dtype=torch.long)
    logprobs = torch.zeros((len(rows), width), dtype=torch.float32)
    for i, row in enumerate(rows):
        n = len(row.tokens)
        tokens[i, :n] = torch.tensor(row.tokens)
        real[i, :n] = 1
        sampled[i, :n] = torch.tensor(row.mask, dtype=torch.long)
        logprobs[i, :n] = torch.tensor(row.logprobs)
    tensors = {
        "prompt_ids": tokens[:, :1],
        "prompt_mask": real[:, :1],
        "completion_ids": tokens[:, 1:],
        "completion_mask": real[:, 1:],
        "tool_mask": sampled[:, 1:],
        "sampling_per_token_logps": logprobs[:, 1:],
        "advantages": _advantages(rows, width),
    }
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def _advantages(rows: Sequence[Row], width: int) -> torch.Tensor:
    whole = torch.tensor([row.advantage for row in rows], dtype=torch.float32)
    if not any(row.advantages for row in rows):
        return whole
    by_token = whole[:, None].repeat(1, width)
    for i, row in enumerate(rows):
        if row.advantages:
            by_token[i] = 0.0
            by_token[i, : len(row.advantages)] = torch.tensor(row.advantages, dtype=torch.float32)
    return by_token[:, 1:]


def shared_prefix(tokens: torch.Tensor, mask: torch.Tensor) -> int:
    """How many leading tokens all rows have in common, none of them under the loss.

    `tokens`: (rows, width); `mask`: (rows, width - 1), of the tokens from the second on, as `collate` makes them.
    """
    same = (tokens == tokens[:1]).all(dim=0).long().cumprod(dim=0).sum()
    untrained = (~mask.bool().any(dim=0)).long().cumprod(dim=0).sum() + 1
    return int(torch.minimum(same, untrained))
