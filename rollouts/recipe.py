"""How to make the configured environment, as data: it can be sent to another process and followed there.

Always true: an id that is not registered, and a module that cannot be imported, are refused when the recipe is written;
following it imports the same module first. No heavy library is imported here.
"""

from __future__ import annotations

import importlib
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import gymnasium
from gymnasium.envs.registration import EnvSpec, load_env_creator

from ..configs.schema import EnvSection
from ..envs.core import AgentEnv


@dataclass(frozen=True, slots=True)
class EnvRecipe:
    """`module` is imported first (empty: none), then `spec` is made with `kwargs` for the constructor."""

    module: str
    spec: EnvSpec
    kwargs: Mapping[str, Any]

    def load(self) -> None:
        """Import what `make` needs. Raises what an import raises."""
        if self.module:
            importlib.import_module(self.module)
        if isinstance(self.spec.entry_point, str):
            load_env_creator(self.spec.entry_point)

    def make(self) -> AgentEnv:
        """A new environment. Raises what its module and its constructor raise."""
        self.load()
        env = gymnasium.make(self.spec, disable_env_checker=True, **self.kwargs)
        return cast(AgentEnv, env.unwrapped)

    def pickled(self) -> bytes:
        """The recipe for another process. Raises `ValueError` when no other process could follow it."""
        entry = self.spec.entry_point
        home = entry.partition(":")[0] if isinstance(entry, str) else getattr(entry, "__module__", "")
        if home == "__main__":
            raise ValueError(
                f"env.processes: {self.spec.id} is defined in the program that was started (__main__), which another "
                "process cannot import; move it to a module, or set env.processes = 0"
            )
        try:
            return pickle.dumps(self)
        except Exception as error:
            raise ValueError(
                f"env.processes: {self.spec.id} cannot be made in another process ({error}); move its class to a "
                "module, or set env.processes = 0"
            ) from error


def env_recipe(section: EnvSection, **more: Any) -> EnvRecipe:
    """The recipe of the configured environment; `more` goes to its constructor beside `section.kwargs`.

    An id may name the module that registers it, `module:Name-v0`. Raises `ValueError` when the id is not registered.
    """
    from .. import envs as _registers  # noqa: F401 - registering with Gymnasium is this import's purpose

    module, _, name = section.id.rpartition(":")
    try:
        if module:
            importlib.import_module(module)
        spec = gymnasium.spec(name)
    except (gymnasium.error.Error, ImportError) as error:
        raise ValueError(f"env.id: {section.id}: {error}") from error
    return EnvRecipe(module, spec, {**section.kwargs, **more})
