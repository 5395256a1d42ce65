"""Environments in worker processes, so that their work and the sampler's do not take turns at one interpreter lock.

Always true: every call ends, by an answer or typed: when a worker dies, or hangs so that not even its other threads
run, all its calls end with `EnvFailure` or `TimeoutError`, it is killed with its process group and reaped, and the next
`take` starts another; after `max_restarts` workers in a row that did not answer a single call no more are started.
Episodes of one task go to one worker, whose caches serve the whole group. The event loop itself reads the sockets: one
wake-up brings all answers that are there, and no thread stands between a worker and its episode.

Started by `subprocess`, not by `multiprocessing`: neither is the user's program run again, nor are locks of running
threads copied.
"""

from __future__ import annotations

import asyncio
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count
from typing import Any, cast
from zlib import crc32

from ..envs.core import Action, EnvFailure
from .envpool import EnvRaised, Opening, StepResult
from .graph.states import Came, Kept, Traits
from .link import Link
from .recipe import EnvRecipe

START_SECONDS = 120.0
SLACK_SECONDS = 10.0
"""How long a worker that was silent for a call's whole deadline may take to answer a ping."""
CLOSE_SECONDS = 10.0
LAST_WORDS_SECONDS = 1.0
"""How long a worker that hung up may take to end, and to get its last output out."""
KEPT_OUTPUT = 4000


@dataclass(frozen=True, slots=True)
class _Handle:
    """An environment of a worker."""

    worker: _Worker
    number: int


@dataclass(slots=True)
class _Place:
    """A worker, and its successors. `barren`: how many of them in a row have ended without answering a call."""

    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    worker: _Worker | None = None
    barren: int = 0


class ProcessEnvPool:
    """A `StatePool` of `processes` workers, started when they are first needed. To be used in one event loop.

    `deadline_s`: of a call, from when it starts to run. Raises `ValueError` for a recipe that no other process can
    follow.
    """

    def __init__(
        self,
        recipe: EnvRecipe,
        *,
        processes: int,
        deadline_s: float,
        terse: bool = False,
        slack_s: float = SLACK_SECONDS,
        max_restarts: int = 5,
    ) -> None:
        self._opening = ("open", list(sys.path), recipe.pickled(), deadline_s, terse)
        self._deadline, self._slack, self._max_restarts = deadline_s, slack_s, max_restarts
        self._places = [_Place() for _ in range(processes)]
        self._numbers = count()
        self._closed = False

    @property
    def pids(self) -> list[int]:
        """Process ids of the workers that run."""
        workers = (place.worker for place in self._places)
        return [worker.pid for worker in workers if worker is not None and worker.alive]

    async def take(self, task: str) -> _Handle:
        """See `EnvPool`; the same task goes to the same worker. The environment is made by the first reset."""
        worker = await self._worker(self._places[crc32(task.encode()) % len(self._places)])
        return _Handle(worker, next(self._numbers))

    async def reset(self, handle: _Handle, seed: int, options: dict[str, Any]) -> Opening:
        """See `EnvPool`; `info` is reduced to what can be kept as JSON."""
        return cast(Opening, await handle.worker.call("reset", handle.number, pickle.dumps((seed, options))))

    async def step(self, handle: _Handle, action: Action) -> StepResult:
        """See `EnvPool`; `info` is reduced to what can be kept as JSON."""
        return cast(StepResult, await handle.worker.call("step", handle.number, pickle.dumps((action,))))

    async def begin(self, handle: _Handle, seed: int, options: dict[str, Any], keep: bool) -> tuple[Came, Traits]:
        """See `StatePool`."""
        said = pickle.dumps((seed, options, keep))
        return cast("tuple[Came, Traits]", await handle.worker.call("begin", handle.number, said))

    async def go_on(self, handle: _Handle, at: Kept | None, action: Action, keep: bool) -> Came:
        """See `StatePool`."""
        return cast(Came, await handle.worker.call("go_on", handle.number, pickle.dumps((at, action, keep))))

    async def fork(self, handle: _Handle, at: Kept) -> _Handle:
        """See `StatePool`."""
        made = _Handle(handle.worker, next(self._numbers))
        try:
            await handle.worker.call("fork", made.number, pickle.dumps((handle.number, at)))
        except BaseException:
            self.drop(made)
            raise
        return made

    def forget(self, handle: _Handle, kept: Kept) -> None:
        """See `StatePool`."""
        handle.worker.tell("forget", kept)

    def alive(self, handle: _Handle) -> bool:
        """See `StatePool`."""
        return handle.worker.alive

    def together(self, one: _Handle, other: _Handle) -> bool:
        """See `StatePool`."""
        return one.worker is other.worker

    def give(self, handle: _Handle) -> None:
        """See `EnvPool`."""
        handle.worker.tell("give", handle.number)

    def drop(self, handle: _Handle) -> None:
        """See `EnvPool`."""
        handle.worker.tell("drop", handle.number)

    async def close(self) -> None:
        """Ask the workers to close their environments and to end; kill those that do not within `CLOSE_SECONDS`."""
        self._closed = True
        workers = [place.worker for place in self._places if place.worker is not None]
        await asyncio.gather(*(worker.close() for worker in workers))

    async def _worker(self, place: _Place) -> _Worker:
        """The worker of a place; a new one for a dead one."""
        async with place.lock:
            if self._closed:
                raise EnvFailure("pool_closed", "the environments have been closed")
            last = place.worker
            if last is not None and last.alive:
                return last
            if last is not None and not last.counted:
                last.counted = True
                place.barren = 0 if last.answered else place.barren + 1
            if last is not None and place.barren > self._max_restarts:
                raise EnvFailure(
                    "workers_failing",
                    f"{place.barren} environment processes in a row ended before they had answered a call, so no more "
                    f"are started; the last one: {await last.reason()}",
                )
            worker = place.worker = _Worker(self._deadline, self._slack)
            await worker.start(self._opening)
            return worker


class _Worker:
    """A process, its socket, its output, and the calls it owes an answer."""

    def __init__(self, deadline_s: float, slack_s: float) -> None:
        self.alive = True
        self.answered = 0
        self.counted = False
        self._deadline, self._slack = deadline_s, slack_s
        self._loop = asyncio.get_running_loop()
        self._link = Link(self._received, lambda: self._end(None))
        self._output = _Output()
        self._ready: asyncio.Future[None] = self._loop.create_future()
        self._calls: dict[int, asyncio.Future[Any]] = {}
        self._numbers = count()
        self._heard = 0.0
        self._pinged = False
        self._timer: asyncio.TimerHandle | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._burial: asyncio.Task[str] | None = None
        self._closing = False
        self._gone = asyncio.Event()

    @property
    def pid(self) -> int:
        """Of the process; 0 when there is none."""
        return self._process.pid if self._process else 0

    async def start(self, opening: tuple[Any, ...]) -> None:
        """Start the process and wait until it is ready. Raises `EnvFailure` when it cannot be."""
        try:
            here = self._spawn()
            await self._loop.connect_read_pipe(lambda: self._output, self._process and self._process.stdout)
            await self._loop.create_connection(lambda: self._link, sock=here)
            self._link.send(*opening)
            async with asyncio.timeout(START_SECONDS):
                await asyncio.shield(self._ready)
        except (OSError, ValueError) as error:  # a TimeoutError is an OSError
            said = str(error) or f"it was not ready within {START_SECONDS:g} s"
            self._end(EnvFailure("worker_start", f"the environment process did not start: {said}"))
            raise EnvFailure("worker_start", await self.reason()) from error
        except asyncio.CancelledError:
            self._end(EnvFailure("worker_start", "the start of the environment process was cancelled"))
            raise

    def _spawn(self) -> socket.socket:
        """Start the process; this process's end of the socket."""
        here, there = socket.socketpair()
        program = [sys.executable, "-P", "-m", f"{__package__}.envworker", str(there.fileno())]
        try:
            with there:
                self._process = subprocess.Popen(
                    program,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,  # this process's own is for results only
                    stderr=subprocess.STDOUT,
                    pass_fds=(there.fileno(),),
                    start_new_session=True,  # not reached by the terminal's interrupt; ended as a group
                )
        except BaseException:
            here.close()
            raise
        return here

    async def call(self, operation: str, handle: int, payload: bytes) -> Any:
        """The worker's answer to an operation. Raises as `EnvPool` says."""
        if not self.alive:
            raise EnvFailure("worker_died", await self.reason())
        number = next(self._numbers)
        if not self._calls:
            self._heard, self._pinged = time.monotonic(), False
        future: asyncio.Future[Any] = self._loop.create_future()
        self._calls[number] = future
        if self._timer is None:
            self._timer = self._loop.call_later(self._deadline, self._look)
        try:
            try:
                self._link.send(operation, number, handle, payload)
            except ValueError as error:
                raise EnvFailure("too_large", str(error)) from error
            return await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled() and future.exception() is None:
                self._unclaimed(future.result())
            raise
        finally:
            self._calls.pop(number, None)

    def tell(self, operation: str, what: int | Kept) -> None:
        """Say what needs no answer; a dead worker does not mind."""
        if self.alive:
            self._link.send(operation, what)

    async def reason(self) -> str:
        """Why it ended, once it has."""
        return await asyncio.shield(self._burial) if self._burial else "it has not ended"

    async def close(self) -> None:
        """End it: asked first, then killed. Its calls end with `EnvFailure`."""
        if self.alive:
            self._closing = True
            self._link.send("close")
            with suppress(TimeoutError):
                await asyncio.wait_for(self._gone.wait(), CLOSE_SECONDS)
            self._end(EnvFailure("pool_closed", "the environments have been closed"))
        await self.reason()

    def _received(self, message: tuple[Any, ...]) -> None:
        self._heard, self._pinged = time.monotonic(), False
        answer, *rest = message
        if answer == "pong":
            return
        if answer in ("ready", "failed"):
            if answer == "ready" and not self._ready.done():
                self._ready.set_result(None)
            elif answer == "failed":
                said = f"the environment process could not start: {rest[0]}"
                self._end(EnvFailure("worker_start", said))
            return
        self._answer(answer, *rest)

    def _answer(self, answer: str, number: int, *said: Any) -> None:
        future = self._calls.get(number)
        if future is None or future.done():  # abandoned
            if answer == "done":
                self._unclaimed(said[0])
            return
        if answer == "timeout":
            future.set_exception(TimeoutError(said[0]))
            return
        self.answered += 1
        match answer:
            case "done":
                future.set_result(said[0])
            case "failure":
                future.set_exception(EnvFailure(said[0], said[1]))
                if said[0] == "workers_stuck":  # it will start no more calls, another worker will
                    self._end(EnvFailure(said[0], said[1]))
            case _:
                future.set_exception(EnvRaised(said[0]))

    def _unclaimed(self, result: Any) -> None:
        """Nobody waits for this any more, so the state that it tells of is not kept."""
        came = result[0] if isinstance(result, tuple) and result else result
        if isinstance(came, Came) and came.kept is not None:
            self.tell("forget", came.kept)

    def _look(self) -> None:
        """The timer rang: a worker that was silent for a whole deadline is pinged, then given up."""
        self._timer = None
        if not self.alive or not self._calls:
            return
        left = self._deadline - (time.monotonic() - self._heard)
        if left > 0:
            self._timer = self._loop.call_later(left, self._look)
        elif not self._pinged:
            self._pinged = True
            self._link.send("ping")
            self._timer = self._loop.call_later(self._slack, self._look)
        else:
            self._end(
                TimeoutError(
                    f"the environment did not answer within {self._deadline:g} s and held up its whole process, which "
                    "was ended"
                )
            )

    def _end(self, error: EnvFailure | TimeoutError | None) -> None:
        """Once: it hung up (no `error`), or is to be killed for `error`. Its calls are answered when it is buried."""
        if self.alive:
            self.alive = False
            self._gone.set()
            if self._timer is not None:
                self._timer.cancel()
            self._burial = self._loop.create_task(self._bury(error))

    async def _bury(self, error: EnvFailure | TimeoutError | None) -> str:
        """Kill what is left, reap it, answer its calls; the reason."""
        status = await self._reap(0.0 if error else LAST_WORDS_SECONDS)
        self._link.close()
        with suppress(TimeoutError):
            await asyncio.wait_for(self._output.ended.wait(), LAST_WORDS_SECONDS if status is not None else 0.0)
        self._output.close()
        if error is None and self._closing:
            error = EnvFailure("pool_closed", "the environments have been closed")
        if error is None:
            how = f"was killed by signal {-status}" if status is not None and status < 0 else f"ended ({status})"
            last = self._output.last_line
            error = EnvFailure("worker_died", f"the environment process {how}" + (f"; it said: {last}" if last else ""))
        for future in [*self._calls.values(), self._ready]:
            if not future.done():
                future.set_exception(type(error)(*_arguments(error)))
        if not self._ready.cancelled():
            self._ready.exception()  # seen
        return _arguments(error)[-1]

    async def _reap(self, patience_s: float) -> int | None:
        """The exit status, of its own within `patience_s` or of a kill; None when there is no process."""
        process = self._process
        if process is None:
            return None
        until = time.monotonic() + patience_s
        while process.poll() is None and time.monotonic() < until:
            await asyncio.sleep(0.005)
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)  # with what its environments started
        until = time.monotonic() + CLOSE_SECONDS
        while process.poll() is None and time.monotonic() < until:
            await asyncio.sleep(0.005)
        return process.poll()


class _Output(asyncio.Protocol):
    """What a worker prints: passed on to standard error, and its end kept."""

    def __init__(self) -> None:
        self.ended = asyncio.Event()
        self._kept = b""
        self._transport: asyncio.BaseTransport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Of `asyncio.Protocol`."""
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """Of `asyncio.Protocol`."""
        self._kept = (self._kept + data)[-KEPT_OUTPUT:]
        sys.stderr.write(data.decode(errors="replace"))

    def connection_lost(self, exc: Exception | None) -> None:
        """Of `asyncio.Protocol`."""
        self.ended.set()

    @property
    def last_line(self) -> str:
        """The last line that is not empty."""
        lines = self._kept.decode(errors="replace").splitlines()
        return next((line.strip() for line in reversed(lines) if line.strip()), "")

    def close(self) -> None:
        """Listen no more."""
        if self._transport is not None:
            self._transport.close()


def _arguments(error: EnvFailure | TimeoutError) -> tuple[str, ...]:
    """What makes the same error again; the message comes last."""
    if isinstance(error, EnvFailure):
        return error.kind, str(error).removeprefix(f"{error.kind}: ")
    return (str(error),)
