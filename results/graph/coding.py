"""Coding tasks in the sandbox, and a script that works on them by chance: it looks around, tries things, edits, tests.

At each turn the script does what it does most at that turn with the chance `HABIT`, else it draws evenly among some
commands; it knows neither the tests nor whether an edit is right. So what it repeats says what such a script repeats.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from espalier.envs.coding.env import CodeSandboxEnv
from espalier.envs.coding.families import generate
from espalier.envs.coding.task import CodeTask
from espalier.envs.core import Action, Observation, ToolCall
from espalier.envs.sandbox import Box, BoxError

TURNS = 7
HABIT = 0.7
"""How often the script does what it does at this turn most."""
SECONDS = 30.0


def possible() -> bool:
    """Whether this machine allows a box."""
    try:
        Box().close()
    except (BoxError, OSError):
        return False
    return True


def tasks(count: int) -> list[CodeTask]:
    """Generated tasks."""
    return [generate("train", 1, number) for number in range(count)]


def environment() -> CodeSandboxEnv:
    """The environment; every episode names its task."""
    return CodeSandboxEnv(tasks(1), seconds=SECONDS)


def policy(task: CodeTask) -> Callable[[Observation, int, random.Random], Action]:
    """The script for one task."""
    module = next(name for name in task.files if not name.startswith("test_"))
    source = task.files[module]
    stem = module.removesuffix(".py")
    shells = [
        f"cat {module}",
        "ls",
        f"cat test_{module}",
        "ls -1 | wc -l && python3 --version",
        f"grep -n def {module}",
    ]
    looks = [("shell", {"command": command}) for command in shells]
    imports = f"import {stem}; sorted(n for n in dir({stem}) if not n.startswith('_'))"
    tries: list[tuple[str, dict[str, Any]]] = [
        ("run_tests", {}),
        ("python", {"code": imports}),
        ("shell", {"command": f"python3 -m py_compile {module} && echo fine"}),
        ("read_file", {"path": module}),
    ]
    edits = [
        source.replace("pass", "return None"),
        source.replace("+ 1", "+ 0"),
        source.replace("<", "<="),
        source.replace("    pass", "    return 0"),
    ]
    changes = [("write_file", {"path": module, "content": text}) for text in dict.fromkeys(edits)]
    submit: tuple[str, dict[str, Any]] = ("submit", {})
    habits = [looks, looks[1:] + looks[:1], tries, changes, tries, [submit, *changes], [submit]]

    def draw(seen: Observation, turn: int, rng: random.Random) -> Action:
        offered = habits[turn]
        name, arguments = offered[0] if rng.random() < HABIT else rng.choice(offered)
        return Action("", (ToolCall(name, arguments, "", f"{turn}.0"),))

    return draw
