"""SpreadsheetEnv: an agent edits a real workbook with tools, submits it, and is graded by its answer cells.

Always true: between `reset` and the submission neither a file nor openpyxl is touched (`code_interpreter` excepted);
golden values stay outside everything a tool can reach; the reward is 1.0 exactly when every case passes, 0.0 when one
fails, and NaN with `info["ungraded"]` when the engines give no verdict; nothing that breaks on our side becomes a
reward. An episode is a pure function of task and actions: the digest of a state is that of its history and of the
engine's own bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..core import Action, AgentEnv, EnvFailure, Message, Observation, Snapshot
from ..spaces import ActionSpace, ObservationSpace
from ..tools import Tool, Toolset
from ..turn import TurnLimits, run_calls
from .cache import BookCache, shared_cache
from .coding import CODING
from .edits import Edit
from .ending import ENDING
from .engines import choose_referee, get_engine
from .engines.base import EngineError
from .filling import FILLING
from .formatting import FORMATTING
from .interpreter import CodeLimits, CodeRunner, Isolation
from .package import PackageError
from .reading import READING
from .scoring import Scorer
from .structure import STRUCTURE
from .task import SpreadsheetTask
from .text import extent_text
from .workspace import Opened, Workspace
from .writing import WRITING

ENV_ID = "espalier/Spreadsheet-v0"
TOOLS = Toolset((*READING, *WRITING, *FILLING, *FORMATTING, *STRUCTURE, *CODING, *ENDING))
"""Every tool, not bound to a workbook."""


@dataclass(frozen=True)
class _State:
    """Everything an episode depends on; what a `Snapshot` carries."""

    task: SpreadsheetTask
    book: bytes
    journal: tuple[Edit, ...]
    history: str
    rng: dict[str, Any]
    over: bool
    turns: int
    whole: bool


@dataclass(frozen=True)
class _Options:
    """The constructor's options, which a branch shares with its origin."""

    tools: tuple[str, ...]
    terse: bool
    engine: str
    crosscheck: str | None
    referee: str
    show_answer_position: bool
    show_sheets: bool
    perturbed: bool
    stop_at_failure: bool
    max_turns: int | None
    code_isolation: Isolation
    code_limits: CodeLimits


class SpreadsheetEnv(AgentEnv):
    """Espalier's flagship environment.

    `tasks`: `SpreadsheetTask`s, or a source as `EnvSection.tasks` takes it (then `split`, `seed` and `count` choose).
    `tools`: names of those offered (empty: all); `terse`: shortest schemas. `perturbed`: edits are replayed on every
    case (hard), else the first one decides; `stop_at_failure`: cases after a failed one are not graded, except in an
    evaluation (the reward is the same, "soft" becomes a lower bound, and training saves time).
    `referee`: who settles answer cells on which `engine` and `crosscheck` disagree: "libreoffice", "none", "auto"
    (LibreOffice 24.8 or newer where it is installed), or "libreoffice 25.2.3.2", that version only; it changes no
    verdict that the two agree on. `max_turns`: turns after which an episode is truncated, and graded as it stands
    (None: no limit here). `code_isolation`: how code_interpreter is held in; where it cannot be, the tool refuses (see
    `interpreter`).
    Raises `ValueError` for an unknown tool, engine or referee, `EngineError` for a referee that is not installed.
    """

    metadata = {"render_modes": []}  # noqa: RUF012  (Gymnasium's own way)
    acts_by_calls = True
    snapshots_travel = True

    def __init__(
        self,
        tasks: Sequence[SpreadsheetTask] | str = "generated",
        *,
        tools: Sequence[str] = (),
        terse: bool = False,
        engine: str = "ironcalc",
        crosscheck: str | None = "formualizer",
        referee: str = "auto",
        show_answer_position: bool = True,
        show_sheets: bool = True,
        perturbed: bool = True,
        stop_at_failure: bool = False,
        max_turns: int | None = None,
        code_isolation: Isolation = "namespaces",
        code_seconds: float = 120.0,
        code_memory_mb: int = 1024,
        split: str = "train",
        seed: int = 0,
        count: int = 2000,
        cache: BookCache | None = None,
    ) -> None:
        if isinstance(tasks, str):
            from .datasets import load_tasks  # pyarrow and openpyxl: only who loads tasks pays for them

            tasks = load_tasks(tasks, split=split, seed=seed, count=count)
        if not len(tasks):
            raise ValueError("there are no tasks: give at least one SpreadsheetTask")
        self.tasks = tasks
        self.terse = terse
        limits = CodeLimits(seconds=code_seconds, memory_mb=code_memory_mb)
        referee = choose_referee(referee)
        self._options = _Options(
            tuple(tools), terse, engine, crosscheck, referee, show_answer_position, show_sheets, perturbed,
            stop_at_failure, max_turns, code_isolation, limits,
        )  # fmt: skip
        self._cache = cache if cache is not None else shared_cache()
        self._engine = get_engine(engine)
        self._scorer = Scorer(self._engine, self._cache, crosscheck, referee, perturbed)
        self.workspace = Workspace(self._engine, CodeRunner(limits, code_isolation))
        self._toolset = (TOOLS.select(tools) if tools else TOOLS).bind(self.workspace)
        self._task: SpreadsheetTask | None = None
        self._over = True
        self._whole = not stop_at_failure
        self._turns = 0
        self.action_space = ActionSpace(self._toolset)
        self.observation_space = ObservationSpace()

    @property
    def tools(self) -> Sequence[Tool]:
        """The tools offered, in a stable order."""
        return self._toolset.tools

    @property
    def journal(self) -> tuple[Edit, ...]:
        """The edits made so far."""
        return self.workspace.journal

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Start `options["task"]`, or a task drawn by the seeded generator; `options["evaluation"]`: grade every case.

        The info's "workbook_notes" say what was taken out of the workbook, if anything was. Raises `EnvFailure`
        ("workbook_unreadable") when it cannot be opened.
        """
        super().reset(seed=seed)
        task = (options or {}).get("task")
        if task is None:
            task = self.tasks[int(self.np_random.integers(len(self.tasks)))]
        if not isinstance(task, SpreadsheetTask) or not task.cases:
            raise TypeError('options["task"] must be a SpreadsheetTask with at least one case')
        opened = self._open(task)
        self.workspace.load(opened)
        self._task, self._over, self._turns = task, False, 0
        self._whole = bool((options or {}).get("evaluation")) or not self._options.stop_at_failure
        info: dict[str, Any] = {"task": task, **({"workbook_notes": list(opened.notes)} if opened.notes else {})}
        return Observation((Message(role="user", content=self._opening(task, opened)),)), info

    def _open(self, task: SpreadsheetTask) -> Opened:
        try:
            return self._cache.get(self._engine, task.cases[0])
        except (EngineError, PackageError) as error:
            raise EnvFailure("workbook_unreadable", f"task {task.id}: {error}") from error

    def _opening(self, task: SpreadsheetTask, opened: Opened) -> str:
        text = task.instruction
        if self._options.show_answer_position:
            text += f"\nAnswer: {task.answer_position}"
        if self._options.show_sheets:
            text += "\nSheets: " + "; ".join(f"{name} {extent_text(rect)}" for name, rect, _ in opened.sheets)
        return text

    def step(self, action: Action) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Carry out one turn; a turn without a call, or a submit, ends the episode, and the end is graded.

        At the end `info` says "cases" (passed or not, in order), "soft" (share passed), "collateral" (cells changed
        outside the answer), "verdict", and "ungraded" with the reason when there is no verdict (the reward is NaN
        then).
        """
        if self._task is None or self._over:
            raise RuntimeError("the episode is over (or was never started): call reset() before step()")
        self.workspace.met.clear()
        result = run_calls(self._toolset, action.tool_calls, TurnLimits())
        self._turns += 1
        most = self._options.max_turns
        terminated = result.ended or not action.tool_calls
        truncated = not terminated and most is not None and self._turns >= most
        info: dict[str, Any] = {"tool_errors": result.errors}
        reward = 0.0
        if terminated or truncated:
            self._over = True
            reward, verdict = self._scorer.score(self._task, self.workspace, whole=self._whole)
            info.update(verdict)
        if self.workspace.met:
            info["unrepeatable"] = "a limit was met: " + ", ".join(self.workspace.met)
        return Observation(result.messages), reward, terminated, truncated, info

    def export(self) -> bytes:
        """The edited workbook as .xlsx: the original package, changed where the agent changed it. Raises
        `EnvFailure`.
        """
        return self.workspace.export()

    def close(self) -> None:
        """End what code_interpreter has started. Safe to repeat."""
        self.workspace.code.close()

    def state_digest(self) -> str:
        """Hex sha256 of everything the episode depends on."""
        return self._digest(self._state())

    def snapshot(self) -> Snapshot:
        """Keep the present state. Raises `RuntimeError` before the first reset."""
        state = self._state()
        return Snapshot(ENV_ID, self._digest(state), (self._options, state), len(state.book))

    def rollback(self, snapshot: Snapshot) -> None:
        """Return to `snapshot`. Raises `EnvFailure` ("foreign_snapshot") when another kind of environment made it."""
        options, state = snapshot.state if snapshot.env_id == ENV_ID and snapshot.state else (None, None)
        if options != self._options or not isinstance(state, _State):
            raise EnvFailure("foreign_snapshot", "this snapshot was made by another environment or with other options")
        self.workspace.load(self._open(state.task), state.book, state.journal, state.history)
        self.np_random.bit_generator.state = state.rng
        self._task, self._over, self._turns, self._whole = state.task, state.over, state.turns, state.whole

    def branch(self, snapshot: Snapshot) -> SpreadsheetEnv:
        """A second environment that continues from `snapshot`; only the cache of starting workbooks is shared."""
        made = _like(self)
        made.rollback(snapshot)
        return made

    def _state(self) -> _State:
        if self._task is None:
            raise RuntimeError("there is no state before the first reset()")
        space = self.workspace
        rng = dict(self.np_random.bit_generator.state)
        return _State(
            self._task, space.book.snapshot(), space.journal, space.history, rng, self._over, self._turns, self._whole
        )

    def _digest(self, state: _State) -> str:
        names = ("rng", "over", "whole") if self._options.max_turns is None else ("rng", "over", "turns", "whole")
        rest = {name: getattr(state, name) for name in names}  # without a limit nothing depends on the turns' number
        rest["engine"] = self._options.engine
        parts = (state.task.digest, state.history, json.dumps(rest, sort_keys=True, default=str))
        return hashlib.sha256("\n".join(parts).encode() + b"\n" + state.book).hexdigest()


def _like(env: SpreadsheetEnv) -> SpreadsheetEnv:
    """A new environment with the options, tasks and cache of `env`."""
    options = env._options
    return SpreadsheetEnv(
        env.tasks,
        tools=options.tools,
        terse=options.terse,
        engine=options.engine,
        crosscheck=options.crosscheck,
        referee=options.referee,
        show_answer_position=options.show_answer_position,
        show_sheets=options.show_sheets,
        perturbed=options.perturbed,
        stop_at_failure=options.stop_at_failure,
        max_turns=options.max_turns,
        code_isolation=options.code_isolation,
        code_seconds=options.code_limits.seconds,
        code_memory_mb=options.code_limits.memory_mb,
        cache=env._cache,
    )
