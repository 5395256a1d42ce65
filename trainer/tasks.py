"""Which tasks a run works on, and in which order they are drawn.

Always true: the tasks of a step depend on the seed, the step and the statistics before it, and on nothing else;
held-out tasks come from the other split and are never drawn for training.
"""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from ..configs.schema import EnvSection
from ..envs.core import Task
from .errors import UserError

SPREADSHEET = "espalier/Spreadsheet-v0"
CODE_SANDBOX = "espalier/CodeSandbox-v0"
FLOOR = 0.02
"""Added to p(1-p), whose largest value is 0.25: a task that seems always or never solved is still looked at now and
then.
"""


def load(section: EnvSection, split: Literal["train", "test"], seed: int, count: int) -> list[Task]:
    """`count` tasks of a split. Environments other than the spreadsheet draw their own by the seed that an id stands
    for.
    """
    if section.id == SPREADSHEET:
        from ..envs.spreadsheet.datasets import load_tasks

        return list(load_tasks(section.tasks, split=split, seed=seed, count=count))
    if section.id == CODE_SANDBOX:
        from ..envs.coding.datasets import load_tasks as load_code_tasks

        return list(load_code_tasks(section.tasks, split=split, seed=seed, count=count))
    return [Task(f"{split}-{seed}-{number}", "") for number in range(count)]


def environment_options(section: EnvSection, tasks: Sequence[Task]) -> dict[str, Any]:
    """What the environment's constructor gets besides `section.kwargs`, and in place of some. Raises `UserError`."""
    if section.id not in (SPREADSHEET, CODE_SANDBOX):
        return {}
    return {"tasks": list(tasks), "tools": list(section.tools), "terse": section.terse, **chosen_here(section)}


def chosen_here(section: EnvSection) -> dict[str, str]:
    """Of `section.kwargs`, what depends on this machine, as it was chosen: a run's record and the operation graph name
    the referee with its version. Raises `UserError`.
    """
    if section.id != SPREADSHEET:
        return {}
    from ..envs.spreadsheet.engines import EngineError, choose_referee

    try:
        return {"referee": choose_referee(str(section.kwargs.get("referee", "auto")))}
    except (EngineError, ValueError) as error:
        raise UserError(f"env.kwargs.referee: {error}") from error


def draw(
    tasks: Sequence[Task],
    count: int,
    *,
    seed: int,
    step: int,
    stats: Mapping[str, Sequence[float]] | None = None,
) -> list[Task]:
    """`count` tasks for a step, each at most once while there are enough.

    With `stats` (task id to [episodes, sum of rewards]) a task's weight is p(1-p) + FLOOR, p its mean reward with two
    episodes of its family's mean reward assumed beforehand, and the family's with one success and one miss; drawn
    without replacement by the Gumbel trick (arXiv 1903.06059). Without, all weigh the same.
    """
    generator = random.Random(f"{seed}/{step}")
    weights = [0.0] * len(tasks) if stats is None else _log_weights(tasks, stats)
    drawn: list[Task] = []
    while len(drawn) < count:
        scored = [(weight - math.log(-math.log(_open_unit(generator))), i) for i, weight in enumerate(weights)]
        scored.sort(reverse=True)
        drawn += [tasks[i] for _, i in scored[: count - len(drawn)]]
    return drawn


def _open_unit(generator: random.Random) -> float:
    """Uniform in (0, 1), both ends left out."""
    return (generator.getrandbits(52) + 0.5) / 2**52


def _log_weights(tasks: Sequence[Task], stats: Mapping[str, Sequence[float]]) -> list[float]:
    known = [stats.get(task.id, (0.0, 0.0)) for task in tasks]
    families: dict[str, list[float]] = defaultdict(lambda: [2.0, 1.0])
    for task, (episodes, total) in zip(tasks, known, strict=True):
        families[task.family][0] += episodes
        families[task.family][1] += total
    weights = []
    for task, (episodes, total) in zip(tasks, known, strict=True):
        seen, won = families[task.family]
        p = min(max((total + 2.0 * won / seen) / (episodes + 2.0), 0.0), 1.0)
        weights.append(math.log(p * (1.0 - p) + FLOOR))
    return weights
