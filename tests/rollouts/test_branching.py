"""Groups that grow as trees. Promises 2, 3 and 5: tokens of a shared prefix are trained once, every episode ends once,
environment work of a prefix is never done again, and sampled actions never are one.
"""

import asyncio
import threading
import time
from pathlib import Path

import adding
import growing
import machine
import pytest
from espalier.configs.schema import BranchingSection
from espalier.envs.core import EnvFailure
from espalier.rollouts.branching import Point, below, choose, forecast, left_now, spent, spread, surprisal
from espalier.rollouts.envpool import ThreadEnvPool
from espalier.rollouts.episode import episode_key
from espalier.rollouts.graph.statepool import ThreadStatePool
from espalier.rollouts.growth import trees_at_once
from espalier.rollouts.samplers.scripted import Fail, Hang, say
from espalier.rollouts.snapshots import BranchPool, SnapshotPool
from espalier.rollouts.store import TrajectoryStore
from espalier.rollouts.types import FailureKind, PolicyVersion
from growing import Grown, Keyed, played_alone, pool_of, steps_done, timeless
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

KINDS = (machine.Keeping, machine.Bound, machine.ByHistory)
QUICK = settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
ATS = st.sampled_from(["random", "entropy", "value"])


@pytest.fixture(autouse=True)
def _fresh():
    machine.Machine.done.clear()
    machine.Machine.calls.clear()


def branches(group):
    return [t for t in group.trajectories if t.parent is not None]


def trained_tokens(trajectory):
    return sum(sum(s.trained_mask()) for s in trajectory.sequences)


@QUICK
@given(st.sampled_from(KINDS), st.booleans(), ATS, st.integers(1, 3), st.integers(1, 5), st.integers(1, 3), st.data())
async def test_a_tree_is_what_its_parents_saw_and_costs_only_what_is_new(
    plain, kind, graph, at, roots, more, rounds, data
):
    """Whatever grows: tokens and log-probabilities as they were sampled, each trained once; the answers of the
    environment those of one that did everything itself; of which no step was done twice.
    """
    machine.Machine.done.clear()
    rounds = min(rounds, more)
    async with Grown(plain, pool_of(kind, graph), roots=roots, at=at, rounds=rounds) as s:
        groups = await s.groups(roots + more, data.draw(st.integers(1, 2)))
        done = steps_done()
    sampled = {key: sample for (_, key), sample in s.sampler.made.items()}
    assert len(sampled) == len(s.sampler.made) == len(s.sampler.requests), "every draw has a key of its own"
    for n, group in enumerate(groups):
        found = {t.id: t for t in group.trajectories}
        assert list(found) == [f"g{n}/{i}" for i in range(roots + more)]
        for t in group.trajectories:
            answers, reward = played_alone(kind, t, machine.task(f"w{n}"))
            assert [turn.results for turn in t.turns] == answers and t.reward == pytest.approx(reward)
            own = range(t.left_at, len(t.turns))
            mine = [sampled[episode_key("run", t.id, turn)] for turn in own]
            assert t.sampled_tokens == trained_tokens(t) == sum(len(sample.tokens) for sample in mine)
            if t.parent is None:
                continue
            parent, left = found[t.parent], t.left_at
            assert parent.left_at < left < len(parent.turns)
            there = parent.turns[left]
            start = parent.sequences[there.sequence].spans[there.span].start
            assert t.sequences[0].tokens[:start] == parent.sequences[0].tokens[:start]
            assert t.sequences[0].logprobs[: t.inherited_tokens] == parent.sequences[0].logprobs[: t.inherited_tokens]
    everything = [t for group in groups for t in group.trajectories]
    assert sum(map(trained_tokens, everything)) == sum(len(sample.tokens) for sample in sampled.values())
    own_turns = sum(t.own_turns for t in everything)
    if graph:
        counts = s.pool.counts
        assert counts.replayed == counts.bypassed == 0 and done == counts.executed - len(groups) <= own_turns
        assert counts.requested == own_turns + len([t for t in everything if t.parent is None])
    else:
        assert done == own_turns


async def grown(plain, pool, size=6, count=3, **section):
    async with Grown(plain, pool, **{"roots": 2, **section}) as s:
        return await s.groups(size, count), s


async def test_branches_leave_at_chosen_turns_and_most_groups_have_some(plain):
    groups, s = await grown(plain, pool_of(machine.Keeping, True), count=6)
    assert sum(map(len, map(branches, groups))) > 12
    requests = {r.session: r for r in reversed(s.sampler.requests)}
    for group in groups:
        for t in branches(group):
            first = requests[t.id]
            assert first.key == episode_key("run", t.id, t.left_at), "another episode draws by another key"
            assert first.prompt == t.sequences[0].tokens[: len(first.prompt)]


@pytest.mark.parametrize("graph", [True, False])
async def test_control_a_state_that_is_not_kept_is_come_to_again(plain, graph):
    """The count of steps sees it when a prefix is carried out again."""
    if graph:
        groups, s = await grown(plain, pool_of(machine.Keeping, True, kept_bytes=1), count=6)
        assert s.pool.counts.replayed > 0
    else:

        class Again(SnapshotPool):
            """Branches by doing everything again."""

            async def step(self, handle, action):
                handle.kept = [*handle.kept, action]
                return await self._pool.step(handle.inner, action)

            def mark(self, handle):
                return list(handle.kept)

            async def branch(self, handle, mark):
                made = await self.take("task")
                world = handle.inner.world
                await self.reset(made, 0, {"task": machine.task(world)})
                for action in mark:
                    await self.step(made, action)
                return made

            def _forget(self, handle):
                handle.kept = []

        groups, s = await grown(plain, Again(pool_of(machine.Keeping, False)._pool), count=6)
        assert steps_done() > sum(t.own_turns for group in groups for t in group.trajectories)
    assert all(len(group.trajectories) == 6 for group in groups)


@pytest.mark.parametrize("graph", [True, False])
async def test_a_tree_does_not_depend_on_what_ends_first(plain, graph):
    alone, _ = await grown(plain, pool_of(machine.Keeping, graph), concurrency=1, at="value", rounds=3)
    together, _ = await grown(plain, pool_of(machine.Keeping, graph), concurrency=16, at="value", rounds=3)
    assert timeless(alone) == timeless(together)
    other, _ = await grown(plain, pool_of(machine.Keeping, not graph), at="value", rounds=3)
    assert timeless(other) == timeless(alone), "nor on the graph"


@pytest.mark.parametrize(
    "pool", [lambda: pool_of(machine.Machine, True), lambda: pool_of(machine.Machine, False),
             lambda: ThreadEnvPool(machine.Keeping, deadline_s=20)]
)  # fmt: skip
async def test_what_cannot_be_branched_runs_chains(plain, pool):
    trees, _ = await grown(plain, pool())
    async with Grown(plain, ThreadEnvPool(machine.Keeping, deadline_s=20)) as s:
        chains = await s.groups(6, 3)
    assert timeless(trees) == timeless(chains) and not any(map(branches, trees))


async def test_an_evaluation_grows_no_trees(plain):
    async with Grown(plain, pool_of(machine.Keeping, True), roots=1) as s:
        groups = await s.groups(4, 2, evaluation=True)
    assert not any(map(branches, groups)) and all(len(g.trajectories) == 4 for g in groups)


class Broken(Keyed):
    """Fails for good in the sessions and turns that it is told."""

    def __init__(self, renderer, failing):
        super().__init__(renderer, ending=0.0)
        inner = self._script
        self._script = lambda request, turn: Fail("broken") if failing(request, turn) else inner(request, turn)


async def test_a_failed_parent_costs_no_branch(plain):
    """One root fails: the others are left instead. All fail: the rest begin at the start."""
    pool = pool_of(machine.Keeping, True)
    sampler = Broken(plain, lambda request, turn: request.session.endswith("/0") and turn == 2)
    async with Grown(plain, pool, roots=2, sampler=sampler) as s:
        (group,) = await s.groups(6)
    assert [f.id for f in group.failures] == ["g0/0"] and group.failures[0].kind is FailureKind.SAMPLER
    assert {t.parent for t in group.trajectories} == {None, "g0/1"} and len(branches(group)) == 4

    sampler = Broken(plain, lambda request, turn: request.session[-1] in "01" and turn == 1)
    async with Grown(plain, pool_of(machine.Keeping, True), roots=2, sampler=sampler) as s:
        (group,) = await s.groups(6)
    assert [f.id for f in group.failures] == ["g0/0", "g0/1"]
    assert [t.id for t in group.trajectories] == [f"g0/{i}" for i in range(2, 6)] and not branches(group)


async def test_a_branch_that_cannot_begin_is_a_typed_failure(plain):
    class Gone(SnapshotPool):
        async def branch(self, handle, mark):
            raise EnvFailure("state_gone", "a kept state is not there any more")

    async with Grown(plain, Gone(pool_of(machine.Keeping, False)._pool), roots=2, sampler=Keyed(plain, 0.0)) as s:
        (group,) = await s.groups(5)
    assert len(group.trajectories) == 2 and [f.id for f in group.failures] == ["g0/2", "g0/3", "g0/4"]
    assert {(f.kind, f.retryable) for f in group.failures} == {(FailureKind.ENV, True)}


@pytest.mark.parametrize("graph", [True, False])
async def test_a_branch_that_fails_is_one_failure_and_nothing_is_left_behind(plain, graph):
    sampler = Broken(plain, lambda request, turn: request.session.endswith("/4"))
    pool = pool_of(machine.Bound, graph)
    async with Grown(plain, pool, roots=2, rounds=2, sampler=sampler) as s:
        groups = await s.groups(6, 2)
        for group in groups:
            assert [f.id for f in group.failures] == [f"{group.id}/4"] and len(group.trajectories) == 5
        if graph:
            assert pool._walkers == pool._rooted == 0 and all(
                space.active == 0 for space in pool.graph._spaces.values()
            )
        else:
            assert not pool._pool._states._kept


@pytest.mark.parametrize("graph", [True, False])
@pytest.mark.parametrize("phase", ["/0", "/3"])
async def test_cancelled_in_the_middle_everything_is_given_back(plain, graph, phase):
    """While roots run, and while branches do: episodes end as failures, no group is stored, no state stays kept."""
    reached = asyncio.Event()
    sampler = Keyed(plain, ending=0.0)
    inner = sampler._script

    def hang(request, turn):
        if not request.session.endswith(phase):
            return inner(request, turn)
        reached.set()
        return Hang()

    sampler._script = hang
    pool = pool_of(machine.Bound, graph)
    stored = []
    async with Grown(plain, pool, roots=2, sampler=sampler) as s:
        running = asyncio.create_task(s.groups(5, 2, on_group=stored.append))
        await asyncio.wait_for(reached.wait(), 20)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        counts = s.runner.counts
        assert counts.started == counts.trajectories + sum(counts.failures.values())
        assert counts.failures[FailureKind.CANCELLED] >= 1 and not stored and not sampler.leased
        if graph:
            assert pool._walkers == pool._rooted == 0
        else:
            assert not pool._pool._states._kept, "a step that nobody waits for any more keeps nothing"


async def test_a_tree_keeps_the_version_it_began_with(plain):
    """Published and retired while it grows: all its episodes run on one version, and none fails."""
    sampler = Keyed(plain, ending=0.0)
    first = sampler._script

    async with Grown(plain, pool_of(machine.Keeping, True), roots=2, rounds=2, sampler=sampler, concurrency=2) as s:

        def script(request, turn):
            if 1 not in sampler.versions:
                sampler.versions[1] = PolicyVersion(1, "next", Path("base"), "base", 0)
                sampler._retired.add(0)
            return first(request, turn)

        sampler._script = script
        groups = await s.groups(6, 2, version=lambda: sampler.latest)
    assert not any(group.failures for group in groups)
    assert [{v for t in group.trajectories for v in t.versions} for group in groups] in ([{0}, {0}], [{0}, {1}])


@pytest.mark.parametrize("kind", [machine.Keeping, machine.Bound])
async def test_an_episode_that_has_ended_leaves_its_environment_to_its_branches(plain, kind):
    """The only one: an episode that shares no more has it to its end, and not until its tree is grown."""

    class Risky(kind):
        toolset = machine.RISKY

    turns = (adding.call("move", by=1), adding.call("now"), adding.call("submit"))
    sampler = Keyed(plain)
    sampler._script = lambda request, turn: say(plain.encode, turns[turn])
    pool = pool_of(Risky, True, live=1, patience_s=10.0)
    async with Grown(plain, pool, roots=2, rounds=2, sampler=sampler) as s:
        groups = await s.groups(5, 2)
        assert pool.counts.live <= 1
    assert not any(group.failures for group in groups) and all(len(branches(group)) == 3 for group in groups)


async def held_at_a_mark(pool):
    """An episode's handle after one step, and where it stands."""
    handle = await pool.take("t")
    pool.watch(handle)
    await pool.reset(handle, 7, {"task": machine.task()})
    await pool.step(handle, machine.act(("move", {"by": 1})))
    return handle, pool.mark(handle)


async def test_an_environment_is_branched_by_one_at_a_time():
    """However slow that is, and however many threads there are."""

    class Alone(machine.Keeping):
        at_once, most = 0, 0

        def branch(self, snapshot):
            Alone.at_once += 1
            Alone.most = max(Alone.most, Alone.at_once)
            time.sleep(0.2)
            Alone.at_once -= 1
            return super().branch(snapshot)

    pool = SnapshotPool(ThreadStatePool(Alone, deadline_s=20, workers=3))
    handle, mark = await held_at_a_mark(pool)
    made = await asyncio.gather(*(pool.branch(handle, mark) for _ in range(3)))
    assert Alone.most == 1
    for one in (handle, *made):
        pool.give(one)
    await pool.close()


@pytest.mark.parametrize("how", ["late", "cancelled"])
async def test_an_environment_that_was_left_while_it_was_branched_is_never_used_again(how):
    go_on, begun = threading.Event(), threading.Event()

    class Stuck(machine.Keeping):
        def branch(self, snapshot):
            begun.set()
            go_on.wait(20)
            return super().branch(snapshot)

    pool = SnapshotPool(ThreadStatePool(Stuck, deadline_s=1.0 if how == "late" else 20))
    handle, mark = await held_at_a_mark(pool)
    branching = asyncio.create_task(pool.branch(handle, mark))
    await asyncio.to_thread(begun.wait, 20)
    if how == "cancelled":
        branching.cancel()
    with pytest.raises(TimeoutError if how == "late" else asyncio.CancelledError):
        await branching
    with pytest.raises(EnvFailure, match="failed while it was branched"):
        await pool.branch(handle, mark)
    used = handle.inner
    pool.give(handle)
    go_on.set()
    assert (await pool.take("t")).inner is not used and not pool._pool._states._kept
    await pool.close()


async def test_a_budget_ends_growth_and_cuts_nothing_short(plain):

    async def within(**bounds):
        pool, sampler = pool_of(machine.Keeping, True), Keyed(plain, ending=0.0)
        return (await grown(plain, pool, size=12, count=4, sampler=sampler, **bounds))[0]

    free = await within()
    tight = await within(max_turns=12 + 8)
    for group, whole in zip(timeless(tight), timeless(free), strict=True):
        assert 2 <= len(group.trajectories) < 12 and not group.failures
        assert group.trajectories == whole.trajectories[: len(group.trajectories)], "what is begun is not changed"
        assert spent(group.trajectories).turns <= 12 + 8, "every episode here takes the turns that are forecast"
    few = await within(max_tokens=1)
    assert all(len(group.trajectories) == 2 for group in few), "roots do not ask for the budget's leave"


async def test_trees_are_stored_whole_and_come_back(plain, tmp_path):
    store = TrajectoryStore(tmp_path)
    async with Grown(plain, pool_of(machine.Keeping, True), roots=2, store=store) as s:
        groups = await s.groups(6, 2)
    for group in groups:
        store.append(group)  # again: the same content
        assert store.group(group.id) == group and branches(group)
    store.close()


def test_the_environments_that_are_held_are_bounded():
    assert trees_at_once(64, BranchingSection(roots=4)) == 32 and trees_at_once(3, BranchingSection(roots=2)) == 4
    assert trees_at_once(64, None) == trees_at_once(64, BranchingSection()) == 1


def test_pools_say_whether_they_can_branch():
    assert isinstance(pool_of(machine.Keeping, True), BranchPool) and isinstance(
        pool_of(machine.Keeping, False), BranchPool
    )
    assert not isinstance(ThreadEnvPool(machine.Keeping, deadline_s=1), BranchPool)


# where a tree grows


def given_tree():
    """Root a (4 turns) with a branch c at turn 2 (3 own turns) and its branch d at turn 4; root b (2 turns)."""
    a = growing.trajectory("g/0", 1.0, [0.1, 0.2, 3.0, 0.1])
    b = growing.trajectory("g/1", 0.0, [0.1, 0.9])
    c = growing.trajectory("g/2", 0.0, [0.5, 0.4, 2.0], parent=a, left_at=2)
    d = growing.trajectory("g/3", 1.0, [0.3], parent=c, left_at=4)
    return {t.id: t for t in (a, b, c, d)}


OPEN = {"g/0": [1, 2, 3], "g/1": [1], "g/2": [3, 4]}


def test_at_random_the_tree_with_fewest_leaves_grows_at_any_of_its_turns():
    tree = given_tree()
    first = choose(["g/4", "g/5", "g/6"], tree, OPEN, "random", "run")
    assert [p.parent for p in first[:2]] == ["g/1", "g/1"], "b has one leaf, then two; a has three"
    assert first == choose(["g/4", "g/5", "g/6"], tree, OPEN, "random", "run")
    only = {"g/0": [1, 2, 3], "g/2": [3, 4]}
    seen = {choose([f"g/{i}"], tree, only, "random", "run")[0] for i in range(200)}
    assert seen == {Point("g/0", 1), Point("g/0", 2), Point("g/0", 3), Point("g/2", 3), Point("g/2", 4)}
    others = [choose([f"g/{i}"], tree, only, "random", "other") for i in range(20)]
    assert others != [choose([f"g/{i}"], tree, only, "random", "run") for i in range(20)], "keyed by the run"


def test_by_entropy_the_least_likely_turn_is_left_first_and_others_before_it_is_again():
    tree = {"g/0": given_tree()["g/0"]}
    assert surprisal(tree["g/0"], 2) == pytest.approx(3.0)
    found = choose([f"g/{i}" for i in range(4, 8)], tree, {"g/0": [1, 2, 3]}, "entropy", "run")
    assert [p.turn for p in found] == [2, 1, 3, 2]
    assert choose(["g/9"], given_tree(), {"g/0": [1, 2, 3], "g/2": [3, 4]}, "entropy", "run") == [Point("g/2", 3)], (
        "turn 2 of g/0 and turn 4 of g/2 have been left already"
    )


def test_by_value_the_turn_whose_outcomes_vary_most_is_left():
    tree = given_tree()
    assert spread(tree, Point("g/2", 3)) == pytest.approx(spread(tree, Point("g/2", 4))), "c and d are below both"
    assert spread(tree, Point("g/2", 3)) > spread(tree, Point("g/0", 3)), "below g/0 from there on is only itself"
    flat = {"g/0": growing.trajectory("g/0", 1.0, [0.1] * 3), "g/1": growing.trajectory("g/1", 1.0, [0.1] * 3)}
    assert spread(flat, Point("g/0", 1)) == 0
    seen = choose([f"g/{i}" for i in range(2, 40)], flat, {"g/0": [1, 2], "g/1": [1, 2]}, "value", "run")
    assert len(set(seen)) == 4, "where nothing varies chance decides"
    one = {
        "g/0": growing.trajectory("g/0", 1.0, [0.1] * 3),
        **{f"g/{i}": growing.trajectory(f"g/{i}", 0.0, [0.1] * 3) for i in (1, 2, 3)},
    }
    open_turns = {id: [1, 2] for id in one}
    assert choose(["g/9"], one, open_turns, "value", "run")[0].parent == "g/0", "the one that went otherwise"


@given(st.lists(st.sampled_from([Point(id, turn) for id, turns in OPEN.items() for turn in turns]), max_size=6))
def test_what_was_just_chosen_counts_for_every_turn_that_it_has_in_common(points):
    """As it does when it has ended: through branches of branches too."""
    tree = given_tree()
    grown = dict(tree)
    for i, p in enumerate(points, start=4):
        grown[f"g/{i}"] = growing.trajectory(f"g/{i}", 0.0, [0.1], parent=tree[p.parent], left_at=p.turn)
    for point in (Point(id, turn) for id, turns in OPEN.items() for turn in turns):
        assert len(below(grown, point)) == len(below(tree, point)) + left_now(tree, points, point)


def test_nothing_to_leave_means_to_begin_at_the_start():
    assert choose(["g/0", "g/1"], {}, {}, "value", "run") == [None, None]


@given(st.randoms(use_true_random=False), ATS, st.integers(1, 12))
def test_only_open_turns_are_left(draw, at, count):
    tree, names = {}, []
    for i in range(draw.randint(1, 4)):
        tree[f"g/{i}"] = growing.trajectory(f"g/{i}", draw.random(), [draw.random() for _ in range(draw.randint(1, 5))])
    open_turns = {id: draw.sample(range(1, len(t.turns)), draw.randint(0, len(t.turns) - 1)) for id, t in tree.items()}
    names = [f"g/{9 + i}" for i in range(count)]
    found = choose(names, tree, open_turns, at, "run")
    assert len(found) == count
    assert all((p is None) == (not any(open_turns.values())) for p in found)
    assert all(p.turn in open_turns[p.parent] for p in found if p is not None)


def test_what_is_spent_counts_every_token_and_turn_once():
    tree = given_tree()
    assert spent(tree.values()).turns == 4 + 2 + 3 + 1 and spent(tree.values()).tokens == 2 * 10
    assert forecast(tree["g/0"], 1).turns == 3 and forecast(tree["g/0"], 1).tokens == 6
