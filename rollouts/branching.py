"""Where a group's tree grows: which turn of which trajectory the next episodes leave. Pure functions; no torch.

A trajectory can be left at each of its own turns but the first: the episode that leaves it there has the turns before
in common with it and samples that one anew. Always true: the choice depends on the group's ended trajectories and on
random numbers keyed by (run, episode), and on nothing else; a turn is left only where the environment can be branched.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from math import fsum
from typing import Literal

from .types import Trajectory

At = Literal["random", "entropy", "value"]


@dataclass(frozen=True, slots=True)
class Point:
    """Turn `turn` of `parent`, to be left there."""

    parent: str
    turn: int


@dataclass(frozen=True, slots=True)
class Spent:
    """What a group has used up, or a branch is expected to: sampled tokens, and turns, each a step of an environment
    unless a limit cut it.
    """

    tokens: int = 0
    turns: int = 0

    def __add__(self, other: Spent) -> Spent:
        return Spent(self.tokens + other.tokens, self.turns + other.turns)

    def within(self, tokens: int, turns: int) -> bool:
        """Whether it keeps to both bounds; 0 is none."""
        return (not tokens or self.tokens <= tokens) and (not turns or self.turns <= turns)


def spent(trajectories: Iterable[Trajectory]) -> Spent:
    """What the trajectories took; nothing counts twice."""
    return sum((Spent(t.sampled_tokens, t.own_turns) for t in trajectories), Spent())


def forecast(trajectory: Trajectory, turn: int) -> Spent:
    """What an episode that leaves `trajectory` at `turn` is expected to take: what that took from there on."""
    return Spent(sum(len(turn_logprobs(trajectory, i)) for i in _from(trajectory, turn)), len(_from(trajectory, turn)))


def choose(
    names: Sequence[str],
    trajectories: Mapping[str, Trajectory],
    open_turns: Mapping[str, Sequence[int]],
    at: At,
    run: str,
) -> list[Point | None]:
    """Where each of the episodes `names` begins; None: at the start, where there is nothing to leave.

    `trajectories`: of the group, by id, parents before their branches. `open_turns`: which turns of each can be left.
    "random": the tree with fewest leaves grows, at any of its turns. "entropy": the same tree, at the turn whose tokens
    were least likely on average (-log p of what was sampled, whose expectation is the entropy; ARPO, arXiv 2507.19849,
    branches where entropy rises), turns left less often before first. "value": of the whole group, the turn behind
    which outcomes vary most, over how many leaves know it (see `spread`).
    """
    points = [Point(id, turn) for id, turns in open_turns.items() for turn in turns]
    roots = {id: root_of(trajectories, id) for id in trajectories}
    leaves = Counter(roots.values())
    left = Counter(Point(t.parent, t.left_at) for t in trajectories.values() if t.parent is not None)
    chosen: list[Point | None] = []
    for name in names:
        if not points:
            chosen.append(None)
            continue
        dice = {point: _die(run, name, point) for point in points}
        if at == "value":
            value = {
                p: spread(trajectories, p) / (len(below(trajectories, p)) + left_now(trajectories, chosen, p))
                for p in points
            }
            best = max(points, key=lambda p: (value[p], dice[p]))
        else:
            fewest = min(leaves[roots[p.parent]] for p in points)
            tree = next(roots[p.parent] for p in points if leaves[roots[p.parent]] == fewest)
            here = [p for p in points if roots[p.parent] == tree]
            if at == "entropy":
                best = max(here, key=lambda p: (-left[p], surprisal(trajectories[p.parent], p.turn), dice[p]))
            else:
                best = max(here, key=lambda p: dice[p])
        leaves[roots[best.parent]] += 1
        left[best] += 1
        chosen.append(best)
    return chosen


def left_now(trajectories: Mapping[str, Trajectory], chosen: Sequence[Point | None], point: Point) -> int:
    """How many of the points just chosen add a leaf below `point`."""
    leaves = {t.id for t in below(trajectories, point)}
    return sum(
        p is not None and p.parent in leaves and (p.parent != point.parent or p.turn >= point.turn) for p in chosen
    )


def root_of(trajectories: Mapping[str, Trajectory], id: str) -> str:
    """The trajectory from the start that `id` descends from: the name of its tree."""
    parent = trajectories[id].parent
    return id if parent is None else root_of(trajectories, parent)


def below(trajectories: Mapping[str, Trajectory], point: Point) -> list[Trajectory]:
    """The leaves that have everything before `point` in common, its own trajectory first."""
    found = {point.parent: trajectories[point.parent]}
    for id, t in trajectories.items():
        if t.parent in found and (t.parent != point.parent or t.left_at >= point.turn):
            found[id] = t
    return list(found.values())


def spread(trajectories: Mapping[str, Trajectory], point: Point) -> float:
    """How much outcomes vary behind `point`: the variance of the rewards of the leaves below it, the group's mean
    reward counted as one more, so that a single leaf tells something too. For rewards of 0 and 1 it is largest where
    their mean is 1/2.
    """
    mean = fsum(t.reward for t in trajectories.values()) / len(trajectories)
    seen = [*(t.reward for t in below(trajectories, point)), mean]
    middle = fsum(seen) / len(seen)
    return fsum((reward - middle) ** 2 for reward in seen) / len(seen)


def surprisal(trajectory: Trajectory, turn: int) -> float:
    """Mean -log p of the tokens sampled in a turn, nats a token."""
    logprobs = turn_logprobs(trajectory, turn)
    return -fsum(logprobs) / len(logprobs)


def turn_logprobs(trajectory: Trajectory, turn: int) -> tuple[float, ...]:
    """The recorded log-probabilities of the tokens of a turn, nats."""
    there = trajectory.turns[turn]
    sequence = trajectory.sequences[there.sequence]
    before = sum(s.stop - s.start for s in sequence.spans[: there.span] if s.origin == "sampled")
    span = sequence.spans[there.span]
    return sequence.logprobs[before : before + span.stop - span.start]


def _from(trajectory: Trajectory, turn: int) -> range:
    return range(turn, len(trajectory.turns))


def _die(run: str, name: str, point: Point) -> int:
    """A random number of (run, episode, point), 64 bits."""
    text = json.dumps([run, name, point.parent, point.turn]).encode()
    return int.from_bytes(blake2b(text, digest_size=8, person=b"branching").digest(), "little")
