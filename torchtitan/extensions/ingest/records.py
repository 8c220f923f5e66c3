"""A record of text, whatever the file: which of its fields are read, and the part of a file that a worker reads."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

from torchtitan.datasets.long_text import LONG, LongText
from torchtitan.datasets.where import Where, look_up
from torchtitan.extensions.ingest.bad_records import BadRecords, RecordError
from torchtitan.tools.errors import UserError

Document = TypeVar("Document")

LINES = (".jsonl", ".ndjson", ".json")
"""Suffixes of files of JSON records."""

TABLES = (".parquet", ".arrow")
"""Suffixes of files with columns."""

IDS = re.compile(r"(large_|fixed_size_)?list<\w+: u?int\d+.*>(\[\d+\])?")
AS_IDS = 'if they are tokens, leave text_field out and set ids_field = "{}".'


@dataclass(frozen=True)
class Fields:
    """Which fields of a record are read: `name`, the value of the source's key `key`, perhaps "a.b", the field b of the
    object a; and those of `beside` that the record has. where: of which records. bad: what becomes of
    those that cannot be read. also: (name, key of the source) of other fields that are needed, and looked up by whoever
    reads the record. nulls: those of columns are kept."""

    key: str
    name: str
    beside: tuple[str, ...] = ()
    where: Where | None = None
    bad: BadRecords = field(default_factory=BadRecords, compare=False)
    also: tuple[tuple[str, str], ...] = ()
    nulls: bool = False

    def keeps(self, record: Mapping[str, Any]) -> bool:
        """Whether `where` takes the record; RecordError if it cannot compare its values."""
        try:
            return self.where is None or self.where.keeps(record)
        except ValueError as error:
            raise RecordError("where cannot compare", str(error)) from error

    @cached_property
    def used(self) -> frozenset[str]:
        """The names in the fields that are read, each word of "a.b"; more than that is not looked at."""
        names = (self.name, *self.beside, *(name for name, _ in self.also), *(self.where.fields if self.where else ()))
        return frozenset(part for name in names for part in (name, *name.split(".")))

    def columns(self, types: Mapping[str, Any], place: str) -> list[str]:
        """The columns to read of a table that has those of `types` (name -> type, None if it is not known); UserError,
        which begins with `place`, for one that is missing or cannot hold what it should."""
        wanted = {self.name: f"the source's {self.key}"}
        wanted |= {name: f"the source's {key}" for name, key in self.also}
        wanted |= dict.fromkeys(self.where.fields if self.where else [], "in the source's where")
        columns = [name for name in self.beside if name in types]
        for name, what in wanted.items():
            ends = [len(name), *(i for i, character in enumerate(name) if character == ".")]
            if (column := next((name[:end] for end in ends if name[:end] in types), None)) is None:
                also = dict(self.also).get(name, "where")
                hint = self.hint(types) if name == self.name else f"Mend {also}."
                ids = next((column for column in types if IDS.fullmatch(str(types[column]))), None)
                if name == self.name and ids is not None:
                    hint = f"The column {ids!r} holds lists of integers: {AS_IDS.format(ids)}"
                raise UserError(
                    f"{place} has no column {name!r} ({what}); it has {', '.join(map(repr, types)) or 'none'}. {hint}"
                )
            if name == self.name == column:
                self._check_type(str(types[column]), place)
            columns.append(column)
        return list(dict.fromkeys(columns))

    def _check_type(self, type_: str, place: str) -> None:
        """UserError if the column `name` has a type that never holds what is read."""
        column = f"{place}: the column {self.name!r} ({self.key})"
        if IDS.fullmatch(type_):
            raise UserError(f"{column} holds lists of integers: {AS_IDS.format(self.name)}")
        if re.match(r"(large_|fixed_size_)?binary", type_):
            raise UserError(
                f"{column} holds bytes ({type_}), of which nothing says that they are text: write it as strings "
                f"(pyarrow: table[{self.name!r}].cast('string')), or name another column."
            )

    def of_columns(self, value: Callable[[str], Any], columns: Sequence[str]) -> dict[str, Any] | None:
        """A row as a record, without nulls unless they are kept; None if `where` leaves it out. value(column): that of
        the row."""
        if self.where:
            roots = [name for name in columns if any(f"{f}.".startswith(f"{name}.") for f in self.where.fields)]
            looked_at = {name: value(name) for name in roots}
            texts = {name: "".join(text) for name, text in looked_at.items() if isinstance(text, LongText)}
            if not self.keeps(looked_at | texts):
                return None
        record = {name: value(name) if self.nulls else without_nulls(value(name)) for name in columns}
        return record if self.name in record else record | {self.name: look_up(record, self.name)}

    def hint(self, names: Iterable[str]) -> str:
        """What to do about a record that has the fields `names` but lacks `self.name`."""
        if self.key == "text_field":
            chat = next((name for name in ("messages", "conversations") if name in names), None)
            if chat is None and {"instruction", "output"} <= set(names):
                chat = "instruction"
            if chat is not None:
                return f'Conversations are read with messages_field = "{chat}".'
        if self.key == "messages_field":
            hint = "A conversation is a list of messages, each with role and content."
            for other in ("messages", "conversations", "instruction"):
                if other in names:
                    return f'Set messages_field = "{other}".'
            if {"prompt", "chosen", "completion", "response"} & set(names):
                return f"{hint} Rewrite these records so (a question as user, its answer as assistant)."
            return f"{hint} Set {self.key} to the field that has it."
        return f"Set {self.key} to the right one."


@dataclass(frozen=True)
class Span:
    """Part of a file: the lines of a .jsonl that begin at bytes [start, stop), the row groups [start, stop) of a
    .parquet, the rows [start, stop) of an .arrow, or a whole .txt, array or compressed file; or rows [start, stop) of a
    hub dataset, whose name is the path. size: about how many bytes of text it holds, or of its archive, for sharing out
    the work."""

    path: str
    start: int
    stop: int
    size: int


def without_nulls(value: Any) -> Any:
    """A value without the keys whose value is None, at any depth: in a column every record has the keys of all records,
    so that absent and null cannot be told apart."""
    if isinstance(value, dict):
        return {key: without_nulls(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [without_nulls(inner) for inner in value]
    return value


def as_text(value: Any, text_field: str) -> str:
    """A field of a record as text, "" for None; RecordError if it is not text."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise RecordError("wrong type", f"the field {text_field!r} is a {type(value).__name__}, not text.")
    start = 0
    try:
        for start in range(0, len(value), LONG):  # a long text is not held twice
            value[start : start + LONG].encode()
    except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair
        what = f"not UTF-8: character {start + error.start} of {text_field!r} is half of a surrogate pair."
        raise RecordError("not UTF-8", what) from error
    return value
