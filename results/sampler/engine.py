"""How vLLM's engine is run in the comparison: the fastest of the settings that its CPU backend leaves to the user.

Always true: one engine is alive at a time while they are tried; a setting is what its environment says when it starts.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median

_BIND = "VLLM_CPU_OMP_THREADS_BIND"


@dataclass(frozen=True)
class Setting:
    """OpenMP's threads, whether each is bound to a core, and whether a thread that waits sleeps instead of spinning."""

    threads: int
    bound: bool = False
    passive: bool = False

    def __str__(self) -> str:
        return f"{self.threads}{', bound' if self.bound else ''}{', passive' if self.passive else ''}"

    def environment(self) -> dict[str, str]:
        """The variables that say so."""
        cores = "0" if self.threads == 1 else f"0-{self.threads - 1}"
        waits = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0"} if self.passive else {}
        return {_BIND: cores if self.bound else "nobind", **waits}

    @contextmanager
    def set(self) -> Iterator[None]:
        """In this process's environment, for an engine that starts now."""
        before = {name: os.environ.get(name) for name in self.environment()}
        os.environ.update(self.environment())
        try:
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name)
                else:
                    os.environ[name] = value


SETTINGS = (
    Setting(1),
    Setting(2),
    Setting(1, passive=True),
    Setting(2, passive=True),
    Setting(1, bound=True),
    Setting(2, bound=True),
)


def fastest(speeds: Callable[[Setting], list[float]]) -> tuple[Setting, list[tuple[str, list[float]]]]:
    """The setting with the best median of its `speeds` (larger is better), and what was found of each."""
    found = {setting: speeds(setting) for setting in SETTINGS}
    return max(found, key=lambda s: median(found[s])), [(str(s), values) for s, values in found.items()]
