"""CodeSandboxEnv: an agent works on code in a box, submits it, and is graded by tests that it has never seen.

Always true: an episode starts from a state that depends on the task alone (a rollback, not a new box); the reward is
1.0 exactly when every hidden test passes, else 0.0; what breaks on our side is an `EnvFailure`. `state_digest` is the
digest of the history (task, and calls that may have changed something): equal histories of deterministic programs have
equal states. A shell command that writes no file and leaves no process is undone, so it changes nothing. A turn in
which a limit of time or memory was met, or that names a clock or chance, says so (`info["unrepeatable"]`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..core import Action, AgentEnv, EnvFailure, Message, Observation, Snapshot, ToolCall
from ..sandbox import Box, BoxError, BoxSnapshot, Limits, SnapshotIncomplete
from ..spaces import ActionSpace, ObservationSpace
from ..tools import Tool, Toolset
from ..turn import TurnLimits, run_calls
from . import testing
from .task import CodeTask
from .tools import TOOLS, Desk

ENV_ID = "espalier/CodeSandbox-v0"


@dataclass(frozen=True)
class _State:
    """What a `Snapshot` carries: a state of the box, and the episode's own."""

    box: BoxSnapshot
    clean: BoxSnapshot
    task: CodeTask
    history: str
    turns: int
    over: bool
    rng: dict[str, Any]


class CodeSandboxEnv(AgentEnv):
    """Coding tasks in a sandbox.

    `tasks`: `CodeTask`s, or a source as `EnvSection.tasks` takes it (then `split`, `seed` and `count` choose). `tools`:
    names of those offered (empty: all). `max_turns`: turns after which an episode is truncated, and graded as it
    stands. `seconds`: wall-clock time of one call, and of the hidden tests. `memory`, `pids`: see `sandbox.Limits`.
    Raises `ValueError` for an unknown tool; the first `reset` raises `EnvFailure` where this machine allows no box.
    """

    metadata = {"render_modes": []}  # noqa: RUF012  (Gymnasium's own way)
    acts_by_calls = True

    def __init__(
        self,
        tasks: Sequence[CodeTask] | str = "generated",
        *,
        tools: Sequence[str] = (),
        terse: bool = False,
        max_turns: int | None = None,
        seconds: float = 30.0,
        memory: int | str = "1G",
        pids: int = 64,
        split: str = "train",
        seed: int = 0,
        count: int = 2000,
    ) -> None:
        if isinstance(tasks, str):
            from .datasets import load_tasks

            tasks = load_tasks(tasks, split=split, seed=seed, count=count)
        if not len(tasks):
            raise ValueError("there are no tasks: give at least one CodeTask")
        self.tasks, self.terse, self.max_turns, self.seconds = tasks, terse, max_turns, seconds
        self._limits = Limits(memory=memory, pids=pids, seconds=seconds, cpu_seconds=seconds)
        self._offered = tuple(tools)
        self._unbound = Toolset(TOOLS).select(tools) if tools else Toolset(TOOLS)
        self._box: Box | None = None
        self._clean: BoxSnapshot | None = None
        self._workspace: str | None = None
        self._task: CodeTask | None = None
        self._history, self._turns, self._over = "", 0, True
        self.action_space = ActionSpace(self._unbound)
        self.observation_space = ObservationSpace()

    @property
    def tools(self) -> Sequence[Tool]:
        """The tools offered, in a stable order."""
        return self._unbound.tools

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Start `options["task"]`, or a task drawn by the seeded generator. Raises `EnvFailure`."""
        super().reset(seed=seed)
        task = (options or {}).get("task")
        if task is None:
            task = self.tasks[int(self.np_random.integers(len(self.tasks)))]
        if not isinstance(task, CodeTask):
            raise TypeError('options["task"] must be a CodeTask')
        try:
            self._begin(task)
        except (BoxError, OSError) as error:
            self._discard()
            raise EnvFailure("box_failed", f"task {task.id}: {error}") from error
        self._task, self._turns, self._over = task, 0, False
        self._history = hashlib.sha256(task.digest.encode()).hexdigest()
        return Observation((Message(role="user", content=task.instruction),)), {"task": task}

    def _begin(self, task: CodeTask) -> None:
        """The box at the start of `task`: the one at hand, rolled back, where it has that workspace and is alive."""
        box = self._returned(task.workspace) or self._fresh(task.workspace)
        for path, text in task.files.items():
            box.write_file(path, text.encode())

    def _returned(self, workspace: str) -> Box | None:
        if self._box is None or self._clean is None or self._workspace != workspace:
            return None
        try:
            self._box.rollback(self._clean)
        except BoxError:  # it was lost since the last episode, which is no reason for this one to fail
            return None
        return self._box

    def _fresh(self, workspace: str) -> Box:
        self._discard()
        self._box, self._workspace = Box(workspace or None, self._limits), workspace
        testing.preload(self._box)
        self._clean = self._box.snapshot()
        return self._box

    def step(self, action: Action) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Carry out one turn; a turn without a call, or a submit, ends the episode, and the end is graded.

        At the end `info` says "tests" (passed and all), "soft" (share passed), and as "tests_stopped" the limit that
        stopped them, if one did.
        """
        if self._task is None or self._over or self._box is None:
            raise RuntimeError("the episode is over (or was never started): call reset() before step()")
        desk = Desk(self._box, self.seconds)
        try:
            result = run_calls(self._unbound.bind(desk), action.tool_calls, TurnLimits())
        except BoxError as error:
            self._discard()
            raise EnvFailure("box_failed", str(error)) from error
        except EnvFailure:
            self._discard()
            raise
        self._turns += 1
        said = [[c.name, c.arguments] for c in action.tool_calls if not self._only_reads(c)]
        if len(said) > desk.undone:
            text = json.dumps(said, sort_keys=True, default=str)
            self._history = hashlib.sha256(f"{self._history}\n{text}".encode()).hexdigest()
        terminated = result.ended or not action.tool_calls
        truncated = not terminated and self.max_turns is not None and self._turns >= self.max_turns
        info: dict[str, Any] = {"tool_errors": result.errors}
        reward = 0.0
        if terminated or truncated:
            self._over = True
            reward = self._grade(info)
        if desk.stopped or info.get("tests_stopped"):
            info["unrepeatable"] = "a limit was met: " + ", ".join(desk.stopped or [info["tests_stopped"]])
        elif desk.varying:
            info["unrepeatable"] = "may go otherwise next time: " + ", ".join(desk.varying)
        return Observation(result.messages), reward, terminated, truncated, info

    def _only_reads(self, call: ToolCall) -> bool:
        """Whether a call changes nothing: it only reads, or is a mistake that no tool sees."""
        chosen = self._unbound.by_name.get(call.name)
        return chosen is None or chosen.reads_only or call.arguments is None

    def _grade(self, info: dict[str, Any]) -> float:
        task, box, clean = self._task, self._box, self._clean
        if task is None or box is None or clean is None:
            raise RuntimeError("nothing to grade")
        found = testing.run_hidden(box, clean, task.tests, self.seconds)
        if isinstance(found, str):
            info.update(tests=(0, 0), soft=0.0, tests_stopped=found)
            return 0.0
        passed = found.passed if found.end is not None else 0  # an end from within says nothing of what came before
        info.update(tests=(passed, found.total), soft=passed / found.total if found.total else 0.0)
        return float(found.all_passed)

    def state_digest(self) -> str:
        """Hex sha256 of all that the episode depends on: its task, and the calls that may have changed something."""
        if self._task is None:
            raise RuntimeError("there is no state before the first reset()")
        turns = self._turns if self.max_turns is not None else 0  # without a limit nothing depends on their number
        rest = (self._history, turns, self._over, json.dumps(self.np_random.bit_generator.state, sort_keys=True))
        return hashlib.sha256(repr(rest).encode()).hexdigest()

    def snapshot(self) -> Snapshot:
        """Keep the present state. Raises `EnvFailure` ("snapshot_incomplete") when it cannot be kept whole."""
        box, clean, task = self._box, self._clean, self._task
        if box is None or clean is None or task is None:
            raise RuntimeError("there is no state before the first reset()")
        try:
            kept = box.snapshot()
        except SnapshotIncomplete as error:
            raise EnvFailure("snapshot_incomplete", "; ".join(error.reasons)) from error
        except BoxError as error:
            raise EnvFailure("box_failed", str(error)) from error
        rng = dict(self.np_random.bit_generator.state)
        state = _State(kept, clean, task, self._history, self._turns, self._over, rng)
        return Snapshot(ENV_ID, self.state_digest(), state)

    def rollback(self, snapshot: Snapshot) -> None:
        """Return to `snapshot`. Raises `EnvFailure` ("foreign_snapshot", or "box_failed" when it was let go)."""
        state = snapshot.state
        if snapshot.env_id != ENV_ID or not isinstance(state, _State) or self._box is None:
            raise EnvFailure("foreign_snapshot", "this snapshot was made by another environment")
        try:
            self._box.rollback(state.box)
        except BoxError as error:
            kind = "foreign_snapshot" if error.code == "foreign_snapshot" else "box_failed"
            raise EnvFailure(kind, str(error)) from error
        self._take(state)

    def branch(self, snapshot: Snapshot) -> CodeSandboxEnv:
        """A second environment that continues from `snapshot`, in a branch of the same box."""
        state = snapshot.state
        if snapshot.env_id != ENV_ID or not isinstance(state, _State) or self._box is None:
            raise EnvFailure("foreign_snapshot", "this snapshot was made by another environment")
        limits = self._limits
        made = CodeSandboxEnv(
            self.tasks, tools=self._offered, terse=self.terse, max_turns=self.max_turns, seconds=self.seconds,
            memory=limits.memory, pids=limits.pids,
        )  # fmt: skip
        try:
            made._box = self._box.branch(state.box)
        except BoxError as error:
            raise EnvFailure("box_failed", str(error)) from error
        made._workspace = self._workspace
        made._take(state)
        return made

    def _take(self, state: _State) -> None:
        self._clean, self._task, self._history = state.clean, state.task, state.history
        self._turns, self._over = state.turns, state.over
        self.np_random.bit_generator.state = state.rng

    def close(self) -> None:
        """End the box. Safe to repeat."""
        self._discard()
        self._over = True

    def _discard(self) -> None:
        box, self._box, self._clean = self._box, None, None
        if box is not None:
            box.close()
