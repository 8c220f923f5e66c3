"""A needle in a haystack: a number told once, at some depth of a text of some length, and asked for at its end.

The test in its familiar form (Kamradt, github.com/gkamradt/LLMTest_NeedleInAHaystack, 2023), with a question that
leaves nothing to phrase: the answer is a seven-digit number, so that guessing scores 0. LongRoPE2 (arXiv 2502.20082)
has the needle at the start and takes the likelihood of the answer's tokens alone as the fitness of a RoPE: no text is
generated, and small differences between models show.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from torchtitan.datasets.positions import sentence_end_ids
from torchtitan.datasets.tokenizer import Tokenizer
from torchtitan.extensions.evaluation.forward import Ranks, answer_scores
from torchtitan.extensions.evaluation.questions import Question
from torchtitan.models.rope import RopeArgs, rope_for
from torchtitan.models.transformer import Transformer
from torchtitan.tools.errors import UserError

TASK = "needle"
NEEDLE = "Remember this: the number of the {name} is {number}.\n\n"
QUESTION = "\n\nWhat is the number of the {name}? The number of the {name} is"
ANSWER = " {number}."
COLOURS = ("amber", "azure", "bronze", "copper", "crimson", "golden", "green", "grey", "ivory", "silver", "violet")
THINGS = ("anchor", "bridge", "candle", "falcon", "garden", "kettle", "lantern", "letter", "mirror", "orchard", "piano")
DIGITS = 7
SPARE_TOKENS = 4
"""That the model may write beyond the expected answer."""


def default_text() -> str:
    """Prose that exists wherever Python does: its own reference, some 0.7 million characters."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics.values())


def needle_questions(
    tokenizer: Tokenizer,
    text: torch.Tensor,
    lengths: Sequence[int],
    depths: Sequence[float],
    count: int,
    seed: int = 0,
    bos_id: int | None = None,
) -> list[Question]:
    """`count` questions for each length and depth, a function of (text, seed, length, depth, number).

    text: int64 [N], repeated if it is shorter than a length; each question begins at another place of it. UserError
    for a length that holds no needle.
    """
    try:
        ends = sentence_end_ids(tokenizer)
    except UserError:  # of whole words, say: then needles stand wherever their depth is
        ends = ()
    questions = []
    for length in sorted(set(lengths)):
        for depth in sorted(set(depths)):
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
    """A question whose prompt, answer and `spare` more tokens that may be written have exactly `length` tokens, around
    the beginning of text (int64 [at least length]).

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
        raise UserError(f"{between} tokens of text must stand between needle and question, but there are {len(text)}.")
    text = text[:between].cpu()
    place = round(depth * between)
    ends = torch.nonzero(torch.isin(text[:place], torch.tensor(sentence_ends, dtype=torch.int64)))
    place = int(ends[-1]) + 1 if len(ends) else place
    parts = [torch.tensor(bos, dtype=torch.int64), text[:place], torch.tensor(needle), text[place:]]
    return Question(
        task=TASK,
        length=length,
        prompt=torch.cat([*parts, torch.tensor(question)]),
        target=torch.tensor(answer),
        answers=(words["number"],),
        max_new_tokens=len(answer) + spare,
        depth=depth,
    )


def score(text: str, answers: Sequence[str]) -> float:
    """1 if the number is written, whatever else is."""
    return float(answers[0] in text)


def answer_losses(
    model: Transformer, ranks: Ranks, questions: Sequence[Question], rope: RopeArgs | None = None
) -> torch.Tensor:
    """float32 [all questions' target tokens]: -log p of each, in nats. rope: instead of the model's own."""
    rope = rope or model.args.rope
    losses = []
    for one in questions:
        used = rope_for(rope, len(one.prompt) + len(one.target) - 1)
        losses.append(-answer_scores(model, ranks, [one.prompt], [one.target], used)[0][0])
    return torch.cat(losses)
