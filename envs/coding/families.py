"""Generated coding tasks: repair a function that is wrong in one place, or write one from its description.

Always true: a task is a pure function of (seed, split, number); the hidden tests pass on a correct solution and fail on
what the agent finds; held-out tasks have other names, other mistakes and other inputs than training tasks.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from keyword import iskeyword
from typing import Any

from .functions import FUNCTIONS, Function
from .task import CodeTask

FAMILIES = ("repair", "write")
HIDDEN = 6
"""Inputs that the hidden tests try."""

SHOWN = 2
"""Inputs that the visible tests try."""

_PREFIXES = {
    "train": ("all", "any", "base", "big", "do", "each", "fast", "get", "its", "make", "my", "new", "old", "our", "own",
              "the", "top", "use", "your", "one"),
    "test": ("calc", "find", "give", "keep", "plain", "run", "solve", "try"),
}  # fmt: skip
_MODULES = {
    "train": ("craft", "core", "extra", "helpers", "lib", "more", "pack", "stuff", "tools", "things"),
    "test": ("basics", "parts", "units", "work"),
}
_MADE_UP = 0.7
"""Share of names in training tasks and lessons that are no words: what is learnt is to copy a name, not to know it."""


@dataclass(frozen=True, slots=True)
class Draft:
    """What a task is about, before its tests are drawn."""

    family: str
    function: Function
    name: str
    module: str


def draw(split: str, seed: int, number: int) -> Draft:
    """The draft of the task `number`. Splits: "train", "test", and "lesson", of which demonstrations are made: like
    "train", but no task of a run.
    """
    return _draw(random.Random(f"code/{seed}/{split}/{number}"), split, number)


def _draw(rng: random.Random, split: str, number: int) -> Draft:
    function = FUNCTIONS[rng.randrange(len(FUNCTIONS))]
    return Draft(
        FAMILIES[number % 2], function, f"{_word(rng, split, _PREFIXES)}_{function.stem}", _word(rng, split, _MODULES)
    )


def _word(rng: random.Random, split: str, words: Mapping[str, tuple[str, ...]]) -> str:
    if split == "test":
        return rng.choice(words["test"])
    made_up = rng.random() < _MADE_UP
    while made_up:
        word = "".join(rng.choice("bcdfghiklmnoprstuvwxyzae") for _ in range(rng.randrange(2, 7)))
        if word not in words["test"] and not iskeyword(word) and word not in sys.stdlib_module_names:
            return word
    return rng.choice(words["train"])


def generate(split: str, seed: int, number: int) -> CodeTask:
    """The task `number` of a split (see `draw`)."""
    rng = random.Random(f"code/{seed}/{split}/{number}")
    draft = _draw(rng, split, number)
    function, name, module = draft.function, draft.name, draft.module
    correct = function.source.replace("NAME", name)
    if draft.family == "repair":
        unseen = len(function.mistakes) > 1
        mistakes = function.mistakes[1:] if split == "test" and unseen else function.mistakes[:1]
        begun = correct.replace(*rng.choice(mistakes))
        says = f"{name} in {module}.py is meant to return {function.says}, but it is wrong. Repair it."
    else:
        begun = f"def {name}({function.parameters}):\n    pass\n"
        says = f"Write {name}({function.parameters}) in {module}.py: it returns {function.says}."
    inputs = _telling(function, name, correct, begun, rng)
    shown = _tests(module, name, inputs[:SHOWN], "shown")
    hidden = _tests(module, name, inputs, "hidden")
    return CodeTask(
        id=f"code-{split}-{seed}-{number}",
        instruction=f"{says} test_{module}.py has examples.",
        family=draft.family,
        files={f"{module}.py": begun, f"test_{module}.py": shown},
        tests={f"test_hidden_{module}.py": hidden},
    )


def _telling(
    function: Function, name: str, correct: str, begun: str, rng: random.Random
) -> list[tuple[tuple[Any, ...], Any]]:
    """Inputs with what is right for them, the first of which shows that what the agent finds is wrong."""
    found: list[tuple[tuple[Any, ...], Any]] = []
    for _ in range(200):
        arguments = function.draw(rng)
        right = value_of(correct, name, arguments)
        if found or value_of(begun, name, arguments) != right:
            found.append((arguments, right))
        if len(found) == HIDDEN:
            return found
    raise AssertionError(f"no input tells {name} from its mistake")


def value_of(source: str, name: str, arguments: tuple[Any, ...]) -> Any:
    """What a function of this package's own table returns; an exception's type where it raises."""
    space: dict[str, Any] = {}
    exec(source, space)  # noqa: S102  (text of `functions`, never an agent's)
    try:
        return space[name](*(list(a) if isinstance(a, list) else a for a in arguments))
    except Exception as error:
        return type(error)


def _tests(module: str, name: str, inputs: list[tuple[tuple[Any, ...], Any]], kind: str) -> str:
    lines = [f"from {module} import {name}", ""]
    for i, (arguments, right) in enumerate(inputs):
        lines += [
            "",
            f"def test_{kind}_{i}():",
            f"    assert {name}({', '.join(map(repr, arguments))}) == {right!r}",
            "",
        ]
    return "\n".join(lines)
