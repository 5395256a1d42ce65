"""Advantages of groups that grow as trees: pure functions from rewards and parentage to one number a turn. No torch.

A leaf is an episode's end, so a group has as many leaves as trajectories; below a turn are the leaves whose episodes
have it in common. Always true:

* a turn's advantage is the sum of those of the leaves below it: the policy gradient of training each leaf's whole path
  with the leaf's advantage, every shared turn once. So credit is conserved: a turn's advantage is that of its next turn
  and of those that branches sampled in its place, together; the first turns of a group sum to zero;
* leaves of one group sum to zero, and what compares them within their tree sums to zero in each tree;
* adding a constant to every reward of a group changes nothing, equal rewards give zeros, and where nothing branches
  these are the advantages of `advantage.advantages`, to the bit.

Which turn is left must not depend on what is compared there. Where it depends on outcomes (`branching.at = "value"`),
what stands behind a turn was seen before it was chosen, and the mean over the leaves below it is slightly biased.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import fsum
from typing import Literal

from ..rollouts.types import Group
from .advantage import Baseline, Scale, advantages

Compared = Literal["tree", "group"]


@dataclass(frozen=True, slots=True)
class Branch:
    """A trajectory's place in its group: `turns` of which the first `left_at` are the trajectory's at index `parent`,
    which stands before it; None: it began at the start.
    """

    turns: int
    parent: int | None = None
    left_at: int = 0


def branches_of(group: Group) -> list[Branch]:
    """The places of a group's trajectories, in their order. Raises `ValueError` for one whose parent is not there
    before it: the parent's turns would be trained by nobody.
    """
    found: dict[str, int] = {}
    places = []
    for at, t in enumerate(group.trajectories):
        if t.parent is not None and t.parent not in found:
            raise ValueError(f"trajectory {t.id} left {t.parent}, which is not in group {group.id} before it")
        places.append(Branch(len(t.turns), None if t.parent is None else found[t.parent], t.left_at))
        found[t.id] = at
    return places


def trees(branches: Sequence[Branch]) -> list[list[int]]:
    """The indices of each tree's leaves, trees in the order of their roots."""
    roots: list[int] = []
    found: dict[int, list[int]] = {}
    for at, branch in enumerate(branches):
        roots.append(at if branch.parent is None else roots[branch.parent])
        found.setdefault(roots[at], []).append(at)
    return list(found.values())


def leaf_advantages(
    groups: Sequence[Sequence[float]],
    branches: Sequence[Sequence[Branch]],
    compared: Compared = "tree",
    scale: Scale = "group",
    baseline: Baseline = "mean",
) -> list[list[float]]:
    """One advantage a leaf, shaped as `groups` (rewards of each group).

    "group": every leaf against the whole group, as `advantage.advantages` (GRPO). "tree": to that, which compares
    between trees, the comparison with the leaves of its own tree is added (Tree-GRPO, arXiv 2509.21240: the sum of the
    inter-tree and the intra-tree group-relative advantage). A tree of one leaf has nothing to compare within it.
    """
    between = advantages(groups, scale, baseline)
    if compared == "group":
        return between
    whole = [
        [rewards[i] for i in tree] for rewards, places in zip(groups, branches, strict=True) for tree in trees(places)
    ]
    inner = iter(advantages(whole, scale, baseline))
    result = []
    for values, places in zip(between, branches, strict=True):
        added = list(values)
        for tree in trees(places):
            for i, value in zip(tree, next(inner), strict=True):
                added[i] += value
        result.append(added)
    return result


def turn_advantages(leaves: Sequence[float], branches: Sequence[Branch]) -> list[list[float]]:
    """Of each trajectory the advantages of its own turns, in order: the sum of `leaves` (one number a trajectory) below
    each. A trajectory without turns has none.
    """
    terms: list[list[list[float]]] = [[[] for _ in range(b.left_at, b.turns)] for b in branches]
    for leaf, value in enumerate(leaves):
        at: int | None = leaf
        stop = branches[leaf].turns
        while at is not None:  # up its path, to the start
            here = branches[at]
            for turn in range(here.left_at, stop):
                terms[at][turn - here.left_at].append(value)
            at, stop = here.parent, here.left_at
    return [[fsum(values) for values in of] for of in terms]
