"""Many episodes at once. Promise 3: every started episode ends exactly once, whatever breaks; promise 9: in time."""

import asyncio
from collections import Counter
from pathlib import Path

import adding
import pytest
from espalier.configs.schema import EnvSection
from espalier.envs.core import EnvFailure
from espalier.rollouts.envpool import ThreadEnvPool
from espalier.rollouts.episode import episode_key
from espalier.rollouts.runner import GroupSpec, RolloutRunner, env_factory, together
from espalier.rollouts.samplers.base import SamplingParams
from espalier.rollouts.samplers.scripted import Fail, Hang, Say, ScriptedSampler, Wait, say
from espalier.rollouts.store import TrajectoryStore
from espalier.rollouts.types import EndReason, Failure, FailureKind, PolicyVersion
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

T1 = SamplingParams()


class Setting:
    """A runner with what it needs; `async with` publishes version 0 and closes everything."""

    def __init__(self, renderer, script, make_env=adding.Adder, store=None, concurrency=8, workers=1, **budget):
        self.sampler = ScriptedSampler(script, stop=renderer.stop_ids[0])
        section = adding.budget(**budget)
        self.runner = RolloutRunner(
            sampler=self.sampler,
            renderer=renderer,
            pool=ThreadEnvPool(make_env, deadline_s=section.step_seconds, workers=workers),
            episode=section,
            run="run",
            seed=5,
            concurrency=concurrency,
            store=store,
            env_id="toy",
        )

    async def __aenter__(self):
        await self.sampler.publish(PolicyVersion(0, "digest", Path("base"), "base"))
        return self

    async def __aexit__(self, *_):
        await self.runner.close()
        await self.sampler.close()

    def nothing_is_left(self):
        counts = self.runner.counts
        assert counts.started == counts.trajectories + sum(counts.failures.values())
        assert not self.sampler.leased and not self.sampler.sessions

    async def one(self, goal=7, size=1, version=0, **more):
        (group,) = await self.runner.run_groups([GroupSpec("g", adding.task(goal), size)], T1, version, **more)
        self.nothing_is_left()
        return group


def solve(renderer):
    """Adds 3, then 4, then says so."""
    lines = [adding.call("add", n=3), adding.call("add", n=4), "It is 7."]
    return lambda request, turn: say(renderer.encode, lines[turn])


async def test_episodes_are_played_and_graded(plain):
    async with Setting(plain, solve(plain)) as s:
        group = await s.one(size=3)
        assert [t.id for t in group.trajectories] == ["g/0", "g/1", "g/2"] and group.rewards == (1.0,) * 3
        wrong = await s.one(goal=8)
        assert wrong.rewards == (0.0,) and wrong.trajectories[0].info["final"] == 7
        first = group.trajectories[0]
        assert (first.task, first.family, first.env, first.end) == ("reach-7", "adding", "toy", EndReason.DONE)


async def test_requests_carry_their_group_and_the_keys_of_run_episode_and_turn(plain):
    async with Setting(plain, solve(plain)) as s:
        await s.one(size=2)
        keys = {(r.session, r.key) for r in s.sampler.requests}
        assert keys == {(f"g/{i}", episode_key("run", f"g/{i}", turn)) for i in range(2) for turn in range(3)}
        assert {r.group for r in s.sampler.requests} == {"g"}


async def test_a_group_starts_from_one_state(plain):
    seeds = []

    class Seeded(adding.Adder):
        def reset(self, **arguments):
            seeds.append(arguments["seed"])
            return super().reset(**arguments)

    async with Setting(plain, solve(plain), Seeded) as s:
        await s.runner.run_groups([GroupSpec("a", adding.task(7), 3), GroupSpec("b", adding.task(8), 3)], T1, 0)
    assert sorted(Counter(seeds).values()) == [3, 3]


async def test_environments_are_bounded_by_concurrency_and_reused(plain):
    made = []

    def make():
        made.append(adding.Adder())
        return made[-1]

    async with Setting(plain, solve(plain), make, concurrency=3) as s:
        groups = await s.runner.run_groups([GroupSpec(f"g{i}", adding.task(7), 4) for i in range(6)], T1, 0)
        assert [g.id for g in groups] == [f"g{i}" for i in range(6)] and len(made) <= 3
        assert all(len(g.trajectories) == 4 for g in groups)


@pytest.mark.parametrize(
    ("fault", "kind", "said"),
    [
        (adding.crash, FailureKind.ENV, "engine_crashed: the engine is gone"),
        (adding.bug, FailureKind.ENV, "ZeroDivisionError: a bug"),
        (adding.ungraded, FailureKind.UNGRADED, "engines disagree"),
        (adding.hang(30.0), FailureKind.ENV_TIMEOUT, "2 s"),
    ],
)
async def test_what_breaks_in_an_environment_is_a_typed_failure(plain, fault, kind, said):
    met = []

    def make():
        def noted(env, action):
            met.append(env)
            return fault(env, action)

        return adding.Adder(noted)

    async with Setting(plain, solve(plain), make, concurrency=1, step_seconds=2.0) as s:
        group = await s.one(size=2)
        assert (
            not group.trajectories and {f.kind for f in group.failures} == {kind} and said in group.failures[0].message
        )
        assert len(met) == 2, "the fault was met"
        assert len(set(map(id, met))) == (1 if kind is FailureKind.UNGRADED else 2), (
            "a broken environment is not reused"
        )


async def test_a_failing_start_is_a_typed_failure(plain):
    class Broken(adding.Adder):
        def reset(self, **arguments):
            raise EnvFailure("workbook_unreadable", "truncated")

    def impossible():
        raise FileNotFoundError("no engine")

    for make, said in [(Broken, "workbook_unreadable"), (impossible, "FileNotFoundError: no engine")]:
        async with Setting(plain, solve(plain), make) as s:
            (failure,) = (await s.one()).failures
            assert failure.kind is FailureKind.ENV and said in failure.message


@pytest.mark.parametrize(
    ("line", "kind", "retryable"),
    [
        (Fail("out of memory"), FailureKind.SAMPLER, False),
        (Fail("busy", retryable=True), FailureKind.SAMPLER, True),
        (Hang(), FailureKind.SAMPLER_TIMEOUT, True),
        (Hang(deaf=True), FailureKind.SAMPLER_TIMEOUT, True),
        (Wait(5.0, Say((1,))), FailureKind.SAMPLER_TIMEOUT, True),
    ],
)
async def test_what_breaks_in_the_sampler_is_a_typed_failure(plain, line, kind, retryable):
    async with Setting(plain, lambda request, turn: line, turn_seconds=10.0 if isinstance(line, Fail) else 0.1) as s:
        (failure,) = (await s.one()).failures
        assert (failure.kind, failure.retryable) == (kind, retryable) and s.sampler.met


async def test_a_sampler_that_recovers_costs_nothing(plain):
    played = solve(plain)
    script = lambda request, turn: Fail("busy", retryable=True, times=2, then=played(request, turn))  # noqa: E731
    async with Setting(plain, script) as s:
        group = await s.one()
        assert group.rewards == (1.0,) and len(s.sampler.met) == 6 and s.runner.counts.retries == 6


async def test_a_version_that_is_not_served_is_a_typed_failure(plain):
    async with Setting(plain, solve(plain)) as s:
        (failure,) = (await s.one(version=9)).failures
        assert failure.kind is FailureKind.SAMPLER and "version 9" in failure.message


async def test_a_version_stays_while_an_episode_holds_it(plain):
    seen = []

    def script(request, turn):
        seen.append(dict(s.sampler.leased))
        return Wait(0.05, solve(plain)(request, turn))

    async with Setting(plain, script) as s:
        running = asyncio.create_task(s.one())
        while not seen:
            await asyncio.sleep(0.01)
        await s.sampler.retire(0)
        assert (await running).rewards == (1.0,)
        assert seen[-1] == {0: 1} and 0 not in s.sampler.versions
        assert (await s.one()).failures[0].kind is FailureKind.SAMPLER


async def test_running_out_of_an_episodes_time_is_a_truncation_that_is_graded(plain):
    script = lambda request, turn: say(plain.encode, adding.call("add", n=7)) if turn == 0 else Hang()  # noqa: E731
    async with Setting(plain, script, max_seconds=2.0, on_overflow="grade") as s:
        (trajectory,) = (await s.one()).trajectories
        assert (trajectory.end, trajectory.reward) == (EndReason.MAX_SECONDS, 1.0) and s.sampler.met
    async with Setting(plain, script, max_seconds=2.0, on_overflow="drop") as s:
        (failure,) = (await s.one()).failures
        assert failure.kind is FailureKind.OVERFLOW
    async with Setting(plain, script, max_seconds=2.0, on_overflow="drop") as s:
        assert (await s.one(on_overflow="grade")).rewards == (1.0,)


async def test_a_bug_of_ours_is_internal_and_not_blamed_on_anyone(plain):
    async with Setting(plain, solve(plain)) as s:
        s.runner.renderer = object()
        (failure,) = (await s.one()).failures
        assert failure.kind is FailureKind.INTERNAL and "AttributeError" in failure.message


async def test_cancelling_ends_what_runs_and_stores_nothing_unfinished(plain, tmp_path):
    store = TrajectoryStore(tmp_path)
    script = lambda request, turn: solve(plain)(request, turn) if request.session.startswith("a/") else Hang()  # noqa: E731
    async with Setting(plain, script, store=store, concurrency=3) as s:
        specs = [GroupSpec("a", adding.task(7), 1), GroupSpec("b", adding.task(7), 4)]
        running = asyncio.create_task(s.runner.run_groups(specs, T1, 0))
        while len(s.sampler.met) < 3 or not store.group_ids():
            await asyncio.sleep(0.01)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        s.nothing_is_left()
        assert s.runner.counts.failures == {FailureKind.CANCELLED: 3} and s.runner.counts.trajectories == 1
        assert store.group_ids() == ["a"]
    store.close()


async def test_groups_are_stored_before_they_are_announced_and_evaluations_never(plain, tmp_path):
    store = TrajectoryStore(tmp_path)
    announced = []
    async with Setting(plain, solve(plain), store=store) as s:
        specs = [GroupSpec(f"g{i}", adding.task(7), 2) for i in range(3)]
        listener = lambda group: announced.append(store.group(group.id) == group)  # noqa: E731
        groups = await s.runner.run_groups(specs, T1, 0, on_group=listener)
        assert announced == [True] * 3 and {g.id: g for g in store.groups()} == {g.id: g for g in groups}
        await s.runner.run_groups([GroupSpec("held-out", adding.task(7), 2)], T1, 0, evaluation=True)
        assert store.group("held-out") is None
        with pytest.raises(ValueError, match="same id"):
            await s.runner.run_groups([specs[0], specs[0]], T1, 0)
    store.close()


async def test_the_same_run_gives_the_same_trajectories(plain):
    """What `Promise 5` needs of this room: nothing but the sampler's tokens depends on time or on the neighbours."""

    def strip(trajectory):
        return (trajectory.id, trajectory.seed, trajectory.sequences, trajectory.reward, trajectory.info)

    found = []
    for concurrency in (1, 7):
        async with Setting(plain, solve(plain), concurrency=concurrency, workers=concurrency) as s:
            found.append([strip(t) for t in (await s.one(size=7)).trajectories])
    assert found[0] == found[1]


ENV_FAULTS = {"crash": adding.crash, "bug": adding.bug, "hang": adding.hang(30.0), "ungraded": adding.ungraded}
SAMPLER_FAULTS = {"fail": Fail("broken"), "busy": Fail("busy", retryable=True, times=1), "deaf": Hang(deaf=True)}


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.dictionaries(
        st.tuples(st.integers(0, 2), st.integers(0, 2), st.integers(0, 2)),
        st.sampled_from(sorted({*ENV_FAULTS, *SAMPLER_FAULTS} - {"hang", "deaf"})),
        max_size=5,
    ),
    st.integers(1, 9),
)
def test_whatever_breaks_every_episode_ends_exactly_once(plain, faults, concurrency):
    """`faults`: (group, episode, turn) -> what breaks there. Each must be met, each outcome be the expected one."""
    asyncio.run(_with_faults(plain, faults, concurrency, deadline=60.0))


async def test_what_hangs_costs_its_deadline_and_nothing_else(plain):
    """Hanging faults, at a deadline that a busy machine keeps: in both rooms at once, beside episodes that go on."""
    faults = {(0, 1, 0): "hang", (1, 2, 1): "deaf", (2, 0, 2): "hang", (2, 2, 0): "deaf", (0, 0, 1): "crash"}
    await _with_faults(plain, faults, concurrency=9, deadline=4.0)


async def _with_faults(plain, faults, concurrency, deadline):
    met = []

    def script(request, turn):
        group, episode = (int(part) for part in request.session.removeprefix("g").split("/"))
        fault = faults.get((group, episode, turn))
        line = solve(plain)(request, turn)
        # the environment cannot know which episode it is in, so its faults travel in the text it is sent
        text = plain.decode(line.tokens)
        if fault in ENV_FAULTS:
            return say(plain.encode, adding.call("add", n=0, fault=f"{fault}:{group}:{episode}:{turn}"))
        if fault is not None:
            met.append((group, episode, turn))
            broken = SAMPLER_FAULTS[fault]
            return Fail("busy", retryable=True, times=1, then=line) if fault == "busy" else broken
        return say(plain.encode, text)

    def make():
        def act(env, action):
            for made in action.tool_calls:
                name = str((made.arguments or {}).get("fault", ""))
                if name:
                    kind, *at = name.split(":")
                    met.append(tuple(map(int, at)))
                    return ENV_FAULTS[kind](env, action)
            return None

        return adding.Adder(act)

    async with Setting(plain, script, make, concurrency=concurrency, turn_seconds=deadline, step_seconds=deadline) as s:
        specs = [GroupSpec(f"g{g}", adding.task(7), 3) for g in range(3)]
        groups = await s.runner.run_groups(specs, T1, 0)
        s.nothing_is_left()
    outcomes = {o.id: o for g in groups for o in (*g.trajectories, *g.failures)}
    assert sorted(outcomes) == [f"g{g}/{i}" for g in range(3) for i in range(3)]
    assert sum(len(g.trajectories) + len(g.failures) for g in groups) == 9, "no episode ends twice"
    deadly = {at: fault for at, fault in faults.items() if fault != "busy"}
    for g in range(3):
        for i in range(3):
            own = [deadly[g, i, turn] for turn in range(3) if (g, i, turn) in deadly]
            assert isinstance(outcomes[f"g{g}/{i}"], Failure) == bool(own)
            if own:
                assert (g, i, next(t for t in range(3) if (g, i, t) in deadly)) in met
            else:
                assert outcomes[f"g{g}/{i}"].reward == 1.0


async def test_the_check_above_notices_a_lost_episode(plain):
    """Negative control: a runner that swallows failures leaves its books unbalanced."""

    class Forgetful(RolloutRunner):
        async def _play(self, *episode):
            self.counts.started += 1  # an episode that nobody will hear of
            return await super()._play(*episode)

    async with Setting(plain, solve(plain)) as s:
        s.runner.__class__ = Forgetful
        with pytest.raises(AssertionError):
            await s.one()


def test_environments_are_made_from_the_configuration():
    env = env_factory(EnvSection(id="espalier/Spreadsheet-v0"), tasks=[object()])()
    assert [tool.name for tool in env.tools][-1] == "submit"
    env.close()
    with pytest.raises(ValueError, match=r"env\.id"):
        env_factory(EnvSection(id="espalier/Nothing-v0"))


async def test_together_ends_the_others_before_it_raises():
    ended = []

    async def patient(name):
        try:
            await asyncio.sleep(60)
        finally:
            ended.append(name)

    async def failing():
        await asyncio.sleep(0)
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        await together([patient("a"), failing(), patient("b")])
    assert sorted(ended) == ["a", "b"]
    assert await together(asyncio.sleep(0, i) for i in range(3)) == [0, 1, 2]


async def test_the_bound_holds_across_callers(plain):
    running = []

    def make():
        running.append(1)
        return adding.Adder()

    async with Setting(plain, solve(plain), make, concurrency=3) as s:
        calls = [s.runner.run_groups([GroupSpec(f"g{i}", adding.task(7), 4)], T1, 0) for i in range(4)]
        groups = [group for (group,) in await together(calls)]
        assert all(len(group.trajectories) == 4 for group in groups) and len(running) <= 3
        s.nothing_is_left()


async def test_what_has_a_lower_rank_goes_before_what_waits_already(plain):
    """A batch's replacements are not served behind the whole of the next batch."""
    async with Setting(plain, solve(plain), concurrency=1) as s:
        done = []
        ask = lambda name, rank: s.runner.run_groups(  # noqa: E731
            [GroupSpec(f"{name}{i}", adding.task(7), 2) for i in range(2)],
            T1,
            0,
            rank=rank,
            on_group=lambda group: done.append(group.id),
        )
        later = asyncio.create_task(ask("later", 2))
        await asyncio.sleep(0)
        await asyncio.gather(later, ask("sooner", 1))
        assert done == ["sooner0", "sooner1", "later0", "later1"]
        s.nothing_is_left()
