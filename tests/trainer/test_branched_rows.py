"""Rows of groups that grew as trees: every sampled token under the loss once, and the gradient that of whole paths."""

import dataclasses
import random

import pytest
import torch
from espalier.rollouts.types import EndReason, Group, TokenSequence, TokenSpan, Trajectory, Turn
from espalier.trainer.batch import TOKEN_MEAN, Row, collate, dealt, rows_of, rows_of_groups
from espalier.trainer.grpo.config import LOSS_TYPES
from espalier.trainer.tree_advantage import branches_of, leaf_advantages
from random_rows import VOCAB
from updates import changed, gradient, make

CPU = torch.device("cpu")
TAKES_TURNS = sorted(set(LOSS_TYPES) - {"vespo"})


def episode(id, reward, turns, draw, parent=None, left_at=0, length=3, cut=False):
    """A trajectory of random tokens; a branch begins as its parent does. `cut`: its last turn is masked."""
    if parent is None:
        tokens, spans, logprobs, made = (
            [draw.randrange(2, VOCAB) for _ in range(4)],
            [TokenSpan(0, 4, "prompt")],
            [],
            [],
        )
    else:
        sequence, made = parent.sequences[0], list(parent.turns[:left_at])
        at = parent.turns[left_at].span
        spans = [dataclasses.replace(s, trained=s.origin != "sampled") for s in sequence.spans[:at]]
        tokens = list(sequence.tokens[: spans[-1].stop])
        logprobs = list(sequence.logprobs[: sum(s.stop - s.start for s in spans if s.origin == "sampled")])
    for number in range(left_at, turns):
        if number and spans[-1].origin == "sampled":
            spans.append(TokenSpan(len(tokens), len(tokens) + 2, "tool"))
            tokens += [draw.randrange(2, VOCAB) for _ in range(2)]
        made.append(Turn(0, len(spans), "", (), ()))
        new = draw.randint(1, length)
        spans.append(TokenSpan(len(tokens), len(tokens) + new, "sampled", 0, not (cut and number == turns - 1)))
        tokens += [draw.randrange(2, VOCAB) for _ in range(new)]
        logprobs += [-4.0 + draw.gauss(0, 0.3) for _ in range(new)]
    more = {} if parent is None else {"parent": parent.id, "left_at": left_at}
    sequence = TokenSequence(tuple(tokens), tuple(spans), tuple(logprobs))
    return Trajectory(id, "g", "t", "", "e", 0, (sequence,), tuple(made), reward, EndReason.DONE, **more)


def tree(seed=0, cut=False):
    """Two trees of five leaves, one branch of a branch."""
    draw = random.Random(seed)
    a = episode("g/0", 1.0, 4, draw)
    b = episode("g/1", 0.0, 2, draw)
    c = episode("g/2", 0.0, 5, draw, a, 1)
    d = episode("g/3", 0.5, 4, draw, c, 3, cut=cut)
    e = episode("g/4", 1.0, 3, draw, b, 1, length=8)
    return Group("g", "t", (a, b, c, d, e))


@pytest.mark.parametrize("token_mean", [True, False])
@pytest.mark.parametrize("cut", [True, False])
def test_every_sampled_token_is_under_the_loss_once_with_what_was_recorded(token_mean, cut):
    group = tree(cut=cut)
    rows = rows_of_groups([group], "group", token_mean=token_mean)
    own = sum(t.sampled_tokens for t in group.trajectories) - (cut_tokens(group) if cut else 0)
    assert sum(row.trained for row in rows) == own
    for row in rows:
        found = next(t for t in group.trajectories if t.id == row.trajectory)
        sampled = iter(found.sequences[0].logprobs)
        recorded = [next(sampled) if s else 0.0 for s in found.sequences[0].sampled_mask()]
        first = found.sequences[0].spans[found.turns[found.left_at].span].start
        for at, under in enumerate(row.mask):
            assert not under or at >= first
            assert row.logprobs[at] == (recorded[at] if under else 0.0)
            assert under or row.advantages[at] == 0.0
    assert len({row.trajectory for row in rows}) == len(group.trajectories) - cut


def cut_tokens(group):
    return sum(s.stop - s.start for s in group.trajectories[3].sequences[0].spans[-1:])


def test_groups_without_branches_have_the_rows_that_they_had():
    group = tree()
    chains = Group("g", "t", tuple(t for t in group.trajectories if t.parent is None))
    for token_mean in (True, False):
        rows = rows_of_groups([chains, group], "group", token_mean=token_mean)
        assert rows[:2] == rows_of_groups([chains], "group") and not any(row.advantages for row in rows[:2])
        assert all(row.advantages for row in rows[2:])


@pytest.mark.parametrize("loss", TAKES_TURNS)
@pytest.mark.parametrize("shared", ["flat", "tree"])
def test_the_gradient_is_that_of_training_each_leafs_whole_path(base, tmp_path, loss, shared):
    """On the policy's own log-probabilities nothing is clipped, and the loss is linear in the advantage. Losses that
    divide by tokens count those of the tree once, which is one factor for all.
    """
    trainer = make(base, tmp_path, loss=loss, shared_prefix=shared, micro_batch=3)
    group = tree()
    rows = recorded_by(trainer, rows_of_groups([group], "group", token_mean=loss in TOKEN_MEAN))
    whole = recorded_by(trainer, paths(group))
    _, once = gradient(trainer, rows)
    _, each = gradient(trainer, whole)
    tokens, of_paths = sum(row.trained for row in rows), sum(row.trained for row in whole)
    factor = tokens / of_paths if loss in ("bnpo", "dapo", "cispo") else 1.0
    assert changed(once * factor, each) < 1e-5
    naive = [dataclasses.replace(row, advantages=(), advantage=max(row.advantages, key=abs)) for row in rows]
    assert changed(gradient(trainer, naive)[1] * factor, each) > 1e-2, "control: one advantage for a whole row"


def paths(group):
    """What would be trained without sharing: every leaf's episode whole, with the leaf's advantage."""
    [values] = leaf_advantages([group.rewards], [branches_of(group)])
    rows = []
    for t, value in zip(group.trajectories, values, strict=True):
        sequence = t.sequences[0]
        spans = tuple(dataclasses.replace(span, trained=True) for span in sequence.spans)
        alone = dataclasses.replace(t, parent=None, left_at=0, sequences=(dataclasses.replace(sequence, spans=spans),))
        rows += rows_of(alone, value)
    return rows


def recorded_by(trainer, rows):
    """The rows with the log-probabilities that the trainer's policy gives them."""
    with torch.no_grad():
        logps, _ = trainer._score(trainer.model, collate(rows, 0, CPU))
    return [
        dataclasses.replace(row, logprobs=(0.0, *(float(v) for v in logps[i, : len(row.tokens) - 1])))
        for i, row in enumerate(rows)
    ]


def test_a_forked_branch_shares_its_weight_among_its_rows():
    """A template that drops thinking: a trajectory of two sequences; together they count as one."""
    one = TokenSequence((1, 2, 3, 4), (TokenSpan(0, 1, "prompt"), TokenSpan(1, 4, "sampled", 0)), (-1.0,) * 3)
    two = TokenSequence((1, 2), (TokenSpan(0, 1, "prompt"), TokenSpan(1, 2, "sampled", 0)), (-1.0,))
    turns = (Turn(0, 1, "", (), ()), Turn(1, 1, "", (), ()))
    forked = Trajectory("g/0", "g", "t", "", "e", 0, (one, two), turns, 1.0, EndReason.DONE)
    rows = rows_of(forked, 0.0, [5.0, 7.0])
    assert [row.share for row in rows] == [0.75, 0.25]
    assert rows[0].advantages == (0.0, 5.0, 5.0, 5.0) and rows[1].advantages == (0.0, 7.0)
    assert rows[1].by_share().advantages == (0.0, 1.75) and rows[0].by_share().advantage == 0.0


def test_tensors_hold_one_advantage_a_token_where_a_row_has_them():
    plain = Row((1, 2, 3), (False, True, True), (0.0, -1.0, -1.0), 0.5, "a", "g")
    turns = Row(
        (1, 2, 3, 4, 5), (False, True, True, False, True), (0.0,) * 5, 0.0, "b", "g", 1.0, (0, 2.0, 2.0, 0, -1.0)
    )
    assert collate([plain], 0, CPU)["advantages"].shape == (1,)
    found = collate([plain, turns], 0, CPU)
    assert found["advantages"].tolist() == [[0.5] * 4, [2.0, 2.0, 0.0, -1.0]]
    assert found["advantages"].shape == found["completion_ids"].shape
    [filler] = dealt([[turns]], 1, 2)
    assert collate(filler, 0, CPU)["advantages"].shape == (1,)


def test_a_branch_that_would_train_its_parents_turns_is_refused():
    parent, _, branch, *_ = tree().trajectories
    spans = tuple(dataclasses.replace(span, trained=True) for span in branch.sequences[0].spans)
    again = (dataclasses.replace(branch.sequences[0], spans=spans),)
    with pytest.raises(ValueError, match="would train turns of its parent g/0 again"):
        dataclasses.replace(branch, sequences=again)
    for wrong in ({"left_at": 9}, {"left_at": 0}, {"parent": None}):
        with pytest.raises(ValueError, match="cannot have left"):
            dataclasses.replace(branch, **wrong)
    assert parent.sampled_tokens == len(parent.sequences[0].logprobs) and parent.inherited_tokens == 0
