"""Digests and snapshots of Gymnasium's toy-text environments, whose whole state is a few plain attributes.

Always true: the digest covers the state, what the next steps consult, and the random generator wherever a step can
depend on it; where every transition of the table is certain, the draws that a step makes decide nothing, and the
generator is left out, so that paths of different lengths meet in one state. Counters of wrappers around this one (a
time limit) are not part of it. An environment that keeps more state than is known here is refused by name.
"""

from __future__ import annotations

import copy
import hashlib
import json
from typing import Any

import gymnasium

from .core import EnvFailure, Snapshot

CONSTANT = frozenset(
    {"P", "desc", "locs", "initial_state_distrib", "action_space", "observation_space", "shape", "spec"}
)
"""Attributes that no step changes."""
STATE = frozenset({"s", "fickle_step"})
SHOWN = frozenset({"lastaction", "taxi_orientation"})
"""What only a picture shows."""


class NoDigest(ValueError):
    """This environment's state is not known to be covered; the message says why."""


class TabularState(gymnasium.Wrapper[Any, Any, Any, Any]):
    """`env` with `state_digest`, `snapshot`, `rollback` and `branch`. Raises `NoDigest`."""

    def __init__(self, env: gymnasium.Env[Any, Any]) -> None:
        super().__init__(env)
        inner = env.unwrapped
        table = getattr(inner, "P", None)
        if not isinstance(table, dict):
            raise NoDigest(f"{env} has no table of transitions (P)")
        if env is not inner:
            raise NoDigest(f"{env} is wrapped; give the environment itself, and wrap the result")
        self._certain = all(len(ways) == 1 for by_action in table.values() for ways in by_action.values()) and not (
            getattr(inner, "fickle_passenger", False)
        )
        self._names = _changing(env)
        kind = type(inner)
        self._id = f"{kind.__module__}.{kind.__qualname__} {hashlib.sha256(repr(table).encode()).hexdigest()}"

    def state_digest(self) -> str:
        """Hex sha256 of what the rest of the episode depends on."""
        inner: Any = self.env.unwrapped
        state: dict[str, Any] = {name: getattr(inner, name) for name in sorted(STATE & self._names)}
        if not self._certain:
            state["generator"] = inner.np_random.bit_generator.state
        return hashlib.sha256(json.dumps(state, default=int, sort_keys=True).encode()).hexdigest()

    def snapshot(self) -> Snapshot:
        """Keep the present state."""
        inner: Any = self.env.unwrapped
        kept = {name: getattr(inner, name) for name in (STATE | SHOWN) & self._names}
        kept = {**copy.deepcopy(kept), "generator": inner.np_random.bit_generator.state}
        return Snapshot(self._id, self.state_digest(), kept, size=1024)

    def rollback(self, snapshot: Snapshot) -> None:
        """Return to `snapshot`. Raises `EnvFailure` ("foreign_snapshot")."""
        if snapshot.env_id != self._id:
            raise EnvFailure("foreign_snapshot", "this snapshot was made by another environment")
        inner: Any = self.env.unwrapped
        for name, value in snapshot.state.items():
            if name == "generator":
                inner.np_random.bit_generator.state = value
            else:
                setattr(inner, name, value)

    def branch(self, snapshot: Snapshot) -> TabularState:
        """A second environment that goes on from `snapshot`; neither sees the other."""
        made = TabularState(copy.deepcopy(self.env))
        made.rollback(snapshot)
        return made


def _changing(env: gymnasium.Env[Any, Any]) -> frozenset[str]:
    """The attributes that episodes change, found by playing some. Raises `NoDigest` for one that is not known."""
    inner = env.unwrapped
    before = {name: repr(value) for name, value in vars(inner).items() if name not in CONSTANT}
    found: set[str] = set()
    env.action_space.seed(0)
    for seed in range(3):
        env.reset(seed=seed)
        for _ in range(50):
            over = any(env.step(env.action_space.sample())[2:4])
            now = {name: repr(value) for name, value in vars(inner).items() if name not in CONSTANT}
            found |= {name for name in now if now[name] != before.get(name)}
            if over:
                env.reset()
    known = STATE | SHOWN
    unknown = {name for name in found if name not in known and not name.startswith("_np_random")}
    if unknown:
        raise NoDigest(f"{env} changes {', '.join(sorted(unknown))}, which a digest of tables does not cover")
    if not hasattr(inner, "s"):
        raise NoDigest(f"{env} has no state (s)")
    return frozenset(name for name in known if hasattr(inner, name))
