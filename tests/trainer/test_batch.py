"""Rows: every sampled token under the loss exactly once, with its own log-probability."""

import math

import pytest
import torch
from espalier.rollouts.types import EndReason, Group, TokenSequence, TokenSpan, Trajectory
from espalier.trainer.batch import collate, rows_of, rows_of_groups
from espalier.trainer.correction import importance_ratio
from hypothesis import given
from hypothesis import strategies as st


@st.composite
def sequences(draw):
    """A prompt, then sampled (trained or cut), tool and template spans in any order."""
    spans, at = [TokenSpan(0, draw(st.integers(1, 5)), "prompt")], 0
    at = spans[0].stop
    for _ in range(draw(st.integers(0, 6))):
        stop = at + draw(st.integers(1, 4))
        origin = draw(st.sampled_from(["sampled", "sampled", "tool", "template"]))
        sampled = origin == "sampled"
        trained = draw(st.booleans()) if sampled else True
        spans.append(TokenSpan(at, stop, origin, 3 if sampled else None, trained))
        at = stop
    count = sum(s.stop - s.start for s in spans if s.origin == "sampled")
    logprobs = tuple(-float(i + 1) for i in range(count))
    return TokenSequence(tuple(range(10, 10 + at)), tuple(spans), logprobs)


def trajectory(seqs, reward=1.0, id="t"):
    return Trajectory(id, "g", "task", "f", "env", 0, tuple(seqs), (), reward, EndReason.DONE)


@given(st.lists(sequences(), min_size=1, max_size=3))
def test_every_trained_token_stands_once_with_its_logprob(seqs):
    rows = rows_of(trajectory(seqs), 0.5)
    got = [(tok, lp) for row in rows for tok, m, lp in zip(row.tokens, row.mask, row.logprobs, strict=True) if m]
    wanted = []
    for sequence in seqs:
        recorded = iter(sequence.logprobs)
        pairs = zip(sequence.tokens, sequence.sampled_mask(), sequence.trained_mask(), strict=True)
        for token, sampled, trained in pairs:
            logprob = next(recorded) if sampled else None
            if trained:
                wanted.append((token, logprob))
    assert got == wanted
    assert all(row.mask[-1] for row in rows), "nothing behind the last trained token"
    assert all(row.advantage == 0.5 and row.trajectory == "t" for row in rows)
    assert all(lp == 0.0 for row in rows for m, lp in zip(row.mask, row.logprobs, strict=True) if not m)


@given(st.lists(sequences(), min_size=1, max_size=4))
def test_collating_loses_nothing(seqs):
    rows = rows_of(trajectory(seqs), -1.0)
    if not rows:
        return
    tensors = collate(rows, pad=0, device=torch.device("cpu"))
    tokens = torch.cat([tensors["prompt_ids"], tensors["completion_ids"]], 1)
    real = torch.cat([tensors["prompt_mask"], tensors["completion_mask"]], 1)
    for i, row in enumerate(rows):
        n = len(row.tokens)
        assert tuple(tokens[i, :n].tolist()) == row.tokens
        assert real[i].sum() == n
        assert tensors["tool_mask"][i].sum() == row.trained
        kept = tensors["sampling_per_token_logps"][i, : n - 1]
        assert kept.tolist() == pytest.approx(list(row.logprobs[1:]))
    assert tokens.size(1) == max(len(row.tokens) for row in rows)


def test_forks_share_the_advantage_of_their_trajectory():
    one = TokenSequence((1, 2, 3), (TokenSpan(0, 1, "prompt"), TokenSpan(1, 3, "sampled", 1)), (-0.1, -0.2))
    two = TokenSequence((1, 9, 4), (TokenSpan(0, 2, "prompt"), TokenSpan(2, 3, "sampled", 1)), (-0.3,))
    group = Group("g", "task", (trajectory([one, two], 1.0, "a"), trajectory([one], 0.0, "b")))
    rows = rows_of_groups([group], "none")
    assert [(row.trajectory, row.advantage) for row in rows] == [("a", 0.5), ("a", 0.5), ("b", -0.5)]
    assert sum(row.trained for row in rows) == 5
    assert [row.share for row in rows] == [2 / 3, 1 / 3, 1.0], "by trained tokens; a trajectory weighs 1"


def test_a_sequence_must_have_a_prompt():
    bare = TokenSequence((1, 2), (TokenSpan(0, 2, "sampled", 1),), (-0.1, -0.2))
    with pytest.raises(ValueError, match="prompt"):
        rows_of(trajectory([bare]), 1.0)


@pytest.mark.parametrize("mode", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"])
def test_importance_weights(mode):
    policy = torch.tensor([[-1.0, -1.0, -1.0], [-1.0, -1.0, -1.0]])
    behaviour = torch.tensor([[-1.0, -1.0 - math.log(2), 5.0], [-1.0 - math.log(8), -1.0, -1.0]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    weights = importance_ratio(policy, behaviour, mask, mode, cap=3.0)
    expected = {
        "token_truncate": [[1, 2, 1], [3, 1, 1]],
        "token_mask": [[1, 2, 1], [0, 1, 1]],
        "sequence_truncate": [[2], [3]],
        "sequence_mask": [[2], [0]],
    }[mode]
    assert torch.allclose(weights, torch.tensor(expected, dtype=torch.float32))


@given(st.sampled_from(["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]))
def test_equal_policies_weigh_one(mode):
    logps = torch.randn(3, 4)
    weights = importance_ratio(logps, logps, torch.ones(3, 4), mode, cap=2.0, floor=0.5)
    assert torch.equal(weights, torch.ones_like(weights))
