"""English words for questions: the keys of needles ("calm-lantern") and the words that cwe asks to count.

words.txt holds adjectives, an empty line, and nouns. Prompts depend on their order: do not edit it.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np

ADJECTIVES, NOUNS = (tuple(part.split()) for part in Path(__file__).with_name("words.txt").read_text().split("\n\n"))


@cache
def words() -> tuple[str, ...]:
    """All words, in an arbitrary fixed order: single words first, then adjective-nouns."""
    single = sorted({*ADJECTIVES, *NOUNS})
    paired = [f"{a}-{n}" for a in ADJECTIVES for n in NOUNS]
    rng = np.random.default_rng(0)
    return tuple([single[i] for i in rng.permutation(len(single))] + [paired[i] for i in rng.permutation(len(paired))])


def singles() -> int:
    """How many of words() are single words; they come first."""
    return len({*ADJECTIVES, *NOUNS})


def pair(rng: np.random.Generator) -> str:
    """An adjective-noun."""
    return f"{ADJECTIVES[rng.integers(len(ADJECTIVES))]}-{NOUNS[rng.integers(len(NOUNS))]}"
