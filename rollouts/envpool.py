"""Environments, kept and reused, and the threads that step them.

`EnvPool` is what a runner needs of either kind: threads of this process (here) or processes (`envprocess`).

Always true: every call has a deadline, counted from when it starts to run; a call that misses it is answered by
`TimeoutError`, its thread is given up and replaced, and its environment is never used again. How many threads may be
stuck is bounded; beyond that calls are refused with a sentence. Environments that failed are dropped, never reused.

A fast environment (0.3 ms a step) is best served by one thread: more would only queue for the interpreter lock. When
every thread has been busy with one call for `SLOW_SECONDS` (it waits for a process or a service, or hangs) another is
started, so that a slow step holds up no other; there are never more than `max_workers` of them.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Mapping
from queue import SimpleQueue
from typing import Any, Generic, Protocol, TypeVar, cast

from ..envs.core import Action, AgentEnv, EnvFailure, Observation

T = TypeVar("T")

SLOW_SECONDS = 0.1

Opening = tuple[Observation, Mapping[str, Any], list[dict[str, Any]]]
"""What a reset answers: observation, info, and the tools offered in OpenAI's shape."""
StepResult = tuple[Observation, float, bool, bool, Mapping[str, Any]]
"""What a step answers: observation, reward, terminated, truncated, info."""


class EnvRaised(RuntimeError):
    """An exception that an environment did not declare; says its type and its message."""


class EnvPool(Protocol):
    """Environments for episodes. `take`, `reset` and `step` raise `TimeoutError` at their deadline, `EnvFailure`, and
    `EnvRaised` for what else the environment raises; nothing else. A handle is good for one episode at a time.
    """

    async def take(self, task: str) -> Any:
        """A handle to an environment for an episode of the task with this id. End it by `give` or `drop`."""

    async def reset(self, handle: Any, seed: int, options: dict[str, Any]) -> Opening:
        """Start an episode. `info` may be reduced to what can be kept as JSON."""

    async def step(self, handle: Any, action: Action) -> StepResult:
        """Carry out one turn. `info` may be reduced to what can be kept as JSON."""

    def give(self, handle: Any) -> None:
        """The environment is fit for another episode."""

    def drop(self, handle: Any) -> None:
        """The environment failed, or its call was abandoned: it is never used again."""

    async def close(self) -> None:
        """Close the environments and end what steps them. Closing twice is allowed."""


async def theirs(call: Awaitable[T]) -> T:
    """Await a call into an environment; what it raises is marked as its own, so that our bugs are not blamed on it."""
    try:
        return await call
    except (EnvFailure, TimeoutError):
        raise
    except Exception as error:
        raise EnvRaised(f"{type(error).__name__}: {error}") from error


class _Job(Generic[T]):
    """One call: made in the event loop, run in a thread, answered in the event loop."""

    def __init__(self, function: Callable[[], T]) -> None:
        self.function = function
        self.loop = asyncio.get_running_loop()
        self.future: asyncio.Future[T] = self.loop.create_future()
        self.started: float | None = None
        self.worker: _Worker | None = None
        self.timer: asyncio.TimerHandle | None = None

    def answer(self, result: T | None, error: BaseException | None) -> None:
        if self.future.done():
            return
        if error is None:
            self.future.set_result(cast(T, result))
        elif isinstance(error, Exception) and not isinstance(error, StopIteration):
            self.future.set_exception(error)
        else:  # SystemExit, KeyboardInterrupt or StopIteration out of an environment must not reach the event loop
            self.future.set_exception(EnvFailure("env_raised", f"{type(error).__name__}: {error}"))


class _Worker(threading.Thread):
    """Runs jobs until told to stop or given up. A daemon: a stuck one does not hold up the interpreter's exit."""

    def __init__(self, jobs: SimpleQueue[_Job[Any] | None]) -> None:
        super().__init__(name="espalier-env", daemon=True)
        self.given_up = False
        self.busy_since: float | None = None
        self.lock = threading.Lock()
        self._jobs = jobs

    def run(self) -> None:
        while (job := self._jobs.get()) is not None:
            result, error = None, None
            self.busy_since = time.monotonic()
            job.worker, job.started = self, self.busy_since
            if not job.future.cancelled():
                try:
                    result = job.function()
                except BaseException as raised:
                    error = raised
            with self.lock:
                job.worker = self.busy_since = None
                if self.given_up:
                    return
            try:
                job.loop.call_soon_threadsafe(job.answer, result, error)
            except RuntimeError:  # the loop has closed: nobody waits
                continue


class ThreadEnvPool:
    """`workers` calls run at once, slow ones more; idle environments are kept, as many as ever ran at once.

    More than one worker helps environments that wait for something outside the interpreter lock. A handle is the
    environment itself. `terse`: shortest tool schemas.
    """

    def __init__(
        self,
        make_env: Callable[[], AgentEnv],
        *,
        deadline_s: float,
        terse: bool = False,
        workers: int = 1,
        max_workers: int = 16,
        max_stuck: int = 8,
    ) -> None:
        self._make = make_env
        self._deadline = deadline_s
        self.terse = terse
        self._max_stuck = max_stuck
        self._max_workers = max(workers, max_workers)
        self._jobs: SimpleQueue[_Job[Any] | None] = SimpleQueue()
        self._first_workers = workers
        self._workers: list[_Worker] = []
        self._stuck: list[_Worker] = []
        self._idle: list[AgentEnv] = []
        self._ending: set[asyncio.Future[None]] = set()
        self._closed = False

    @property
    def stuck(self) -> int:
        """Threads that missed a deadline and are still running."""
        self._stuck = [w for w in self._stuck if w.is_alive()]
        return len(self._stuck)

    async def take(self, task: str = "") -> AgentEnv:
        """An idle environment, or a new one."""
        return self._idle.pop() if self._idle else await theirs(self.call(self._make))

    async def reset(self, handle: AgentEnv, seed: int, options: dict[str, Any]) -> Opening:
        """See `EnvPool`; `info` is the environment's own."""

        def reset() -> Opening:
            observation, info = handle.reset(seed=seed, options=options)
            return observation, info, [tool.to_openai(terse=self.terse) for tool in handle.tools]

        return await theirs(self.call(reset))

    async def step(self, handle: AgentEnv, action: Action) -> StepResult:
        """See `EnvPool`; `info` is the environment's own."""
        return await theirs(self.call(lambda: handle.step(action)))

    def give(self, handle: AgentEnv) -> None:
        """The environment is fit for another episode."""
        self._idle.append(handle)

    def drop(self, handle: AgentEnv) -> None:
        """Nothing is to be done: a pool keeps only what was given back."""

    def end(self, handle: AgentEnv) -> None:
        """The environment is fit, and not wanted again: it is closed behind whatever else is to be done."""
        ending = asyncio.ensure_future(self.call(handle.close))
        self._ending.add(ending)
        ending.add_done_callback(self._ended)

    def _ended(self, ending: asyncio.Future[None]) -> None:
        self._ending.discard(ending)
        if not ending.cancelled():
            ending.exception()  # nobody's: the environment is gone either way

    async def call(self, function: Callable[[], T]) -> T:
        """Run `function` in a worker.

        Raises what it raises, `TimeoutError` at the deadline, `EnvFailure` when too much is stuck.
        """
        if self._closed:
            raise EnvFailure("pool_closed", "the environments have been closed")
        if self.stuck >= self._max_stuck:
            raise EnvFailure(
                "workers_stuck", f"{self.stuck} environment calls hang past {self._deadline:g} s; no more are started"
            )
        if not self._workers:
            self._workers = [self._start_worker() for _ in range(self._first_workers)]
        job = _Job(function)
        self._jobs.put(job)
        job.timer = job.loop.call_later(min(SLOW_SECONDS, self._deadline), self._look_at, job)
        try:
            return await job.future
        finally:
            if job.timer is not None:
                job.timer.cancel()

    def _look_at(self, job: _Job[Any]) -> None:
        """The timer rang: help a call that waits for slow ones, give up a call that has run for its whole deadline."""
        now = time.monotonic()
        if job.future.done():
            return
        if job.started is None:
            self._help(now)
            job.timer = job.loop.call_later(min(SLOW_SECONDS, self._deadline), self._look_at, job)
            return
        left = self._deadline - (now - job.started)
        worker = job.worker
        if left > 0 or worker is None:
            job.timer = job.loop.call_later(max(left, 0.01), self._look_at, job)
            return
        with worker.lock:
            if job.worker is not worker:  # it has just finished; its answer is on the way
                return
            worker.given_up = True
        self._stuck.append(worker)
        self._workers.remove(worker)
        self._workers.append(self._start_worker())
        job.answer(None, TimeoutError(f"the environment did not answer within {self._deadline:g} s"))

    def _help(self, now: float) -> None:
        """Start another thread if every one has been at the same call for long."""
        busy = [w.busy_since for w in self._workers]
        if len(busy) < self._max_workers and all(t is not None and now - t >= SLOW_SECONDS for t in busy):
            self._workers.append(self._start_worker())

    def _start_worker(self) -> _Worker:
        worker = _Worker(self._jobs)
        worker.start()
        return worker

    async def close(self) -> None:
        """Close the idle environments and stop the threads; those that are stuck are left behind (daemons)."""
        if self._closed:
            return
        while self._idle:
            self.end(self._idle.pop())
        await asyncio.gather(*self._ending, return_exceptions=True)
        self._closed = True
        for _ in self._workers:
            self._jobs.put(None)
