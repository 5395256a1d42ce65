"""A scripted expert for generated tasks, and the same expert with habits.

`expert` solves every generated task. The base policy for coding imitates `faulty_expert`, whose faults are *habits*: in
a context that can be recognised it does the wrong thing about as often as the right one, so that reinforcement learning
has something to choose from.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from ..core import Action, ToolCall
from .families import Draft, draw
from .task import CodeTask

_SUBMIT = ToolCall("submit", {})


@dataclass(frozen=True, slots=True)
class Habit:
    """Where something is done wrong (`applies`), and in which share of these cases."""

    applies: Callable[[Draft], bool]
    share: float = 0.5


def _takes_numbers(draft: Draft) -> bool:
    return draft.function.parameters.startswith("number")


HABITS: Mapping[str, Habit] = MappingProxyType(
    {
        "mistaken": Habit(lambda draft: draft.family == "write"),
        "untouched": Habit(lambda draft: draft.family == "repair"),
        "bare_name": Habit(_takes_numbers),
        "other_file": Habit(lambda draft: not _takes_numbers(draft)),
    }
)
"""A mistake in the function that is written; work handed in as it was found; the first word of the name left out;
everything written to main.py.
"""


def expert(task: CodeTask) -> list[Action]:
    """The turns that solve `task`. Raises `ValueError` for one that was not generated."""
    return _turns(_draft(task), frozenset())


def faulty_expert(task: CodeTask, rng: random.Random, shares: Mapping[str, float]) -> list[Action]:
    """The turns of an expert with habits, by name and share; a pure function of its arguments."""
    draft = _draft(task)
    return _turns(draft, frozenset(n for n, h in HABITS.items() if h.applies(draft) and rng.random() < shares[n]))


def _draft(task: CodeTask) -> Draft:
    kind, _, rest = task.id.partition("-")
    split, _, numbers = rest.partition("-")
    seed, _, number = numbers.partition("-")
    if kind != "code" or not seed.isdigit() or not number.isdigit():
        raise ValueError(f"{task.id} is not a generated task")
    return draw(split, int(seed), int(number))


def _turns(draft: Draft, shown: frozenset[str]) -> list[Action]:
    name, source = draft.name, draft.function.source
    if "mistaken" in shown:
        source = source.replace(*draft.function.mistakes[0])
    if "bare_name" in shown:
        name = draft.function.stem
    path = "main.py" if "other_file" in shown else f"{draft.module}.py"
    write = ToolCall("write_file", {"path": path, "content": source.replace("NAME", name)})
    if draft.family == "write":
        return [Action("", (write, _SUBMIT))]
    look = Action("", (ToolCall("read_file", {"path": f"{draft.module}.py"}),))
    return [look, Action("", (_SUBMIT,) if "untouched" in shown else (write, _SUBMIT))]
