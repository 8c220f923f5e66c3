"""Prompts of an exact length: a needle in real text, the question about it at the end, and the answer.

The model can give the answer only by looking back at the needle. LongRoPE2 (arXiv 2502.20082) has the needle at the
start and scores the likelihood of the answer's tokens alone: no text is generated, and small differences between models
show. needle.py has it at any depth.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from torchtitan.datasets.tokenizer import Tokenizer
from torchtitan.extensions.evaluation.loss_by_position import token_losses
from torchtitan.models.rope import RopeArgs
from torchtitan.models.transformer import Transformer
from torchtitan.tools.errors import UserError

NEEDLE = "Remember this: the number of the {name} is {number}.\n\n"
QUESTION = "\n\nWhat is the number of the {name}? The number of the {name} is"
ANSWER = " {number}."

COLOURS = ("amber", "azure", "bronze", "copper", "crimson", "golden", "green", "grey", "ivory", "silver", "violet")
THINGS = ("anchor", "bridge", "candle", "falcon", "garden", "kettle", "lantern", "letter", "mirror", "orchard", "piano")
DIGITS = 7


@dataclass(frozen=True, eq=False)
class NeedlePrompt:
    """tokens int64 [T]: text with the needle in it, question, answer.

    answer: index of its first token; number: what it says."""

    tokens: torch.Tensor
    answer: int
    number: str


def needle_prompt(
    tokenizer: Tokenizer,
    text: torch.Tensor,
    length: int,
    rng: np.random.Generator,
    bos_id: int | None = None,
    depth: float = 0.0,
    sentence_ends: Sequence[int] = (),
    spare: int = 0,
) -> NeedlePrompt:
    """A prompt of `length` tokens, the answer and `spare` more included, around the beginning of text (int64 [at least
    length]).

    depth: share of the text that comes before the needle; the needle goes back to behind the nearest of the tokens
    sentence_ends, if there is one.
    """
    words = {
        "name": f"{COLOURS[rng.integers(len(COLOURS))]} {THINGS[rng.integers(len(THINGS))]}",
        "number": str(rng.integers(10 ** (DIGITS - 1), 10**DIGITS)),
    }
    needle, question, answer = (tokenizer.encode_behind(part.format(**words)) for part in (NEEDLE, QUESTION, ANSWER))
    bos = [] if bos_id is None else [bos_id]
    between = length - spare - len(bos) - len(needle) - len(question) - len(answer)
    if between < 0:
        raise UserError(
            f"A needle, its question and the answer take {length - between} tokens, but the length is {length}."
        )
    if len(text) < between:
        raise UserError(
            f"{between} tokens of text are to stand between needle and question, but there are {len(text)}."
        )
    text = text[:between].cpu()
    place = round(depth * between)
    ends = torch.nonzero(torch.isin(text[:place], torch.tensor(sentence_ends, dtype=torch.int64)))
    place = int(ends[-1]) + 1 if len(ends) else place
    parts = [torch.tensor(bos, dtype=torch.int64), text[:place], torch.tensor(needle), text[place:]]
    parts.append(torch.tensor(question + answer))
    return NeedlePrompt(torch.cat(parts), length - spare - len(answer), words["number"])


def answer_losses(model: Transformer, prompts: list[NeedlePrompt], rope: RopeArgs | None = None) -> torch.Tensor:
    """float32 [all prompts' answer tokens]: -log p of each."""
    device = model.tok_embeddings.weight.device
    losses = [token_losses(model, p.tokens.to(device), rope, first=p.answer - 1) for p in prompts]
    return torch.cat(losses)
