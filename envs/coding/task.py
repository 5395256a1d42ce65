"""A coding task as data: what the agent finds, what it is asked, and the tests that it never sees."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from ..core import Task


@dataclass(frozen=True)
class CodeTask(Task):
    """The agent works in `workspace` (a folder; "" for an empty one) with `files` (path to text) laid over it.

    `tests`: pytest files by path, written only when the episode is over; all must pass.
    """

    workspace: str = ""
    files: Mapping[str, str] = field(default_factory=dict)
    tests: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def digest(self) -> str:
        """Hex sha256 of what an episode depends on, tests included."""
        found = hashlib.sha256(repr((self.id, self.instruction)).encode())
        for part in (self.files, self.tests):
            found.update(repr(sorted(part.items())).encode())
        if self.workspace:
            for path in sorted(Path(self.workspace).rglob("*")):
                if path.is_symlink():
                    found.update(f"{path.relative_to(self.workspace)} -> {path.readlink()}".encode())
                elif path.is_file():
                    found.update(f"{path.relative_to(self.workspace)} ".encode() + path.read_bytes())
        return found.hexdigest()
