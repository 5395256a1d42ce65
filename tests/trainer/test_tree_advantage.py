"""Advantages of trees: what holds for any rewards and any way to branch."""

import math

import pytest
from espalier.rollouts.types import EndReason, Group, Trajectory
from espalier.trainer.advantage import EPSILON, advantages, deviation
from espalier.trainer.tree_advantage import Branch, branches_of, leaf_advantages, trees, turn_advantages
from hypothesis import given
from hypothesis import strategies as st

SCALES = st.sampled_from(["group", "batch", "none"])
BASELINES = st.sampled_from(["mean", "leave_one_out"])
COMPARED = st.sampled_from(["tree", "group"])
REWARD = st.floats(-10, 10, allow_nan=False).map(lambda r: round(r, 3))


@st.composite
def grown(draw, most=10):
    """The places of a group's trajectories and their rewards: any of them may have left an earlier one anywhere."""
    places = []
    for at in range(draw(st.integers(2, most))):
        turns = draw(st.integers(1, 5))
        able = [i for i in range(at) if places[i].turns - places[i].left_at > 1]
        parent = draw(st.none() | st.sampled_from(able)) if able else None
        if parent is None:
            places.append(Branch(turns))
        else:
            left = draw(st.integers(places[parent].left_at + 1, places[parent].turns - 1))
            places.append(Branch(left + turns, parent, left))
    return places, draw(st.lists(REWARD, min_size=len(places), max_size=len(places)))


GROUPS = st.lists(grown(), min_size=1, max_size=3)


def apart(groups):
    return [rewards for _, rewards in groups], [places for places, _ in groups]


@given(GROUPS, SCALES, BASELINES, COMPARED)
def test_credit_is_conserved(groups, scale, baseline, compared):
    """A turn's advantage is that of the next turn and of the branches in its place, together; the first turns of a
    group sum to zero, as its leaves do.
    """
    leaves = leaf_advantages(*apart(groups), compared, scale, baseline)
    for (places, _), values in zip(groups, leaves, strict=True):
        near = {"abs": 1e-6 * max(1.0, *map(abs, values))}
        assert math.fsum(values) == pytest.approx(0, **near)
        turns = turn_advantages(values, places)
        assert [len(own) for own in turns] == [place.turns - place.left_at for place in places]
        first = [own[0] for own, place in zip(turns, places, strict=True) if place.parent is None]
        assert math.fsum(first) == pytest.approx(0, **near)
        for at, place in enumerate(places):
            assert turns[at][-1] == pytest.approx(values[at], **near)
            for turn in range(place.left_at, place.turns - 1):
                instead = [turns[i][0] for i, p in enumerate(places) if p.parent == at and p.left_at == turn + 1]
                after = turns[at][turn + 1 - place.left_at] + math.fsum(instead)
                assert turns[at][turn - place.left_at] == pytest.approx(after, **near)


@given(GROUPS, SCALES, BASELINES)
def test_within_a_tree_the_comparison_sums_to_zero_and_between_trees_it_is_grpos(groups, scale, baseline):
    both = leaf_advantages(*apart(groups), "tree", scale, baseline)
    between = leaf_advantages(*apart(groups), "group", scale, baseline)
    assert between == advantages([rewards for _, rewards in groups], scale, baseline)
    for (places, _), values, outer in zip(groups, both, between, strict=True):
        for tree in trees(places):
            within = [values[i] - outer[i] for i in tree]
            assert math.fsum(within) == pytest.approx(0, abs=1e-6 * max(1.0, *map(abs, values)))


@given(GROUPS, SCALES, BASELINES, COMPARED, st.integers(-5, 5))
def test_adding_a_constant_to_all_rewards_changes_nothing(groups, scale, baseline, compared, shift):
    rewards, places = apart(groups)
    moved = [[r + shift for r in group] for group in rewards]
    for a, b in zip(
        leaf_advantages(rewards, places, compared, scale, baseline),
        leaf_advantages(moved, places, compared, scale, baseline),
        strict=True,
    ):
        assert a == pytest.approx(b, abs=1e-4)


@given(grown(), REWARD, SCALES, BASELINES, COMPARED)
def test_equal_rewards_give_zeros(group, reward, scale, baseline, compared):
    places, _ = group
    [values] = leaf_advantages([[reward] * len(places)], [places], compared, scale, baseline)
    assert all(value == 0 for own in turn_advantages(values, places) for value in own)


@given(st.lists(st.lists(REWARD, min_size=2, max_size=8), min_size=1, max_size=4), SCALES, BASELINES, COMPARED)
def test_where_nothing_branches_they_are_grpos_to_the_bit(rewards, scale, baseline, compared):
    places = [[Branch(1 + i % 3) for i in range(len(group))] for group in rewards]
    found = leaf_advantages(rewards, places, compared, scale, baseline)
    assert found == advantages(rewards, scale, baseline)
    for values, of in zip(found, places, strict=True):
        expected = [[value] * place.turns for value, place in zip(values, of, strict=True)]
        assert turn_advantages(values, of) == expected


@given(grown(), SCALES)
def test_a_turn_has_the_leaves_that_have_it_in_common(group, scale):
    """Against the definition, leaf by leaf: who walks through which turn."""
    places, rewards = group
    [values] = leaf_advantages([rewards], [places], "tree", scale)
    turns = turn_advantages(values, places)
    for at, place in enumerate(places):
        for turn in range(place.left_at, place.turns):
            below = [leaf for leaf in range(len(places)) if (at, turn) in path(places, leaf)]
            assert turns[at][turn - place.left_at] == pytest.approx(math.fsum(values[i] for i in below), abs=1e-9)


def path(places, leaf):
    """(trajectory that owns it, turn) of all turns of a leaf's episode."""
    place = places[leaf]
    own = {(leaf, turn) for turn in range(place.left_at, place.turns)}
    if place.parent is None:
        return own
    return own | {(owner, turn) for owner, turn in path(places, place.parent) if turn < place.left_at}


def test_two_trees_by_hand():
    """Root 0 succeeds and its branch fails, root 2 and its branch fail."""
    places = [Branch(3), Branch(3, 0, 1), Branch(2), Branch(2, 2, 1)]
    rewards = [1.0, 0.0, 0.0, 0.0]
    [values] = leaf_advantages([rewards], [places], "tree", "group")
    outer, inner = deviation(rewards) + EPSILON, deviation([1.0, 0.0]) + EPSILON
    expected = [0.75 / outer + 0.5 / inner, -0.25 / outer - 0.5 / inner, -0.25 / outer, -0.25 / outer]
    assert values == pytest.approx(expected)
    turns = turn_advantages(values, places)
    assert turns[0] == pytest.approx([0.5 / outer, expected[0], expected[0]]), "the trunk is compared between trees"
    assert turns[1] == pytest.approx([expected[1]] * 2) and turns[2] == pytest.approx([-0.5 / outer, -0.25 / outer])


def test_a_branch_without_its_parent_is_refused():
    def made(id, **more):
        return Trajectory(id, "g", "t", "", "e", 0, (), (), 0.0, EndReason.DONE, **more)

    orphan = made("g/1")
    object.__setattr__(orphan, "parent", "g/0")
    assert branches_of(Group("g", "t", (made("g/0"), orphan)))[1].parent == 0
    for trajectories in ((orphan,), (orphan, made("g/0"))):
        with pytest.raises(ValueError, match="g/1 left g/0, which is not in group g before it"):
            branches_of(Group("g", "t", trajectories))
