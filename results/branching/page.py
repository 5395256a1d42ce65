"""The page and the plot of the branching benchmark."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import _bench

Curves = Mapping[int, Mapping[str, Mapping[str, list[tuple[float, float]]]]]
Reached = Mapping[int, Mapping[str, Any]]
COLOURS = {"branching": "tab:green", "independent": "tab:gray"}
GOAL = 0.7


def plot(found: Curves, reached: Reached, path: Path) -> None:
    """pass@1 over each budget, a line a seed and contender; dots mark where the target was reached."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True)
    budgets = (("sampled_tokens", "sampled tokens"), ("turns", "environment steps"))
    for axes, (budget, label) in zip(panels, budgets, strict=True):
        for at, (seed, by_kind) in enumerate(found.items()):
            for kind, colour in COLOURS.items():
                axes.plot(*zip(*by_kind[kind][budget], strict=True), color=colour, label=None if at else kind)
                if seed in reached:
                    axes.plot([reached[seed][budget][kind]], [reached[seed]["target"]], "o", color=colour)
        axes.set(xlabel=f"{label} of training", ylim=(0, 1))
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("held-out tasks solved at the first try")
    panels[0].legend(frameon=False, loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def report(figures: Mapping[str, float], found: Curves, reached: Reached) -> str:
    """report.md."""
    machine = _bench.machine()
    ratio = figures.get("budget_ratio")
    verdict = "The weaker contender got no better than the base, so there is no target."
    if ratio is not None:
        met = "met" if ratio <= GOAL else "missed"
        verdict = (
            f"Branching took {ratio:.2f} times the budget of independent groups to the same pass@1 (median over seeds of "
            f"the worse of two ratios; goal: at most {GOAL}, {met}): {figures['token_ratio']:.2f} times the sampled "
            f"tokens, {figures['turn_ratio']:.2f} times the environment steps."
        )
    lines = [
        "| seed | target pass@1 | tokens: independent, branching | steps: independent, branching |",
        "|---|---|---|---|",
    ]
    for seed, one in reached.items():
        tokens, turns = one["sampled_tokens"], one["turns"]
        lines.append(
            f"| {seed} | {one['target']:.3f} | {tokens['independent']:,.0f}, {tokens['branching']:,.0f} | "
            f"{turns['independent']:,.0f}, {turns['branching']:,.0f} |"
        )
    table = "\n".join(lines)
    return f"""# Branching groups against independent ones

{verdict}

![pass@1 over both budgets](plot.png)

{table}

| | independent | branching |
|---|---|---|
| final pass@1, held-out | {figures["pass1_independent"]:.3f} | {figures["pass1_branching"]:.3f} |
| sampled tokens in all | {figures["sampled_tokens_independent"]:,.0f} | {figures["sampled_tokens_branching"]:,.0f} |
| environment steps in all | {figures["turns_independent"]:,.0f} | {figures["turns_branching"]:,.0f} |
| groups without signal | {figures["no_signal_independent"]:.0%} | {figures["no_signal_branching"]:.0%} |
| seconds a step | {figures["seconds_a_step_independent"]:.1f} | {figures["seconds_a_step_branching"]:.1f} |

The shipped spreadsheet policy and configuration, {len(found)} seeds, groups of eight on {machine["cpu"]}, {machine["cores"]}
cores. Branching groups have four roots; the other four leave one of them at the turn whose tokens were least likely
({figures["branch_share"]:.0%} of all episodes are branches, the rest found nothing to leave). Episodes here have about two
turns: a look at the sheet, then a formula and the end. So a branch saves the look, about a third of its tokens and half of
its steps, and no more than that can be saved. A step is counted when an episode asks for it, before the operation graph,
which both have.
"""
