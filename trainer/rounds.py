"""Where a run's batches come from: groups sampled step by step, synchronously or ahead of the trainer, or replayed.

Always true: synchronously a step's groups are sampled by the version that the step begins with, asynchronously by one
at most `max_staleness` steps older; a group's id is (run, step, place), so that a resumed run meets what was stored
before it was killed and takes that instead of sampling again; groups without signal and failed episodes are counted,
replaced within `max_refills`, and never trained on.
"""

from __future__ import annotations

import math
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace
from itertools import islice
from statistics import fmean
from typing import Any

from ..configs.schema import RunConfig, why_no_trees
from ..envs.core import Task
from ..rollouts.pace import Pace
from ..rollouts.runner import GroupSpec
from ..rollouts.store import TrajectoryStore
from ..rollouts.types import Group, Trajectory
from . import tasks as tasklists
from .batch import TOKEN_MEAN, Batch, rows_of_groups
from .checkpoint import Progress
from .errors import UserError
from .rollout_side import RolloutSide


class SyncSource:
    """A batch a step, sampled by the latest version while the trainer waits."""

    def __init__(self, config: RunConfig, side: RolloutSide, tasks: Sequence[Task], progress: Progress) -> None:
        self._config, self._side, self._tasks, self._progress = config, side, tasks, progress

    def next(self, step: int) -> Batch | None:
        """Sample the groups of `step`, refilling those without signal; None after the last step or past the
        deadline.
        """
        deadline = self._config.eval.deadline_s
        if step > self._config.trainer.steps:
            return None
        if deadline is not None and self._progress.seconds >= deadline:
            self._progress.stopped = "deadline"
            return None
        began = time.perf_counter()
        groups = self.sample(step)
        _refuse_total_failure(step, groups)
        self._learn_difficulty(groups)
        seconds = time.perf_counter() - began
        batch = make_batch(self._config, step, groups, seconds, self._progress.version)
        self._side.rest()
        return replace(batch, stats={**batch.stats, **self._side.graph_figures()})

    def sample(self, step: int) -> list[Group]:
        """All groups of `step`, those without signal and what refilled them included."""
        found = self._side.chains(self._chains(step), self._progress.version, self._enough)
        return [group for chain in found for group in chain]

    def _chains(self, step: int) -> list[list[GroupSpec]]:
        """Each place of the batch has its own chain of tasks, drawn beforehand: what refills it does not depend on what
        ends first.
        """
        section, progress = self._config.trainer, self._progress
        stats = progress.task_stats if self._config.env.draw == "difficulty" else None
        places, length = section.groups, 1 + section.max_refills
        drawn = tasklists.draw(self._tasks, places * length, seed=self._config.seed, step=step, stats=stats)
        return [
            [
                GroupSpec(f"{self._config.name}/{step}/{place + places * turn}", task, section.group_size)
                for turn, task in enumerate(drawn[place::places])
            ]
            for place in range(places)
        ]

    def _enough(self, group: Group) -> bool:
        return usable(group, self._config.trainer.drop_no_signal)

    def _learn_difficulty(self, groups: Sequence[Group]) -> None:
        for group in groups:
            if group.rewards:
                kept = self._progress.task_stats.setdefault(group.task, [0.0, 0.0])
                kept[0] += len(group.rewards)
                kept[1] += math.fsum(group.rewards)


class AsyncSource(SyncSource):
    """A batch a step, sampled while the trainer works on those before it: as far ahead as `schedule.max_staleness` lets
    it be, so that nothing has to be thrown away for its age.
    """

    def __init__(self, config: RunConfig, side: RolloutSide, tasks: Sequence[Task], progress: Progress) -> None:
        super().__init__(config, side, tasks, progress)
        self._pace = Pace(config.schedule.max_staleness)
        self._ahead: dict[int, Future[list[list[Group]]]] = {}

    def sample(self, step: int) -> list[Group]:
        """All groups of `step`; those of the steps that may begin now are begun before they are waited for, and give
        way to what `step` still lacks.
        """
        coming = step
        while coming <= self._config.trainer.steps and self._pace.admits(coming, step - 1):
            if coming not in self._ahead:
                self._ahead[coming] = self._side.begin(self._chains(coming), None, self._enough, coming)
            coming += 1
        return [group for chain in self._side.finish(self._ahead.pop(step)) for group in chain]


def batch_source(config: RunConfig, side: RolloutSide, tasks: Sequence[Task], progress: Progress) -> SyncSource:
    """The source that `schedule.kind` names."""
    kind = AsyncSource if config.schedule.kind == "async" else SyncSource
    return kind(config, side, tasks, progress)


class ReplaySource:
    """Batches from stored trajectories, in the order they were stored; nothing is sampled."""

    def __init__(self, config: RunConfig, store: TrajectoryStore, progress: Progress) -> None:
        self._config, self._progress = config, progress
        consumed = set(progress.consumed)
        fresh = (group for group in store.groups() if not any(t.id in consumed for t in group.trajectories))
        self._groups = (group for group in fresh if usable(group, config.trainer.drop_no_signal))

    def next(self, step: int) -> Batch | None:
        """The next `trainer.groups` groups with signal; None when all are used up or the last step is done."""
        if step > self._config.trainer.steps:
            return None
        began = time.perf_counter()
        groups = list(islice(self._groups, self._config.trainer.groups))
        refused = why_no_trees(self._config.trainer)
        if refused is not None and any(t.parent is not None for group in groups for t in group.trajectories):
            raise UserError(f"these trajectories grew as trees: {refused}")
        seconds = time.perf_counter() - began
        return make_batch(self._config, step, groups, seconds, self._progress.version) if groups else None


def _refuse_total_failure(step: int, groups: Sequence[Group]) -> None:
    """Raise UserError when not one episode of a step ended as a trajectory: going on would only look like a run."""
    failures = [failure for group in groups for failure in group.failures]
    if failures and not any(group.trajectories for group in groups):
        kinds = ", ".join(f"{n} {kind}" for kind, n in Counter(f.kind.value for f in failures).most_common())
        raise UserError(
            f"step {step}: all {len(failures)} episodes failed ({kinds}); the first said: {failures[0].message}; "
            "mend that and continue with --resume"
        )


def usable(group: Group, needs_signal: bool) -> bool:
    """Whether a group can be trained on: two episodes at least, and rewards that differ where that is asked for."""
    return len(group.trajectories) > 1 and (group.has_signal or not needs_signal)


def make_batch(config: RunConfig, step: int, groups: Sequence[Group], seconds: float, version: int) -> Batch:
    """Rows of the usable groups, and the numbers about all of them for the metrics row; they train `version`."""
    section = config.trainer
    used = [group for group in groups if usable(group, section.drop_no_signal)][: section.groups]
    return Batch(
        step,
        tuple(
            rows_of_groups(
                used,
                section.scale_rewards,
                compared=config.branching.advantage,
                token_mean=section.loss in TOKEN_MEAN,
            )
        ),
        tuple(t.id for group in groups for t in group.trajectories),
        {
            **describe(groups),
            **({"branching": grown(groups)} if config.branching.roots else {}),
            **ages(groups, version),
            "groups_used": len(used),
            "groups_no_signal": sum(not usable(group, section.drop_no_signal) for group in groups),
            "seconds_rollout": seconds,
        },
    )


def ages(groups: Sequence[Group], version: int) -> dict[str, Any]:
    """What a metrics row says about the versions that sampled: the oldest, and how many versions lie between an episode
    and the policy that it trains.
    """
    sampled_by = [
        next((span.version for s in t.sequences for span in s.spans if span.version is not None), version)
        for group in groups
        for t in group.trajectories
    ]
    behind = [version - number for number in sampled_by]
    return {
        "sampled_by": min(sampled_by, default=version),
        "staleness_mean": _mean(behind) or 0.0,
        "staleness_max": max(behind, default=0),
    }


def describe(groups: Sequence[Group]) -> dict[str, Any]:
    """What a metrics row says about episodes. Means are over the episodes that ended as trajectories."""
    episodes = [t for group in groups for t in group.trajectories]
    families: dict[str, list[float]] = defaultdict(list)
    for trajectory in episodes:
        families[trajectory.family or "-"].append(trajectory.reward)
    calls = sum(t.info.get("calls", 0) for t in episodes)
    return {
        "reward_mean": _mean([t.reward for t in episodes]),
        "reward_by_family": {name: fmean(rewards) for name, rewards in sorted(families.items())},
        "episodes": sum(len(g.trajectories) + len(g.failures) for g in groups),
        "failures": dict(sorted(Counter(f.kind.value for g in groups for f in g.failures).items())),
        "truncated": sum(t.truncated for t in episodes),
        "sampled_tokens": sum(t.sampled_tokens for t in episodes),
        "sampled_tokens_mean": _mean([t.sampled_tokens for t in episodes]),
        "prompt_tokens_mean": _mean([_prompt_tokens(t) for t in episodes]),
        "episode_tokens_mean": _mean([max((len(s.tokens) for s in t.sequences), default=0) for t in episodes]),
        "turns": sum(t.own_turns for t in episodes),
        "turns_mean": _mean([len(t.turns) for t in episodes]),
        "invalid_call_share": sum(t.info.get("tool_errors", 0) for t in episodes) / calls if calls else 0.0,
    }


def grown(groups: Sequence[Group]) -> dict[str, int]:
    """What a metrics row says about trees: trajectories from the start and branches of them, and what these did not
    sample and no environment did for them: tokens and turns that they have from their parents.
    """
    episodes = [t for group in groups for t in group.trajectories]
    return {
        "trees": sum(t.parent is None for t in episodes),
        "branches": sum(t.parent is not None for t in episodes),
        "tokens_saved": sum(t.inherited_tokens for t in episodes),
        "turns_saved": sum(t.left_at for t in episodes),
    }


def _prompt_tokens(trajectory: Trajectory) -> int:
    """Length of the first prompt."""
    return next((span.start for s in trajectory.sequences[:1] for span in s.spans if span.origin == "sampled"), 0)


def _mean(values: Sequence[float]) -> float | None:
    return fmean(values) if values else None
