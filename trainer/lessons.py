"""What the shipped base policies are taught: for each subject an environment, tasks, and an expert with habits.

Always true: a subject's lessons are a pure function of its seed; a lesson's task is of the training split.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from ..envs.coding import expert as coding
from ..envs.coding.env import CodeSandboxEnv
from ..envs.coding.families import generate
from ..envs.core import Action, AgentEnv, Task
from ..envs.spreadsheet.env import SpreadsheetEnv
from ..envs.spreadsheet.expert import FAULTS, FaultModel, faulty_expert
from ..envs.spreadsheet.families import GeneratedTask, draw_draft
from ..envs.spreadsheet.families.workbook import write_package
from ..envs.spreadsheet.task import Case
from .tokenizer import CELLS, CODE, Pieces


@dataclass(frozen=True, slots=True)
class Lesson:
    """A task and the expert's turns. `copies`: the expert copies a word of the instruction into what it writes."""

    task: Task
    actions: Sequence[Action]
    copies: bool


class Subject(Protocol):
    """Something a base policy can be made for."""

    @property
    def tools(self) -> Sequence[str]:
        """Those that the policy is shown."""

    @property
    def pieces(self) -> Pieces:
        """How the tokenizer cuts text."""

    def environment(self) -> AgentEnv:
        """Where lessons are played; the caller closes it."""

    def lessons(self, seed: int, count: int) -> Iterator[Lesson]:
        """`count` lessons to learn from."""

    def samples(self, seed: int, count: int) -> Iterator[Lesson]:
        """`count` other lessons, all kinds alike: the tokenizer's corpus."""

    def card(self) -> dict[str, Any]:
        """What decides the lessons, for the policy's card."""


@dataclass(frozen=True)
class Spreadsheets:
    """Generated workbooks (`envs/spreadsheet/families`)."""

    faults: FaultModel = field(default_factory=FaultModel)
    tools: Sequence[str] = ("inspect_range", "find_cells", "write_range", "clear_range", "fill_formula", "submit")
    pieces: Pieces = CELLS

    def environment(self) -> SpreadsheetEnv:
        """The spreadsheet environment, its answers short."""
        return SpreadsheetEnv([sketch_task(0, 0, "total")], tools=self.tools, terse=True)

    def lessons(self, seed: int, count: int) -> Iterator[Lesson]:
        """Families by the fault model's weights."""
        return self._lessons(seed, count, self.faults, random.Random(f"faults/{seed}"))

    def samples(self, seed: int, count: int) -> Iterator[Lesson]:
        """All families alike."""
        even = FaultModel(weights=dict.fromkeys(self.faults.weights, 1.0))
        return self._lessons(seed + 1, count, even, random.Random(f"corpus/{seed}"))

    def _lessons(self, seed: int, count: int, weights: FaultModel, rng: random.Random) -> Iterator[Lesson]:
        families = random.Random(f"demonstrations/{seed}")
        for index in range(count):
            task = sketch_task(seed, index, weights.draw_family(families))
            actions = faulty_expert(task, rng, self.faults)
            yield Lesson(task, actions, any(_copies(action, task.instruction) for action in actions))

    def card(self) -> dict[str, Any]:
        """Habits and weights."""
        habits = {name: getattr(self.faults, name) for name in FAULTS}
        return {"faults": habits | {"weights": dict(self.faults.weights)}}


@dataclass(frozen=True)
class Coding:
    """Generated repair and write tasks (`envs/coding/families`). Needs a machine that allows a box."""

    faults: Mapping[str, float] = field(default_factory=lambda: {name: h.share for name, h in coding.HABITS.items()})
    tools: Sequence[str] = ("read_file", "write_file", "submit")
    pieces: Pieces = CODE

    def environment(self) -> CodeSandboxEnv:
        """The coding environment."""
        return CodeSandboxEnv(count=1, tools=self.tools, terse=True)

    def lessons(self, seed: int, count: int) -> Iterator[Lesson]:
        """Both families in turn."""
        rng = random.Random(f"faults/{seed}")
        for index in range(count):
            task = generate("lesson", seed, index)
            yield Lesson(task, coding.faulty_expert(task, rng, self.faults), copies=True)

    def samples(self, seed: int, count: int) -> Iterator[Lesson]:
        """The same from another seed."""
        return self.lessons(seed + 1, count)

    def card(self) -> dict[str, Any]:
        """Habits."""
        return {"faults": dict(self.faults)}


SUBJECTS: Mapping[str, Callable[[], Subject]] = {"spreadsheet": Spreadsheets, "code": Coding}


def sketch_task(seed: int, index: int, family: str) -> GeneratedTask:
    """A training task without answers: enough to act in, and much cheaper than `generate`."""
    draft = draw_draft(seed, index, "train", family)
    return GeneratedTask(
        id=f"demo-{seed}-{index}-{family}",
        instruction=draft.instruction,
        family=family,
        answer_position=draft.answer_position,
        cases=(Case(write_package(draft.sheets, draft.cells[0]), {}),),
        draft=draft,
    )


def _copies(action: Action, instruction: str) -> bool:
    """Whether `action` writes a capitalised word of the instruction, as a cell's content or in quotes in a formula."""
    words = set(re.findall(r"[A-Z][a-z]+", instruction))
    given = [value for call in action.tool_calls for value in (call.arguments or {}).values() if isinstance(value, str)]
    written = {word for value in given for word in re.findall('"([A-Z][a-z]+)"', value)}
    labels = {str(call.arguments["data"]) for call in action.tool_calls if call.arguments and "data" in call.arguments}
    return bool(words & (written | labels))
