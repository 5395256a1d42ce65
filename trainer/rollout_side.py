"""The rollout side of a run: environments, sampler, runner and store in an event loop of their own, behind blocking
calls.

Always true: every wait has a deadline that grows with what was begun; a group that is stored already is taken instead
of sampled again; episodes that failed beside others that did not are replaced, up to `max_refills` times.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..configs.schema import RunConfig
from ..envs.core import Task
from ..rollouts.envpool import EnvPool
from ..rollouts.episode import episode_key
from ..rollouts.graph.core import GraphCounts
from ..rollouts.graph.pool import GraphPool
from ..rollouts.runner import GroupSpec, RolloutRunner, together
from ..rollouts.samplers.base import (
    PUBLISH_SECONDS,
    Sample,
    Sampler,
    SampleRequest,
    SamplerError,
    SamplingParams,
    Sleeper,
)
from ..rollouts.store import TrajectoryStore
from ..rollouts.types import Group, PolicyVersion
from .background import Background
from .evaluate import EvalResult, evaluate_tasks
from .memory import release_cached_memory
from .sampling import make_pool, make_runner, make_sampler

SLACK_SECONDS = 60.0
"""Added to every deadline that is a sum of episodes' deadlines."""

RESTART_SECONDS = 1200.0
"""Until an engine that served before serves again: its start, and the loading of its versions."""

FIRST_PAUSE_SECONDS = 0.05
LONGEST_PAUSE_SECONDS = 5.0

PROBE_TOKENS = 32
"""Sampled behind each prompt of a probe."""


class RolloutSide:
    """Everything that makes trajectories, for callers without an event loop. It closes `sampler` and `pool`, also
    where it cannot be made.
    """

    def __init__(self, config: RunConfig, base: Path, sampler: Sampler, pool: EnvPool, folder: Path) -> None:
        self.config = config
        self._sampler = sampler
        with ExitStack() as stack:
            last = stack.enter_context(ExitStack())
            self._loop = Background("espalier-rollouts")
            stack.callback(self._loop.close)
            stack.callback(lambda: self._loop.call(sampler.close(), SLACK_SECONDS))
            stack.callback(lambda: self._loop.call(pool.close(), SLACK_SECONDS))
            self.store = TrajectoryStore(folder / "trajectories")
            last.callback(self.store.close)  # after all that may write to it
            self._runner = self._loop.call(self._make_runner(base, pool), SLACK_SECONDS)
            self._opened = stack.pop_all()
        self._graph = pool if isinstance(pool, GraphPool) else None
        self._counted, self._counted_file = GraphCounts(), (0, 0)
        self._seconds = config.episode.max_seconds
        self._params = SamplingParams(config.sampling.temperature, config.sampling.top_p, config.sampling.top_k)
        self._published: list[int] = []
        self._sleeper = sampler if isinstance(sampler, Sleeper) and sampler.sleeps else None
        self._asleep = False
        self.seconds_turning = 0.0
        """What the sampler took to fall asleep and to wake until now."""
        self._begun: dict[Future[list[list[Group]]], int] = {}  # and how many episodes they take at most

    async def _make_runner(self, base: Path, pool: EnvPool) -> RolloutRunner:
        return make_runner(self.config, base, self._sampler, pool, self.store)

    def rest(self) -> None:
        """Leave the card to the trainer, where they have it by turns; what needs the sampler next wakes it."""
        if self._sleeper is not None and not self._asleep:
            with self._turning():
                self._patiently(self._sleeper.sleep)
                self._asleep = True

    def _rouse(self) -> None:
        if self._sleeper is not None and self._asleep:
            with self._turning():
                release_cached_memory()
                self._patiently(self._sleeper.wake)
                self._asleep = False

    def _patiently(self, turn: Callable[[], Awaitable[None]]) -> None:
        """`turn`; longer for an engine that has served already, and may be starting again."""
        seconds = RESTART_SECONDS if self._published else PUBLISH_SECONDS
        self._loop.call(_patiently(turn, seconds), seconds + PUBLISH_SECONDS + SLACK_SECONDS)

    @contextmanager
    def _turning(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds_turning += time.perf_counter() - began

    def graph_figures(self) -> dict[str, Any]:
        """What the operation graph was asked and saved since the last call, as a metrics row says it; empty without
        one. `notes` (where there are any): what a person should know.
        """
        if self._graph is None:
            return {}
        graph = self._graph.graph
        now = replace(graph.counts)
        told: dict[str, Any] = now.since(self._counted)
        self._counted = now
        if notes := graph.told():
            told["notes"] = notes
        if graph.store is not None:
            now_file = (graph.store.corrupted, graph.store.left_out)
            told["corrupted"], told["left_out"] = (a - b for a, b in zip(now_file, self._counted_file, strict=True))
            self._counted_file = now_file
        return {"graph": told}

    def publish(self, version: PolicyVersion) -> None:
        """Serve `version` from now on and let the others go as their episodes end; an engine that died or hangs is
        waited for. Raises `SamplerError`.
        """
        self._rouse()
        self._patiently(lambda: self._sampler.publish(version))
        for old in self._published:
            if old != version.number:
                self._loop.call(self._sampler.retire(old), SLACK_SECONDS)
        self._published = [version.number]

    def groups(self, specs: Sequence[GroupSpec], version: int) -> list[Group]:
        """The groups of `specs`: those that are stored already, the rest (and those that failed whole) sampled now."""
        return [group for chain in self.chains([[spec] for spec in specs], version, _anything) for group in chain]

    def chains(
        self, chains: Sequence[Sequence[GroupSpec]], version: int, enough: Callable[[Group], bool]
    ) -> list[list[Group]]:
        """Of each chain the groups up to the first that is `enough`, taken or sampled like `groups`; all chains at
        once, so that no slot of the sampler waits for the slowest episode of a round.
        """
        return self.finish(self.begin(chains, version, enough))

    def begin(
        self,
        chains: Sequence[Sequence[GroupSpec]],
        version: int | None,
        enough: Callable[[Group], bool],
        rank: int = 0,
    ) -> Future[list[list[Group]]]:
        """Begin with `chains` and go on; `finish` waits for them. `version` None: each episode runs on what is the
        latest when it begins. What has a lower `rank` gets the slots first, evaluations (rank 0) before all.
        """
        self._rouse()
        future = self._loop.start(together(self._chain(chain, version, enough, rank) for chain in chains))
        tries = 1 + self.config.trainer.max_refills
        self._begun[future] = tries * sum(spec.size for chain in chains for spec in chain)
        return future

    def finish(self, future: Future[list[list[Group]]]) -> list[list[Group]]:
        """The groups that were begun, when all are done; what was begun besides takes the same slots."""
        try:
            tries = 1 + self.config.trainer.max_refills  # of a place, one after another, and of a group's episodes
            return self._loop.result(future, self._deadline(sum(self._begun.values()), tries * tries))
        finally:
            del self._begun[future]

    def abandon(self) -> None:
        """End what was begun and nobody will wait for any more; unfinished groups are not stored."""
        for future in self._begun:
            future.cancel()
        self._begun.clear()

    async def _chain(
        self, chain: Sequence[GroupSpec], version: int | None, enough: Callable[[Group], bool], rank: int
    ) -> list[Group]:
        by = (lambda: self._sampler.latest) if version is None else version
        groups: list[Group] = []
        for spec in chain:
            found = self.store.group(spec.id)
            if found is None or not found.trajectories:
                (found,) = await self._runner.run_groups([spec], self._params, by, rank=rank)
            while (lost := self._lost(spec, found)) is not None:
                (more,) = await self._runner.run_groups([lost], self._params, by, rank=rank)
                trajectories, failures = found.trajectories + more.trajectories, found.failures + more.failures
                found = replace(found, trajectories=trajectories, failures=failures)
            groups.append(found)
            if enough(found):
                break
        return groups

    def _lost(self, spec: GroupSpec, group: Group) -> GroupSpec | None:
        """The episodes that stand in for those of `group` that failed last, if others did not; None after
        `max_refills` rounds. What is stored of a group says it all, so a resumed run goes on with the same ones.
        """
        if not group.trajectories or self.config.branching.roots:
            return None
        failed = {failure.id for failure in group.failures}
        for _ in range(self.config.trainer.max_refills):
            lost = sum(f"{spec.id}/{i}" in failed for i in range(spec.first, spec.first + spec.size))
            spec = replace(spec, size=lost, first=spec.first + spec.size)
            if not lost or spec.first == len(group.trajectories) + len(failed):
                return spec if lost else None
        return None

    def evaluate(self, tasks: Sequence[Task], version: int, step: int, greedy: bool) -> EvalResult:
        """Measure `version`, which must be published."""
        self._rouse()
        work = evaluate_tasks(self._runner, tasks, version, greedy=greedy, step=step)
        return self._loop.call(work, self._deadline(len(tasks)))

    def probe(self, prompts: Sequence[tuple[int, ...]], version: int) -> list[Sample]:
        """A few tokens behind each prompt, from the whole distribution of `version`, which must be published. Raises
        `SamplerError`, or `TimeoutError` at the deadline of a turn.
        """
        self._rouse()
        seconds = self.config.episode.turn_seconds
        return self._loop.call(self._probe(prompts, version, seconds), seconds + SLACK_SECONDS)

    async def _probe(self, prompts: Sequence[tuple[int, ...]], version: int, seconds: float) -> list[Sample]:
        whole = SamplingParams(self.config.sampling.temperature)
        requests = [
            SampleRequest(
                f"probe-{version}-{i}",
                prompt,
                version,
                episode_key(self.config.name, f"probe-{version}-{i}", 0),
                min(PROBE_TOKENS, self.config.episode.max_tokens - len(prompt)),
                (),
                whole,
                seconds,
            )
            for i, prompt in enumerate(prompts)
        ]
        try:
            return list(await asyncio.gather(*map(self._sampler.sample, requests)))
        finally:
            for request in requests:
                await self._sampler.end_session(request.session)

    def _deadline(self, episodes: int, follow: int = 1) -> float:
        waves = math.ceil(episodes / (self.config.sampler.slots * self.config.sampler.replicas))
        rounds = self.config.branching.rounds if self.config.branching.roots else 0
        return (waves + follow) * (1 + rounds) * self._seconds + SLACK_SECONDS  # rounds of a tree follow each other

    def close(self) -> None:
        """Stop sampling and close the environments and the store."""
        self.abandon()
        self._opened.close()


async def _patiently(turn: Callable[[], Awaitable[None]], seconds: float) -> None:
    """`turn`, tried again while an engine is started anew or its last cancelled requests leave, with growing pauses:
    no try begins after `seconds`.
    """
    deadline = time.monotonic() + seconds
    pause = FIRST_PAUSE_SECONDS
    while True:
        try:
            return await turn()
        except SamplerError as error:
            if not error.retryable or time.monotonic() > deadline:
                raise
        await asyncio.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE_SECONDS)


@contextmanager
def open_rollouts(
    config: RunConfig, base: Path, tasks: Sequence[Task], folder: Path, training: int = 0
) -> Iterator[RolloutSide]:
    """The rollout side with the configured sampler and environment; `training` processes train beside it.

    Raises UserError for an environment that cannot be made.
    """
    pool = make_pool(config, tasks)
    side = RolloutSide(config, base, make_sampler(config, base, training), pool, folder)
    try:
        yield side
    finally:
        side.close()


def _anything(_: Group) -> bool:
    return True
