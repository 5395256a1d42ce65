"""Snapshots of a plain Gymnasium environment, by deep copies, where that is sound; where it is not, the reason.

A snapshot belongs to the wrapper that made it and to its branches: another environment, made alike or not, refuses it.
There is no `state_digest`: that two copies hold the same bytes says nothing about what a step reads of them (a cache,
an order of a set, a picture), so that equal states could have unequal digests; `tabular.TabularState` has one for
environments whose state is known.

A deep copy is sound when the environment can be copied and the copy has the same future and no influence on the
original. Both are tried before anything is promised: an environment with an open device, a thread or a generator of the
whole process is refused by name, never copied in part. Wrappers around `SnapshotByCopy`, a time limit say, keep their
own counters.
"""

from __future__ import annotations

import copy
import uuid
from typing import Any

import gymnasium
import numpy as np

from .core import EnvFailure, Snapshot

TRIED_STEPS = 24
TRIED_SEED = 20_261_122


class NotCopyable(ValueError):
    """This environment's state cannot be kept by copying it; the message says why."""


class SnapshotByCopy(gymnasium.Wrapper[Any, Any, Any, Any]):
    """`env` with `snapshot`, `rollback` and `branch`. Tries it out first: `env` is reset by that.

    Raises `NotCopyable`.
    """

    def __init__(self, env: gymnasium.Env[Any, Any]) -> None:
        super().__init__(env)
        _try_out(env)
        kind = type(env.unwrapped)
        self._id = f"copy of {kind.__module__}.{kind.__qualname__} {uuid.uuid4().hex}"

    def snapshot(self) -> Snapshot:
        """Keep the present state."""
        return Snapshot(self._id, "", _copied(self.env))

    def rollback(self, snapshot: Snapshot) -> None:
        """Return to `snapshot`. Raises `EnvFailure` ("foreign_snapshot")."""
        self.env = self._own(snapshot)

    def branch(self, snapshot: Snapshot) -> SnapshotByCopy:
        """A second environment that goes on from `snapshot`; neither sees the other."""
        made: SnapshotByCopy = copy.copy(self)
        made.env = self._own(snapshot)
        return made

    def _own(self, snapshot: Snapshot) -> gymnasium.Env[Any, Any]:
        if snapshot.env_id != self._id:
            raise EnvFailure("foreign_snapshot", "this snapshot was made by another environment")
        return _copied(snapshot.state)


def _copied(env: gymnasium.Env[Any, Any]) -> gymnasium.Env[Any, Any]:
    try:
        made: gymnasium.Env[Any, Any] = copy.deepcopy(env)
    except Exception as error:
        raise NotCopyable(f"{env} cannot be copied: {type(error).__name__}: {error}") from error
    return made


def _try_out(env: gymnasium.Env[Any, Any]) -> None:
    """Copies at the start, midway and after use, each played on and compared. Raises `NotCopyable`."""
    env.reset(seed=TRIED_SEED)
    env.action_space.seed(TRIED_SEED)
    actions = [env.action_space.sample() for _ in range(TRIED_STEPS)]
    _play(env, actions[: TRIED_STEPS // 3])
    kept = _copied(env)
    rest = actions[TRIED_STEPS // 3 :]
    future = _play(env, rest)
    for again in (_copied(kept), _copied(kept)):
        if not _same(_play(again, rest), future):
            raise NotCopyable(
                f"a copy of {env} has another future than the original: something that it depends on is not in it "
                "(a generator or a table of the whole process, a file, a device)"
            )


def _play(env: gymnasium.Env[Any, Any], actions: list[Any]) -> list[Any]:
    record: list[Any] = []
    for action in actions:
        observation, reward, terminated, truncated, _ = env.step(action)
        record.append((copy.deepcopy(observation), float(reward), terminated, truncated))
        if terminated or truncated:
            record.append(copy.deepcopy(env.reset()[0]))
    return record


def _same(one: Any, two: Any) -> bool:
    if isinstance(one, dict):
        return isinstance(two, dict) and one.keys() == two.keys() and all(_same(one[k], two[k]) for k in one)
    if isinstance(one, list | tuple):
        return isinstance(two, list | tuple) and len(one) == len(two) and all(map(_same, one, two))
    if isinstance(one, np.ndarray):
        return bool(np.array_equal(one, two, equal_nan=one.dtype.kind in "fc"))
    return bool(one == two)
