"""Environments that can be brought to a state: a call that nobody waits for any more leaves nothing behind."""

import asyncio
from contextlib import asynccontextmanager

import machine
import pytest
from espalier.configs.schema import EnvSection
from espalier.envs.core import EnvFailure
from espalier.rollouts.envpool import EnvRaised
from espalier.rollouts.envprocess import ProcessEnvPool
from espalier.rollouts.graph.statepool import ThreadStatePool
from espalier.rollouts.graph.states import STATE_GONE, Kept
from espalier.rollouts.recipe import env_recipe

MOVE = machine.act(("move", {"by": 1}))
MOST = 10
"""More kept states than are made here."""


@asynccontextmanager
async def states(where, **options):
    recipe = env_recipe(EnvSection(id="machine:MachineSluggish-v0"))
    if where == "threads":
        pool = ThreadStatePool(recipe.make, **{"deadline_s": 20, **options})
    else:
        pool = ProcessEnvPool(recipe, processes=1, **{"deadline_s": 20, **options})
    try:
        yield pool
    finally:
        await pool.close()


async def begun(pool, keep=False):
    handle = await pool.take("t")
    came, _ = await pool.begin(handle, 7, {"task": machine.task()}, keep)
    return handle, came


async def held(pool):
    """The numbers of the states that are kept."""
    handle, _ = await begun(pool)
    found = []
    for number in range(MOST):
        try:
            await pool.go_on(handle, Kept(number, 1), MOVE, False)
            found.append(number)
        except EnvFailure as error:
            assert error.kind == STATE_GONE
    return found


@pytest.mark.parametrize("where", ["threads", "processes"])
@pytest.mark.parametrize("when", ["in the middle", "as it is done"])
async def test_a_state_that_nobody_waits_for_is_not_kept(where, when):
    async with states(where) as pool:
        handle, came = await begun(pool, keep=True)
        assert await held(pool) == [came.kept.number]
        task = asyncio.create_task(pool.go_on(handle, came.kept, MOVE, True))
        await asyncio.sleep(0.05 if when == "in the middle" else machine.Sluggish.delay + 0.002)
        task.cancel()
        (last,) = await asyncio.gather(task, return_exceptions=True)
        pool.drop(handle)
        claimed = [] if isinstance(last, asyncio.CancelledError) else [last.kept.number]
        assert await held(pool) == [came.kept.number, *claimed]


async def test_a_state_is_not_kept_where_its_call_ends_as_it_is_answered(monkeypatch):
    """The answer is there, and its caller is cancelled before he has seen it."""
    async with states("processes") as pool:
        handle, _ = await begun(pool)
        task = asyncio.create_task(pool.go_on(handle, None, MOVE, True))
        answered = handle.worker._answer

        def answer(*said):
            answered(*said)
            task.cancel()

        monkeypatch.setattr(handle.worker, "_answer", answer)
        await asyncio.gather(task, return_exceptions=True)
        monkeypatch.undo()
        assert task.cancelled() and await held(pool) == []


async def test_a_state_behind_a_step_past_its_deadline_is_not_kept():
    async with states("threads") as pool:
        handle, came = await begun(pool, keep=True)
        pool._deadline = 0.1
        with pytest.raises(TimeoutError):
            await pool.go_on(handle, came.kept, MOVE, True)
        await asyncio.sleep(0.3)  # it has ended since
        assert list(pool._states._kept) == [came.kept.number]


async def test_a_branch_that_nobody_waits_for_is_let_go():
    """Negative control: one that somebody waits for stands where it was branched to."""
    async with states("processes") as pool:
        handle, came = await begun(pool, keep=True)
        made = await pool.fork(handle, came.kept)
        await pool.go_on(made, None, MOVE, False)
        task = asyncio.create_task(pool.fork(handle, came.kept))
        await asyncio.sleep(0)  # it has asked
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await asyncio.sleep(2 * machine.Sluggish.delay)
        with pytest.raises(EnvRaised, match="over"):  # a new environment, which no episode was begun in
            await pool.go_on(type(made)(made.worker, made.number + 1), None, MOVE, False)
