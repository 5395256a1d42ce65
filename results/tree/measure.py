"""The token tree against flat training: time, memory and gradient of one update, on four ways of sharing prefixes.

Always true: the contenders get the same rows, weights and loss, and their order turns with every round; flat-packed
(each row once, no padding, the tree's own kernel) is what the tree is compared with; both bounds are computed from the
rows of the run: tokens of all rows over unique ones, and operations over operations. Every measured update is kept, so
that a killed benchmark goes on behind the last of them.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

import _bench
import torch
from contenders import AT_ONCE, MID, NAMES, SIGMA, TINY, WHOLE, Contenders, Settings, Shape, operations
from espalier.trainer.batch import Row
from espalier.trainer.tree.core import grow
from workloads import WORKLOADS

SEED = 0
THREADS = (1, 2)
TITLES = {"packed": "packed, flat", "padded": "padded (TRL)", "tree": "token tree"}
CLAIM = (
    "The token tree trains at 95 % of the bound that the shared tokens set (the lower of tokens and operations), keeps "
    "3.5 times less for backward on a tree of 16 leaves, and has the flat path's gradient to 1e-5."
)


class Measured:
    """What is measured of one shape; the model is made when the first update is not kept yet."""

    def __init__(self, bench: _bench.Bench, shape: Shape, scale: float, rounds: int) -> None:
        self.bench, self.shape, self.scale, self.rounds = bench, shape, scale, rounds

    @cached_property
    def contenders(self) -> Contenders:
        """The trainer, warm: the first update of a process compares tree and flat path."""
        made = Contenders(self.shape, self.bench.device)
        rows = made.recorded(WORKLOADS["group8"](8 * self.scale))
        for name in NAMES:
            made.step(name, rows)
        if made.trainer.sharing.state != "tree":
            raise RuntimeError(f"there is no tree to measure; {made.trainer.sharing.state}")
        return made

    @cached_property
    def _rows(self) -> dict[str, list[Row]]:
        return {name: self.contenders.recorded(make(self.scale)) for name, make in WORKLOADS.items()}

    def _what(self, what: str, **more: Any) -> dict[str, Any]:
        return {"what": what, "shape": repr(self.shape), "scale": self.scale, **more}

    def update(self, workload: str, name: str, settings: Settings, number: int) -> list[float]:
        """One update: its seconds, and those that it had of the processor."""

        def run() -> list[float]:
            torch.set_num_threads(settings.threads)
            seconds, worked, _ = self.contenders.step(name, self._rows[workload], settings.at_once)
            print(f"{workload} {name} ({settings}): {seconds:.2f} s, {worked:.2f} s worked", flush=True)
            return [seconds, worked]

        what = self._what("update", load=workload, name=name, **asdict(settings), number=number)
        return self.bench.arm(what, run)

    def sweep(self, name: str) -> list[tuple[float, Settings]]:
        """What a contender was tried with on group8 and the seconds it took, the fastest first: threads, then with the
        better of them how much at once.
        """

        def tried(settings: Settings) -> tuple[float, Settings]:
            return min(self.update("group8", name, settings, number)[0] for number in (-2, -1)), settings

        first, *others = AT_ONCE[name]
        if self.bench.quick:
            return [(0.0, Settings(1, first))]
        counts = THREADS if self.bench.device == "cpu" else THREADS[:1]
        found = sorted(tried(Settings(count, first)) for count in counts)
        return sorted([*found, *(tried(Settings(found[0][1].threads, many)) for many in others)])

    def numbers(self, workload: str, threads: int) -> dict[str, float]:
        """Everything about a workload but time: tokens, bounds, gradients' differences, bytes."""

        def run() -> dict[str, float]:
            torch.set_num_threads(threads)
            made, rows = self.contenders, self._rows[workload]
            tree, flat = grow(rows), grow(rows, share=False)
            packed = made.step("packed", rows)[-1]
            largest = float(packed.abs().max())
            errors = {
                f"grad_error_{name}": float((made.step(name, rows)[-1] - packed).abs().max()) / largest
                for name in ("tree", "padded")
            }
            kept = {"tree": made.saved(rows, True), "packed": made.saved(rows, False)}
            return {
                "tokens_total": flat.unique,
                "tokens_unique": tree.unique,
                "tokens_processed": made.processed(rows),
                "token_bound": flat.unique / tree.unique,
                "operation_bound": operations(flat, self.shape) / operations(tree, self.shape),
                **errors,
                **{f"saved_bytes_{name}": float(size) for name, size in kept.items()},
            }

        return self.bench.arm(self._what("numbers", load=workload), run)

    def workload(self, workload: str, settings: Mapping[str, Settings]) -> dict[str, Any]:
        """One entry of `runs`."""
        names = [*NAMES, *(["forced"] if workload == "none8" else [])]
        seconds: dict[str, list[float]] = {name: [] for name in names}
        worked: dict[str, list[float]] = {name: [] for name in names}
        for number in range(self.rounds):
            turn = number % len(names)
            for name in names[turn:] + names[:turn]:
                found = self.update(workload, name, settings["tree" if name == "forced" else name], number)
                seconds[name].append(found[0])
                worked[name].append(found[1])
        about = self.numbers(workload, settings["packed"].threads)
        middle = {name: median(values) for name, values in seconds.items()}
        bound = min(about["token_bound"], about["operation_bound"])
        row = {
            "workload": workload,
            "seconds": seconds,
            "seconds_worked": worked,
            **about,
            "ratio": middle["packed"] / middle["tree"],
            "ratio_padded": middle["padded"] / middle["tree"],
            "bound": bound,
            "bound_share": middle["packed"] / middle["tree"] / bound,
            "activations": about["saved_bytes_packed"] / about["saved_bytes_tree"],
        }
        said = ", ".join(f"{name} {value:.2f} s" for name, value in middle.items())
        print(
            f"{workload}: {said}; {row['ratio']:.2f} times faster of at most {bound:.2f}; "
            f"gradient off by {about['grad_error_tree']:.1e}",
            flush=True,
        )
        return row


@dataclass(frozen=True)
class Found:
    """What was found of one shape: what each contender was tried with, fastest first, and the runs by workload."""

    shape: Shape
    sweeps: Mapping[str, Sequence[tuple[float, Settings]]]
    runs: Sequence[Mapping[str, Any]]


def found_of(measured: Measured) -> Found:
    """Sweep, then measure all workloads."""
    sweeps = {name: measured.sweep(name) for name in NAMES}
    settings = {name: sweep[0][1] for name, sweep in sweeps.items()}
    return Found(measured.shape, sweeps, [measured.workload(name, settings) for name in WORKLOADS])


def figures(runs: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The figures of the claim, and what stands beside them."""
    by = {run["workload"]: run for run in runs}
    shared = [run for run in runs if run["workload"] != "none8"]
    none8 = by["none8"]["seconds"]
    return {
        "bound_share_min": min(run["bound_share"] for run in shared),
        "token_bound_share_min": min(run["ratio"] / run["token_bound"] for run in shared),
        **{f"ratio_{name}": run["ratio"] for name, run in by.items()},
        "activations_bin16": by["bin16"]["activations"],
        "processed_over_unique_max": max(run["tokens_processed"] / run["tokens_unique"] for run in runs),
        "grad_error_max": max(run["grad_error_tree"] for run in runs),
        **{f"ratio_padded_{name}": run["ratio_padded"] for name, run in by.items()},
        **{f"bound_{name}": run["bound"] for name, run in by.items()},
        "ratio_none8_as_tree": median(none8["packed"]) / median(none8["forced"]),
        "grad_error_padded_max": max(run["grad_error_padded"] for run in runs),
    }


def plot(runs: Sequence[Mapping[str, Any]], path: Path) -> None:
    """How often the tree's update fits into the flat one's, beside what sharing allows."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    drawing, axes = plt.subplots(figsize=(7, 3.8))
    for x, run in enumerate(runs):
        axes.bar(x - 0.2, run["ratio"], 0.36, color="tab:green", label=None if x else "against packed, flat")
        axes.bar(x + 0.2, run["ratio_padded"], 0.36, color="tab:gray", label=None if x else "against TRL's padded path")
        axes.plot([x - 0.4, x], [run["bound"]] * 2, color="black", label=None if x else "bound (packed, flat)")
        axes.text(x - 0.2, run["ratio"], f"{run['ratio']:.2f}", ha="center", va="bottom")
    axes.set_xticks(range(len(runs)), [run["workload"] for run in runs])
    axes.set_ylabel("time of an update, over the tree's")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    drawing.tight_layout()
    drawing.savefig(path, dpi=150)
    plt.close(drawing)


def _times(runs: Sequence[Mapping[str, Any]]) -> str:
    """The rows of report.md's table of times."""
    return "\n".join(
        f"| {run['workload']} | {median(run['seconds']['packed']):.1f} | {median(run['seconds']['padded']):.1f} "
        f"| {median(run['seconds']['tree']):.1f} | {run['ratio']:.2f} | {run['token_bound']:.2f} "
        f"| {run['operation_bound']:.2f} | {run['bound_share']:.0%} |"
        for run in runs
    )


def _sizes(runs: Sequence[Mapping[str, Any]]) -> str:
    """The rows of report.md's table of tokens, bytes and gradients."""
    return "\n".join(
        f"| {run['workload']} | {run['tokens_total']:,} | {run['tokens_unique']:,} | {run['tokens_processed']:,} "
        f"| {run['saved_bytes_packed'] / 1e6:,.0f} | {run['saved_bytes_tree'] / 1e6:,.0f} | {run['activations']:.2f} "
        f"| {run['grad_error_tree']:.1e} | {run['grad_error_padded']:.1e} |"
        for run in runs
    )


def _section(found: Found, picture: str) -> str:
    """report.md's tables of one shape."""
    overhead = 1 / figures(found.runs)["ratio_none8_as_tree"]
    tried = "\n".join(
        f"| {TITLES[name]} | {settings} | {seconds:.2f} |"
        for name, sweep in found.sweeps.items()
        for seconds, settings in sweep
    )
    return f"""## {found.shape.what[0].upper() + found.shape.what[1:]}

Hidden {found.shape.hidden}, {found.shape.layers} layers, {found.shape.heads} query and {found.shape.key_heads} key heads
of {found.shape.head}, a vocabulary of {found.shape.vocabulary:,}, {found.shape.dtype}.

| workload | packed, flat | padded (TRL) | token tree | packed : tree | token bound | operation bound | share of the lower |
|---|---|---|---|---|---|---|---|
{_times(found.runs)}

![times over the tree's]({picture})

| workload | tokens of all rows | unique | processed | MB kept, packed | MB kept, tree | ratio | gradient's difference | padded's |
|---|---|---|---|---|---|---|---|---|
{_sizes(found.runs)}

Run as a tree nevertheless, `none8` takes {overhead:.2f} times as long as packed. Each contender runs with what was
fastest for it on group8:

| | settings | seconds |
|---|---|---|
{tried}
"""


def report(results: Mapping[str, Found], bench: _bench.Bench) -> str:
    """report.md."""
    machine, versions = _bench.machine(), _bench.versions()
    place = machine["gpu"] if bench.device == "cuda" else machine["cpu"]
    rounds = len(next(iter(results.values())).runs[0]["seconds"]["tree"])
    sections = "\n".join(_section(found, f"plot{suffix}.png") for suffix, found in results.items())
    return f"""# The token tree against flat training

Seconds of one update (micro-batches made, forward and backward pass, TRL's GRPO loss), medians of {rounds} rounds,
contenders alternating in one run on one machine ({place}, {machine["cores"]} cores, {machine["system"]}), device
{bench.device}.

{sections}
The gradient's difference from the packed path's is the largest over the adapter, over the largest gradient; that of
TRL's padded path stands beside it. MB kept: what a forward pass over all rows saves for backward, storages counted
once, weights left out; run some at a time, the packed path keeps a part of it at a time.

## What was run

Random weights of Qwen3's shapes, LoRA of rank 16 on all linear layers. Rows of random tokens:

* `group8`: a prompt of 512 tokens, eight answers of 64 to 192;
* `bin16`: a prompt of 640, four turns that branch in two, each 64 sampled tokens and 64 of the environment;
* `irr16`: sixteen episodes of nine turns, each branching off an earlier one at a random turn;
* `none8`: eight rows of 640 that share nothing: the trainer takes its flat path.

Recorded log-probabilities are {SIGMA:g} nats (standard deviation) off the policy's, so that clipping takes part. "Packed,
flat" computes each row whole, none padded, with the tree's own attention kernel. "Padded" is `GRPOTrainer`'s forward
pass, rows of similar length together. The tree is what `espalier train` runs. The token bound is all tokens over
unique ones; the operation bound counts the operations of both: matrices by tokens, attention by pairs on a path,
vocabulary by predictions. A ratio above its bound says that larger batches run a little faster.

torch {versions.get("torch")}, transformers {versions.get("transformers")}, trl {versions.get("trl")}.
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, and write figures.json, report.md and a plot a shape."""
    bench = _bench.start(__file__, "training with the token tree against flat training", argv)
    shapes = {f"_{name}": shape for name, shape in WHOLE.items()} if bench.device == "cuda" else {"": MID}
    scale, rounds = (16.0, 1) if bench.quick else (1.0, 3)
    results = {
        suffix: found_of(Measured(bench, TINY if bench.quick else shape, scale, rounds))
        for suffix, shape in shapes.items()
    }
    if bench.folder is not None:
        for suffix, found in results.items():
            plot(found.runs, bench.folder / f"plot{suffix}.png")
        (bench.folder / "report.md").write_text(report(results, bench), encoding="utf-8")
    about = [
        {
            "shape": asdict(found.shape),
            "sweep": {name: [[seconds, asdict(s)] for seconds, s in sweep] for name, sweep in found.sweeps.items()},
            "workloads": found.runs,
        }
        for found in results.values()
    ]
    named = {f"{name}{suffix}": value for suffix, r in results.items() for name, value in figures(r.runs).items()}
    bench.finish(CLAIM, [SEED], named, about)


if __name__ == "__main__":
    main(sys.argv[1:])
