"""What the columns of tokenized rows of others say: the ids, what is trained, where documents begin and end.

One table, KNOWN, has every column that tokenizing libraries write beside the ids, and what becomes of it. A column that
seems to say something about the loss and is not in it is an error, because all tokens would be trained in its place.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torchtitan.config.data_schema import Source
from torchtitan.tools.errors import UserError

IDS = ("input_ids", "tokens", "token_ids")
"""The columns that are taken for ids if ids_field is not set: the one that a file has."""

LOSS = ("labels", "mask", "roles")
"""The kinds of columns that say what is trained."""

KNOWN = {
    "labels": "labels",  # the token's own id where it is trained, -100 where not; not shifted (transformers)
    "loss_mask": "mask",  # 1 for the tokens that are trained
    "assistant_masks": "mask",  # transformers
    "assistant_mask": "mask",
    "completion_mask": "mask",  # TRL
    "response_mask": "mask",  # verl
    "mask": "mask",  # ProLong
    "loss_weights": "mask",  # read if they are 0 or 1
    "token_weights": "mask",
    "roles": "roles",  # by number, as corpora of ours have them
    "attention_mask": "padding",  # 0 for padding, which is no part of a document
    "position_ids": "positions",  # a document begins where they begin again at 0 (TRL, Axolotl)
    "input_pos": "positions",  # torchtune
    "seq_lengths": "lengths",  # of the documents of a packed row (TRL)
    "seq_lens": "lengths",  # torchtune
    "cu_seqlens": "ends",  # where they end, from 0 on
    "cu_seq_lens": "ends",
    "cu_seq_lens_q": "ends",  # transformers
    "cu_seq_lens_k": "ends",
    "document_ids": "numbers",  # a document ends where the number changes
    "doc_ids": "numbers",
    "segment_ids": "numbers",
    "sequence_ids": "numbers",
    "seq_idx": "numbers",
    "special_tokens_mask": "special",  # says nothing of the loss; but it shows padding that no other column names
    "token_type_ids": "types",  # says nothing if it is the same for all tokens of a row
    "seq_start_id": "NeMo's packed rows, whose loss_mask stands one token earlier than their ids",
    "answer_start_idx": "where a row's answer begins",
}
"""Column -> what it says. A sentence: it is refused, for that."""

LIST_ABOUT_LOSS = re.compile(
    "mask|loss|label|train|weight|role|target|assistant|completion|response|prompt|answer", re.I
)
NUMBER_ABOUT_LOSS = re.compile(
    r"loss|^(train|weights?$)|(sample|token|example)_?weight"
    r"|(prompt|answer|response|source|instruction|completion|context)s?_?(len|start|end|idx|index|offset|tokens)",
    re.I,
)
"""Columns that are not in the table and seem to say something about the loss: of lists of numbers, of numbers."""


REWRITE = (
    "Write labels (the id where a token is trained, -100 where not) or a mask of 0 and 1 per token into a column, and "
    "name it as labels_field or mask_field;"
)


@dataclass(frozen=True)
class Columns:
    """Which columns are read. ids: the column of ids. said: the others that are read, name -> kind. unread: the rest.
    guessed: whether ids was found out. end, begin: the id that ends, or begins, documents within a row."""

    ids: str
    said: tuple[tuple[str, str], ...]
    unread: tuple[str, ...]
    guessed: bool
    end: int | None = None
    begin: int | None = None

    @property
    def names(self) -> list[str]:
        """The columns to read."""
        return [self.ids, *(name for name, _ in self.said)]

    @property
    def loss(self) -> tuple[str, str] | None:
        """A column that says what is trained, and its kind; all that there are say the same."""
        return next(((name, kind) for name, kind in self.said if kind in LOSS), None)

    @property
    def cut(self) -> bool:
        """Whether an id cuts the rows, or each is a document as it stands: they get no ends then."""
        return self.end is not None or self.begin is not None

    @property
    def key(self) -> list[Any]:
        """What documents and labels depend on, as JSON."""
        return [1, self.ids, list(map(list, self.said)), self.end, self.begin]

    def describe(self) -> str:
        """For the log."""
        parts = [f"ids from the column {self.ids!r}" + (" (found out)" if self.guessed else "")]
        for kinds, what in (
            (LOSS, "what is trained from"),
            (("padding",), "padding from"),
            (("positions", "lengths", "ends", "numbers"), "documents of packed rows from"),
        ):
            if names := [repr(name) for name, kind in self.said if kind in kinds]:
                parts.append(f"{what} {', '.join(names)}")
        if self.loss is None:
            parts.append("every token is trained")
        if self.unread:
            parts.append(f"not read: {', '.join(self.unread)}")
        return "; ".join(parts)


def kind_of_type(type_: Any) -> str:
    """Of a pyarrow type: "ids" (lists of integers), "list" (of other numbers, or nested), "bytes", "number", "" (the
    rest)."""
    import pyarrow.types as types

    def is_list(t: Any) -> bool:
        return bool(types.is_list(t) or types.is_large_list(t) or types.is_fixed_size_list(t))

    def is_number(t: Any) -> bool:
        return bool(types.is_integer(t) or types.is_floating(t) or types.is_boolean(t))

    if is_list(type_) and types.is_integer(type_.value_type):
        return "ids"
    inner, depth = type_, 0
    while is_list(inner) or types.is_list_view(inner) or types.is_large_list_view(inner):
        inner, depth = inner.value_type, depth + 1
    if types.is_binary(type_) or types.is_large_binary(type_) or types.is_fixed_size_binary(type_):
        return "bytes"
    return ("list" if depth else "number") if is_number(inner) else ""


def choose_columns(source: Source, kinds: Mapping[str, str], types: Mapping[str, str], place: str) -> Columns | None:
    """The columns of files that have those of `kinds` (name -> kind_of_type) and `types` (name -> its type in words).
    None if none holds ids. UserError, which begins with `place`, if it cannot be said which, or for a column that seems
    to say something about the loss and is not read."""
    named = f"of data source {source.name!r}"
    given = {key: name for key in ("ids_field", "mask_field", "labels_field") if (name := getattr(source, key))} | {
        f"ignore_fields[{i}]": name for i, name in enumerate(source.ignore_fields)
    }
    if source.ids_field:
        ids = source.ids_field
    else:
        candidates = [name for name in IDS if kinds.get(name) in ("ids", "list") and name not in source.ignore_fields]
        if not candidates:
            return None
        if len(candidates) > 1:
            raise UserError(
                f"{place} {named} has the columns {' and '.join(candidates)}, and each may hold token ids: set "
                f'ids_field, e.g. ids_field = "{candidates[0]}".'
            )
        ids = candidates[0]
    for key, name in given.items():
        if name not in kinds:
            raise UserError(f"{place} {named} has no column {name!r} ({key}); it has {', '.join(kinds) or 'none'}.")
    for name in filter(None, (source.mask_field, source.labels_field)):
        if kinds[name] not in ("ids", "list"):
            raise UserError(f"{place} {named}: the column {name!r} is {types[name]}, not a list of a number per token.")
    if kinds[ids] != "ids":
        raise UserError(
            f"{place} {named}: the column {ids!r} is {types[ids]}; token ids are a list of integers per row. Write one "
            "row per document, or name another column as ids_field."
        )
    said, unread = [], []
    for name in kinds:
        if name == ids:
            continue
        means = {source.mask_field: "mask", source.labels_field: "labels"}.get(name) or KNOWN.get(name, "")
        if name in source.ignore_fields or (kinds[name] in ("", "number") and means and " " not in means):
            unread.append(name)  # a label of a row, the id of its document
        elif " " in means or kinds[name] == "bytes" and means or (not means and _about_loss(name, kinds[name])):
            raise UserError(
                f"{place} {named}: the column {name!r} ({types[name]}) seems to say something about the loss"
                f"{f': it is of {means}' if ' ' in means else ''}, and is not read, so that every token would be "
                "trained. "
                f'{REWRITE} or set ignore_fields = ["{name}"] if it says nothing.'
            )
        elif means:
            said.append((name, means))
        else:
            unread.append(name)
    end = source.document_end
    return Columns(ids, tuple(said), tuple(unread), not source.ids_field, end, source.document_start)


def check_added(place: str, kinds: Mapping[str, str], columns: Columns) -> None:
    """UserError, which begins with `place`, if a file with the columns `kinds` has one that the first of its source
    lacks, and that may say something about the loss: only those of the first are read."""
    for name in kinds.keys() - {*columns.names, *columns.unread}:
        means = KNOWN.get(name, "") if kinds[name] in ("ids", "list", "bytes") else ""
        if means or _about_loss(name, kinds[name]):
            raise UserError(
                f"{place} has the column {name!r}, which seems to say something about the loss, and the first file of "
                "its source lacks it, so that it would not be read. Make the files that have it a source of their own, "
                f'by a glob (there ignore_fields = ["{name}"], if it says nothing).'
            )


def _about_loss(name: str, kind: str) -> bool:
    if kind in ("ids", "list", "bytes"):
        return bool(LIST_ABOUT_LOSS.search(name))
    return kind == "number" and bool(NUMBER_ABOUT_LOSS.search(name))
