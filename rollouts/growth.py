"""How the episodes of a group that grows as a tree follow each other: roots, then rounds of branches, within a budget.

Always true: a group has at most `size` episodes, and each of them ends once; a round looks only at what has ended
before it; an episode that finds nothing to leave begins at the start, so that a parent's failure costs no branch; what
does not fit the budget is not begun, and nothing that was begun is cut short for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..configs.schema import BranchingSection
from .branching import Point, Spent, choose, forecast, spent
from .episode import Ended, Episode
from .types import Failure, Trajectory


@dataclass(slots=True, eq=False)
class Walk:
    """An episode from its beginning on. `leased`: whoever began it holds its version. `watched`: others may leave it,
    so `env` is held when it has ended; `marks`: where its environment stood before each turn, None where it could not
    be branched.
    """

    episode: Episode
    leased: bool = False
    watched: bool = False
    env: Any = None
    marks: list[Any] = field(default_factory=list)
    outcome: Trajectory | Failure | None = None

    @property
    def id(self) -> str:
        """Of its episode."""
        return self.episode.spec.id

    @property
    def ended_well(self) -> bool:
        """Whether its machine ended as a trajectory."""
        request = self.episode.request
        return isinstance(request, Ended) and isinstance(request.outcome, Trajectory)


def trees_at_once(concurrency: int, section: BranchingSection | None) -> int:
    """How many groups grow at once: twice as many as their roots fill the places, so that none waits for long for the
    slowest of another's, and the environments that are held stay bounded.
    """
    return 2 * -(-concurrency // section.roots) if section is not None and section.roots else 1


def next_points(
    group: str, size: int, walks: Sequence[Walk], section: BranchingSection, rounds: int, run: str
) -> list[Point | None]:
    """Where the episodes of the next of `rounds` rounds begin (None: at the start); those that fit the budget."""
    count = -(-(size - len(walks)) // rounds)
    names = [f"{group}/{i}" for i in range(len(walks), len(walks) + count)]
    done = {walk.id: walk.outcome for walk in walks if isinstance(walk.outcome, Trajectory)}
    open_turns = {walk.id: _open(walk, done[walk.id]) for walk in walks if walk.id in done}
    return _affordable(choose(names, done, open_turns, section.at, run), done, section)


def _open(walk: Walk, trajectory: Trajectory) -> list[int]:
    """The turns at which it can be left; its own first one is its parent's to be left at."""
    if walk.env is None:
        return []
    return [turn for turn in range(trajectory.left_at + 1, len(trajectory.turns)) if walk.marks[turn] is not None]


def _affordable(
    points: Sequence[Point | None], done: dict[str, Trajectory], section: BranchingSection
) -> list[Point | None]:
    total = spent(done.values())
    roots = [t for t in done.values() if t.parent is None]
    whole = spent(roots)
    chain = Spent(whole.tokens // len(roots), whole.turns // len(roots)) if roots else Spent()
    fitting: list[Point | None] = []
    for point in points:
        total += chain if point is None else forecast(done[point.parent], point.turn)
        if not total.within(section.max_tokens, section.max_turns):
            break
        fitting.append(point)
    return fitting
