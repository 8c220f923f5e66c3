"""Prompts of an exact length with a needle at the start and its question at the end (LongRoPE2, arXiv 2502.20082).

The model reads real text between the two and can give the answer only by looking all the way back. What is scored is
the likelihood of the answer's tokens alone: no text is generated, and small differences between models show.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from torchtitan.components.tokenizer import Tokenizer
from torchtitan.evaluation.loss_by_position import token_losses
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
    """tokens int64 [T]: needle, text, question, answer; answer: index of its first token. It ends with the prompt."""

    tokens: torch.Tensor
    answer: int


def needle_prompt(
    tokenizer: Tokenizer, text: torch.Tensor, length: int, rng: np.random.Generator, bos_id: int | None = None
) -> NeedlePrompt:
    """A prompt of `length` tokens, answer included, around the beginning of text (int64 [at least length])."""
    words = {
        "name": f"{COLOURS[rng.integers(len(COLOURS))]} {THINGS[rng.integers(len(THINGS))]}",
        "number": str(rng.integers(10 ** (DIGITS - 1), 10**DIGITS)),
    }
    needle, question, answer = (tokenizer.encode(part.format(**words)) for part in (NEEDLE, QUESTION, ANSWER))
    needle = ([] if bos_id is None else [bos_id]) + needle
    between = length - len(needle) - len(question) - len(answer)
    if between < 0:
        raise UserError(
            f"A needle, its question and the answer take {length - between} tokens, but the length is {length}."
        )
    if len(text) < between:
        raise UserError(
            f"{between} tokens of text are to stand between needle and question, but there are {len(text)}."
        )
    parts = [torch.tensor(needle), text[:between].cpu(), torch.tensor(question + answer)]
    return NeedlePrompt(torch.cat(parts), length - len(answer))


def answer_losses(model: Transformer, prompts: list[NeedlePrompt], rope: RopeArgs | None = None) -> torch.Tensor:
    """float32 [all prompts' answer tokens]: -log p of each."""
    device = model.tok_embeddings.weight.device
    losses = [token_losses(model, p.tokens.to(device), rope, first=p.answer - 1) for p in prompts]
    return torch.cat(losses)
