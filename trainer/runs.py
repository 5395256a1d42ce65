"""A run's folder as others read it, and the claim of the one process that writes it.

`runs/<name>/` holds config.json (resolved), metrics.jsonl, trajectories/, policies/, checkpoints/, graph.sqlite,
report.html.
Reading never writes; a last line of metrics.jsonl that a crash cut off is left out, any other broken line is an error.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..configs.load import ConfigError, load
from ..configs.schema import RunConfig
from ..rollouts.store import TrajectoryStore
from .errors import UserError

Row = dict[str, Any]
"""One line of metrics.jsonl; `kind` says what stands in it: "train", "eval", "alarm", "phase", "tasks"."""


@dataclass(frozen=True, slots=True)
class Run:
    """What a run folder says about itself. `cut` is whether the last line of metrics.jsonl was incomplete."""

    folder: Path
    config: RunConfig
    rows: tuple[Row, ...]
    cut: bool = False

    def of_kind(self, kind: str) -> list[Row]:
        """The rows of one kind, in the order written; a step repeated after a resume counts once, the last time."""
        latest: dict[tuple[Any, ...], Row] = {}
        for at, row in enumerate(self.rows):
            if row["kind"] == kind:
                key = (row.get("step"), row.get("version"), row.get("mode")) if kind in {"train", "eval"} else (at,)
                latest.pop(key, None)
                latest[key] = row
        return list(latest.values())


def find_run(name_or_path: str | Path, out: Path = Path("runs")) -> Path:
    """The folder of a run given by path or by name under `out`. Raises `UserError`."""
    tried = [Path(name_or_path), out / name_or_path]
    for folder in tried:
        if (folder / "config.json").is_file():
            return folder
    if any(folder.is_dir() for folder in tried):
        raise UserError(f"{name_or_path}: not a run folder, it has no config.json.")
    known = sorted(path.parent.name for path in out.glob("*/config.json"))
    hint = f"runs here: {', '.join(known[:20])}" if known else f"no run in {out}/ yet: espalier train spreadsheet-tiny"
    raise UserError(f"{name_or_path}: no such run; {hint}.")


def graph_path(config: RunConfig) -> Path:
    """The file of a run's operation graph."""
    return config.graph.path or config.out / config.name / "graph.sqlite"


def read_run(folder: Path) -> Run:
    """Read a run folder. Raises `UserError` naming the file that is missing or broken."""
    try:
        config = load(folder / "config.json")
    except ConfigError as error:
        raise UserError(f"{folder}: config.json is broken or of another version: {error}") from None
    rows, cut = _read_rows(folder / "metrics.jsonl")
    return Run(folder, config, tuple(rows), cut)


def _read_rows(path: Path) -> tuple[list[Row], bool]:
    if not path.is_file():
        return [], False
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    cut = lines[-1] != ""  # the writer ends each line; what follows the last newline is half a line
    rows: list[Row] = []
    for number, line in enumerate(lines[:-1], start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}: line {number} is not JSON ({error.msg}); mend or remove that line.") from None
        if not isinstance(row, dict) or not isinstance(row.get("kind"), str):
            raise UserError(f'{path}: line {number} has no "kind"; mend or remove that line.')
        rows.append(row)
    return rows, cut


@contextmanager
def claim(folder: Path, *, resume: bool) -> Iterator[None]:
    """Hold a run folder for writing.

    A new run takes a folder that holds none, or one that failed before it sampled anything (see `clear`). Raises
    `UserError` when it holds a run already or another process has it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror}); set --out to a folder that can.") from None
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"{folder}: another process is writing this run; wait, or give a new --name.") from None
        begun = (folder / "config.json").is_file()
        if begun and not resume and _holds_work(folder):
            raise UserError(f"{folder} already holds a run: continue it with --resume, or give another --name.")
        if resume and not begun:
            raise UserError(f"{folder} holds no run to continue; leave --resume out.")
        yield
    finally:
        os.close(handle)


def _holds_work(folder: Path) -> bool:
    """Whether a run was trained for a step here, or sampled anything."""
    rows, _ = _read_rows(folder / "metrics.jsonl")
    if any(row["kind"] == "train" for row in rows):
        return True
    if not (folder / "trajectories" / "trajectories.sqlite").is_file():
        return False
    store = TrajectoryStore(folder / "trajectories", readonly=True)
    try:
        return bool(store.group_ids())
    finally:
        store.close()


def clear(folder: Path) -> None:
    """Remove what a run that failed before it sampled anything left in a folder that is claimed; what is in a folder
    that holds no run stays.
    """
    if not (folder / "config.json").is_file() or not (folder / "metrics.jsonl").is_file():
        return
    for part in ("checkpoints", "policies"):
        if (folder / part).is_dir():
            shutil.rmtree(folder / part)
