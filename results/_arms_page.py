"""What the page of a learning benchmark shows: a plot and a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

Found = Mapping[str, Mapping[int, Mapping[str, Any]]]
"""Arm -> seed -> what it found."""


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
    contenders.set(xlim=(0, 1), xlabel="pass@1, sampled, with 95 % intervals", title="Contenders")
    for axis in (curve, families, contenders):
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def by_family(found: Found, seeds: Sequence[int]) -> tuple[list[str], list[float], list[float]]:
    """Family names, and their median sampled pass@1 before and after."""
    names = list(found["base"][seeds[0]]["sampled"]["by_family"])

    def middle(arm: str, name: str) -> float:
        return float(median(found[arm][s]["sampled"]["by_family"].get(name, {"pass1": 0.0})["pass1"] for s in seeds))

    return names, [middle("base", n) for n in names], [middle("grpo", n) for n in names]


def table(found: Found, seeds: Sequence[int], titles: Mapping[str, str]) -> list[str]:
    """The lines of a Markdown table: pass@1 of every arm, by seed."""
    lines = ["| | sampled pass@1 (95 %), by seed | greedy pass@1, by seed |", "|---|---|---|"]
    for arm, title in titles.items():
        sampled = [found[arm][s]["sampled"] for s in seeds]
        cells = ", ".join(f"{r['pass1']:.3f} [{r['low']:.3f}, {r['high']:.3f}]" for r in sampled)
        greedy = ", ".join(f"{found[arm][s]['greedy']['pass1']:.3f}" for s in seeds)
        lines.append(f"| {title} | {cells} | {greedy} |")
    return lines
