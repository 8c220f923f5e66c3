"""Text files -> documents: .jsonl, .json and .parquet (some fields of each record), .txt and code (a file is one).

A file is cut into spans; a worker reads a span without looking at the rest. UserError for what cannot be read names
the file and, if it has lines, the line.
"""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import numpy as np

from torchtitan.datasets.where import MISSING, Where, look_up
from torchtitan.extensions.ingest.bad_records import BadRecords, DamagedError, RecordError
from torchtitan.extensions.ingest.open_text import beginning, compression, kind_of, open_text
from torchtitan.tools.errors import UserError

Document = TypeVar("Document")


@dataclass(frozen=True)
class Fields:
    """Which fields of a record are read: `name`, the value of the source's key `key`, perhaps "a.b", the field b of the
    object a; and those of `beside` that the record has. where: of which records. bad: what becomes of those that cannot
    be read."""

    key: str
    name: str
    beside: tuple[str, ...] = ()
    where: Where | None = None
    bad: BadRecords = field(default_factory=BadRecords, compare=False)

    def keeps(self, record: Mapping[str, Any]) -> bool:
        """Whether `where` takes the record; RecordError if it cannot compare its values."""
        try:
            return self.where is None or self.where.keeps(record)
        except ValueError as error:
            raise RecordError("where cannot compare", str(error)) from error

    def columns(self, types: Mapping[str, Any], place: str) -> list[str]:
        """The columns to read of a table that has those of `types` (name -> type, None if it is not known); UserError,
        which begins with `place`, for one that is missing."""
        wanted = {self.name: f"the source's {self.key}"}
        wanted |= dict.fromkeys(self.where.fields if self.where else [], "in the source's where")
        columns = [name for name in self.beside if name in types]
        for name, what in wanted.items():
            ends = [len(name), *(i for i, character in enumerate(name) if character == ".")]
            if (column := next((name[:end] for end in ends if name[:end] in types), None)) is None:
                hint = self.hint(types) if name == self.name else "Mend where."
                for column in types if name == self.name else ():
                    if re.fullmatch(r"(large_)?list<\w+: u?int\d+.*>", str(types[column])):
                        hint = (
                            f"The column {column!r} holds numbers, perhaps tokens: a tokenized data set is read as a "
                            "source if it is a folder of the datasets library (load_dataset, then save_to_disk)."
                        )
                raise UserError(
                    f"{place} has no column {name!r} ({what}); it has {', '.join(map(repr, types)) or 'none'}. {hint}"
                )
            columns.append(column)
        return list(dict.fromkeys(columns))

    def of_columns(self, value: Callable[[str], Any], columns: Sequence[str]) -> dict[str, Any] | None:
        """A row as a record, without nulls; None if `where` leaves it out. value(column): that of the row."""
        if self.where:
            roots = [name for name in columns if any(f"{f}.".startswith(f"{name}.") for f in self.where.fields)]
            if not self.keeps({name: value(name) for name in roots}):
                return None
        record = {name: without_nulls(value(name)) for name in columns}
        return record if self.name in record else record | {self.name: look_up(record, self.name)}

    def hint(self, names: Iterable[str]) -> str:
        """What to do about a record that has the fields `names` but lacks `self.name`."""
        if self.key == "text_field" and "messages" in names:
            return 'Conversations are read with messages_field = "messages".'
        if self.key == "messages_field":
            hint = "A conversation is a list of messages, each with role and content."
            if {"instruction", "prompt", "chosen", "output", "completion", "response"} & set(names):
                return f"{hint} Rewrite these records so (a question as user, its answer as assistant)."
            return f"{hint} Set {self.key} to the field that has it."
        return f"Set {self.key} to the right one."


@dataclass(frozen=True)
class Span:
    """Part of a file: the lines of a .jsonl that begin at bytes [start, stop), the row groups [start, stop) of a
    .parquet, or a whole .txt, array or compressed file; or rows [start, stop) of a hub dataset, whose name is the path.
    size: about how many bytes of text it holds, or of its archive, for sharing out the work."""

    path: str
    start: int
    stop: int
    size: int


def spans_of(path: str, target: int) -> Iterator[Span]:
    """The spans of a file in order, each of about `target` bytes at most if the file can be cut. UserError if it begins
    as another kind of file than its name says."""
    size, kind = os.path.getsize(path), kind_of(path)
    if kind == ".parquet":
        groups = _open_parquet(path).metadata
        for index in range(groups.num_row_groups):
            yield Span(path, index, index + 1, groups.row_group(index).total_byte_size)
        return
    head = beginning(path)
    whole = compression(path) or kind not in (".jsonl", ".json") or is_array(path, head)
    parts = (1 if whole else -(-size // target)) if size else int(kind not in (".jsonl", ".json"))
    cuts = [size * part // parts for part in range(parts + 1)] if parts else []
    for start, stop in zip(cuts, cuts[1:]):
        yield Span(path, start, stop, stop - start)


def encoded_documents(span: Span, encoder: Any) -> Iterator[np.ndarray]:
    """The documents of a span as tokens (encoder.make_encoder), empty ones too."""
    return map(encoder.encode, read_records(span, encoder.fields, encoder.read))


def read_documents(span: Span, text_field: str) -> Iterator[str]:
    """The texts of a span in order, empty ones too."""
    return read_records(span, Fields("text_field", text_field), lambda r: as_text(r[text_field], text_field))


def read_records(span: Span, fields: Fields, read: Callable[[dict[str, Any]], Document]) -> Iterator[Document]:
    """What `read` makes of each record of a span, in order. fields.bad gets the records of which it makes a ValueError,
    and those that cannot be read; DamagedError if the rest of the file cannot."""
    kind = kind_of(span.path)
    if kind == ".parquet":
        return _read_parquet(span, fields, read)
    if kind not in (".jsonl", ".json"):
        return _read_txt(span, fields, read)
    if span.start == 0 and is_array(span.path, beginning(span.path)):
        return _read_array(span, fields, read)
    return _read_lines(span, fields, read)


def _read_txt(span: Span, fields: Fields, read: Callable[[dict[str, Any]], Document]) -> Iterator[Document]:
    with open_text(span.path) as file:
        content = file.read()
    try:
        try:
            text = content.decode("utf-8-sig")  # -sig: a byte order mark is not text
        except UnicodeDecodeError as error:
            raise RecordError(
                "not UTF-8",
                f"not UTF-8: byte {error.start} is 0x{content[error.start]:02x}. Convert it (e.g. iconv -f latin1 -t "
                "utf-8) or take it out of the source.",
            ) from error
        document = read({fields.name: text})
    except ValueError as error:
        fields.bad.add(span.path, lambda: "", error)
    else:
        yield document


def _read_lines(span: Span, fields: Fields, read: Callable[[dict[str, Any]], Document]) -> Iterator[Document]:
    with open_text(span.path) as file:
        at = 0
        if span.start:  # the line that begins before the span belongs to the previous span
            file.seek(span.start - 1)
            at = span.start - 1 + len(file.readline())
        first, lines = at, 0
        while (at < span.stop or compression(span.path)) and (line := file.readline()):
            lines += 1
            is_first, at = at == 0, at + len(line)
            try:
                record = _parse_line(line, fields, is_first)
                if record is None:
                    continue
                document = read(record)
            except ValueError as error:
                fields.bad.add(span.path, lambda: f"line {_lines_before(span.path, first) + lines}", error)  # noqa: B023
            else:
                yield document


def is_array(path: str, head: bytes) -> bool:
    """Whether a .json file, which begins with `head`, is one array of records; if not, each line is a record."""
    return kind_of(path) == ".json" and head.lstrip()[:1] == b"["


def _read_array(span: Span, fields: Fields, read: Callable[[dict[str, Any]], Document]) -> Iterator[Document]:
    """The records of one JSON array, of which no more than a record and a chunk is held."""
    line = 1
    with open_text(span.path) as file:
        try:
            for record, line in _array_items(io.TextIOWrapper(file, "utf-8-sig", newline="")):
                try:
                    if (chosen := _chosen(record, fields)) is None:
                        continue
                    document = read(chosen)
                except ValueError as error:
                    fields.bad.add(span.path, lambda: f"line {line}", error)  # noqa: B023
                else:
                    yield document
        except UnicodeDecodeError as error:
            raise DamagedError(f"{span.path} is not UTF-8 after line {line}: {error.reason}. Convert it.") from error
        except _BrokenArray as error:
            line, why = error.args
            raise DamagedError(f"{span.path} line {line}: {why}") from error


class _BrokenArray(ValueError):
    """(line, what is wrong there)."""


def _array_items(file: io.TextIOBase) -> Iterator[tuple[Any, int]]:
    """The items of a JSON array, each with the line on which it begins. _BrokenArray if it is none."""
    decoder = json.JSONDecoder()
    text, at, line, size, ended = "", 0, 1, 1 << 16, False
    expected = "["
    while True:
        # To the next sign or item, and past it.
        blank = re.compile(r"\s*").match(text, at)
        stop = blank.end() if blank else at
        line += text.count("\n", at, stop)
        at = stop
        if at == len(text) and not ended:
            text, at = file.read(size), 0
            ended = not text
            continue
        sign = text[at : at + 1]
        if expected == "end":
            if not sign:
                return
            raise _BrokenArray(line, f"the array ends, and {text[at : at + 20]!r} follows.")
        if sign and sign in expected:
            expected = {"[": "]item", ",": "item", "]": "end"}[sign]
            at += 1
            continue
        if not sign or "item" not in expected:
            raise _BrokenArray(line, f"broken JSON: {text[at : at + 20]!r} where the array goes on or ends with ']'.")
        try:
            item, stop = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            # What is cut off by the end of the chunk is read again with twice as much behind it.
            if not ended and (error.pos >= len(text) - 16 or error.msg.startswith("Unterminated string")):
                more = file.read(max(size, len(text) - at))
                text, at, ended = text[at:] + more, 0, not more
                continue
            line += text.count("\n", at, error.pos)
            raise _BrokenArray(line, f"broken JSON: {error.msg.removesuffix(' at')}. Mend the record.") from error
        except RecursionError as error:
            raise _BrokenArray(line, "the record is nested too deeply to be read: take it out.") from error
        yield item, line
        line += text.count("\n", at, stop)
        at, expected = stop, ",]"


def _parse_line(line: bytes, fields: Fields, first: bool) -> dict[str, Any] | None:
    """The record of a line, None for a blank line; ValueError says what is wrong with it."""
    try:
        decoded = line.decode("utf-8-sig" if first else "utf-8")
    except UnicodeDecodeError as error:
        raise RecordError(
            "not UTF-8",
            f"not UTF-8: byte {error.start} of the line is 0x{line[error.start]:02x}. Convert the file (e.g. iconv -f "
            "latin1 -t utf-8) or take the line out.",
        ) from error
    if not decoded.strip():
        return None
    try:
        record = json.loads(decoded)
    except json.JSONDecodeError as error:
        what = error.msg.removesuffix(" at")
        raise RecordError(
            "broken JSON",
            f"broken JSON: {what} at character {error.pos} of {len(decoded)}. A .jsonl file has one whole JSON object "
            "per line (a .json file too, or one array of objects); mend the line or take it out.",
        ) from error
    except RecursionError as error:
        raise RecordError(
            "nested too deeply", "the record is nested too deeply to be read: take the line out."
        ) from error
    return _chosen(record, fields)


def _chosen(record: Any, fields: Fields) -> dict[str, Any] | None:
    """A JSON record with the field that is read, by its whole name; None if `where` leaves it out."""
    if not isinstance(record, dict):
        what = f"the record is a JSON {type(record).__name__}, not an object with a field {fields.name!r}."
        raise RecordError("not an object", what)
    if not fields.keeps(record):
        return None
    if fields.name in record:
        return record
    if (value := look_up(record, fields.name, MISSING)) is MISSING:
        names = ", ".join(map(repr, record)) or "none"
        what = f"no field {fields.name!r}; the record has {names}. {fields.hint(record)}"
        raise RecordError("missing field", what)
    return record | {fields.name: value}


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
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair
        what = f"not UTF-8: character {error.start} of {text_field!r} is half of a surrogate pair."
        raise RecordError("not UTF-8", what) from error
    return value


def _lines_before(path: str, offset: int) -> int:
    with open(path, "rb") as file:
        return sum(file.read(min(1 << 20, offset - at)).count(b"\n") for at in range(0, offset, 1 << 20))


def _open_parquet(path: str) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise DamagedError(f"{path} is not a Parquet file that can be read: {error}.") from error


def _cell(batch: Any, index: int, column: str) -> Any:
    return batch.column(column)[index].as_py()


def _read_parquet(span: Span, fields: Fields, read: Callable[[dict[str, Any]], Document]) -> Iterator[Document]:
    import pyarrow as pa

    file = _open_parquet(span.path)
    types = {field.name: field.type for field in file.schema_arrow}
    columns = fields.columns(types, span.path)
    row = sum(file.metadata.row_group(i).num_rows for i in range(span.start))
    try:
        for batch in file.iter_batches(64, row_groups=list(range(span.start, span.stop)), columns=columns):
            for index in range(len(batch)):
                row += 1
                try:
                    record = fields.of_columns(partial(_cell, batch, index), columns)
                    if record is None:
                        continue
                    document = read(record)
                except pa.ArrowException:  # some of them are ValueErrors too
                    raise
                except ValueError as error:
                    if isinstance(error, UnicodeDecodeError):
                        what = f"{fields.name!r} is not UTF-8 at byte {error.start}."
                        error = RecordError("not UTF-8", what)
                    fields.bad.add(span.path, lambda: f"row {row}", error)  # noqa: B023
                else:
                    yield document
    except (pa.ArrowException, OSError) as error:
        raise DamagedError(f"{span.path} is damaged near row {row}: {error}.") from error
