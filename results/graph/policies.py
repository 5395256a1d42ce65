"""Shipped configurations with their base policy in the embedded sampler: whole trajectories, with the graph and without."""

from __future__ import annotations

import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from espalier.configs.load import load
from espalier.rollouts.envpool import EnvPool
from espalier.rollouts.graph.pool import GraphPool
from espalier.rollouts.runner import GroupSpec
from espalier.rollouts.samplers.base import SamplingParams
from espalier.rollouts.types import Group, PolicyVersion
from espalier.trainer import tasks as tasklists
from espalier.trainer.policy import PolicyStore, resolve_base
from espalier.trainer.sampling import make_pool, make_runner, make_sampler

EPOCHS = 2


async def measure(name: str, shipped: str, tasks: int, size: int) -> dict[str, Any]:
    """`tasks` tasks of a `shipped` configuration, `size` rollouts each, all at once; two epochs of the same policy with other draws."""
    with tempfile.TemporaryDirectory(prefix="espalier-bench-") as folder:
        common = ["--out", folder, "--env.task_count", str(max(tasks, 8)), "--sampler.slots", str(tasks * size)]
        live = max(1, tasks * size // 4)
        on = load(shipped, [*common, "--graph.live", str(live)])
        off = load(shipped, [*common, "--graph.enabled", "false"])
        base = resolve_base(on.policy.base)
        version = PolicyStore(Path(folder) / "policies", base).base_version
        known = tasklists.load(on.env, "train", on.seed, on.env.task_count)[:tasks]
        seconds, episodes = {}, {}
        pool: EnvPool
        for how, config in (("warm-up", off), ("off", off), ("on", on)):
            pool = make_pool(config, known)
            started = time.perf_counter()
            episodes[how], marks = await _play(config, base, version, pool, known, size)
            seconds[how] = time.perf_counter() - started
        assert isinstance(pool, GraphPool)
        counts = pool.counts
        one, two = marks[0], asdict(counts)
        spent = [c["executed"] + c["bypassed"] + c["replayed"] + c["verified"] for c in (one, two)]
        edges = sum(len(space.edges) + (space.row.root is not None) for space in pool.graph._spaces.values())
    return {
        "name": name, "rollouts": tasks * size, "dedup": one["requested"] / spent[0],
        "dedup_epochs": two["requested"] / spent[1], "distinct": edges,
        "executed_over_distinct": (counts.executed + counts.replayed) / edges, "live_most": counts.live_most,
        "identical": episodes["on"] == episodes["off"], "mismatches": counts.mismatches, "counts": two,
        "seconds_on": seconds["on"], "seconds_off": seconds["off"],
    }  # fmt: skip


async def _play(
    config: Any, base: Path, version: PolicyVersion, pool: EnvPool, tasks: Any, size: int
) -> tuple[list[Group], list[dict[str, int]]]:
    """The groups of all epochs without their times, and the counts after each."""
    sampler = make_sampler(config, base)
    runner = make_runner(config, base, sampler, pool)
    groups: list[Group] = []
    marks = []
    await sampler.publish(version)
    for epoch in range(EPOCHS):
        specs = [GroupSpec(f"{epoch}/{number}", task, size) for number, task in enumerate(tasks)]
        groups += await runner.run_groups(specs, SamplingParams(), version.number)
        if isinstance(pool, GraphPool):
            await pool.settled()
            marks.append(asdict(pool.counts))
    await runner.close()
    await sampler.close()
    return [timeless(group) for group in groups], marks


def timeless(group: Group) -> Group:
    """The group as it would be if nothing took any time."""
    made = [
        replace(one, turns=tuple(replace(turn, seconds_sampling=0.0, seconds_env=0.0) for turn in one.turns))
        for one in group.trajectories
    ]
    return replace(group, trajectories=tuple(made))
