"""An event loop of its own thread, for code that blocks: Hugging Face's training loop calls, the episodes run there.

Always true: every call has a deadline; at the deadline the work is cancelled and given a moment to end.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from concurrent.futures import CancelledError, Future
from typing import Any, TypeVar

from .errors import UserError

T = TypeVar("T")

GRACE_SECONDS = 30.0


class Overdue(UserError, TimeoutError):
    """What was asked for took longer than anything it waits for may."""


class Background:
    """Runs coroutines for threads that have no loop."""

    def __init__(self, name: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=name, daemon=True)
        self._thread.start()

    def start(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Begin `work` and go on; `result` waits for it."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def call(self, work: Coroutine[Any, Any, T], deadline_s: float) -> T:
        """The result of `work`. Raises `Overdue` when it takes longer than `deadline_s` seconds."""
        return self.result(self.start(asyncio.wait_for(work, deadline_s)), deadline_s)

    def result(self, future: Future[T], deadline_s: float) -> T:
        """What was started, when it is done. Raises `Overdue`, and cancels it, after `deadline_s` seconds (and a moment
        to end).
        """
        try:
            return future.result(deadline_s + GRACE_SECONDS)
        except (CancelledError, TimeoutError) as error:
            future.cancel()
            raise Overdue(
                f"the rollouts did not finish within {deadline_s:.0f} s, which their budgets allow; see what the "
                "sampler and the environments do, then go on (a run: with --resume)"
            ) from error
        except BaseException:
            future.cancel()  # the caller was interrupted: nobody waits for it any more
            raise

    def close(self) -> None:
        """Stop the loop; what still runs there is abandoned."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(GRACE_SECONDS)
        if not self._thread.is_alive():
            self._loop.close()
