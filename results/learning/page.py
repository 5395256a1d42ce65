"""The plot and the page of the learning benchmark."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

Found = Mapping[str, Mapping[int, Mapping[str, Any]]]


def draw(found: Found, seeds: Sequence[int], titles: Mapping[str, str], path: Path) -> None:
    """Three panels: pass@1 over steps, by family before and after, all contenders with intervals."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (curve, families, contenders) = pyplot.subplots(1, 3, figsize=(16, 5), width_ratios=(1.1, 1.4, 1.2))
    for seed in seeds:
        rows = [r for r in found["grpo"][seed]["curve"] if r["mode"] == "sampled"]
        curve.plot([r["step"] for r in rows], [r["pass1"] for r in rows], marker="o", ms=3, label=f"seed {seed}")
    curve.set(xlabel="optimizer step", ylabel="pass@1 on held-out tasks, sampled", ylim=(0, 1), title="Learning")
    curve.legend(frameon=False)
    names, before, after = by_family(found, seeds)
    places = range(len(names))
    families.bar([p - 0.2 for p in places], before, 0.4, color="#b8b8b8", label="base")
    families.bar([p + 0.2 for p in places], after, 0.4, color="#2a7f62", label="after GRPO")
    families.set_xticks(list(places), names, rotation=40, ha="right")
    families.set(ylim=(0, 1))
    families.set_title("By family (median of seeds)", pad=28)
    families.legend(frameon=False, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    for place, arm in enumerate(reversed(list(titles))):
        for seed in seeds:
            got = found[arm][seed]["sampled"]
            contenders.plot([got["low"], got["high"]], [place + seed * 0.12] * 2, color="#888888", lw=2)
            contenders.plot(got["pass1"], place + seed * 0.12, "o", color="#2a7f62" if arm == "grpo" else "#444444")
    contenders.set_yticks(range(len(titles)), list(reversed(list(titles.values()))))
    contenders.set(xlim=(0, 1), xlabel="pass@1, sampled, with 95 % intervals", title="Against the controls")
    for axis in (curve, families, contenders):
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


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


def by_family(found: Found, seeds: Sequence[int]) -> tuple[list[str], list[float], list[float]]:
    """Family names, and their median sampled pass@1 before and after."""
    names = list(found["base"][seeds[0]]["sampled"]["by_family"])

    def middle(arm: str, name: str) -> float:
        return float(median(found[arm][s]["sampled"]["by_family"].get(name, {"pass1": 0.0})["pass1"] for s in seeds))

    return names, [middle("base", n) for n in names], [middle("grpo", n) for n in names]


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
        "| | sampled pass@1 (95 %), by seed | greedy pass@1, by seed |",
        "|---|---|---|",
    ]
    for arm, title in titles.items():
        sampled = [found[arm][s]["sampled"] for s in seeds]
        cells = ", ".join(f"{r['pass1']:.3f} [{r['low']:.3f}, {r['high']:.3f}]" for r in sampled)
        greedy = ", ".join(f"{found[arm][s]['greedy']['pass1']:.3f}" for s in seeds)
        lines.append(f"| {title} | {cells} | {greedy} |")
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
