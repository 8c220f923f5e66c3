"""Which messages of a conversation are trained: keys of theirs that say so, as OpenAI's `weight` does."""

from __future__ import annotations

import json
from typing import Any

from torchtitan.extensions.ingest.tool_calls import Messages

WEIGHTS = ("weight", "loss_weight", "train", "training", "trainable", "loss")
"""Keys of a message that say whether it is trained: 1 or true, 0 or false."""

Span = tuple[int, int]


def is_trained(message: dict[str, Any], number: int, field: str) -> bool | None:
    """Whether the message says that it is trained; None: it does not say. ValueError for a value between the two."""
    said = {key: message[key] for key in WEIGHTS if message.get(key) is not None}
    for key, value in said.items():
        if not isinstance(value, (bool, int, float)) or value not in (0, 1):
            raise ValueError(
                f"message {number} of {field!r}: {key} = {_spelled(value)[:60]}, but a message is trained (1, true) "
                "or not (0, false). Write one of these, or rename the key if it means something else."
            )
    if len(set(said.values())) > 1:
        both = " and ".join(f"{key} = {_spelled(value)}" for key, value in said.items())
        raise ValueError(f"message {number} of {field!r}: {both} do not agree whether it is trained.")
    return bool(next(iter(said.values()))) if said else None


def _spelled(value: Any) -> str:
    """As JSON, or as Python has it (a column can hold bytes, dates and decimals)."""
    return json.dumps(value, default=repr)


def trained_marks(text: str, responses: list[list[Span]], answers: Messages, trained: list[bool]) -> list[Span] | None:
    """The marks of a template in the text that are of trained messages; None if it cannot be told whose they are.

    responses: the marks of each response. answers: the messages of the assistant; trained: of each of them.
    """
    said = ["".join("".join(text[slice(*span)] for span in response).split()) for response in responses]
    for kept in ([True] * len(answers), trained):  # a template may go by the key itself
        wanted = ["".join(m["content"].split()) for m, is_kept in zip(answers, kept, strict=True) if is_kept]
        if len(said) == len(wanted) and all(map(str.__contains__, said, wanted)):
            flags = [flag for flag, is_kept in zip(trained, kept, strict=True) if is_kept]
            return [span for response, flag in zip(responses, flags, strict=True) if flag for span in response]
    return None
