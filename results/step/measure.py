"""Whole steps of the 4B recipe: seconds of each phase, tokens a second, shares of what the device can do, memory.

Always true: it is `espalier.train` on `configs/spreadsheet-qwen3-4b.toml` with real spreadsheet tasks, in a process of
its own, and the numbers are those of its metrics.jsonl and of its stored trajectories. The base has random weights: of
Qwen3-4B's exact sizes on a card, of a small Qwen3's on the CPU. Random weights say nothing that a workbook could be
changed by, so an episode is one turn of a fixed number of tokens, and the rewards that groups are compared by are dealt
out by chance, so that every group is trained on. The limits are measured in the same run, before and after it; the first
step warms up and does not count.
"""

from __future__ import annotations

import json
import os
import random
import resource
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean, median
from typing import Any, TypeVar

import _bench
import psutil
import torch
from base import make_base
from espalier.configs.load import load
from espalier.configs.schema import RunConfig
from espalier.rollouts.store import TrajectoryStore
from espalier.rollouts.types import Group
from espalier.trainer.batch import rows_of
from espalier.trainer.loop import train
from espalier.trainer.plan import make_plan
from espalier.trainer.rounds import SyncSource
from espalier.trainer.shapes import KNOWN, Shape
from espalier.trainer.tree.core import grow
from limits import decode_bytes, measured, train_operations
from page import PHASES, plot, report

T = TypeVar("T")

SEED = 0
PROMPT = 4096
CLAIM = "Whole steps of the 4B recipe: where their time goes, and how near they come to what the device can do."
SMALL = Shape(256, 4, 4, 2, 64, 768, 8192, True)
SMALLEST = Shape(64, 2, 2, 1, 32, 128, 2048, True)


@dataclass(frozen=True)
class Work:
    """What is run: `groups` of `size` episodes a step, `sampled` tokens each, `steps` that count behind a first."""

    shape: Shape
    device: str
    sampler: str
    groups: int
    size: int
    sampled: int
    steps: int

    @property
    def dtype(self) -> str:
        """Of trainer and sampler."""
        return "bfloat16" if self.device == "cuda" else "float32"

    def config(self, base: Path, out: Path) -> RunConfig:
        """The recipe, with this work's sizes."""
        changes: dict[str, Any] = {
            "name": "step",
            "seed": SEED,
            "out": out,
            "policy.base": base,
            "policy.device": self.device,
            "policy.dtype": self.dtype,
            "env.task_count": 256,
            "env.terse": "true",
            "episode.max_prompt_tokens": PROMPT,
            "episode.max_tokens": PROMPT + self.sampled,
            "episode.max_turn_tokens": self.sampled,
            "episode.cut_turns": "train",  # every turn ends at its limit
            "sampler.kind": self.sampler,
            "sampler.dtype": self.dtype,
            "sampler.slots": self.groups * self.size,
            "trainer.groups": self.groups,
            "trainer.group_size": self.size,
            "trainer.max_refills": 0,
            "trainer.steps": 1 + self.steps,
            "schedule.checkpoint_every": 1,
            "eval.tasks": 1,
            "eval.every": 0,
            "eval.greedy": "false",
            # log-probabilities among the 20 likeliest tokens, which random weights hardly prefer to all others
            "alarms.max_logprob_gap": 1000.0,
            "tracking.wandb": "off",
        }
        if self.sampler == "torch":
            changes["sampler.max_versions"] = 2
        return load("spreadsheet-qwen3-4b", [w for k, v in changes.items() for w in (f"--{k}", str(v))])


def work_on(bench: _bench.Bench) -> Work:
    """The work of this invocation."""
    if bench.device == "cuda":
        vllm = find_spec("vllm") is not None  # whose cache is paged; the embedded sampler's takes more for each slot
        sampler, groups = ("vllm", 8) if vllm else ("torch", 4)
        work = Work(KNOWN["Qwen/Qwen3-4B"], "cuda", sampler, groups, size=8, sampled=1024, steps=2)
    else:
        work = Work(SMALL, "cpu", "torch", groups=2, size=4, sampled=128, steps=3)
    return replace(work, shape=SMALLEST, groups=2, size=2, sampled=8, steps=1) if bench.quick else work


class ByChance(SyncSource):
    """The run's own source, with rewards dealt out by chance: half of each group's episodes get 1."""

    def sample(self, step: int) -> list[Group]:
        """All groups of `step`."""
        return [_dealt(group) for group in super().sample(step)]


def _dealt(group: Group) -> Group:
    order = list(range(len(group.trajectories)))
    random.Random(group.id).shuffle(order)
    pairs = zip(group.trajectories, order, strict=True)
    return replace(group, trajectories=tuple(replace(t, reward=float(place % 2)) for t, place in pairs))


def carry_out(config: RunConfig, work: Work) -> dict[str, Any]:
    """Plan and train, in a fresh process: the rows of the steps with what was counted of each, and memory."""
    plan = make_plan(config)
    with _device_peak(work.device) as peak:
        result = train(config, make_source=ByChance)
    folder = Path(result["run"])
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [row for row in found if row["kind"] == "train"]
    store = TrajectoryStore(folder / "trajectories", readonly=True)
    try:
        groups = list(store.groups())
    finally:
        store.close()
    counted = [counts(work, row, [g for g in groups if g.id.startswith(f"step/{row['step']}/")]) for row in steps]
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {
        "steps": [
            {**row, **more, "wall": row["time"] - before["time"]}
            for before, row, more in zip(steps, steps[1:], counted[1:], strict=False)
        ],
        "peak_bytes": max(peak) if work.device == "cuda" else own,
        "trainer_bytes": torch.cuda.max_memory_allocated() if work.device == "cuda" else own,
        "plan_bytes": plan.total,
        "plan": {part.name: part.bytes for part in plan.parts},
        "plan_speed": plan.speed,
    }


def counts(work: Work, row: dict[str, Any], groups: Sequence[Group]) -> dict[str, float]:
    """What a step's trajectories say: seconds until the last episode had its samples, bytes read to decode them, pairs
    of tokens attended to in training.
    """
    episodes = [t for group in groups for t in group.trajectories]
    spans = [(s.start, s.stop) for t in episodes for seq in t.sequences for s in seq.spans if s.origin == "sampled"]
    tree = grow([r for t in episodes for r in rows_of(t, 0.0)], share=row["shared_prefix"] == "tree")
    return {
        "seconds_sampling": max(sum(turn.seconds_sampling for turn in t.turns) for t in episodes),
        "decode_bytes": decode_bytes(work.shape, work.dtype, spans),
        "pairs": row["tokens_processed"] * float((tree.positions + 1).double().mean()),
    }


@contextmanager
def _device_peak(device: str) -> Iterator[list[int]]:
    """Bytes in use on the card while this lasts, whoever uses them, ten times a second; empty on the CPU."""
    seen: list[int] = []
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.1):
            free, total = torch.cuda.mem_get_info()
            seen.append(total - free)

    watching = threading.Thread(target=watch)
    if device == "cuda":
        watching.start()
    try:
        yield seen
    finally:
        done.set()
        if device == "cuda":
            watching.join()


def apart(run: Callable[..., T], *args: Any) -> T:
    """`run(*args)` in a process of its own, which leaves nothing on the card."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(run, *args).result()


def measure(bench: _bench.Bench, work: Work) -> dict[str, Any]:
    """The run, and the limits before and after it."""
    began, busy, own = time.monotonic(), _busy(), _own()
    bench.arms.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=bench.arms) as name:  # not /tmp, which may be memory: 4B are 8 GB
        base, out = Path(name) / "base", Path(name) / "runs"
        apart(make_base, base, work.shape, work.dtype, work.device)
        config = work.config(base, out)
        threads = config.trainer.threads, config.sampler.threads
        before = apart(measured, work.dtype, work.device, threads)
        found = apart(carry_out, config, work)
        after = apart(measured, work.dtype, work.device, threads)
    section = config.trainer
    old = section.minibatches > 1 and section.off_policy_correction != "none"
    return {
        **found,
        "operations_s": max(before[0], after[0]),
        "bytes_s": max(before[1], after[1]),
        "limits": [before, after],
        "cores_of_others": max(0.0, _busy() - busy - (_own() - own)) / (time.monotonic() - began),
        "forwards": 1 + (section.beta > 0) + old,
        "adapter": work.shape.lora_parameters(config.policy.lora),
    }


def _busy() -> float:
    """Seconds that the machine's cores have worked."""
    spent = psutil.cpu_times()
    return float(sum(spent) - spent.idle - getattr(spent, "iowait", 0.0) - getattr(spent, "guest", 0.0))


def _own() -> float:
    """Seconds of them that this process and those which it started, and which have ended, had."""
    return sum(os.times()[:4])


def figures_of(work: Work, found: dict[str, Any]) -> dict[str, float]:
    """Medians over the steps that count."""

    def middle(value: Callable[[dict[str, Any]], float]) -> float:
        return median(value(row) for row in found["steps"])

    def share(row: dict[str, Any]) -> float:
        tokens, targets = row["tokens_processed"], row["trained_tokens"]
        done = train_operations(work.shape, found["adapter"], tokens, row["pairs"], targets, found["forwards"])
        return done / float(row["seconds_train"]) / float(found["operations_s"])

    return {
        "step_seconds": middle(lambda row: row["wall"]),
        "seconds_sampling": middle(lambda row: row["seconds_sampling"]),
        **{f"seconds_{name}": middle(lambda row, name=name: row[f"seconds_{name}"]) for name in PHASES},  # type: ignore[misc]
        "sampled_tok_s": middle(lambda row: row["sampled_tokens"] / row["seconds_rollout"]),
        "trained_tok_s": middle(lambda row: row["trained_tokens"] / row["seconds_train"]),
        "processed_tok_s": middle(lambda row: row["tokens_processed"] / row["seconds_train"]),
        "processed_over_unique": middle(lambda row: row["tokens_processed"] / row["tokens_unique"]),
        "flop_share_train": middle(share),
        "bandwidth_share_decode": middle(lambda r: r["decode_bytes"] / r["seconds_sampling"] / found["bytes_s"]),
        "matmul_tflops": found["operations_s"] / 1e12,
        "copy_gb_s": found["bytes_s"] / 1e9,
        "peak_gb": found["peak_bytes"] / 1e9,
        "trainer_peak_gb": found["trainer_bytes"] / 1e9,
        "plan_gb": found["plan_bytes"] / 1e9,
        "memory_plan_ratio": found["peak_bytes"] / found["plan_bytes"],
        "parameters": work.shape.parameters(),
        "steps": len(found["steps"]),
        "episodes": work.groups * work.size,
        "prompt_tokens_mean": fmean(row["prompt_tokens_mean"] for row in found["steps"]),
        "sampled_tokens_mean": fmean(row["sampled_tokens_mean"] for row in found["steps"]),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, and write figures.json, report.md and plot.png."""
    bench = _bench.start(__file__, __doc__ or "", argv)
    work = work_on(bench)
    found = bench.arm({"work": repr(work)}, lambda: measure(bench, work))
    figures = figures_of(work, found)
    if bench.folder is not None:
        plot(figures, found["steps"], bench.folder / "plot.png")
        (bench.folder / "report.md").write_text(report(figures, found, work.sampler, bench.device), encoding="utf-8")
    bench.finish(CLAIM, [SEED], figures, [{"device": bench.device, "sampler": work.sampler, **found}])


if __name__ == "__main__":
    main(sys.argv[1:])
