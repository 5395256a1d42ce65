"""What a resumed run must have in common with the one that it continues: everything that changes what is trained.

Always true: a key that is not listed here as free has the value that the checkpoint was written with.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..configs.load import keys
from ..configs.schema import RunConfig
from .errors import UserError

FREE = (
    *("name", "out", "graph.", "sampler.", "eval.", "alarms.", "tracking."),
    *("policy.device", "policy.attention", "policy.gradient_checkpointing", "env.processes"),
    *("trainer.steps", "trainer.threads", "trainer.micro_batch", "trainer.shared_prefix"),
    *("schedule.checkpoint_every", "schedule.keep_recent"),
)
"""Keys, and sections (with a dot), that may change: where and how fast work is done, how long, what is measured, kept
and said. Not the same run to the bit, but the same training."""


def refuse_changes(folder: Path, before: Mapping[str, Any], config: RunConfig) -> None:
    """Raise UserError naming the keys that differ from the configuration `before` of the run in `folder` and change
    what is trained, with both values.
    """
    after = config.model_dump(mode="json")
    changed = [
        f"{key} = {_of(before, key)!r} became {_of(after, key)!r}"
        for key, _ in keys()
        if not any(key == free or (free.endswith(".") and key.startswith(free)) for free in FREE)
        and _of(before, key) != _of(after, key)
    ]
    if changed:
        raise UserError(
            f"{folder} cannot be continued with a configuration that trains something else ({', '.join(changed)}); "
            "give --resume the values that it began with, or leave it out and give another --name."
        )


def _of(config: Mapping[str, Any], key: str) -> Any:
    found: Any = config
    for part in key.split("."):
        found = found.get(part) if isinstance(found, Mapping) else None
    return found
