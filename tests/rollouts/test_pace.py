"""Sampling ahead: as far as the bound lets it, and nothing ever grows older than the bound."""

import pytest
from espalier.rollouts.pace import Pace
from hypothesis import given
from hypothesis import strategies as st


@given(st.integers(0, 5), st.integers(1, 40), st.randoms(use_true_random=False))
def test_nothing_is_older_than_the_bound_when_it_is_trained_and_nobody_waits_in_vain(bound, batches, dice):
    """Any interleaving of beginning and training batches, each in order."""
    pace, begun, version = Pace(bound), {}, 0
    while version < batches:
        coming = len(begun) + 1
        may_begin = coming <= batches and pace.admits(coming, version)
        assert may_begin == (coming <= min(batches, version + 1 + bound))
        can_train = version + 1 in begun
        assert may_begin or can_train, "it never stands still"
        if may_begin and (not can_train or dice.random() < 0.5):
            begun[coming] = version
        else:
            assert 0 <= pace.staleness(version + 1, begun[version + 1]) <= bound
            version += 1
    assert len(begun) == batches, "what began was trained: nothing is discarded"


def test_without_staleness_sampling_and_training_take_turns():
    pace = Pace(0)
    assert pace.admits(1, 0) and not pace.admits(2, 0) and pace.admits(2, 1)
    with pytest.raises(ValueError, match="negative"):
        Pace(-1)
