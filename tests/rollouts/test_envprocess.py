"""Environments in processes of their own: answered whatever breaks, the same as in threads, nothing left behind."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import adding
import gymnasium
import psutil
import pytest
from espalier.configs.schema import EnvSection
from espalier.envs.core import Action, EnvFailure, Task
from espalier.envs.spreadsheet.expert import expert
from espalier.envs.spreadsheet.families import generate
from espalier.rollouts.envpool import EnvRaised, ThreadEnvPool
from espalier.rollouts.envprocess import ProcessEnvPool
from espalier.rollouts.recipe import env_recipe
from espalier.rollouts.runner import GroupSpec, RolloutRunner
from espalier.rollouts.samplers.base import SamplingParams
from espalier.rollouts.samplers.scripted import ScriptedSampler, say
from espalier.rollouts.types import FailureKind, PolicyVersion

FAULTY = "faulty:Faulty-v0"
LONG = 60.0


@asynccontextmanager
async def workers(id=FAULTY, processes=1, deadline_s=LONG, kwargs=None, **more):
    recipe = env_recipe(EnvSection(id=id, kwargs=kwargs or {}))
    pool = ProcessEnvPool(recipe, processes=processes, deadline_s=deadline_s, **more)
    try:
        yield pool
    finally:
        pids = pool.pids
        await pool.close()
        assert not any(map(psutil.pid_exists, pids)), "a worker is left, or not reaped"


def task(id="t", does=""):
    return Task(id, does)


async def started(pool, id="t", does="", seed=1):
    handle = await pool.take(id)
    return handle, await pool.reset(handle, seed, {"task": task(id, does)})


def step(pool, handle, text=""):
    return asyncio.create_task(pool.step(handle, Action(text)))


async def until(true, seconds=LONG):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it never came to be"
        await asyncio.sleep(0.01)


async def test_an_episode_in_another_process_is_what_it_is_in_this_one():
    recipe = env_recipe(EnvSection(id=FAULTY, kwargs={"greeting": "hi"}))
    threads = ThreadEnvPool(recipe.make, deadline_s=LONG, terse=True)
    async with workers(kwargs={"greeting": "hi"}, terse=True) as pool:
        seen = []
        for each in (threads, pool):
            handle, (observation, info, tools) = await started(each, "t", seed=9)
            seen.append(
                (observation, tools, await each.step(handle, Action("x")), await each.step(handle, Action("end")))
            )
            assert (info["pid"] == os.getpid()) == (each is threads)
            each.give(handle)
        assert seen[0][:2] == seen[1][:2] and seen[0][0].messages[0]["content"].startswith("hi t ")
        for here, there in zip(seen[0][2:], seen[1][2:], strict=True):
            assert here[:4] == there[:4] and here[4]["said"] == there[4]["said"] and there[4]["pair"] == [1, 2]
            assert "odd" in here[4] and "odd" not in there[4], "what cannot be kept as JSON does not travel"
    await threads.close()


async def test_environments_are_reused_and_a_task_stays_with_its_worker():
    async with workers(processes=3) as pool:
        ids = [f"task {n}" for n in range(12)]
        homes = {}
        for _ in range(2):
            for id in ids:
                handle, (_, info, _) = await started(pool, id)
                assert homes.setdefault(id, info["pid"]) == info["pid"]
                pool.give(handle)
        assert sorted(set(homes.values())) == sorted(pool.pids) and len(pool.pids) == 3


async def test_what_an_environment_raises_has_its_type_and_its_words():
    async with workers() as pool:
        handle, _ = await started(pool)
        with pytest.raises(EnvFailure, match=r"^engine_crashed: the engine is gone$") as caught:
            await pool.step(handle, Action("fail"))
        assert caught.value.kind == "engine_crashed"
        with pytest.raises(EnvRaised, match=r"^ZeroDivisionError: a bug of the environment's$"):
            await pool.step(handle, Action("bug"))
        *_, info = await pool.step(handle, Action("ungraded"))
        assert "not" in info["ungraded"], "no verdict must arrive even when its reason is not JSON"


async def test_answers_come_as_they_are_ready_and_a_slow_step_is_given_up_alone():
    async with workers(deadline_s=4.0) as pool:
        (slow, _), (quick, _) = await started(pool), await started(pool)
        waiting = step(pool, slow, "sleep 600")
        observation, *_ = await pool.step(quick, Action("quick"))
        assert observation.messages[0]["content"] == "1 quick" and not waiting.done()
        pid = pool.pids[0]
        with pytest.raises(TimeoutError, match="within 4 s"):
            await waiting
        assert pool.pids == [pid]
        await pool.step(quick, Action("still there"))


@pytest.mark.parametrize(
    ("fault", "said"), [("die", "killed by signal 9; it said: my last words"), ("leave", r"ended \(7\)")]
)
async def test_a_worker_that_ends_ends_its_calls_and_is_replaced(fault, said):
    async with workers() as pool:
        (one, _), (two, _) = await started(pool), await started(pool)
        (pid,) = pool.pids
        waiting = step(pool, two, "sleep 600")
        await asyncio.sleep(0.05)
        with pytest.raises(EnvFailure, match=said):
            await pool.step(one, Action(fault))
        with pytest.raises(EnvFailure, match="worker_died"):
            await waiting
        with pytest.raises(EnvFailure, match="worker_died"):
            await pool.step(two, Action())
        pool.give(one)  # nothing comes of it
        pool.drop(two)
        three, (_, info, _) = await started(pool)
        assert info["pid"] != pid and not psutil.pid_exists(pid)
        await pool.step(three, Action("on"))


async def test_a_worker_killed_from_outside_ends_the_step_under_way():
    async with workers() as pool:
        handle, _ = await started(pool)
        waiting = step(pool, handle, "sleep 600")
        await asyncio.sleep(0.1)
        os.kill(pool.pids[0], signal.SIGKILL)
        with pytest.raises(EnvFailure, match="killed by signal 9"):
            await waiting


async def test_a_step_that_holds_the_interpreter_lock_is_ended_with_its_process():
    async with workers(deadline_s=3.0, slack_s=1.5) as pool:
        (one, _), (two, _) = await started(pool), await started(pool)
        (pid,) = pool.pids
        calls = [step(pool, one, "hang 300"), step(pool, two, "never run")]
        answers = await asyncio.gather(*calls, return_exceptions=True)
        assert isinstance(answers[0], TimeoutError) and "held up its whole process" in str(answers[0])
        # the other may have been answered before the lock was taken
        assert isinstance(answers[1], TimeoutError | tuple) and not psutil.pid_exists(pid)
        await started(pool)


async def test_holding_the_lock_for_less_than_a_deadline_costs_nothing():
    """The control: silence alone does not end a worker."""
    async with workers(deadline_s=3.0, slack_s=30.0) as pool:
        handle, _ = await started(pool)
        pids = pool.pids
        with suppress(TimeoutError):  # its own deadline, told by the worker itself, where that sees it first
            await pool.step(handle, Action("hang 4.5"))
        handle, _ = await started(pool)
        await pool.step(handle, Action("hang 0.3"))
        assert pool.pids == pids


async def test_workers_that_never_answer_are_not_replaced_for_ever():
    async with workers(max_restarts=2) as pool:
        said = []
        for _ in range(5):
            with pytest.raises(EnvFailure) as caught:
                await started(pool, does="die")
            said.append(caught.value.kind)
        assert said == ["worker_died"] * 3 + ["workers_failing"] * 2 and "3 environment processes" in str(caught.value)
        assert "killed by signal 9" in str(caught.value)


async def test_workers_that_answer_now_and_then_are_replaced_each_time():
    """The control: an answered call starts the count again."""
    async with workers(max_restarts=1) as pool:
        for _ in range(4):
            handle, _ = await started(pool)
            with pytest.raises(EnvFailure, match="worker_died"):
                await pool.step(handle, Action("die"))


async def test_too_many_hanging_steps_bring_a_new_worker():
    async with workers(deadline_s=3.0) as pool:
        handles = [(await started(pool))[0] for _ in range(8)]
        ends = await asyncio.gather(*(step(pool, one, "sleep 600") for one in handles), return_exceptions=True)
        assert all(isinstance(end, TimeoutError) for end in ends)
        (pid,) = pool.pids
        with pytest.raises(EnvFailure, match="8 environment calls hang"):
            await started(pool)
        await started(pool)
        assert not psutil.pid_exists(pid)


async def test_no_torch_in_a_worker():
    async with workers() as pool:
        handle, _ = await started(pool)
        observation, *_ = await pool.step(handle, Action("modules"))
        assert observation.messages[0]["content"].split() == ["1"]
        await pool.step(handle, Action("import datasets"))
        observation, *_ = await pool.step(handle, Action("modules"))
        assert "datasets" in observation.messages[0]["content"], "the check would see it"


async def test_what_a_worker_started_ends_with_it():
    async with workers() as pool:
        handle, _ = await started(pool)
        *_, info = await pool.step(handle, Action("child"))
        assert psutil.pid_exists(int(info["said"]))
        with pytest.raises(EnvFailure):
            await pool.step(handle, Action("die"))
    await until(lambda: not running(int(info["said"])))


def running(pid):
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


PARENT = """
import asyncio, sys
sys.path.insert(0, {folder!r})
from espalier.configs.schema import EnvSection
from espalier.envs.core import Action, Task
from espalier.rollouts.envprocess import ProcessEnvPool
from espalier.rollouts.recipe import env_recipe
async def main():
    pool = ProcessEnvPool(env_recipe(EnvSection(id="faulty:Faulty-v0")), processes=2, deadline_s=60)
    for task in ("a", "b", "c", "d"):
        handle = await pool.take(task)
        await pool.reset(handle, 1, {{"task": Task(task, "")}})
    waiting = asyncio.create_task(pool.step(handle, Action("sleep 600")))
    print(*pool.pids, flush=True)
    await waiting
asyncio.run(main())
"""


def test_workers_end_when_their_parent_is_killed():
    code = PARENT.format(folder=str(Path(__file__).parent))
    parent = subprocess.Popen([sys.executable, "-P", "-c", code], stdout=subprocess.PIPE, text=True)
    pids = list(map(int, parent.stdout.readline().split()))
    assert len(pids) == 2 and all(map(running, pids))
    parent.kill()
    parent.wait(LONG)
    end = time.monotonic() + LONG
    while any(map(running, pids)):
        assert time.monotonic() < end, "a worker has outlived its parent"
        time.sleep(0.02)


async def test_a_cancelled_call_leaves_the_worker_as_it_is():
    async with workers() as pool:
        handle, _ = await started(pool)
        waiting = step(pool, handle, "sleep 1")
        await asyncio.sleep(0.05)
        waiting.cancel()
        pool.drop(handle)
        taking = asyncio.create_task(pool.take("t"))
        await asyncio.sleep(0)
        taking.cancel()
        await asyncio.wait([waiting, taking])
        handle, _ = await started(pool)
        await pool.step(handle, Action("on"))


async def test_closing_ends_what_is_under_way_and_refuses_what_comes():
    async with workers() as pool:
        handle, _ = await started(pool)
        waiting = step(pool, handle, "sleep 30")
        await asyncio.sleep(0.05)
        await pool.close()
        with pytest.raises(EnvFailure, match="pool_closed"):
            await waiting
        with pytest.raises(EnvFailure, match="pool_closed"):
            await pool.take("t")


async def test_wrong_arguments_and_missing_modules_are_told_in_a_sentence(tmp_path, monkeypatch):
    async with workers(kwargs={"colour": "red"}) as pool:
        with pytest.raises(EnvRaised, match=r"TypeError: .*colour"):
            await pool.reset(await pool.take("t"), 0, {})
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "soon_gone.py").write_text(
        Path(__file__).with_name("faulty.py").read_text().replace("Faulty-v0", "Gone-v0")
    )
    recipe = env_recipe(EnvSection(id="soon_gone:Gone-v0"))
    (tmp_path / "soon_gone.py").unlink()
    pool = ProcessEnvPool(recipe, processes=1, deadline_s=LONG, max_restarts=1)
    for kind in ("worker_start", "worker_start", "workers_failing"):
        with pytest.raises(EnvFailure, match="No module named 'soon_gone'") as caught:
            await pool.take("t")
        assert caught.value.kind == kind
    await pool.close()


def test_what_no_other_process_can_make_is_refused_at_once():
    class Local(adding.Adder):
        pass

    class Main(adding.Adder):
        __module__ = "__main__"

    for name, entry in [("Local-v0", Local), ("Main-v0", Main), ("MainText-v0", "__main__:Main")]:
        gymnasium.register(name, entry_point=entry, disable_env_checker=True)
        try:
            with pytest.raises(ValueError, match=r"env\.processes = 0"):
                ProcessEnvPool(env_recipe(EnvSection(id=name)), processes=1, deadline_s=LONG)
        finally:
            del gymnasium.registry[name]


def test_an_id_may_name_its_module(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    text = "import faulty, gymnasium\ngymnasium.register('Elsewhere-v0', entry_point=faulty.Faulty)"
    (tmp_path / "names_itself.py").write_text(text)
    with pytest.raises(ValueError, match=r"env\.id: Elsewhere-v0"):  # the control
        env_recipe(EnvSection(id="Elsewhere-v0"))
    made = env_recipe(EnvSection(id="names_itself:Elsewhere-v0")).make()
    assert type(made).__name__ == "Faulty"
    with pytest.raises(ValueError, match=r"env\.id: no_such_module"):
        env_recipe(EnvSection(id="no_such_module:Elsewhere-v0"))


def play(renderer, tasks, pool):
    actions = {f"g{i}": expert(task) for i, task in enumerate(tasks)}

    def script(request, turn):
        group, episode = request.session.split("/")
        action = actions[group][turn]
        if episode == "1" and turn == 0:
            return say(renderer.encode, adding.call("no_such_tool", n=1))
        calls = [adding.call(c.name, **c.arguments) for c in action.tool_calls]
        return say(renderer.encode, "\n".join(([action.text] if action.text else []) + calls))

    sampler = ScriptedSampler(script, stop=renderer.stop_ids[0])
    budget = adding.budget(max_prompt_tokens=6000, max_tokens=12000, max_turn_tokens=2000, max_seconds=120.0)
    return sampler, RolloutRunner(
        sampler=sampler, renderer=renderer, pool=pool, episode=budget, run="run", seed=1, concurrency=4
    )


async def test_trajectories_are_the_same_with_and_without_processes(plain):
    tasks = [generate(11, index, "test") for index in range(6)]
    recipe = env_recipe(EnvSection(), tasks=tasks[:1])
    found = []
    for pool in (
        ThreadEnvPool(recipe.make, deadline_s=LONG, terse=True),
        ProcessEnvPool(recipe, processes=1, deadline_s=LONG, terse=True),
        ProcessEnvPool(recipe, processes=2, deadline_s=LONG, terse=True),
    ):
        sampler, runner = play(plain, tasks, pool)
        await sampler.publish(PolicyVersion(0, "digest", Path("base"), "base"))
        groups = await runner.run_groups([GroupSpec(f"g{i}", t, 2) for i, t in enumerate(tasks)], SamplingParams(), 0)
        await runner.close()
        assert not any(group.failures for group in groups)
        found.append([untimed(t) for group in groups for t in group.trajectories])
    assert found[0] == found[1] == found[2] and len(found[0]) == 12
    assert any("collateral" in trajectory["info"] for trajectory in found[0])


def untimed(trajectory):
    """Everything but how long it took."""
    fields = {name: getattr(trajectory, name) for name in trajectory.__dataclass_fields__}
    turns = [
        {name: getattr(turn, name) for name in turn.__dataclass_fields__ if not name.startswith("seconds")}
        for turn in trajectory.turns
    ]
    return {**fields, "turns": turns}


async def test_a_runner_forgets_a_dead_worker_and_goes_on(plain):
    """Through the runner: episodes on a worker that dies end as failures that may be tried again, others play on."""
    pool = ProcessEnvPool(env_recipe(EnvSection(id=FAULTY)), processes=1, deadline_s=LONG)

    def script(request, turn):
        return say(plain.encode, "die" if request.session == "g1/0" else "end")

    sampler = ScriptedSampler(script, stop=plain.stop_ids[0])
    await sampler.publish(PolicyVersion(0, "digest", Path("base"), "base"))
    runner = RolloutRunner(
        sampler=sampler, renderer=plain, pool=pool, episode=adding.budget(), run="r", seed=1, concurrency=1
    )
    specs = [GroupSpec(f"g{i}", task(f"t{i}"), 1) for i in range(3)]
    groups = await runner.run_groups(specs, SamplingParams(), 0)
    await runner.close()
    (failure,) = groups[1].failures
    assert failure.kind is FailureKind.ENV and failure.retryable and "signal 9" in failure.message
    assert [len(group.trajectories) for group in groups] == [1, 0, 1]
