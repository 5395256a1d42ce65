"""Rows of random tokens to train on."""

import random

from espalier.trainer.batch import Row

VOCAB = 64


def make_rows(count, seed=0, noise=0.3, longest=24):
    """Ragged multi-turn rows with advantages of both signs and log-probabilities that are a little off."""
    draw = random.Random(seed)
    rows = []
    for i in range(count):
        prompt, length = draw.randint(1, 5), draw.randint(4, longest)
        mask = [False] * prompt + [draw.random() < 0.6 for _ in range(length - 1)] + [True]
        tokens = tuple(draw.randrange(2, VOCAB) for _ in mask)
        logprobs = tuple(-4.0 + draw.gauss(0, noise) if m else 0.0 for m in mask)
        rows.append(Row(tokens, tuple(mask), logprobs, draw.gauss(0, 1), f"t{i}", f"g{i // 4}"))
    return rows


def branching_rows(count, seed=0, noise=0.3, longest=24):
    """Such rows as a tree: most begin as an earlier one does, sampled tokens included; some are equal, some a prefix of
    another. What is under the loss is drawn for each row alone.
    """
    draw = random.Random(seed)
    rows = []
    for row in make_rows(count, seed, noise, longest):
        tokens = row.tokens
        if rows and draw.random() < 0.8:
            trunk = draw.choice(rows).tokens
            at = draw.randint(2, len(trunk))
            tokens = trunk[:at] + (tokens[at:] if draw.random() < 0.8 else ())
        mask = (False, *(draw.random() < 0.6 for _ in tokens[2:]), True)
        logprobs = tuple(-4.0 + draw.gauss(0, noise) if m else 0.0 for m in mask)
        rows.append(Row(tokens, mask, logprobs, row.advantage, row.trajectory, row.group))
    return rows
