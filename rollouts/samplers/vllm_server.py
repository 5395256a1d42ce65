"""A vLLM server as the sampler, spoken to over its OpenAI interface: somebody's, or one that Espalier starts.

What always holds is what holds for `vllm`: each version has a name of its own, which no other run and no other version
ever uses, and is routed to only after the server has read it and answered a token with it; every request carries a
cache salt made of trust domain, base and adapter; token ids in, token ids out; log-probabilities of the distribution
drawn from. A server that gives others, that serves another model than the base, or holds too few adapters is refused
when the first version is published.

While the server is away, requests are sent again with growing pauses until their deadlines: a sample changes nothing,
so it may be asked for twice. A server that came back has lost its adapters; they are loaded again before a request is
repeated.

The server must have been started with VLLM_ALLOW_RUNTIME_LORA_UPDATING=True, --enable-lora, --logprobs-mode
processed_logprobs, and see the folders of versions under the same paths. Whoever may set cache salts on it may read
what it keeps; it belongs on loopback or behind a gateway that strips them.
"""

from __future__ import annotations

import asyncio
import json
import re
import secrets
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar
from weakref import WeakKeyDictionary

import httpx

from ..digest import folder_digest
from ..types import PolicyVersion
from .base import PUBLISH_SECONDS, Sample, SampleRequest, SamplerError, check_size
from .identity import cache_salt
from .versions import HoldsVersions, VersionTable, check_files
from .vllm_limits import check_adapter, vocabulary
from .vllm_process import VllmProcess

T = TypeVar("T")

FIRST_PAUSE_SECONDS = 0.1
LONGEST_PAUSE_SECONDS = 5.0
LARGEST_ANSWER = 64 * 2**20
"""Bytes; a longer answer is not read to its end."""
SUSPECT_SECONDS = 30.0
"""Until a server of ours that has not served a version yet is suspected to hang."""
QUEUED_PER_SLOT = 32
"""Requests that may wait for each slot before more are turned away."""
COMPARED_TOKENS = 16
"""Tokens of a prompt, and behind it, on which a server of somebody's is compared with the base."""
LARGEST_GAP = 0.1
"""Nats: mean difference of their log-probabilities that precision explains."""


@dataclass(frozen=True, slots=True)
class _Served:
    """A resident version and the name under which the server knows it (the base's own, or its adapter's)."""

    version: PolicyVersion
    model: str


class _Away(Exception):
    """The server cannot be reached, or is not ready."""


class _Unknown(Exception):
    """The server does not know a model that it has been given: it was started anew."""


class VllmServerSampler(HoldsVersions[_Served]):
    """Implements `Sampler`.

    `url`: the server's, without /v1. `base`: the same model's folder on this machine. `slots`: episodes decoded at
    once. `max_versions`: versions resident at once, at most the server's --max-loras. `max_tokens`: prompt and sample
    of one request together. `rank`: the server's --max-lora-rank. `api_key`: its --api-key, if it has one. `process`:
    the server, where it is ours; it is stopped by `close`.
    """

    def __init__(
        self,
        url: str,
        base: Path,
        *,
        slots: int = 64,
        max_versions: int = 4,
        max_tokens: int = 2048,
        rank: int = 16,
        api_key: str | None = None,
        process: VllmProcess | None = None,
    ) -> None:
        if min(slots, max_versions, max_tokens, rank) < 1:
            raise ValueError("slots, max_versions, max_tokens and rank must be at least 1")
        self.url = url.rstrip("/").removesuffix("/v1")
        self._base, self._slots, self._max_tokens, self._rank = Path(base), slots, max_tokens, rank
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._secret = secrets.token_bytes(32)
        self._run = secrets.token_hex(4)
        self._process = process
        try:
            self._base_digest = folder_digest(self._base)
        except OSError as error:
            raise SamplerError(f"the base cannot be read: {error}") from None
        self._max_versions = max_versions
        self._table = VersionTable(max_versions, self._drop)
        self._clients: WeakKeyDictionary[asyncio.AbstractEventLoop, httpx.AsyncClient] = WeakKeyDictionary()
        self._leaving: set[asyncio.Task[None]] = set()
        self._counts: Counter[str] = Counter()
        self._pending = 0
        self._model: str | None = None
        self._closed = False

    # ---- versions

    async def publish(self, version: PolicyVersion) -> None:
        """Have the server load `version` (0: the base itself), see that it answers with it, and make it the latest.

        Raises `SamplerError` when its files do not have its digest, when its number was published with another digest,
        when the server cannot serve it or is not set up for this, or when `max_versions` are resident and all are held.
        """
        if self._table.again(version):
            return
        await asyncio.to_thread(check_files, version)
        if not version.is_base:
            check_adapter(version.path, self._rank)
        late = None
        if self._process is not None:
            late = asyncio.get_running_loop().call_later(SUSPECT_SECONDS, self._process.suspect)
        try:
            async with asyncio.timeout(PUBLISH_SECONDS):
                await self._until_there(self._examine)
                model = str(self._model)
                if not version.is_base:
                    model = f"espalier-{self._run}-v{version.number:06d}-{version.digest[:16]}"
                served = _Served(version, model)
                await self._until_there(lambda: self._load(served))
        except TimeoutError:
            raise SamplerError(
                f"version {version.number}: the vLLM server at {self.url} was away for {PUBLISH_SECONDS:g} s; "
                "is it running?",
                retryable=True,
            ) from None
        finally:
            if late is not None:
                late.cancel()
        try:
            self._table.admit(version, served)
        except SamplerError:
            self._drop(served)
            raise

    async def _examine(self) -> None:
        """Whether the server serves one base, long enough and with the log-probabilities of what it draws from."""
        if self._model is not None:
            return
        listed = (await self._ask("GET", "/v1/models"))["data"]
        bases = [entry for entry in listed if not entry.get("parent")]
        if not bases:
            raise SamplerError(f"the vLLM server at {self.url} serves no model.")
        longest = bases[0].get("max_model_len") or self._max_tokens
        if longest < self._max_tokens:
            raise SamplerError(
                f"the vLLM server at {self.url} takes {longest} tokens, episode.max_tokens is {self._max_tokens}; "
                f"start it with --max-model-len {self._max_tokens}."
            )
        model = str(bases[0]["id"])
        sharpest = self._body(SampleRequest("probe", (0,), 0, 0, 1, ()), model, "probe") | {"top_k": 1}
        choice = (await self._ask("POST", "/v1/completions", sharpest))["choices"][0]
        if choice.get("token_ids") is None:
            raise SamplerError(f"the vLLM server at {self.url} returns no token ids; it is too old, 0.32.0 is tested.")
        if abs(choice["logprobs"]["token_logprobs"][0]) > 1e-6:  # the only token left has probability 1
            raise SamplerError(
                f"the vLLM server at {self.url} returns log-probabilities of another distribution than it draws from; "
                "start it with --logprobs-mode processed_logprobs."
            )
        if self._process is None:
            await self._compare(model, bases[0].get("root") or model)
            await self._count_seats()
        self._model = model

    async def _compare(self, model: str, name: str) -> None:
        """Whether the server gives the log-probabilities of the base: a name, or a path elsewhere, proves nothing."""
        known, count = vocabulary(self._base) or COMPARED_TOKENS, min(COMPARED_TOKENS, self._max_tokens // 2)
        request = SampleRequest("probe", tuple(i * known // count for i in range(count)), 0, 0, count, ())
        served = _Served(PolicyVersion(0, self._base_digest, self._base, str(self._base)), model)
        try:
            sample = await self._complete(request, served)
            own = await asyncio.to_thread(_forward, self._base, request.prompt, sample.tokens)
        except (SamplerError, IndexError) as error:
            if isinstance(error, SamplerError) and error.retryable:
                raise
            said = f"it takes or gives other tokens: {error}"
        else:
            gap = sum(abs(a - b) for a, b in zip(own, sample.logprobs, strict=True)) / count
            if gap <= LARGEST_GAP:
                return
            said = f"on the same tokens their log-probabilities differ by {gap:.2g} on average"
        raise SamplerError(
            f"the vLLM server at {self.url} serves {name}, which is not the base {self._base} ({said}); start it with "
            "that base, or name in policy.base what it serves."
        )

    async def _count_seats(self) -> None:
        """Whether the server holds as many adapters as there may be versions, where its metrics say it."""
        try:
            said = str(await self._ask("GET", "/metrics"))
        except (SamplerError, _Unknown):
            return
        found = re.search(r'^vllm:lora_requests_info\{[^}\n]*max_lora="(\d+)"', said, re.MULTILINE)
        if found is not None and int(found[1]) < self._max_versions:
            raise SamplerError(
                f"the vLLM server at {self.url} holds {found[1]} adapters at once, sampler.max_versions is "
                f"{self._max_versions}; start it with --max-loras {self._max_versions}."
            )

    async def _load(self, served: _Served) -> None:
        if not served.version.is_base:
            body = {"lora_name": served.model, "lora_path": str(served.version.path.resolve())}
            try:
                await self._ask("POST", "/v1/load_lora_adapter", body)
            except _Unknown:
                raise SamplerError(
                    f"the vLLM server at {self.url} loads no adapters while it runs; start it with "
                    "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True and --enable-lora."
                ) from None
            except SamplerError as error:
                if "already been loaded" not in str(error):
                    raise SamplerError(f"version {served.version.number}: {error}") from None
        probe = SampleRequest(f"probe-{served.version.number}", (0,), served.version.number, 0, 1, ())
        try:
            await self._complete(probe, served)
        except _Unknown:
            raise SamplerError(
                f"the vLLM server at {self.url} said that it loaded version {served.version.number}, "
                "but does not know it."
            ) from None

    def _drop(self, served: _Served) -> None:
        if served.version.is_base or self._closed:
            return
        try:
            task = asyncio.get_running_loop().create_task(self._unload(served.model))
        except RuntimeError:  # no loop: the server's own least-recently-used rule will drop it
            return
        self._leaving.add(task)
        task.add_done_callback(self._leaving.discard)

    async def _unload(self, model: str) -> None:
        try:
            async with asyncio.timeout(PUBLISH_SECONDS):
                await self._ask("POST", "/v1/unload_lora_adapter", {"lora_name": model})
        except (SamplerError, TimeoutError, _Away, _Unknown):
            return  # it is gone, or goes with the server

    # ---- sampling

    async def sample(self, request: SampleRequest) -> Sample:
        """Sample one turn; see `Sampler.sample`."""
        check_size(request, self._max_tokens)
        if self._pending >= self._slots * QUEUED_PER_SLOT:
            raise SamplerError(f"{self._pending} requests are waiting already; ask again later.", retryable=True)
        self._pending += 1
        try:
            with self._table.use(request.version) as served:
                async with asyncio.timeout(request.deadline_s):
                    return await self._until_there(lambda: self._answer(request, served))
        except TimeoutError:
            if self._process is not None:
                self._process.suspect()  # late because it hangs?
            raise TimeoutError(f"session {request.session!r} got no sample within {request.deadline_s:g} s.") from None
        finally:
            self._pending -= 1

    async def _answer(self, request: SampleRequest, served: _Served) -> Sample:
        try:
            return await self._complete(request, served)
        except _Unknown:
            self._counts["reloads"] += 1
            await self._load(served)
            return await self._complete(request, served)

    async def _complete(self, request: SampleRequest, served: _Served) -> Sample:
        salt = cache_salt(self._secret, request.trust_domain, self._base_digest, served.version.digest)
        answer = await self._ask("POST", "/v1/completions", self._body(request, served.model, salt))
        try:
            choice = answer["choices"][0]
            tokens = tuple(int(token) for token in choice["token_ids"])
            logprobs = tuple(float(value) for value in choice["logprobs"]["token_logprobs"])
            finish, usage = choice["finish_reason"], answer["usage"]
            reused = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise SamplerError(f"the vLLM server's answer cannot be read ({type(error).__name__}: {error}).") from error
        if finish not in ("stop", "length"):
            raise SamplerError(f"session {request.session!r}: the vLLM server ended it ({finish}).", retryable=True)
        if len(tokens) != len(logprobs):
            raise SamplerError(f"session {request.session!r}: {len(logprobs)} log-probabilities, {len(tokens)} tokens.")
        self._counts["tokens_sampled"] += len(tokens)
        self._counts["tokens_prompt"] += len(request.prompt)
        self._counts["tokens_reused"] += reused
        end: Literal["stop", "length"] = "stop" if finish == "stop" else "length"
        return Sample(tokens, logprobs, end, request.version)

    def _body(self, request: SampleRequest, model: str, salt: str) -> dict[str, Any]:
        """Every option that a server's own defaults could change is said."""
        return {
            "model": model,
            "prompt": list(request.prompt),
            "max_tokens": request.max_tokens,
            "temperature": request.params.temperature,
            "top_p": request.params.top_p,
            "top_k": request.params.top_k,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "stop_token_ids": list(request.stop),
            "ignore_eos": True,  # `stop` says all that ends a turn
            "logprobs": 0,
            "return_token_ids": True,
            "cache_salt": salt,
        }

    async def end_session(self, session: str) -> None:
        """Nothing is kept by session: vLLM's prefix cache finds an episode's earlier turns by their tokens."""

    def stats(self) -> dict[str, float]:
        """Counters since the start: tokens sampled, of prompts, of these reused from the cache; times that the server
        was away; adapters loaded again after that; starts again of one that is ours, and of these after a hang."""
        names = ("tokens_sampled", "tokens_prompt", "tokens_reused", "away", "reloads")
        own = {"restarts": 0, "hangs": 0}
        if self._process is not None:
            own = {"restarts": self._process.restarts, "hangs": self._process.hangs}
        return {name: float(value) for name, value in {**{n: self._counts[n] for n in names}, **own}.items()}

    async def close(self) -> None:
        """Let the server forget this run's adapters, or stop it if it is ours; pending requests get a `SamplerError`.
        Closing twice is allowed.
        """
        if self._closed:
            return
        self._closed = True
        adapters = [served.model for served in self._table.resident.values() if not served.version.is_base]
        self._table.clear()
        await asyncio.gather(*(self._unload(model) for model in adapters), *self._leaving)
        clients, self._clients = list(self._clients.items()), WeakKeyDictionary()
        for loop, client in clients:
            if loop is asyncio.get_running_loop():
                await client.aclose()
        if self._process is not None:
            await asyncio.to_thread(self._process.stop)

    # ---- the wire

    async def _until_there(self, ask: Callable[[], Awaitable[T]]) -> T:
        """What `ask` gives, asked again while the server is away; for callers that have set a deadline."""
        pause = FIRST_PAUSE_SECONDS
        while True:
            if self._closed:
                raise SamplerError("the sampler was closed.")
            try:
                return await ask()
            except _Away:
                self._counts["away"] += 1
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS)

    async def _ask(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """One request; the JSON of the answer, or its text. Raises `_Away`, `_Unknown` or `SamplerError`."""
        try:
            async with self._client().stream(method, self.url + path, json=body, headers=self._headers) as answer:
                said = bytearray()
                async for chunk in answer.aiter_bytes():
                    said += chunk
                    if len(said) > LARGEST_ANSWER:
                        raise SamplerError(
                            f"the vLLM server's answer to {path} has more than {LARGEST_ANSWER:,} bytes."
                        )
        except httpx.TransportError as error:
            raise _Away(str(error)) from error
        except SamplerError:
            raise
        except RuntimeError as error:  # the client was closed under the request
            raise SamplerError("the sampler was closed.") from error
        status, text = answer.status_code, said.decode("utf-8", "replace")
        if status in (408, 425, 429, 502, 503, 504):
            raise _Away(f"status {status}")
        if status == 404:
            raise _Unknown
        if status == 500 and "EngineCore" in text:  # its engine died, and it is about to
            raise _Away(_message(text))
        if status >= 400:
            raise SamplerError(f"the vLLM server refused {path}: {status}, {_message(text)}", retryable=status >= 500)
        if "json" not in answer.headers.get("content-type", ""):
            return text
        try:
            return json.loads(text)
        except ValueError as error:
            raise SamplerError(f"the vLLM server's answer to {path} is not JSON ({error}).") from error

    def _client(self) -> httpx.AsyncClient:
        loop = asyncio.get_running_loop()
        client = self._clients.get(loop)
        if client is None:
            limits = httpx.Limits(max_connections=4 * self._slots, max_keepalive_connections=self._slots)
            # who asks sets the deadline: a sample may take minutes
            client = self._clients[loop] = httpx.AsyncClient(limits=limits, timeout=httpx.Timeout(None, connect=10.0))
        return client


def _forward(base: Path, prompt: tuple[int, ...], tokens: tuple[int, ...]) -> list[float]:
    """Log-probabilities (nats) of `tokens` behind `prompt` by the base itself, on the CPU."""
    import torch
    from transformers import AutoModelForCausalLM

    # eager: the one attention that every model has
    kwargs: dict[str, Any] = {"dtype": "auto", "attn_implementation": "eager", "local_files_only": True}
    model = AutoModelForCausalLM.from_pretrained(base, **kwargs).eval()
    with torch.inference_mode():
        ids = torch.tensor([[*prompt, *tokens]])
        logps = model(ids).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
    return [float(row[token]) for row, token in zip(logps, tokens, strict=True)]


def _message(text: str) -> str:
    """What an error answer says, in one line."""
    try:
        found = json.loads(text)
        text = found.get("error", {}).get("message") or found.get("message") or text
    except (ValueError, AttributeError):
        pass
    return " ".join(str(text).split())[:500]
