"""AsyncBox: the same box for asyncio; hundreds at once on one thread.

Always true: a call that is cancelled ends its branch, since what its guest was doing is not known any more; a box that
is collected or closed leaves nothing behind.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Coroutine, Mapping, Sequence
from types import TracebackType
from typing import Any

from .box import REPLY_SECONDS, START_SECONDS, Box, BoxSnapshot, Pieces, entries_of, reading, writing
from .starting import start
from .terms import BoxError, Limits, Output, error_of, output_of, run_request
from .wire import HEAD_SIZE, WireError, decode, decode_length, encode


class AsyncBox:
    """One branch of a sandbox, as `Box`; made by `await AsyncBox.start(...)`. Errors are those of `Box`."""

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
        """Run statements in the live interpreter."""
        return await self._run("python" if self._box.live else "fresh", code, seconds, show)

    async def shell(self, command: str, *, seconds: float | None = None) -> Output:
        """Run a shell command in the interpreter's working directory and environment."""
        return await self._run("shell", command, seconds)

    async def _run(self, op: str, code: str, seconds: float | None, show: bool = False) -> Output:
        message = run_request(self._box.limits, op, code, seconds, show)
        return output_of(await self._ask(message, message["seconds"] + REPLY_SECONDS))

    async def snapshot(self, *, wait: bool = True) -> BoxSnapshot:
        """Keep the present state. `wait=False`: return as soon as it is asked for; whether it could be kept is said
        where the handle is used next.
        """
        made = self._box._new_handle()
        await self._ask({"op": "snapshot"}, made=made)
        if wait:
            await self._own(made)
        return made

    async def rollback(self, snapshot: BoxSnapshot) -> bool:
        """Return to `snapshot`; whether a copy stood ready."""
        return bool((await self._ask({"op": "rollback", "snapshot": await self._own(snapshot)}))["warm"])

    async def restart(self, snapshot: BoxSnapshot | None = None) -> None:
        """End everything that runs here; a fresh interpreter, or that of `snapshot`, goes on with the files."""
        await self._ask({"op": "restart", "snapshot": await self._own(snapshot) if snapshot is not None else None})

    async def changed(self) -> bool:
        """Whether a file was written, or a process left running, since the last snapshot or rollback."""
        return bool((await self._ask({"op": "changed"}))["changed"])

    async def prepare(self, snapshot: BoxSnapshot) -> None:
        """Have a copy of `snapshot` stand ready, so that the next rollback to it is warm."""
        await self._ask({"op": "prepare", "snapshot": await self._own(snapshot)})

    async def drop(self, snapshot: BoxSnapshot) -> None:
        """Let a snapshot go now."""
        await self._ask({"op": "drop", "snapshots": [await self._own(snapshot)]})

    async def read_file(self, path: str, *, most: int = 1 << 20) -> bytes:
        """At most `most` bytes of a file below /workspace or /tmp."""
        return await self._by_pieces(reading(path, most))

    async def write_file(self, path: str, data: bytes) -> None:
        """Write a file as the guest's user; missing folders are made."""
        await self._by_pieces(writing(path, data))

    async def list_files(self, path: str = ".") -> list[tuple[str, str, int]]:
        """Entries of a folder: name, "file", "folder" or "link", and size in bytes."""
        return entries_of(await self._ask({"op": "list", "path": path}))

    async def stats(self) -> dict[str, int]:
        """How much the box holds."""
        return {key: int(value) for key, value in (await self._ask({"op": "stats"})).items()}

    async def _by_pieces(self, pieces: Pieces) -> bytes:
        told: dict[str, Any] | None = None
        while True:
            try:
                message = pieces.send(told)
            except StopIteration as done:
                return bytes(done.value)
            told = await self._ask(message)

    async def _own(self, snapshot: BoxSnapshot) -> int:
        """Its number, asked for where it is not known yet."""
        if snapshot in self._box._pending:
            async with self._turn:
                await self._within(self._settle(), REPLY_SECONDS)
        return self._box._own(snapshot)

    async def branch(self, snapshot: BoxSnapshot) -> AsyncBox:
        """A second box that goes on from `snapshot`."""
        number = await self._own(snapshot)
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                await self._ask({"op": "branch", "snapshot": number}, handed=(theirs.fileno(),))
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
        self,
        message: Mapping[str, Any] | None,
        seconds: float = REPLY_SECONDS,
        handed: Sequence[int] = (),
        made: BoxSnapshot | None = None,
    ) -> dict[str, Any]:
        """The reply to a request; none where `made` is to be settled by it later."""
        async with self._turn:
            told = await self._within(self._exchange(message, handed, made), seconds)
        if "error" in told:
            raise error_of(told)
        return told

    async def _within(self, exchange: Coroutine[Any, Any, dict[str, Any]], seconds: float) -> dict[str, Any]:
        try:
            if self._box._closed:
                raise BoxError("closed", "the box is closed")
            async with asyncio.timeout(seconds):
                return await exchange
        except (WireError, OSError, TimeoutError) as error:
            self._box._abandon()
            raise BoxError("box_gone", f"the box is gone or hangs: {error}") from error
        except asyncio.CancelledError:
            self._box._abandon()
            raise
        finally:
            exchange.close()

    async def _settle(self) -> dict[str, Any]:
        """Read the replies to snapshots that nobody has waited for."""
        while self._box._pending:
            told = await self._reply()
            self._box._settle_one(self._box._pending.popleft(), told)
        return {}

    async def _exchange(
        self, message: Mapping[str, Any] | None, handed: Sequence[int], made: BoxSnapshot | None
    ) -> dict[str, Any]:
        loop, connection = asyncio.get_running_loop(), self._box._connection
        if message is not None:
            data = encode(self._box._family.with_dropped(message))
            if handed:
                data = data[socket.send_fds(connection, [data], list(handed)) :]
            await loop.sock_sendall(connection, data)
        if made is not None:
            self._box._pending.append(made)
            return {}
        await self._settle()
        return await self._reply()

    async def _reply(self) -> dict[str, Any]:
        return decode(await self._read(decode_length(await self._read(HEAD_SIZE))))

    async def _read(self, count: int) -> bytes:
        loop, data = asyncio.get_running_loop(), bytearray()
        while len(data) < count:
            chunk = await loop.sock_recv(self._box._connection, min(count - len(data), 1 << 20))
            if not chunk:
                raise WireError("the other side closed the connection")
            data += chunk
        return bytes(data)
