"""The contenders of the learning benchmarks. Each starts from the shipped base, has the same tasks, budgets and threads,
and is measured by the same evaluation on the same held-out tasks; each runs in a process of its own, so that its peak
memory is its own.
"""

from __future__ import annotations

import json
import random
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

from espalier.configs.load import load
from espalier.configs.schema import RunConfig
from espalier.rollouts.types import Group, Trajectory

if TYPE_CHECKING:
    from _bench import Bench


def configuration(config: str, arm: str, seed: int, out: Path, overrides: Sequence[str]) -> RunConfig:
    """A shipped configuration under another name, seed and folder."""
    fixed = ["--name", f"{arm}-{seed}", "--seed", str(seed), "--out", str(out)]
    return load(config, [*fixed, *overrides])


def measured(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """pass@1 by mode, out of evaluation events."""
    return {
        row["mode"]: {**{k: row[k] for k in ("pass1", "low", "high", "n", "failures")}, "by_family": row["by_family"]}
        for row in rows
    }


def base(config: RunConfig, samples: int, tasks: int) -> dict[str, Any]:
    """The base on all held-out tasks, and pass@k from `samples` episodes of `tasks` of them."""
    from espalier.trainer.evaluate import evaluate_config

    found = evaluate_config(config, "base")
    fewer = config.model_copy(update={"eval": config.eval.model_copy(update={"tasks": tasks, "greedy": False})})
    many = evaluate_config(fewer, "base", samples=samples)
    return {
        **measured([r.event() for r in found.results]),
        "pass_at": {str(k): value for k, value in many.results[0].pass_at.items()},
        "do_nothing": found.do_nothing.hard,
        "dataset": found.dataset,
        "sha256": found.sha256,
    }


def grpo(config: RunConfig, shuffled: bool = False) -> dict[str, Any]:
    """Espalier's run, or the same with rewards dealt out at random among the episodes of a step."""
    from espalier.trainer.loop import train
    from espalier.trainer.rounds import SyncSource

    class Shuffled(SyncSource):
        """Rewards as many as were earned, on episodes that did not earn them."""

        def sample(self, step: int) -> list[Group]:
            groups = super().sample(step)
            rewards = [reward for group in groups for reward in group.rewards]
            random.Random(f"shuffle/{config.seed}/{step}").shuffle(rewards)
            dealt = iter(rewards)
            return [
                replace(group, trajectories=tuple(replace(t, reward=next(dealt)) for t in group.trajectories))
                for group in groups
            ]

    result = train(config, make_source=Shuffled if shuffled else SyncSource)
    rows = [json.loads(line) for line in (Path(result["run"]) / "metrics.jsonl").read_text().splitlines()]
    evals, steps = [r for r in rows if r["kind"] == "eval"], [r for r in rows if r["kind"] == "train"]
    keep = ("step", "reward_mean", "entropy", "groups_no_signal", "failures", "seconds_rollout", "seconds_train")
    return {
        **measured([r for r in evals if r["step"] == result["steps"]][-2:]),
        "before": measured([r for r in evals if r["step"] == 0]),
        "curve": [{k: r[k] for k in ("step", "mode", "pass1", "low", "high", "n")} for r in evals],
        "steps": [{k: r[k] for k in keep} for r in steps],
        "episodes": sum(r["episodes"] for r in steps),
        "prompt_tokens": steps[-1]["prompt_tokens_mean"],
        "episode_tokens": steps[-1]["episode_tokens_mean"],
        "seconds": result["seconds"],
        "seconds_training": result["seconds_training"],
    }


def rejection_sampling(config: RunConfig, episodes: int, epochs: int) -> dict[str, Any]:
    """As many episodes of the base as GRPO used; the distinct successes are imitated (Yuan et al. 2023, 2308.01825).

    Twice, at GRPO's learning rate and at a sixth of it; what came out better on the held-out tasks counts, which
    favours it.
    """
    from espalier.rollouts.runner import GroupSpec
    from espalier.trainer import tasks as tasklists
    from espalier.trainer.policy import PolicyStore, resolve_base
    from espalier.trainer.rollout_side import open_rollouts

    began = time.monotonic()
    folder, model = config.out / config.name, resolve_base(config.policy.base)
    tasks = tasklists.load(config.env, "train", config.seed, config.env.task_count)
    kept: list[Trajectory] = []
    seen = 0
    with open_rollouts(config, model, tasks, folder) as side:
        side.publish(PolicyStore(folder / "policies", model).base_version)
        while seen < episodes:
            drawn = tasklists.draw(tasks, config.trainer.groups, seed=config.seed, step=seen)
            specs = [
                GroupSpec(f"{config.name}/{seen}/{i}", task, config.trainer.group_size) for i, task in enumerate(drawn)
            ]
            groups = side.groups(specs, 0)
            for group in groups:
                kept += {t.sequences[0].tokens: t for t in group.trajectories if t.reward >= 1.0}.values()
            ended = sum(len(group.trajectories) for group in groups)
            if not ended:
                raise RuntimeError(f"every episode failed: {groups[0].failures[0].message}")
            seen += ended
    found: list[dict[str, Any]] = []
    for rate in (config.trainer.learning_rate, config.trainer.learning_rate / 6):
        adapter = imitate(config, model, kept, epochs, rate, folder / f"adapter-{len(found)}")
        found.append({**final(config, str(adapter)), "learning_rate": rate})
    best = max(found, key=lambda row: float(row["sampled"]["pass1"]))
    return {**best, "episodes": seen, "kept": len(kept), "seconds": time.monotonic() - began}


def imitate(config: RunConfig, model: Path, kept: Sequence[Trajectory], epochs: int, rate: float, out: Path) -> Path:
    """Cross-entropy on what the policy said in `kept`, on the adapter and optimizer that GRPO trains. Raises RuntimeError
    when there is nothing to imitate.
    """
    import torch
    from espalier.trainer.batch import Row, collate, rows_of
    from espalier.trainer.model import load_base, lora_config, resolve_device, write_adapter
    from peft import PeftModel, get_peft_model

    torch.manual_seed(config.seed)
    torch.set_num_threads(config.trainer.threads)
    device = torch.device(resolve_device(config.policy.device))
    policy = get_peft_model(load_base(model, config.policy), lora_config(config.policy))
    if not isinstance(policy, PeftModel):
        raise TypeError("PEFT gave something else than a PeftModel")
    policy.to(device)
    trained = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    rows = [row for t in kept for row in rows_of(t, 1.0)]
    if not rows:
        raise RuntimeError("no episode succeeded, so there is nothing to imitate")

    def batches() -> Iterator[list[Row]]:
        dice = random.Random(config.seed)
        for _ in range(epochs):
            dice.shuffle(rows)
            yield from (rows[i : i + 64] for i in range(0, len(rows), 64))

    for some in batches():
        batch = collate(some, 0, device)
        tokens = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
        logits = policy(tokens).logits[:, :-1]
        under = batch["tool_mask"].bool()
        loss = torch.nn.functional.cross_entropy(logits[under], batch["completion_ids"][under])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, config.trainer.max_grad_norm)
        optimizer.step()
    out.mkdir(parents=True)
    write_adapter(policy, out)
    return out


def imitation_continued(config: RunConfig, seconds: float) -> dict[str, Any]:
    """The base's own recipe for as long as GRPO took, on fresh demonstrations of the same faulty expert; on the CPU,
    wherever GRPO ran.
    """
    from espalier.trainer.imitate import continue_imitation
    from espalier.trainer.lessons import Spreadsheets
    from espalier.trainer.policy import resolve_base

    folder = config.out / config.name
    base = resolve_base(config.policy.base)
    steps = continue_imitation(base, folder / "model", Spreadsheets(), config.seed + 1000, seconds)
    policy = config.policy.model_copy(update={"base": str(folder / "model")})
    return {**final(config.model_copy(update={"policy": policy}), "base"), "steps": steps, "seconds": seconds}


def final(config: RunConfig, policy: str) -> dict[str, Any]:
    """Sampled and greedy pass@1 of `policy`."""
    from espalier.trainer.evaluate import evaluate_config

    return measured([r.event() for r in evaluate_config(config, policy).results])


def carry_out(
    shipped: str, arm: str, seed: int, out: Path, overrides: Sequence[str], more: dict[str, Any]
) -> dict[str, Any]:
    """One arm, from a clean folder; called in a fresh process."""
    from espalier.trainer.loop import peak_gb

    config = configuration(shipped, arm, seed, out, overrides)
    shutil.rmtree(config.out / config.name, ignore_errors=True)
    arms: dict[str, Callable[..., dict[str, Any]]] = {
        "base": base,
        "grpo": grpo,
        "shuffled": lambda c: grpo(c, shuffled=True),
        "rejection": rejection_sampling,
        "imitation": imitation_continued,
    }
    began = time.monotonic()
    found = arms[arm](config, **more)
    minutes = (time.monotonic() - began) / 60
    return {"arm": arm, "seed": seed, **found, "minutes": minutes, "peak_gb": peak_gb(config.env.processes)}


def run(bench: Bench, shipped: str, arm: str, seed: int, overrides: Sequence[str], **more: Any) -> dict[str, Any]:
    """One arm of one seed, in a fresh process, unless an earlier invocation kept it for the same configuration."""
    given = ["--policy.device", bench.device, *overrides]
    config = configuration(shipped, arm, seed, bench.arms, given).model_dump(mode="json", exclude={"out"})

    def fresh() -> dict[str, Any]:
        print(f"seed {seed}: {arm} ...", file=sys.stderr, flush=True)
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            return pool.submit(carry_out, shipped, arm, seed, bench.arms, given, more).result()

    return bench.arm({"arm": arm, "config": config, **more}, fresh)
