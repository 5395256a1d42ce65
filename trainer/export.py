"""A trained version, for others to load: a PEFT adapter folder, or whole weights with the adapter merged in.

Always true: what is exported was verified (sha256 of every file) before it was copied, appears whole or not at all, and
carries the base's name, so that `PeftModel.from_pretrained` and `AutoModelForCausalLM.from_pretrained` work elsewhere.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from ..rollouts.types import PolicyVersion
from .durable import CorruptFolder, FolderExists, publish_folder
from .errors import UserError
from .model import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from .policy import PolicyStore, UnknownVersion, resolve_base
from .runs import Run
from .shipped import SHIPPED


def export(run: Run, to: Path, number: int | None = None, *, merged: bool = False) -> dict[str, Any]:
    """Write version `number` (default: the best, else the latest) to the new folder `to`. Raises `UserError`."""
    base = resolve_base(run.config.policy.base)
    store = PolicyStore(run.folder / "policies", base)
    wanted = _choose(run, store) if number is None else number
    try:
        version = store.open(wanted)
    except UnknownVersion:
        there = ", ".join(map(str, store.list())) or "none"
        raise UserError(f"{run.folder} keeps no version {wanted}; it keeps {there} (and 0, the base).") from None
    except CorruptFolder as error:
        raise UserError(f"version {wanted} cannot be exported: {error}") from None
    if version.is_base and not merged:
        raise UserError("version 0 is the base itself and has no adapter; use --merged to copy its weights.")
    record = {"exported_from": run.config.name, "version": version.number, "source_digest": version.digest}
    try:
        publish_folder(to, lambda folder: _write(folder, run, base, version, merged=merged), record)
    except FolderExists:
        raise UserError(f"{to} exists already; name a new folder in --to.") from None
    return {"to": str(to), "version": version.number, "digest": version.digest, "merged": merged}


def _choose(run: Run, store: PolicyStore) -> int:
    """The version with the best sampled pass@1 of those still kept, else the latest."""
    kept = set(store.list())
    rated = [
        (row["pass1"], row["version"])
        for row in run.of_kind("eval")
        if row.get("mode") == "sampled" and row.get("version") in kept and isinstance(row.get("pass1"), (int, float))
    ]
    if rated:
        return int(max(rated)[1])
    if not kept:
        raise UserError(f"{run.folder} has no trained version yet.")
    return max(kept)


def _write(folder: Path, run: Run, base: Path, version: PolicyVersion, *, merged: bool) -> None:
    if merged:
        _write_merged(folder, base, version)
        return
    config = json.loads((version.path / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = _base_name(run, base)
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    shutil.copyfile(version.path / ADAPTER_WEIGHTS, folder / ADAPTER_WEIGHTS)


def _base_name(run: Run, base: Path) -> str:
    """How another machine finds the base: its model id, or the folder where it stands here."""
    name = run.config.policy.base
    return str(base) if name in SHIPPED or Path(name).exists() else name


def _write_merged(folder: Path, base: Path, version: PolicyVersion) -> None:
    """PEFT's own merge, in the precision that the base is saved in."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(base, local_files_only=True, dtype="auto")
    if not version.is_base:
        model = PeftModel.from_pretrained(model, str(version.path)).merge_and_unload()
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base, local_files_only=True).save_pretrained(folder)
