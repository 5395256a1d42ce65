"""The program of a worker process: environments in threads, served to `envprocess` over a socket. No torch here.

Always true: a call is answered once, by its number, as soon as it is done, whatever else runs; the process ends when
the other end of the socket does, and takes what its environments started in its process group along.
"""

from __future__ import annotations

import asyncio
import os
import pickle
import signal
import socket
import sys
from functools import lru_cache
from typing import Any

from ..envs.core import AgentEnv, EnvFailure
from .envpool import EnvRaised
from .graph.statepool import ThreadStatePool
from .graph.states import STATE_GONE, Kept, plain_opening, plain_step
from .link import Link
from .recipe import EnvRecipe

STARTS_KEPT = 64
"""Seeds and options of resets that are kept unpickled."""
START_BYTES = 1 << 20
"""Pickled bytes up to which one is kept."""


class _Server:
    """See the module. `reset`, `step`, `begin`, `go_on` and `fork` are calls; the rest is done at once."""

    def __init__(self) -> None:
        self.link = Link(self._received, self._orphaned)
        self.done = asyncio.Event()
        self._pool: ThreadStatePool | None = None
        self._envs: dict[int, AgentEnv | None] = {}
        # a group's episodes start alike: what starts them is unpickled once, so that its task is one object
        self._unpickled = lru_cache(maxsize=STARTS_KEPT)(pickle.loads)
        self._tasks: set[asyncio.Task[None]] = set()

    def _received(self, message: tuple[Any, ...]) -> None:
        operation, *arguments = message
        match operation:
            case "open":
                self._open(*arguments)
            case "ping":
                self.link.send("pong")
            case "give" | "drop":
                self._leave(*arguments, fit=operation == "give")
            case "forget":
                if self._pool is not None:
                    self._pool.forget(None, arguments[0])
            case "close":
                self._start(self._close())
            case _:
                if operation in ("reset", "begin", "go_on", "fork"):
                    self._envs.setdefault(arguments[1], None)
                self._start(self._answer(operation, *arguments))

    def _start(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _open(self, path: list[str], recipe: bytes, deadline_s: float, terse: bool) -> None:
        """The first message. `path`: where the other process finds its modules."""
        sys.path[:] = path
        try:
            followed: EnvRecipe = pickle.loads(recipe)  # noqa: S301 - from the process that started this one
            followed.load()
        except Exception as error:
            self.link.send("failed", f"{type(error).__name__}: {error}")
            return
        self._pool = ThreadStatePool(followed.make, deadline_s=deadline_s, terse=terse)
        self.link.send("ready")

    async def _answer(self, operation: str, number: int, handle: int, payload: bytes) -> None:
        try:
            result = await self._call(operation, handle, payload)
            self.link.send("done", number, result)
        except TimeoutError as error:
            self.link.send("timeout", number, str(error))
        except EnvFailure as error:
            self.link.send("failure", number, error.kind, str(error).removeprefix(f"{error.kind}: "))
        except EnvRaised as error:
            self.link.send("raised", number, str(error))
        except Exception as error:  # what was asked or answered cannot be sent: its sentence can
            self.link.send("raised", number, f"{type(error).__name__}: {error}")

    async def _call(self, operation: str, handle: int, payload: bytes) -> Any:
        assert self._pool is not None
        if operation == "fork":
            await self._fork(self._pool, handle, *pickle.loads(payload))  # noqa: S301 - from our own process
            return None
        taken = self._envs[handle]
        if taken is None:
            taken = await self._pool.take()
            if handle not in self._envs:  # nobody waits for it any more
                self._pool.give(taken)
                return None
            self._envs[handle] = taken
        if operation in ("reset", "begin"):
            seed, options, *keep = (self._unpickled if len(payload) <= START_BYTES else pickle.loads)(payload)
            if keep:
                return await self._pool.begin(taken, seed, dict(options), *keep)
            return plain_opening(await self._pool.reset(taken, seed, dict(options)))
        said = pickle.loads(payload)  # noqa: S301 - from the process that started this one
        if operation == "go_on":
            return await self._pool.go_on(taken, *said)
        return plain_step(await self._pool.step(taken, *said))

    async def _fork(self, pool: ThreadStatePool, handle: int, origin: int, at: Kept) -> None:
        taken = self._envs.get(origin)
        if taken is None:
            raise EnvFailure(STATE_GONE, "there is no environment to branch from")
        made = await pool.fork(taken, at)
        if handle in self._envs:
            self._envs[handle] = made
        else:  # nobody waits for it any more
            pool.drop(made)

    def _leave(self, handle: int, *, fit: bool) -> None:
        env = self._envs.pop(handle, None)
        if env is not None and self._pool is not None:
            (self._pool.give if fit else self._pool.drop)(env)

    async def _close(self) -> None:
        if self._pool is not None:
            await self._pool.close()
        self.done.set()

    def _orphaned(self) -> None:
        """The other end is gone: nobody needs what runs here, nor what the environments have started."""
        if os.getpgrp() == os.getpid():
            os.killpg(0, signal.SIGKILL)
        os._exit(1)


async def _serve(end: socket.socket) -> None:
    server = _Server()
    await asyncio.get_running_loop().create_connection(lambda: server.link, sock=end)
    await server.done.wait()


def main() -> None:
    """Serve the socket whose descriptor is the first argument."""
    # the terminal's interrupt is for the process that started this one; a handler, unlike SIG_IGN, is not inherited
    signal.signal(signal.SIGINT, lambda *_: None)
    asyncio.run(_serve(socket.socket(fileno=int(sys.argv[1]))))
    sys.stdout.flush()
    os._exit(0)  # threads that hang do not keep it


if __name__ == "__main__":
    main()
