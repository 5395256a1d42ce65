"""Messages between this process and a worker process that it started, over a private socket pair.

Always true: a message arrives whole or not at all, in order, and is at most `MAX_BYTES` long; both ends are our own
programs (pickle is read here, so nothing else may ever hold an end).
"""

from __future__ import annotations

import asyncio
import pickle
import struct
from collections.abc import Callable
from typing import Any, cast

MAX_BYTES = 256 * 1024 * 1024

_LENGTH = struct.Struct(">I")


class Link(asyncio.Protocol):
    """One end. `received` gets each message; `lost` is called once, when the other end is gone or broke the form."""

    def __init__(self, received: Callable[[tuple[Any, ...]], None], lost: Callable[[], None]) -> None:
        self._received, self._lost = received, lost
        self._transport: asyncio.Transport | None = None
        self._buffer = bytearray()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Of `asyncio.Protocol`."""
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        """Of `asyncio.Protocol`: all messages that are complete are handed on."""
        self._buffer += data
        start = 0
        while len(self._buffer) - start >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._buffer, start)
            stop = start + _LENGTH.size + length
            if length > MAX_BYTES:
                self.close()
                return
            if len(self._buffer) < stop:
                break
            message = pickle.loads(self._buffer[start + _LENGTH.size : stop])  # noqa: S301 - see the module
            start = stop
            self._received(message)
        del self._buffer[:start]

    def connection_lost(self, exc: Exception | None) -> None:
        """Of `asyncio.Protocol`."""
        self._transport = None
        self._lost()

    def send(self, *message: Any) -> None:
        """Send, or do nothing when the other end is gone. Raises what pickling raises, `ValueError` when too long."""
        body = pickle.dumps(message)
        if len(body) > MAX_BYTES:
            raise ValueError(f"{len(body):,} bytes are more than a message may have ({MAX_BYTES:,})")
        if self._transport is not None:
            self._transport.write(_LENGTH.pack(len(body)) + body)

    def close(self) -> None:
        """Hang up; `lost` follows."""
        if self._transport is not None:
            self._transport.abort()
