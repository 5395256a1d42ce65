"""Generated coding tasks: repair a function that is wrong in one place, or write one from its description.

Always true: a task is a pure function of (seed, split, number); the hidden tests pass on a correct solution and fail on
what the agent finds; held-out tasks have other names, other mistakes and other inputs than training tasks.
"""

from __future__ import annotations

import random
from typing import Any

from .functions import FUNCTIONS, Function
from .task import CodeTask

FAMILIES = ("repair", "write")
HIDDEN = 6
"""Inputs that the hidden tests try."""

SHOWN = 2
"""Inputs that the visible tests try."""

_PREFIXES = {"train": ("my", "the", "get", "make", "do"), "test": ("find", "calc", "run")}
_MODULES = {"train": ("tools", "helpers", "lib", "core"), "test": ("work", "parts")}


def generate(split: str, seed: int, number: int) -> CodeTask:
    """The task `number` of a split ("train" or "test")."""
    rng = random.Random(f"code/{seed}/{split}/{number}")
    function = FUNCTIONS[rng.randrange(len(FUNCTIONS))]
    family = FAMILIES[number % 2]
    name = f"{rng.choice(_PREFIXES[split])}_{function.stem}"
    module = rng.choice(_MODULES[split])
    correct = function.source.replace("NAME", name)
    mistakes = [
        m for i, m in enumerate(function.mistakes) if (i == 0) == (split == "train") or len(function.mistakes) == 1
    ]
    if family == "repair":
        wrong, right = rng.choice(mistakes)[::-1]
        begun = correct.replace(right, wrong)
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
        family=family,
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
