"""Which tasks a run works on, and in which order they are drawn.

Always true: the tasks of a step depend on the seed, the step and the statistics before it, and on nothing else;
held-out tasks come from the other split and are never drawn for training.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
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


@dataclass(frozen=True, slots=True)
class Data:
    """Tasks, the name and the hash of what they were read from; by task, why it was left out, and what was changed in
    its files or is not followed there.
    """

    name: str
    sha256: str
    tasks: Sequence[Task]
    dropped: Mapping[str, str]
    noted: Mapping[str, str]


def read(section: EnvSection, split: Literal["train", "test", "all"], seed: int, count: int) -> Data:
    """`count` tasks of a split, or as many as there are. Environments other than the spreadsheet and the coding sandbox
    draw their own by the seed that an id stands for. Raises `ValueError` where there are none.
    """
    if section.id == SPREADSHEET:
        from ..envs.spreadsheet.datasets import load_tasks

        found = load_tasks(section.tasks, split=split, seed=seed, count=count)
        noted: dict[str, str] = {}
        for task, note in found.notes:
            noted[task] = f"{noted[task]}; {note}" if task in noted else note
        return Data(found.name, found.sha256, list(found), dict(found.dropped), noted)
    if section.id == CODE_SANDBOX:
        from ..envs.coding.datasets import load_tasks as load_code_tasks

        code = load_code_tasks(section.tasks, split=split, seed=seed, count=count)
        source = section.id if section.tasks == "generated" else Path(section.tasks).name
        return Data(f"{source} {split}", _digest(task.digest for task in code), code, {}, {})
    own = [Task(f"{split}-{seed}-{number}", "") for number in range(count)]
    return Data(f"{section.id} {split}", _digest(task.id for task in own), own, {}, {})


def _digest(words: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(words).encode()).hexdigest()


def load(section: EnvSection, split: Literal["train", "test"], seed: int, count: int) -> Sequence[Task]:
    """The tasks of `read`."""
    return read(section, split, seed, count).tasks


def account(**sides: Data) -> dict[str, Any]:
    """The fields of a "tasks" row: how many tasks each side has, why others were left out, what is noted of some."""
    return {
        **{side: len(data.tasks) for side, data in sides.items()},
        "dropped": {task: why for data in sides.values() for task, why in data.dropped.items()},
        "noted": {task: note for data in sides.values() for task, note in data.noted.items()},
    }


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
