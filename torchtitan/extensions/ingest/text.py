"""Text files -> documents: .jsonl and .parquet (some fields of each record) and .txt (a file is a document).

A file is cut into spans; a worker reads a span without looking at the rest. UserError for what cannot be read names
the file and, if it has lines, the line.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from torchtitan.config.schema import Data, Source
from torchtitan.extensions.ingest.source_files import files_below, matching_files, source_path
from torchtitan.tools.errors import UserError

logger = logging.getLogger(__name__)

EXTENSIONS = (".jsonl", ".parquet", ".txt")

Document = TypeVar("Document")


@dataclass(frozen=True)
class Fields:
    """Which fields of a record are read: `name`, the value of the source's key `key`; and those of `beside` that the
    record has."""

    key: str
    name: str
    beside: tuple[str, ...] = ()

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
    .parquet, or a whole .txt; or rows [start, stop) of a hub dataset, whose name is the path. size: about how many
    bytes of text it holds, for sharing out the work."""

    path: str
    start: int
    stop: int
    size: int


def find_text_files(source: Source, data: Data) -> list[Path]:
    """The files of source.path, sorted. In a folder, hidden files and other extensions are ignored."""
    path = source_path(source, data)
    where = f"the path {source.path!r} of data source {source.name!r}"
    if path.is_dir():
        below = files_below(path)
        files = [p for p in below if p.suffix in EXTENSIONS]
        others = sorted({p.suffix or p.name for p in below} - set(EXTENSIONS))
        if not files:
            content = f"only {', '.join(others[:8])}" if others else "nothing"
            raise UserError(f"There is no {', '.join(EXTENSIONS)} file in {where}; the folder holds {content}.")
        if others:
            logger.info("%s: ignoring %s in %s", source.name, ", ".join(others[:8]), source.path)
    else:
        files = matching_files(source, data)
        if not files:
            raise UserError(f"No file matches {where} (looked for {path.absolute()}; data.folder = {data.folder!r}).")
        wrong = sorted(p.name for p in files if p.suffix not in EXTENSIONS)
        if wrong:
            raise UserError(
                f"{wrong[0]} in {where} has the extension {Path(wrong[0]).suffix!r}; text is read from "
                f"{', '.join(EXTENSIONS)} (uncompressed)."
            )
    return sorted(p.absolute() for p in files)


def spans_of(path: str, target: int) -> Iterator[Span]:
    """The spans of a file in order, each of about `target` bytes at most if the file can be cut."""
    size = os.path.getsize(path)
    if path.endswith(".jsonl"):
        parts = -(-size // target)
        cuts = [size * part // parts for part in range(parts + 1)] if parts else []
        for start, stop in zip(cuts, cuts[1:]):
            yield Span(path, start, stop, stop - start)
    elif path.endswith(".parquet"):
        groups = _open_parquet(path).metadata
        for index in range(groups.num_row_groups):
            yield Span(path, index, index + 1, groups.row_group(index).total_byte_size)
    else:
        yield Span(path, 0, size, size)


def encoded_documents(span: Span, encoder: Any) -> Iterator[np.ndarray]:
    """The documents of a span as tokens (encoder.make_encoder), empty ones too."""
    return map(encoder.encode, read_records(span, encoder.fields, encoder.read))


def read_documents(span: Span, text_field: str) -> Iterator[str]:
    """The texts of a span in order, empty ones too."""
    return read_records(span, Fields("text_field", text_field), lambda r: as_text(r[text_field], text_field))


def read_records(span: Span, fields: Fields, read: Callable[[dict[str, Any]], Document]) -> Iterator[Document]:
    """What `read` makes of each record of a span, in order; its ValueError becomes a UserError that says where."""
    if span.path.endswith(".jsonl"):
        return _read_jsonl(span, fields, read)
    if span.path.endswith(".parquet"):
        return _read_parquet(span, fields, read)
    return _read_txt(span, fields, read)


def _read_txt(span: Span, fields: Fields, read: Callable[[dict[str, Any]], Document]) -> Iterator[Document]:
    with open(span.path, "rb") as file:
        content = file.read()
    try:
        text = content.decode("utf-8-sig")  # -sig: a byte order mark is not text
    except UnicodeDecodeError as error:
        raise UserError(
            f"{span.path} is not UTF-8: byte {error.start} is 0x{content[error.start]:02x}. Convert it "
            "(e.g. iconv -f latin1 -t utf-8) or take it out of the source."
        ) from error
    try:
        yield read({fields.name: text})
    except ValueError as error:
        raise UserError(f"{span.path}: {error}") from error


def _read_jsonl(span: Span, fields: Fields, read: Callable[[dict[str, Any]], Document]) -> Iterator[Document]:
    with open(span.path, "rb") as file:
        if span.start:  # the line that begins before the span belongs to the previous span
            file.seek(span.start - 1)
            file.readline()
        while (start := file.tell()) < span.stop:
            line = file.readline()
            try:
                record = _parse_line(line, fields, first=start == 0)
                if record is None:
                    continue
                document = read(record)
            except ValueError as error:
                number = _line_number(span.path, start)
                raise UserError(f"{span.path} line {number}: {error}") from error
            yield document


def _parse_line(line: bytes, fields: Fields, first: bool) -> dict[str, Any] | None:
    """The record of a line, None for a blank line; ValueError says what is wrong with it."""
    try:
        decoded = line.decode("utf-8-sig" if first else "utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"not UTF-8: byte {error.start} of the line is 0x{line[error.start]:02x}. Convert the file (e.g. iconv -f "
            "latin1 -t utf-8) or take the line out."
        ) from error
    if not decoded.strip():
        return None
    try:
        record = json.loads(decoded)
    except json.JSONDecodeError as error:
        what = error.msg.removesuffix(" at")
        raise ValueError(
            f"broken JSON: {what} at character {error.pos} of {len(decoded)}. A .jsonl file has one whole JSON object "
            "per line; mend the line or take it out."
        ) from error
    if not isinstance(record, dict):
        raise ValueError(f"the record is a JSON {type(record).__name__}, not an object with a field {fields.name!r}.")
    if fields.name not in record:
        names = ", ".join(map(repr, record)) or "none"
        raise ValueError(f"no field {fields.name!r}; the record has {names}. {fields.hint(record)}")
    return record


def without_nulls(value: Any) -> Any:
    """A value without the keys whose value is None, at any depth: in a column every record has the keys of all records,
    so that absent and null cannot be told apart."""
    if isinstance(value, dict):
        return {key: without_nulls(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [without_nulls(inner) for inner in value]
    return value


def as_text(value: Any, text_field: str) -> str:
    """A field of a record as text, "" for None; ValueError if it is not text."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ValueError(f"the field {text_field!r} is a {type(value).__name__}, not text.")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair
        raise ValueError(
            f"not UTF-8: character {error.start} of {text_field!r} is half of a surrogate pair."
        ) from error
    return value


def _line_number(path: str, offset: int) -> int:
    with open(path, "rb") as file:
        return 1 + sum(file.read(min(1 << 20, offset - at)).count(b"\n") for at in range(0, offset, 1 << 20))


def _open_parquet(path: str) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} is not a Parquet file that can be read: {error}.") from error


def _read_parquet(span: Span, fields: Fields, read: Callable[[dict[str, Any]], Document]) -> Iterator[Document]:
    import pyarrow as pa

    file = _open_parquet(span.path)
    names = file.schema_arrow.names
    if fields.name not in names:
        raise UserError(
            f"{span.path} has no column {fields.name!r} (the source's {fields.key}); it has "
            f"{', '.join(map(repr, names))}. {fields.hint(names)}"
        )
    columns = [fields.name, *(name for name in fields.beside if name in names)]
    row = sum(file.metadata.row_group(i).num_rows for i in range(span.start))
    try:
        for batch in file.iter_batches(64, row_groups=list(range(span.start, span.stop)), columns=columns):
            for index in range(len(batch)):
                row += 1
                yield read({name: without_nulls(batch.column(name)[index].as_py()) for name in columns})
    except UnicodeDecodeError as error:
        raise UserError(f"{span.path} row {row}: {fields.name!r} is not UTF-8 at byte {error.start}.") from error
    except ValueError as error:
        if isinstance(error, pa.ArrowException):
            raise UserError(f"{span.path} is damaged near row {row}: {error}.") from error
        raise UserError(f"{span.path} row {row}: {error}") from error
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{span.path} is damaged near row {row}: {error}.") from error
