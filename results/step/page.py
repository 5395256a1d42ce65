"""report.md and plot.png of the steps that were measured."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import _bench

PHASES = ("rollout", "turning", "train", "publish", "checkpoint")
"""What metrics.jsonl gives seconds of: one after another, together at most a step."""

NAMES = {
    "sampling": "sampling",
    "environment": "environments, rendering, storing",
    "turning": "the sampler asleep and awake again",
    "train": "training",
    "publish": "publishing the new version",
    "checkpoint": "checkpoint",
    "other": "the rest",
}


def parts(row: dict[str, Any]) -> dict[str, float]:
    """The phases of a step, which add up to it; `row` has its seconds, of a step or as medians."""
    wall = row.get("step_seconds", row.get("wall", 0.0))
    seconds = {name: row[f"seconds_{name}"] for name in PHASES}
    sampling = min(row["seconds_sampling"], seconds["rollout"])
    split = {"sampling": sampling, "environment": seconds.pop("rollout") - sampling, **seconds}
    return {**split, "other": max(0.0, wall - sum(split.values()))}


def plot(figures: dict[str, float], steps: Sequence[dict[str, Any]], path: Path) -> None:
    """A bar a step, and that of the medians, cut into phases."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    bars = {**{f"step {row['step']}": parts(row) for row in steps}, "median": parts(figures)}
    figure, axes = plt.subplots(figsize=(8, 1.4 + 0.45 * len(bars)))
    at = [0.0] * len(bars)
    for name, text in NAMES.items():
        widths = [found[name] for found in bars.values()]
        if max(widths) < 0.001 * max(sum(found.values()) for found in bars.values()):
            continue
        axes.barh(list(bars), widths, left=at, label=f"{text} ({widths[-1]:.2g} s)", height=0.7)
        at = [start + width for start, width in zip(at, widths, strict=True)]
    axes.invert_yaxis()
    axes.set_xlabel("seconds")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, ncols=2, loc="upper center", bbox_to_anchor=(0.45, -0.28 * 4.5 / (1 + len(bars))))
    figure.savefig(path, dpi=150, bbox_inches="tight")
    plt.close(figure)


def report(figures: dict[str, float], found: dict[str, Any], sampler: str, device: str) -> str:
    """report.md."""
    machine = _bench.machine()
    place = machine["gpu"] if device == "cuda" else f"{machine['cpu']}, {machine['cores']} cores"
    dtype = "bfloat16" if device == "cuda" else "float32"
    used = "the whole card" if device == "cuda" else "resident, the sampler in the same process"
    phases = "\n".join(
        f"| {NAMES[name]} | {value:.2f} s | {value / figures['step_seconds']:.0%} |"
        for name, value in parts(figures).items()
    )
    title = "Qwen3-4B's shape" if device == "cuda" else "a small shape on the CPU"
    small = f"""
**These numbers are of a small model ({
        figures["parameters"] / 1e6:.1f} million weights) on a CPU. They show that the script
measures, and say nothing about a 4B step on a card**: that is `espalier bench step --device cuda`, which writes to
`cuda/` beside this page.
"""
    speed = f"\nWhat `--dry-run` says beforehand: {found['plan_speed']}.\n" if found["plan_speed"] else ""
    return f"""# Whole steps of the 4B recipe: {title}
{small if device == "cpu" else ""}
![phases of a step](plot.png)

| of a step, median of {figures["steps"]:.0f} | {figures["step_seconds"]:.2f} s | share |
|---|---|---|
{phases}

| | |
|---|---|
| sampled tokens a second, rollout as a whole | {figures["sampled_tok_s"]:,.0f} |
| trained tokens a second: under the loss | {figures["trained_tok_s"]:,.0f} |
| trained tokens a second: computed, prompts included | {figures["processed_tok_s"]:,.0f} |
| tokens computed, over those that an update's rows do not share | {figures["processed_over_unique"]:.2f} |
| training's share of {figures["matmul_tflops"]:,.2f} Tflop/s (a large {dtype} product) | {figures["flop_share_train"]:.1%} |
| decoding's share of {figures["copy_gb_s"]:,.1f} GB/s (a large copy) | {figures["bandwidth_share_decode"]:.1%} |
| memory at its peak ({used}) | {figures["peak_gb"]:.2f} GB |
| the memory plan (`--dry-run`) says | {figures["plan_gb"]:.2f} GB, so the peak is {figures["memory_plan_ratio"]:.2f} of it |
{f"| of that the trainer's tensors at their peak | {figures['trainer_peak_gb']:.2f} GB |" if device == "cuda" else ""}
{speed}
## What was run

`espalier.train` with `configs/spreadsheet-qwen3-4b.toml` on {place}, {dtype}, sampler `{sampler}`:
{figures["episodes"]:.0f} episodes a step in groups, all sampled at once; {figures["steps"]:.0f} steps behind a first one
that does not count. Real spreadsheet tasks, all tools; prompts of {figures["prompt_tokens_mean"]:,.0f} tokens. Other
work on the machine kept {found["cores_of_others"]:.1f} of its {machine["cores"]} cores busy meanwhile. What differs from
the recipe:

* The base has random weights and the tiny policy's tokenizer, its vocabulary padded. That tokenizer needs more tokens for
  the same text, so tools are shown in their short form (`env.terse`): 4,300 characters instead of 10,400.
* Random weights write no call that could be carried out, so an episode is one turn, of exactly
  {figures["sampled_tokens_mean"]:,.0f} tokens (`episode.max_turn_tokens`), which are trained (`episode.cut_turns = "train"`),
  and the environment opens the workbook and grades it unchanged. What tools cost is in [spreadsheet](../{"../" * (device == "cuda")}spreadsheet/report.md).
* All would have the reward 0, so groups get rewards by chance; each is trained on.
* Random weights hardly prefer the 20 likeliest tokens to all others, and vLLM's log-probabilities are among these 20 only,
  so `alarms.max_logprob_gap` is out of the way.
* Fewer groups and smaller ones, a checkpoint after every step instead of every fifth, no evaluation between steps.

Training's operations are the model's: forward passes for the new, the old and the reference policy and one backward pass,
the adapter's matrices and attention included, what is computed again for memory's sake left out. Decoding's bytes are the
weights once for each token of all episodes, and each episode's own keys and values; its time is that until the last
episode had its tokens, reading prompts included. `limits.py` has the formulas and their sources. Both limits are measured
in the same run, before and after the training, the better one counted.
"""
