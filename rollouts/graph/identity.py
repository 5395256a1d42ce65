"""Which environment this is, to the byte: what a kept outcome depends on beside its task.

Always true: other options, another Python or system, another version of any installed distribution, other sources of
the environment's own package (or module) or of Espalier's environments: another identity. What an environment reads
from elsewhere (a file of the user's, a server) is not known here.
"""

from __future__ import annotations

import importlib.util
import json
import platform
from collections.abc import Iterator
from functools import lru_cache
from hashlib import sha256
from importlib import metadata
from pathlib import Path

from ... import envs
from ..recipe import EnvRecipe

MOST_SOURCES = 5_000


def identity(recipe: EnvRecipe, *, terse: bool) -> str:
    """Hex sha256. The tasks among the constructor's arguments do not count: a task is named by itself."""
    entry = recipe.spec.entry_point
    module = entry.partition(":")[0] if isinstance(entry, str) else str(getattr(entry, "__module__", ""))
    kwargs = {name: value for name, value in {**recipe.spec.kwargs, **recipe.kwargs}.items() if name != "tasks"}
    said = [
        recipe.spec.id,
        str(entry if isinstance(entry, str) else getattr(entry, "__qualname__", entry)),
        json.dumps(kwargs, sort_keys=True, default=repr),
        terse,
        platform.python_version(),
        platform.platform(),
        _installed(),
        [_sources(name) for name in sorted({module, recipe.module, envs.__name__}) if name],
    ]
    return sha256(json.dumps(said).encode()).hexdigest()


@lru_cache(maxsize=1)
def _installed() -> str:
    """The lock file that this process runs under."""
    found = sorted({f"{one.metadata['Name']}=={one.version}" for one in metadata.distributions()})
    return sha256("\n".join(found).encode()).hexdigest()


@lru_cache(maxsize=64)
def _sources(module: str) -> str:
    """Digest of the sources of a module's package (of the module itself where it stands in none)."""
    made = sha256(module.encode())
    for path in _files(module):
        made.update(path.name.encode() + b"\0" + path.read_bytes())
    return made.hexdigest()


def _files(module: str) -> Iterator[Path]:
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError, AttributeError):
        return
    if spec is None or spec.origin is None:
        return
    origin = Path(spec.origin)
    if "." not in module and spec.submodule_search_locations is None:
        if origin.is_file():
            yield origin
        return
    folder = origin.parent
    for number, path in enumerate(sorted(folder.rglob("*.py"))):
        if number >= MOST_SOURCES:
            return
        if path.is_file():
            yield path
