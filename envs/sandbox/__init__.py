"""A sandbox for code that rolls back in a millisecond: files, live interpreter and all."""

from __future__ import annotations

from .aio import AsyncBox
from .box import Box, BoxError, BoxSnapshot, Limits, Output, SnapshotIncomplete
from .copying import CopyBox, CopySnapshot

__all__ = [
    "AsyncBox",
    "Box",
    "BoxError",
    "BoxSnapshot",
    "CopyBox",
    "CopySnapshot",
    "Limits",
    "Output",
    "SnapshotIncomplete",
]
