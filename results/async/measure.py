"""Wall time to a pass@1: sampling while training against taking turns, on the same machine.

Always true: both schedules run the shipped tiny configuration with the same seed, tasks and number of steps, each in a
process of its own at the thread setting that this run's sweep found fastest for it; the order of the two turns with every
seed; the clock is the wall's, from the first step's beginning on, and no evaluation runs within it: held-out pass@1 is
measured afterwards from the versions that both left. The target is the middle between the base and the final pass@1 of
the weaker of the two.

Finished arms are kept; a killed benchmark goes on behind the last of them.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import _bench
from _curves import Point, pass1, time_to
from espalier.configs.load import load
from espalier.configs.schema import RunConfig
from espalier.trainer.policy import resolve_base

KINDS = ("sync", "async")
CLAIM = "Sampling while training reaches the same pass@1 sooner, and throws nothing away."
THREADS = (1, 2)
SAVE_EVERY = 4


@dataclass(frozen=True)
class Plan:
    """How much is run. `tasks`: held-out tasks of each evaluation; `changes`: beyond the shipped configuration."""

    seeds: tuple[int, ...] = (0, 1)
    steps: int = 28
    tasks: int = 300
    staleness: int = 1
    sweep_steps: int = 4
    changes: tuple[str, ...] = ()
    device: str = "cpu"

    def config(self, kind: str, seed: int, threads: int, steps: int, out: Path) -> RunConfig:
        """One arm: every version is kept, nothing is evaluated on the way; off-policy correction for both."""
        own = ["--name", f"{kind}-{seed}-{threads}-{steps}", "--seed", str(seed), "--out", str(out)]
        own += ["--schedule.kind", kind, "--schedule.max_staleness", str(self.staleness)]
        own += ["--schedule.keep_recent", str(steps + 1), "--trainer.steps", str(steps)]
        own += ["--trainer.off_policy_correction", "token_truncate", "--trainer.threads", str(threads)]
        own += ["--policy.device", self.device, "--tracking.wandb", "off"]
        own += ["--eval.tasks", "1", "--eval.every", "0", "--eval.greedy", "false"]
        return load("spreadsheet-tiny", [*own, *self.changes])


def carry_out(config: RunConfig) -> dict[str, Any]:
    """Train, in a fresh process. `steps`: a row each, with wall seconds since the first step began; `stored`: how many
    trajectories were sampled; `discarded`: how many of them no step was given.
    """
    from espalier.rollouts.store import TrajectoryStore
    from espalier.trainer.checkpoint import CheckpointStore
    from espalier.trainer.loop import train

    shutil.rmtree(config.out / config.name, ignore_errors=True)
    result = train(config)
    rows = [json.loads(line) for line in (Path(result["run"]) / "metrics.jsonl").read_text().splitlines()]
    began = next(row["time"] for row in rows if row["kind"] == "phase" and row["phase"] == "training")
    keep = ("step", "version", "staleness_mean", "staleness_max", "episodes", "groups_used", "reward_mean")
    more = ("seconds_rollout", "seconds_train", "sampled_tokens")
    steps = [
        {"wall": row["time"] - began, **{k: row[k] for k in (*keep, *more)}} for row in rows if row["kind"] == "train"
    ]
    store = TrajectoryStore(Path(result["run"]) / "trajectories", readonly=True)
    stored = set(store.ids())
    store.close()
    checkpoint = CheckpointStore(Path(result["run"]) / "checkpoints").newest()
    given = set(checkpoint.progress.consumed) if checkpoint else set()
    return {"steps": steps, "stored": len(stored), "discarded": len(stored - given)}


def arm(bench: _bench.Bench, plan: Plan, kind: str, seed: int, threads: int, steps: int) -> dict[str, Any]:
    """One arm, run or kept; see `carry_out`."""
    config = plan.config(kind, seed, threads, steps, bench.arms / "work")

    def fresh() -> dict[str, Any]:
        print(f"{kind}, seed {seed}, {threads} trainer threads, {steps} steps ...", file=sys.stderr, flush=True)
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            return pool.submit(carry_out, config).result()

    return bench.arm({"what": "train", "config": config.model_dump(mode="json", exclude={"out"})}, fresh)


def curve(bench: _bench.Bench, plan: Plan, kind: str, seed: int, threads: int) -> list[Point]:
    """pass@1 of every fourth version over wall time, from the base at 0 seconds on."""
    rows = arm(bench, plan, kind, seed, threads, plan.steps)["steps"]
    saved = [row for row in rows if row["step"] % SAVE_EVERY == 0 or row["step"] == rows[-1]["step"]]
    config = plan.config(kind, seed, threads, plan.steps, bench.arms / "work")
    versions = config.out / config.name / "policies"
    folders = [None, *(versions / f"v{row['version']:06d}" for row in saved)]

    def fresh() -> list[float]:
        print(f"evaluating {kind}, seed {seed} ...", file=sys.stderr, flush=True)
        evaluation = plan.config("sync", seed, threads, plan.steps, bench.arms / "work")
        base = resolve_base(config.policy.base)
        return pass1(evaluation, base, folders, plan.tasks, bench.arms / "work" / "evaluation")

    what = {"what": "pass@1", "tasks": plan.tasks, "config": config.model_dump(mode="json", exclude={"out"})}
    found = bench.arm(what, fresh)
    return list(zip([0.0, *(row["wall"] for row in saved)], found, strict=True))


def sweep(bench: _bench.Bench, plan: Plan, kind: str) -> tuple[int, dict[int, float]]:
    """The trainer's threads with the shortest step behind the first, and what was tried."""
    tried = {}
    for threads in THREADS:
        rows = arm(bench, plan, kind, 0, threads, plan.sweep_steps)["steps"]
        tried[threads] = (rows[-1]["wall"] - rows[0]["wall"]) / (len(rows) - 1)
    return min(tried, key=lambda threads: tried[threads]), tried


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, and write figures.json, report.md and plot.png."""
    bench = _bench.start(__file__, __doc__ or "", argv)
    plan = Plan(device=bench.device)
    if bench.quick:
        small = ("--trainer.groups", "2", "--trainer.group_size", "4", "--env.task_count", "16")
        plan = replace(plan, seeds=(0,), steps=2, tasks=6, changes=small)
    tried: dict[str, dict[int, float]] = {kind: {} for kind in KINDS}
    threads = dict.fromkeys(KINDS, 1)
    if not bench.quick:
        for kind in KINDS:
            threads[kind], tried[kind] = sweep(bench, plan, kind)
    for at, seed in enumerate(plan.seeds):
        for kind in KINDS[:: -1 if at % 2 else 1]:
            arm(bench, plan, kind, seed, threads[kind], plan.steps)
    found = {s: {kind: curve(bench, plan, kind, s, threads[kind]) for kind in KINDS} for s in plan.seeds}
    arms = {(k, s): arm(bench, plan, k, s, threads[k], plan.steps) for k in KINDS for s in plan.seeds}
    figures, reached = count(found, arms)
    runs: list[Any] = [{"threads": threads, "seconds_a_step_by_threads": tried, "max_staleness": plan.staleness}]
    runs += [{"kind": k, "seed": s, **arms[k, s], "curve": found[s][k]} for k, s in arms]
    if bench.folder is not None:
        plot(found, reached, bench.folder / "plot.png")
        (bench.folder / "report.md").write_text(report(plan, figures, threads, arms), encoding="utf-8")
    bench.finish(CLAIM, plan.seeds, figures, runs)


Curves = dict[int, dict[str, list[Point]]]
Arms = dict[tuple[str, int], dict[str, Any]]


def count(found: Curves, arms: Arms) -> tuple[dict[str, float], dict[int, dict[str, float]]]:
    """The figures, medians over seeds, and when each schedule reached the target of each seed."""
    reached: dict[int, dict[str, float]] = {}
    for seed, curves in found.items():
        base, weaker = curves["sync"][0][1], min(points[-1][1] for points in curves.values())
        target = (base + weaker) / 2
        times = {kind: time_to(points, target) for kind, points in curves.items()}
        if weaker > base:
            reached[seed] = {"target": target, **{kind: t for kind, t in times.items() if t is not None}}
    ahead = [arm for (kind, _), arm in arms.items() if kind == "async"]
    stale = [row for arm in ahead for row in arm["steps"]]
    figures = {
        "staleness_max": max(row["staleness_max"] for row in stale),
        "staleness_mean": sum(r["staleness_mean"] * r["episodes"] for r in stale) / sum(r["episodes"] for r in stale),
        "discarded_share": sum(arm["discarded"] for arm in ahead) / sum(arm["stored"] for arm in ahead),
        **{f"pass1_{kind}": median(curves[kind][-1][1] for curves in found.values()) for kind in KINDS},
        **{
            f"seconds_a_step_{kind}": median(
                arm["steps"][-1]["wall"] / len(arm["steps"]) for (k, _), arm in arms.items() if k == kind
            )
            for kind in KINDS
        },
    }
    if reached:
        figures["time_ratio"] = median(times["sync"] / times["async"] for times in reached.values())
        figures["target_pass1"] = median(times["target"] for times in reached.values())
    return figures, reached


def plot(found: Curves, reached: dict[int, dict[str, float]], path: Path) -> None:
    """pass@1 over wall time, a line a seed and schedule; dots mark where the target was reached."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7.5, 4.2))
    for at, (seed, curves) in enumerate(found.items()):
        for kind, colour in (("async", "tab:green"), ("sync", "tab:gray")):
            axes.plot(*zip(*curves[kind], strict=True), color=colour, label=kind if at == 0 else None)
            if seed in reached:
                axes.plot([reached[seed][kind]], [reached[seed]["target"]], "o", color=colour)
    axes.set(xlabel="seconds of wall time", ylabel="held-out tasks solved at the first try", ylim=(0, 1))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def report(plan: Plan, figures: dict[str, float], threads: dict[str, int], arms: Arms) -> str:
    """report.md."""
    machine = _bench.machine()
    stale = [row for (kind, _), arm in arms.items() if kind == "async" for row in arm["steps"]]
    ages = Counter(round(row["staleness_mean"], 1) for row in stale)
    table = ", ".join(f"{age:g}: {n} steps" for age, n in sorted(ages.items()))
    ratio = figures.get("time_ratio")
    verdict = "The weaker of the two did not get better than the base, so there is no target."
    if ratio is not None:
        verdict = f"Taking turns took {ratio:.2f} times the wall time of sampling while training."
    return f"""# Sampling while training

{verdict}

![pass@1 over wall time](plot.png)

| | sync | async |
|---|---|---|
| final pass@1, held-out | {figures["pass1_sync"]:.3f} | {figures["pass1_async"]:.3f} |
| wall seconds a step | {figures["seconds_a_step_sync"]:.1f} | {figures["seconds_a_step_async"]:.1f} |
| trainer threads, the best of a sweep | {threads["sync"]} | {threads["async"]} |
| staleness, mean / largest, versions | 0 / 0 | {figures["staleness_mean"]:.2f} / {figures["staleness_max"]:.0f} |
| episodes thrown away for their age | 0 | {figures["discarded_share"]:.0%} |

Mean staleness of a step's episodes (async): {table}.

The shipped tiny configuration on {machine["cpu"]}, {machine["cores"]} cores: {plan.steps} steps, {len(plan.seeds)} seeds,
`schedule.max_staleness` = {plan.staleness}, the same off-policy correction for both; {plan.tasks} held-out tasks an
evaluation, after training, from every fourth version. Sampler, environment and trainer share the cores: what one core or
GPU each would give is not measured here.
"""


if __name__ == "__main__":
    main(sys.argv[1:])
