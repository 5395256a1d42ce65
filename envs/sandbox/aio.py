"""AsyncBox: the same box for asyncio; hundreds at once on one thread.

Always true: a call that is cancelled ends its branch, since what its guest was doing is not known any more; a box that
is collected or closed leaves nothing behind.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

from .box import REPLY_SECONDS, START_SECONDS, Box, BoxSnapshot
from .starting import start
from .terms import BoxError, Limits, Output, error_of, output_of, run_request
from .wire import HEAD_SIZE, WireError, decode, decode_length, encode


class AsyncBox:
    """One branch of a sandbox, as `Box`; made by `await AsyncBox.start(...)`."""

    def __init__(self, box: Box) -> None:
        self._box = box
        self._turn = asyncio.Lock()
        box._connection.setblocking(False)

    @classmethod
    async def start(
        cls,
        workspace: str | os.PathLike[str] | None = None,
        limits: Limits | None = None,
        *,
        python: str | None = None,
        visible: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
        network: bool = False,
        live: bool = True,
    ) -> AsyncBox:
        """A new box; arguments and errors as of `Box`."""
        limits = limits or Limits()
        box = Box.__new__(Box)
        box._join(limits, live, *start(workspace, limits, python, visible, environment, network))
        made = cls(box)
        await made._ask(None, START_SECONDS)
        return made

    async def python(self, code: str, *, seconds: float | None = None, show: bool = True) -> Output:
        """Run statements in the live interpreter. Raises `BoxError`."""
        return await self._run("python" if self._box.live else "fresh", code, seconds, show)

    async def shell(self, command: str, *, seconds: float | None = None) -> Output:
        """Run a shell command. Raises `BoxError`."""
        return await self._run("shell", command, seconds)

    async def _run(self, op: str, code: str, seconds: float | None, show: bool = False) -> Output:
        message = run_request(self._box.limits, op, code, seconds, show)
        return output_of(await self._ask(message, message["seconds"] + REPLY_SECONDS))

    async def snapshot(self) -> BoxSnapshot:
        """Keep the present state. Raises `SnapshotIncomplete`."""
        told = await self._ask({"op": "snapshot"})
        return self._box._keep(told)

    async def rollback(self, snapshot: BoxSnapshot) -> bool:
        """Return to `snapshot`; whether a copy stood ready. Raises `BoxError`."""
        return bool((await self._ask({"op": "rollback", "snapshot": self._box._own(snapshot)}))["warm"])

    async def branch(self, snapshot: BoxSnapshot) -> AsyncBox:
        """A second box that goes on from `snapshot`. Raises `BoxError`."""
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                await self._ask({"op": "branch", "snapshot": self._box._own(snapshot)}, handed=(theirs.fileno(),))
            except BaseException:
                ours.close()
                raise
        made = Box.__new__(Box)
        made._join(self._box.limits, self._box.live, ours, self._box._family)
        return AsyncBox(made)

    async def close(self) -> None:
        """End this branch, and the box with its last one. Safe to repeat."""
        await asyncio.to_thread(self._box.close)

    async def __aenter__(self) -> AsyncBox:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await asyncio.shield(self.close())

    async def _ask(
        self, message: Mapping[str, Any] | None, seconds: float = REPLY_SECONDS, handed: Sequence[int] = ()
    ) -> dict[str, Any]:
        async with self._turn:
            if self._box._closed:
                raise BoxError("closed", "the box is closed")
            try:
                async with asyncio.timeout(seconds):
                    return await self._exchange(message, handed)
            except (WireError, OSError, TimeoutError) as error:
                self._box._abandon()
                raise BoxError("box_gone", f"the box is gone or hangs: {error}") from error
            except asyncio.CancelledError:
                self._box._abandon()
                raise

    async def _exchange(self, message: Mapping[str, Any] | None, handed: Sequence[int]) -> dict[str, Any]:
        loop, connection = asyncio.get_running_loop(), self._box._connection
        if message is not None:
            data = encode(self._box._family.with_dropped(message))
            if handed:
                data = data[socket.send_fds(connection, [data], list(handed)) :]
            await loop.sock_sendall(connection, data)
        body = await self._read(decode_length(await self._read(HEAD_SIZE)))
        told = decode(body)
        if "error" in told:
            raise error_of(told)
        return told

    async def _read(self, count: int) -> bytes:
        loop, data = asyncio.get_running_loop(), bytearray()
        while len(data) < count:
            chunk = await loop.sock_recv(self._box._connection, min(count - len(data), 1 << 20))
            if not chunk:
                raise WireError("the other side closed the connection")
            data += chunk
        return bytes(data)
