"""The embedded sampler's promises: the model's own numbers, the same episode in any company, versions kept apart,
nobody left waiting."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from espalier.rollouts.samplers import torch_attend, torch_engine
from espalier.rollouts.samplers.base import Sample, Sampler, SampleRequest, SamplerError, SamplingParams
from espalier.rollouts.samplers.torch import TorchSampler
from espalier.rollouts.samplers.torch_attend import Attention, Sight
from espalier.rollouts.samplers.torch_cache import Cache, Rows, Saved
from espalier.rollouts.samplers.torch_draw import draw, uniforms
from espalier.rollouts.samplers.torch_model import Shape, build, forward, read_shape, read_tensors
from espalier.rollouts.samplers.torch_probe import rows_agree
from espalier.rollouts.samplers.torch_seats import Name, Pool
from espalier.rollouts.types import PolicyVersion
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import load_file, save_file
from small_policy import VOCAB, make_adapter, make_base, version
from transformers import Qwen3ForCausalLM, TopKLogitsWarper, TopPLogitsWarper


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(base, tmp_path_factory.mktemp("adapter"), 1)


@pytest.fixture(scope="module")
def adapter2(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(base, tmp_path_factory.mktemp("adapter2"), 2)


@asynccontextmanager
async def running(base: Path, *versions: PolicyVersion, **options: object):
    sampler = TorchSampler(base, **({"slots": 8, "threads": 1, "max_tokens": 512} | options))
    try:
        for one in versions or (version(0, base, base),):
            await sampler.publish(one)
        yield sampler
    finally:
        await sampler.close()


def prompt_of(seed: int, size: int) -> tuple[int, ...]:
    return tuple(np.random.default_rng(seed).integers(0, VOCAB, size).tolist())


def request(
    name: str, prompt: Sequence[int], *, n: int = 8, v: int = 0, key: int | None = None, **more
) -> SampleRequest:
    key = hash(name) & 0xFFFFFFFF if key is None else key
    return SampleRequest(name, tuple(prompt), v, key, n, **({"stop": ()} | more))


def reference_logprobs(
    model: torch.nn.Module, prompt: Sequence[int], sample: Sample, temperature: float = 1.0
) -> list[float]:
    with torch.no_grad():
        logits = model(torch.tensor([list(prompt) + list(sample.tokens)])).logits[0].float() / temperature
    table = torch.log_softmax(logits, -1)
    return [table[len(prompt) - 1 + t, token].item() for t, token in enumerate(sample.tokens)]


# The model's own numbers.


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"use_rslora": True, "r": 8},
        {"target_modules": ["q_proj", "down_proj"], "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"down_proj": 3}},
    ],
    ids=["lora", "rslora", "patterns"],
)
@pytest.mark.parametrize("norm_scale", [1.0, 3.0], ids=["small scores", "large scores"])
async def test_logprobs_are_those_of_transformers_and_peft(tmp_path: Path, config: dict, norm_scale: float) -> None:
    base = make_base(tmp_path / "base", norm_scale=norm_scale, tied=norm_scale == 1.0)
    path = make_adapter(base, tmp_path / "adapter", 3, **config)
    model = PeftModel.from_pretrained(Qwen3ForCausalLM.from_pretrained(base), path).eval()
    async with running(base, version(5, path, base)) as sampler:
        first_prompt = prompt_of(0, 150)
        first = await sampler.sample(request("a", first_prompt, v=5, n=40, params=SamplingParams(temperature=0.7)))
        second_prompt = first_prompt + first.tokens + prompt_of(1, 90)
        second = await sampler.sample(request("a", second_prompt, v=5, n=40))
        plain = await sampler.sample(request("b", prompt_of(2, 1), v=5, n=10))
    near = 2e-5 if norm_scale == 1.0 else 1e-4  # scores of dozens make float32 itself that coarse
    assert first.logprobs == pytest.approx(reference_logprobs(model, first_prompt, first, 0.7), abs=near)
    assert second.logprobs == pytest.approx(reference_logprobs(model, second_prompt, second), abs=near)
    assert plain.logprobs == pytest.approx(reference_logprobs(model, prompt_of(2, 1), plain), abs=near)
    # The control: without the adapter the numbers are others.
    bare = Qwen3ForCausalLM.from_pretrained(base).eval()
    assert first.logprobs != pytest.approx(reference_logprobs(bare, first_prompt, first, 0.7), abs=1e-3)


async def test_bfloat16_is_near(base: Path, adapter: Path) -> None:
    model = PeftModel.from_pretrained(Qwen3ForCausalLM.from_pretrained(base), adapter).eval()
    prompt = prompt_of(0, 150)
    async with running(base, version(1, adapter, base), dtype="bfloat16") as sampler:
        sample = await sampler.sample(request("a", prompt, v=1, n=40))
    expected = reference_logprobs(model, prompt, sample)
    assert sample.logprobs == pytest.approx(expected, abs=0.1) != pytest.approx(expected, abs=1e-4)
    with pytest.raises(ValueError, match="dtype"):
        TorchSampler(base, dtype="float16")


async def test_greedy_is_the_argmax_of_transformers(base: Path) -> None:
    model = Qwen3ForCausalLM.from_pretrained(base).eval()
    prompt = prompt_of(3, 30)
    async with running(base) as sampler:
        sample = await sampler.sample(request("a", prompt, n=20, params=SamplingParams(temperature=0.0)))
    expected = model.generate(
        torch.tensor([prompt]), max_new_tokens=20, min_new_tokens=20, do_sample=False, pad_token_id=0
    )
    assert sample.tokens == tuple(expected[0, 30:].tolist())
    assert sample.logprobs == pytest.approx(reference_logprobs(model, prompt, sample), abs=2e-5)


async def test_stop_token_is_the_last(base: Path) -> None:
    async with running(base) as sampler:
        whole = await sampler.sample(request("a", prompt_of(4, 20), n=30, key=9))
        stop = whole.tokens[12]
        cut = await sampler.sample(request("b", prompt_of(4, 20), n=30, key=9, stop=(stop,)))
    assert whole.finish == "length" and len(whole.tokens) == 30
    assert cut.finish == "stop" and cut.tokens == whole.tokens[: whole.tokens.index(stop) + 1]
    assert isinstance(sampler, Sampler)


# The same episode in any company.


@dataclass(frozen=True)
class Script:
    """An episode: a first prompt, then turns, each with so many new prompt tokens and so many to sample."""

    name: str
    prompt: tuple[int, ...]
    turns: tuple[tuple[int, int], ...]
    version: int = 0
    temperature: float = 1.0
    breaks: bool = False  # the last turn's prompt is no extension: the template dropped earlier tokens


async def play(sampler: TorchSampler, script: Script, pause: float = 0.0) -> list[Sample]:
    prompt, samples = script.prompt, []
    seed = sum(map(ord, script.name))
    for turn, (extra, n) in enumerate(script.turns):
        if turn:
            prompt = (*prompt, *samples[-1].tokens, *prompt_of(seed + turn, extra))
            if script.breaks and turn == len(script.turns) - 1:
                prompt = (*prompt[: len(prompt) // 2], *prompt_of(seed, 5))
        await asyncio.sleep(pause)
        params = SamplingParams(temperature=script.temperature)
        key = int.from_bytes(f"{script.name}{turn}".encode()[-8:], "little")
        samples.append(
            await sampler.sample(request(script.name, prompt, n=n, v=script.version, key=key, params=params))
        )
    await sampler.end_session(script.name)
    return samples


@st.composite
def scripts(draw_) -> list[Script]:
    shared = [prompt_of(i, draw_(st.integers(1, 140))) for i in range(draw_(st.integers(1, 3)))]
    turn = st.tuples(st.integers(0, 70), st.integers(1, 12))
    return [
        Script(
            name=f"episode-{i}",
            prompt=draw_(st.sampled_from(shared)) + prompt_of(99, draw_(st.sampled_from([0, 0, 3]))),
            turns=tuple(draw_(st.lists(turn, min_size=1, max_size=4))),
            version=draw_(st.sampled_from([0, 0, 1])),
            temperature=draw_(st.sampled_from([0.0, 0.6, 1.0])),
            breaks=draw_(st.booleans()),
        )
        for i in range(draw_(st.integers(2, 9)))
    ]


def skip_unless_invariant(sampler: TorchSampler) -> None:
    if not sampler.batch_invariant:
        pytest.skip("this machine's BLAS computes a row differently in a larger product")


schedules = given(
    episodes=scripts(),
    slots=st.integers(1, 9),
    cache_tokens=st.sampled_from([0, 150, 65536]),
    pauses=st.lists(st.sampled_from([0.0, 0.0, 0.001, 0.01]), min_size=9, max_size=9),
)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@schedules
def test_an_episode_comes_out_the_same_alone_or_among_others(base, adapter, **schedule) -> None:
    check_company(base, adapter, **schedule)


@pytest.mark.long
@pytest.mark.timeout(1800)
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@schedules
def test_an_episode_comes_out_the_same_alone_or_among_others_for_long(base, adapter, **schedule) -> None:
    check_company(base, adapter, **schedule)


def test_two_threads_give_the_same_episodes_as_one(base: Path, adapter: Path) -> None:
    episodes = [Script(f"e{i}", prompt_of(i // 2, 50), ((0, 3), (20, 2)), version=i % 2) for i in range(5)]
    check_company(base, adapter, episodes, slots=3, cache_tokens=150, pauses=[0.0] * 5, threads=2)


def check_company(base: Path, adapter: Path, episodes, slots, cache_tokens, pauses, threads: int = 1) -> None:
    versions = (version(0, base, base), version(1, adapter, base))

    async def go() -> tuple[list[list[Sample]], list[list[Sample]]]:
        async with running(base, *versions, slots=1) as lonely:
            skip_unless_invariant(lonely)
            alone = [await play(lonely, episode) for episode in episodes]
        async with running(base, *versions, slots=slots, cache_tokens=cache_tokens, threads=threads) as busy:
            together = await asyncio.gather(*map(play, [busy] * len(episodes), episodes, pauses))
        return alone, list(together)

    alone, together = asyncio.run(go())
    assert together == alone  # tokens and log-probabilities, to the bit


@pytest.mark.parametrize("norm_scale", [1.0, 3.0], ids=["small scores", "large scores"])
async def test_64_together_equal_each_alone_with_fewer_slots_than_sessions(tmp_path: Path, norm_scale: float) -> None:
    base = make_base(tmp_path, norm_scale=norm_scale)
    episodes = [
        Script(f"e{i}", prompt_of(i // 8, 40 + i // 8 * 37), ((0, 6 + i % 5), (30 + i, 5), (9, 7))) for i in range(64)
    ]
    async with running(base, slots=64) as busy:
        skip_unless_invariant(busy)
        together = await asyncio.gather(*(play(busy, episode) for episode in episodes))
    async with running(base, slots=21, cache_tokens=900) as tight:
        in_turns = await asyncio.gather(*(play(tight, episode, 0.001) for episode in episodes))
        assert tight.stats()["parked"] > 0
    async with running(base, slots=1, cache_tokens=0) as lonely:
        alone = [await play(lonely, episode) for episode in episodes[::9]]
    assert together == in_turns
    assert together[::9] == alone


def test_control_a_single_unpadded_row_is_computed_differently(base: Path) -> None:
    weights = build(read_shape(base), read_tensors(base), torch.device("cpu"), torch.float32)
    tokens = torch.arange(16)
    angles = torch.ones(16, 1, 8, dtype=torch.complex64)

    def hidden(rows: int) -> torch.Tensor:
        with torch.inference_mode():
            return forward(weights, tokens[:rows], angles[:rows], lambda _, heads, __: heads[:, :4].reshape(-1, 64))

    assert torch.equal(hidden(8), hidden(16)[:8])
    if torch.backends.mkl.is_available():
        assert not torch.equal(hidden(1), hidden(16)[:1])
        assert rows_agree(weights.shape)
        assert not rows_agree(weights.shape, rows=(1,))


async def test_control_keys_left_behind_by_another_episode_are_caught(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    over = torch_attend.Attention.over

    def too_far(self, sight: Sight) -> object:
        return over(self, replace(sight, lane_seen=np.where(sight.lane_seen > 0, sight.lane_seen + 1, 0)))

    async def short(*before: Script, seen: object = over) -> list[Sample]:
        async with running(base, slots=1) as sampler:
            for script in before:
                await play(sampler, script)
            with monkeypatch.context() as patch:
                patch.setattr(torch_attend.Attention, "over", seen)
                return await play(sampler, Script("short", prompt_of(2, 30), ((0, 8),)))

    long = Script("long", prompt_of(1, 90), ((0, 40),))
    assert await short(long) == await short()
    # what the other left stands in the lane, and one key too many finds it
    assert await short(long, seen=too_far) != await short(seen=too_far)


@st.composite
def sights(draw_) -> Sight:
    """Rows of a batch, no two of which store at the same place."""
    sight = Sight(*(np.zeros(16, np.int64) for _ in range(4)))
    for row in range(draw_(st.integers(1, 14))):
        sight.prefix[row], sight.prefix_seen[row] = draw_(st.integers(0, 2)), draw_(st.integers(0, 60))
        sight.lane[row], sight.lane_seen[row] = row, draw_(st.integers(0 if row == 0 else 1, 90))
    return sight


@settings(max_examples=30, deadline=None)
@given(
    sight=sights(), heads=st.sampled_from([(4, 4), (4, 2), (6, 1)]), threads=st.integers(1, 3), seed=st.integers(0, 99)
)
def test_attention_is_the_softmax_over_what_a_row_sees_compiled_or_gathered(sight, heads, threads, seed) -> None:
    (q_heads, kv), d = heads, 16
    rng = np.random.default_rng(seed)
    shape = Shape(1, 1, 1, 2, q_heads, kv, d, 1e-6, 1e4, True)
    filling = torch.from_numpy(rng.standard_normal((4, 2, 16 * kv, 128, d), np.float32))
    given_heads, values = (
        torch.from_numpy(rng.standard_normal(size, np.float32)) for size in ((16, q_heads + kv, d), (16, kv * d))
    )
    found, caches = [], []
    for way in ("_compiled", "_gathered"):
        cache = Cache(shape, *(Rows(shape, 16, torch.device("cpu"), torch.float32) for _ in range(2)))
        for store, full in zip((cache.prefixes, cache.lanes), filling.split(2), strict=True):
            store.grow(128)
            store.k.copy_(full[0])
            store.v.copy_(full[1])
        attention = Attention(cache, torch.device("cpu"), threads)
        found.append(getattr(attention, way)(sight)(1, given_heads, values).view(16, q_heads, d))
        caches.append(cache)
        attention.close()
    assert all(torch.equal(a, b) for a, b in zip(*(_stores(cache) for cache in caches), strict=True))
    for row in range(16):
        p, n = int(sight.prefix_seen[row]), int(sight.lane_seen[row])
        for h in range(q_heads if p + n else 0):
            outer, inner = (int(at[row]) * kv + h * kv // q_heads for at in (sight.prefix, sight.lane))
            k, v = (
                torch.cat([store[1, outer, :p], own[1, inner, :n]]).double()
                for store, own in zip(_stores(caches[0])[:2], _stores(caches[0])[2:], strict=True)
            )
            assert torch.equal(k[-1].float(), given_heads[row, q_heads + h * kv // q_heads])
            expected = torch.softmax(k @ given_heads[row, h].double() * np.log(2), 0) @ v
            assert all(torch.allclose(one[row, h].double(), expected, atol=1e-5) for one in found)


def test_the_compiler_is_loaded_by_those_who_sample_only() -> None:
    """vLLM 0.32's CPU workers do not start in a process that has llvmlite loaded, and they import what their parent's
    program imports.
    """
    code = "import sys, espalier.rollouts.samplers.torch; sys.exit('llvmlite' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120, check=False).returncode == 0


def _stores(cache: Cache) -> list[torch.Tensor]:
    return [cache.prefixes.k, cache.prefixes.v, cache.lanes.k, cache.lanes.v]


async def test_a_prompt_is_read_once_a_group_and_a_session_is_continued(base: Path) -> None:
    async with running(base) as sampler:
        prompt = prompt_of(5, 200)
        first = await asyncio.gather(*(sampler.sample(request(f"e{i}", prompt, n=4, key=i)) for i in range(8)))
        assert sampler.stats()["prefilled_tokens"] == 199
        again = (*prompt, *first[0].tokens, *prompt_of(6, 20))
        await sampler.sample(request("e0", again, n=4))
        # The last sampled token and all but the last new one are read; the last is fed as the first step of decoding.
        assert sampler.stats()["prefilled_tokens"] == 199 + 20
        near = (*prompt[:150], *prompt_of(7, 30))
        await sampler.sample(request("near", near, n=1))
        assert sampler.stats()["prefilled_tokens"] == 199 + 20 + 29


@settings(max_examples=60, deadline=None)
@given(
    kept=st.lists(st.lists(st.integers(0, 2), max_size=5).map(tuple), max_size=12),
    wanted=st.lists(st.integers(0, 2), max_size=6).map(tuple),
    bound=st.integers(0, 30),
)
def test_the_pool_keeps_its_bound_and_finds_the_longest_common_prefix(kept, wanted, bound) -> None:
    pool, key = Pool(bound), (1, "digest")
    for i, tokens in enumerate(kept):
        pool.put(Name(key, tokens), Saved(*(torch.zeros(1, 1, len(tokens), 1) for _ in range(2))))
        pool.put(Name((2, "other"), wanted), Saved(*(torch.zeros(1, 1, len(wanted), 1) for _ in range(2))))
        pool.put(Name(None, session=f"{i % 3}"), Saved(*(torch.zeros(1, 1, 2, 1) for _ in range(2))))
        assert pool.tokens <= bound
    held = {tokens for tokens in kept if pool.get(Name(key, tokens))}
    common = [
        next((i for i, (a, b) in enumerate(zip(t, wanted, strict=False)) if a != b), min(len(t), len(wanted)))
        for t in held
    ]
    name, length = pool.nearest(key, wanted)
    assert length == max(common, default=0)
    assert name.tokens[:length] == wanted[:length] and (not held or name.tokens in held)
    pool.drop(key)
    assert pool.nearest(key, wanted)[1] == 0


# Versions.


async def test_running_requests_keep_their_version_while_others_come_and_go(
    base: Path, adapter: Path, adapter2: Path
) -> None:
    versions = [version(0, base, base), version(1, adapter, base), version(2, adapter2, base)]
    prompt = prompt_of(8, 60)
    alone = {}
    for one in versions:
        async with running(base, one) as sampler:
            alone[one.number] = await sampler.sample(request("x", prompt, n=120, v=one.number, key=3))
    assert len({sample.tokens for sample in alone.values()}) == 3
    async with running(base, versions[0], max_versions=2) as sampler:
        with sampler.lease(0):
            old = asyncio.create_task(sampler.sample(request("x", prompt, n=120, v=0, key=3)))
            await asyncio.sleep(0.01)
            await sampler.publish(versions[1])
            assert sampler.latest == 1
            new = asyncio.create_task(sampler.sample(request("y", prompt, n=120, v=1, key=3)))
            assert await old == alone[0]
            assert await new == alone[1]
        # Version 0 is free now, and makes room. A session may go on with another version: nothing old is reused.
        await sampler.publish(versions[2])
        assert sampler.versions == (1, 2)
        assert await sampler.sample(request("y", prompt, n=120, v=2, key=3)) == alone[2]
        with pytest.raises(SamplerError, match="version 0 is not resident"):
            await sampler.sample(request("z", prompt))


async def test_control_sharing_keys_and_values_between_versions_is_caught(base, adapter, monkeypatch) -> None:
    prompt = prompt_of(9, 60)
    served = torch_engine.Served

    async def swap() -> tuple[Sample, Sample]:
        async with running(base, version(0, base, base), version(1, adapter, base)) as sampler:
            await sampler.sample(request("x", prompt, n=4, v=0))
            mixed = await sampler.sample(request("y", prompt, n=4, v=1, key=1))
        async with running(base, version(1, adapter, base)) as sampler:
            return mixed, await sampler.sample(request("y", prompt, n=4, v=1, key=1))

    mixed, alone = await swap()
    assert mixed == alone
    monkeypatch.setattr("espalier.rollouts.samplers.torch.Served", lambda _, weights: served((1, "the same"), weights))
    mixed, alone = await swap()
    assert mixed.logprobs != alone.logprobs


async def test_loading_a_version_starts_no_team_of_threads(base: Path, adapter: Path) -> None:
    """OpenMP teams beyond the cores make every wait in the process, the trainer's too, a sleep."""
    mine = torch.get_num_threads()
    async with running(base, version(0, base, base), version(1, adapter, base)) as sampler:
        assert sampler._loader.submit(torch.get_num_threads).result() == 1
    assert torch.get_num_threads() == mine


async def test_a_closed_sampler_takes_no_version(base: Path) -> None:
    sampler = TorchSampler(base, slots=1, threads=1)
    await sampler.close()
    with pytest.raises(SamplerError, match="was closed"):
        await sampler.publish(version(0, base, base))


async def test_retire_waits_for_the_last_lease(base: Path, adapter: Path) -> None:
    async with running(base, version(0, base, base), version(1, adapter, base)) as sampler:
        with sampler.lease(0):
            await sampler.retire(0)
            assert sampler.versions == (0, 1)
            await sampler.sample(request("a", prompt_of(1, 9), v=0))
            with pytest.raises(SamplerError, match="not resident"), sampler.lease(0):
                pass
        assert sampler.versions == (1,)
        await sampler.retire(0)
        with pytest.raises(SamplerError, match="is the latest"):
            await sampler.retire(1)


async def test_publish_beyond_the_bound_says_what_to_do(base: Path, adapter: Path, adapter2: Path) -> None:
    async with running(base, version(0, base, base), version(1, adapter, base), max_versions=2) as sampler:
        with sampler.lease(0), sampler.lease(1):
            with pytest.raises(SamplerError, match=r"all 2 resident versions are leased.*max_versions"):
                await sampler.publish(version(2, adapter2, base))
            assert sampler.latest == 1
        await sampler.publish(version(2, adapter2, base))
        assert sampler.versions == (1, 2)


async def test_a_version_is_immutable_and_its_files_are_checked(
    base: Path, adapter: Path, adapter2: Path, tmp_path: Path
) -> None:
    good = version(1, adapter, base)
    async with running(base, version(0, base, base), good) as sampler:
        with pytest.raises(SamplerError, match="published with another digest"):
            await sampler.publish(version(1, adapter2, base))
        with pytest.raises(SamplerError, match="its files were changed"):
            await sampler.publish(replace(good, number=2, path=adapter2))
        with pytest.raises(SamplerError, match="cannot be read"):
            await sampler.publish(replace(good, number=3, path=tmp_path / "nowhere"))
        await sampler.publish(good)
        assert sampler.versions == (0, 1) and sampler.latest == 1
    sampler = TorchSampler(base, slots=1, threads=1)
    with pytest.raises(SamplerError, match="is the base"):
        await sampler.publish(replace(version(0, adapter, base)))
    await sampler.close()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias"),
        ({"peft_type": "IA3"}, "merges LoRA adapters only"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
    ],
)
async def test_adapters_that_are_more_than_lora_are_refused(base, adapter, tmp_path, change, message) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text()) | change
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    (tmp_path / "adapter_model.safetensors").write_bytes((adapter / "adapter_model.safetensors").read_bytes())
    async with running(base) as sampler:
        with pytest.raises(SamplerError, match=message):
            await sampler.publish(version(1, tmp_path, base))
        assert sampler.latest == 0


async def test_an_adapter_of_another_base_or_another_module_is_refused(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    config = (adapter / "adapter_config.json").read_text()
    tensors = load_file(adapter / "adapter_model.safetensors")
    name = next(key for key in tensors if "q_proj.lora_A" in key)
    for i, changed in enumerate(
        (
            tensors | {name: torch.zeros(4, 32)},
            {key.replace("q_proj", "x_proj"): tensor for key, tensor in tensors.items()},
            tensors | {"base_model.model.model.embed_tokens.lora_embedding_A": torch.zeros(4, VOCAB)},
            tensors | {"base_model.model.lm_head.base_layer.weight": torch.zeros(VOCAB, 64)},
        )
    ):
        folder = tmp_path / str(i)
        folder.mkdir()
        (folder / "adapter_config.json").write_text(config)
        save_file(changed, folder / "adapter_model.safetensors")
        async with running(base) as sampler:
            with pytest.raises(SamplerError, match=r"another base|does not implement"):
                await sampler.publish(version(1, folder, base))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "Qwen3"),
        ({"attention_bias": True}, "attention_bias"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope type"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"head_dim": 8}, "head_dim 8.*wider heads"),
        ({"head_dim": None, "hidden_size": 60}, "head_dim 15"),
    ],
)
def test_other_architectures_are_refused(base: Path, tmp_path: Path, change: dict, message: str) -> None:
    config = json.loads((base / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(SamplerError, match=message):
        TorchSampler(tmp_path)


def test_a_missing_base_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(SamplerError, match=r"config\.json is missing"):
        TorchSampler(tmp_path)


# Nobody is left waiting.


async def test_a_late_request_times_out_and_frees_its_slot(base: Path) -> None:
    async with running(base, slots=1, max_tokens=2048) as sampler:
        with pytest.raises(TimeoutError, match="no sample within"):
            await sampler.sample(request("slow", prompt_of(1, 9), n=2000, deadline_s=0.05))
        sample = await sampler.sample(request("next", prompt_of(1, 9), n=3, deadline_s=60.0))
        assert len(sample.tokens) == 3
        again = await sampler.sample(request("slow", prompt_of(1, 9), n=3, key=5))
        assert again == await sampler.sample(request("fresh", prompt_of(1, 9), n=3, key=5))


async def test_a_cancelled_request_frees_its_slot_and_its_version(base: Path) -> None:
    async with running(base, slots=1, max_tokens=2048) as sampler:
        tasks = [asyncio.create_task(sampler.sample(request(f"t{i}", prompt_of(1, 9), n=2000))) for i in range(3)]
        await asyncio.sleep(0.05)
        for task in tasks:
            task.cancel()
        assert all(isinstance(r, asyncio.CancelledError) for r in await asyncio.gather(*tasks, return_exceptions=True))
        assert len((await sampler.sample(request("next", prompt_of(1, 9), n=3, deadline_s=60.0))).tokens) == 3
        assert sampler._table.held == {}


async def test_ending_a_session_ends_its_request(base: Path) -> None:
    async with running(base, max_tokens=2048) as sampler:
        task = asyncio.create_task(sampler.sample(request("a", prompt_of(1, 9), n=2000)))
        await asyncio.sleep(0.05)
        with pytest.raises(SamplerError, match="one turn at a time"):
            await sampler.sample(request("a", prompt_of(1, 9)))
        await sampler.end_session("a")
        with pytest.raises(SamplerError, match="cancelled"):
            await task
        await sampler.end_session("never seen")


async def test_a_broken_engine_tells_everyone_who_waits_and_everyone_who_comes(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(base, slots=2, max_tokens=2048) as sampler:
        tasks = [asyncio.create_task(sampler.sample(request(f"t{i}", prompt_of(1, 9), n=2000))) for i in range(5)]
        await asyncio.sleep(0.05)

        def broken(*_: object) -> None:
            raise MemoryError("no memory")

        monkeypatch.setattr(torch_engine, "forward", broken)
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            assert isinstance(result, SamplerError) and "MemoryError: no memory" in str(result)
        with pytest.raises(SamplerError, match="MemoryError"):
            await sampler.sample(request("late", prompt_of(1, 9)))
        await sampler.end_session("t0")


async def test_closing_answers_what_is_pending(base: Path) -> None:
    async with running(base, slots=2, max_tokens=2048) as sampler:
        tasks = [asyncio.create_task(sampler.sample(request(f"t{i}", prompt_of(1, 9), n=2000))) for i in range(5)]
        await asyncio.sleep(0.02)
        await sampler.close()
        assert all(isinstance(r, SamplerError) for r in await asyncio.gather(*tasks, return_exceptions=True))
        with pytest.raises(SamplerError, match=r"not resident|closed"):
            await sampler.sample(request("late", prompt_of(1, 9)))


async def test_the_queue_has_a_bound(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_engine, "MAX_OPEN", 4)
    async with running(base, slots=1, max_tokens=2048) as sampler:
        tasks = [asyncio.create_task(sampler.sample(request(f"t{i}", prompt_of(1, 9), n=1500))) for i in range(4)]
        await asyncio.sleep(0.02)
        with pytest.raises(SamplerError, match="4 requests are open") as caught:
            await sampler.sample(request("one too many", prompt_of(1, 9)))
        assert caught.value.retryable
        for task in tasks:
            task.cancel()


async def test_weights_that_diverged_end_typed_and_harm_nobody_else(base: Path, adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text((adapter / "adapter_config.json").read_text())
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file({k: torch.full_like(t, torch.nan) for k, t in tensors.items()}, tmp_path / "adapter_model.safetensors")
    prompt = prompt_of(1, 70)
    async with running(base, version(0, base, base), version(1, tmp_path, base), slots=1) as sampler:
        before = await sampler.sample(request("a", prompt, key=1))
        with pytest.raises(SamplerError, match="not finite"):
            await sampler.sample(request("b", prompt, v=1))
        assert await sampler.sample(request("c", prompt, key=1)) == before


async def test_requests_that_cannot_be_served_say_why(base: Path) -> None:
    async with running(base, max_tokens=64) as sampler:
        for bad, message in (
            (request("a", ()), "needs a prompt"),
            (request("a", (1,), n=0), "at least one token"),
            (request("a", prompt_of(1, 60), n=5), "max_tokens = 64"),
            (request("a", (1, VOCAB)), "outside the vocabulary"),
            (request("a", (1,), v=7), "version 7 is not resident"),
            (request("a", (1,), trust_domain="customer"), "trust domain 'training' only"),
        ):
            with pytest.raises(SamplerError, match=message):
                await sampler.sample(bad)
        assert len((await sampler.sample(request("a", prompt_of(1, 59), n=5))).tokens) == 5


async def test_nothing_is_served_before_the_first_version(base: Path) -> None:
    sampler = TorchSampler(base, slots=1, threads=1)
    with pytest.raises(SamplerError, match="no version is published"):
        _ = sampler.latest
    await sampler.close()
    await sampler.close()


# Drawing.


def test_uniforms_belong_to_key_and_number_alone_and_are_uniform() -> None:
    keys = np.arange(200, dtype=np.uint64).repeat(500)
    numbers = np.tile(np.arange(500, dtype=np.uint64), 200)
    u = uniforms(keys, numbers)
    assert u[12345] == uniforms(keys[12345:12346], numbers[12345:12346])[0]
    assert u.min() >= 0.0 and u.max() < 1.0 and len(np.unique(u)) == len(u)
    counts = np.histogram(u, bins=100, range=(0, 1))[0]
    assert ((counts - 1000) ** 2 / 1000).sum() < 170  # chi-square, 99 degrees of freedom, p > 1e-5
    table = u.reshape(200, 500)
    assert abs(np.corrcoef(table[:, 0], table[:, 1])[0, 1]) < 0.3 and abs(np.corrcoef(table[0], table[1])[0, 1]) < 0.2


def test_the_draw_follows_the_distribution() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, -torch.inf, 0.5]]).expand(20000, -1)
    u = uniforms(np.full(20000, 3, np.uint64), np.arange(20000, dtype=np.uint64))
    tokens, logprobs = draw(logits, [SamplingParams()] * 20000, u)
    p = torch.softmax(logits[0], -1)
    shares = torch.bincount(torch.tensor(tokens), minlength=5) / 20000
    assert torch.allclose(shares, p, atol=0.012) and shares[3] == 0
    assert torch.allclose(torch.tensor(logprobs), torch.log_softmax(logits[0], -1)[tokens], atol=1e-6)
    edge, _ = draw(logits[:2], [SamplingParams()] * 2, np.array([0.0, 1 - 2.0**-52]))
    assert edge == [0, 4]


@settings(max_examples=40, deadline=None)
@given(
    top_k=st.integers(0, 12),
    top_p=st.floats(0.05, 1.0),
    temperature=st.sampled_from([0.5, 1.0, 1.7]),
    seed=st.integers(0, 99),
)
def test_top_k_and_top_p_cut_as_transformers_does(top_k: int, top_p: float, temperature: float, seed: int) -> None:
    logits = torch.randn(1, 10, generator=torch.Generator().manual_seed(seed)) * 2
    expected = logits / temperature
    if top_k:
        expected = TopKLogitsWarper(min(top_k, 10))(None, expected)
    if top_p < 1:
        expected = TopPLogitsWarper(top_p)(None, expected)
    n = 400
    params = [SamplingParams(temperature=temperature, top_p=top_p, top_k=top_k)] * n
    tokens, logprobs = draw(logits.expand(n, -1), params, (np.arange(n) + 0.5) / n)
    allowed = torch.isfinite(expected[0])
    assert allowed[tokens].all()
    whole = torch.log_softmax(logits[0] / temperature, -1)  # log-probabilities are those before the cut
    assert torch.allclose(torch.tensor(logprobs), whole[tokens], atol=1e-6)
    shares = torch.bincount(torch.tensor(tokens), minlength=10) / n
    assert torch.allclose(shares, torch.softmax(expected[0], -1), atol=0.006)


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 40), vocab=st.sampled_from([31, 96, 1003]), seed=st.integers(0, 99))
def test_a_row_is_drawn_the_same_among_others(rows: int, vocab: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, vocab, generator=generator)
    kinds = [SamplingParams(), SamplingParams(0.0), SamplingParams(0.7, 0.9), SamplingParams(1.3, 1.0, 5)]
    params = [kinds[i % 4] for i in range(rows)]
    u = uniforms(np.arange(rows, dtype=np.uint64), np.full(rows, seed, np.uint64))
    tokens, logprobs = draw(logits, params, u)
    i = seed % rows
    token, logprob = draw(logits[i : i + 1].clone(), params[i : i + 1], u[i : i + 1])
    assert (token, logprob) == (tokens[i : i + 1], logprobs[i : i + 1])
