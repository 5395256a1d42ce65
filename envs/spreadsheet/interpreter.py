"""Run an agent's Python code on a copy of its workbook, in a box, and take back what it made of the file.

Always true: the code sees `data.xlsx` and a Python installation, nothing of the task's answers, and nothing of a run
before it; memory, CPU time, files, processes, wall time and output are bounded. With isolation "namespaces" it runs in
a `sandbox.Box`; where the kernel does not allow that, nothing runs. "none" is for machines one does not mind: a
`sandbox.CopyBox`, whose limits hold, but whose code can read what the user can, and use the network.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Literal

from ..sandbox import Box, BoxError, BoxSnapshot, CopyBox, Limits, Output

Isolation = Literal["namespaces", "none"]
Stopped = Literal["time", "memory"]
MB = 1024 * 1024
FILE = "data.xlsx"


@dataclass(frozen=True, slots=True)
class CodeLimits:
    """Bounds of one run: wall and CPU seconds, memory and processes of all together, size of one file, characters of
    output.
    """

    seconds: float = 120.0
    memory_mb: int = 1024
    processes: int = 32
    file_mb: int = 64
    output: int = 10_240

    def of_box(self) -> Limits:
        """The same for a box, which keeps one clean state besides."""
        return Limits(
            memory=self.memory_mb * MB, pids=self.processes, cpu_seconds=self.seconds, seconds=self.seconds,
            output=4 * self.output, files=2 * self.file_mb * MB, inodes=10_000, snapshots=2, spares=1,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class CodeResult:
    """What came of a run. `package`: the file it left, if it ended in time and left one. `refused`: why nothing was
    run.
    """

    output: str
    status: int
    stopped: Stopped | None
    package: bytes | None
    refused: str | None = None


class CodeRunner:
    """Runs code, each time in a fresh interpreter; the box behind it is made by the first run."""

    def __init__(self, limits: CodeLimits | None = None, isolation: Isolation = "namespaces") -> None:
        self.limits = limits or CodeLimits()
        self.isolation = isolation
        self._box: Box | None = None
        self._clean: BoxSnapshot | None = None

    def run(self, code: str, package: bytes) -> CodeResult:
        """Run `code` beside `package` as data.xlsx. Never raises for what the code does."""
        try:
            if self.isolation == "none":
                with CopyBox(limits=self.limits.of_box()) as bare:
                    return self._run(bare, code, package)
            return self._run(self._fresh(), code, package)
        except BoxError as error:
            self.close()
            return CodeResult("", 1, None, None, refused=str(error).removeprefix(f"{error.code}: "))

    def _fresh(self) -> Box:
        if self._box is None or self._clean is None:
            self._box = Box(limits=self.limits.of_box())
            self._box.python("import openpyxl\ndel openpyxl")
            self._clean = self._box.snapshot()
        else:
            self._box.rollback(self._clean)
        return self._box

    def _run(self, box: Box | CopyBox, code: str, package: bytes) -> CodeResult:
        box.write_file(FILE, package)
        out = box.python(code, show=False)
        stopped: Stopped | None = (
            "memory" if out.stopped == "memory" else "time" if out.stopped in ("time", "cpu") else None
        )
        left = None
        if stopped is None:
            with contextlib.suppress(OSError):
                left = box.read_file(FILE, most=self.limits.file_mb * MB + 1)
        if left is not None and len(left) > self.limits.file_mb * MB:
            left = None
        return CodeResult(self._text(out), out.status, stopped, left)

    def _text(self, out: Output) -> str:
        text = out.text
        if len(text) > self.limits.output or out.cut:
            note = f"\n... (output cut, {len(text.encode()) + out.cut} bytes in all)"
            text = text[: self.limits.output - len(note)] + note
        return text

    def close(self) -> None:
        """End the box. Safe to repeat."""
        box, self._box, self._clean = self._box, None, None
        if box is not None:
            box.close()
