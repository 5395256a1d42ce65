"""Small functions that generated tasks are about: what each does, a correct text, ways to get it wrong, and inputs.

A mistake is a replacement in the correct text; a test of this table runs every mistake and sees it fail.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Function:
    """One function: `source` has NAME for its name; `draw` makes the arguments of one test."""

    stem: str
    parameters: str
    says: str
    source: str
    mistakes: tuple[tuple[str, str], ...]
    draw: Callable[[random.Random], tuple[Any, ...]]


def _numbers(rng: random.Random) -> list[int]:
    return [rng.randrange(-9, 10) for _ in range(rng.randrange(1, 7))]


def _word(rng: random.Random) -> str:
    return "".join(rng.choice("abcdeinorst") for _ in range(rng.randrange(1, 8)))


def _words(rng: random.Random) -> list[str]:
    return [_word(rng) for _ in range(rng.randrange(1, 6))]


FUNCTIONS = (
    Function(
        "sum_squares", "numbers", "the sum of the squares of the numbers in a list",
        "def NAME(numbers):\n    return sum(n * n for n in numbers)\n",
        (("n * n", "n + n"), ("sum(n * n for n in numbers)", "sum(numbers) ** 2")),
        lambda rng: (_numbers(rng),),
    ),
    Function(
        "count_even", "numbers", "how many numbers of a list are even",
        "def NAME(numbers):\n    return sum(1 for n in numbers if n % 2 == 0)\n",
        (("== 0", "== 1"), ("sum(1 for n", "sum(n for n")),
        lambda rng: (_numbers(rng),),
    ),
    Function(
        "largest_gap", "numbers", "the largest difference between two neighbours of a list, 0 for fewer than two",
        "def NAME(numbers):\n    best = 0\n    for a, b in zip(numbers, numbers[1:]):\n"
        "        best = max(best, abs(a - b))\n    return best\n",
        (("abs(a - b)", "a - b"), ("numbers[1:]", "numbers[2:]"), ("max(best", "min(best")),
        lambda rng: (_numbers(rng),),
    ),
    Function(
        "clamp_all", "numbers, low, high", "the numbers of a list, each brought between low and high",
        "def NAME(numbers, low, high):\n    return [min(max(n, low), high) for n in numbers]\n",
        (("min(max(n, low), high)", "max(max(n, low), high)"), ("max(n, low)", "max(n, high)")),
        lambda rng: (_numbers(rng), -rng.randrange(1, 5), rng.randrange(1, 5)),
    ),
    Function(
        "running_max", "numbers", "for each place of a list the largest number up to there",
        "def NAME(numbers):\n    found = []\n    for n in numbers:\n"
        "        found.append(n if not found else max(found[-1], n))\n    return found\n",
        (("max(found[-1], n)", "min(found[-1], n)"), ("max(found[-1], n)", "max(found[0], n)")),
        lambda rng: (_numbers(rng),),
    ),
    Function(
        "count_vowels", "text", "how many vowels (a, e, i, o, u) a text has",
        'def NAME(text):\n    return sum(1 for c in text if c in "aeiou")\n',
        (('"aeiou"', '"aeio"'), ("if c in", "if c not in")),
        lambda rng: (_word(rng) + rng.choice(("", "u", "o", "e")),),
    ),
    Function(
        "longest_word", "words", "the longest word of a list, the first one where several are",
        "def NAME(words):\n    best = words[0]\n    for word in words:\n"
        "        if len(word) > len(best):\n            best = word\n    return best\n",
        (("> len(best)", "< len(best)"), ("> len(best)", ">= len(best)")),
        lambda rng: (_words(rng),),
    ),
    Function(
        "initials", "words", "the first letters of the words of a list, joined, in capitals",
        'def NAME(words):\n    return "".join(word[0] for word in words).upper()\n',
        (("word[0]", "word[-1]"), (".upper()", "")),
        lambda rng: (_words(rng),),
    ),
    Function(
        "is_sorted", "numbers", "whether no number of a list is smaller than the one before it",
        "def NAME(numbers):\n    return all(a <= b for a, b in zip(numbers, numbers[1:]))\n",
        (("a <= b", "a < b"), ("all(", "any(")),
        lambda rng: (sorted(_numbers(rng)) if rng.random() < 0.6 else _numbers(rng),),
    ),
    Function(
        "tally", "words", "a dict of how often each word of a list occurs",
        "def NAME(words):\n    counts = {}\n    for word in words:\n"
        "        counts[word] = counts.get(word, 0) + 1\n    return counts\n",
        (("counts.get(word, 0) + 1", "1"), ("counts.get(word, 0) + 1", "counts.get(word, 1) + 1")),
        lambda rng: ((w := _words(rng)) + w[:1],),
    ),
    Function(
        "rotate", "items, steps", "the items of a list, the first `steps` of them moved to the end",
        "def NAME(items, steps):\n    steps %= len(items)\n    return items[steps:] + items[:steps]\n",
        (("items[steps:] + items[:steps]", "items[:steps] + items[steps:]"), ("steps %= len(items)", "steps += 1")),
        lambda rng: ([*_numbers(rng), 1], rng.randrange(0, 9)),
    ),
    Function(
        "digits_sum", "number", "the sum of the decimal digits of a whole number, its sign left out",
        "def NAME(number):\n    return sum(int(d) for d in str(abs(number)))\n",
        (("sum(int(d)", "max(int(d)"), ("str(abs(number))", "str(abs(number))[1:]")),
        lambda rng: (rng.randrange(-9999, 10_000),),
    ),
)  # fmt: skip
