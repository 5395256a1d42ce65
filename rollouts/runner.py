"""Many episodes at once: one environment and one sampler each, budgets, deadlines, typed failures, groups.

Emit-everything invariant: every episode that was started ends exactly once, as a trajectory or as a typed failure,
and its group comes back when the last of them has. Every wait has a deadline: a sample `turn_seconds`, a step or a
reset `step_seconds`, a session's end `END_SESSION_SECONDS`. A version is leased for as long as an episode uses it, for
a group that grows as a tree (see `growth`) as long as that grows; its environments are held until then.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from typing import Any, TypeVar

from ..configs.schema import BranchingSection, EnvSection, EpisodeSection, Overflow
from ..envs.core import AgentEnv, EnvFailure, Task
from .envpool import EnvPool, EnvRaised
from .episode import Ended, Episode, EpisodeSpec, NeedSample, NeedStep, Request, environment_seed, episode_key
from .growth import Walk, next_points, trees_at_once
from .places import Places
from .recipe import env_recipe
from .render import ChatRenderer
from .samplers.base import Sample, Sampler, SampleRequest, SamplerError, SamplingParams
from .samplers.greedy import GreedyOnce
from .snapshots import BranchPool
from .store import TrajectoryStore
from .types import Failure, FailureKind, Group, Trajectory

END_SESSION_SECONDS = 10.0
RETRIES = 4
FIRST_PAUSE_SECONDS = 0.05

Outcome = Trajectory | Failure
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class GroupSpec:
    """`size` episodes of `task`. `id` is unique within a run; the episodes are `{id}/{first..first+size-1}`, those
    before `first` are there already. A tree, whose `first` is 0, has fewer when its budget is used up.
    """

    id: str
    task: Task
    size: int
    first: int = 0


@dataclass(slots=True)
class RunnerCounts:
    """What a runner has done. `started == trajectories + sum(failures)` whenever nothing is running."""

    started: int = 0
    trajectories: int = 0
    failures: Counter[FailureKind] = field(default_factory=Counter)
    retries: int = 0
    sampled_tokens: int = 0

    def ended(self, outcome: Outcome) -> None:
        """Count an episode's end."""
        if isinstance(outcome, Failure):
            self.failures[outcome.kind] += 1
        else:
            self.trajectories += 1
            self.sampled_tokens += outcome.sampled_tokens


def env_factory(section: EnvSection, **more: Any) -> Callable[[], AgentEnv]:
    """Makes the configured environment; `more` goes to its constructor beside `section.kwargs`.

    Raises `ValueError` at once when the id is not registered; see `recipe`.
    """
    return env_recipe(section, **more).make


class RolloutRunner:
    """See the module. One runner may be used for training and for evaluation, also at once."""

    def __init__(
        self,
        *,
        sampler: Sampler,
        renderer: ChatRenderer,
        pool: EnvPool,
        episode: EpisodeSection,
        run: str,
        seed: int,
        concurrency: int,
        store: TrajectoryStore | None = None,
        env_id: str = "",
        system_prompt: str = "",
        branching: BranchingSection | None = None,
    ) -> None:
        """`concurrency` episodes run at once, whoever asks for them, in environments of `pool`; `close` closes it.

        `branching`: how groups grow, where they grow as trees; a pool that cannot branch runs chains.
        """
        self.sampler = sampler
        self._answers = GreedyOnce(sampler)
        self.renderer = renderer
        self.episode = episode
        self.counts = RunnerCounts()
        self.run = run
        self._seed = seed
        self._places = Places(concurrency)
        self._store = store
        self._env_id = env_id
        self._system_prompt = system_prompt
        self._pool = pool
        self._branching = branching if branching is not None and branching.roots else None
        self._trees = Places(trees_at_once(concurrency, branching))

    async def run_groups(
        self,
        specs: Sequence[GroupSpec],
        params: SamplingParams,
        version: int | Callable[[], int],
        *,
        on_overflow: Overflow | None = None,
        evaluation: bool = False,
        rank: int = 0,
        on_group: Callable[[Group], None] | None = None,
    ) -> list[Group]:
        """Run all episodes of `specs`; groups in the order of `specs`. An episode runs on one version from start to
        end: on `version`, or on what that gives when the episode gets its place (a tree: when it begins to grow).

        Where there is no place for all at once, episodes of a lower `rank` go first, whoever asked for them.

        `evaluation` is said to the environments, grows no trees, and keeps the episodes out of the store (they must not
        be mistaken for training data). `on_group` is called as groups finish, after they are stored. If this is
        cancelled, episodes in flight end as `Failure(CANCELLED)` and no unfinished group is stored. Raises `StoreError`
        when the store cannot take a group.
        """
        if len({s.id for s in specs}) < len(specs):
            raise ValueError("two groups have the same id")
        done: list[list[Outcome | None]] = [[None] * spec.size for spec in specs]
        groups: list[Group | None] = [_group(spec, []) if spec.size == 0 else None for spec in specs]

        async def ended(g: int, outcomes: Sequence[Outcome]) -> None:
            group = groups[g] = _group(specs[g], outcomes)
            if self._store is not None and not evaluation:
                await asyncio.to_thread(self._store.append, group)
            if on_group is not None:
                on_group(group)

        async def chain(g: int, i: int) -> None:
            async with self._places.held(rank):
                number = version if isinstance(version, int) else version()
                walk = self._walk(specs[g], specs[g].first + i, number, on_overflow)
                done[g][i] = await self._episode(walk, params, evaluation)
            outcomes = [o for o in done[g] if o is not None]
            if len(outcomes) == specs[g].size:
                await ended(g, outcomes)

        async def tree(g: int, section: BranchingSection) -> None:
            await ended(g, await self._tree(specs[g], section, params, version, on_overflow, rank))

        work: list[Coroutine[Any, Any, None]] = []
        for g, spec in enumerate(specs):
            if self._branching is None or evaluation or spec.size <= self._branching.roots:
                work += [chain(g, i) for i in range(spec.size)]
            else:
                work.append(tree(g, self._branching))
        await together(work)
        return [g for g in groups if g is not None]

    async def close(self) -> None:
        """Close the environments. The sampler and the store belong to whoever made them."""
        await self._pool.close()

    async def _tree(
        self,
        spec: GroupSpec,
        section: BranchingSection,
        params: SamplingParams,
        version: int | Callable[[], int],
        on_overflow: Overflow | None,
        rank: int,
    ) -> list[Outcome]:
        """The episodes of a group that grows as a tree; all of them run on one version."""
        walks: list[Walk] = []

        async def play(walk: Walk, parent: Walk | None) -> None:
            async with self._places.held(rank):
                walk.outcome = await self._episode(walk, params, False, parent)

        async with self._trees.held(rank):
            number = version if isinstance(version, int) else version()
            with ExitStack() as stack:
                leased = self._lease(stack, number)
                stack.callback(self._let_go, walks)
                begun = [self._walk(spec, i, number, on_overflow, leased, watched=True) for i in range(section.roots)]
                walks += begun
                await together(play(walk, None) for walk in begun)
                for rounds in range(section.rounds, 0, -1):
                    known = {walk.id: walk for walk in walks}
                    work = []
                    for point in next_points(spec.id, spec.size, walks, section, rounds, self.run):
                        walk = self._walk(spec, len(walks), number, on_overflow, leased, watched=rounds > 1)
                        parent = None if point is None else known[point.parent]
                        if point is not None and parent is not None:
                            walk.episode = parent.episode.branch(walk.episode.spec, point.turn)
                            walk.marks = [None] * point.turn
                        walks.append(walk)
                        work.append(play(walk, parent))
                    await together(work)
        return [walk.outcome for walk in walks if walk.outcome is not None]

    def _lease(self, stack: ExitStack, version: int) -> bool:
        """Hold a version for a whole tree: one that is being retired takes no new leases. False: it is not served, and
        every episode will say so itself.
        """
        try:
            stack.enter_context(self.sampler.lease(version))
        except SamplerError:
            return False
        return True

    def _let_go(self, walks: Sequence[Walk]) -> None:
        """Nobody will branch from these any more."""
        for walk in walks:
            if walk.env is not None:
                self._pool.give(walk.env)
                walk.env = None

    def _walk(
        self,
        spec: GroupSpec,
        index: int,
        version: int,
        on_overflow: Overflow | None,
        leased: bool = False,
        watched: bool = False,
    ) -> Walk:
        seed = environment_seed(self._seed, spec.task.id)
        made = EpisodeSpec(f"{spec.id}/{index}", spec.id, spec.task, self._env_id, seed, version)
        return Walk(Episode(made, self.episode, self.renderer, on_overflow, branchable=watched), leased, watched)

    async def _episode(
        self, walk: Walk, params: SamplingParams, evaluation: bool, parent: Walk | None = None
    ) -> Outcome:
        """One episode, whatever happens. Raises only `CancelledError`, and counts the episode's end before that."""
        episode = walk.episode
        self.counts.started += 1
        cancelled = False
        try:
            with nullcontext() if walk.leased else self.sampler.lease(episode.spec.version):
                try:
                    outcome = await self._play(walk, params, evaluation, parent)
                finally:
                    await self._end_session(walk.id)
        except asyncio.CancelledError:
            cancelled, outcome = True, _failed(episode, FailureKind.CANCELLED, "the run was cancelled")
        except SamplerError as error:
            outcome = _failed(episode, FailureKind.SAMPLER, str(error), error.retryable)
        except Exception as error:
            outcome = _failed(episode, FailureKind.INTERNAL, f"{type(error).__name__}: {error}")
        self.counts.ended(outcome)
        if cancelled:
            raise asyncio.CancelledError
        return outcome

    async def _play(self, walk: Walk, params: SamplingParams, evaluation: bool, parent: Walk | None) -> Outcome:
        """Drive the state machine to its end with a real environment and a real sampler."""
        started = time.monotonic()
        episode = walk.episode
        fit = False
        try:
            request = await (self._begin(walk, evaluation, started) if parent is None else self._part(walk, parent))
            while not isinstance(request, Ended):
                if isinstance(request, NeedSample):
                    request = await self._sampled(episode, request, params, started)
                else:
                    request = await self._stepped(walk, request, started)
            fit = True
        except TimeoutError as error:
            return _failed(episode, FailureKind.ENV_TIMEOUT, str(error), retryable=True)
        except (EnvFailure, EnvRaised) as error:
            return _failed(episode, FailureKind.ENV, str(error), retryable=True)
        finally:
            if fit and walk.watched and walk.ended_well and isinstance(self._pool, BranchPool):
                self._pool.rest(walk.env)
            elif walk.env is not None:
                (self._pool.give if fit else self._pool.drop)(walk.env)
                walk.env = None
        return request.outcome

    async def _begin(self, walk: Walk, evaluation: bool, started: float) -> Request:
        episode, task = walk.episode, walk.episode.spec.task
        walk.env = await self._pool.take(task.id)
        if walk.watched and isinstance(self._pool, BranchPool):
            self._pool.watch(walk.env)
        options = {"task": task, "evaluation": True} if evaluation else {"task": task}
        observation, info, tools = await self._pool.reset(walk.env, episode.spec.seed, options)
        walk.marks.append(None)  # leaving it before its first turn is beginning anew
        return episode.begin(observation, tools, info, self._system_prompt, time.monotonic() - started)

    async def _part(self, walk: Walk, parent: Walk) -> Request:
        """Go on where `parent` stood before the turn that is sampled anew."""
        request = walk.episode.request
        if not isinstance(self._pool, BranchPool) or not isinstance(request, NeedSample):
            raise RuntimeError("an episode can be left only where its environment was marked")
        walk.env = await self._pool.branch(parent.env, parent.marks[request.turn])
        if walk.watched:
            self._pool.watch(walk.env)
        walk.marks.append(None)  # as its parent's, which is left there again instead
        return request

    async def _stepped(self, walk: Walk, request: NeedStep, started: float) -> Request:
        before = time.monotonic()
        observation, reward, terminated, truncated, info = await self._pool.step(walk.env, request.action)
        now = time.monotonic()
        if walk.watched:
            walk.marks.append(self._pool.mark(walk.env) if isinstance(self._pool, BranchPool) else None)
        return walk.episode.stepped(observation, reward, terminated, truncated, info, now - started, now - before)

    async def _sampled(self, episode: Episode, request: NeedSample, params: SamplingParams, started: float) -> Request:
        before = time.monotonic()
        left = max(self.episode.max_seconds - (before - started), 0.001)
        deadline = min(self.episode.turn_seconds, left)
        id = episode.spec.id
        asked = SampleRequest(
            session=id,
            prompt=request.prompt,
            version=episode.spec.version,
            key=episode_key(self.run, id, request.turn),
            max_tokens=request.max_tokens,
            stop=self.renderer.stop_ids,
            params=params,
            deadline_s=deadline,
            group=episode.spec.group,
        )
        try:
            sample = await self._sample(asked)
        except TimeoutError:
            elapsed = time.monotonic() - started
            if deadline < self.episode.turn_seconds:
                return episode.out_of_time(elapsed)
            return episode.fail(FailureKind.SAMPLER_TIMEOUT, f"no sample within {deadline:g} s", retryable=True)
        now = time.monotonic()
        return episode.sampled(sample, elapsed=now - started, seconds=now - before)

    async def _sample(self, request: SampleRequest) -> Sample:
        """The sampler's answer within the request's deadline; retryable errors are tried again, pauses doubling."""
        pause = FIRST_PAUSE_SECONDS
        async with asyncio.timeout(request.deadline_s):
            for attempt in range(RETRIES + 1):
                try:
                    return await self._answers.sample(request)
                except SamplerError as error:
                    if not error.retryable or attempt == RETRIES:
                        raise
                self.counts.retries += 1
                await asyncio.sleep(pause)
                pause *= 2
        raise AssertionError("unreachable: the last attempt returns or raises")

    async def _end_session(self, session: str) -> None:
        """Free the session; a sampler that fails at this must not spoil an episode that has its outcome."""
        try:
            async with asyncio.timeout(END_SESSION_SECONDS):
                await self.sampler.end_session(session)
        except (SamplerError, TimeoutError):
            self.counts.retries += 1


async def together(work: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """The results of all, which run at once. When one raises, or this is cancelled, the others are cancelled and ended
    before it is passed on.
    """
    tasks = [asyncio.create_task(one) for one in work]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _failed(episode: Episode, kind: FailureKind, message: str, retryable: bool = False) -> Outcome:
    if isinstance(episode.request, Ended):
        return episode.request.outcome
    return episode.fail(kind, message, retryable).outcome


def _group(spec: GroupSpec, outcomes: Sequence[Outcome]) -> Group:
    return Group(
        id=spec.id,
        task=spec.task.id,
        trajectories=tuple(o for o in outcomes if isinstance(o, Trajectory)),
        failures=tuple(o for o in outcomes if isinstance(o, Failure)),
    )
