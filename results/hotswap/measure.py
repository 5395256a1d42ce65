"""Adapters swapped under constant load in vLLM: is anything failed, mixed or stale, and what does a swap cost?

Always true: 100 distinct adapters, each with an answer of its own that depends on the cached keys and values of a prompt
that every request shares (`probe`); 16 streams ask without pause, so every swap comes upon a hot prefix; each answer is
held against the version that its request named. Times to first token within a swap's window (from the call of publish to
one second after its return) are compared with those outside, in the same run.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import _bench
import probe
import psutil
import torch
from espalier.rollouts.digest import folder_digest
from espalier.rollouts.samplers.base import SampleRequest, SamplerError, SamplingParams
from espalier.rollouts.samplers.vllm import VllmSampler
from espalier.rollouts.types import PolicyVersion

STREAMS = 16
LONG_STREAMS = 4
LONG = 32
"""Tokens that a request of a long stream samples; those of the others sample one, so that its time is the time to it."""
WINDOW_SECONDS = 1.0
THREADS = (1, 2)
VERSIONS = 4
GREEDY = SamplingParams(temperature=0.0)


Wanted = dict[int, tuple[int, ...]]
"""The greedy answer of each version."""


@dataclass
class Seen:
    """What the streams saw. `wrong`: (version, place, token) of each answer's first wrong token; `first`: (begin,
    seconds) of every request of one token.
    """

    failed: int = 0
    stale: int = 0
    requests: int = 0
    wrong: list[tuple[int, int, int]] = field(default_factory=list)
    first: list[tuple[float, float]] = field(default_factory=list)
    windows: list[tuple[float, float]] = field(default_factory=list)
    publish: list[float] = field(default_factory=list)
    resident: list[int] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)


async def stream(sampler: VllmSampler, name: str, tokens: int, wanted: Wanted, seen: Seen) -> None:
    """Ask without pause; every request names the version that is the latest when it begins, and holds it."""
    number = 0
    while True:
        number += 1
        version = sampler.latest
        request = SampleRequest(f"{name}/{number}", probe.prompt(), version, 0, tokens, (), GREEDY, 60.0)
        began = time.perf_counter()
        try:
            with sampler.lease(version):
                sample = await sampler.sample(request)
        except (SamplerError, TimeoutError):
            seen.failed += 1
            continue
        seen.requests += 1
        wrong = [(version, at, token) for at, token in enumerate(sample.tokens) if token != wanted[version][at]]
        seen.stale += len(wrong)
        seen.wrong += wrong[:1]
        if tokens == 1:
            seen.first.append((began, time.perf_counter() - began))


async def swap(sampler: VllmSampler, versions: list[PolicyVersion], pause: float, seen: Seen) -> None:
    """Publish version after version, retire the one before, and look at the engine's memory after each."""
    before = None
    for version in versions:
        began = time.perf_counter()
        await sampler.publish(version)
        ended = time.perf_counter()
        if before is not None:
            await sampler.retire(before)
        before = version.number
        seen.publish.append(ended - began)
        seen.windows.append((began, ended + WINDOW_SECONDS))
        seen.resident.append(len(sampler.versions))
        await asyncio.sleep(WINDOW_SECONDS + pause)
        seen.memory.append(memory())


def memory() -> int:
    """Resident bytes of the engine's processes."""
    found = 0
    for process in psutil.Process().children(recursive=True):
        try:
            found += process.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return found


async def run(sampler: VllmSampler, versions: list[PolicyVersion], wanted: Wanted, pause: float) -> Seen:
    """All swaps under load."""
    seen = Seen()
    await sampler.publish(versions[0])
    lengths = [LONG] * LONG_STREAMS + [1] * (STREAMS - LONG_STREAMS)
    streams = [asyncio.create_task(stream(sampler, f"s{i}", n, wanted, seen)) for i, n in enumerate(lengths)]
    await asyncio.sleep(3 * WINDOW_SECONDS)
    seen.first.clear()  # the first requests find a cold engine
    await swap(sampler, versions[1:], pause, seen)
    for task in streams:
        task.cancel()
    await asyncio.gather(*streams, return_exceptions=True)
    return seen


def token_of(number: int) -> int:
    """The answer of a version; no two have the same."""
    return 2 * number + 1


def split(seen: Seen) -> tuple[list[float], list[float]]:
    """Times to first token of requests begun within a window, and of the others. Seconds."""
    within: list[float] = []
    outside: list[float] = []
    for began, seconds in seen.first:
        inside = any(start <= began <= end for start, end in seen.windows)
        (within if inside else outside).append(seconds)
    return within, outside


def quantile(values: list[float], q: float) -> float:
    """The value that a share `q` of `values` does not exceed."""
    return sorted(values)[min(len(values) - 1, int(q * len(values)))]


def growth(memory: list[int]) -> float:
    """Per cent from swap 20 (or the fifth part) to the last, medians of five."""
    at = len(memory) // 5
    return 100.0 * (median(memory[-5:]) / median(memory[at : at + 5]) - 1.0)


def start(folder: Path, threads: int, device: str) -> VllmSampler:
    return VllmSampler(
        folder,
        slots=STREAMS,
        max_versions=VERSIONS,
        max_tokens=probe.LENGTH + LONG,
        rank=1,
        threads=threads,
        card=0 if device == "cuda" else None,
    )


async def speed(sampler: VllmSampler, version: PolicyVersion, wanted: Wanted, seconds: float) -> float:
    """Requests a second without swaps."""
    seen = Seen()
    await sampler.publish(version)
    streams = [asyncio.create_task(stream(sampler, f"w{i}", 1, wanted, seen)) for i in range(STREAMS)]
    await asyncio.sleep(seconds)
    for task in streams:
        task.cancel()
    await asyncio.gather(*streams, return_exceptions=True)
    return seen.requests / seconds


def best_threads(base: Path, version: PolicyVersion, wanted: Wanted, device: str) -> tuple[int, dict[int, float]]:
    """The thread setting with most requests a second, one engine each (a setting is an engine's for life)."""
    found = {}
    for threads in THREADS:
        sampler = start(base, threads, device)
        found[threads] = asyncio.run(speed(sampler, version, wanted, 10.0))
        asyncio.run(sampler.close())
    return max(found, key=lambda threads: found[threads]), found


def main(argv: list[str] | None = None) -> None:
    """Measure, and write figures.json, report.md and plot.png."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--swaps", type=int, default=100, help="how many swaps")
    mine, rest = parser.parse_known_args(argv)
    bench = _bench.start(__file__, __doc__ or "", rest)
    swaps, pause = (5, 0.2) if bench.quick else (mine.swaps, 1.5)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base = probe.make_base(folder / "base")
        versions, wanted = [], {}
        for number in range(1, swaps + 2):
            path = probe.make_adapter(base, folder / f"v{number:06d}", token_of(number))
            versions.append(PolicyVersion(number, folder_digest(path), path, str(base)))
            wanted[number] = probe.answer(base, path, LONG)
        threads, sweep = (1, {}) if bench.quick else best_threads(base, versions[0], wanted, bench.device)
        sampler = start(base, threads, bench.device)
        try:
            seen = asyncio.run(run(sampler, versions, wanted, pause))
        finally:
            asyncio.run(sampler.close())
    within, outside = split(seen)
    figures = {
        "swaps": len(seen.publish),
        "failed_requests": seen.failed,
        "stale_tokens": seen.stale,
        "publish_ms_p50": 1000 * median(seen.publish),
        "publish_ms_p99": 1000 * quantile(seen.publish, 0.99),
        "ttft_p99_ratio": quantile(within, 0.99) / quantile(outside, 0.99),
        "ttft_p50_ratio": median(within) / median(outside),
        "ttft_ms_p50": 1000 * median(outside),
        "ttft_ms_p99": 1000 * quantile(outside, 0.99),
        "requests_in_windows": len(within),
        "requests": seen.requests,
        "resident_max": max(seen.resident),
        "memory_growth_pct": growth(seen.memory),
        "memory_gb": seen.memory[-1] / 1e9,
    }
    runs: list[Any] = [
        {
            "device": bench.device,
            "threads": threads,
            "requests_s_by_threads": sweep,
            "publish_ms": [1000 * seconds for seconds in seen.publish],
            "memory_mb": [bytes // 10**6 for bytes in seen.memory],
            "resident": seen.resident,
            "wrong": seen.wrong,
        }
    ]
    if bench.folder is not None:
        plot(seen, within, outside, bench.folder / "plot.png")
        (bench.folder / "report.md").write_text(report(figures, threads), encoding="utf-8")
    claim = "Adapters are swapped under load without a failed, mixed or stale answer."
    bench.finish(claim, [0], figures, runs)


def plot(seen: Seen, within: list[float], outside: list[float], path: Path) -> None:
    """Times to first token within and outside the windows; time to publish; memory."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (first, publish, used) = plt.subplots(1, 3, figsize=(13, 3.8))
    for values, label in ((outside, "outside"), (within, "in swap windows")):
        ordered = sorted(1000 * value for value in values)
        first.plot(ordered, [i / len(ordered) for i in range(len(ordered))], label=label)
    first.set(xlabel="time to first token, ms", ylabel="share of requests", title="What a swap costs others")
    first.legend(frameon=False)
    publish.plot([1000 * seconds for seconds in seen.publish], ".", color="#2a7f62")
    publish.set(xlabel="swap", ylabel="ms", title="Time to publish", ylim=(0, None))
    used.plot([bytes / 1e9 for bytes in seen.memory], color="#2a7f62")
    used.set(xlabel="swap", ylabel="GB", title="Memory of the engine", ylim=(0, None))
    for axis in (first, publish, used):
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def report(figures: dict[str, float], threads: int) -> str:
    """report.md."""
    machine = _bench.machine()
    return f"""# Adapters swapped while vLLM serves

![times to first token, time to publish, memory](plot.png)

| | |
|---|---|
| swaps, all adapters distinct | {figures["swaps"]:.0f} |
| requests answered | {figures["requests"]:,.0f} |
| failed requests | {figures["failed_requests"]:.0f} |
| tokens of another version than asked for, or stale | {figures["stale_tokens"]:.0f} |
| time to publish, median / 99 % | {figures["publish_ms_p50"]:.1f} / {figures["publish_ms_p99"]:.1f} ms |
| time to first token outside swaps, median / 99 % | {figures["ttft_ms_p50"]:.1f} / {figures["ttft_ms_p99"]:.1f} ms |
| in swap windows ({figures["requests_in_windows"]:,.0f} requests), ratio of the median / of the 99 % | {figures["ttft_p50_ratio"]:.2f} / {figures["ttft_p99_ratio"]:.2f} |
| adapters resident at most | {figures["resident_max"]:.0f} |
| memory of the engine, growth from swap 20 to the last | {figures["memory_gb"]:.2f} GB, {figures["memory_growth_pct"]:+.1f} % |

A small Qwen3 with random weights on vLLM ({machine["cpu"]}, {machine["cores"]} cores; {threads} thread, the best of a sweep).
{STREAMS} streams ask without pause for greedy continuations of one prompt of {probe.LENGTH} tokens, whose first 256 are in the
prefix cache: {STREAMS - LONG_STREAMS} streams for one token each, so that a request's time is the time to its first token, {LONG_STREAMS} for {LONG} tokens. Every
adapter makes the model say a token of its own, through the keys and values of the prompt alone: a cache entry left by another
version changes the answer. A swap is: check the files against their digest, load the adapter, have it answer a
token, route new requests to it, retire the one before when its last request has ended.
"""


if __name__ == "__main__":
    main(sys.argv[1:])
