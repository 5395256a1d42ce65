"""Learning curves measured after the fact: held-out pass@1 of the adapters that a run left, over its training time."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from espalier.configs.schema import RunConfig
from espalier.rollouts.digest import folder_digest
from espalier.rollouts.types import PolicyVersion
from espalier.trainer import tasks as tasklists
from espalier.trainer.rollout_side import open_rollouts

EVALUATION_SEED = 0

Point = tuple[float, float]
"""Seconds of training, pass@1."""


def pass1(config: RunConfig, base: Path, adapters: Sequence[Path | None], count: int, work: Path) -> list[float]:
    """Held-out pass@1 (sampled, T=1) of each adapter (None: the base) on `count` tasks; the same tasks with the same
    random keys for all. `work` is emptied first.
    """
    tasks = tasklists.load(config.env, "test", EVALUATION_SEED, count)
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    found = []
    with open_rollouts(config, base, tasks, work) as side:
        for number, folder in enumerate(adapters, 1):
            place = folder or base
            version = PolicyVersion(number if folder else 0, folder_digest(place), place, str(base))
            side.publish(version)
            found.append(side.evaluate(tasks, version.number, number, greedy=False).pass1)
    return found


def time_to(points: Sequence[Point], target: float) -> float | None:
    """Seconds at which a curve first reaches `target`, on straight lines between its points; None: never."""
    if points[0][1] >= target:
        return points[0][0]
    for (start, low), (stop, high) in pairwise(points):
        if high >= target:
            return start + (target - low) / (high - low) * (stop - start)
    return None
