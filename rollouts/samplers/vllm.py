"""vLLM as the sampler: an engine process of this one's own, adapters swapped while it serves.

What always holds:

* a version is an adapter of its own in the engine: its name, number and path are never used again, nothing is loaded in
  place, and it is routed to only after the engine has read it and answered a token with it;
* every request carries a cache salt made of trust domain, base and adapter (`identity`), so that keys and values are
  reused by equals only;
* token ids in, token ids out; log-probabilities are those of the distribution that vLLM drew from (tempered and, where
  top-p or top-k cut it, renormalised over what is left);
* every request ends at its deadline at the latest; an engine that died or hangs is started again, a bounded number of
  times and with growing pauses, with all resident versions; requests wait for it as long as their deadlines allow.

Draws are vLLM's own: requests carry no seed (on the CPU a seeded request whose prompt is read in two parts kills
vLLM 0.32: "CPU Generator does not use offset"), so a run is not repeatable token by token.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import secrets
import threading
import time
from collections import Counter
from collections.abc import Coroutine, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import psutil
from vllm import AsyncEngineArgs
from vllm import SamplingParams as VllmParams
from vllm.exceptions import VLLMClientError
from vllm.inputs.engine import tokens_input
from vllm.lora.request import LoRARequest
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

from ..digest import folder_digest
from ..types import PolicyVersion
from .base import PUBLISH_SECONDS, Sample, SampleRequest, SamplerError, check_size
from .identity import cache_salt
from .orphans import Guard
from .versions import HoldsVersions, VersionTable, check_files
from .vllm_limits import (
    card_environment,
    check_adapter,
    check_base,
    cpu_environment,
    of_a_launcher,
    served_rank,
    vocabulary,
)

T = TypeVar("T")

START_SECONDS = 900.0
PROBE_SECONDS = 30.0
STOP_SECONDS = 20.0
RESTARTS = 5
"""So many failures within `RESTART_WINDOW_SECONDS`, and the engine is given up."""
RESTART_WINDOW_SECONDS = 1800.0
FIRST_PAUSE_SECONDS = 1.0
SLEEP_SECONDS = 120.0
"""Until an engine has fallen asleep or woken: weights cross to the host's memory and back."""

QUEUED_PER_SLOT = 32
"""Requests that may wait for each slot of the engine before more are turned away."""


@dataclass(frozen=True, slots=True)
class _Served:
    """A resident version, and its adapter in the engine (None: the base itself)."""

    version: PolicyVersion
    adapter: LoRARequest | None


class VllmSampler(HoldsVersions[_Served]):
    """Implements `Sampler`.

    `slots`: episodes decoded at once. `max_versions`: versions resident at once. `max_tokens`: prompt and sample of one
    request together. `rank`: largest rank of an adapter. `card`: place of the engine's GPU among those that this
    process sees, of whose memory it may use the share `memory`; none: the CPU, with `threads`, and `cache_gb` GiB of
    keys and values. `eager`: no compiled graphs. `sleeps`: it is put to `sleep` while the trainer works. Raises
    `SamplerError` when vLLM cannot be started.
    """

    def __init__(
        self,
        base: Path,
        *,
        slots: int = 64,
        threads: int = 1,
        max_versions: int = 4,
        max_tokens: int = 2048,
        rank: int = 16,
        card: int | None = None,
        dtype: Literal["float32", "bfloat16"] = "float32",
        memory: float = 0.45,
        cache_gb: int = 1,
        eager: bool = True,
        sleeps: bool = False,
        seed: int = 0,
    ) -> None:
        if min(slots, threads, max_versions, max_tokens, rank) < 1:
            raise ValueError("slots, threads, max_versions, max_tokens and rank must be at least 1")
        self._base, self._slots, self._max_tokens = Path(base), slots, max_tokens
        self._rank = served_rank(rank)
        self.sleeps = sleeps
        self._asleep = False
        own = cpu_environment(threads, cache_gb) if card is None else card_environment(card)
        self._environment: dict[str, str | None] = {
            **{name: None for name in os.environ if of_a_launcher(name)},
            **own,
            "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # our own threads do not survive a fork
        }
        self._arguments: dict[str, Any] = {
            "model": str(base),
            "dtype": dtype,
            "seed": seed,
            "max_model_len": max_tokens,
            "max_num_seqs": slots,
            "enable_lora": True,
            "max_loras": max_versions,
            "max_cpu_loras": max_versions + 1,  # a new one is loaded before the oldest goes
            "max_lora_rank": self._rank,
            "logprobs_mode": "processed_logprobs",
            "enable_prefix_caching": True,
            "enforce_eager": eager,
            "skip_tokenizer_init": True,  # ids in, ids out
            "enable_log_requests": False,
            "disable_log_stats": True,
            **({} if card is None else {"gpu_memory_utilization": memory, "enable_sleep_mode": sleeps}),
        }
        check_base(self._base, "cpu" if card is None else "cuda")
        self._vocabulary = vocabulary(self._base)
        self._secret = secrets.token_bytes(32)
        try:
            self._base_digest = folder_digest(self._base)
        except OSError as error:
            raise SamplerError(f"the base cannot be read: {error}") from None
        self._table = VersionTable(max_versions, self._drop)
        self._numbers = itertools.count(1)  # of adapters in the engine and of requests: never used again
        self._pending = 0
        self._failures: list[float] = []
        self._counts: Counter[str] = Counter()
        self._broken: str | None = None
        self._engine: AsyncLLM | None = None
        self._children: list[psutil.Process] = []
        self._guard = Guard()
        self._loop = asyncio.new_event_loop()
        self._up = asyncio.Event()
        self._restart: asyncio.Task[None] | None = None
        self._probing = False
        self._running: set[asyncio.Task[Any]] = set()
        self._thread = threading.Thread(target=self._loop.run_forever, name="espalier-vllm", daemon=True)
        self._thread.start()
        try:
            self._submit(asyncio.wait_for(self._start(), START_SECONDS)).result()
            self._loop.call_soon_threadsafe(self._up.set)
        except BaseException as error:
            self._submit(self._close()).result(2 * STOP_SECONDS)
            self._stop_loop()
            self._guard.close()
            if isinstance(error, Exception):
                raise SamplerError(f"vLLM could not be started: {_said(error)}") from error
            raise

    # ---- versions

    async def publish(self, version: PolicyVersion) -> None:
        """Load `version` (0: the base itself), see that the engine answers with it, and make it the latest.

        Raises `SamplerError` when its files do not have its digest, when its number was published with another digest,
        when vLLM cannot serve it, or when `max_versions` are resident and all are held; one that is retryable when the
        engine died or hung, and is started again.
        """
        if self._table.again(version):
            return
        await asyncio.to_thread(check_files, version)
        if version.is_base and version.path.resolve() != self._base.resolve():
            raise SamplerError(f"version 0 is the base {self._base}, not {version.path}; give the sampler that base.")
        if not version.is_base:
            check_adapter(version.path, self._rank)
        try:
            await self._in_loop(self._publish(version), PUBLISH_SECONDS)
        except TimeoutError:
            said = f"vLLM did not serve version {version.number} within {PUBLISH_SECONDS:g} s."
            raise SamplerError(said, retryable=True) from None

    async def _publish(self, version: PolicyVersion) -> None:
        await self._up.wait()
        adapter = None if version.is_base else self._adapter(version)
        served = _Served(version, adapter)
        try:
            await self._load_watched(served)
            self._table.admit(version, served)
        except BaseException:
            self._drop(served)
            raise

    async def _load_watched(self, served: _Served) -> None:
        """`_load`, which an engine that hangs ends with a retryable error."""
        engine, task = self._engine, asyncio.current_task()
        if engine is None or task is None:
            raise self._gone()
        late = self._loop.call_later(PROBE_SECONDS, lambda: self._submit(self._probe(engine)))
        self._running.add(task)
        try:
            await self._load(served)
        except asyncio.CancelledError:
            if engine is self._engine or self._broken is not None:
                raise
            said = f"vLLM hung while version {served.version.number} was loaded; it is started again."
            raise SamplerError(said, retryable=True) from None
        finally:
            late.cancel()
            self._running.discard(task)

    def _adapter(self, version: PolicyVersion) -> LoRARequest:
        number = next(self._numbers)
        return LoRARequest(f"v{version.number:06d}-{version.digest[:16]}-{number}", number, str(version.path.resolve()))

    async def _load(self, served: _Served) -> None:
        """Have the engine read an adapter and answer a token with it. Raises `SamplerError` when it cannot."""
        engine, adapter = self._engine, served.adapter
        if engine is None:
            raise self._gone()
        if self._asleep:
            raise SamplerError("vLLM sleeps; wake it before publishing.")
        number = served.version.number
        try:
            if adapter is not None and not await engine.add_lora(adapter):
                raise SamplerError(f"vLLM did not load version {number} at {served.version.path}.")
            probe = SampleRequest(f"probe-{number}", (0,), number, 0, 1, ())
            await self._generate(engine, probe, served)
        except EngineDeadError as error:
            self._on_death(engine, error)
            raise SamplerError(f"vLLM died while version {number} was loaded.", retryable=True) from error
        except SamplerError:
            raise
        except Exception as error:
            path = served.version.path
            raise SamplerError(f"vLLM cannot serve version {number} at {path}: {_said(error)}") from error

    def _drop(self, served: _Served) -> None:
        if served.adapter is not None and self._thread.is_alive():
            self._submit(self._remove(served.adapter.lora_int_id))

    async def _remove(self, adapter: int) -> None:
        if self._engine is not None:
            with contextlib.suppress(Exception):  # a dead engine holds nothing, and says so elsewhere
                await self._engine.remove_lora(adapter)

    # ---- sleep

    async def sleep(self) -> None:
        """Give the card's memory back: weights move to the host, keys and values are dropped. Nothing may be running.

        On the CPU, where vLLM keeps its memory, only the prefix cache is dropped. Raises `SamplerError`.
        """
        await self._turn(asleep=True)

    async def wake(self) -> None:
        """Take the memory again; the versions are as they were. Raises `SamplerError`."""
        await self._turn(asleep=False)

    async def _turn(self, *, asleep: bool) -> None:
        try:
            await self._in_loop(self._turn_here(asleep), SLEEP_SECONDS)
        except TimeoutError:
            said = f"vLLM did not {'fall asleep' if asleep else 'wake'} within {SLEEP_SECONDS:g} s."
            raise SamplerError(said, retryable=True) from None

    async def _turn_here(self, asleep: bool) -> None:
        await self._up.wait()
        engine = self._engine
        if engine is None:
            raise self._gone()
        if asleep == self._asleep:
            return
        if asleep and self._running:
            raise SamplerError(f"{len(self._running)} requests are running; vLLM cannot sleep now.", retryable=True)
        self._asleep = asleep
        try:
            await (engine.sleep(1) if asleep else engine.wake_up())
        except BaseException as error:
            self._asleep = not asleep
            if isinstance(error, asyncio.CancelledError):
                self._submit(self._probe(engine))  # late because it hangs?
            if not isinstance(error, EngineDeadError):
                raise
            self._on_death(engine, error)
            raise SamplerError("vLLM died while it fell asleep or woke.", retryable=True) from error

    # ---- sampling

    async def sample(self, request: SampleRequest) -> Sample:
        """Sample one turn; see `Sampler.sample`. A cancelled or late request leaves the engine."""
        check_size(request, self._max_tokens)
        if self._vocabulary is not None and not 0 <= min(request.prompt) <= max(request.prompt) < self._vocabulary:
            raise SamplerError(  # without a tokenizer vLLM does not look
                f"session {request.session!r}: a prompt token is outside the vocabulary of {self._vocabulary}."
            )
        if self._pending >= self._slots * QUEUED_PER_SLOT:
            raise SamplerError(f"{self._pending} requests are waiting already; ask again later.", retryable=True)
        self._pending += 1
        try:
            with self._table.use(request.version) as served:
                return await self._in_loop(self._sample(request, served), request.deadline_s)
        except TimeoutError:
            raise TimeoutError(f"session {request.session!r} got no sample within {request.deadline_s:g} s.") from None
        finally:
            self._pending -= 1

    async def _sample(self, request: SampleRequest, served: _Served) -> Sample:
        if self._broken is not None:
            raise self._gone()
        await self._up.wait()
        engine, task = self._engine, asyncio.current_task()
        if engine is None or task is None:
            raise self._gone()
        if self._asleep:
            raise SamplerError("vLLM sleeps; wake it before sampling.")
        self._running.add(task)
        try:
            return await self._generate(engine, request, served)
        except asyncio.CancelledError:
            if engine is not self._engine and self._broken is None:
                raise SamplerError("vLLM's engine hung; it is started again.", retryable=True) from None
            self._submit(self._probe(engine))  # late because the engine hangs?
            raise
        except EngineDeadError as error:
            self._on_death(engine, error)
            raise SamplerError("vLLM's engine died; it is started again.", retryable=True) from error
        except VLLMClientError as error:
            raise SamplerError(f"session {request.session!r}: vLLM refused the request: {error}") from error
        except EngineGenerateError as error:
            raise SamplerError(f"session {request.session!r}: vLLM failed: {_said(error)}", retryable=True) from error
        finally:
            self._running.discard(task)

    async def _generate(self, engine: AsyncLLM, request: SampleRequest, served: _Served) -> Sample:
        salt = cache_salt(self._secret, request.trust_domain, self._base_digest, served.version.digest)
        params = VllmParams(
            temperature=request.params.temperature,
            top_p=request.params.top_p,
            top_k=request.params.top_k,
            max_tokens=request.max_tokens,
            stop_token_ids=list(request.stop),
            ignore_eos=True,  # `stop` says all that ends a turn
            logprobs=0,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        prompt = tokens_input(list(request.prompt), cache_salt=salt)
        id = f"{request.session}#{next(self._numbers)}"
        output = None
        async for latest in engine.generate(prompt, params, id, lora_request=served.adapter):
            output = latest
        if output is None or not output.finished or output.outputs[0].finish_reason not in ("stop", "length"):
            reason = None if output is None else output.outputs[0].finish_reason
            raise SamplerError(f"session {request.session!r}: vLLM ended the request ({reason}).", retryable=True)
        found = output.outputs[0]
        tokens = tuple(found.token_ids)
        if found.logprobs is None or len(found.logprobs) != len(tokens):
            raise SamplerError(f"session {request.session!r}: vLLM returned no log-probability for some tokens.")
        logprobs = tuple(row[token].logprob for token, row in zip(tokens, found.logprobs, strict=True) if row)
        self._counts["tokens_sampled"] += len(tokens)
        self._counts["tokens_prompt"] += len(request.prompt)
        self._counts["tokens_reused"] += output.num_cached_tokens or 0
        finish: Literal["stop", "length"] = "stop" if found.finish_reason == "stop" else "length"
        return Sample(tokens, logprobs, finish, request.version)

    async def end_session(self, session: str) -> None:
        """Nothing is kept by session: vLLM's prefix cache finds an episode's earlier turns by their tokens."""

    def stats(self) -> dict[str, float]:
        """Counters since the start: tokens sampled, of prompts, of these reused from the cache; restarts; hangs."""
        names = ("tokens_sampled", "tokens_prompt", "tokens_reused", "restarts", "hangs")
        return {name: float(self._counts[name]) for name in names}

    # ---- the engine's life, in the loop of its own thread

    async def _start(self) -> None:
        before = set(psutil.Process().children(recursive=True))
        try:
            with _environment_set(self._environment):
                arguments = AsyncEngineArgs(**self._arguments)
                self._engine = await asyncio.to_thread(AsyncLLM.from_engine_args, arguments)
        finally:  # also of a start that failed or took too long
            self._children = [child for child in psutil.Process().children(recursive=True) if child not in before]
            self._guard.watch(self._children)

    def _on_death(self, engine: AsyncLLM, error: BaseException) -> None:
        if engine is self._engine and self._restart is None and self._broken is None:
            self._up.clear()
            self._restart = self._loop.create_task(self._start_again(error))

    async def _start_again(self, error: BaseException) -> None:
        """Start the engine again with all resident versions; give up when it fails too often."""
        try:
            while True:
                now = time.monotonic()
                self._failures = [*(t for t in self._failures if now - t < RESTART_WINDOW_SECONDS), now]
                await self._kill()
                if len(self._failures) > RESTARTS:
                    minutes = RESTART_WINDOW_SECONDS / 60
                    self._broken = (
                        f"vLLM failed {len(self._failures)} times in {minutes:.0f} minutes, last: {_said(error)}; "
                        "see its log above"
                    )
                    self._up.set()
                    return
                await asyncio.sleep(FIRST_PAUSE_SECONDS * 2 ** (len(self._failures) - 1))
                try:
                    await asyncio.wait_for(self._start(), START_SECONDS)
                    self._counts["restarts"] += 1
                    for served in self._table.resident.values():
                        await asyncio.wait_for(self._load(served), PUBLISH_SECONDS)
                    self._up.set()
                    return
                except Exception as another:
                    error = another
        finally:
            self._restart = None

    async def _probe(self, engine: AsyncLLM) -> None:
        """End an engine that does not answer a question which it answers between two steps."""
        if self._engine is None or engine is not self._engine or self._restart is not None or self._probing:
            return
        self._probing = True
        try:
            await asyncio.wait_for(engine.list_loras(), PROBE_SECONDS)
        except TimeoutError as error:
            self._counts["hangs"] += 1
            self._on_death(engine, error)
        except EngineDeadError as error:
            self._on_death(engine, error)
        finally:
            self._probing = False

    async def _kill(self) -> None:
        engine, self._engine = self._engine, None
        self._asleep = False
        for task in self._running:
            task.cancel()  # an engine that hangs answers nobody
        for child in self._children:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        self._children = []
        if engine is not None:
            await asyncio.to_thread(engine.shutdown, STOP_SECONDS)

    async def close(self) -> None:
        """Stop the engine; pending requests get a `SamplerError`. Closing twice is allowed."""
        if not self._thread.is_alive():
            return
        self._broken = self._broken or "the sampler was closed"
        self._table.clear()
        await asyncio.wait_for(asyncio.wrap_future(self._submit(self._close())), 2 * STOP_SECONDS)
        self._stop_loop()
        self._guard.close()

    async def _close(self) -> None:
        others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in others:
            task.cancel()
        await self._kill()
        if others:
            await asyncio.wait(others, timeout=STOP_SECONDS)

    def _gone(self) -> SamplerError:
        return SamplerError(f"{self._broken or 'vLLM is not running'}.", retryable=self._broken is None)

    # ---- the loop

    def _submit(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    async def _in_loop(self, work: Coroutine[Any, Any, T], deadline_s: float) -> T:
        """The result of `work`, done in the engine's loop, which is cancelled with the caller or at the deadline."""
        if not self._thread.is_alive():
            work.close()
            raise self._gone()
        async with asyncio.timeout(deadline_s):
            return await asyncio.wrap_future(self._submit(self._until_closed(work)))

    async def _until_closed(self, work: Coroutine[Any, Any, T]) -> T:
        try:
            return await work
        except asyncio.CancelledError:
            if self._broken is not None:
                raise self._gone() from None
            raise

    def _stop_loop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(STOP_SECONDS)


@contextmanager
def _environment_set(values: Mapping[str, str | None]) -> Iterator[None]:
    """`values` in this process's environment (none: not there) while an engine starts and inherits it; set back
    afterwards.
    """
    before = {name: os.environ.get(name) for name in values}
    _set_environment(values)
    try:
        yield
    finally:
        _set_environment(before)


def _set_environment(values: Mapping[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def _said(error: BaseException) -> str:
    """An error in one line, by its cause where vLLM wraps it."""
    while isinstance(error, EngineGenerateError) and error.__cause__ is not None:
        error = error.__cause__
    return " ".join(f"{type(error).__name__}: {error}".split())[:500]
