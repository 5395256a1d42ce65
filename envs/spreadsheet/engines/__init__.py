"""Recalculation engines behind one protocol; none is imported before it is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from .base import Book, CellError, Engine, EngineError, Referee, SheetInfo, Value
from .volatile import DEFAULT_CLOCK

__all__ = [
    "DEFAULT_CLOCK",
    "NO_REFEREE",
    "Book",
    "CellError",
    "Engine",
    "EngineError",
    "Referee",
    "SheetInfo",
    "Value",
    "choose_referee",
    "engine_versions",
    "get_engine",
    "get_referee",
]

ENGINES = ("ironcalc", "formualizer")
NO_REFEREE = "none"
_OFFICE = "libreoffice"


def get_engine(name: str = "ironcalc", *, clock: datetime = DEFAULT_CLOCK, seed: int = 0) -> Engine:
    """The engine called `name`; `clock` (UTC) is what TODAY and NOW give, `seed` draws RAND. Raises ValueError."""
    if name == "ironcalc":
        from .ironcalc import IronCalc

        return IronCalc(clock, seed)
    if name == "formualizer":
        from .formualizer import Formualizer

        return Formualizer(clock, seed)
    raise ValueError(f"there is no engine named {name!r}; choose one of {', '.join(ENGINES)}")


def choose_referee(wanted: str) -> str:
    """`wanted` with the version that is here: "none" or "libreoffice 25.2.3.2"; one that has a version stays.

    "auto" is LibreOffice where a version that will do is installed, else "none". Raises `EngineError` when
    "libreoffice" is missing or too old, ValueError for another name.
    """
    name, _, version = wanted.partition(" ")
    if wanted == NO_REFEREE or (name == _OFFICE and version):
        return wanted
    if wanted not in ("auto", _OFFICE):
        raise ValueError(f'there is no referee named {wanted!r}; choose "auto", "libreoffice" or "none"')
    from .libreoffice import find_libreoffice

    try:
        return f"{_OFFICE} {find_libreoffice()[1]}"
    except EngineError:
        if wanted == _OFFICE:
            raise
        return NO_REFEREE


def get_referee(wanted: str) -> Referee | None:
    """The referee that `choose_referee` gives, one process at a time; None for "none". Raises as that does, and
    `EngineError` where the version is not the one wanted.
    """
    chosen = choose_referee(wanted)
    if chosen == NO_REFEREE:
        return None
    from .libreoffice import LibreOffice

    office = LibreOffice()
    if chosen != f"{_OFFICE} {office.version}":
        raise EngineError(f'the referee is to be "{chosen}", but LibreOffice {office.version} is installed')
    return office


def engine_versions(names: Sequence[str | None] = ENGINES, referee: str = NO_REFEREE) -> dict[str, str]:
    """Version by name: of those of the engines `names` that are installed, and of the `referee` that was chosen."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in filter(None, names):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    last, _, its = referee.partition(" ")
    return {**found, last: its} if its else found
