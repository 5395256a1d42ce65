"""Does the tiny policy learn, and is it more than sharpening? Three seeds, 400 held-out tasks, four controls.

A seed's arms run one after another, the order turned by one from seed to seed. Controls: fine-tuning on the base's own
successes (as many episodes), the base's imitation continued (as many seconds), GRPO with shuffled rewards (as many
steps), and doing nothing. Espalier's claim is the first line; the others say what it is worth.
"""

import argparse
from statistics import median
from typing import Any

import _bench
from _arms import run

TITLES = {
    "grpo": "GRPO (Espalier)",
    "rejection": "fine-tuned on its own successes",
    "imitation": "imitation continued",
    "shuffled": "GRPO, shuffled rewards",
    "base": "base",
}
QUICK = ["--trainer.steps", "1", "--trainer.groups", "4", "--eval.tasks", "10", "--eval.every", "0"]
CONFIG = "spreadsheet-tiny"
Found = dict[str, dict[int, dict[str, Any]]]


def main() -> None:
    """Run what is missing, then count."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--seeds", type=int, default=3, help="how many training seeds")
    mine, rest = parser.parse_known_args()
    bench = _bench.start(__file__, __doc__ or "", rest)
    seeds = list(range(1 if bench.quick else mine.seeds))
    found: Found = {arm: {} for arm in TITLES}
    shorter = QUICK if bench.quick else []
    many = {"samples": 2, "tasks": 4} if bench.quick else {"samples": 64, "tasks": 100}
    for seed in seeds:
        found["base"][seed] = run(bench, CONFIG, "base", seed, shorter, **many)
        found["grpo"][seed] = run(bench, CONFIG, "grpo", seed, shorter)
        ours = found["grpo"][seed]
        controls: list[tuple[str, dict[str, Any]]] = [
            ("rejection", {"episodes": ours["episodes"], "epochs": 1 if bench.quick else 4}),
            ("imitation", {"seconds": ours["seconds_training"]}),
            ("shuffled", {}),
        ]
        for arm, more in controls[seed % 3 :] + controls[: seed % 3]:
            found[arm][seed] = run(bench, CONFIG, arm, seed, shorter, **more)
    figures = count(found, seeds)
    runs = [found[arm][seed] for seed in seeds for arm in TITLES]
    bench.finish(
        "A small agent gets at least twice as good on spreadsheet tasks it has never seen.", seeds, figures, runs
    )
    if bench.folder is not None:
        from _arms_page import draw
        from page import report

        draw(found, seeds, TITLES, bench.folder / "plot.png")
        (bench.folder / "report.md").write_text(
            report(found, seeds, TITLES, figures, _bench.machine()), encoding="utf-8"
        )


def count(found: Found, seeds: list[int]) -> dict[str, float]:
    """The figures of the claim, medians over seeds."""

    def over(arm: str, mode: str, key: str) -> float:
        return float(median(found[arm][s][mode][key] for s in seeds))

    controls = {arm: over(arm, "sampled", "high") for arm in ("rejection", "imitation", "shuffled")}
    most = str(max(int(k) for k in found["base"][seeds[0]]["pass_at"]))
    figures = {
        "base_pass1": over("base", "sampled", "pass1"),
        "final_pass1": over("grpo", "sampled", "pass1"),
        "base_greedy": over("base", "greedy", "pass1"),
        "final_greedy": over("grpo", "greedy", "pass1"),
        "greedy_gain": median(found["grpo"][s]["greedy"]["pass1"] - found["base"][s]["greedy"]["pass1"] for s in seeds),
        f"base_pass{most}": median(found["base"][s]["pass_at"][most] for s in seeds),
        "final_pass1_low": over("grpo", "sampled", "low"),
        "best_control_pass1_high": max(controls.values()),
        "gain_ratio": median(
            found["grpo"][s]["sampled"]["pass1"] / max(found["base"][s]["sampled"]["pass1"], 1e-9) for s in seeds
        ),
        "minutes": median(found["grpo"][s]["minutes"] for s in seeds),
        "peak_gb": median(found["grpo"][s]["peak_gb"] for s in seeds),
        "do_nothing": median(found["base"][s]["do_nothing"] for s in seeds),
        "episodes": median(found["grpo"][s]["episodes"] for s in seeds),
        "prompt_tokens": median(found["grpo"][s]["prompt_tokens"] for s in seeds),
        "episode_tokens": median(found["grpo"][s]["episode_tokens"] for s in seeds),
        **{f"{arm}_pass1": over(arm, "sampled", "pass1") for arm in controls},
        **{f"{arm}_greedy": over(arm, "greedy", "pass1") for arm in controls},
    }
    return figures | {"control_margin": figures["final_pass1_low"] - figures["best_control_pass1_high"]}


if __name__ == "__main__":
    main()
