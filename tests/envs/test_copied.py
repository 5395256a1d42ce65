import random
import threading

import gymnasium
import numpy as np
import pytest
from espalier.envs.copied import NotCopyable, SnapshotByCopy
from espalier.envs.core import EnvFailure, Snapshot, capabilities

PLAIN = ["CartPole-v1", "FrozenLake-v1", "Taxi-v4", "Blackjack-v1", "MountainCarContinuous-v0", "Acrobot-v1"]


def play(env, count):
    env.action_space.seed(0)
    record = []
    for _ in range(count):
        observation, reward, terminated, truncated, _ = env.step(env.action_space.sample())
        record.append((np.asarray(observation).tolist(), float(reward), terminated, truncated))
        if terminated or truncated:
            record.append(np.asarray(env.reset()[0]).tolist())
    return record


@pytest.mark.parametrize("name", PLAIN)
def test_a_plain_environment_goes_back_and_branches(name):
    made = gymnasium.make(name)
    assert capabilities(made) == frozenset()
    env = SnapshotByCopy(made)
    assert capabilities(env) == {"rollback"}
    env.reset(seed=3)
    play(env, 7)
    here = env.snapshot()
    future = play(env, 30)
    for _ in range(2):
        env.rollback(here)
        branch = env.branch(here)
        play(branch, 11)
        assert play(env, 30) == future
        assert play(env.branch(here), 30) == future
    with pytest.raises(EnvFailure, match="foreign"):
        env.rollback(Snapshot("another", "", None))


@pytest.mark.parametrize("options", [{"map_name": "8x8"}, {"map_name": "4x4"}])
def test_a_snapshot_is_taken_by_its_own_environment_and_its_branches_only(options):
    """Of one class, they may still be two worlds."""
    small, other = (SnapshotByCopy(gymnasium.make("FrozenLake-v1", **o)) for o in ({"map_name": "4x4"}, options))
    small.reset(seed=0)
    other.reset(seed=0)
    here, size = small.snapshot(), other.observation_space.n
    for refused in (other.rollback, other.branch):
        with pytest.raises(EnvFailure, match="foreign_snapshot"):
            refused(here)
    assert other.unwrapped.observation_space.n == size
    branch = small.branch(here)
    branch.step(1)
    small.rollback(branch.snapshot())
    assert small.unwrapped.s == branch.unwrapped.s


class Leaky(gymnasium.Env):
    """Depends on a generator of the whole process."""

    observation_space = gymnasium.spaces.Discrete(1000)
    action_space = gymnasium.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return 0, {}

    def step(self, action):
        return random.randrange(1000), 0.0, False, False, {}


class Locked(Leaky):
    """Holds what cannot be copied."""

    def __init__(self):
        self.lock = threading.Lock()


class Shared(Leaky):
    """Keeps its state in a table that its copies share."""

    table = {"n": 0}  # noqa: RUF012

    def step(self, action):
        self.table["n"] += 1
        return self.table["n"] % 1000, 0.0, False, False, {}


@pytest.mark.parametrize(
    ("kind", "why"), [(Leaky, "another future"), (Locked, "cannot be copied"), (Shared, "another future")]
)
def test_what_cannot_be_copied_says_why(kind, why):
    with pytest.raises(NotCopyable, match=why):
        SnapshotByCopy(kind())
