"""Text files -> documents: JSON records and tables (some fields of each record), .txt and code (a file is one).

A file is cut into spans; a worker reads a span without looking at the rest. UserError for what cannot be read names
the file and, if it has lines, the line.
"""

from __future__ import annotations

import io
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, BinaryIO

import numpy as np

from torchtitan.datasets.long_text import LONG, LongText
from torchtitan.datasets.where import MISSING, look_up
from torchtitan.extensions.ingest.bad_records import DamagedError, RecordError, nested_too_deeply
from torchtitan.extensions.ingest.open_text import beginning, compression, kind_of, open_text
from torchtitan.extensions.ingest.records import LINES, TABLES, Document, Fields, Span, as_text
from torchtitan.extensions.ingest.tables import read_table, spans_of_table

MOST_BYTES = 1 << 31
"""A longer line is no record."""

_TOO_LONG = f"longer than {MOST_BYTES >> 30} GiB, the most that is read: cut it into records of their own."


def spans_of(path: str, target: int) -> Iterator[Span]:
    """The spans of a file in order, each of about `target` bytes at most if the file can be cut. UserError if it begins
    as another kind of file than its name says."""
    size, kind = os.path.getsize(path), kind_of(path)
    if kind in TABLES:
        yield from spans_of_table(path, target)
        return
    head = beginning(path)
    whole = compression(path) or kind not in LINES or is_array(path, head)
    parts = (1 if whole else -(-size // target)) if size else int(kind not in LINES)
    cuts = [size * part // parts for part in range(parts + 1)] if parts else []
    for start, stop in zip(cuts, cuts[1:]):
        yield Span(path, start, stop, stop - start)


def encoded_documents(span: Span, encoder: Any) -> Iterator[np.ndarray]:
    """The documents of a span as tokens (encoder.make_encoder), empty ones too."""
    return map(encoder.encode, read_records(span, encoder.fields, encoder.read))


def read_documents(span: Span, text_field: str) -> Iterator[str]:
    """The texts of a span in order, empty ones too."""

    def read(record: dict[str, Any]) -> str:
        value = record[text_field]
        return "".join(value) if isinstance(value, LongText) else as_text(value, text_field)

    return read_records(span, Fields("text_field", text_field), read)


def read_records(span: Span, fields: Fields, read: Callable[[dict[str, Any]], Document]) -> Iterator[Document]:
    """What `read` makes of each record of a span, in order. fields.bad gets the records of which it makes a ValueError,
    and those that cannot be read; DamagedError if the rest of the file cannot."""
    kind = kind_of(span.path)
    if kind in TABLES:
        return read_table(span, fields, read)
    if kind not in LINES:
        return _read_txt(span, fields, read)
    if span.start == 0 and is_array(span.path, beginning(span.path)):
        return _read_array(span, fields, read)
    return _read_lines(span, fields, read)


def _read_txt(span: Span, fields: Fields, read: Callable[[dict[str, Any]], Document]) -> Iterator[Document]:
    with open_text(span.path) as file:
        content = file.read()
    try:
        if (nul := content.find(b"\0")) >= 0:
            what = (
                f"NUL byte at byte {nul}: it is no text, or was not written to its end. Fetch it again, or take it out."
            )
            raise RecordError("no text", what)
        content = content.removeprefix(b"\xef\xbb\xbf")
        try:
            text = LongText(content) if len(content) > LONG else content.decode()
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
        while (at < span.stop or compression(span.path)) and (line := file.readline(MOST_BYTES)):
            lines += 1
            is_first, at = at == 0, at + len(line)
            if is_first and line.removeprefix(b"\xef\xbb\xbf").strip() == b"{":
                raise DamagedError(
                    f"{span.path} line 1: this file is one object over several lines, and each line is read as a "
                    "record. Write one object per line, or, in a .json file, one array of objects."
                )
            try:
                if len(line) == MOST_BYTES:
                    at += _rest_of_line(file)
                    raise RecordError("too long", f"the line is {_TOO_LONG}")
                record = _parse_line(line, fields, is_first)
                line = b""  # a long one should not be held beside its text
                if record is None:
                    continue
                document = read(record)
            except (ValueError, RecursionError) as error:
                wrong = _as_record_error(error)
                fields.bad.add(span.path, lambda: f"line {_lines_before(span.path, first) + lines}", wrong)  # noqa: B023
            else:
                yield document


def _rest_of_line(file: BinaryIO) -> int:
    """Read to the end of a line; how many bytes that were."""
    size = 0
    while (chunk := file.readline(1 << 20)) and chunk[-1:] != b"\n":
        size += len(chunk)
    return size + len(chunk)


def is_array(path: str, head: bytes) -> bool:
    """Whether a .json file, which begins with `head`, is one array of records; if not, each line is a record."""
    return kind_of(path) == ".json" and head.lstrip()[:1] == b"["


def _read_array(span: Span, fields: Fields, read: Callable[[dict[str, Any]], Document]) -> Iterator[Document]:
    """The records of one JSON array, of which no more than a record and a chunk is held."""
    line = 1
    with open_text(span.path) as file:
        try:
            items = _array_items(io.TextIOWrapper(file, "utf-8-sig", newline=""), fields.used)
            for number, (record, line) in enumerate(items, 1):
                try:
                    if (chosen := _chosen(record, fields)) is None:
                        continue
                    document = read(chosen)
                except (ValueError, RecursionError) as error:
                    place = f"line {line} (record {number} of the array)"  # which may be one line
                    fields.bad.add(span.path, lambda: place, _as_record_error(error))  # noqa: B023
                else:
                    yield document
        except UnicodeDecodeError as error:
            raise DamagedError(f"{span.path} is not UTF-8 after line {line}: {error.reason}. Convert it.") from error
        except _BrokenArray as error:
            line, why = error.args
            raise DamagedError(f"{span.path} line {line}: {why}") from error


class _BrokenArray(ValueError):
    """(line, what is wrong there)."""


def _array_items(file: io.TextIOBase, used: frozenset[str]) -> Iterator[tuple[Any, int]]:
    """The items of a JSON array, each with the line on which it begins. _BrokenArray if it is none."""
    decoder = json.JSONDecoder(object_pairs_hook=partial(_object, used))
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
                if len(text) - at > MOST_BYTES:
                    raise _BrokenArray(line, f"the record is {_TOO_LONG}") from error
                more = file.read(max(size, len(text) - at))
                text, at, ended = text[at:] + more, 0, not more
                continue
            line += text.count("\n", at, error.pos)
            raise _BrokenArray(line, f"broken JSON: {error.msg.removesuffix(' at')}. Mend the record.") from error
        except (ValueError, RecursionError) as error:  # where such a record ends is not known
            raise _BrokenArray(line, str(_as_record_error(error))) from error
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
    if not decoded or decoded.isspace():
        return None
    try:
        record = json.loads(decoded, object_pairs_hook=partial(_object, fields.used))
    except json.JSONDecodeError as error:
        what = error.msg.removesuffix(" at")
        if decoded[0] == "\ufeff":
            what = "a byte order mark, as if files had been joined,"
        if not line.strip(b"\0\r\n"):
            what = "NUL bytes, as of a file that was not written to its end,"
        raise RecordError(
            "broken JSON",
            f"broken JSON: {what} at character {error.pos} of {len(decoded)}. A .jsonl file has one whole JSON object "
            "per line (a .json file too, or one array of objects); mend the line or take it out.",
        ) from error
    return _chosen(record, fields)


def _object(used: frozenset[str], pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; RecordError if it has a key twice that may be one of those `used`."""
    made = dict(pairs)
    if len(made) < len(pairs):
        twice = sorted(key for key, count in Counter(key for key, _ in pairs).items() if count > 1 and key in used)
        if twice:
            raise RecordError("a key twice", f"the key {twice[0]!r} stands twice in an object: take one of them out.")
    return made


def _as_record_error(error: Exception) -> ValueError:
    """What a reader of JSON raises, as a sentence."""
    if isinstance(error, RecursionError):
        return nested_too_deeply()
    if "integer string conversion" in str(error):  # Python refuses what would take it hours
        most = sys.get_int_max_str_digits()
        return RecordError("a huge number", f"a number has more than {most} digits: take it out, or quote it.")
    return error if isinstance(error, ValueError) else ValueError(str(error))


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


def _lines_before(path: str, offset: int) -> int:
    with open(path, "rb") as file:
        return sum(file.read(min(1 << 20, offset - at)).count(b"\n") for at in range(0, offset, 1 << 20))
