"""A needle in a haystack: a number told once, at some depth of a text of some length, and asked for at its end.

The test in its familiar form (Kamradt, github.com/gkamradt/LLMTest_NeedleInAHaystack, 2023), with a question that
leaves nothing to phrase: the answer is a seven-digit number, so that guessing scores 0.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from torchtitan.datasets.positions import sentence_end_ids
from torchtitan.datasets.tokenizer import Tokenizer
from torchtitan.extensions.evaluation.items import Item
from torchtitan.extensions.evaluation.needle_prompts import needle_prompt
from torchtitan.tools.errors import UserError

TASK = "needle"
SPARE_TOKENS = 4
"""That the model may write beyond the expected answer."""


def default_text() -> str:
    """Prose that is there wherever Python is: its own reference, some 0.7 million characters."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics.values())


def needle_items(
    tokenizer: Tokenizer,
    text: torch.Tensor,
    lengths: Sequence[int],
    depths: Sequence[float],
    count: int,
    seed: int = 0,
    bos_id: int | None = None,
) -> list[Item]:
    """`count` items for each length and depth, a function of (text, seed, length, depth, number).

    text: int64 [N], repeated where it is shorter than a length; each item begins at another place of it. UserError for
    a length that holds no needle.
    """
    try:
        ends = sentence_end_ids(tokenizer)
    except UserError:  # of whole words, say: then needles stand wherever their depth is
        ends = ()
    items = []
    for length in sorted(set(lengths)):
        for depth in sorted(set(depths)):
            for n in range(count):
                rng = np.random.default_rng([seed, length, round(depth * 1e6), n])
                around = _from(text, int(rng.integers(len(text))), length)
                prompt = needle_prompt(tokenizer, around, length, rng, bos_id, depth, ends, SPARE_TOKENS)
                target = prompt.tokens[prompt.answer :]
                items.append(
                    Item(
                        task=TASK,
                        length=length,
                        prompt=prompt.tokens[: prompt.answer],
                        target=target,
                        answers=(prompt.number,),
                        max_new_tokens=len(target) + SPARE_TOKENS,
                        depth=depth,
                    )
                )
    return items


def score(text: str, answers: Sequence[str]) -> float:
    """1 if the number is written, whatever else is."""
    return float(answers[0] in text)


def _from(text: torch.Tensor, start: int, length: int) -> torch.Tensor:
    return text[torch.arange(start, start + length) % len(text)]
