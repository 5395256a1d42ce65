"""Training time to a pass@1: Espalier against stock TRL, on the same tasks, base and machine.

Always true: a contender trains in a process of its own, alone on the machine, at the settings that this run's sweep
found fastest for it; the order of the two turns with every seed; the clock counts sampling and updates and nothing of
set-up or evaluation, and every step of an arm as the median of the nine around it, so that what else the machine did
for a while does not count; held-out pass@1 is measured afterwards, from the adapters that both left, by one evaluator, on the
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
from dataclasses import replace
from pathlib import Path
from typing import Any

import _bench
from _curves import EVALUATION_SEED, Point, pass1
from comparison import NAMES, Arm, Outcome, Plan, Settings, Step, figures, outcome, settings_said
from espalier.configs.schema import RunConfig
from espalier.rollouts.digest import folder_digest
from espalier.trainer.errors import UserError
from espalier.trainer.policy import resolve_base
from page import plot, report

HERE = Path(__file__).resolve().parent
START_SECONDS = 900.0
"""Longest set-up of a contender (it generates its training tasks), beyond its training time."""

CLAIM = "Espalier reaches the target pass@1 in at most a third of the training time of stock TRL."

SWEEPS: dict[str, list[Settings]] = {
    "espalier": [{"sampler": s, "trainer": t} for s, t in ((1, 1), (1, 2), (2, 2))],
    "trl": [{"threads": n, "rows": 32, "at_once": at_once} for n in (1, 2) for at_once in (64, 256)],
}
"""What is tried for each: threads; for TRL also how many episodes it generates together."""

PARTS = {
    "everything on": (),
    "without the operation graph": ("--graph.enabled", "false"),
    "without the token tree": ("--trainer.shared_prefix", "flat"),
}
"""What one part contributes to Espalier's step, by leaving it out."""


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
        print(f"training: {NAMES[name]}, seed {seed}, {settings_said(settings)}, {plan.steps} steps", flush=True)
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


def parts(bench: _bench.Bench, plan: Plan, settings: Settings) -> list[dict[str, Any]]:
    """Espalier's median step with everything on, and with one part off at a time."""
    found = []
    for part, off in PARTS.items():
        short = replace(plan, steps=plan.part_steps, save_every=plan.part_steps, changes=(*plan.changes, *off))
        seconds = train(bench, short, "espalier", 0, settings).seconds_a_step
        found.append({"part": part, "contender": "espalier", "settings": settings, "seconds_a_step": seconds})
    return found


# ---- held-out pass@1


def measure(bench: _bench.Bench, plan: Plan, adapters: Sequence[Path | None], key: Mapping[str, Any]) -> list[float]:
    """Held-out pass@1 (sampled, T=1) of each adapter; None is the base. `key` names them for what is kept."""

    def run() -> list[float]:
        config = plan.config("--name", "evaluation", "--seed", str(EVALUATION_SEED))
        return pass1(config, plan.base, adapters, plan.tasks, bench.arms / "work" / "evaluation")

    what = {"what": "pass@1", "tasks": plan.tasks, "base": folder_digest(plan.base), **key}
    return bench.arm({**what, "config": _without_places(plan.config())}, run)


def curve(bench: _bench.Bench, plan: Plan, arm: Arm, base_pass1: float, *, wall: bool = False) -> list[Point]:
    """pass@1 over training seconds, by the arm's smooth clock or by the `wall`'s, from the base at 0 seconds on."""
    key = {"contender": arm.name, "seed": arm.seed, "settings": arm.settings, "steps": list(arm.adapters)}
    trained = {step: folder for step, folder in arm.adapters.items() if folder is not None}
    found = dict(zip(trained, measure(bench, plan, list(trained.values()), key), strict=True)) if trained else {}
    seconds = {row["step"]: row["seconds"] for row in arm.steps} if wall else arm.clock
    return [(0.0, base_pass1), *((seconds[step], found.get(step, base_pass1)) for step in arm.adapters)]


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
        plan = replace(plan, seeds=(0,), steps=2, save_every=1, part_steps=1, tasks=8, changes=small, settings=alone)

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
    off = parts(bench, plan, chosen["espalier"])
    runs: list[dict[str, Any]] = [*tried, *off]
    for arm in arms:
        points = next(o.curves[arm.name] for o in outcomes if o.seed == arm.seed)
        runs.append(
            {"contender": arm.name, "seed": arm.seed, "settings": arm.settings, "steps": arm.steps, "curve": points}
        )
    if bench.folder is not None:
        plot(outcomes, bench.folder / "plot.png")
        (bench.folder / "report.md").write_text(report(plan, numbers, outcomes, arms, tried, off), encoding="utf-8")
    bench.finish(CLAIM, plan.seeds, numbers, runs)


if __name__ == "__main__":
    main(sys.argv[1:])
