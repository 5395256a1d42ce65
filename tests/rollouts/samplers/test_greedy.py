"""Greedy requests are coalesced, sampled ones never (promise 5)."""

import asyncio
from dataclasses import replace

import pytest
from espalier.rollouts.samplers.base import Sample, SampleRequest, SamplerError, SamplingParams
from espalier.rollouts.samplers.greedy import GreedyOnce

GREEDY = SampleRequest("a", (1, 2), 0, 7, 8, (0,), SamplingParams(temperature=0.0))
OTHERS = [{"prompt": (1, 3)}, {"version": 1}, {"max_tokens": 9}, {"stop": (5,)}, {"trust_domain": "else"}]


class Slow:
    """Answers after a moment; its first `failing` answers are errors."""

    def __init__(self, failing=0):
        self.asked, self.failing = [], failing

    async def sample(self, request):
        self.asked.append(request.session)
        number = len(self.asked)
        await asyncio.sleep(0.01)
        if number <= self.failing:
            raise SamplerError("not now", retryable=True)
        return Sample((number, 0), (-0.1, -0.2), "stop", request.version)


def sessions(request, count=4):
    return [replace(request, session=str(i), key=i) for i in range(count)]


async def test_equal_greedy_requests_in_flight_are_answered_once():
    sampler = Slow()
    once = GreedyOnce(sampler)
    found = await asyncio.gather(*map(once.sample, sessions(GREEDY)))
    assert sampler.asked == ["0"] and len(set(found)) == 1
    await once.sample(GREEDY)  # nothing is kept
    assert sampler.asked == ["0", "a"]


@pytest.mark.parametrize("change", OTHERS, ids=lambda change: next(iter(change)))
async def test_what_makes_another_answer_makes_another_request(change):
    sampler = Slow()
    await asyncio.gather(*map(GreedyOnce(sampler).sample, [GREEDY, replace(GREEDY, **change)]))
    assert len(sampler.asked) == 2


async def test_sampled_requests_are_each_sampled():
    sampler = Slow()
    drawn = replace(GREEDY, params=SamplingParams())
    found = await asyncio.gather(*map(GreedyOnce(sampler).sample, sessions(drawn)))
    assert sampler.asked == ["0", "1", "2", "3"] and len(set(found)) == 4


async def test_an_error_is_of_whoever_asked_and_the_others_ask_again():
    sampler = Slow(failing=1)
    found = await asyncio.gather(*map(GreedyOnce(sampler).sample, sessions(GREEDY)), return_exceptions=True)
    assert isinstance(found[0], SamplerError) and len(set(found[1:])) == 1
    assert sampler.asked == ["0", "1"]


async def test_one_who_leaves_takes_nobody_with_him():
    sampler = Slow()
    once = GreedyOnce(sampler)
    first, *others = [asyncio.create_task(once.sample(request)) for request in sessions(GREEDY)]
    await asyncio.sleep(0)
    first.cancel()
    assert len(set(await asyncio.gather(*others))) == 1
    assert sampler.asked == ["0"] and first.cancelled()
