"""Who gets a place when there are not enough: the lowest rank, then who came first; nobody is forgotten."""

import asyncio

import pytest
from espalier.rollouts.places import Places
from hypothesis import given
from hypothesis import strategies as st


async def settle():
    for _ in range(5):
        await asyncio.sleep(0)


@given(
    number=st.integers(1, 3),
    ranks=st.lists(st.integers(0, 3), max_size=12),
    cancelled=st.sets(st.integers(0, 11)),
    late=st.sets(st.integers(0, 11)),
)
def test_the_lowest_rank_goes_first_and_every_place_comes_back(number, ranks, cancelled, late):
    """`cancelled` give up while they wait, `late` ones at the moment when they are let in."""

    async def play():
        places, entered, inside, leave = Places(number), [], 0, asyncio.Event()

        async def hold():
            async with places.held(0):
                await leave.wait()

        async def come(i, rank):
            nonlocal inside
            async with places.held(rank):
                entered.append(i)
                inside += 1
                assert inside <= number
                await asyncio.sleep(0)
                inside -= 1

        holding = [asyncio.create_task(hold()) for _ in range(number)]
        await settle()
        coming = [asyncio.create_task(come(i, rank)) for i, rank in enumerate(ranks)]
        await settle()
        assert not entered
        for i in cancelled & set(range(len(ranks))):
            coming[i].cancel()
        await settle()
        leave.set()
        if late:
            await asyncio.gather(*holding)  # the places are given, who has them has not run yet
            for i in late & set(range(len(ranks))):
                coming[i].cancel()
        await asyncio.gather(*holding, *coming, return_exceptions=True)
        expected = sorted((i for i in range(len(ranks)) if i not in cancelled), key=lambda i: ranks[i])
        went = [i for i in expected if i in entered]
        assert entered == went, "by rank, and in the order of coming within one"
        assert set(entered) >= set(expected) - late
        await asyncio.wait_for(asyncio.gather(*(come(-1, 9) for _ in range(2 * number))), 5)

    asyncio.run(play())


async def test_a_free_place_is_taken_at_once_and_no_other():
    places = Places(2)
    async with places.held(5), asyncio.timeout(5), places.held(9):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01), places.held(0):
                raise AssertionError("there were only two")
