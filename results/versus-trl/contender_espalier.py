"""Espalier on its tiny run: `espalier.train`, with the time of every step written down.

`measure.py` runs this file in a process of its own: `contender_espalier.py JOB`, a JSON file (see `Job`); it leaves
adapters and `log.json` beside it. Always true: the clock runs from the event that training begins on and counts
everything, storing and serving each version and the commit records too; it stands still only while an adapter is copied.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from espalier.configs.load import load

import espalier


@dataclass(frozen=True)
class Job:
    """What is asked for: the run's configuration, a file."""

    config: str


def main(path: Path) -> None:
    """Do the job in the file at `path`."""
    job = Job(**json.loads(path.read_text(encoding="utf-8")))
    config = load(job.config)
    rows: list[dict[str, Any]] = []
    began = 0.0

    def listen(row: dict[str, Any]) -> None:
        nonlocal began
        now = time.perf_counter()
        if row["kind"] == "phase" and row["phase"] == "training":
            began = now
        elif row["kind"] == "train":
            adapter = f"adapters/{row['step']:04d}" if row["version"] else None
            if adapter is not None:
                stored = config.out / config.name / "policies" / f"v{row['version']:06d}"
                shutil.copytree(stored, path.parent / adapter)
            rows.append(
                {
                    "step": row["step"],
                    "seconds": now - began,
                    "reward": row["reward_mean"],
                    "failed": sum(row["failures"].values()),
                    "adapter": adapter,
                }
            )
            began += time.perf_counter() - now

    espalier.train(config, on_event=listen)
    (path.parent / "log.json").write_text(json.dumps({"rows": rows}), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
