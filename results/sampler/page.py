"""report.md and plot.png of the comparison of samplers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import _bench
from engine import SETTINGS

LABELS = {
    "1": "1",
    "16": "16",
    "64": "64",
    "64_distinct": "64,\nno shared prompts",
    "64_fixed": "64,\nequal lengths",
}


def plot(figures: dict[str, float], path: Path) -> None:
    """Bars of tokens per second, with the ratio above."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7.5, 4))
    bars = [("generate", "transformers generate"), ("embedded", "embedded sampler")]
    bars += [("vllm", "vLLM")] if "tok_s_vllm_64" in figures else []
    width = 0.8 / len(bars)
    for i, (who, text) in enumerate(bars):
        heights = [figures[f"tok_s_{who}_{name}"] for name in LABELS]
        axes.bar([x + width * (i - (len(bars) - 1) / 2) for x in range(len(LABELS))], heights, 0.95 * width, label=text)
    for x, name in enumerate(LABELS):
        height, place = figures[f"tok_s_embedded_{name}"], x + width * (1 - (len(bars) - 1) / 2)
        axes.text(place, height, f"{figures[f'ratio_generate_{name}']:.1f}x", ha="center", va="bottom")
    axes.set_xticks(range(len(LABELS)), list(LABELS.values()))
    axes.set_xlabel("episodes at once")
    axes.set_ylabel("sampled tokens per second")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def report(figures: dict[str, float], runs: Sequence[dict[str, Any]], rounds: int, device: str) -> str:
    """report.md."""
    machine = _bench.machine()
    rows = []
    for run in runs:
        name = run["case"]
        form = max(("generate_merged", "generate_adapter"), key=lambda form: median(run["tok_s"][form]))
        vllm = f"{figures[f'tok_s_vllm_{name}']:,.0f} ({run['threads']['vllm']})" if "vllm" in run["tok_s"] else "-"
        rows.append(
            f"| {LABELS[name].replace(chr(10), ' ')} | {figures[f'tok_s_embedded_{name}']:,.0f} "
            f"({run['threads']['embedded']}) | {figures[f'tok_s_generate_{name}']:,.0f} "
            f"({run['threads'][form]}, {form.removeprefix('generate_')}) | {figures[f'ratio_generate_{name}']:.1f} "
            f"| {vllm} |"
        )
    table = "\n".join(rows)
    place = machine["gpu"] if device == "cuda" else machine["cpu"]
    return f"""# The embedded sampler against transformers' generate

Sampled tokens per second, medians of {rounds} rounds, contenders alternating in one run on one machine
({place}, {machine["cores"]} cores, {machine["system"]}), float32, device {device}.

| episodes at once | embedded (threads) | generate (threads, form) | embedded : generate | vLLM (threads) |
|---|---|---|---|---|
{table}

![tokens per second](plot.png)

Largest difference between a recorded log-probability and the trainer's forward (transformers, adapter unmerged):
{figures["logprob_max_diff"]:.2g} nats.

What was run: first turns of the demo's training tasks on the shipped tiny policy with a LoRA adapter of rank 16 on all
linear layers, at temperature 1 without truncation: prompts of {figures["prompt_tokens_mean"]:.0f} tokens on average,
{figures["sampled_tokens_mean"]:.0f} sampled until the stop token. Groups of eight episodes share a prompt, as GRPO's do. With
16 and 64 at once there are 64 and 256 episodes: the embedded sampler lets the next one in when one has ended, `generate`
takes them in batches, padded on the left, and each batch runs until its longest episode has ended. Both compute the
log-probability of every sampled token; tokens after a stop token are not counted. Every round has new prompts, so
nothing is cached from an earlier one, and reading the prompts is inside the measured time.

Two more rows take away what real episodes give the embedded sampler. "No shared prompts": every episode has a prompt of
its own. "Equal lengths": every episode samples exactly 32 tokens, so that no batch waits for its longest.

Each contender runs at the thread setting that a sweep in this run found best for it; `generate` with the adapter merged
and unmerged, the better form counted. On a CPU vLLM runs at the fastest of {len(SETTINGS)} settings: one or two threads,
each bound to a core or not, waiting asleep or spinning. The sweeps and all rounds are in figures.json.
"""
