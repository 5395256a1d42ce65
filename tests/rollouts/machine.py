"""Random deterministic environments, as a task names them, with every mix of capabilities the operation graph meets."""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from typing import Any, ClassVar

import gymnasium
from espalier.envs.core import Action, AgentEnv, EnvFailure, Observation, Snapshot, Task, ToolCall
from espalier.envs.tools import Toolset, tool
from espalier.envs.turn import run_calls

STATES = 6


@tool(effect="writes")
def move(env: Any, by: int) -> str:
    """Go on."""
    env.state = hash_of(env.world, env.state, by) % STATES
    env.journey += 1
    return f"at {env.state}"


@tool(effect="reads")
def look(env: Any) -> str:
    """Look around."""
    return f"it is {env.state}" + env.hidden()


@tool(effect="chance")
def roll(env: Any) -> str:
    """Throw a die."""
    return str(int(env.np_random.integers(1_000_000)))


@tool(effect="clock")
def now(env: Any) -> str:
    """The time."""
    env.calls["now"] += 1
    return f"{env.calls['now']}"


@tool(effect="writes", ends=True)
def submit(env: Any) -> str:
    """Finish."""
    return "submitted"


TOOLS = Toolset((move, look, submit))
RISKY = Toolset((move, look, roll, now, submit))


def hash_of(*parts: Any) -> int:
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], "big")


class Machine(AgentEnv):
    """An automaton that its task's instruction seeds; nothing but the contract."""

    acts_by_calls = True
    toolset: ClassVar[Toolset] = TOOLS
    done: ClassVar[Counter] = Counter()
    """Resets and steps of all instances."""
    calls: ClassVar[Counter] = Counter()
    delay: ClassVar[float] = 0.0

    def __init__(self) -> None:
        self.state, self.world, self.journey, self.over = 0, "", 0, True

    @property
    def tools(self):
        return self.toolset.tools

    def hidden(self) -> str:
        return ""

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        Machine.done["reset"] += 1
        self.world, self.state, self.journey, self.over = options["task"].instruction, 0, 0, False
        start = int(self.np_random.integers(3))
        self.state = start
        return Observation(({"role": "user", "content": f"begin at {start}"},)), {
            "task": options["task"],
            "start": start,
        }

    def step(self, action: Action):
        if self.over:
            raise RuntimeError("over")
        Machine.done["step"] += 1
        if self.delay:
            time.sleep(self.delay)
        self.fault(action)
        result = run_calls(self.toolset.bind(self), action.tool_calls)
        self.over = result.ended or not action.tool_calls
        reward = (hash_of(self.world, self.state, "reward") % 7) / 7 if self.over else 0.0
        info = {"tool_errors": result.errors, "state": self.state, "took": (1, 2.5)}
        return Observation(result.messages), reward, self.over, False, info

    def fault(self, action: Action) -> None:
        """For subclasses that break."""


class Digesting(Machine):
    """Its states have digests."""

    def everything(self) -> list[Any]:
        return [self.world, self.state, self.over, self.np_random.bit_generator.state]

    def state_digest(self) -> str:
        return hashlib.sha256(json.dumps(self.everything()).encode()).hexdigest()


class Keeping(Digesting):
    """Its states can be kept, and travel."""

    snapshots_travel = True

    def snapshot(self) -> Snapshot:
        state = (self.world, self.state, self.journey, self.over, self.np_random.bit_generator.state)
        return Snapshot(type(self).__name__, self.state_digest(), (id(self.family), state), 100)

    def rollback(self, snapshot: Snapshot) -> None:
        family, state = snapshot.state
        if snapshot.env_id != type(self).__name__ or (not self.snapshots_travel and family != id(self.family)):
            raise EnvFailure("foreign_snapshot", "of another environment")
        self.world, self.state, self.journey, self.over, generator = state
        self.np_random.bit_generator.state = generator

    def branch(self, snapshot: Snapshot) -> Keeping:
        made = type(self)()
        made.family = self.family
        made.rollback(snapshot)
        return made

    def __init__(self) -> None:
        super().__init__()
        self.family: Any = object()


class Sluggish(Keeping):
    """Its steps and its branches take a while."""

    delay = 0.2

    def branch(self, snapshot: Snapshot) -> Keeping:
        time.sleep(self.delay)
        return super().branch(snapshot)


class Bound(Keeping):
    """Its kept states do not travel; names of states are histories."""

    snapshots_travel = False


class ByHistory(Keeping):
    """It can be kept, and has no digest."""

    state_digest = None  # type: ignore[assignment]

    def snapshot(self) -> Snapshot:
        state = (self.world, self.state, self.journey, self.over, self.np_random.bit_generator.state)
        return Snapshot(type(self).__name__, "", (id(self.family), state), 100)


class Risky(Machine):
    """With tools whose answers no state decides."""

    toolset = RISKY


class RiskyDigesting(Digesting):
    """The same, with digests that cover the generator."""

    toolset = RISKY


class Liar(Digesting):
    """Its digest leaves out what `look` shows."""

    def hidden(self) -> str:
        return f", after {self.journey}"


class Fickle(Machine):
    """`look` is declared a function of the state, and is none."""

    def hidden(self) -> str:
        Machine.calls["look"] += 1
        return f" ({Machine.calls['look']})"


def task(world: str = "w", id: str = "") -> Task:
    return Task(id or f"task-{world}", world, "machine")


def act(*calls: tuple[str, dict[str, Any]], turn: int = 0, text: str = "") -> Action:
    made = tuple(ToolCall(name, args, json.dumps(args), f"{turn}.{at}") for at, (name, args) in enumerate(calls))
    return Action(text, made)


def register() -> None:
    for kind in (Keeping, Machine, Sluggish):
        id = f"Machine{kind.__name__}-v0"
        if id not in gymnasium.registry:
            gymnasium.register(id, entry_point=f"machine:{kind.__name__}", disable_env_checker=True)


register()
