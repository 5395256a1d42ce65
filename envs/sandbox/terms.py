"""What callers of a box say and get: its limits, a call's output, and the errors."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

Stopped = Literal["", "time", "cpu", "memory", "crash"]


_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


class BoxError(RuntimeError):
    """The box itself failed; `code` is a short stable word."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code


class SnapshotIncomplete(BoxError):
    """The present state cannot be kept whole; `reasons` says what stands in the way. Nothing was kept."""

    def __init__(self, message: str, reasons: Sequence[str]) -> None:
        super().__init__("incomplete", message)
        self.reasons = tuple(reasons)


@dataclass(frozen=True)
class Limits:
    """What a box may use.

    `memory`: bytes that one branch's processes hold ("512M"); `pids`: processes and threads at once, of all branches
    together; `cpu_seconds`: processor time of one call, and of what it left running until the next one; `seconds`:
    wall-clock time of one call; `output`: bytes of a call's output that are kept; `files`, `inodes`: all that was
    written, in bytes and files; `snapshots`, `snapshot_memory`: frozen copies kept, and the bytes of memory that only
    they hold, before the least valuable go; `spares`: copies kept ready for a warm rollback.
    """

    memory: int | str = "1G"
    pids: int = 64
    cpu_seconds: float = 60.0
    seconds: float = 120.0
    output: int = 100_000
    files: int | str = "1G"
    inodes: int = 200_000
    snapshots: int = 256
    snapshot_memory: int | str = "1G"
    spares: int = 4

    def plain(self) -> dict[str, Any]:
        """The same with sizes in bytes. Raises `ValueError` for a size that is none."""
        return {
            **asdict(self),
            **{name: _bytes(getattr(self, name)) for name in ("memory", "files", "snapshot_memory")},
        }


@dataclass(frozen=True)
class Output:
    """What a call printed (standard output and error together), its exit status, and what ended it early.

    `cut`: bytes of output that were not kept. `restarted`: the interpreter had to be replaced by a fresh one, its
    variables are gone; files are as the call left them.
    """

    text: str
    status: int = 0
    stopped: Stopped = ""
    cut: int = 0
    restarted: bool = False


def error_of(told: Mapping[str, Any]) -> Exception:
    """The error that a reply stands for."""
    code, message = str(told["error"]), str(told.get("message", ""))
    if code == "incomplete":
        return SnapshotIncomplete(message, told.get("reasons", []))
    if code == "file":
        return OSError(int(told["errno"]), message)
    return BoxError(code, message)


def run_request(limits: Limits, op: str, code: str, seconds: float | None, show: bool = False) -> dict[str, Any]:
    """The request for a call."""
    wait = limits.seconds if seconds is None else seconds
    return {
        "op": op, "code": code, "show": show, "seconds": wait, "cpu_seconds": limits.cpu_seconds, "most": limits.output,
    }  # fmt: skip


def output_of(told: Mapping[str, Any]) -> Output:
    """What the reply to it says."""
    return Output(told["output"], told["status"], told["stopped"], told["cut"], told["restarted"])


def _bytes(size: int | str) -> int:
    if isinstance(size, int):
        return size
    with contextlib.suppress(ValueError, KeyError, IndexError):
        return int(float(size[:-1]) * _UNITS[size[-1].upper()]) if size[-1].isalpha() else int(size)
    raise ValueError(f"{size!r} is not a size: give bytes, or a number with K, M or G")
