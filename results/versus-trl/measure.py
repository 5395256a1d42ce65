"""Training time to a pass@1: Espalier against stock TRL, on the same tasks, base and machine.

Always true: a contender trains in a process of its own, alone on the machine, at the settings that this run's sweep
found fastest for it; the order of the two turns with every seed; the clock counts sampling and updates and nothing of
set-up or evaluation, and every step of an arm as its median step, so that what else the machine did for a while does
not count; held-out pass@1 is measured afterwards, from the adapters that both left, by one evaluator, on the
same tasks with the same random keys. The target is the middle between the base and the final pass@1 of the weaker of
the two, so both get there.

Finished arms and measured curves are kept; a killed benchmark goes on behind the last of them.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any, TypedDict

import _bench
from _curves import EVALUATION_SEED, Point, pass1, time_to
from espalier.configs.load import load
from espalier.configs.schema import RunConfig
from espalier.rollouts.digest import folder_digest
from espalier.trainer.errors import UserError
from espalier.trainer.policy import resolve_base

HERE = Path(__file__).resolve().parent
NAMES = {"espalier": "Espalier", "trl": "stock TRL"}
START_SECONDS = 900.0
"""Longest set-up of a contender (it generates its training tasks), beyond its training time."""

CLAIM = "Espalier reaches the target pass@1 in at most a third of the training time of stock TRL."

Settings = dict[str, int]
SWEEPS: dict[str, list[Settings]] = {
    "espalier": [{"sampler": s, "trainer": t} for s, t in ((1, 1), (1, 2), (2, 2))],
    "trl": [{"threads": n, "rows": 32, "at_once": at_once} for n in (1, 2) for at_once in (64, 256)],
}
"""What is tried for each: threads; for TRL also how many episodes it generates together."""


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


@dataclass(frozen=True)
class Arm:
    """One contender's training. `steps` are all of them, `adapters` the saved ones by step (None: the base still)."""

    name: str
    seed: int
    settings: Settings
    steps: list[Step]
    adapters: dict[int, Path | None]

    @property
    def seconds_a_step(self) -> float:
        """The median over its steps."""
        return median(b - a for a, b in pairwise([0.0, *(row["seconds"] for row in self.steps)]))


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


# ---- arms


def train(bench: _bench.Bench, plan: Plan, name: str, seed: int, settings: Settings) -> Arm:
    """Train one contender in a process of its own, or take what is kept of it. Raises RuntimeError when it fails."""
    threads = {key: str(settings[key]) for key in ("sampler", "trainer") if key in settings}
    chosen = [word for key, n in threads.items() for word in (f"--{key}.threads", n)]
    what = {
        "what": "train",
        "contender": name,
        "seed": seed,
        "settings": settings,
        "save_every": plan.save_every,
        "cap_s": plan.cap_s,
        "base": folder_digest(plan.base),
        "config": _without_places(plan.config("--seed", str(seed), *chosen)),
    }
    folder = bench.arms / "work" / f"{name}-{seed}-{'-'.join(map(str, settings.values()))}-{plan.steps}"

    def run() -> list[dict[str, Any]]:
        print(f"training: {NAMES[name]}, seed {seed}, {_said(settings)}, {plan.steps} steps", flush=True)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        config = plan.config("--seed", str(seed), "--name", "run", "--out", str(folder), *chosen)
        (folder / "config.json").write_text(config.model_dump_json(), encoding="utf-8")
        job: dict[str, Any] = {"config": str(folder / "config.json")}
        if name == "trl":
            job |= {"save_every": plan.save_every, "cap_s": plan.cap_s, **settings}
        (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
        _process(HERE / f"contender_{name}.py", folder, START_SECONDS + 3 * plan.cap_s)
        rows: list[dict[str, Any]] = json.loads((folder / "log.json").read_text(encoding="utf-8"))["rows"]
        return rows

    rows = bench.arm(what, run)
    last = rows[-1]["step"]
    saved = [row for row in rows if row["step"] % plan.save_every == 0 or row["step"] == last]
    return Arm(
        name,
        seed,
        settings,
        [Step(step=r["step"], seconds=r["seconds"], reward=r["reward"], failed=r["failed"]) for r in rows],
        {row["step"]: folder / row["adapter"] if row["adapter"] else None for row in saved},
    )


def _process(script: Path, folder: Path, deadline_s: float) -> None:
    """Run a contender. Raises RuntimeError with the end of what it said when it fails."""
    said = folder / "said.txt"
    with said.open("w", encoding="utf-8") as file:
        command = [sys.executable, "-P", str(script), str(folder / "job.json")]
        done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, timeout=deadline_s, check=False)
    if done.returncode:
        end = "\n".join(said.read_text(encoding="utf-8", errors="replace").splitlines()[-15:])
        raise RuntimeError(f"{script.name} ended with {done.returncode}; the end of what it said:\n{end}")


def _without_places(config: RunConfig) -> dict[str, Any]:
    """What of a configuration decides an arm: all but where it stands on this machine."""
    values: dict[str, Any] = config.model_dump(mode="json", exclude={"name", "out"})
    values["policy"].pop("base")
    return values


def _said(settings: Settings) -> str:
    return ", ".join(f"{key} {value}" for key, value in settings.items())


def sweep(bench: _bench.Bench, plan: Plan, name: str) -> tuple[Settings, list[dict[str, Any]]]:
    """The fastest settings of a contender, by seconds a step behind the first, and all that were tried."""
    short = replace(plan, steps=plan.sweep_steps, save_every=plan.sweep_steps)
    tried: list[dict[str, Any]] = []
    for settings in SWEEPS[name]:
        steps = train(bench, short, name, 0, settings).steps
        seconds = (steps[-1]["seconds"] - steps[0]["seconds"]) / (len(steps) - 1)
        tried.append({"contender": name, "settings": settings, "seconds_a_step": seconds})
    best: Settings = min(tried, key=lambda row: row["seconds_a_step"])["settings"]
    return best, tried


# ---- held-out pass@1


def measure(bench: _bench.Bench, plan: Plan, adapters: Sequence[Path | None], key: Mapping[str, Any]) -> list[float]:
    """Held-out pass@1 (sampled, T=1) of each adapter; None is the base. `key` names them for what is kept."""

    def run() -> list[float]:
        config = plan.config("--name", "evaluation", "--seed", str(EVALUATION_SEED))
        return pass1(config, plan.base, adapters, plan.tasks, bench.arms / "work" / "evaluation")

    what = {"what": "pass@1", "tasks": plan.tasks, "base": folder_digest(plan.base), **key}
    return bench.arm({**what, "config": _without_places(plan.config())}, run)


def curve(bench: _bench.Bench, plan: Plan, arm: Arm, base_pass1: float, *, wall: bool = False) -> list[Point]:
    """pass@1 over training seconds, by the arm's median step or by the `wall`'s clock, from the base at 0 seconds on."""
    key = {"contender": arm.name, "seed": arm.seed, "settings": arm.settings, "steps": list(arm.adapters)}
    trained = {step: folder for step, folder in arm.adapters.items() if folder is not None}
    found = dict(zip(trained, measure(bench, plan, list(trained.values()), key), strict=True)) if trained else {}
    seconds = {row["step"]: row["seconds"] if wall else row["step"] * arm.seconds_a_step for row in arm.steps}
    return [(0.0, base_pass1), *((seconds[step], found.get(step, base_pass1)) for step in arm.adapters)]


def outcome(seed: int, curves: dict[str, list[Point]]) -> Outcome:
    """The target of a seed and when each contender reached it."""
    base = curves["espalier"][0][1]
    weaker = min(points[-1][1] for points in curves.values())
    target = (base + weaker) / 2
    reached = {name: time_to(points, target) if weaker > base else None for name, points in curves.items()}
    return Outcome(seed, curves, target, reached)


# ---- what comes out


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


def plot(outcomes: Sequence[Outcome], path: Path) -> None:
    """pass@1 over training seconds, a line a seed and contender; dots mark where the target was reached."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    drawing, axes = plt.subplots(figsize=(7.5, 4.2))
    for name, colour in (("espalier", "tab:green"), ("trl", "tab:gray")):
        for at, found in enumerate(outcomes):
            points = found.curves[name]
            axes.plot(*zip(*points, strict=True), color=colour, alpha=0.9, label=NAMES[name] if at == 0 else None)
            seconds = found.seconds[name]
            if seconds is not None:
                axes.plot([seconds], [found.target], "o", color=colour)
    for at, found in enumerate(outcomes):
        axes.axhline(found.target, color="black", linewidth=0.7, linestyle=":", label=None if at else "target")
    axes.set_xlabel("seconds of training (sampling and updates)")
    axes.set_ylabel("held-out tasks solved at the first try")
    axes.set_xlim(left=0)
    axes.set_ylim(0, 1)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower right")
    drawing.tight_layout()
    drawing.savefig(path, dpi=150)
    plt.close(drawing)


def report(
    plan: Plan,
    found: Mapping[str, float],
    outcomes: Sequence[Outcome],
    arms: Sequence[Arm],
    tried: Sequence[Mapping[str, Any]],
) -> str:
    """report.md."""
    machine, versions = _bench.machine(), _bench.versions()
    config = plan.config()
    episodes = config.trainer.groups * config.trainer.group_size
    lines = [
        f"| {o.seed} | {o.target:.3f} | {_seconds(o.seconds['espalier'])} | {_seconds(o.seconds['trl'])} "
        f"| {'-' if o.ratio is None else f'{o.ratio:.1f}'} | {_final(o, arms, 'espalier')} | {_final(o, arms, 'trl')} |"
        for o in outcomes
    ]
    sweeps = [f"| {NAMES[t['contender']]} | {_said(t['settings'])} | {t['seconds_a_step']:.1f} |" for t in tried]
    ratio = found.get("time_ratio")
    verdict = (
        "There is no target: the weaker contender did not get better than the base."
        if ratio is None
        else f"Espalier needed {found['seconds_espalier']:.0f} s of training for what took stock TRL "
        f"{found['seconds_trl']:.0f} s: **{ratio:.1f} times** as long (median of {len(outcomes)} seeds)."
    )
    lora, section, budget = config.policy.lora, config.trainer, config.episode
    rows, table = "\n".join(lines), "\n".join(sweeps)
    return f"""# Espalier against stock TRL

{verdict}

Both start from one base, which solves {found["base_pass1"]:.1%} of {plan.tasks} held-out tasks at the first try,
and train a LoRA adapter by GRPO on the same spreadsheet tasks. The target of a seed is the middle between the base and
where the weaker of the two ended, so both reach it; how long each trained until then is compared.

| seed | target | Espalier, s | TRL, s | ratio | Espalier's end | TRL's end |
|---|---|---|---|---|---|---|
{rows}

![pass@1 over training seconds](plot.png)

Machine: {machine["cpu"]}, {machine["cores"]} cores, {machine["system"]}.
trl {versions.get("trl")}, transformers {versions.get("transformers")}, torch {versions.get("torch")}.

## What is the same

The base, LoRA (rank {lora.rank}), loss ({section.loss}), learning rate ({section.learning_rate:g}),
{section.groups} groups of {section.group_size} episodes a step, temperature {config.sampling.temperature:g}, at most
{budget.max_turns} turns of {budget.max_turn_tokens} tokens, the training tasks and their order, the environment, its
tools and its grading. TRL's prompts are Espalier's token for token; the benchmark compares them before it trains and
stops if they differ. Both end an episode at `submit`: TRL has no way for an environment to end one, so its response
template reads a turn that submits as the last.

The clock counts sampling, updates, and for Espalier also storing and serving every version; set-up (loading, making
tasks) and evaluation are not in it. Every step counts as the median step of its arm, so that what else the machine did
for a while does not; by the wall's clock the ratio is {found.get("time_ratio_wall", float("nan")):.1f}. Training stops after {plan.steps} steps or {plan.cap_s:g} s. Both leave an adapter
every {plan.save_every} steps, and each is measured afterwards by the same evaluator: {plan.tasks} held-out tasks,
sampled at temperature 1, the same random keys. Between two adapters pass@1 is taken to lie on a straight line.

## What differs

Espalier samples with its embedded sampler, drops groups in which all episodes scored alike and samples others instead
(that costs it time), trains on recorded log-probabilities, and lets the policy mend a call that is not valid JSON.
TRL generates {episodes} episodes a step with transformers' `generate`, trains on groups without signal too (they
contribute nothing), counts the tokens of an episode without its prompt, and ends an episode at a call that it cannot
parse.

## Settings

Each ran at the fastest of these (seconds a step behind the first, seed 0):

| contender | settings | seconds a step |
|---|---|---|
{table}

In the runs themselves the median step took Espalier {found["seconds_a_step_espalier"]:.1f} s and TRL
{found["seconds_a_step_trl"]:.1f} s.
"""


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}"


def _final(found: Outcome, arms: Sequence[Arm], name: str) -> str:
    steps = next(arm.steps[-1] for arm in arms if (arm.name, arm.seed) == (name, found.seed))
    return f"{found.curves[name][-1][1]:.3f} after {steps['step']} steps, {steps['seconds']:.0f} s"


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, and write figures.json, report.md and plot.png."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--base", default="tiny")
    own, rest = parser.parse_known_args(argv)
    bench = _bench.start(__file__, "training time to a pass@1 (also: --base FOLDER, another base policy)", rest)
    try:
        base = resolve_base(own.base)
    except UserError as error:
        raise SystemExit(str(error)) from None
    plan = Plan(base, device=bench.device)
    if bench.quick:
        small = ("--trainer.groups", "2", "--trainer.group_size", "4", "--env.task_count", "16")
        alone: dict[str, Settings] = {"espalier": SWEEPS["espalier"][0], "trl": {"threads": 1, "rows": 8, "at_once": 8}}
        plan = replace(plan, seeds=(0,), steps=2, save_every=1, tasks=8, changes=small, settings=alone)

    tried: list[dict[str, Any]] = []
    chosen = dict(plan.settings or {})
    for name in () if chosen else NAMES:
        chosen[name], found = sweep(bench, plan, name)
        tried += found

    arms: list[Arm] = []
    for at, seed in enumerate(plan.seeds):
        for name in list(NAMES)[:: -1 if at % 2 else 1]:
            arms.append(train(bench, plan, name, seed, chosen[name]))
    base_pass1 = measure(bench, plan, [None], {"contender": "base"})[0]

    def reached(*, wall: bool) -> list[Outcome]:
        return [
            outcome(seed, {a.name: curve(bench, plan, a, base_pass1, wall=wall) for a in arms if a.seed == seed})
            for seed in plan.seeds
        ]

    outcomes = reached(wall=False)
    numbers = figures(outcomes, reached(wall=True), arms)
    runs: list[dict[str, Any]] = [*tried]
    for arm in arms:
        points = next(o.curves[arm.name] for o in outcomes if o.seed == arm.seed)
        runs.append(
            {"contender": arm.name, "seed": arm.seed, "settings": arm.settings, "steps": arm.steps, "curve": points}
        )
    if bench.folder is not None:
        plot(outcomes, bench.folder / "plot.png")
        (bench.folder / "report.md").write_text(report(plan, numbers, outcomes, arms, tried), encoding="utf-8")
    bench.finish(CLAIM, plan.seeds, numbers, runs)


if __name__ == "__main__":
    main(sys.argv[1:])
