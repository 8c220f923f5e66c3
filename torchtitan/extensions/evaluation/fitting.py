"""Questions of any size -> items of a length: as much haystack as fits, found by searching on the count of tokens."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from torchtitan.datasets.tokenizer import Tokenizer
from torchtitan.extensions.evaluation.items import Item
from torchtitan.tools.errors import UserError

ENOUGH = 0.985
"""Share of the room at which the search ends. More would cost encodings of the whole text, a second at 256K tokens."""
AIM = 0.993
FEW = 16
"""Rounds after which halves are taken instead of guesses, so that it ends whatever the text."""


@dataclass(frozen=True)
class Question:
    """A prompt, what the model would write behind it (with its space), and the references for scoring."""

    prompt: str
    target: str
    answers: tuple[str, ...]
    depth: float | None = None


Render = Callable[[int], Question]
"""The question with so much haystack (sentences, words, pairs, documents); a function of that number alone."""


def generator(seed: int, task: str, length: int, number: int, part: int = 0) -> np.random.Generator:
    """Random numbers of an item's own; part: several, independent ones."""
    return np.random.default_rng([seed, zlib.crc32(task.encode()), length, number, part])


def fitted(
    tokenizer: Tokenizer,
    task: str,
    length: int,
    budget: int,
    bos_id: int | None,
    render: Render,
    least: int,
    most: int | None = None,
    runs_out: str = "",
) -> Item:
    """The item whose prompt and answer have at most `length` tokens and nearly as many.

    budget: tokens that the model may write, more if the expected answer has more. least: the smallest size that the
    task allows; most: the largest that there is, and what the user is told (runs_out) where it does not fill the
    length. UserError if a length is too short, or too long.
    """
    bos = [] if bos_id is None else [bos_id]

    def attempt(size: int) -> tuple[Question, list[int], list[int], int]:
        question = render(size)
        ids, target = bos + tokenizer.encode(question.prompt), tokenizer.encode_behind(question.target)
        return question, ids, target, len(ids) + max(budget, len(target))

    low, best = least, attempt(least)
    first, too_large = best[3], None
    if first > length:
        raise UserError(
            f"{task} takes at least {first} tokens with this tokenizer (its answer's {first - len(best[1])} included; "
            f"some questions take a few more), but the length is {length}."
        )
    size = 2 * least
    for round_ in range(100):
        if best[3] >= ENOUGH * length or too_large == low + 1:
            break
        size = max(low + 1, min(size, low * 16, (too_large or size + 1) - 1))
        if most is not None and size > most:
            size = most
            if low == most:
                raise UserError(f"{task} at a length of {length}: {runs_out} {best[3]} tokens.")
        tried = attempt(size)
        slope = max(tried[3] - first, 1) / (size - least)
        if tried[3] <= length:
            low, best = size, tried
        else:
            too_large = size
        size = low + max(1, int((AIM * length - best[3]) / slope))
        if round_ >= FEW and too_large:
            size = (low + too_large) // 2
    question, ids, target, whole = best
    return Item(
        task=task,
        length=length,
        prompt=torch.tensor(ids, dtype=torch.int64),
        target=torch.tensor(target, dtype=torch.int64),
        answers=question.answers,
        max_new_tokens=whole - len(ids),
        depth=question.depth,
    )


def listed(words: Sequence[str]) -> str:
    """a; a, and b; a, b, and c: as RULER lists the keys that it asks for."""
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + f", and {words[-1]}"
