"""Branching groups against independent ones: sampled tokens and environment steps to the same pass@1.

Both train the shipped spreadsheet policy by the shipped configuration, with as many groups, leaves and steps, on the
same tasks with the same seeds; only how a group comes about differs. A budget is what training sampled: tokens drawn,
and turns given to environments (before the operation graph, which both have, saves any of them). The target is the
middle between the base and the weaker contender's end; the worse of the two ratios counts.
"""

import json
import shutil
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from itertools import accumulate
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import _bench
from _curves import Point, pass1, time_to
from espalier.configs.load import load
from espalier.configs.schema import RunConfig
from espalier.trainer.policy import resolve_base
from page import plot, report

CLAIM = "Branching groups reach the same pass@1 with 0.7 times the tokens and steps of independent groups."
KINDS = {
    "independent": (),
    "branching": ("--branching.roots", "4", "--branching.at", "entropy", "--branching.rounds", "1"),
}
BUDGETS = ("sampled_tokens", "turns")
SAVE_EVERY = 4
Curves = dict[int, dict[str, dict[str, list[Point]]]]
"""Seed -> contender -> budget -> points of (budget, pass@1)."""


@dataclass(frozen=True)
class Plan:
    """What is compared: steps, seeds, held-out tasks of an evaluation, changes to the shipped configuration."""

    steps: int = 32
    seeds: tuple[int, ...] = (0, 1, 2)
    tasks: int = 400
    device: str = "cpu"
    changes: tuple[str, ...] = ()

    def config(self, kind: str, seed: int, out: Path) -> RunConfig:
        """The shipped configuration with groups of one kind; all versions are kept, evaluated is afterwards."""
        words = ["--name", f"{kind}-{seed}", "--seed", str(seed), "--out", str(out), "--policy.device", self.device]
        words += ["--trainer.steps", str(self.steps), "--schedule.keep_recent", str(self.steps + 1)]
        words += ["--eval.tasks", "2", "--eval.every", "0", "--eval.greedy", "false", *self.changes, *KINDS[kind]]
        return load("spreadsheet-tiny", words)


def carry_out(config: RunConfig) -> list[dict[str, Any]]:
    """Train, in a fresh process; a row a step."""
    from espalier.trainer.loop import train

    shutil.rmtree(config.out / config.name, ignore_errors=True)
    result = train(config)
    rows = [json.loads(line) for line in (Path(result["run"]) / "metrics.jsonl").read_text().splitlines()]
    keep = ("step", "version", *BUDGETS, "episodes", "reward_mean", "groups_used", "groups_no_signal", "failures")
    more = ("seconds_rollout", "seconds_train", "trained_tokens")
    return [
        {**{k: row[k] for k in (*keep, *more)}, "branching": row.get("branching"), "graph": row.get("graph")}
        for row in rows
        if row["kind"] == "train"
    ]


def arm(bench: _bench.Bench, plan: Plan, kind: str, seed: int) -> list[dict[str, Any]]:
    """One arm, run or kept."""
    config = plan.config(kind, seed, bench.arms / "work")

    def fresh() -> list[dict[str, Any]]:
        print(f"{kind}, seed {seed} ...", file=sys.stderr, flush=True)
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            return pool.submit(carry_out, config).result()

    return bench.arm({"what": "train", "config": config.model_dump(mode="json", exclude={"out"})}, fresh)


def curves(bench: _bench.Bench, plan: Plan, kind: str, seed: int) -> dict[str, list[Point]]:
    """pass@1 of every fourth version over each budget, from the base at 0 on."""
    rows = arm(bench, plan, kind, seed)
    saved = [i for i, row in enumerate(rows) if row["step"] % SAVE_EVERY == 0 or i == len(rows) - 1]
    config = plan.config(kind, seed, bench.arms / "work")
    versions = config.out / config.name / "policies"
    folders = [None, *(versions / f"v{rows[i]['version']:06d}" for i in saved)]

    def fresh() -> list[float]:
        print(f"evaluating {kind}, seed {seed} ...", file=sys.stderr, flush=True)
        evaluation = plan.config("independent", seed, bench.arms / "work")
        return pass1(
            evaluation, resolve_base(config.policy.base), folders, plan.tasks, bench.arms / "work" / "evaluation"
        )

    what = {"what": "pass@1", "tasks": plan.tasks, "config": config.model_dump(mode="json", exclude={"out"})}
    found = bench.arm(what, fresh)
    spent = {name: list(accumulate(float(row[name]) for row in rows)) for name in BUDGETS}
    return {name: list(zip([0.0, *(spent[name][i] for i in saved)], found, strict=True)) for name in BUDGETS}


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, and write figures.json, report.md and plot.png."""
    bench = _bench.start(__file__, __doc__ or "", argv)
    plan = Plan(device=bench.device)
    if bench.quick:
        small = ("--trainer.groups", "4", "--env.task_count", "16")
        plan = replace(plan, seeds=(0,), steps=2, tasks=6, changes=small)
    for at, seed in enumerate(plan.seeds):
        for kind in list(KINDS)[:: -1 if at % 2 else 1]:
            arm(bench, plan, kind, seed)
    found: Curves = {s: {kind: curves(bench, plan, kind, s) for kind in KINDS} for s in plan.seeds}
    arms = {(kind, s): arm(bench, plan, kind, s) for kind in KINDS for s in plan.seeds}
    reached = targets(found)
    figures = count(found, arms, reached)
    runs = [{"kind": k, "seed": s, "settings": KINDS[k], "steps": arms[k, s], "curves": found[s][k]} for k, s in arms]
    if bench.folder is not None:
        plot(found, reached, bench.folder / "plot.png")
        (bench.folder / "report.md").write_text(report(figures, found, reached), encoding="utf-8")
    bench.finish(CLAIM, plan.seeds, figures, [*runs, {"reached": reached}])


def targets(found: Curves) -> dict[int, dict[str, Any]]:
    """Of each seed the target, and what of each budget each contender had spent when it was reached. Seeds in which the
    weaker contender got no better than the base have no target.
    """
    reached: dict[int, dict[str, Any]] = {}
    for seed, by_kind in found.items():
        tokens = {kind: by_budget["sampled_tokens"] for kind, by_budget in by_kind.items()}
        base, weaker = tokens["independent"][0][1], min(points[-1][1] for points in tokens.values())
        if weaker > base:
            target = (base + weaker) / 2
            spent = {b: {kind: time_to(by_kind[kind][b], target) for kind in KINDS} for b in BUDGETS}
            reached[seed] = {"target": target, **spent}
    return reached


def count(
    found: Curves, arms: dict[tuple[str, int], list[dict[str, Any]]], reached: dict[int, dict[str, Any]]
) -> dict[str, float]:
    """The figures, medians over seeds. `budget_ratio` is missing where no seed has a target."""
    figures: dict[str, float] = {}
    for kind in KINDS:
        mine = [rows for (k, _), rows in arms.items() if k == kind]
        figures[f"pass1_{kind}"] = median(by_kind[kind]["turns"][-1][1] for by_kind in found.values())
        for budget in BUDGETS:
            figures[f"{budget}_{kind}"] = median(float(sum(row[budget] for row in rows)) for rows in mine)
        figures[f"no_signal_{kind}"] = median(
            sum(r["groups_no_signal"] for r in rows) / sum(r["groups_no_signal"] + r["groups_used"] for r in rows)
            for rows in mine
        )
        seconds = [sum(r["seconds_rollout"] + r["seconds_train"] for r in rows) / len(rows) for rows in mine]
        figures[f"seconds_a_step_{kind}"] = median(seconds)
    grown = [row["branching"] for (kind, _), rows in arms.items() if kind == "branching" for row in rows]
    figures["branch_share"] = sum(g["branches"] for g in grown) / sum(g["branches"] + g["trees"] for g in grown)
    if reached:
        ratios = {b: [one[b]["branching"] / one[b]["independent"] for one in reached.values()] for b in BUDGETS}
        figures["token_ratio"] = median(ratios["sampled_tokens"])
        figures["turn_ratio"] = median(ratios["turns"])
        figures["budget_ratio"] = median(map(max, *ratios.values()))
        figures["target_pass1"] = median(one["target"] for one in reached.values())
    return figures


if __name__ == "__main__":
    main(sys.argv[1:])
