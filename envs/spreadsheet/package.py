"""The door for .xlsx bytes from outside: `check_package` reads them with limits before any parser or engine may.

What passes is a complete, unencrypted OOXML workbook within the limits below, without macros, entities, or formulas
that read other workbooks or reach outside; each of these is a `PackageError` with its own code. Sizes are counted while
unpacking, because a zip's headers lie. Limits are Spreadsheet-RL's (50k members, 512 MB, 128 MB a member, ratio 200).
"""

from __future__ import annotations

import io
import posixpath
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal
from xml.parsers import expat

from .lexer import FORBIDDEN, names_other_book, solid_tokens

MAX_INPUT_BYTES = 256 * 1024 * 1024
MAX_MEMBERS = 50_000
MAX_TOTAL_BYTES = 512 * 1024 * 1024
MAX_MEMBER_BYTES = 128 * 1024 * 1024
MAX_RATIO = 200
MAX_XML_DEPTH = 128
_RATIO_FROM = 1024 * 1024  # below this size a high ratio harms nobody (a sheet of equal rows has one)
_CHUNK = 1024 * 1024
_SMALL = 16 * 1024

_OLE = b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1"
_MACRO_PART = re.compile(
    r"(?:^|/)(?:vbaProject|vbaData|vbaProjectSignature\w*)\.(?:bin|xml)$|^xl/macrosheets/", re.IGNORECASE
)
_MACRO_RELATION = re.compile(rb"<Relationship\b[^>]*(?:vbaProject|vbaData|xlMacrosheet)[^>]*/>")
_MACRO_OVERRIDE = re.compile(rb"<(?:Override|Default)\b[^>]*(?:vbaProject|vbaData|macrosheet)[^>]*/>")
_MACRO_BOOK = b"application/vnd.ms-excel.sheet.macroEnabled.main+xml"
_PLAIN_BOOK = b"application/vnd.openxmlformats-officedocument.spreadsheetml.sheet.main+xml"
# A file may hold HYPERLINK and CUBE formulas: nothing is fetched by keeping them. Agents may not write them.
_FORBIDDEN_IN_FILES = FORBIDDEN - {"HYPERLINK"} - {name for name in FORBIDDEN if name.startswith("CUBE")}


class PackageError(ValueError):
    """A package that must not be opened: `code` is stable, `message` says what is wrong, `hint` what to do or None."""

    def __init__(self, code: str, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.code, self.message, self.hint = code, message, hint


@dataclass(frozen=True, slots=True)
class CheckedPackage:
    """A package that passed; `notes` says in sentences what was taken out of it (nothing, as a rule)."""

    data: bytes
    notes: tuple[str, ...] = ()


def check_package(data: bytes, *, macros: Literal["strip", "refuse"] = "strip") -> CheckedPackage:
    """Check .xlsx bytes before anything parses them.

    Macros are taken out, or refused by `macros="refuse"`; links to other workbooks that no formula reads stay, noted
    and never followed. Raises `PackageError` with one of the codes "too_large", "encrypted", "old_format", "not_xlsx",
    "truncated", "zip_bomb", "bad_member", "bad_xml", "xml_entities", "macros", "external_link", "dde",
    "forbidden_formula".
    """
    _check_container(data)
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = archive.infolist()
            _check_directory(members)
            names = {m.filename for m in members}
            stripped = [name for name in names if _MACRO_PART.search(name)]
            if stripped and macros == "refuse":
                hint = "Save it as .xlsx, or let the macros be stripped."
                raise PackageError("macros", "the workbook contains macros", hint)
            _check_members(archive, members)
            notes = _link_notes(archive, names)
            macro_book = _MACRO_BOOK in archive.read("[Content_Types].xml")
            if not stripped and not macro_book:
                return CheckedPackage(data, notes)
            return CheckedPackage(_without_macros(archive), ("macros were removed", *notes))
    except PackageError:
        raise
    except (zipfile.BadZipFile, EOFError, zlib.error, ValueError) as error:  # ValueError: a member before the start
        raise PackageError("truncated", f"the file is damaged or cut short: {error}") from None
    except (NotImplementedError, RuntimeError) as error:
        raise PackageError("not_xlsx", f"the file uses a zip feature that workbooks do not: {error}") from None


def _check_container(data: bytes) -> None:
    if len(data) > MAX_INPUT_BYTES:
        raise PackageError("too_large", f"the file has {len(data):,} bytes; at most {MAX_INPUT_BYTES:,} are read")
    if data.startswith(_OLE):
        if "EncryptedPackage".encode("utf-16-le") in data:
            raise PackageError("encrypted", "the workbook is protected by a password", "Save it without a password.")
        raise PackageError("old_format", "this is an old binary workbook (.xls)", "Save it as .xlsx.")
    if not data.startswith(b"PK"):
        raise PackageError("not_xlsx", "this is not an .xlsx file: it is no zip archive", "Save the workbook as .xlsx.")


def _check_directory(members: list[zipfile.ZipInfo]) -> None:
    """What the zip's directory says, before anything is unpacked."""
    if len(members) > MAX_MEMBERS:
        raise PackageError("zip_bomb", f"the file has {len(members):,} members; at most {MAX_MEMBERS:,} are allowed")
    seen: set[str] = set()
    for member in members:
        name = member.filename
        plain = name.replace("\\", "/")
        if plain.startswith("/") or ".." in plain.split("/") or "\x00" in name or ":" in name.split("/")[0]:
            raise PackageError("bad_member", f"the file has a member with an unsafe name: {name[:80]!r}")
        if name.casefold() in seen:
            raise PackageError("bad_member", f"the file has two members named {name[:80]!r}")
        seen.add(name.casefold())
        if member.flag_bits & 1:
            raise PackageError("encrypted", "a part of the file is encrypted", "Save it without a password.")
        _check_size(name, member.file_size, member.compress_size)
    total = sum(m.file_size for m in members)
    if total > MAX_TOTAL_BYTES:
        raise PackageError("zip_bomb", f"the file unpacks to {total:,} bytes; at most {MAX_TOTAL_BYTES:,} are allowed")
    if "[content_types].xml" not in seen:
        raise PackageError("not_xlsx", "this zip archive is no workbook: it has no [Content_Types].xml")
    if "xl/workbook.xml" not in seen:
        hint = "Save the workbook as .xlsx."
        raise PackageError("not_xlsx", "this package is no .xlsx workbook: it has no xl/workbook.xml", hint)


def _check_size(name: str, size: int, packed: int) -> None:
    if size > MAX_MEMBER_BYTES:
        message = f"the part {name[:80]!r} unpacks to {size:,} bytes or more; at most {MAX_MEMBER_BYTES:,} are allowed"
        raise PackageError("zip_bomb", message)
    if size > _RATIO_FROM and size > MAX_RATIO * max(packed, 1):
        message = f"the part {name[:80]!r} is packed more than {MAX_RATIO} to 1"
        raise PackageError("zip_bomb", message)


def _link_notes(archive: zipfile.ZipFile, names: set[str]) -> tuple[str, ...]:
    """Refuse DDE links; say that there are others (formulas that read them were refused before)."""
    links = sorted(n for n in names if re.fullmatch(r"xl/externallinks/[^/]*\.xml", n, re.IGNORECASE))
    if any(b"ddeLink" in archive.read(name) for name in links):
        raise PackageError("dde", "the workbook links to another program (DDE)", "Replace the links by values.")
    return ("links to other workbooks are kept but never followed",) if links else ()


def _check_members(archive: zipfile.ZipFile, members: list[zipfile.ZipInfo]) -> None:
    """Unpack every member with a byte cap and read the XML ones through."""
    total = 0
    for member in members:
        is_xml = member.filename.lower().endswith((".xml", ".rels", ".vml"))
        small = is_xml and member.file_size <= _SMALL
        reader = _XmlCheck(member.filename) if is_xml and not small else None
        size, held = 0, b""
        for chunk in _unpacked(archive, member):
            size += len(chunk)
            total += len(chunk)
            _check_size(member.filename, size, member.compress_size)
            if total > MAX_TOTAL_BYTES:
                raise PackageError("zip_bomb", f"the file unpacks to more than {MAX_TOTAL_BYTES:,} bytes")
            if reader is not None:
                reader.feed(chunk, final=False)
            elif small:
                held += chunk
        if reader is not None and size:
            reader.feed(b"", final=True)
        elif held:
            _check_small(member.filename, held)


def _unpacked(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> Iterator[bytes]:
    if member.is_dir():
        return
    with archive.open(member) as part:
        while chunk := part.read(_CHUNK):
            yield chunk


@lru_cache(maxsize=256)
def _check_small(name: str, data: bytes) -> None:
    """Read a small XML part through, once: what one program writes has most of them in common."""
    _XmlCheck(name).feed(data, final=True)


class _XmlCheck:
    """Reads one XML part: well formed, no document type (hence no entities), not too deep, no formula reaching out."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.depth = 0
        self._text: list[str] | None = None
        self._in_cell = False
        self._lenient = name.lower().endswith(".vml")  # Office itself writes VML that is not XML
        self._parser = expat.ParserCreate()
        self._parser.StartDoctypeDeclHandler = self._doctype
        self._parser.StartElementHandler = self._start
        self._parser.EndElementHandler = self._end
        self._parser.buffer_text = True

    def feed(self, chunk: bytes, final: bool) -> None:
        """Read on. Raises `PackageError`."""
        try:
            self._parser.Parse(chunk, final)
        except expat.ExpatError as error:
            if not self._lenient:
                raise PackageError("bad_xml", f"the part {self.name[:80]!r} is not well-formed XML: {error}") from None
            self._parser = expat.ParserCreate()
            self._parser.StartDoctypeDeclHandler = self._doctype
            self._lenient = True

    def _doctype(self, *_: object) -> None:
        message = f"the part {self.name[:80]!r} declares a document type; workbooks have none, entities are not read"
        raise PackageError("xml_entities", message)

    def _start(self, tag: str, _: dict[str, str]) -> None:
        self.depth += 1
        if self.depth > MAX_XML_DEPTH:
            message = f"the part {self.name[:80]!r} is nested more than {MAX_XML_DEPTH} deep"
            raise PackageError("bad_xml", message)
        if tag.rpartition(":")[2] in ("f", "definedName", "formula", "formula1", "formula2"):
            self._text = []
            self._in_cell = tag.rpartition(":")[2] == "f"
            self._parser.CharacterDataHandler = self._text.append

    def _end(self, _: str) -> None:
        self.depth -= 1
        if self._text is not None:
            _check_formula("".join(self._text), self.name, in_cell=self._in_cell)
            self._text = None
            self._parser.CharacterDataHandler = None


_SUSPECT = re.compile(r"[|\[]|" + "|".join(re.escape(n) for n in sorted(_FORBIDDEN_IN_FILES)), re.IGNORECASE)


def _check_formula(formula: str, part: str, in_cell: bool) -> None:
    if _SUSPECT.search(formula) is None:
        return
    where = f"a formula in {part[:80]!r}"
    parts = solid_tokens("=" + formula)
    for i, (kind, text) in enumerate(parts):
        name = text.upper().removeprefix("_XLFN.").removeprefix("_XLWS.")
        if kind == "call" and name in _FORBIDDEN_IN_FILES:
            hint = "Replace the formula by its value."
            raise PackageError("forbidden_formula", f"{where} calls {name}, which reaches outside", hint)
        if text == "|":
            raise PackageError("dde", f"{where} links to another program (DDE)", "Replace the links by values.")
        if in_cell and names_other_book(parts, i):
            hint = "Replace the links by values (Data, Edit Links, Break Link)."
            raise PackageError("external_link", f"{where} reads another workbook", hint)


def _without_macros(archive: zipfile.ZipFile) -> bytes:
    """The package as an ordinary .xlsx: no macro parts, none of the relations and content types that name them."""

    def without(name: str, data: bytes) -> bytes:
        if name.endswith(".rels"):
            return _MACRO_RELATION.sub(b"", data)
        if name == "[Content_Types].xml":
            return _MACRO_OVERRIDE.sub(b"", data).replace(_MACRO_BOOK, _PLAIN_BOOK)
        return data

    return rewrite(archive, without, drop=lambda name: _MACRO_PART.search(name) is not None)


def rewrite(
    archive: zipfile.ZipFile, change: Callable[[str, bytes], bytes], drop: Callable[[str], bool] = lambda name: False
) -> bytes:
    """A copy of `archive` with members changed or dropped, in the same order."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as target:
        for member in archive.infolist():
            if member.is_dir() or drop(member.filename):
                continue
            info = zipfile.ZipInfo(posixpath.normpath(member.filename), member.date_time)
            info.compress_type = zipfile.ZIP_DEFLATED
            target.writestr(info, change(member.filename, archive.read(member)))
    return out.getvalue()
