"""vLLM as the sampler, the real one: a version answers with its own weights and its own cache, or not at all; whatever
happens to the engine, everyone who waits hears of it.
"""

from __future__ import annotations

import asyncio
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import small_policy as small
import torch
from espalier.rollouts.samplers.base import Sample, Sampler, SampleRequest, SamplerError, SamplingParams, Sleeper
from espalier.rollouts.samplers.vllm_limits import check_adapter, cpu_environment, server_options
from espalier.rollouts.samplers.vllm_process import VllmProcess
from espalier.rollouts.samplers.vllm_server import VllmServerSampler
from peft import PeftModel
from transformers import Qwen3ForCausalLM

vllm = pytest.importorskip("vllm", reason="needs vLLM: make test-vllm sets it up in an environment of its own")

from espalier.rollouts.samplers.vllm import VllmSampler  # noqa: E402
from vllm.lora.request import LoRARequest  # noqa: E402

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]
LONG = tuple(range(1, 91)) * 3
"""A prompt of 270 tokens: two blocks of vLLM's prefix cache on the CPU, 128 tokens each, and some."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.make_base(tmp_path_factory.mktemp("base"), head_dim=32)


@pytest.fixture(scope="module")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return [small.make_adapter(base, folder / str(i), i) for i in range(1, 7)]


SIZES = {"slots": 16, "max_versions": 3, "max_tokens": 600, "rank": 8}
OPTIONS = server_options(**SIZES, dtype="float32", memory=None, eager=True, seed=0)


LAUNCHED = {
    "RANK": "0",
    "LOCAL_RANK": "0",
    "WORLD_SIZE": "2",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "9",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
}
"""What torchrun tells a process: with these an engine waits for a store on a port where nobody answers."""


@pytest.fixture(scope="module", params=["in-process", "server"])
def sampler(base: Path, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """Both ways to vLLM keep the same promises, also in one of several processes that train together."""
    with pytest.MonkeyPatch.context() as launched:
        for name, value in LAUNCHED.items():
            launched.setenv(name, value)
        if request.param == "in-process":
            made: VllmSampler | VllmServerSampler = VllmSampler(base, threads=1, **SIZES)
        else:
            process = VllmProcess(base, OPTIONS, cpu_environment(1, 1), tmp_path_factory.mktemp("server") / "log")
            made = VllmServerSampler(process.url, base, process=process, **SIZES)
        assert {name: os.environ.get(name) for name in LAUNCHED} == LAUNCHED
    yield made
    asyncio.run(made.close())


def ask(prompt, version, n=8, **more):
    return SampleRequest(more.pop("session", "s"), tuple(prompt), version, 0, n, more.pop("stop", ()), **more)


def forward(base: Path, adapter: Path | None, prompt, tokens, temperature=1.0):
    """Log-probabilities of `tokens` behind `prompt`, by the trainer's own forward."""
    model = Qwen3ForCausalLM.from_pretrained(base)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    with torch.inference_mode():
        ids = torch.tensor([[*prompt, *tokens]])
        logits = model.eval()(ids).logits[0, len(prompt) - 1 : -1] / temperature
    return torch.log_softmax(logits, -1).gather(1, ids[0, len(prompt) :, None])[:, 0]


@pytest.fixture
async def served(sampler: VllmSampler, base: Path, adapters: list[Path]):
    """Versions 0, 1 and 2."""
    for number, path in enumerate([base, *adapters[:2]]):
        await sampler.publish(small.version(number, path, base))
    return sampler


async def test_logprobs_are_those_of_the_trainers_forward(served, base, adapters) -> None:
    assert isinstance(served, Sampler)
    for number, adapter in enumerate([None, *adapters[:2]]):
        for temperature in (1.0, 0.6):
            params = SamplingParams(temperature)
            asked = [ask(range(1, 40 + i), number, 40, params=params, session=f"{i}") for i in range(8)]
            for request, sample in zip(asked, await asyncio.gather(*map(served.sample, asked)), strict=True):
                wanted = forward(base, adapter, request.prompt, sample.tokens, temperature)
                assert len(sample.tokens) == 40 and sample.version == number and sample.finish == "length"
                assert (torch.tensor(sample.logprobs) - wanted).abs().max() < 1e-4


async def test_greedy_is_the_argmax_and_a_stop_token_is_the_last(served, base, adapters) -> None:
    greedy = SamplingParams(temperature=0.0)
    whole = await served.sample(ask(range(1, 30), 1, 12, params=greedy))
    wanted = forward(base, adapters[0], range(1, 30), whole.tokens)
    assert (torch.tensor(whole.logprobs) - wanted).abs().max() < 1e-4
    stop = whole.tokens[5]
    cut = await served.sample(ask(range(1, 30), 1, 12, params=greedy, stop=(stop,)))
    assert cut.finish == "stop" and cut.tokens == whole.tokens[: whole.tokens.index(stop) + 1]
    assert len(cut.logprobs) == len(cut.tokens)


async def test_it_sleeps_and_wakes_as_it_was(served, base, adapters) -> None:
    """On the CPU vLLM keeps its memory; the order of things is the same."""
    if not isinstance(served, Sleeper):
        pytest.skip("a server is not put to sleep")
    greedy, prompt = SamplingParams(temperature=0.0), LONG[::-1]
    before = await served.sample(ask(prompt, 1, 12, params=greedy))
    assert await reused(served, ask(prompt, 1)) == 256
    slow = asyncio.create_task(served.sample(ask(range(1, 30), 1, 550)))
    await asyncio.sleep(0.05)
    with pytest.raises(SamplerError, match="1 requests are running; vLLM cannot sleep now"):
        await served.sleep()
    assert len((await slow).tokens) == 550
    await served.sleep()
    await served.sleep()
    with pytest.raises(SamplerError, match="wake it before sampling"):
        await served.sample(ask(prompt, 1))
    with pytest.raises(SamplerError, match="wake it before publishing"):
        await served.publish(small.version(3, adapters[2], base))
    await served.wake()
    assert await reused(served, ask(prompt, 1)) == 0, "keys and values were dropped"
    assert (await served.sample(ask(prompt, 1, 12, params=greedy))).tokens == before.tokens


async def test_two_draws_of_one_prompt_differ(served) -> None:
    draws = await asyncio.gather(*(served.sample(ask(range(1, 30), 0, 20, session=f"{i}")) for i in range(6)))
    assert len({sample.tokens for sample in draws}) == 6


async def reused(sampler: VllmSampler, request: SampleRequest) -> int:
    before = sampler.stats()["tokens_reused"]
    await sampler.sample(request)
    return int(sampler.stats()["tokens_reused"] - before)


async def test_equals_share_the_prefix_cache_and_others_never_do(served, base, adapters) -> None:
    assert await reused(served, ask(LONG, 1)) == 0
    assert await reused(served, ask(LONG, 1)) == 256, "equal identity hits"
    assert await reused(served, ask(LONG, 2)) == 0, "another adapter"
    assert await reused(served, ask(LONG, 0)) == 0, "the base"
    assert await reused(served, ask(LONG, 1, trust_domain="customer")) == 0, "another trust domain"
    assert await reused(served, ask(LONG, 1, trust_domain="customer")) == 256
    twin = small.version(3, adapters[0], base)  # the same files under another number are the same policy
    await served.retire(0)
    await served.publish(twin)
    assert await reused(served, ask(LONG, 1)) == 256


async def test_running_requests_keep_their_version_while_others_come_and_go(base, adapters, sampler) -> None:
    request = ask(range(1, 40), 1, 550, params=SamplingParams(temperature=0.0))
    await sampler.publish(small.version(0, base, base))
    await sampler.publish(small.version(1, adapters[0], base))
    alone = await sampler.sample(request)
    swapped = asyncio.Event()

    async def keep_asking() -> list[tuple[float, Sample, float]]:
        """Answers one after another, with their times: however long a swap takes, it finds a request running."""
        answers = []
        while not swapped.is_set():
            answers.append((time.monotonic(), await sampler.sample(request), time.monotonic()))
        return answers

    with sampler.lease(1):
        running = [asyncio.create_task(keep_asking()) for _ in range(2)]
        await asyncio.sleep(0.05)
        swaps = []
        for number in (4, 5, 6):
            await sampler.publish(small.version(number, adapters[number - 1], base))
            await sampler.retire(number - 1 if number > 4 else 0)
            swaps.append(time.monotonic())
        assert (await sampler.sample(request)).tokens == alone.tokens
        swapped.set()
        await sampler.retire(1)
        for answers in await asyncio.gather(*running):
            assert all(answer.tokens == alone.tokens for _, answer, _ in answers)
            for swap in swaps:
                assert any(began < swap < ended for began, _, ended in answers), "in the middle of a request"
        with pytest.raises(SamplerError, match="not resident"), sampler.lease(1):
            pass
    assert sampler.versions == (6,) and sampler.latest == 6


async def test_files_that_changed_and_numbers_used_twice_are_refused(served, base, adapters, tmp_path) -> None:
    copy = small.make_adapter(base, tmp_path / "copy", 9)
    wanted = small.version(7, copy, base)
    (copy / "adapter_model.safetensors").write_bytes((adapters[0] / "adapter_model.safetensors").read_bytes())
    with pytest.raises(SamplerError, match="its files were changed"):
        await served.publish(wanted)
    with pytest.raises(SamplerError, match="another digest"):
        await served.publish(small.version(1, adapters[3], base))
    with pytest.raises(SamplerError, match="cannot be read"):
        await served.publish(small.version(8, tmp_path / "nowhere", base, digest="0" * 64))
    assert served.versions == (0, 1, 2)


@pytest.mark.parametrize(("change", "said"), [({"r": 16}, "rank 16"), ({"use_dora": True}, "plain LoRA")])
async def test_adapters_that_vllm_cannot_serve_are_refused(served, base, tmp_path, change, said) -> None:
    folder = small.make_adapter(base, tmp_path / "odd", 3, **change)
    with pytest.raises(SamplerError, match=said):
        await served.publish(small.version(7, folder, base))
    with pytest.raises(SamplerError, match=said):
        check_adapter(folder, 8)


async def test_an_adapter_of_another_base_is_refused_and_harms_nobody(served, tmp_path, base) -> None:
    other = small.make_base(tmp_path / "other", head_dim=32, hidden_size=96)
    folder = small.make_adapter(other, tmp_path / "adapter", 3)
    with pytest.raises(SamplerError, match="version 7"):
        await served.publish(small.version(7, folder, base))
    assert len((await served.sample(ask(range(1, 9), 1))).tokens) == 8
    assert served.stats()["restarts"] == 0


async def test_requests_that_cannot_be_served_say_why(served) -> None:
    for request, said in [
        (ask((), 1), "needs a prompt"),
        (ask(range(1, 90), 1, 600), "max_tokens = 600"),
        (ask([10**6], 1), "vocabulary"),
        (ask([1], 99), "not resident"),
    ]:
        with pytest.raises(SamplerError, match=said) as met:
            await served.sample(request)
        assert not met.value.retryable


async def test_a_late_request_times_out_and_leaves_the_engine(served) -> None:
    began = time.monotonic()
    with pytest.raises(TimeoutError, match=r"within 0\.05 s"):
        await served.sample(ask(range(1, 9), 1, 500, deadline_s=0.05))
    assert time.monotonic() - began < 5 and served._table.held == {}
    assert len((await served.sample(ask(range(1, 9), 1))).tokens) == 8


async def test_a_storm_of_requests_is_bounded(served, monkeypatch) -> None:
    for module in ("vllm", "vllm_server"):
        monkeypatch.setattr(f"espalier.rollouts.samplers.{module}.QUEUED_PER_SLOT", 2)
    asked = [served.sample(ask(range(1, 9), 1, 4, session=f"{i}")) for i in range(100)]
    ends = await asyncio.gather(*asked, return_exceptions=True)
    turned_away = [e for e in ends if isinstance(e, SamplerError) and e.retryable]
    assert len(turned_away) == 100 - 32 and sum(not isinstance(e, Exception) for e in ends) == 32


def engine_processes(sampler: VllmSampler) -> list[psutil.Process]:
    return [p for p in sampler._children if p.is_running() and "resource_tracker" not in " ".join(p.cmdline())]


@pytest.fixture
def engine(served) -> VllmSampler:
    if not isinstance(served, VllmSampler):
        pytest.skip("the server's own faults have their own test")
    return served


@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGSTOP])
async def test_an_engine_that_dies_or_hangs_is_started_again_with_its_versions(engine, monkeypatch, fault) -> None:
    """Everyone who waited hears of it, typed; the same version then answers with the same weights."""
    monkeypatch.setattr("espalier.rollouts.samplers.vllm.PROBE_SECONDS", 2.0)
    greedy = SamplingParams(temperature=0.0)
    before = (await engine.sample(ask(range(1, 40), 2, 20, params=greedy))).tokens
    restarts = engine.stats()["restarts"]
    asked = [asyncio.create_task(engine.sample(ask(range(1, 9), 2, 500, deadline_s=3.0))) for _ in range(8)]
    patient = asyncio.create_task(engine.sample(ask(range(1, 9), 2, 500, deadline_s=300.0)))
    await asyncio.sleep(0.05)
    hit = engine_processes(engine)
    assert hit
    for process in hit:
        os.kill(process.pid, fault)
    ends = await asyncio.gather(*asked, return_exceptions=True)
    assert all(isinstance(end, TimeoutError) or (isinstance(end, SamplerError) and end.retryable) for end in ends)
    with pytest.raises(SamplerError, match="started again") as met:
        await patient
    assert met.value.retryable
    after = await engine.sample(ask(range(1, 40), 2, 20, params=greedy, deadline_s=300.0))
    assert after.tokens == before
    assert engine.stats()["restarts"] == restarts + 1, "the fault was met"
    assert not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in hit)
    assert engine._table.held == {}


async def test_a_server_that_dies_is_started_again_and_its_requests_are_answered(served, base) -> None:
    """A sample changes nothing, so whoever can wait gets one; the adapters are loaded again under their names."""
    if not isinstance(served, VllmServerSampler):
        pytest.skip("about the server")
    greedy = SamplingParams(temperature=0.0)
    before = (await served.sample(ask(range(1, 40), 2, 20, params=greedy))).tokens
    patient = [asyncio.create_task(served.sample(ask(range(1, 9), 2, 500, deadline_s=300.0))) for _ in range(4)]
    hasty = asyncio.create_task(served.sample(ask(range(1, 9), 2, 500, deadline_s=1.0)))
    await asyncio.sleep(0.1)
    server = psutil.Process(served._process.pid)
    for process in [server, *server.children(recursive=True)]:
        process.kill()
    with pytest.raises(TimeoutError):
        await hasty
    assert [len(sample.tokens) for sample in await asyncio.gather(*patient)] == [500] * 4
    assert (await served.sample(ask(range(1, 40), 2, 20, params=greedy))).tokens == before
    stats = served.stats()
    assert stats["restarts"] == 1 and stats["away"] > 0 and stats["reloads"] > 0, "the fault was met"
    assert served._table.held == {}


async def test_a_server_that_hangs_is_started_again_and_one_that_is_busy_is_not(served, monkeypatch) -> None:
    if not isinstance(served, VllmServerSampler):
        pytest.skip("about the server")
    monkeypatch.setattr("espalier.rollouts.samplers.vllm_process.PROBE_SECONDS", 2.0)
    process, before = served._process, served.stats()
    busy = [asyncio.create_task(served.sample(ask(range(1, 9), 2, 500, deadline_s=300.0))) for _ in range(24)]
    await asyncio.sleep(0.1)
    with pytest.raises(TimeoutError):
        await served.sample(ask(range(1, 9), 1, 500, deadline_s=0.2))
    await asyncio.gather(*busy)
    await asyncio.to_thread(process._probing.acquire, timeout=30)
    process._probing.release()
    assert served.stats()["hangs"] == before["hangs"], "control: it was late and not hung"
    server = psutil.Process(process.pid)
    for one in [server, *server.children(recursive=True)]:
        one.suspend()
    patient = asyncio.create_task(served.sample(ask(range(1, 9), 2, 20, deadline_s=300.0)))
    with pytest.raises(TimeoutError):
        await served.sample(ask(range(1, 9), 1, 20, deadline_s=1.0))
    assert len((await patient).tokens) == 20
    after = served.stats()
    assert (after["hangs"], after["restarts"]) == (before["hangs"] + 1, before["restarts"] + 1)


@pytest.mark.long
async def test_an_engine_that_keeps_failing_is_given_up_aloud(base, adapters, monkeypatch) -> None:
    monkeypatch.setattr("espalier.rollouts.samplers.vllm.RESTARTS", 0)
    sampler = VllmSampler(base, slots=4, max_versions=2, max_tokens=600, rank=8)
    await sampler.publish(small.version(1, adapters[0], base))
    processes = engine_processes(sampler)
    asked = asyncio.create_task(sampler.sample(ask(range(1, 9), 1, 590)))
    while not sampler._running:
        await asyncio.sleep(0.001)
    for process in processes:
        process.kill()
    with pytest.raises(SamplerError):
        await asked
    with pytest.raises(SamplerError, match="failed 1 times") as met:
        await sampler.sample(ask(range(1, 9), 1))
    assert not met.value.retryable
    await sampler.close()
    await sampler.close()
    with pytest.raises(SamplerError):
        await sampler.sample(ask(range(1, 9), 1))


async def test_closing_answers_what_is_pending(base, adapters) -> None:
    sampler = VllmSampler(base, slots=4, max_versions=2, max_tokens=600, rank=8)
    await sampler.publish(small.version(1, adapters[0], base))
    children = engine_processes(sampler)
    asked = [asyncio.create_task(sampler.sample(ask(range(1, 9), 1, 590))) for _ in range(8)]
    while len(sampler._running) < 8:
        await asyncio.sleep(0.001)
    await sampler.close()
    ends = await asyncio.gather(*asked, return_exceptions=True)
    assert all(isinstance(end, SamplerError) and not end.retryable for end in ends)
    psutil.wait_procs(children, timeout=20)
    assert not any(process.is_running() for process in children)


def test_a_model_that_vllm_cannot_serve_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(SamplerError, match="the base cannot be read"):
        VllmSampler(tmp_path / "nowhere")
    with pytest.raises(SamplerError, match="rank 512"):
        VllmSampler(tmp_path, rank=1000)
    small_heads = small.make_base(tmp_path / "small", head_dim=16)
    with pytest.raises(SamplerError, match="heads of 32"):
        VllmSampler(small_heads)
    (tmp_path / "config.json").write_text('{"model_type": "nonsense"}')
    with pytest.raises(SamplerError, match="vLLM could not be started"):
        VllmSampler(tmp_path, slots=4, max_tokens=200)


@pytest.mark.long
async def test_a_servers_engine_that_dies_alone_is_started_again_too(served) -> None:
    if not isinstance(served, VllmServerSampler):
        pytest.skip("about the server")
    restarts = served.stats()["restarts"]
    patient = [asyncio.create_task(served.sample(ask(range(1, 9), 1, 500, deadline_s=300.0))) for _ in range(4)]
    await asyncio.sleep(0.1)
    engines = [p for p in psutil.Process(served._process.pid).children(recursive=True) if "VLLM" in p.name()]
    assert engines
    for process in engines:
        process.kill()
    assert [len(sample.tokens) for sample in await asyncio.gather(*patient)] == [500] * 4
    while served.stats()["restarts"] == restarts:
        await asyncio.sleep(0.1)
    assert served.stats()["restarts"] == restarts + 1, "the fault was met"


async def test_a_server_of_ones_own_that_serves_another_model_or_too_few_adapters_is_refused(
    served, base, tmp_path
) -> None:
    """Models of one shape under any name, and --max-loras: found out when the first version is published."""
    if not isinstance(served, VllmServerSampler):
        pytest.skip("about the server")
    other = small.make_base(tmp_path / "base", head_dim=32, norm_scale=3.0)
    wide = small.make_base(tmp_path / "wide", head_dim=32, vocab=2 * small.VOCAB)
    for model, changes, said in [
        (base, {}, None),
        (other, {}, rf"serves {base}, which is not the base {other} .*differ by .*policy\.base"),
        (wide, {}, rf"serves {base}, which is not the base {wide} "),
        (base, {"max_versions": 4}, "holds 3 adapters at once, sampler.max_versions is 4.*--max-loras 4"),
    ]:
        foreign = VllmServerSampler(served.url, model, **{**SIZES, **changes})
        for _ in range(2):  # a second try is no way around it
            if said is None:
                await foreign.publish(small.version(0, model, model))
                continue
            with pytest.raises(SamplerError, match=said) as met:
                await foreign.publish(small.version(0, model, model))
            assert not met.value.retryable
        await foreign.close()


@pytest.mark.long
@pytest.mark.parametrize(
    ("left_out", "max_tokens", "said"),
    [("--logprobs-mode=processed_logprobs", 600, "--logprobs-mode"), ("", 5000, "--max-model-len 5000")],
)
async def test_a_server_that_is_not_set_up_for_this_is_refused(base, tmp_path, left_out, max_tokens, said) -> None:
    options = [option for option in OPTIONS if option != left_out]
    process = await asyncio.to_thread(VllmProcess, base, options, cpu_environment(1, 1), tmp_path / "log")
    sampler = VllmServerSampler(process.url, base, max_tokens=max_tokens, process=process)
    try:
        with pytest.raises(SamplerError, match=said):
            await sampler.publish(small.version(0, base, base))
    finally:
        await sampler.close()


async def test_a_server_that_is_not_there_is_one_sentence(base, monkeypatch) -> None:
    monkeypatch.setattr("espalier.rollouts.samplers.vllm_server.PUBLISH_SECONDS", 1.0)
    sampler = VllmServerSampler("http://127.0.0.1:9", base)
    with pytest.raises(SamplerError, match="is it running") as met:
        await sampler.publish(small.version(0, base, base))
    assert met.value.retryable
    await sampler.close()


def test_a_server_that_cannot_start_says_why(tmp_path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "nonsense"}')
    with pytest.raises(SamplerError, match="ended before it was ready"):
        VllmProcess(tmp_path, OPTIONS, cpu_environment(1, 1), tmp_path / "log")


PROBE = runpy.run_path(str(Path(__file__).parents[3] / "results" / "hotswap" / "probe.py"))
"""The adapters of the benchmark of swaps: each says a token of its own, through the cached prompt alone."""


@pytest.fixture(scope="module")
def probed(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("probes")
    base = PROBE["make_base"](folder / "base")
    made = VllmSampler(base, slots=4, max_versions=2, max_tokens=600, rank=1)
    yield made, base, folder
    asyncio.run(made.close())


async def answer(sampler: VllmSampler, version: int) -> int:
    asked = ask(PROBE["prompt"](), version, 1, params=SamplingParams(temperature=0.0))
    return (await sampler.sample(asked)).tokens[0]


async def test_100_swaps_on_a_hot_prefix_leave_nothing_stale(probed) -> None:
    sampler, base, folder = probed
    for number in range(1, 101):
        adapter = PROBE["make_adapter"](base, folder / str(number), 3 + number)
        await sampler.publish(small.version(number, adapter, base))
        assert [await answer(sampler, number) for _ in range(2)] == [3 + number] * 2
    assert sampler.stats()["tokens_reused"] >= 100 * 256, "the prefix was hot"


async def test_control_the_same_path_overwritten_answers_with_the_old_cache(probed, monkeypatch) -> None:
    """What the sampler never does, done behind its back: same name and path, other bytes, loaded in place; no salt."""
    sampler, base, folder = probed
    monkeypatch.setattr("espalier.rollouts.samplers.vllm.cache_salt", lambda *_: "the same for all")
    path = PROBE["make_adapter"](base, folder / "overwritten", 7)
    await sampler.publish(small.version(200, path, base))
    assert await answer(sampler, 200) == 7
    other = PROBE["make_adapter"](base, folder / "other", 9)
    (path / "adapter_model.safetensors").write_bytes((other / "adapter_model.safetensors").read_bytes())
    adapter = sampler._table.resident[200].adapter
    again = LoRARequest(adapter.lora_name, adapter.lora_int_id, adapter.lora_path, load_inplace=True)
    await asyncio.wrap_future(sampler._submit(sampler._engine.add_lora(again)))
    assert await answer(sampler, 200) == 7, "stale: the new weights say 9"


OWNER = """
import sys, time
from pathlib import Path
import psutil
if __name__ == "__main__":
    base, log = Path(sys.argv[2]), Path(sys.argv[3])
    if sys.argv[1] == "engine":
        from espalier.rollouts.samplers.vllm import VllmSampler
        sampler = VllmSampler(base, slots=4, max_tokens=200)
    else:
        from espalier.rollouts.samplers.vllm_limits import cpu_environment, server_options
        from espalier.rollouts.samplers.vllm_process import VllmProcess
        options = server_options(
            slots=4, max_versions=2, max_tokens=200, rank=8, dtype="float32", memory=None, eager=True, seed=0
        )
        process = VllmProcess(base, options, cpu_environment(1, 1), log)
    print(*(child.pid for child in psutil.Process().children(recursive=True)), flush=True)
    time.sleep(600)
"""


@pytest.mark.long
@pytest.mark.parametrize("kind", ["engine", "server"])
def test_nothing_outlives_an_owner_that_was_killed(base, tmp_path, kind) -> None:
    script = tmp_path / "owner.py"
    script.write_text(OWNER)
    command = [sys.executable, "-P", str(script), kind, str(base), str(tmp_path / "log")]
    owner = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    children = []
    while not children:
        line = owner.stdout.readline()
        assert line, "the owner ended by itself"
        words = line.split()
        children = [psutil.Process(int(word)) for word in words] if words and all(map(str.isdigit, words)) else []
    os.kill(owner.pid, signal.SIGKILL)
    owner.wait(20)
    _, alive = psutil.wait_procs(children, timeout=60)
    assert not [p for p in alive if p.status() != psutil.STATUS_ZOMBIE]
