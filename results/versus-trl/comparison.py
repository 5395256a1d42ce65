"""What is compared with stock TRL: how much is run, an arm, what both come to. No training here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import TypedDict

from _curves import Point, time_to
from espalier.configs.load import load
from espalier.configs.schema import RunConfig

NAMES = {"espalier": "Espalier", "trl": "stock TRL"}
Settings = dict[str, int]


@dataclass(frozen=True)
class Plan:
    """How much is run. `tasks`: held-out tasks of each evaluation; `changes`: beyond the shipped configuration."""

    base: Path
    seeds: tuple[int, ...] = (0, 1)
    steps: int = 60
    save_every: int = 3
    cap_s: float = 360.0
    tasks: int = 200
    sweep_steps: int = 2
    part_steps: int = 10
    changes: tuple[str, ...] = ()
    device: str = "cpu"
    settings: Mapping[str, Settings] | None = None

    def config(self, *more: str) -> RunConfig:
        """The tiny run, without evaluations of its own, keeping every version, and without what the two would do
        differently: drawing by difficulty, several updates a batch, a schedule that hangs on how many steps are done.
        """
        own = [
            "--policy.base",
            str(self.base),
            "--tracking.wandb",
            "off",
            "--schedule.keep_recent",
            str(self.steps + 1),
        ]
        own += ["--trainer.steps", str(self.steps), "--eval.deadline_s", str(self.cap_s), "--eval.early_stop", "none"]
        own += ["--policy.device", self.device, "--eval.tasks", "1", "--eval.every", "0", "--eval.greedy", "false"]
        own += ["--env.draw", "uniform", "--trainer.minibatches", "1", "--trainer.lr_schedule", "constant"]
        return load("spreadsheet-tiny", [*own, *self.changes, *more])


class Step(TypedDict):
    """One optimizer step of an arm: training seconds so far, mean reward of its episodes, how many had no verdict."""

    step: int
    seconds: float
    reward: float
    failed: int


AROUND = 9
"""How many steps a step is counted as the median of: what else a machine does for a while does not count then, and
what a step itself costs, which changes as the policy gets better, does.
"""


@dataclass(frozen=True)
class Arm:
    """One contender's training. `steps` are all of them, `adapters` the saved ones by step (None: the base still)."""

    name: str
    seed: int
    settings: Settings
    steps: list[Step]
    adapters: dict[int, Path | None]

    @property
    def durations(self) -> list[float]:
        """Of each step, seconds."""
        return [b - a for a, b in pairwise([0.0, *(row["seconds"] for row in self.steps)])]

    @property
    def seconds_a_step(self) -> float:
        """The median over its steps."""
        return median(self.durations)

    @property
    def clock(self) -> dict[int, float]:
        """Seconds until the end of each step, each counted as the median of the `AROUND` steps around it."""
        durations, half = self.durations, AROUND // 2
        smooth = [median(durations[max(0, at - half) : at + half + 1]) for at in range(len(durations))]
        return {row["step"]: sum(smooth[: at + 1]) for at, row in enumerate(self.steps)}


@dataclass(frozen=True)
class Outcome:
    """A seed: both curves, from the base on. `seconds` are None where the weaker one did not get better at all."""

    seed: int
    curves: dict[str, list[Point]]
    target: float
    seconds: dict[str, float | None]

    @property
    def ratio(self) -> float | None:
        """TRL's seconds over Espalier's."""
        ours, theirs = self.seconds["espalier"], self.seconds["trl"]
        return None if ours is None or theirs is None else theirs / ours


def outcome(seed: int, curves: dict[str, list[Point]]) -> Outcome:
    """The target of a seed and when each contender reached it."""
    base = curves["espalier"][0][1]
    weaker = min(points[-1][1] for points in curves.values())
    target = (base + weaker) / 2
    reached = {name: time_to(points, target) if weaker > base else None for name, points in curves.items()}
    return Outcome(seed, curves, target, reached)


def figures(outcomes: Sequence[Outcome], by_wall: Sequence[Outcome], arms: Sequence[Arm]) -> dict[str, float]:
    """Medians over seeds; figures about the target only where there is one. `by_wall`: the same by the wall's clock."""
    found = {"base_pass1": outcomes[0].curves["espalier"][0][1]}
    for name in NAMES:
        own = [arm for arm in arms if arm.name == name]
        found[f"final_pass1_{name}"] = median(o.curves[name][-1][1] for o in outcomes)
        found[f"steps_{name}"] = median(arm.steps[-1]["step"] for arm in own)
        found[f"seconds_a_step_{name}"] = median(arm.seconds_a_step for arm in own)
    found["steps"] = max(found["steps_espalier"], found["steps_trl"])
    reached = [o for o in outcomes if o.ratio is not None]
    if reached:
        found["target_pass1"] = median(o.target for o in reached)
        found["time_ratio"] = median(o.ratio for o in reached if o.ratio is not None)
        found["time_ratio_wall"] = median(o.ratio for o in by_wall if o.ratio is not None)
        for name in NAMES:
            found[f"seconds_{name}"] = median(s for o in reached if (s := o.seconds[name]) is not None)
    return found


def settings_said(settings: Settings) -> str:
    """Settings as words."""
    return ", ".join(f"{key} {value}" for key, value in settings.items())
