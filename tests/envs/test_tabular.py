"""Digests and snapshots of toy-text environments."""

import gymnasium
import pytest
from espalier.envs.core import EnvFailure, Snapshot
from espalier.envs.tabular import NoDigest, TabularState
from hypothesis import given, settings
from hypothesis import strategies as st

CERTAIN = [("FrozenLake-v1", {"map_name": "8x8", "is_slippery": False}), ("Taxi-v4", {}), ("CliffWalking-v1", {})]
UNCERTAIN = [
    ("FrozenLake-v1", {"is_slippery": True}),
    ("Taxi-v4", {"is_rainy": True}),
    ("Taxi-v4", {"fickle_passenger": True}),
    ("CliffWalking-v1", {"is_slippery": True}),
]


def make(id, options):
    return TabularState(gymnasium.make(id, **options).unwrapped)


def play(env, actions):
    record = []
    for action in actions:
        state, reward, terminated, truncated, _ = env.step(action)
        record.append((int(state), float(reward), terminated, truncated))
        if terminated or truncated:
            break
    return record


@pytest.mark.parametrize(("id", "options"), [*CERTAIN, *UNCERTAIN])
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_equal_digests_have_equal_futures_and_snapshots_lead_back(id, options, data):
    env, other = make(id, options), make(id, options)
    actions = st.lists(st.integers(0, int(env.action_space.n) - 1), max_size=12)
    seed = data.draw(st.integers(0, 3))
    env.reset(seed=seed)
    other.reset(seed=seed)
    first, later = data.draw(actions), data.draw(actions)
    if any(step[2] for step in play(env, first)):
        return
    play(other, data.draw(actions))
    kept, digest = env.snapshot(), env.state_digest()
    same = other.state_digest() == digest
    future = play(env, later)
    if same:
        assert play(other, later) == future
    other.rollback(kept)
    assert other.state_digest() == digest == kept.digest and play(other, later) == future
    branch = env.branch(kept)
    assert play(branch, later) == future


def test_paths_of_different_lengths_meet_where_nothing_is_left_to_chance():
    env = make(*CERTAIN[0])
    env.reset(seed=0)
    start = env.state_digest()
    play(env, [0, 3])  # into the wall, twice
    assert env.state_digest() == start
    slippery = make(*UNCERTAIN[0])
    slippery.reset(seed=0)
    start = slippery.state_digest()
    slippery.unwrapped.np_random.random()
    assert slippery.state_digest() != start


def test_counters_of_wrappers_stay_outside():
    env = gymnasium.wrappers.TimeLimit(make(*CERTAIN[0]), 5)
    env.reset(seed=0)
    start = env.env.state_digest()
    env.step(0)
    assert env.env.state_digest() == start


@pytest.mark.parametrize("make_env", [lambda: gymnasium.make("CartPole-v1"), lambda: gymnasium.make("FrozenLake-v1")])
def test_what_is_not_known_to_be_covered_is_refused(make_env):
    with pytest.raises(NoDigest):
        TabularState(make_env())


def test_an_environment_with_more_state_is_refused_by_the_name_of_it():
    class Counting(type(gymnasium.make("FrozenLake-v1").unwrapped)):
        count = 0

        def step(self, action):
            self.count += 1
            return super().step(action)

    with pytest.raises(NoDigest, match="count"):
        TabularState(Counting())


def test_a_foreign_snapshot_is_refused():
    env = make(*CERTAIN[0])
    env.reset(seed=0)
    for foreign in (Snapshot("of another", "0" * 64, None), make(*CERTAIN[1]).env and _of(*CERTAIN[1])):
        with pytest.raises(EnvFailure, match="foreign_snapshot"):
            env.rollback(foreign)


def _of(id, options):
    env = make(id, options)
    env.reset(seed=0)
    return env.snapshot()
