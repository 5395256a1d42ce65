"""Pools whose environments can be brought to a state, for the operation graph; here in threads of this process.

Always true: as of `envpool`; and what is kept for an environment is let go by its number, whatever became of the
environment. A call that nobody waits for any more leaves neither a kept state nor a branch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from ...envs.core import Action, AgentEnv
from ..envpool import EnvPool, ThreadEnvPool, theirs
from .states import Came, Kept, States, Traits


class StatePool(EnvPool, Protocol):
    """An `EnvPool` whose environments can also be brought to a state. All raise as `EnvPool` says."""

    async def begin(self, handle: Any, seed: int, options: dict[str, Any], keep: bool) -> tuple[Came, Traits]:
        """`reset`; `keep`: the state, too. `result` is an `Opening`, `info` reduced to what can be kept as JSON."""

    async def go_on(self, handle: Any, at: Kept | None, action: Action, keep: bool) -> Came:
        """`step`, from the kept state `at` (None: from where it is). `result` is a `StepResult`, `info` reduced."""

    async def fork(self, handle: Any, at: Kept) -> Any:
        """A handle to a second environment that stands at the kept state `at`; `handle` stays where it is."""

    def forget(self, handle: Any, kept: Kept) -> None:
        """Let a kept state go. `handle`: one of where it is kept."""

    def alive(self, handle: Any) -> bool:
        """Whether an environment, and what was kept beside it, is still there."""

    def together(self, one: Any, other: Any) -> bool:
        """Whether two handles are in one place, so that what is kept for one can be had by the other."""


class ThreadStatePool(ThreadEnvPool):
    """A `StatePool` in threads; arguments as of `ThreadEnvPool`."""

    def __init__(
        self,
        make_env: Callable[[], AgentEnv],
        *,
        deadline_s: float,
        terse: bool = False,
        workers: int = 1,
        max_workers: int = 16,
        max_stuck: int = 8,
    ) -> None:
        super().__init__(
            make_env,
            deadline_s=deadline_s,
            terse=terse,
            workers=workers,
            max_workers=max_workers,
            max_stuck=max_stuck,
        )
        self._states = States()
        self._branches: set[int] = set()

    async def begin(self, handle: AgentEnv, seed: int, options: dict[str, Any], keep: bool) -> tuple[Came, Traits]:
        """See `StatePool`."""
        made, traits = await theirs(self.call(lambda: self._states.begin(handle, seed, options, keep, self.terse)))
        return self._states.had(made), traits

    async def go_on(self, handle: AgentEnv, at: Kept | None, action: Action, keep: bool) -> Came:
        """See `StatePool`."""
        return self._states.had(await theirs(self.call(lambda: self._states.go_on(handle, at, action, keep))))

    async def fork(self, handle: AgentEnv, at: Kept) -> AgentEnv:
        """See `StatePool`."""
        made = await theirs(self.call(lambda: self._states.fork(handle, at)))
        self._branches.add(id(made))
        return made

    def give(self, handle: AgentEnv) -> None:
        """See `EnvPool`. A branch ends: kept for other episodes there would be ever more, and making one is quick."""
        if id(handle) in self._branches:
            self._branches.discard(id(handle))
            self.end(handle)
        else:
            super().give(handle)

    def drop(self, handle: AgentEnv) -> None:
        """See `EnvPool`."""
        self._branches.discard(id(handle))

    def forget(self, handle: AgentEnv | None, kept: Kept) -> None:
        """See `StatePool`."""
        self._states.forget(kept.number)

    def alive(self, handle: AgentEnv) -> bool:
        """See `StatePool`."""
        return True

    def together(self, one: AgentEnv, other: AgentEnv) -> bool:
        """See `StatePool`."""
        return True
