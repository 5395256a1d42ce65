"""Policy versions made durable.

`root/v000001/` holds one PEFT adapter (adapter_config.json, adapter_model.safetensors) and manifest.json. Always true:
a version is there whole or not at all; a number, once given to some content, never names another; version 0 is the base
and has no folder. One process writes a store; any number may read it.
"""

from __future__ import annotations

import builtins
import re
import time
from collections.abc import Callable, Collection
from functools import cached_property
from pathlib import Path

from ..rollouts.digest import folder_digest
from ..rollouts.types import PolicyVersion
from .durable import (
    CorruptFolder,
    FolderExists,
    clean_temporary,
    publish_folder,
    read_manifest,
    remove_folder,
    verify_folder,
)
from .errors import UserError
from .shipped import SHIPPED

_NAME = re.compile(r"v(\d{6,})")


class CorruptVersion(CorruptFolder):
    """A file of a version is missing or changed; the message names it."""


class UnknownVersion(UserError):
    """No version has this number."""


class PolicyStore:
    """The versions under `root`: adapters of the model at `base`."""

    def __init__(self, root: Path, base: Path) -> None:
        self.root = root
        self.base = base

    @cached_property
    def base_version(self) -> PolicyVersion:
        """Version 0: the base itself."""
        return PolicyVersion(0, folder_digest(self.base), self.base, str(self.base))

    def folder(self, number: int) -> Path:
        """Where version `number` stands or would stand."""
        return self.root / f"v{number:06d}"

    def publish(self, write: Callable[[Path], None], *, parent: int, number: int | None = None) -> PolicyVersion:
        """Make durable what `write` puts into the folder it is given, and return the version.

        `number` is where to look for a free one (default: after the latest). A number taken by the very same content is
        that version; one taken by other content is passed over. Raises StorageError when it cannot be written.
        """
        wanted = number if number is not None else max(self.list(), default=0) + 1
        if wanted < 1:
            raise ValueError("version 0 is the base; a new version has number 1 at least")
        clean_temporary(self.root)
        while True:
            record = {
                "number": wanted,
                "parent": parent,
                "base": self.base_version.digest,
                "base_path": str(self.base),
                "created": time.time(),
            }
            try:
                publish_folder(self.folder(wanted), write, record)
                break
            except FolderExists as taken:
                if read_manifest(self.folder(wanted))["digest"] == taken.digest:
                    break
                wanted += 1
        return self.open(wanted)

    def open(self, number: int) -> PolicyVersion:
        """Version `number`, every file verified. Raises UnknownVersion or CorruptVersion (naming the file)."""
        if number == 0:
            return self.base_version
        folder = self.folder(number)
        if not folder.is_dir():
            there = ", ".join(map(str, self.list())) or "none"
            raise UnknownVersion(f"there is no policy version {number} in {self.root}; there are: {there}")
        try:
            manifest = verify_folder(folder)
        except CorruptFolder as error:
            raise CorruptVersion(str(error)) from error
        if manifest["base"] != self.base_version.digest:
            raise CorruptVersion(
                f"{folder} was trained on another base than {self.base}: its manifest names another digest"
            )
        return PolicyVersion(number, manifest["digest"], folder, str(self.base), manifest["parent"])

    def list(self) -> builtins.list[int]:
        """The numbers there are, ascending, the base left out."""
        if not self.root.is_dir():
            return []
        return sorted(int(m[1]) for p in self.root.iterdir() if (m := _NAME.fullmatch(p.name)) and p.is_dir())

    def latest(self) -> PolicyVersion:
        """The version with the highest number; the base when there is none."""
        return self.open(max(self.list(), default=0))

    def retain(self, recent: int, best: Collection[int] = (), leased: Collection[int] = ()) -> builtins.list[int]:
        """Delete all but the `recent` newest, the `best` and the `leased` versions; returns the numbers deleted. The
        base stays.
        """
        numbers = self.list()
        keep = {*numbers[max(0, len(numbers) - recent) :], *best, *leased}
        gone = [number for number in numbers if number not in keep]
        for number in gone:
            remove_folder(self.folder(number))
        return gone


class UnknownBase(UserError):
    """The model is not on this machine; the message says how to get it."""


def resolve_base(name: str) -> Path:
    """The folder of a base model: a shipped one by its name, a folder, or a model id in the local Hugging Face cache.
    Raises UnknownBase.
    """
    if name in SHIPPED:
        shipped, subject = SHIPPED[name]
        if not (shipped / "config.json").is_file():
            raise UnknownBase(
                f"the shipped policy is not at {shipped}; make it with: espalier make-policy {subject} --to {shipped}"
            )
        return shipped
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UnknownBase(
                f"{folder} holds no config.json, so it is not a model; name a Hugging Face model folder in policy.base"
            )
        return folder.resolve()
    if name.startswith(("/", ".", "~")) or name.count("/") > 1:
        raise UnknownBase(f"policy.base = {name}: there is no such folder")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError) as error:
        raise UnknownBase(
            f'policy.base = "{name}" is neither a folder nor in the Hugging Face cache; get it with: hf download {name}'
        ) from error
