"""Wordings of any size -> questions of a given length: a search for the largest haystack whose tokens fit."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from torchtitan.datasets.tokenizer import Tokenizer
from torchtitan.extensions.evaluation.questions import Question, Score
from torchtitan.tools.errors import UserError

ENOUGH = 0.985
"""Share of the length at which the search ends. To come closer takes more encodings, each a second at 256K tokens."""
AIM = 0.993
"""Share of the length that the next size is guessed for."""
FEW = 16
"""Rounds after which the search halves instead of guessing, so that it ends whatever the text is."""


@dataclass(frozen=True)
class Wording:
    """A prompt, the expected answer (with the space before it), and the references for scoring."""

    prompt: str
    target: str
    answers: tuple[str, ...]
    depth: float | None = None


Render = Callable[[int], Wording]
"""Size of the haystack (sentences, words, pairs, documents) -> the question; a pure function of the size."""

Build = Callable[[int, str, int, int], tuple[Render, int]]
"""(length, prose, seed, number) -> the question by size, and the smallest size that the task allows."""


def generator(seed: int, task: str, length: int, number: int, part: int = 0) -> np.random.Generator:
    """A question's own random numbers; part: one of several independent generators."""
    return np.random.default_rng([seed, zlib.crc32(task.encode()), length, number, part])


@dataclass(frozen=True)
class Task:
    """A kind of question at any length."""

    name: str
    build: Build
    score: Score
    max_new_tokens: int
    """The published budget; a question has more if the tokenizer needs more for the expected answer."""

    most: int | None = None
    """The largest size; None: haystacks are endless."""

    haystack: str = ""
    """What a haystack of limited size consists of: "words to choose from"."""

    def make(
        self, tokenizer: Tokenizer, text: str, length: int, count: int, seed: int, bos_id: int | None
    ) -> list[Question]:
        """`count` questions, prompt and answer of at most `length` tokens and nearly as many; each is a function of
        (tokenizer, text, seed, task, length, number). text: prose for haystacks. UserError if the length is too short
        or too long."""
        return [self._fitted(tokenizer, length, bos_id, *self.build(length, text, seed, n)) for n in range(count)]

    def _fitted(self, tokenizer: Tokenizer, length: int, bos_id: int | None, render: Render, least: int) -> Question:
        bos = [] if bos_id is None else [bos_id]

        def attempt(size: int) -> tuple[Wording, list[int], list[int], int]:
            wording = render(size)
            ids, target = bos + tokenizer.encode(wording.prompt), tokenizer.encode_continuation(wording.target)
            return wording, ids, target, len(ids) + max(self.max_new_tokens, len(target))

        low, best = least, attempt(least)
        first, too_large = best[3], None
        if first > length:
            raise UserError(
                f"{self.name} takes at least {first} tokens with this tokenizer (its answer's {first - len(best[1])} "
                f"included; some questions take a few more), but the length is {length}."
            )
        size = 2 * least
        for round_ in range(100):
            if best[3] >= ENOUGH * length or too_large == low + 1:
                break
            size = max(low + 1, min(size, low * 16, (too_large or size + 1) - 1))
            if self.most is not None and size > self.most:
                size = self.most
                if low == self.most:
                    raise UserError(
                        f"{self.name} at a length of {length}: there are {self.most} {self.haystack}, with which the "
                        f"prompt has {best[3]} tokens."
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
            task=self.name,
            length=length,
            prompt=torch.tensor(ids, dtype=torch.int64),
            target=torch.tensor(target, dtype=torch.int64),
            answers=wording.answers,
            max_new_tokens=whole - len(ids),
            depth=wording.depth,
        )


def listed(words: Sequence[str]) -> str:
    """A list in RULER's form: a; a, and b; a, b, and c."""
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + f", and {words[-1]}"
