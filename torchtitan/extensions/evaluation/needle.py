"""A needle in a haystack: a number stated once, at some depth of a text of some length, and asked for at its end.

The test in its familiar form (Kamradt, github.com/gkamradt/LLMTest_NeedleInAHaystack, 2023), with a question that
leaves nothing to phrase: the answer is a seven-digit number, so that guessing scores 0. RULER's niah_single (ruler.py)
is the same with the depth drawn; this one asks at every depth of a grid, and its questions have exactly the length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from torchtitan.datasets.positions import sentence_end_ids
from torchtitan.datasets.tokenizer import Tokenizer
from torchtitan.extensions.evaluation.checks import NEEDLE_TASK
from torchtitan.extensions.evaluation.questions import Question, Score, string_match_all
from torchtitan.tools.errors import UserError

NEEDLE = "Remember this: the number of the {name} is {number}.\n\n"
QUESTION = "\n\nWhat is the number of the {name}? The number of the {name} is"
ANSWER = " {number}."
COLOURS = ("amber", "azure", "bronze", "copper", "crimson", "golden", "green", "grey", "ivory", "silver", "violet")
THINGS = ("anchor", "bridge", "candle", "falcon", "garden", "kettle", "lantern", "letter", "mirror", "orchard", "piano")
DIGITS = 7
SPARE_TOKENS = 4
"""How many tokens the model may write beyond the expected answer."""


@dataclass(frozen=True)
class NeedleTask:
    """Needles at a grid of depths; questions are made and scored as those of every other task (fitting.Task)."""

    depths: Sequence[float]
    name: str = NEEDLE_TASK
    score: Score = string_match_all

    def make(
        self, tokenizer: Tokenizer, text: torch.Tensor, length: int, count: int, seed: int, bos_id: int | None
    ) -> list[Question]:
        """`count` questions for each depth, each a function of (text, seed, length, depth, number).

        text: int64 [N], repeated if it is shorter than the length; each question begins at another place of it.
        UserError if the length holds no needle.
        """
        try:
            ends = sentence_end_ids(tokenizer)
        except UserError:  # a tokenizer of whole words, for example: needles then stand exactly at their depth
            ends = ()
        questions = []
        for depth in sorted(set(self.depths)):
            for n in range(count):
                rng = np.random.default_rng([seed, length, round(depth * 1e6), n])
                start = int(rng.integers(len(text)))
                around = text[torch.arange(start, start + length) % len(text)]
                questions.append(needle_question(tokenizer, around, length, rng, bos_id, depth, ends, SPARE_TOKENS))
        return questions


def needle_question(
    tokenizer: Tokenizer,
    text: torch.Tensor,
    length: int,
    rng: np.random.Generator,
    bos_id: int | None = None,
    depth: float = 0.0,
    sentence_ends: Sequence[int] = (),
    spare: int = 0,
) -> Question:
    """A question of exactly `length` tokens: the prompt, the answer, and `spare` more tokens that may be written.

    text: int64 [at least length]; its first tokens are the haystack. depth: share of the haystack before the needle,
    which is moved back to just after the nearest of the tokens sentence_ends, if there is one.
    """
    words = {
        "name": f"{COLOURS[rng.integers(len(COLOURS))]} {THINGS[rng.integers(len(THINGS))]}",
        "number": str(rng.integers(10 ** (DIGITS - 1), 10**DIGITS)),
    }
    needle, question, answer = (
        tokenizer.encode_continuation(part.format(**words)) for part in (NEEDLE, QUESTION, ANSWER)
    )
    bos = [] if bos_id is None else [bos_id]
    hay_length = length - spare - len(bos) - len(needle) - len(question) - len(answer)
    if hay_length < 0:
        raise UserError(
            f"A needle, its question and the answer take {length - hay_length} tokens, but the length is {length}."
        )
    if len(text) < hay_length:
        raise UserError(
            f"A needle at a length of {length} needs {hay_length} tokens of text, but there are {len(text)}."
        )
    hay = text[:hay_length].cpu()
    place = round(depth * hay_length)
    ends = torch.nonzero(torch.isin(hay[:place], torch.tensor(sentence_ends, dtype=torch.int64)))
    place = int(ends[-1]) + 1 if len(ends) else place
    parts = [torch.tensor(bos, dtype=torch.int64), hay[:place], torch.tensor(needle), hay[place:]]
    return Question(
        task=NEEDLE_TASK,
        length=length,
        prompt=torch.cat([*parts, torch.tensor(question)]),
        target=torch.tensor(answer),
        answers=(words["number"],),
        max_new_tokens=len(answer) + spare,
        depth=depth,
    )
