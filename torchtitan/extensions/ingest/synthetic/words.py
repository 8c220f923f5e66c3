"""What keys and values are made of. The evaluation (extensions/evaluation) can draw none of them, by their form:

    names      two adjectives and a noun of words.txt ("cobalt velvety heron"); the evaluation has other words, and one
               adjective with a noun
    variables  a noun with a number ("heron_37"); there 3 or 5 capitals
    numbers    nine digits; there five or seven
    UUIDs      of version 5; there of version 4
    words      of words.txt, none of which has six letters; there other words, and coded words of six letters

A test compares words.txt with the evaluation's lists, and both sides' items over many seeds.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from pathlib import Path

import numpy as np

ADJECTIVES, NOUNS = (tuple(part.split()) for part in Path(__file__).with_name("words.txt").read_text().split("\n\n"))


def name(rng: np.random.Generator) -> str:
    """The key of a fact."""
    first, second = rng.choice(len(ADJECTIVES), 2, replace=False)
    return f"{ADJECTIVES[first]} {ADJECTIVES[second]} {NOUNS[rng.integers(len(NOUNS))]}"


def variable(rng: np.random.Generator) -> str:
    """A variable."""
    return f"{NOUNS[rng.integers(len(NOUNS))]}_{rng.integers(10, 100)}"


def number(rng: np.random.Generator) -> str:
    """A value of nine digits."""
    return str(rng.integers(10**8, 10**9))


def identifier(rng: np.random.Generator) -> str:
    """A random UUID that says it is of version 5."""
    return str(uuid.UUID(bytes=rng.bytes(16), version=5))


def distinct(count: int, draw: Callable[[], str]) -> list[str]:
    """`count` different draws, in the order in which they came."""
    draws: dict[str, None] = {}
    while len(draws) < count:
        draws[draw()] = None
    return list(draws)
