"""Many episodes at once: one environment and one sampler each, budgets, deadlines, typed failures, groups.

Emit-everything invariant: every episode that was started ends exactly once, as a trajectory or as a typed failure,
and its group comes back when the last of them has. Every wait has a deadline: a sample `turn_seconds`, a step or a
reset `step_seconds`, a session's end `END_SESSION_SECONDS`. A version is leased for as long as an episode uses it.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from ..configs.schema import EnvSection, EpisodeSection, Overflow
from ..envs.core import AgentEnv, EnvFailure, Task
from .envpool import EnvPool, EnvRaised
from .episode import Ended, Episode, EpisodeSpec, NeedSample, NeedStep, Request, environment_seed, episode_key
from .recipe import env_recipe
from .render import ChatRenderer
from .samplers.base import Sample, Sampler, SampleRequest, SamplerError, SamplingParams
from .store import TrajectoryStore
from .types import Failure, FailureKind, Group, Trajectory

END_SESSION_SECONDS = 10.0
RETRIES = 4
FIRST_PAUSE_SECONDS = 0.05

Outcome = Trajectory | Failure
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class GroupSpec:
    """`size` episodes of `task`. `id` is unique within a run; the episodes are `{id}/{0..size-1}`."""

    id: str
    task: Task
    size: int


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
    ) -> None:
        """`concurrency` episodes run at once, whoever asks for them, in environments of `pool`; `close` closes it."""
        self.sampler = sampler
        self.renderer = renderer
        self.episode = episode
        self.counts = RunnerCounts()
        self.run = run
        self._seed = seed
        self._places = asyncio.Semaphore(concurrency)
        self._store = store
        self._env_id = env_id
        self._system_prompt = system_prompt
        self._pool = pool

    async def run_groups(
        self,
        specs: Sequence[GroupSpec],
        params: SamplingParams,
        version: int | Callable[[], int],
        *,
        on_overflow: Overflow | None = None,
        evaluation: bool = False,
        on_group: Callable[[Group], None] | None = None,
    ) -> list[Group]:
        """Run all episodes of `specs`; groups in the order of `specs`. An episode runs on one version from start to
        end: on `version`, or on what that gives when the episode gets its place.

        `evaluation` is said to the environments, and keeps the episodes out of the store (they must not be mistaken for
        training data). `on_group` is called as groups finish, after they are stored. If this is cancelled, episodes in
        flight end as `Failure(CANCELLED)` and no unfinished group is stored. Raises `StoreError` when the store cannot
        take a group.
        """
        if len({s.id for s in specs}) < len(specs):
            raise ValueError("two groups have the same id")
        done: list[list[Outcome | None]] = [[None] * spec.size for spec in specs]
        groups: list[Group | None] = [_group(spec, []) if spec.size == 0 else None for spec in specs]

        async def play(g: int, i: int) -> None:
            spec = specs[g]
            async with self._places:
                number = version if isinstance(version, int) else version()
                done[g][i] = await self._episode(spec, i, params, number, on_overflow, evaluation)
            outcomes = [o for o in done[g] if o is not None]
            if len(outcomes) == spec.size:
                group = groups[g] = _group(spec, outcomes)
                if self._store is not None and not evaluation:
                    await asyncio.to_thread(self._store.append, group)
                if on_group is not None:
                    on_group(group)

        await together(play(g, i) for g, spec in enumerate(specs) for i in range(spec.size))
        return [g for g in groups if g is not None]

    async def close(self) -> None:
        """Close the environments. The sampler and the store belong to whoever made them."""
        await self._pool.close()

    async def _episode(
        self,
        spec: GroupSpec,
        index: int,
        params: SamplingParams,
        version: int,
        on_overflow: Overflow | None,
        evaluation: bool,
    ) -> Outcome:
        """One episode, whatever happens. Raises only `CancelledError`, and counts the episode's end before that."""
        id = f"{spec.id}/{index}"
        episode = Episode(
            EpisodeSpec(id, spec.id, spec.task, self._env_id, environment_seed(self._seed, spec.task.id), version),
            self.episode,
            self.renderer,
            on_overflow,
        )
        self.counts.started += 1
        cancelled = False
        try:
            with self.sampler.lease(version):
                try:
                    outcome = await self._play(episode, spec.task, params, evaluation)
                finally:
                    await self._end_session(id)
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

    async def _play(self, episode: Episode, task: Task, params: SamplingParams, evaluation: bool) -> Outcome:
        """Drive the state machine to its end with a real environment and a real sampler."""
        started = time.monotonic()
        env: Any = None
        fit = False
        try:
            env = await self._pool.take(task.id)
            options = {"task": task, "evaluation": True} if evaluation else {"task": task}
            request = await self._begin(episode, env, options, started)
            while not isinstance(request, Ended):
                if isinstance(request, NeedSample):
                    request = await self._sampled(episode, request, params, started)
                else:
                    request = await self._stepped(episode, request, env, started)
            fit = True
        except TimeoutError as error:
            return _failed(episode, FailureKind.ENV_TIMEOUT, str(error), retryable=True)
        except (EnvFailure, EnvRaised) as error:
            return _failed(episode, FailureKind.ENV, str(error), retryable=True)
        finally:
            if env is not None:
                (self._pool.give if fit else self._pool.drop)(env)
        return request.outcome

    async def _begin(self, episode: Episode, env: Any, options: dict[str, Any], started: float) -> Request:
        observation, info, tools = await self._pool.reset(env, episode.spec.seed, options)
        return episode.begin(observation, tools, info, self._system_prompt, time.monotonic() - started)

    async def _stepped(self, episode: Episode, request: NeedStep, env: Any, started: float) -> Request:
        before = time.monotonic()
        observation, reward, terminated, truncated, info = await self._pool.step(env, request.action)
        now = time.monotonic()
        return episode.stepped(observation, reward, terminated, truncated, info, now - started, now - before)

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
                    return await self.sampler.sample(request)
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
