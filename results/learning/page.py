"""The page of the learning benchmark."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from _arms_page import Found, table


def verdict(figures: Mapping[str, float]) -> str:
    """Whether GRPO's interval stands apart from every control's, in words."""
    low, high = figures["final_pass1_low"], figures["best_control_pass1_high"]
    best = (
        "fine-tuning on its own successes" if figures["rejection_pass1"] >= figures["imitation_pass1"] else "imitation"
    )
    apart = "stands above" if low > high else "does not stand above"
    return (
        f"GRPO's lower bound, {low:.3f}, {apart} the upper bound of the best control ({best}), {high:.3f}: medians of "
        "the seeds."
    )


def report(
    found: Found,
    seeds: Sequence[int],
    titles: Mapping[str, str],
    figures: Mapping[str, float],
    machine: Mapping[str, Any],
) -> str:
    """The page: what was done, the table, what it means, limits."""
    lines = [
        "# Learning spreadsheets",
        "",
        "![pass@1 over steps, by family, and against the controls](plot.png)",
        "",
        f"The shipped base policy, {len(seeds)} training seeds, {found['base'][seeds[0]]['sampled']['n']} held-out "
        "tasks a seed (other layouts, sizes, words and wordings than in training), graded hard: the edits must give the right "
        "cells on the workbook seen and on three copies with other values. Sampled: T = 1, the whole distribution. "
        f"Machine: {machine['cpu']}, {machine['cores']} cores.",
        "",
        *table(found, seeds, titles),
    ]
    most = next(k for k in figures if k.startswith("base_pass") and k != "base_pass1")
    gain = figures["final_pass1"] - figures["base_pass1"]
    sharpened = (figures["base_greedy"] - figures["base_pass1"]) / max(gain, 1e-9)
    lines += [
        "",
        f"Doing nothing: {figures['do_nothing']:.3f}. The base's pass@{most.removeprefix('base_pass')}: "
        f"{figures[most]:.3f}. Training and both evaluations: {figures['minutes']:.1f} minutes, "
        f"{figures['peak_gb']:.2f} GB at the peak, {figures['episodes']:.0f} episodes; a prompt has "
        f"{figures['prompt_tokens']:.0f} tokens, an episode {figures['episode_tokens']:.0f}.",
        "",
        "## How much of it is sharpening",
        "",
        f"Sampling at temperature 0 alone takes the base from {figures['base_pass1']:.3f} to "
        f"{figures['base_greedy']:.3f}: {max(0.0, min(1.0, sharpened)):.0%} of the gain in sampled pass@1 needs no "
        f"learning and is sharpening. Greedy pass@1 itself rises by {figures['greedy_gain']:.3f}: there the "
        "habit that was the base's first choice was unlearnt. Nearly all of what the trained policy does, the base did now and then "
        f"(pass@{most.removeprefix('base_pass')} {figures[most]:.3f}): reinforcement learning chose among what was there.",
        "",
        "## Controls",
        "",
        verdict(figures),
        "",
        "* Fine-tuned on its own successes: as many episodes as GRPO used, all sampled from the base; distinct "
        "successes imitated for four epochs with the same adapter and optimizer, once at GRPO's learning rate and once at a "
        "sixth of it; the better of the two on the held-out tasks counts.",
        "* Imitation continued: the base's recipe on fresh demonstrations of the same faulty expert, for as long as "
        "GRPO trained (making the demonstrations is not counted).",
        "* Shuffled rewards: the same run, rewards dealt out at random among the episodes of a step.",
        "",
    ]
    return "\n".join(lines)
