"""The page and the plot of the comparison with stock TRL."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import _bench
from comparison import AROUND, NAMES, Arm, Outcome, Plan, settings_said


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
    off: Sequence[Mapping[str, Any]],
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
    sweeps = [
        f"| {NAMES[t['contender']]} | {settings_said(t['settings'])} | {t['seconds_a_step']:.1f} |" for t in tried
    ]
    ratio = found.get("time_ratio")
    verdict = (
        "There is no target: the weaker contender did not get better than the base."
        if ratio is None
        else f"Espalier needed {found['seconds_espalier']:.0f} s of training for what took stock TRL "
        f"{found['seconds_trl']:.0f} s: **{ratio:.1f} times** as long (median of {len(outcomes)} seeds)."
    )
    lora, section, budget = config.policy.lora, config.trainer, config.episode
    rows, table = "\n".join(lines), "\n".join(sweeps)
    parts = "\n".join(f"| {row['part']} | {row['seconds_a_step']:.1f} |" for row in off)
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
tasks) and evaluation are not in it. Every step counts as the median of the {AROUND} around it, so that what else the machine
did for a while does not; by the wall's clock the ratio is {found.get("time_ratio_wall", float("nan")):.1f}. Training stops after {plan.steps} steps or {plan.cap_s:g} s. Both leave an adapter
every {plan.save_every} steps, and each is measured afterwards by the same evaluator: {plan.tasks} held-out tasks,
sampled at temperature 1, the same random keys. Between two adapters pass@1 is taken to lie on a straight line.

## What differs

Espalier samples with its embedded sampler, drops groups in which all episodes scored alike and samples others instead
(that costs it time), trains on recorded log-probabilities, and lets the policy mend a call that is not valid JSON.
TRL generates {episodes} episodes a step with transformers' `generate`, trains on groups without signal too (they
contribute nothing), counts the tokens of an episode without its prompt, and ends an episode at a call that it cannot
parse.

## What the parts contribute

Espalier's median step over its first {plan.part_steps} steps, seed 0, each in a fresh process:

| | seconds a step |
|---|---|
{parts}

## Settings

Each ran at the fastest of these (seconds of the step behind the first, one of each, seed 0):

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
