"""A sandbox for code that rolls back in a millisecond: files, live interpreter and all."""

from __future__ import annotations

from .aio import AsyncBox
from .box import Box, BoxSnapshot
from .copying import CopyBox, CopySnapshot
from .terms import BoxError, Limits, Output, SnapshotIncomplete, Stopped

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
    "Stopped",
]
