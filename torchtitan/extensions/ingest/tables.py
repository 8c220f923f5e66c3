"""Parquet and Arrow files -> records; only the columns that are needed are read.

Arrow files are those of the datasets library (IPC streams) and of Feather (IPC files); they are mapped, so that a span
costs its own rows. If their columns are compressed, a file is one span: rows before it would be decompressed anew.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from torchtitan.datasets.corpus import CORPUS_FILE, MAKE_AGAIN, STATE_FILE
from torchtitan.datasets.long_text import LONG, LongText
from torchtitan.extensions.ingest.bad_records import DamagedError, RecordError, nested_too_deeply
from torchtitan.extensions.ingest.open_text import kind_of
from torchtitan.extensions.ingest.records import IDS, Document, Fields, Span
from torchtitan.tools.errors import UserError
from torchtitan.tools.folders import read_json

BATCH = 64
"""Rows of a Parquet file that are decoded at a time."""


def spans_of_table(path: str, target: int) -> Iterator[Span]:
    """The spans of a .parquet (its row groups) or .arrow file (rows of about `target` bytes) in order."""
    if kind_of(path) == ".parquet":
        groups = _open_parquet(path).metadata
        for index in range(groups.num_row_groups):
            yield Span(path, index, index + 1, groups.row_group(index).total_byte_size)
        return
    rows = size = 0
    with _damage(path, lambda: rows):
        for batch in _arrow_batches(path):
            rows += len(batch)
            size += batch.get_total_buffer_size()
    on_disk = os.path.getsize(path)
    parts = 1 if size > on_disk else max(1, min(rows, -(-size // target)))
    cuts = [rows * part // parts for part in range(parts + 1)] if rows else []
    for start, stop in zip(cuts, cuts[1:]):
        yield Span(path, start, stop, on_disk * (stop - start) // rows)


def read_table(span: Span, fields: Fields, read: Callable[[dict[str, Any]], Document]) -> Iterator[Document]:
    """What `read` makes of each row of a span that `where` keeps; fields.bad gets those that cannot be read."""
    import pyarrow as pa

    if kind_of(span.path) == ".parquet":
        file = _open_parquet(span.path)
        row = sum(file.metadata.row_group(i).num_rows for i in range(span.start))
        schema, groups = file.schema_arrow, list(range(span.start, span.stop))
        columns = fields.columns({field.name: field.type for field in schema}, span.path)
        batches = file.iter_batches(BATCH, row_groups=groups, columns=columns)
    else:
        row, schema = span.start, arrow_schema(span.path)
        columns = fields.columns({field.name: field.type for field in schema}, span.path)
        batches = _rows(_arrow_batches(span.path), span.start, span.stop)
    long = fields.name if fields.key == "text_field" else ""
    with _damage(span.path, lambda: row):
        for batch in batches:
            for index in range(len(batch)):
                row += 1
                try:
                    record = fields.of_columns(partial(_cell, batch, index, long), columns)
                    if record is None:
                        continue
                    document = read(record)
                except pa.ArrowException:  # some of them are ValueErrors too
                    raise
                except (ValueError, RecursionError) as error:
                    fields.bad.add(span.path, lambda: f"row {row}", _as_record_error(error, fields.name))  # noqa: B023
                else:
                    yield document


def _as_record_error(error: Exception, name: str) -> ValueError:
    if isinstance(error, UnicodeDecodeError):
        return RecordError("not UTF-8", f"{name!r} is not UTF-8 at byte {error.start}: write it as text.")
    return nested_too_deeply() if not isinstance(error, ValueError) else error


def arrow_schema(path: str) -> Any:
    """The pyarrow schema of an .arrow file."""
    with _damage(path, lambda: 0):
        return _open_arrow(path).schema


def is_text_folder(folder: Path, field: str, text_format: bool) -> bool:
    """Whether the folder is one that save_to_disk wrote elsewhere, and holds text: text_format says so, or it has the
    column `field` or no lists of integers, and no column input_ids."""
    if not (folder / STATE_FILE).is_file() or (folder / CORPUS_FILE).is_file():
        return False
    files = saved_files(folder)
    if not files:
        return False
    types = {column.name: str(column.type) for column in arrow_schema(str(files[0]))}
    has_ids = any(map(IDS.fullmatch, types.values()))
    return text_format or ("input_ids" not in types and (field in types or not has_ids))


def saved_files(folder: Path) -> list[Path]:
    """The Arrow files of a folder that save_to_disk wrote, in its order; others beside them (cache-*.arrow) are what
    the library has computed from them."""
    state = read_json(folder / STATE_FILE, MAKE_AGAIN)
    if state.get("_indices_data_files") or state.get("_indices_files"):
        raise UserError(
            f"{folder} chooses rows by a list of indices, as old versions of the datasets library saved it, which is "
            "not read: open it and save it again (load_from_disk, flatten_indices, save_to_disk)."
        )
    files = [folder / str(entry["filename"]) for entry in state.get("_data_files", [])]
    if missing := next((file for file in files if not file.is_file()), None):
        raise UserError(f"{missing} is missing: {folder / STATE_FILE} names it. Copy the folder again.")
    return files


def _open_arrow(path: str) -> Any:
    import pyarrow as pa

    mapped = pa.memory_map(path)
    is_file = mapped.read(6) == b"ARROW1"
    mapped.seek(0)
    return pa.ipc.open_file(mapped) if is_file else pa.ipc.open_stream(mapped)


def _arrow_batches(path: str) -> Iterator[Any]:
    """The record batches of an .arrow file, mapped."""
    reader = _open_arrow(path)
    if hasattr(reader, "num_record_batches"):
        return (reader.get_batch(index) for index in range(reader.num_record_batches))
    return iter(reader)


def _rows(batches: Iterator[Any], start: int, stop: int) -> Iterator[Any]:
    """The rows [start, stop) of all batches, as batches."""
    at = 0
    for batch in batches:
        if at >= stop:
            return
        first, last = max(start, at), min(stop, at + len(batch))
        if first < last:
            yield batch.slice(first - at, last - first)
        at += len(batch)


@contextlib.contextmanager
def _damage(path: str, row: Callable[[], int]) -> Iterator[None]:
    """Arrow's errors as a DamagedError."""
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError) as error:
        why = " ".join(str(error).split()).rstrip(".")
        raise DamagedError(f"{path} is damaged near row {row()}: {why}. Fetch it again, or take it out.") from error


def _open_parquet(path: str) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise DamagedError(f"{path} is not a Parquet file that can be read: {error}.") from error


def _cell(batch: Any, index: int, long: str, column: str) -> Any:
    """A value of a column; a LongText only of the column `long`."""
    value = batch.column(column)[index]
    if (
        column == long
        and value.type in ("string", "large_string")
        and value.is_valid
        and len(content := value.as_buffer()) > LONG
    ):
        return LongText(content)
    return value.as_py()
