"""Does the tiny policy learn to code? Three seeds, held-out repair and write tasks, graded by hidden tests.

Held-out tasks have other names, other mistakes and other inputs than training tasks. The base is what the same run
measures before its first step, on the same tasks with the same random numbers.
"""

import argparse
from statistics import median
from typing import Any

import _bench
from _arms import run
from _arms_page import by_family, draw, table

CONFIG = "code-tiny"
TITLES = {"grpo": "after GRPO", "base": "base"}
QUICK = ["--trainer.steps", "1", "--trainer.groups", "2", "--eval.tasks", "6", "--eval.every", "0"]
Found = dict[str, dict[int, dict[str, Any]]]


def main() -> None:
    """Run what is missing, then count."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--seeds", type=int, default=3, help="how many training seeds")
    mine, rest = parser.parse_known_args()
    bench = _bench.start(__file__, __doc__ or "", rest)
    seeds = list(range(1 if bench.quick else mine.seeds))
    found: Found = {arm: {} for arm in TITLES}
    for seed in seeds:
        found["grpo"][seed] = run(bench, CONFIG, "grpo", seed, QUICK if bench.quick else [])
        found["base"][seed] = found["grpo"][seed]["before"]
    figures = count(found, seeds)
    runs = [found["grpo"][seed] for seed in seeds]
    bench.finish("A small agent learns to code in the sandbox.", seeds, figures, runs)
    if bench.folder is not None:
        draw(found, seeds, TITLES, bench.folder / "plot.png")
        (bench.folder / "report.md").write_text(page(found, seeds, figures), encoding="utf-8")


def count(found: Found, seeds: list[int]) -> dict[str, float]:
    """The figures of the claim: medians over seeds, the margin its smallest."""

    def over(arm: str, key: str, mode: str = "sampled") -> float:
        return float(median(found[arm][s][mode][key] for s in seeds))

    return {
        "base_pass1": over("base", "pass1"),
        "base_pass1_high": over("base", "high"),
        "final_pass1": over("grpo", "pass1"),
        "final_pass1_low": over("grpo", "low"),
        "margin_min": float(
            min(found["grpo"][s]["sampled"]["low"] - found["base"][s]["sampled"]["high"] for s in seeds)
        ),
        "base_greedy": over("base", "pass1", "greedy"),
        "final_greedy": over("grpo", "pass1", "greedy"),
        "minutes": float(median(found["grpo"][s]["minutes"] for s in seeds)),
        "peak_gb": float(median(found["grpo"][s]["peak_gb"] for s in seeds)),
        "episodes": float(median(found["grpo"][s]["episodes"] for s in seeds)),
    }


def page(found: Found, seeds: list[int], figures: dict[str, float]) -> str:
    """report.md."""
    machine = _bench.machine()
    lines = [
        "# Learning to code",
        "",
        "![pass@1 over steps, by family, before and after](plot.png)",
        "",
        f"The shipped base policy `tiny-code`, {len(seeds)} training seed{'s' if len(seeds) > 1 else ''}, {found['base'][seeds[0]]['sampled']['n']} "
        "held-out tasks a seed (other names, mistakes and inputs than in training), graded by six hidden tests that "
        f"must all pass. Sampled: T = 1. Machine: {machine['cpu']}, {machine['cores']} cores.",
        "",
        *table(found, seeds, TITLES),
    ]
    apart = "lies above" if figures["margin_min"] > 0 else "does not lie above"
    names, before, after = by_family(found, seeds)
    families = ", ".join(f"{n} {b:.2f} to {a:.2f}" for n, b, a in zip(names, before, after, strict=True))
    lines += [
        "",
        f"The final lower bound {apart} the base's upper bound in every seed (smallest margin "
        f"{figures['margin_min']:.3f}). By family: {families}. Training and "
        f"both evaluations: {figures['minutes']:.1f} minutes, {figures['peak_gb']:.2f} GB at the peak, "
        f"{figures['episodes']:.0f} episodes, each in a box of its own state, graded by a pytest run.",
        "",
        "The base imitates a scripted expert with habits (`envs/coding/expert.py`): it hands in what it found, writes the "
        "function with a mistake, leaves out a part of its name, or writes to another file, each in half of the cases "
        "where the habit applies. It knows the twelve functions of the generated tasks; what it learns is to let go of "
        "the habits.",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
