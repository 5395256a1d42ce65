"""What the tree benchmark trains on: four sets of rows of random tokens, each with its own way of sharing prefixes.

`scale` divides all lengths. Always true: rows that part differ from there on; a row's prompt and the answers of its
environment are not under the loss; advantages have both signs.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from espalier.trainer.batch import Row

VOCAB = 8192
Piece = tuple[list[int], bool]
"""Tokens, and whether they were sampled."""


def _piece(draw: random.Random, length: float, sampled: bool) -> Piece:
    return [draw.randrange(VOCAB) for _ in range(max(2, round(length)))], sampled


def _rows(draw: random.Random, every: Sequence[Sequence[Piece]]) -> list[Row]:
    found = []
    for i, pieces in enumerate(every):
        tokens = tuple(token for piece, _ in pieces for token in piece)
        mask = [sampled for piece, sampled in pieces for _ in piece]
        stop = len(mask) - mask[::-1].index(True)
        found.append(
            Row(
                tokens[:stop],
                tuple(mask[:stop]),
                (0.0,) * stop,
                draw.choice((-1, 1)) * draw.uniform(0.5, 1.5),
                f"t{i}",
                "g",
            )
        )
    return found


def group8(scale: float = 1) -> list[Row]:
    """A prompt of 512 tokens with eight answers of 64 to 192: what GRPO trains on without tools."""
    draw = random.Random(1)
    prompt = _piece(draw, 512 / scale, False)
    return _rows(draw, [[prompt, _piece(draw, (64 + 128 * i / 7) / scale, True)] for i in range(8)])


def bin16(scale: float = 1) -> list[Row]:
    """A prompt of 640 tokens, then four turns that each branch in two: 64 tokens sampled, 64 of the environment."""
    draw = random.Random(2)
    paths: list[list[Piece]] = [[_piece(draw, 640 / scale, False)]]
    for _ in range(4):
        paths = [
            [*path, _piece(draw, 64 / scale, True), _piece(draw, 64 / scale, False)] for path in paths for _ in range(2)
        ]
    return _rows(draw, [[*path, _piece(draw, 2, True)] for path in paths])


def irr16(scale: float = 1) -> list[Row]:
    """Sixteen episodes of nine turns and an answer, each branching off an earlier one at a turn drawn at random; turns
    of 24 to 104 sampled tokens and as many of the environment.
    """
    draw = random.Random(3)
    prompt = _piece(draw, 512 / scale, False)
    paths: list[list[Piece]] = []
    for _ in range(16):
        path = list(draw.choice(paths)[: 1 + 2 * draw.randint(3, 9)]) if paths else [prompt]
        while len(path) < 19:
            path += [
                _piece(draw, draw.uniform(24, 104) / scale, True),
                _piece(draw, draw.uniform(24, 104) / scale, False),
            ]
        paths.append([*path[:19], _piece(draw, draw.uniform(24, 104) / scale, True)])
    return _rows(draw, paths)


def none8(scale: float = 1) -> list[Row]:
    """Eight rows of 640 tokens that share none, of one length, so that nothing is padding."""
    draw = random.Random(4)
    return _rows(
        draw, [[([i, *range(1, round(512 / scale))], False), _piece(draw, 128 / scale, True)] for i in range(8)]
    )


WORKLOADS: dict[str, Callable[[float], list[Row]]] = {
    "group8": group8,
    "bin16": bin16,
    "irr16": irr16,
    "none8": none8,
}
