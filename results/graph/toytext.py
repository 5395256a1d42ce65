"""Gymnasium's toy-text environments as agent environments with one tool, and policies that walk in them by chance."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Sequence
from typing import Any

import gymnasium
from espalier.envs.core import Action, AgentEnv, Observation, Snapshot, Task, ToolCall
from espalier.envs.tabular import TabularState
from espalier.envs.tools import Tool, tool

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "frozenlake": ("FrozenLake-v1", {"map_name": "8x8", "is_slippery": False}),
    "taxi": ("Taxi-v4", {}),
    "cliffwalking": ("CliffWalking-v1", {}),
}


@tool(effect="writes", context=False)
def go(direction: int) -> str:
    """Take one action of the environment, by its number."""
    return str(direction)


class ToyText(AgentEnv):
    """One of `KINDS`. `seconds`: how long each step takes besides."""

    acts_by_calls = True
    snapshots_travel = True

    def __init__(self, kind: str, seconds: float = 0.0) -> None:
        id, options = KINDS[kind]
        self.inner = TabularState(gymnasium.make(id, **options).unwrapped)
        self._seconds = seconds
        self._over = True

    @property
    def tools(self) -> Sequence[Tool]:
        """The one tool."""
        return (go,)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Start anew from the seed."""
        super().reset(seed=seed)
        state, _ = self.inner.reset(seed=seed)
        self._over = False
        return Observation(({"role": "user", "content": str(state)},)), {"task": (options or {}).get("task")}

    def step(self, action: Action) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """One call of `go`."""
        if self._over:
            raise RuntimeError("the episode is over: call reset() before step()")
        if self._seconds:
            time.sleep(self._seconds)
        (call,) = action.tool_calls
        state, reward, terminated, truncated, _ = self.inner.step(int((call.arguments or {})["direction"]))
        self._over = bool(terminated or truncated)
        answer: Any = {"role": "tool", "content": str(state), "name": "go", "tool_call_id": call.id}
        return Observation((answer,)), float(reward), bool(terminated), bool(truncated), {"tool_errors": 0}

    def state_digest(self) -> str:
        """Of the environment inside."""
        return self.inner.state_digest()

    def snapshot(self) -> Snapshot:
        """Of the environment inside."""
        kept = self.inner.snapshot()
        return Snapshot(kept.env_id, kept.digest, (kept, self._over), kept.size)

    def rollback(self, snapshot: Snapshot) -> None:
        """Return to `snapshot`."""
        kept, self._over = snapshot.state
        self.inner.rollback(kept)

    def branch(self, snapshot: Snapshot) -> ToyText:
        """A second environment that goes on from `snapshot`."""
        raise NotImplementedError("its snapshots travel")


class Softmax:
    """A random table of logits, `sharpness` times a standard normal each; by seed."""

    def __init__(self, kind: str, sharpness: float, seed: str) -> None:
        self._sharpness, self._seed = sharpness, seed
        self._actions = 6 if kind == "taxi" else 4
        self._rows: dict[str, list[float]] = {}

    def draw(self, state: str, rng: random.Random) -> int:
        """An action in a state."""
        row = self._rows.get(state)
        if row is None:
            table = random.Random(f"{self._seed}/{state}")
            row = self._rows[state] = [math.exp(self._sharpness * table.gauss(0, 1)) for _ in range(self._actions)]
        return rng.choices(range(self._actions), row)[0]


def turn(direction: int, number: int) -> Action:
    """The call, as a policy writes it."""
    return Action("", (ToolCall("go", {"direction": direction}, "", f"{number}.0"),))


def tasks(count: int) -> list[Task]:
    """Tasks that differ by their seeds alone."""
    return [Task(f"toy-{number}", "") for number in range(count)]
