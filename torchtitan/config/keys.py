"""What a key of the schema can be, and what it decides: Annotated[int, Range(min=1), Decides("rows")] at its field.

From there config/checks.py takes the ranges. Resuming, chains, and the differences that a stage prints
(components/changes.py), take what a key decides. --help shows both.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import Any, Literal, get_args, get_origin, get_type_hints

Decision = Literal["documents", "rows", "model", "start", "result", "speed", "nothing"]
"""What a key decides. With other documents, rows or model a stage is another stage.

documents: the tokens of each document (a corpus's fingerprint stands for them)
rows: which documents stand in which row of which step, at which positions, and which tokens see each other
model: architecture, RoPE, tokenizer
start: the weights and the optimizer state that a fresh run begins with
result: what training makes of these: learning rate, clipping, precision
speed: time and memory only; results differ by rounding at most
nothing: none of these: where files are, what is logged, saved or evaluated
"""


@dataclass(frozen=True)
class Range:
    """The numbers that a key, or each item of a tuple, can be; without bounds any finite number."""

    min: float | None = None
    max: float | None = None
    above: float | None = None
    below: float | None = None
    also: float | None = None
    """One more number, with a meaning of its own."""

    def __contains__(self, value: float) -> bool:
        low = (self.min is None or value >= self.min) and (self.above is None or value > self.above)
        high = (self.max is None or value <= self.max) and (self.below is None or value < self.below)
        return math.isfinite(value) and (value == self.also or (low and high))

    def __str__(self) -> str:
        """`at least 0 and below 1`; empty without bounds."""
        bounds = {"at least": self.min, "above": self.above, "at most": self.max, "below": self.below}
        text = " and ".join(f"{words} {bound:g}" for words, bound in bounds.items() if bound is not None)
        return text if self.also is None else f"{text}, or {self.also:g}"


@dataclass(frozen=True)
class Decides:
    """What a key decides. At a table: what its keys decide that have no Decides of their own."""

    what: Decision


@dataclass(frozen=True)
class Key:
    """A field of a table: its type without annotations, and what these say."""

    hint: Any
    range: Range | None
    decides: Decision | None


@cache
def keys_of(table: type) -> Mapping[str, Key]:
    """Field name -> Key of a dataclass, in order."""
    hints, plain = get_type_hints(table, include_extras=True), get_type_hints(table)
    result = {}
    for field in dataclasses.fields(table):
        notes = getattr(hints[field.name], "__metadata__", ())
        allowed = next((note for note in notes if isinstance(note, Range)), None)
        decision = next((note.what for note in notes if isinstance(note, Decides)), None)
        result[field.name] = Key(plain[field.name], allowed, decision)
    return MappingProxyType(result)


def element_table(hint: Any) -> type | None:
    """The dataclass X of `tuple[X, ...]` (an array of tables), or None for any other type."""
    if get_origin(hint) is tuple and dataclasses.is_dataclass(get_args(hint)[0]):
        element: type = get_args(hint)[0]
        return element
    return None
