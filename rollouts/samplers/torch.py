"""The embedded sampler: a Qwen3 policy with LoRA versions, sampled on torch in this process, many episodes at once.

What always holds:

* a version is loaded beside the others, checked against its digest, and never changed; requests run wholly on the
  version they name;
* where `batch_invariant` says so (the CPU, float32, a BLAS that passed the check) an episode's tokens and
  log-probabilities are the same to the bit whether it runs alone or among others, whatever joins or leaves, was cached,
  evicted or shared (given the same machine and thread setting; see `torch_model` for the rules behind it);
* every request ends at its deadline at the latest; an engine that broke says so to everyone who waits and everyone who
  comes.
"""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor

from ..types import PolicyVersion
from .base import TRAINING, Sample, SampleRequest, SamplerError, check_size
from .torch_engine import Engine, Job, Served
from .torch_model import build, merge_adapter, read_shape, read_tensors
from .versions import HoldsVersions, VersionTable, check_files


class TorchSampler(HoldsVersions[Served]):
    """Implements `Sampler`.

    `slots`: episodes decoded at once (more may be open: they take turns). `threads`: CPU threads. `max_versions`:
    versions resident at once. `max_tokens`: prompt and sample of one request together. `cache_tokens`: tokens whose
    keys and values are kept of prompts and of episodes that had to leave their slot. Raises `SamplerError` when `base`
    is not a Qwen3 folder.
    """

    def __init__(
        self,
        base: Path,
        *,
        slots: int = 64,
        threads: int = 2,
        max_versions: int = 4,
        max_tokens: int = 2048,
        cache_tokens: int = 65536,
        device: str = "cpu",
        dtype: Literal["float32", "bfloat16"] = "float32",
    ) -> None:
        if min(slots, threads, max_versions, max_tokens) < 1 or cache_tokens < 0:
            raise ValueError("slots, threads, max_versions and max_tokens must be at least 1, cache_tokens at least 0")
        self._base = Path(base)
        self._max_tokens = max_tokens
        if dtype not in ("float32", "bfloat16"):
            raise ValueError(f'dtype must be "float32" or "bfloat16", not {dtype!r}')
        self._device, self._dtype = torch.device(device), getattr(torch, dtype)
        self._shape = read_shape(self._base)
        self._tensors: dict[str, Tensor] = read_tensors(self._base)
        self._table = VersionTable(max_versions, self._drop)
        # One loader with one torch thread: a loader with a team of its own brings OpenMP above the number of cores, and
        # its waits, the trainer's too, from spinning to sleeping (a training step took 2.6 times as long).
        self._loader = ThreadPoolExecutor(1, "espalier-torch-load", torch.set_num_threads, (1,))
        self._mail: WeakKeyDictionary[asyncio.AbstractEventLoop, _Mail] = WeakKeyDictionary()
        self._engine = Engine(
            self._shape,
            slots=slots,
            threads=threads,
            max_tokens=max_tokens,
            cache_tokens=cache_tokens,
            device=self._device,
            dtype=self._dtype,
        )

    async def publish(self, version: PolicyVersion) -> None:
        """Load `version` (0: the base itself) and make it the latest.

        Raises `SamplerError` when its files do not have its digest, when its number was published with another digest,
        when it is more than LoRA, or when `max_versions` are resident and all are held.
        """
        if self._table.again(version):
            return
        try:
            loading = asyncio.get_running_loop().run_in_executor(self._loader, self._load, version)
        except RuntimeError:
            raise SamplerError("the sampler was closed; start another to go on.") from None
        self._table.admit(version, await loading)

    @property
    def batch_invariant(self) -> bool:
        """Whether episodes are the same to the bit in any company: float32 on a CPU whose BLAS lets them be.

        Checked when the sampler starts, on the shapes it uses.
        """
        return self._engine.batch_invariant.result(timeout=120.0)

    async def sample(self, request: SampleRequest) -> Sample:
        """Sample one turn; see `Sampler.sample`. A cancelled or late request frees its slot."""
        self._check_request(request)
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Sample] = loop.create_future()
        with self._table.use(request.version) as served:
            mail = self._mail.setdefault(loop, _Mail(loop))
            job = Job(request, served, lambda result: mail.send(future, result))
            self._engine.submit(job)
            try:
                async with asyncio.timeout(request.deadline_s):
                    return await future
            except TimeoutError:
                raise TimeoutError(
                    f"session {request.session!r} got no sample within {request.deadline_s:g} s."
                ) from None
            finally:
                if not future.done() or future.cancelled():
                    self._cancel(job)

    async def end_session(self, session: str) -> None:
        """Free what was kept for `session`; unknown sessions, and a closed sampler, are ignored."""
        try:
            self._engine.end_session(session)
        except SamplerError:
            return

    async def close(self) -> None:
        """Stop the engine and free everything; pending requests get a `SamplerError`. Closing twice is allowed."""
        await asyncio.to_thread(self._engine.stop)
        self._loader.shutdown(wait=False)
        self._table.clear()
        self._tensors = {}

    def stats(self) -> dict[str, float]:
        """Counters since the start: tokens sampled, read in (prefilled) and reused from the cache, steps, seconds the
        engine was busy."""
        return self._engine.stats()

    def _load(self, version: PolicyVersion) -> Served:
        if version.is_base and version.path.resolve() != self._base.resolve():
            raise SamplerError(f"version 0 is the base {self._base}, not {version.path}; give the sampler that base.")
        check_files(version)
        tensors = self._tensors if version.is_base else merge_adapter(self._tensors, version.path)
        return Served((version.number, version.digest), build(self._shape, tensors, self._device, self._dtype))

    def _drop(self, served: Served) -> None:
        try:
            self._engine.drop(served.key)
        except SamplerError:  # a stopped engine holds nothing
            return

    def _check_request(self, request: SampleRequest) -> None:
        if request.trust_domain != TRAINING:
            raise SamplerError(
                f"session {request.session!r}: the embedded sampler has one cache for all and serves the trust domain "
                f"{TRAINING!r} only, not {request.trust_domain!r}."
            )
        check_size(request, self._max_tokens)
        if min(request.prompt) < 0 or max(request.prompt) >= self._shape.vocab:
            raise SamplerError(
                f"session {request.session!r}: a prompt token is outside the vocabulary of {self._shape.vocab}."
            )

    def _cancel(self, job: Job) -> None:
        try:
            self._engine.cancel(job)
        except SamplerError:  # a stopped engine has answered everyone
            return


class _Mail:
    """How the engine's thread answers the futures of one event loop: answers of one step wake the loop once."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = ref(loop)
        self._lock = threading.Lock()
        self._letters: list[tuple[asyncio.Future[Sample], Sample | BaseException]] = []

    def send(self, future: asyncio.Future[Sample], result: Sample | BaseException) -> None:
        """Answer `future`, soon, in its loop; a loop that is closed by then has nobody waiting."""
        with self._lock:
            self._letters.append((future, result))
            first = len(self._letters) == 1
        loop = self._loop()
        if first and loop is not None:
            try:
                loop.call_soon_threadsafe(self._deliver)
            except RuntimeError:  # closed
                with self._lock:
                    self._letters.clear()

    def _deliver(self) -> None:
        with self._lock:
            letters, self._letters = self._letters, []
        for future, result in letters:
            if future.done():
                continue
            if isinstance(result, BaseException):
                future.set_exception(result)
            else:
                future.set_result(result)
