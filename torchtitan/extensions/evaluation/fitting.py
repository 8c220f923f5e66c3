"""Wordings of any size -> questions of a length: as much haystack as fits, found by searching on the token count."""

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


def generator(seed: int, task: str, length: int, number: int, part: int = 0) -> np.random.Generator:
    """Random numbers of a question's own; part: several independent ones."""
    return np.random.default_rng([seed, zlib.crc32(task.encode()), length, number, part])


@dataclass(frozen=True)
class Task:
    """A kind of question, at any length."""

    name: str
    build: Build
    score: Score
    max_new_tokens: int
    """The published budget; a question's own is larger if the tokenizer needs more for the expected answer."""

    most: int | None = None
    """The largest size, for a haystack that is not endless."""

    haystack: str = ""
    """What is in such a haystack: "words to choose from"."""

    def make(
        self, tokenizer: Tokenizer, text: str, length: int, count: int, seed: int, bos_id: int | None
    ) -> list[Question]:
        """`count` questions whose prompt and answer have at most `length` tokens and nearly as many, each a function of
        (tokenizer, text, seed, task, length, number). text: prose for a haystack. UserError if a length is too short,
        or too long."""
        return [self._fitted(tokenizer, length, bos_id, *self.build(length, text, seed, n)) for n in range(count)]

    def _fitted(self, tokenizer: Tokenizer, length: int, bos_id: int | None, render: Render, least: int) -> Question:
        bos = [] if bos_id is None else [bos_id]

        def attempt(size: int) -> tuple[Wording, list[int], list[int], int]:
            wording = render(size)
            ids, target = bos + tokenizer.encode(wording.prompt), tokenizer.encode_behind(wording.target)
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
    """a; a, and b; a, b, and c: as RULER lists the keys that it asks for."""
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + f", and {words[-1]}"
