"""A scripted expert for generated tasks, and the same expert with systematic faults.

`expert` solves every generated task: it looks for the headers that its formula needs, writes, and submits in the turn
of its last write. The shipped base policy imitates `faulty_expert`, whose faults are *habits*: in a context that can be
recognised it does the wrong thing more often than not, and the right thing otherwise. So the base is wrong there when
it is greedy and right now and then when it samples, which is what reinforcement learning needs. A fault is a bent
sketch (a wrong belief), so the two experts write alike.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from ..core import Action, ToolCall
from .edits import SetCells
from .families.drafts import Draft
from .families.issue import GeneratedTask
from .families.sketch import FAMILIES, Sketch, Step, solve
from .families.words import BLIND_FRAMES, RELATED
from .refs import cell_name

_SUBMIT = ToolCall("submit", {})
_ANCHORED = ("flag", "share", "lookup", "summary")
_COUNTS = ("COUNT", "COUNTIF", "COUNTIFS", "DISTINCT")


@dataclass(frozen=True, slots=True)
class FaultModel:
    """How often each habit shows in its context, and how often each family is shown to the imitator."""

    short_range: float = 0.58
    """The last data row is left out when the answer stands directly below the table."""
    decoy_column: float = 0.58
    """The column with the related header is taken when there is one."""
    pasted: float = 0.55
    """A count is written down as a number instead of a formula."""
    blind: float = 0.55
    """Under a frame of `BLIND_FRAMES` nothing is looked at and the column letters are guessed."""
    no_dollar: float = 0.58
    """A fill leaves out the `$` that holds a range or a cell."""
    repair_blind: float = 0.7
    """A repair is written without looking at the sheet or at the formula."""
    weights: Mapping[str, float] = field(
        default_factory=lambda: MappingProxyType(
            {
                "conditional": 0.21,
                "row_formula": 0.17,
                "total": 0.14,
                "stat": 0.13,
                "flag": 0.09,
                "share": 0.08,
                "lookup": 0.07,
                "multi_key": 0.05,
                "summary": 0.04,
                "repair": 0.02,
            }
        )
    )
    """Share of each family among demonstrations."""

    def __post_init__(self) -> None:
        for name in FAULTS:
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"the probability of fault {name} must lie in 0..1, not {getattr(self, name)}")
        if set(self.weights) != set(FAMILIES) or min(self.weights.values()) < 0 or not sum(self.weights.values()):
            raise ValueError(f"weights must name each family once, none negative: {', '.join(FAMILIES)}")

    def draw_family(self, rng: random.Random) -> str:
        """A family, by weight."""
        return rng.choices(list(self.weights), list(self.weights.values()))[0]


def _directly_below(draft: Draft) -> bool:
    sketch = draft.sketch
    return sketch.target.cells == 1 and sketch.target.top == sketch.last + 1 and draft.family != "repair"


FAULTS: Mapping[str, Callable[[Draft], bool]] = MappingProxyType(
    {
        "short_range": _directly_below,
        "decoy_column": lambda draft: draft.decoy != 0,
        "pasted": lambda draft: draft.sketch.kind in _COUNTS and draft.family != "repair",
        "blind": lambda draft: draft.frame in BLIND_FRAMES,
        "no_dollar": lambda draft: draft.family in _ANCHORED,
        "repair_blind": lambda draft: draft.family == "repair",
    }
)
"""Each fault and where it shows; what it does, and how often, is the `FaultModel` field of that name."""


def expert(task: GeneratedTask) -> list[Action]:
    """The turns that solve `task`: look, then write and submit."""
    draft = _draft(task)
    return [_look(draft, draft.finds), _act(solve(draft.sketch))]


def faulty_expert(task: GeneratedTask, rng: random.Random, faults: FaultModel) -> list[Action]:
    """The turns of an expert with habits; a pure function of its arguments."""
    draft = _draft(task)
    shown = {name for name, applies in FAULTS.items() if applies(draft) and rng.random() < getattr(faults, name)}
    sketch = draft.sketch
    if "short_range" in shown:
        sketch = replace(sketch, last=sketch.last - 1)
    if "decoy_column" in shown:
        sketch = _with_decoy(draft, sketch)
    if "no_dollar" in shown:
        sketch = replace(sketch, anchored=False)
    blind = bool(shown & {"blind", "repair_blind"})
    if blind:
        sketch = _guessed(draft, sketch, rng)
    write = _paste(sketch, rng) if "pasted" in shown else _act(solve(sketch))
    finds = tuple(RELATED.get(f, f) if f == _asked(draft) else f for f in draft.finds)
    return [write] if blind else [_look(draft, finds if "decoy_column" in shown else draft.finds), write]


def _draft(task: GeneratedTask) -> Draft:
    if not isinstance(task, GeneratedTask) or task.draft is None:
        raise ValueError(f"task {task.id} was not generated here: the scripted expert knows only generated tasks")
    return task.draft


def _with_decoy(draft: Draft, sketch: Sketch) -> Sketch:
    if sketch.lookup is not None:
        sheet, table, _ = sketch.lookup
        return replace(sketch, lookup=(sheet, table, draft.decoy))
    return replace(sketch, value=draft.decoy)


def _guessed(draft: Draft, sketch: Sketch, rng: random.Random) -> Sketch:
    """Every column that would have been looked up is guessed within the table."""
    columns = range(draft.table.left, draft.table.right + 1)

    def guess(column: int) -> int:
        return rng.choice(columns) if column else 0

    return replace(sketch, value=guess(sketch.value), key=guess(sketch.key), other=guess(sketch.other))


def _asked(draft: Draft) -> str:
    """The header asked for: of those looked for, the one that has a related header."""
    return next((f for f in draft.finds if f in RELATED), "")


def _look(draft: Draft, finds: tuple[str, ...]) -> Action:
    """Where do the headers stand? And in a repair, what does the faulty formula say?"""
    calls = [ToolCall("find_cells", {"query": header}) for header in finds]
    if draft.family == "repair":
        calls.append(ToolCall("inspect_range", {"range": str(draft.sketch.target), "include_details": True}))
    return Action(tool_calls=tuple(calls))


def _act(steps: tuple[Step, ...]) -> Action:
    return Action(tool_calls=(*map(_call, steps), _SUBMIT))


def _call(step: Step) -> ToolCall:
    if isinstance(step, SetCells):
        row, column, content = step.cells[0]
        return ToolCall("write_range", {"range": cell_name(row, column), "data": content})
    arguments: dict[str, Any] = {"start_cell": cell_name(step.rect.top, step.rect.left)}
    if step.rect.rows > 1:
        arguments["end_row"] = step.rect.bottom
    return ToolCall("fill_formula", {**arguments, "formula_template": step.formula})


def _paste(sketch: Sketch, rng: random.Random) -> Action:
    data = rng.randint(1, sketch.last - sketch.first + 1)
    return Action(tool_calls=(ToolCall("write_range", {"range": str(sketch.target), "data": data}), _SUBMIT))
