"""Wordings of any size -> questions of a length: as much haystack as fits, found by searching on the token count."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from torchtitan.datasets.tokenizer import Tokenizer
from torchtitan.extensions.evaluation.questions import Question, Score, Task
from torchtitan.tools.errors import UserError

ENOUGH = 0.985
"""Share of the room at which the search ends. More would cost encodings of the whole text, a second at 256K tokens."""
AIM = 0.993
FEW = 16
"""Rounds after which the search halves instead of guessing, so that it ends whatever the text."""


@dataclass(frozen=True)
class Wording:
    """A prompt, what the model would write behind it (with its space), and the references for scoring."""

    prompt: str
    target: str
    answers: tuple[str, ...]
    depth: float | None = None


Render = Callable[[int], Wording]
"""The question with that much haystack (sentences, words, pairs, documents); a function of that number alone."""

Build = Callable[[int, str, int, int], tuple[Render, int]]
"""(length, prose, seed, number) -> a question of any size, and the smallest size that the task allows."""


def task_of(name: str, build: Build, budget: int, score: Score, most: int | None = None, haystack: str = "") -> Task:
    """A task whose questions fill a length.

    budget: tokens that the model may write. most: the largest size, for a haystack that is not endless, and what is in
    it: "words to choose from".
    """

    def make(tokenizer: Tokenizer, text: str, length: int, count: int, seed: int, bos_id: int | None) -> list[Question]:
        return [
            fitted(tokenizer, name, length, budget, bos_id, *build(length, text, seed, n), most, haystack)
            for n in range(count)
        ]

    return Task(name, make, score, budget)


def generator(seed: int, task: str, length: int, number: int, part: int = 0) -> np.random.Generator:
    """Random numbers of a question's own; part: several independent ones."""
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
    haystack: str = "",
) -> Question:
    """The question whose prompt and answer have at most `length` tokens and nearly as many.

    budget: tokens that the model may write, more if the expected answer has more. least, most: the smallest size that
    the task allows, and the largest that its haystack has. UserError if a length is too short, or too long.
    """
    bos = [] if bos_id is None else [bos_id]

    def attempt(size: int) -> tuple[Wording, list[int], list[int], int]:
        wording = render(size)
        ids, target = bos + tokenizer.encode(wording.prompt), tokenizer.encode_behind(wording.target)
        return wording, ids, target, len(ids) + max(budget, len(target))

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
                raise UserError(
                    f"{task} at a length of {length}: there are {most} {haystack}, with which the prompt has {best[3]} "
                    "tokens."
                )
        tried = attempt(size)
        slope = max(tried[3] - first, 1) / (size - least)
        if tried[3] <= length:
            low, best = size, tried
        else:
            too_large = size
        size = low + max(1, int((AIM * length - best[3]) / slope))
        if round_ >= FEW and too_large:
            size = (low + too_large) // 2
    wording, ids, target, whole = best
    return Question(
        task=task,
        length=length,
        prompt=torch.tensor(ids, dtype=torch.int64),
        target=torch.tensor(target, dtype=torch.int64),
        answers=wording.answers,
        max_new_tokens=whole - len(ids),
        depth=wording.depth,
    )


def listed(words: Sequence[str]) -> str:
    """a; a, and b; a, b, and c: as RULER lists the keys that it asks for."""
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + f", and {words[-1]}"
