"""What a model is asked: a prompt, the answers that count, and the tokens of the answer that is scored by likelihood.

Tasks (needle.py, ruler.py, recall.py) make questions; runner.py asks a model in two ways: it scores the answer's tokens
under teacher forcing, in one forward pass, and it scores generated text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True, eq=False)
class Question:
    """A prompt of some length, and what counts as its answer."""

    task: str
    """The task's name: needle, niah_multikey_2, json_kv, ..."""

    length: int
    """Tokens that prompt and answer together have at most."""

    prompt: torch.Tensor
    """int64 [P], on the CPU; ends where the answer begins."""

    target: torch.Tensor
    """int64 [A], on the CPU: the tokens of the expected answer as the model would write it after the prompt."""

    answers: tuple[str, ...]
    """The references that `Score` looks for in generated text."""

    max_new_tokens: int
    """How much the model may write."""

    depth: float | None = None
    """Where the needle stands, 0 (beginning) to 1 (just before the question); None if it has no single place."""


Score = Callable[[str, Sequence[str]], float]
"""(generated text, answers) -> 0 to 1."""


def string_match_all(text: str, answers: Sequence[str]) -> float:
    """Share of the answers that are in the text, whatever their case."""
    return sum(answer.lower() in text.lower() for answer in answers) / len(answers)


def string_match_part(text: str, answers: Sequence[str]) -> float:
    """1 if one of the answers, which are spellings of the same, is in the text, whatever its case; else 0."""
    return float(any(answer.lower() in text.lower() for answer in answers))


def default_text() -> str:
    """Prose for haystacks that exists wherever Python does: its own reference, some 0.7 million characters."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics.values())
