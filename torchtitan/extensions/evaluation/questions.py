"""What is asked of a model: a prompt, the answers that count, and the tokens of the one that is scored by likelihood.

Tasks (needle.py, ruler.py, recall.py) make questions; runner.py puts them to a model in two ways: the answer's tokens
under teacher forcing, one forward pass, and generated text.
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
    """int64 [A], on the CPU: the tokens of the expected answer as the model would write it behind the prompt."""

    answers: tuple[str, ...]
    """The references that `Score` looks for in generated text."""

    max_new_tokens: int
    """How much the model may write."""

    depth: float | None = None
    """Where the needle stands, 0 (beginning) to 1 (just before the question); None if it has no single place."""


Score = Callable[[str, Sequence[str]], float]
"""(generated text, answers) -> 0 to 1."""
