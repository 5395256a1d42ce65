"""Coding tasks in the sandbox, and a script that works on them by chance: it looks around, tries things, edits, tests.

The script draws each turn among the commands below, by weights that depend on the turn alone; it knows neither the
tests nor whether an edit is right. So what it repeats says what such a script repeats.
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

TURNS = 8
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
    edits = [
        source.replace("pass", "return None"),
        source.replace("+ 1", "+ 0"),
        source.replace("<", "<="),
        source.replace("    pass", "    return 0"),
        source + "\n\nprint('loaded')\n",
    ]
    looks: list[tuple[str, dict[str, Any], float]] = [
        ("shell", {"command": "ls"}, 4.0),
        ("shell", {"command": f"cat {module}"}, 4.0),
        ("shell", {"command": f"cat test_{module}"}, 3.0),
        ("shell", {"command": "ls -1 | wc -l && python3 --version"}, 1.0),
        ("read_file", {"path": module}, 3.0),
        ("shell", {"command": f"grep -n def {module}"}, 1.0),
    ]
    tries: list[tuple[str, dict[str, Any], float]] = [
        ("run_tests", {}, 4.0),
        ("python", {"code": f"import {stem}; sorted(n for n in dir({stem}) if not n.startswith('_'))"}, 1.0),
        ("shell", {"command": f"python3 -m py_compile {module} && echo fine"}, 1.0),
    ]
    changes = [("write_file", {"path": module, "content": text}, 1.5) for text in dict.fromkeys(edits)]
    submit = ("submit", {}, 1.0)

    def draw(seen: Observation, turn: int, rng: random.Random) -> Action:
        if turn == TURNS - 1:
            return Action("", (ToolCall("submit", {}, "", f"{turn}.0"),))
        offered = looks if turn < 2 else [*looks, *tries, *changes] if turn < 5 else [*tries, *changes, submit]
        name, arguments, _ = rng.choices(offered, [weight for *_, weight in offered])[0]
        return Action("", (ToolCall(name, arguments, "", f"{turn}.0"),))

    return draw
