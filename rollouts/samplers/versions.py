"""Which versions a sampler holds, and who holds them.

Always true: a number stands for one digest for ever; a version that is leased or has a request running is never
dropped; a retired version takes no new lease and is dropped when the last hold ends; at most `bound` versions are
resident.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Generic, TypeVar

from ..digest import folder_digest
from ..types import PolicyVersion
from .base import SamplerError

T = TypeVar("T")


class VersionTable(Generic[T]):
    """The resident versions of one sampler, each with what serves it (`T`). May be used from any thread."""

    def __init__(self, bound: int, drop: Callable[[T], None]) -> None:
        """`drop` frees what served a version; it is called under the table's lock and must not wait."""
        if bound < 1:
            raise ValueError("a sampler must be able to hold a version")
        self._bound, self._free = bound, drop
        self._lock = threading.Lock()
        self._digests: dict[int, str] = {}
        self._served: dict[int, T] = {}  # in the order they were published
        self._holds: dict[int, int] = {}  # leases and running requests by version
        self._retiring: set[int] = set()
        self._latest: int | None = None

    @property
    def latest(self) -> int:
        """The number of the version published last. Raises `SamplerError` before the first."""
        if self._latest is None:
            raise SamplerError("no version is published yet; publish one first.")
        return self._latest

    @property
    def resident(self) -> dict[int, T]:
        """The resident versions, oldest first, and what serves them."""
        with self._lock:
            return dict(self._served)

    @property
    def held(self) -> dict[int, int]:
        """Leases and running requests, by version."""
        with self._lock:
            return dict(self._holds)

    def again(self, version: PolicyVersion) -> bool:
        """Whether `version` is resident already; then it is the latest again, and needs no loading.

        Raises `SamplerError` when its number was published with another digest.
        """
        with self._lock:
            self._check(version)
            if version.number not in self._served:
                return False
            self._latest = version.number
            self._retiring.discard(version.number)
            return True

    def admit(self, version: PolicyVersion, served: T) -> None:
        """Make `version` resident and the latest; when there is no room, the oldest one that nobody holds goes.

        Raises `SamplerError` when its number was published with another digest, or all resident versions are held.
        """
        with self._lock:
            self._check(version)
            if version.number not in self._served:
                self._make_room(version.number)
            self._digests[version.number] = version.digest
            self._served[version.number] = served
            self._latest = version.number

    @contextmanager
    def lease(self, number: int) -> Iterator[int]:
        """Hold a version while an episode uses it. Raises `SamplerError` when it is not resident or being retired."""
        self._hold(number, new=True)
        try:
            yield number
        finally:
            self._release(number)

    @contextmanager
    def use(self, number: int) -> Iterator[T]:
        """What serves a version, held while a request runs; also while it is being retired, as long as it is leased."""
        served = self._hold(number, new=False)
        try:
            yield served
        finally:
            self._release(number)

    def retire(self, number: int) -> None:
        """Let a version go: at once when nobody holds it, otherwise when the last hold ends. Unknown versions are
        ignored. Raises `SamplerError` for the latest.
        """
        with self._lock:
            if number == self._latest and number in self._served:
                raise SamplerError(f"version {number} is the latest; publish its successor before retiring it.")
            if number in self._served:
                self._retiring.add(number)
                if not self._holds.get(number):
                    self._drop(number)

    def clear(self) -> None:
        """Forget all; the sampler is closing and frees what served them itself."""
        with self._lock:
            self._served.clear()

    def _check(self, version: PolicyVersion) -> None:
        known = self._digests.get(version.number)
        if known is not None and known != version.digest:
            raise SamplerError(
                f"version {version.number} was published with another digest; a version is immutable, use a new number."
            )

    def _make_room(self, number: int) -> None:
        if len(self._served) < self._bound:
            return
        free = [n for n in self._served if not self._holds.get(n)]
        if not free:
            raise SamplerError(
                f"version {number} has no room: all {self._bound} resident versions are leased; "
                "end their episodes or raise max_versions.",
                retryable=True,
            )
        self._drop(free[0])

    def _hold(self, number: int, *, new: bool) -> T:
        with self._lock:
            served = self._served.get(number)
            if served is None or (new and number in self._retiring):
                held = ", ".join(map(str, self._served)) or "none"
                raise SamplerError(f"version {number} is not resident (resident: {held}); publish it first.")
            self._holds[number] = self._holds.get(number, 0) + 1
            return served

    def _release(self, number: int) -> None:
        with self._lock:
            self._holds[number] -= 1
            if not self._holds[number]:
                del self._holds[number]
                if number in self._retiring:
                    self._drop(number)

    def _drop(self, number: int) -> None:
        served = self._served.pop(number, None)
        self._retiring.discard(number)
        if served is not None:
            self._free(served)


class HoldsVersions(Generic[T]):
    """What a sampler that keeps its versions in a table has of `Sampler`. A subclass sets `_table`."""

    _table: VersionTable[T]

    @property
    def latest(self) -> int:
        """The number of the version published last. Raises `SamplerError` before the first."""
        return self._table.latest

    @property
    def versions(self) -> tuple[int, ...]:
        """The resident versions, oldest first."""
        return tuple(self._table.resident)

    def lease(self, version: int) -> AbstractContextManager[int]:
        """Hold `version` while an episode uses it. Raises `SamplerError` when it is not resident or being retired."""
        return self._table.lease(version)

    async def retire(self, version: int) -> None:
        """Let `version` go: at once when nobody holds it, otherwise when the last lease ends. Unknown versions are
        ignored.
        """
        self._table.retire(version)


def check_files(version: PolicyVersion) -> None:
    """Raise `SamplerError` unless the files of `version` can be read and have its digest."""
    try:
        digest = folder_digest(version.path)
    except OSError as error:
        raise SamplerError(f"version {version.number} cannot be read: {error}") from None
    if digest != version.digest:
        raise SamplerError(
            f"version {version.number} at {version.path} has digest {digest[:12]}, expected {version.digest[:12]}: "
            "its files were changed; publish it as a new version."
        )
