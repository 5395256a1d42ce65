"""Messages between orchestrator, supervisor and guest: a length, then one JSON object, with limits.

Nothing is ever unpickled, a message is never longer than `MOST`, and whoever sends what is not a message is cut off.
"""

from __future__ import annotations

import json
import os
import socket
import struct
import time
from collections.abc import Mapping, Sequence
from typing import Any

MOST = 8 * 1024 * 1024
"""Bytes of the longest message."""

_HEAD = struct.Struct("<I")
HEAD_SIZE = _HEAD.size
"""Bytes before a message that tell its length."""

FREEZE, FORK, RENEW, DONE, NOT_PLAIN = (bytes((mark, 0xFF, 0xFF, 0xFF)) for mark in b"fkrdn")
"""Messages of four bytes between supervisor and guests, no length of any other: a process that has just been forked
copies each page it touches, and parsing JSON touches many.
"""


class WireError(ConnectionError):
    """The other side is gone, or does not speak this protocol."""


def encode(message: Mapping[str, Any]) -> bytes:
    """The bytes of one message; raises `WireError` when it is too long."""
    body = json.dumps(message, separators=(",", ":")).encode()
    if len(body) > MOST:
        raise WireError(f"a message of {len(body)} bytes is too long (at most {MOST})")
    return _HEAD.pack(len(body)) + body


def send(connection: socket.socket, message: Mapping[str, Any], fds: Sequence[int] = ()) -> None:
    """Send one message, with descriptors. Raises `WireError`."""
    data = encode(message)
    try:
        sent = socket.send_fds(connection, [data], list(fds)) if fds else connection.send(data)
        if sent < len(data):
            connection.sendall(data[sent:])
    except (OSError, TimeoutError) as error:
        raise WireError(f"the other side is gone ({error})") from error


def receive(
    connection: socket.socket, *, most: int = MOST, seconds: float | None = None
) -> tuple[dict[str, Any], list[int]]:
    """The next message, of at most `most` bytes, and the descriptors that came with it (2 at most).

    `seconds`: for the whole of it, however slowly it comes; None: the connection's own time-out, for each part.
    Raises `WireError`.
    """
    fds: list[int] = []
    end = None if seconds is None else time.monotonic() + seconds
    try:
        _wait(connection, end)
        head, fds, _flags, _ = socket.recv_fds(connection, _HEAD.size, 2, socket.MSG_CMSG_CLOEXEC)
        if not head:
            raise WireError("the other side closed the connection")
        while len(head) < _HEAD.size:
            head += _more(connection, _HEAD.size - len(head), end)
        if head[1:] == b"\xff\xff\xff":
            return {"op": head}, fds
        length = decode_length(head)
        if length > most:
            raise WireError(f"a message of {length} bytes is too long (at most {most})")
        body = _more(connection, length, end)
        if len(body) < length:
            parts = bytearray(body)
            while len(parts) < length:
                parts += _more(connection, length - len(parts), end)
            body = bytes(parts)
        return decode(body), fds
    except (OSError, ValueError) as error:
        for fd in fds:
            os.close(fd)
        if isinstance(error, WireError):
            raise
        raise WireError(f"the other side is gone or broken ({error})") from error


def decode_length(data: bytes | bytearray) -> int:
    """The length that a message's head tells. Raises `WireError`."""
    length = int(_HEAD.unpack_from(data)[0])
    if length > MOST:
        raise WireError(f"a message of {length} bytes is too long (at most {MOST})")
    return length


def decode(body: bytes) -> dict[str, Any]:
    """The object in a message's body. Raises `WireError`."""
    try:
        found = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise WireError(f"a message that is not JSON ({error})") from error
    if not isinstance(found, dict):
        raise WireError("a message that is not an object")
    return found


def _wait(connection: socket.socket, end: float | None) -> None:
    """Let the next read wait until `end` at most."""
    if end is not None:
        left = end - time.monotonic()
        if left <= 0:
            raise WireError("a message that does not end")
        connection.settimeout(left)


def _more(connection: socket.socket, most: int, end: float | None) -> bytes:
    _wait(connection, end)
    chunk = connection.recv(min(most, 1 << 20))
    if not chunk:
        raise WireError("the other side closed the connection")
    return chunk
