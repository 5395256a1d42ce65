"""Two embedded samplers as one: the same tokens as one of them, versions on both or on none, failures apart."""

from __future__ import annotations

import asyncio
from collections import Counter
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from espalier.rollouts.samplers.base import Sampler, SampleRequest, SamplerError
from espalier.rollouts.samplers.replicas import ReplicatedSampler
from espalier.rollouts.samplers.torch import TorchSampler
from small_policy import make_adapter, make_base, version


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"))


class Counting(TorchSampler):
    """Says which sessions came to it, and fails where it is told to."""

    def __init__(self, base: Path, **options: object) -> None:
        super().__init__(base, slots=4, threads=1, max_tokens=256, **options)
        self.seen: Counter[str] = Counter()
        self.fails: set[str] = set()

    async def publish(self, version):
        if "publish" in self.fails:
            raise SamplerError("it cannot")
        await super().publish(version)

    async def sample(self, request):
        self.seen[request.session] += 1
        if "sample" in self.fails:
            raise SamplerError("it broke")
        return await super().sample(request)


@asynccontextmanager
async def running(base: Path, count: int = 2):
    parts = [Counting(base) for _ in range(count)]
    sampler = ReplicatedSampler(parts)
    try:
        yield sampler, parts
    finally:
        await sampler.close()


def ask(session: str, number: int = 0, key: int = 1, group: str = "") -> SampleRequest:
    return SampleRequest(session, tuple(range(3, 20)), number, key, 12, (), group=group)


async def test_an_episode_stays_with_one_and_all_have_work(base: Path) -> None:
    async with running(base) as (sampler, parts):
        await sampler.publish(version(0, base, base))
        assert isinstance(sampler, Sampler)
        samples = await asyncio.gather(*(sampler.sample(ask(f"s{i}", key=i)) for i in range(6)))
        for i in range(6):
            await sampler.sample(ask(f"s{i}", key=i))
        assert [len(part.seen) for part in parts] == [3, 3]
        assert not parts[0].seen.keys() & parts[1].seen.keys()
        assert set(parts[0].seen.values()) == {2}
        async with running(base, 1) as (alone, _):
            await alone.publish(version(0, base, base))
            assert [await alone.sample(ask(f"s{i}", key=i)) for i in range(6)] == list(samples)
        for i in (0, 2, 4):  # the first one's episodes end; who comes next goes there
            await sampler.end_session(f"s{i}")
        await sampler.sample(ask("late"))
        assert "late" in parts[0].seen


async def test_the_episodes_of_a_group_stay_together_and_groups_are_spread(base: Path) -> None:
    """Also where the first group's come before any other's."""
    async with running(base) as (sampler, parts):
        await sampler.publish(version(0, base, base))
        ids = [(f"g{g}", f"g{g}/{i}") for g in range(4) for i in range(3)]
        await asyncio.gather(*(sampler.sample(ask(session, group=group)) for group, session in ids))
        homes = [{session.split("/")[0] for session in part.seen} for part in parts]
        assert homes == [{"g0", "g2"}, {"g1", "g3"}], "each group's prompt is read once"
        await sampler.end_session("g0/0")
        await sampler.sample(ask("g0/3", group="g0"))
        assert "g0/3" in parts[0].seen, "the others of its group still run"
        for group in ("g1", "g3"):
            for i in range(3):
                await sampler.end_session(f"{group}/{i}")
        await sampler.sample(ask("g4/0", group="g4"))
        assert "g4/0" in parts[1].seen, "groups that ended weigh nothing"


async def test_a_version_is_the_latest_when_all_serve_it(base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(base, tmp_path, 1)
    async with running(base) as (sampler, parts):
        with pytest.raises(SamplerError, match="no version is published"):
            _ = sampler.latest
        await sampler.publish(version(0, base, base))
        parts[1].fails.add("publish")
        with pytest.raises(SamplerError, match="it cannot"):
            await sampler.publish(version(1, adapter, base))
        assert sampler.latest == 0
        parts[1].fails.clear()
        await sampler.publish(version(1, adapter, base))
        assert sampler.latest == 1
        with sampler.lease(0):
            await sampler.retire(0)
            assert (await sampler.sample(ask("held"))).version == 0
        for part in parts:
            assert 0 not in part.versions, "the last lease has ended"


async def test_one_that_fails_fails_alone_and_all_are_closed(base: Path) -> None:
    async with running(base) as (sampler, parts):
        await sampler.publish(version(0, base, base))
        parts[0].fails.add("sample")
        results = await asyncio.gather(*(sampler.sample(ask(f"s{i}")) for i in range(4)), return_exceptions=True)
        assert [isinstance(result, SamplerError) for result in results] == [True, False, True, False]
    for part in parts:
        with pytest.raises(SamplerError):
            await part.sample(ask("after"))


def test_none_is_no_sampler() -> None:
    with pytest.raises(ValueError, match="needs a sampler"):
        ReplicatedSampler([])
