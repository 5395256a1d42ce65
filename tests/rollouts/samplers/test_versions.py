"""Versions in a sampler: immutable, held while they are used, bounded; and the salt that keeps their caches apart."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import pytest
from espalier.rollouts.samplers.base import SamplerError
from espalier.rollouts.samplers.identity import cache_salt
from espalier.rollouts.samplers.versions import VersionTable, check_files
from espalier.rollouts.types import PolicyVersion
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

BOUND = 3


def version(number: int, digest: str = "") -> PolicyVersion:
    return PolicyVersion(number, digest or f"digest {number}", Path("nowhere"), "base")


class Table(RuleBasedStateMachine):
    """Publishing, leasing and retiring in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.dropped: list[int] = []
        self.table: VersionTable[int] = VersionTable(BOUND, self.dropped.append)
        self.leases: list[tuple[int, ExitStack]] = []
        self.retired: set[int] = set()

    def held(self) -> set[int]:
        return {number for number, _ in self.leases}

    @rule(number=st.integers(0, 9))
    def publish(self, number):
        if self.table.again(version(number)):
            self.retired.discard(number)
            return
        resident = set(self.table.resident)
        if len(resident) == BOUND and resident <= self.held():
            with pytest.raises(SamplerError, match="leased") as met:
                self.table.admit(version(number), number)
            assert met.value.retryable
            return
        self.table.admit(version(number), number)
        self.retired.discard(number)
        assert self.table.latest == number

    @rule(number=st.integers(0, 9))
    def another_digest(self, number):
        if number in self.table.resident:
            with pytest.raises(SamplerError, match="immutable"):
                self.table.again(version(number, "other"))
            with pytest.raises(SamplerError, match="immutable"):
                self.table.admit(version(number, "other"), number)

    @rule(number=st.integers(0, 9))
    def lease(self, number):
        stack = ExitStack()
        if number in self.table.resident and number not in self.retired:
            assert stack.enter_context(self.table.lease(number)) == number
            self.leases.append((number, stack))
        else:
            with pytest.raises(SamplerError, match="not resident"):
                stack.enter_context(self.table.lease(number))

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def end(self, data):
        self.leases.pop(data.draw(st.integers(0, len(self.leases) - 1)))[1].close()

    @rule(number=st.integers(0, 9))
    def retire(self, number):
        resident = self.table.resident
        if resident and number in resident and number == self.table.latest:
            with pytest.raises(SamplerError, match="latest"):
                self.table.retire(number)
            return
        self.table.retire(number)
        if number in resident:
            self.retired.add(number)

    @invariant()
    def what_is_held_is_resident_and_what_is_retired_goes_with_its_last_lease(self):
        resident = set(self.table.resident)
        assert self.held() <= resident and len(resident) <= BOUND
        assert not self.retired & resident - self.held()
        for number in self.held():
            with self.table.use(number) as served:
                assert served == number


TestTable = Table.TestCase


def test_a_bound_of_nothing_is_refused_and_nothing_is_latest_before_the_first():
    with pytest.raises(ValueError, match="hold a version"):
        VersionTable(0, print)
    with pytest.raises(SamplerError, match="no version is published"):
        _ = VersionTable(1, print).latest


def test_files_are_checked_against_the_digest(tmp_path):
    with pytest.raises(SamplerError, match="cannot be read"):
        check_files(PolicyVersion(1, "0", tmp_path / "none", "base"))
    with pytest.raises(SamplerError, match="its files were changed"):
        check_files(PolicyVersion(1, "0" * 64, tmp_path, "base"))


PARTS = st.tuples(st.binary(min_size=32, max_size=32), st.text(), st.text(), st.text())


@given(PARTS, PARTS)
def test_equal_identities_and_only_they_share_a_salt(one, other):
    assert (cache_salt(*one) == cache_salt(*other)) == (one == other)
    salt = cache_salt(*one)
    assert len(salt) == 64 and set(salt) <= set("0123456789abcdef"), "vLLM takes 128 characters, none of @ / \\ NUL"


def test_a_boundary_between_the_parts_cannot_be_moved():
    assert cache_salt(b"k", "a", "bc", "d") != cache_salt(b"k", "ab", "c", "d") != cache_salt(b"k", "a", "b", "cd")
