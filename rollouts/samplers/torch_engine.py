"""The embedded sampler's engine: one thread that reads prompts in and decodes all running requests together.

What always holds:

* requests join and leave between steps; a step is one forward pass for each version that has work, in which running
  requests get a token each and those that have just joined read a piece of what is new in their prompt;
* nobody waits for an idle lane, and the first to wait is the first to be seated;
* whatever happens in the thread, every request is answered once: with a sample, or with an error.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .base import Sample, SampleRequest, SamplerError
from .torch_attend import Attention, Sight
from .torch_cache import Cache, Rows
from .torch_draw import draw, uniforms
from .torch_model import Shape, Weights, forward, logits, rotations
from .torch_probe import rows_agree
from .torch_seats import Key, Seat, Seats, Session

READ_TOKENS = 512  # prompt tokens read in a step, so that running requests are not held up long
MAX_OPEN = 4096


@dataclass(frozen=True, slots=True)
class Served:
    """A version's weights; `key` (number, digest) names everything computed with them."""

    key: Key
    weights: Weights


@dataclass(slots=True, eq=False)
class Job:
    """A request, and what it has sampled so far. `done` is called once, in the engine's thread."""

    request: SampleRequest
    served: Served
    done: Callable[[Sample | BaseException], None]
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    session: Session | None = None


@dataclass(slots=True, eq=False)
class _Run:
    """A job that has a seat."""

    job: Job
    seat: Seat


@dataclass(frozen=True, slots=True)
class _Piece:
    """Tokens fed in one step, to the prefix of a seat or to its lane; `at`: how many that has already."""

    seat: Seat
    of_prefix: bool
    at: int
    tokens: Sequence[int]


class Engine:
    """The thread and what belongs to it. The public methods may be called from any thread."""

    def __init__(
        self,
        shape: Shape,
        *,
        slots: int,
        threads: int,
        max_tokens: int,
        cache_tokens: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self._shape, self._threads, self._device = shape, threads, device
        kept = torch.float32 if device.type == "cpu" else dtype
        self._cache = Cache(shape, *(Rows(shape, slots, device, kept) for _ in range(2)))
        self._attention = Attention(self._cache, device, threads)
        self._exact = device.type == "cpu" and dtype == torch.float32
        self._angles = rotations(shape, max_tokens, device)[:, None]
        self._seats = Seats(self._cache, slots, cache_tokens)
        self._waiting: deque[Job] = deque()
        self._running: list[_Run] = []
        self._counters = dict.fromkeys(
            ("sampled_tokens", "prefilled_tokens", "reused_tokens", "requests", "steps", "busy_s"), 0.0
        )
        self.batch_invariant: Future[bool] = Future()
        self._condition = threading.Condition()
        self._inbox: deque[Callable[[], None]] = deque()
        self._open: set[Job] = set()  # submitted and not answered: whatever happens, these get an answer
        self._stopping = False
        self._failure: SamplerError | None = None
        self._thread = threading.Thread(target=self._run, name="espalier-torch-sampler", daemon=True)
        self._thread.start()

    # What other threads call.

    def submit(self, job: Job) -> None:
        """Start a job. Raises `SamplerError` when the engine has stopped or too many jobs are open."""
        with self._condition:
            if len(self._open) >= MAX_OPEN:
                raise SamplerError(f"{MAX_OPEN} requests are open; start fewer episodes at once.", retryable=True)
            self._post(lambda: self._accept(job))
            self._open.add(job)

    def cancel(self, job: Job) -> None:
        """Free what a job holds, and answer it with an error if it has no answer yet."""
        self._post(lambda: self._cancel(lambda other: other is job))

    def end_session(self, name: str) -> None:
        """Forget a session; a job of it is cancelled."""

        def end() -> None:
            self._cancel(lambda job: job.request.session == name)
            self._seats.forget(name)

        self._post(end)

    def drop(self, key: Key) -> None:
        """Forget what was computed with a version that no job runs on."""

        self._post(lambda: self._seats.drop(key))

    def stop(self, timeout_s: float = 30.0) -> None:
        """End the thread; open jobs get a `SamplerError`."""
        with self._condition:
            self._stopping = True
            self._condition.notify()
        self._thread.join(timeout_s)

    def stats(self) -> dict[str, float]:
        """Counters since the start."""
        return self._counters | {"parked": self._seats.parked, "restored": self._seats.restored}

    def _post(self, message: Callable[[], None]) -> None:
        with self._condition:
            if self._failure:
                raise self._failure
            self._inbox.append(message)
            self._condition.notify()

    # The thread.

    def _run(self) -> None:
        reason = SamplerError("the sampler was closed; start another to go on.")
        try:
            torch.set_num_threads(self._threads)
            self.batch_invariant.set_result(self._exact and rows_agree(self._shape))
            with torch.inference_mode():
                while self._receive():
                    started = time.perf_counter()
                    self._step()
                    self._counters["busy_s"] += time.perf_counter() - started
        except BaseException as error:  # nobody else could tell those who wait
            reason = SamplerError(
                f"the sampler's engine stopped on {type(error).__name__}: {error}. Start another sampler."
            )
        self._attention.close()
        with self._condition:
            self._failure = reason
            unanswered, self._open = self._open, set()
        if not self.batch_invariant.done():
            self.batch_invariant.set_exception(reason)
        for job in unanswered:
            job.done(reason)

    def _receive(self) -> bool:
        """Take all messages, waiting for one when there is nothing to do; False: it is time to stop."""
        while True:
            with self._condition:
                while not (self._inbox or self._running or self._waiting or self._stopping):
                    self._condition.wait(1.0)
                if self._stopping:
                    return False
                message = self._inbox.popleft() if self._inbox else None
            if message is None:
                return True
            message()

    def _accept(self, job: Job) -> None:
        try:
            job.session = self._seats.open(job.request.session)
        except SamplerError as error:
            self._answer(job, error)
        else:
            self._waiting.append(job)

    def _cancel(self, chosen: Callable[[Job], bool]) -> None:
        error = SamplerError("the request was cancelled.", retryable=True)
        for run in [run for run in self._running if chosen(run.job)]:
            self._running.remove(run)
            self._answer(run.job, error, run.seat)
        for job in [job for job in self._waiting if chosen(job)]:
            self._waiting.remove(job)
            self._answer(job, error)

    def _answer(self, job: Job, result: Sample | BaseException, seat: Seat | None = None) -> None:
        if job.session:
            self._seats.rise(job.session, seat)
        with self._condition:
            self._open.discard(job)
        job.done(result)

    def _step(self) -> None:
        while self._waiting and self._seat(self._waiting[0]):
            self._waiting.popleft()
        by_version: dict[Key, list[_Run]] = {}
        for run in self._running:
            by_version.setdefault(run.job.served.key, []).append(run)
        for runs in by_version.values():
            self._advance(runs[0].job.served, runs)

    def _seat(self, job: Job) -> bool:
        if job.session is None:
            raise RuntimeError("a job waits that was never accepted; this is a bug")
        seat = self._seats.sit(job.session, job.served.key, job.request.prompt)
        if seat is None:
            return False
        self._running.append(_Run(job, seat))
        self._counters["requests"] += 1
        self._counters["reused_tokens"] += seat.reused
        return True

    # A forward pass.

    def _advance(self, served: Served, runs: list[_Run]) -> None:
        """One pass of one version: a token for every run that is ready for one, and pieces of the others' prompts."""
        ready = [run for run in runs if run.seat.prefix.whole and len(run.seat.pending) == 1]
        pieces = self._pieces(runs)
        fed = [_Piece(run.seat, False, len(run.seat.session.cached), run.seat.pending) for run in ready] + pieces
        tokens, sight = _batch(fed)
        self._cache.prefixes.grow(int(sight.prefix_seen.max()))
        self._cache.lanes.grow(int(sight.lane_seen.max()))
        positions = np.maximum(sight.prefix_seen + sight.lane_seen - 1, 0)
        angles = self._angles.index_select(0, self._tensor(positions))
        x = forward(served.weights, self._tensor(tokens), angles, self._attention.over(sight))
        self._counters["steps"] += 1
        for piece in pieces:
            self._note(piece)
        if ready:
            self._sample(ready, logits(served.weights, x[: _padded(len(ready))]))

    def _pieces(self, runs: list[_Run]) -> list[_Piece]:
        """What of the prompts is read in this step."""
        pieces: list[_Piece] = []
        room = READ_TOKENS
        begun: set[int] = set()
        for seat in (run.seat for run in runs):
            prefix, tokens = seat.prefix, seat.pending[: min(room, len(seat.pending) - 1)]
            if prefix.whole and tokens:
                pieces.append(_Piece(seat, False, len(seat.session.cached), tokens))
            elif not prefix.whole and prefix.row not in begun:
                begun.add(prefix.row)
                tokens = list(prefix.tokens[prefix.ready : prefix.ready + room])
                pieces.append(_Piece(seat, True, prefix.ready, tokens))
            else:
                continue
            room -= len(pieces[-1].tokens)
            if room <= 0:
                break
        return pieces

    def _note(self, piece: _Piece) -> None:
        """Record that a piece has been read."""
        size, prefix = len(piece.tokens), piece.seat.prefix
        self._counters["prefilled_tokens"] += size
        if piece.of_prefix:
            prefix.ready += size
            if prefix.whole:
                self._seats.keep(prefix)
        else:
            piece.seat.session.cached.extend(piece.tokens)
            del piece.seat.pending[:size]

    def _sample(self, ready: list[_Run], scores: Tensor) -> None:
        jobs = [run.job for run in ready]
        keys = np.array([job.request.key & 0xFFFFFFFFFFFFFFFF for job in jobs], np.uint64)
        numbers = np.array([len(job.tokens) for job in jobs], np.uint64)
        tokens, logprobs = draw(scores, [job.request.params for job in jobs], uniforms(keys, numbers))
        self._counters["sampled_tokens"] += len(jobs)
        over: list[tuple[_Run, Sample | SamplerError]] = []
        for run, token, logprob in zip(ready, tokens, logprobs, strict=True):
            run.seat.session.cached.append(run.seat.pending[0])
            run.seat.pending[0] = token
            run.job.tokens.append(token)
            run.job.logprobs.append(logprob)
            if result := _result(run.job):
                over.append((run, result))
        if over:
            gone = {id(run) for run, _ in over}
            self._running = [run for run in self._running if id(run) not in gone]
            for run, result in over:
                self._answer(run.job, result, run.seat)

    def _tensor(self, array: NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(array).to(self._device)


def _result(job: Job) -> Sample | SamplerError | None:
    """The answer to a job once its last token ends it."""
    number = job.served.key[0]
    if not math.isfinite(job.logprobs[-1]):
        return SamplerError(
            f"version {number} gives log-probabilities that are not finite; its weights diverged, use an earlier one."
        )
    if job.tokens[-1] in job.request.stop:
        return Sample(tuple(job.tokens), tuple(job.logprobs), "stop", number)
    if len(job.tokens) >= job.request.max_tokens:
        return Sample(tuple(job.tokens), tuple(job.logprobs), "length", number)
    return None


def _batch(pieces: Sequence[_Piece]) -> tuple[NDArray[np.int64], Sight]:
    """The tokens of `pieces` as the rows of one batch, padded, and what each sees."""
    tokens: list[int] = []
    prefix: list[int] = []
    prefix_seen: list[int] = []
    lane: list[int] = []
    lane_seen: list[int] = []
    for piece in pieces:
        n, seen = len(piece.tokens), range(piece.at + 1, piece.at + 1 + len(piece.tokens))
        tokens += piece.tokens
        prefix += [piece.seat.prefix.row] * n
        prefix_seen += seen if piece.of_prefix else [len(piece.seat.prefix.tokens)] * n
        lane += [piece.seat.lane] * n
        lane_seen += [0] * n if piece.of_prefix else seen
    padding = [0] * (_padded(len(tokens)) - len(tokens))
    fed, *sight = (np.array(rows + padding, np.int64) for rows in (tokens, prefix, prefix_seen, lane, lane_seen))
    return fed, Sight(*sight)


def _padded(size: int) -> int:
    return -(-size // 8) * 8
