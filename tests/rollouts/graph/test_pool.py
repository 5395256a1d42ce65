"""The operation graph in front of environments. Promise 5: environment work is done once, and nothing else changes."""

import asyncio
import random
import threading
from collections import Counter
from pathlib import Path
from typing import ClassVar

import adding
import machine
import pytest
from espalier.envs.core import Action, EnvFailure
from espalier.rollouts.envpool import EnvRaised
from espalier.rollouts.graph.core import OperationGraph
from espalier.rollouts.graph.pool import GraphPool
from espalier.rollouts.graph.reach import NOT_REPRODUCIBLE
from espalier.rollouts.graph.statepool import ThreadStatePool
from espalier.rollouts.runner import GroupSpec, RolloutRunner
from espalier.rollouts.samplers.base import SamplingParams
from espalier.rollouts.samplers.scripted import ScriptedSampler, say
from espalier.rollouts.types import FailureKind, PolicyVersion
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from machine import act

KINDS = (machine.Machine, machine.Digesting, machine.Keeping, machine.Bound, machine.ByHistory)
MORE = (*KINDS, machine.RiskyDigesting)
QUICK = settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))

CALLS = st.sampled_from(
    [("move", {"by": 1}), ("move", {"by": 2}), ("look", {}), ("roll", {}), ("nothing", {}), ("move", {"by": "x"})]
)
PLANS = st.lists(st.lists(st.lists(CALLS, min_size=1, max_size=2), max_size=6), min_size=1, max_size=8)


@pytest.fixture(autouse=True)
def _fresh():
    machine.Machine.done.clear()
    machine.Machine.calls.clear()


def graph_pool(kind, graph=None, **options):
    options = {"verify_share": 0.0, **options}
    return GraphPool(
        ThreadStatePool(kind, deadline_s=options.pop("deadline_s", 20)),
        graph or OperationGraph(),
        env_id="machine",
        identity=options.pop("identity", kind.__name__),
        **options,
    )


async def play(pool, plan, task=None, pauses=None, seed=7):
    """One episode by plan, then finished by saying so; what was seen, ids of calls included."""
    task = task or machine.task()
    handle = await pool.take(task.id)
    fit = False
    try:
        observation, info, tools = await pool.reset(handle, seed, {"task": task})
        seen = [(observation, {k: v for k, v in info.items() if k != "task"}, tools)]
        for turn, calls in enumerate([*plan, None]):
            if pauses is not None:
                await asyncio.sleep(pauses.random() * 0.002)
            action = Action("done") if calls is None else act(*calls, turn=turn, text=f"thinking {turn}")
            result = await pool.step(handle, action)
            seen.append((*result[:4], {k: list(v) if isinstance(v, tuple) else v for k, v in result[4].items()}))
            if result[2] or result[3]:
                break
        fit = True
    finally:
        (pool.give if fit else pool.drop)(handle)
    return seen


async def play_all(pool, plans, **more):
    try:
        found = await asyncio.gather(
            *(play(pool, plan, pauses=random.Random(i), **more) for i, plan in enumerate(plans))
        )
        if isinstance(pool, GraphPool):
            await pool.settled()
            balanced(pool)
    finally:
        await pool.close()
    return found


def balanced(pool):
    counts = pool.counts
    answered = counts.hits + counts.coalesced + counts.executed + counts.bypassed + counts.failed
    assert counts.requested == answered
    done = sum(machine.Machine.done.values())
    assert done == counts.executed + counts.bypassed + counts.replayed + counts.verified


def edges(pool):
    return sum(len(space.edges) + (space.row.root is not None) for space in pool.graph._spaces.values())


@pytest.mark.parametrize("kind", MORE)
@pytest.mark.parametrize("live", [0, 1, 3])
@QUICK
@given(plans=PLANS)
def test_graph_on_and_off_give_the_same_episodes(kind, live, plans):
    """I1, I2, I5: whatever the environment can do, however many of it there are, whoever comes first."""
    machine.Machine.done.clear()

    async def both():
        without = await play_all(ThreadStatePool(kind, deadline_s=20), plans)
        machine.Machine.done.clear()
        pool = graph_pool(kind, live=live, verify_share=1.0)
        assert await play_all(pool, plans) == without
        counts = pool.counts
        assert counts.mismatches == 0 and counts.failed == 0 and not pool.graph.notes
        if kind in KINDS:
            assert counts.executed == edges(pool) and counts.bypassed == 0
        assert counts.live == 0 and counts.live_most <= (live or len(plans))
        return counts

    asyncio.run(both())


async def test_paths_that_meet_in_one_state_are_one_node_by_digest_and_two_by_history():
    meet = [[[("look", {})], [("move", {"by": 1})], [("look", {})]], [[("move", {"by": 1})], [("look", {})]]]
    by_digest, by_history = graph_pool(machine.Digesting), graph_pool(machine.Machine)
    await play_all(by_digest, meet)
    machine.Machine.done.clear()
    await play_all(by_history, meet)
    assert by_digest.counts.executed < by_history.counts.executed
    assert by_history.counts.executed == 1 + 4 + 3


@pytest.mark.parametrize("digest", [None, 7, ["a"], b"bytes", "x" * 10_000_000, "\udcff"])
async def test_a_digest_of_another_kind_is_none_and_a_long_one_is_one(digest):
    class Here(machine.Digesting):
        def state_digest(self):
            return digest if not isinstance(digest, str) else digest + super().state_digest()

    plans = [[[("move", {"by": 1})], [("look", {})]], [[("look", {})], [("move", {"by": 1})], [("look", {})]]]
    pool = graph_pool(Here, verify_share=1.0)
    found = await play_all(pool, plans)
    by_digest = [space.row.by_digest for space in pool.graph._spaces.values()]
    assert by_digest == [isinstance(digest, str)] and not pool.counts.mismatches and not pool.counts.failed
    machine.Machine.done.clear()
    assert found == await play_all(ThreadStatePool(Here, deadline_s=20), plans)


async def test_a_second_epoch_carries_out_nothing():
    graph = OperationGraph()
    plans = [[[("move", {"by": i % 3})], [("look", {})]] for i in range(6)]
    first = await play_all(graph_pool(machine.Machine, graph), plans)
    machine.Machine.done.clear()
    graph.counts = type(graph.counts)()
    assert await play_all(graph_pool(machine.Machine, graph), plans) == first
    assert not machine.Machine.done and graph.counts.hits == graph.counts.requested


async def test_namespaces_share_nothing():
    """I8: another task, seed, option or environment is another namespace."""
    graph = OperationGraph()
    plan = [[("move", {"by": 1})]]
    for kind, task, seed in (
        (machine.Machine, machine.task("a"), 1),
        (machine.Machine, machine.task("b"), 1),
        (machine.Machine, machine.task("a"), 2),
        (machine.Machine, machine.task("a", "another id"), 1),
        (machine.Digesting, machine.task("a"), 1),
    ):
        before = graph.counts.executed
        await play_all(graph_pool(kind, graph), [plan], task=task, seed=seed)
        machine.Machine.done.clear()
        machine.Machine.done["done"] = graph.counts.executed + graph.counts.replayed
        assert graph.counts.executed == before + 3
    assert len({space.name for space in graph._spaces.values()}) == 5


@pytest.mark.parametrize("kind", [machine.Machine, machine.Keeping])
async def test_what_no_state_decides_is_carried_out_for_each(kind):
    """Clock and unknown effects are bypassed, chance too where no digest covers the generator."""

    class Here(kind):
        toolset = machine.RISKY

    pool = graph_pool(Here)
    seen = await play_all(pool, [[[("now", {})], [("move", {"by": 1})]]] * 5)
    assert sorted(episode[1][0].messages[0]["content"] for episode in seen) == list("12345")
    assert pool.counts.bypassed == 15 and pool.counts.executed == 1 and pool.counts.mismatches == 0


async def test_chance_is_shared_only_where_the_digest_covers_the_generator():
    plans = [[[("roll", {})], [("roll", {})]]] * 4
    by_digest, by_history = graph_pool(machine.RiskyDigesting), graph_pool(machine.Risky)
    with_digest = await play_all(by_digest, plans)
    machine.Machine.done.clear()
    without = await play_all(by_history, plans)
    assert with_digest == without  # the generator is seeded alike
    assert by_digest.counts.executed == 3 and by_history.counts.executed == 1


class Slow(machine.Machine):
    delay = 0.05


async def test_identical_operations_in_flight_run_once():
    class Here(Slow):
        delay = 0.5

    pool = graph_pool(Here)
    await play_all(pool, [[[("move", {"by": 1})]]] * 8)
    assert machine.Machine.done == {"reset": 1, "step": 2} and pool.counts.coalesced == 3 * 7


class Breaks(machine.Machine):
    """`fault` says what happens at the n-th step of all."""

    plan: ClassVar = {}

    def fault(self, action):
        what = self.plan.get(self.done["step"])
        if what is not None:
            raise what


@pytest.mark.parametrize(("error", "raised"), [(EnvFailure("gone", "x"), EnvFailure), (KeyError("bug"), EnvRaised)])
async def test_a_follower_takes_over_when_the_leader_fails(error, raised):
    """I3: the failure is the leader's alone, and is not kept."""

    class Here(Breaks):
        plan: ClassVar = {1: error}
        delay = 0.02

    pool = graph_pool(Here)
    found = await asyncio.gather(*(play(pool, [[("move", {"by": 1})]]) for _ in range(5)), return_exceptions=True)
    failed = [one for one in found if isinstance(one, Exception)]
    assert len(failed) == 1 and isinstance(failed[0], raised)
    assert pool.counts.failed == 1 and machine.Machine.done["step"] == 3
    balanced_with_failures(pool, 1)
    await pool.close()


async def test_where_everybody_fails_everybody_is_told_within_three_rounds():
    class Here(Breaks):
        plan: ClassVar = dict.fromkeys(range(100), EnvFailure("gone", "x"))
        delay = 0.02

    pool = graph_pool(Here)
    began = asyncio.get_running_loop().time()
    found = await asyncio.gather(*(play(pool, [[("move", {"by": 1})]]) for _ in range(12)), return_exceptions=True)
    assert all(isinstance(one, EnvFailure) and one.kind == "gone" for one in found)
    assert machine.Machine.done["step"] == 12 and pool.counts.failed == 12 and pool.counts.live == 0
    assert asyncio.get_running_loop().time() - began < 5
    await pool.close()


def balanced_with_failures(pool, failures):
    counts = pool.counts
    assert counts.requested == counts.hits + counts.coalesced + counts.executed + counts.bypassed + counts.failed
    done = sum(machine.Machine.done.values())
    assert done == counts.executed + counts.bypassed + counts.replayed + counts.verified + failures


async def test_a_step_past_its_deadline_is_a_timeout_and_is_not_kept():
    class Here(machine.Machine):
        hangs: ClassVar = [True]

        def fault(self, action):
            if self.hangs and action.tool_calls:
                self.hangs.pop()
                release.wait(60)

    release = threading.Event()
    pool = graph_pool(Here, deadline_s=2.0)
    with pytest.raises(TimeoutError):
        await play(pool, [[("move", {"by": 1})]])
    release.set()
    assert edges(pool) == 1
    assert await play(pool, [[("move", {"by": 1})]])
    await pool.close()


@pytest.mark.parametrize("who", ["leader", "follower", "all"])
async def test_whoever_is_cancelled_the_others_get_their_answer(who):
    class Here(Slow):
        delay = 0.1

    pool = graph_pool(Here)
    await play(pool, [])  # the start is known
    tasks = [asyncio.create_task(play(pool, [[("move", {"by": 1})]])) for _ in range(4)]
    await asyncio.sleep(0.03)
    chosen = {"leader": tasks[:1], "follower": tasks[-1:], "all": tasks}[who]
    for task in chosen:
        task.cancel()
    found = await asyncio.gather(*tasks, return_exceptions=True)
    assert [isinstance(one, asyncio.CancelledError) for one in found] == [task in chosen for task in tasks]
    if who != "all":
        assert machine.Machine.done["step"] == 1 + 2  # one move, one end of it; before that, one end at the start
    again = await play(pool, [[("move", {"by": 1})]])
    assert again[1][0].messages[0]["tool_call_id"] == "0.0"
    counts = pool.counts
    assert counts.live <= 1 and not len(pool._once)
    await pool.close()
    assert counts.live == 0


async def test_a_place_that_no_environment_took_is_the_next_ones():
    class Here(machine.Machine):
        made: ClassVar = []

        def __init__(self):
            import time

            time.sleep(0.05)
            self.made.append(self)
            if len(self.made) == 1:
                raise EnvFailure("no_room", "x")
            super().__init__()

    pool = graph_pool(Here, live=1)
    episodes = (play(pool, [[("look", {})]], task=machine.task(world)) for world in "ab")
    async with asyncio.timeout(30):
        failed, played = await asyncio.gather(*episodes, return_exceptions=True)
    assert isinstance(failed, EnvFailure) and failed.kind == "no_room" and len(played) == 3
    await pool.close()


@pytest.mark.parametrize("kind", [machine.Risky, machine.Machine])
async def test_who_waits_for_an_environment_waits_no_longer_than_its_patience(kind):
    """Promise 9: the only environment is an episode's own, to that episode's end."""

    class Here(kind):
        toolset = machine.RISKY

    pool = graph_pool(Here, live=1, patience_s=0.2)
    handle = await pool.take("t")
    await pool.reset(handle, 7, {"task": machine.task()})
    await pool.step(handle, act(("now", {})))
    async with asyncio.timeout(30):
        for task, plan in ((machine.task("other"), []), (machine.task(), [[("look", {})]])):
            with pytest.raises(TimeoutError, match=r"0\.2 s"):
                await play(pool, plan, task=task)
    assert not len(pool._once) and pool.counts.failed == 2 and pool.counts.live == 1
    assert (await pool.step(handle, act(("now", {}))))[0].messages[0]["content"] == "2"
    pool.give(handle)
    assert await play(pool, [[("look", {})]])
    await pool.close()


async def test_who_waits_for_an_environment_is_told_when_they_are_closed():
    pool = graph_pool(machine.Risky, live=1)
    handle = await pool.take("t")
    await pool.reset(handle, 7, {"task": machine.task()})
    await pool.step(handle, act(("now", {})))
    # one starts a task, one goes on in it, one starts what cannot be shared
    waiting = [play(pool, [], task=machine.task("other")), play(pool, [[("look", {})]])]
    other = await pool.take("t")
    waiting.append(pool.reset(other, 7, {"task": machine.task(), "object": object()}))
    tasks = [asyncio.create_task(one) for one in waiting]
    await asyncio.sleep(0.05)
    await pool.close()
    async with asyncio.timeout(30):
        found = await asyncio.gather(*tasks, return_exceptions=True)
    assert [getattr(one, "kind", one) for one in found] == ["pool_closed"] * 3
    pool.give(handle)
    pool.drop(other)
    assert pool.counts.live == 0


async def test_checks_that_do_not_end_hold_up_no_close_and_are_said(monkeypatch):
    class Here(machine.Machine):
        slow: ClassVar = []

        def fault(self, action):
            if self.slow:
                import time

                time.sleep(0.5)

    monkeypatch.setattr("espalier.rollouts.graph.pool.CLOSE_SECONDS", 0.05)
    pool = graph_pool(Here, verify_share=1.0)
    await play(pool, [[("look", {})]])
    Here.slow.append(True)
    await pool.close()
    assert pool.graph.told() == ["1 episodes had not been checked when the environments were closed"]
    assert pool.counts.live == 0 and pool.counts.verified < 3


async def test_many_episodes_with_failures_and_cancellations_leave_nothing_behind():
    class Here(machine.Bound):
        def fault(self, action):
            if machine.hash_of(self.done["step"], "fault") % 11 == 0:
                raise EnvFailure("gone", "x")

    pool = graph_pool(Here, live=3)
    rng = random.Random(3)
    plans = [[[("move", {"by": rng.randrange(3)})] for _ in range(rng.randrange(6))] for _ in range(40)]
    tasks = [asyncio.create_task(play(pool, plan, pauses=random.Random(i))) for i, plan in enumerate(plans)]
    for task in tasks[::7]:
        asyncio.get_running_loop().call_later(rng.random() * 0.02, task.cancel)
    found = await asyncio.gather(*tasks, return_exceptions=True)
    kinds = Counter(type(one).__name__ for one in found)
    assert kinds["list"] > 10 and set(kinds) <= {"list", "EnvFailure", "CancelledError"}
    assert not len(pool._once) and pool._walkers == 0
    assert all(space.active == 0 for space in pool.graph._spaces.values())
    await pool.close()
    assert pool.counts.live == 0 and not pool.lives._kept and pool.lives.kept_bytes == 0


async def test_branches_do_not_pile_up_from_task_to_task():
    """Nothing else would end them: as many are left as there may be at once, and as many idle."""
    alive = Counter()

    class Here(machine.Bound):
        def __init__(self):
            super().__init__()
            alive["now"] += 1

        def close(self):
            alive["now"] -= 1

    pool = graph_pool(Here, live=4)
    for number in range(12):
        plans = [
            [[("move", {"by": by})], [("move", {"by": by})], [("move", {"by": i})]] for i in (1, 2) for by in (1, 2, 3)
        ]
        await asyncio.gather(*(play(pool, plan, task=machine.task(str(number))) for plan in plans))
    await pool.settled()
    while pool.pool._ending:
        await asyncio.sleep(0)
    assert pool.counts.restored > 6
    assert alive["now"] <= 2 * 4
    await pool.close()
    assert alive["now"] == 0


async def test_an_environment_that_lies_about_its_state_is_caught():
    """Negative control of the digest: `look` shows what the digest leaves out."""
    plans = [[[("move", {"by": by})], [("look", {})]] for by in (1, 1, 2)] + [
        [[("move", {"by": 1})], [("move", {"by": 1})], [("move", {"by": 1})], [("look", {})]] for _ in range(3)
    ]
    graph = OperationGraph()
    for _ in range(3):
        pool = graph_pool(machine.Liar, graph, verify_share=1.0)
        await asyncio.gather(*(play(pool, plan) for plan in plans), return_exceptions=True)
        await pool.settled()
        await pool.close()
    assert graph.counts.mismatches >= 1 and any("it is no longer shared" in note for note in graph.notes)
    (space,) = graph._spaces.values()
    assert "look" in space.row.demoted and not space.row.by_digest
    truth = await play_all(ThreadStatePool(machine.Liar, deadline_s=5), plans)
    machine.Machine.done.clear()
    graph.counts = type(graph.counts)()
    assert await play_all(graph_pool(machine.Liar, graph), plans) == truth


async def test_a_tool_that_is_no_function_of_the_state_is_caught_and_bypassed_from_then_on():
    graph = OperationGraph()
    plan = [[("move", {"by": 1})], [("look", {})]]
    pool = graph_pool(machine.Fickle, graph, verify_share=1.0)
    await play(pool, plan)
    await pool.settled()
    assert graph.counts.mismatches == 1
    (space,) = graph._spaces.values()
    assert space.row.demoted == ("look",) and not space.edges
    seen = [await play(pool, plan) for _ in range(3)]
    await pool.settled()
    assert len({episode[2][0].messages[0]["content"] for episode in seen}) == 3  # each its own
    assert graph.counts.mismatches == 1
    await pool.close()


async def test_without_verification_such_a_tool_is_met_where_its_answer_must_come_again():
    """An episode whose state cannot be come to again is a failure of ours with a name, never a wrong trajectory."""
    pool = graph_pool(machine.Fickle)
    await play(pool, [[("look", {})], [("move", {"by": 1})]])
    await play(pool, [[("look", {})], [("move", {"by": 2})]], task=machine.task("other"))
    for live in list(pool.lives._parked):
        pool.lives.drop(live)
    with pytest.raises(EnvFailure) as failure:
        await play(pool, [[("look", {})], [("move", {"by": 2})]])
    assert failure.value.kind == NOT_REPRODUCIBLE and pool.counts.mismatches == 1
    assert await play(pool, [[("look", {})], [("move", {"by": 2})]])
    await pool.close()


async def test_a_state_behind_an_answer_that_does_not_come_again_is_not_kept(monkeypatch):
    class Here(machine.Keeping):
        delay = 0.005

        def hidden(self):
            self.calls["look"] += 1
            return f" ({self.calls['look']})"

    monkeypatch.setattr("espalier.rollouts.graph.live.LiveEnvs.worth", lambda *_: True)
    pool = graph_pool(Here)
    await play(pool, [[("look", {})], [("move", {"by": 1})]])
    assert pool.lives._kept
    for live in list(pool.lives._parked):
        pool.lives.drop(live)
    (space,) = pool.graph._spaces.values()
    pool.lives.forget_all(space.name)
    assert not pool.pool._states._kept
    with pytest.raises(EnvFailure, match=NOT_REPRODUCIBLE):
        await play(pool, [[("look", {})], [("move", {"by": 2})]])
    assert not pool.lives._kept and not pool.pool._states._kept and pool.counts.live == 0
    await pool.close()


async def test_a_start_that_is_another_every_time_is_shared_by_nobody():
    class Here(machine.Machine):
        def reset(self, **arguments):
            super().reset(**arguments)
            from espalier.envs.core import Observation

            return Observation(({"role": "user", "content": str(self.done["reset"])},)), {}

    pool = graph_pool(Here, verify_share=1.0)
    await play(pool, [[("look", {})]])
    await pool.settled()
    assert pool.counts.mismatches == 1
    openings = {(await play(pool, []))[0][0].messages[0]["content"] for _ in range(3)}
    assert len(openings) == 3
    await pool.close()


async def test_a_start_that_is_distrusted_while_others_begin_it_lets_them_begin():
    class Here(machine.Machine):
        delay = 0.0

        def reset(self, **arguments):
            import time

            time.sleep(0.05)
            return super().reset(**arguments)

    pool = graph_pool(Here)
    tasks = [asyncio.create_task(play(pool, [[("look", {})]])) for _ in range(3)]
    await asyncio.sleep(0.02)
    (space,) = pool.graph._spaces.values()
    pool.graph.distrust(space, ("look",), "another answer")
    async with asyncio.timeout(30):
        found = await asyncio.gather(*tasks)
    assert found[0] == found[1] == found[2] and pool.counts.bypassed == 6 and machine.Machine.done["reset"] < 9
    await pool.close()


async def test_a_start_that_cannot_be_written_down_is_made_for_each():
    class Here(machine.Machine):
        def reset(self, **arguments):
            from espalier.envs.core import Observation

            _, info = super().reset(**arguments)
            return Observation(({"role": "user", "content": b"bytes"},)), info

    pool = graph_pool(Here)
    found = await asyncio.gather(*(play(pool, [[("look", {})]]) for _ in range(3)))
    assert all(one[0][0].messages[0]["content"] == b"bytes" for one in found)
    assert pool.counts.bypassed == 9 and not pool.counts.failed
    await pool.close()
    assert pool.counts.live == 0


async def test_no_verdict_and_met_limits_are_not_kept():
    class Here(machine.Machine):
        def step(self, action):
            observation, reward, over, cut, info = super().step(action)
            if over:
                return observation, float("nan"), over, cut, {**info, "ungraded": "engines disagree"}
            return observation, reward, over, cut, {**info, "unrepeatable": "time"}

    pool = graph_pool(Here)
    found = await asyncio.gather(*(play(pool, [[("look", {})]]) for _ in range(4)))
    assert all(episode[2][4]["ungraded"] for episode in found)
    assert edges(pool) == 1 and pool.counts.bypassed == 8
    await pool.close()


async def test_episodes_on_hits_hold_no_environment():
    pool = graph_pool(machine.Keeping, live=4)
    plans = [[[("move", {"by": i % 4})] for i in range(n % 5)] for n in range(16)]
    await asyncio.gather(*(play(pool, plan) for plan in plans))
    assert pool.counts.live_most <= 4
    handle = await pool.take("task-w")
    await pool.reset(handle, 7, {"task": machine.task()})
    await pool.step(handle, act(("move", {"by": 0})))
    assert handle.live is None
    pool.give(handle)
    await pool.close()


@pytest.mark.parametrize("travels", [True, False])
@pytest.mark.parametrize("lost", [1, 2])
async def test_where_a_kept_state_is_gone_the_next_nearest_is_gone_on_from(monkeypatch, travels, lost):
    """An environment may let states go by itself."""
    monkeypatch.setattr("espalier.rollouts.graph.live.LiveEnvs.worth", lambda *_: True)

    class Here(machine.ByHistory):
        delay = 0.01
        snapshots_travel = travels

    moves = [[("move", {"by": by})] for by in (1, 2, 3)]
    pool = graph_pool(Here, live=3)
    await play(pool, moves)
    for live in [one for one in pool.lives._parked if not one.anchor]:
        if len(pool.lives._parked) > 1:
            pool.lives.drop(live)
        else:  # somewhere else, and of the family
            live.node = b"elsewhere"
    (space,) = pool.graph._spaces.values()
    node, path = space.row.root, []
    while following := [edge for edge in space.edges.values() if edge.node == node and not edge.ended]:
        node = following[0].next
        path.append(node)
    assert len(path) == 3
    for gone in path[-lost:]:
        del pool.pool._states._kept[pool.lives.kept(space, gone).kept.number]
    before = pool.counts.replayed
    found = await play(pool, [*moves, [("look", {})]])
    assert pool.counts.replayed == before + lost
    assert found == await play(ThreadStatePool(Here, deadline_s=5), [*moves, [("look", {})]])
    await pool.close()
    assert pool.counts.live == 0


async def test_kept_states_stay_within_their_bytes_and_the_cheapest_go_first():
    pool = graph_pool(machine.Keeping, kept_bytes=1000, live=2)
    plans = [[[("move", {"by": n})], [("move", {"by": n + 1})], [("look", {})]] for n in range(20)]
    found = await asyncio.gather(*(play(pool, plan) for plan in plans))
    assert 0 < pool.lives.kept_bytes <= 1000 and len(pool.lives._kept) <= 10
    assert sum(state.kept.size for state in pool.lives._kept.values()) == pool.lives.kept_bytes
    assert len(pool.pool._states._kept) == len(pool.lives._kept)
    assert found == await play_all(ThreadStatePool(machine.Keeping, deadline_s=5), plans)
    await pool.close()


async def test_outcomes_stay_within_their_bytes():
    graph = OperationGraph(most_bytes=20_000)
    pool = graph_pool(machine.Machine, graph)
    plans = [[[("move", {"by": n})], [("look", {})]] for n in range(60)]
    found = await asyncio.gather(*(play(pool, plan) for plan in plans))
    assert graph.held_bytes <= 20_000 and any("memory_mb" in note for note in graph.notes)
    assert found == await play_all(ThreadStatePool(machine.Machine, deadline_s=5), plans)
    await pool.close()


async def test_many_tasks_stay_within_their_bytes_and_what_was_distrusted_in_them_is_remembered():
    """Without a file: what leaves memory is done again, and trusted no more than before."""
    graph = OperationGraph(most_bytes=60_000)
    pool = graph_pool(machine.Machine, graph)
    await play(pool, [[("look", {})]], task=machine.task("first"))
    (space,) = graph._spaces.values()
    graph.distrust(space, ("look",), "another answer")
    for number in range(60):
        await play(pool, [], task=machine.task(f"w{number}"))
        assert graph.held_bytes <= 60_000 and len(graph._spaces) < 20
    before = graph.counts.bypassed
    await play(pool, [[("look", {})]], task=machine.task("first"))
    assert graph.counts.bypassed == before + 2
    await pool.close()


async def test_a_start_that_memory_cannot_hold_is_made_for_each():
    class Here(machine.Machine):
        delay = 0.01

        def reset(self, **arguments):
            observation, info = super().reset(**arguments)
            return observation, {**info, "much": "x" * 9000}

    graph = OperationGraph(most_bytes=8000)
    pool = graph_pool(Here, graph)
    async with asyncio.timeout(30):
        found = [await play(pool, [[("look", {})]]) for _ in range(3)]
        found += await asyncio.gather(*(play(pool, [[("look", {})]]) for _ in range(3)))
    assert found == await play_all(ThreadStatePool(Here, deadline_s=5), [[[("look", {})]]] * 6)
    assert machine.Machine.done["reset"] >= 4 and graph.held_bytes <= 8000
    await pool.close()


@pytest.mark.parametrize("together", [True, False])
async def test_what_a_caller_does_to_its_answers_nobody_else_sees(together):
    class Here(machine.Machine):
        delay = 0.02

    pool = graph_pool(Here)

    async def episode(spoil):
        handle = await pool.take("t")
        opening = await pool.reset(handle, 7, {"task": machine.task()})
        result = await pool.step(handle, act(("look", {})))
        seen = repr((opening, result))
        if spoil:
            for part in (opening[0].messages[0], opening[1], result[0].messages[0], result[4], *opening[2]):
                part.clear()
            opening[2].clear()
        await asyncio.sleep(0.01)
        pool.give(handle)
        return seen

    if together:
        found = await asyncio.gather(*(episode(n % 2 == 0) for n in range(6)))
    else:
        found = [await episode(True) for _ in range(3)]
    assert len(set(found)) == 1 and "begin at" in found[0]
    await pool.close()


async def test_a_failing_environment_fails_the_same_episodes_in_the_same_way(plain):
    """Failure paths: the runner cannot tell a graph by the kinds of its failures."""

    def script(request, turn):
        lines = [adding.call("add", n=3), adding.call("add", n=4), "done"]
        return say(plain.encode, lines[turn])

    async def run(fault, deadline, graph):
        sampler = ScriptedSampler(script, stop=plain.stop_ids[0])
        pool = ThreadStatePool(lambda: adding.Adder(fault), deadline_s=deadline, max_stuck=40)
        if graph:
            pool = GraphPool(pool, OperationGraph(), env_id="toy", identity="x", verify_share=0.0)
        runner = RolloutRunner(
            sampler=sampler, renderer=plain, pool=pool, episode=adding.budget(), run="r", seed=1, concurrency=4
        )
        await sampler.publish(PolicyVersion(0, "d", Path("base"), "b"))
        (group,) = await runner.run_groups([GroupSpec("g", adding.task(7), 3)], SamplingParams(), 0)
        await runner.close()
        assert runner.counts.started == runner.counts.trajectories + sum(runner.counts.failures.values())
        return [(f.kind, f.message, f.retryable) for f in group.failures], [t.sequences for t in group.trajectories]

    for fault, kind in (
        (adding.crash, FailureKind.ENV),
        (adding.bug, FailureKind.ENV),
        (adding.ungraded, FailureKind.UNGRADED),
        (adding.hang(3.0), FailureKind.ENV_TIMEOUT),
        (None, None),
    ):
        deadline = 1.0 if kind is FailureKind.ENV_TIMEOUT else 20.0
        without, with_graph = await run(fault, deadline, False), await run(fault, deadline, True)
        assert with_graph == without
        assert [found for found, *_ in without[0]] == ([kind] * 3 if kind else [])
