"""The threads that step environments: deadlines, replacement, bounds."""

import asyncio
import threading
import time

import adding
import pytest
from espalier.envs.core import EnvFailure
from espalier.rollouts.envpool import ThreadEnvPool


async def test_environments_are_reused_and_closed():
    made = []

    def make():
        made.append(adding.Adder())
        return made[-1]

    pool = ThreadEnvPool(make, deadline_s=10)
    first = await pool.take()
    second = await pool.take()
    pool.give(first)
    assert await pool.take() is first
    pool.give(first)
    pool.give(second)
    await pool.close()
    assert len(made) == 2 and all(env.closed for env in made)
    with pytest.raises(EnvFailure, match="closed"):
        await pool.call(lambda: 1)


async def test_a_call_that_hangs_is_given_up_and_the_next_one_runs():
    release = threading.Event()
    pool = ThreadEnvPool(adding.Adder, deadline_s=0.2)
    stuck = asyncio.create_task(pool.call(release.wait))
    queued = asyncio.create_task(pool.call(lambda: "next"))
    with pytest.raises(TimeoutError, match=r"0\.2 s"):
        await stuck
    assert await queued == "next" and pool.stuck == 1
    release.set()
    while pool.stuck:
        await asyncio.sleep(0.01)
    assert await pool.call(lambda: "and the next") == "and the next"
    await pool.close()


async def test_a_slow_call_holds_up_nobody_and_threads_are_bounded():
    release = threading.Event()
    pool = ThreadEnvPool(adding.Adder, deadline_s=60, max_workers=3)
    slow = [asyncio.create_task(pool.call(release.wait)) for _ in range(2)]
    assert await pool.call(lambda: "not held up") == "not held up"
    last = asyncio.create_task(pool.call(release.wait))
    waits = asyncio.create_task(pool.call(lambda: "waits"))
    await asyncio.sleep(0.5)
    assert not waits.done() and len(pool._workers) == 3
    release.set()
    assert await asyncio.gather(*slow, last, waits) == [True] * 3 + ["waits"]
    await pool.close()


async def test_waiting_in_the_queue_does_not_use_up_the_deadline():
    pool = ThreadEnvPool(adding.Adder, deadline_s=2.5, max_workers=1)
    calls = [pool.call(lambda: time.sleep(0.5)) for _ in range(7)]  # 3.5 s of work in one thread
    assert await asyncio.gather(*calls) == [None] * 7
    await pool.close()


async def test_stuck_threads_are_bounded():
    release = threading.Event()
    pool = ThreadEnvPool(adding.Adder, deadline_s=0.05, max_stuck=2)
    for _ in range(2):
        with pytest.raises(TimeoutError):
            await pool.call(release.wait)
    with pytest.raises(EnvFailure, match="2 environment calls hang"):
        await pool.call(lambda: 1)
    release.set()
    await pool.close()


async def test_what_an_environment_raises_comes_out_but_never_kills_the_loop():
    pool = ThreadEnvPool(adding.Adder, deadline_s=10)

    def leave():
        raise SystemExit(3)

    def stop():
        raise StopIteration

    with pytest.raises(ZeroDivisionError):
        await pool.call(lambda: 1 / 0)
    for bad in (leave, stop):
        with pytest.raises(EnvFailure, match="env_raised"):
            await pool.call(bad)
    assert await pool.call(lambda: "alive") == "alive"
    await pool.close()


async def test_a_cancelled_call_frees_nothing_it_does_not_own():
    release = threading.Event()
    pool = ThreadEnvPool(adding.Adder, deadline_s=5)
    running = asyncio.create_task(pool.call(release.wait))
    await asyncio.sleep(0.05)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    release.set()
    assert await pool.call(lambda: "next") == "next"
    await pool.close()


async def test_workers_run_calls_side_by_side():
    barrier = threading.Barrier(3, timeout=10)
    pool = ThreadEnvPool(adding.Adder, deadline_s=20, workers=3)
    await asyncio.gather(*(pool.call(barrier.wait) for _ in range(3)))
    await pool.close()
