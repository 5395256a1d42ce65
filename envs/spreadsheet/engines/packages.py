"""What engines need of an .xlsx package before they read it; the package has been checked for safety by then."""

from __future__ import annotations

import io
import re
import zipfile

from .base import EngineError

_NOT_LOADED = re.compile(
    r"xl/(?:comments|threadedComments|persons|drawings|charts|media|printerSettings|ctrlProps|activeX)", re.IGNORECASE
)
_NOT_RELATED = re.compile(
    rb"<Relationship\b[^>]*Type=[\"'][^\"']*/"
    rb"(?:comments|threadedComment|vmlDrawing|drawing|printerSettings|control|image)[\"'][^>]*/>"
)
_NOT_REFERRED = re.compile(rb"<(?:\w+:)?(?:legacyDrawing|drawing|legacyDrawingHF|picture)\b[^>]*/>")
_EMPTY_CELL = re.compile(rb"<c\b([^>]*?)(?:/>|>\s*(?:<v\s*/>|<v>\s*</v>)?\s*</c>)")
_SLIMMED = re.compile(r"\.rels$|^xl/worksheets/")
_CELL_TYPE = re.compile(rb"\s+t=[\"'][a-zA-Z]*[\"']")
_UNPACKED = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_BROKEN = (zipfile.BadZipFile, NotImplementedError, EOFError, OSError, RuntimeError, KeyError)


def reads_1904(package: bytes) -> bool:
    """Whether the workbook counts dates from 1904-01-01."""
    try:
        with zipfile.ZipFile(io.BytesIO(package)) as source:
            workbook = source.read("xl/workbook.xml")
    except _BROKEN as error:
        raise EngineError(f"the workbook cannot be opened: {error}") from None
    return re.search(rb"date1904=[\"'](?:1|true)[\"']", workbook) is not None


def calculation_parts(package: bytes) -> bytes:
    """The package as IronCalc 0.9.1 reads it rightly: no drawings, no comments, no type on empty cells.

    The comments that openpyxl writes stop it ("specified file not found"), and the empty cell that openpyxl writes,
    `<c r="A1" t="n"/>`, it takes for a zero; of packing methods it knows the common two. A package that has none of
    these is given back as it is. The original is kept elsewhere; nothing is ever saved from this.
    """
    out = io.BytesIO()
    try:
        with zipfile.ZipFile(io.BytesIO(package)) as source:
            kept = [name for name in source.namelist() if not name.endswith("/") and not _NOT_LOADED.match(name)]
            slim = {name: _slimmed(name, source.read(name)) for name in kept if _SLIMMED.search(name)}
            plain = all(member.compress_type in _UNPACKED for member in source.infolist())
            if plain and len(kept) == len(source.namelist()) and all(data is None for data in slim.values()):
                return package
            with zipfile.ZipFile(out, "w") as target:
                for name in kept:
                    data = slim.get(name)
                    target.writestr(name, source.read(name) if data is None else data)
    except _BROKEN as error:
        raise EngineError(f"the workbook cannot be opened: {error}") from None
    return out.getvalue()


def _slimmed(name: str, data: bytes) -> bytes | None:
    """A part without what IronCalc does not read rightly; None: it is so already."""
    if name.endswith(".rels"):
        slim = _NOT_RELATED.sub(b"", data)
    else:
        slim = _EMPTY_CELL.sub(_untyped, _NOT_REFERRED.sub(b"", data))
    return None if slim == data else slim


def _untyped(match: re.Match[bytes]) -> bytes:
    return b"<c" + _CELL_TYPE.sub(b"", match[1]) + b"/>"
