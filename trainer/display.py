"""What a person sees while a run goes on: a live panel on a terminal, plain lines anywhere else.

Fed by the event rows of `loop.train(on_event=...)`, the same that stand in metrics.jsonl. It only reads; an event it
does not know, or a field that is missing, is left out, so that what is drawn can never stop a run.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from .doctor import Finding

_MARKS = {"ok": ("ok", "green"), "warn": ("note", "yellow"), "bad": ("BAD", "red")}
_SPARKS = "▁▂▃▄▅▆▇█"
_WIDTH = 72


def show_findings(findings: Sequence[Finding], console: Console | None = None) -> None:
    """The doctor's table: one line a finding, the mend below what is not well."""
    console = console or Console(soft_wrap=True, highlight=False)
    for finding in findings:
        word, colour = _MARKS[finding.status]
        console.print(Text(f"{word:<5}", style=colour), Text(f"{finding.name:<14}{finding.detail}"))
        if finding.mend and finding.status != "ok":
            console.print(Text(f"{'':<6}{'':<14}-> {finding.mend}", style="bold"))


class Display:
    """A context manager whose `on_event` takes event rows. `steps` is how many training steps the run has."""

    def __init__(self, name: str, steps: int, console: Console | None = None) -> None:
        self.console = console or Console()
        self._name = name
        self._steps = steps
        self._phase = "starting"
        self._tasks = ""
        self._train: dict[str, Any] = {}
        self._rewards: list[float] = []
        self._evals: dict[str, list[dict[str, Any]]] = {}
        self._failures: Counter[str] = Counter()
        self._alarms: list[str] = []
        self._step_seconds: list[float] = []
        self._began = time.monotonic()
        self._live = Live(console=self.console, get_renderable=self._draw, refresh_per_second=2, transient=False)

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._live.stop()

    def on_event(self, row: Mapping[str, Any]) -> None:
        """Take one event row in; on a terminal the panel follows, elsewhere a line is printed."""
        match row.get("kind"):
            case "phase":
                self._phase = str(row.get("phase", ""))
            case "tasks":
                self._tasks = tasks_text(row)
            case "train":
                self._take_step(row)
            case "eval":
                self._evals.setdefault(str(row.get("mode", "sampled")), []).append(dict(row))
            case "alarm":
                self._alarms.append(str(row.get("message") or row.get("alarm") or dict(row)))
        if not self.console.is_terminal and (line := plain_line(row, self._steps)):
            self.console.print(Text(line), soft_wrap=True)

    def _take_step(self, row: Mapping[str, Any]) -> None:
        self._train = dict(row)
        if isinstance(row.get("reward_mean"), (int, float)):
            self._rewards.append(float(row["reward_mean"]))
        self._step_seconds.append(float(row.get("seconds_rollout") or 0) + float(row.get("seconds_train") or 0))
        self._failures.update({str(k): int(n) for k, n in (row.get("failures") or {}).items()})

    def seconds_left(self) -> float | None:
        """Estimate of the training that is left, from the median of recent steps; None before the first."""
        recent = sorted(self._step_seconds[-9:])
        if not recent:
            return None
        return recent[len(recent) // 2] * max(0, self._steps - int(self._train.get("step") or 0))

    def _draw(self) -> RenderableType:
        grid = Table.grid(padding=(0, 2))
        grid.add_column(style="dim", min_width=10)
        grid.add_column()
        step = int(self._train.get("step") or 0)
        grid.add_row("phase", self._phase)
        if self._tasks:
            grid.add_row("tasks", Text(self._tasks))
        grid.add_row("step", Group(Text(f"{step} of {self._steps}"), ProgressBar(self._steps, step, width=40)))
        if self._rewards:
            grid.add_row("reward", Text(f"{self._rewards[-1]:.3f}  {sparkline(self._rewards, 40)}"))
        for mode, rows in self._evals.items():
            grid.add_row(f"pass@1 {mode}", Text(_eval_text(rows)))
        if self._train:
            grid.add_row("speed", Text(f"{_number(self._train.get('tok_s'), 0)} tokens/s"))
            grid.add_row("entropy", Text(f"{_number(self._train.get('entropy'), 3)} nats a token"))
        failed = ", ".join(f"{kind} {n}" for kind, n in sorted(self._failures.items())) or "none"
        grid.add_row("failures", Text(f"{failed} (dropped, never scored)"))
        left = self.seconds_left()
        elapsed = time.monotonic() - self._began
        grid.add_row("time", Text(f"{clock(elapsed)} gone" + ("" if left is None else f", about {clock(left)} left")))
        for alarm in self._alarms[-3:]:
            grid.add_row("alarm", Text(alarm, style="bold red"))
        return Panel(grid, title=Text(self._name), width=min(self.console.width, _WIDTH + 8))


def plain_line(row: Mapping[str, Any], steps: int) -> str:
    """One event as one line of text; empty for kinds that are not shown."""
    match row.get("kind"):
        case "phase":
            return f"== {row.get('phase', '')}"
        case "tasks":
            return tasks_text(row)
        case "eval":
            return (
                f"pass@1 {row.get('mode', '')} {_number(row.get('pass1'), 3)} "
                f"[{_number(row.get('low'), 3)}, {_number(row.get('high'), 3)}] "
                f"on {row.get('n', '?')} tasks, version {row.get('version', '?')}"
            )
        case "train":
            failed = sum(int(n) for n in (row.get("failures") or {}).values())
            return (
                f"step {row.get('step', '?')}/{steps}  reward {_number(row.get('reward_mean'), 3)}  "
                f"entropy {_number(row.get('entropy'), 3)}  {_number(row.get('tok_s'), 0)} tokens/s  failures {failed}"
            )
        case "alarm":
            return f"ALARM {row.get('message') or row.get('alarm') or ''}"
    return ""


def tasks_text(row: Mapping[str, Any]) -> str:
    """A "tasks" row in one line: how many there are, and the first of those left out, with the reason."""
    said = f"{_number(row.get('train'), 0)} tasks to train on"
    if row.get("held_out"):
        said += f", {_number(row['held_out'], 0)} held out"
    for key, what in (("dropped", "left out"), ("noted", "noted")):
        if row.get(key):
            task, why = next(iter(row[key].items()))
            said += f"; {len(row[key])} {what}, the first: {task}: {why}"
    return said


def sparkline(values: Sequence[float], width: int) -> str:
    """The last values as block characters, from 0 to the largest of them (at least 1)."""
    top = max(1.0, *values)
    return "".join(_SPARKS[min(7, max(0, int(value / top * 8)))] for value in values[-width:])


def clock(seconds: float) -> str:
    """Seconds as m:ss, or h:mm:ss from an hour on."""
    whole = int(seconds)
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"


def _eval_text(rows: Sequence[Mapping[str, Any]]) -> str:
    first, last = rows[0], rows[-1]
    text = f"{_number(first.get('pass1'), 3)} at the start"
    if last is not first:
        text += f", now {_number(last.get('pass1'), 3)} [{_number(last.get('low'), 2)}, {_number(last.get('high'), 2)}]"
    return text


def _number(value: Any, digits: int) -> str:
    return f"{value:,.{digits}f}" if isinstance(value, (int, float)) else "-"
