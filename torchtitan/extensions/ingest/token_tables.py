"""Tokenized Parquet and Arrow that others wrote: read in place where the file can be mapped, else converted once.

A source of them is a folder of datasets' save_to_disk, or a file, folder or glob of .parquet and .arrow, whose columns
hold token ids (token_columns.py). Arrow files without compression are mapped (mapped_tables.py). Everything else
becomes a corpus folder (convert_tables.py).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from torchtitan.config.data_schema import Data, Source
from torchtitan.datasets.corpus import CORPUS_FILE, STATE_FILE, Corpus, is_tokenized
from torchtitan.datasets.mapped import ArrowFile, cannot_read, is_limit
from torchtitan.datasets.tokenizer import Tokenizer
from torchtitan.extensions.ingest.encoder import make_encoder
from torchtitan.extensions.ingest.find_text import ABOUT, check_splits
from torchtitan.extensions.ingest.source_files import files_below, is_hub, matching_files, source_path
from torchtitan.extensions.ingest.stand_in import MARK
from torchtitan.extensions.ingest.tables import saved_files
from torchtitan.extensions.ingest.token_columns import Columns, check_added, choose_columns, kind_of_type
from torchtitan.extensions.ingest.token_rows import Lists
from torchtitan.tools.errors import UserError

logger = logging.getLogger(__name__)

PIECE = 1 << 20  # ids that are looked at together
SUFFIXES = (".parquet", ".arrow")
KEYS = ("ids_field", "mask_field", "labels_field", "ignore_fields")
"""Keys of a source that speak of the columns of tokenized rows."""


@dataclass(frozen=True)
class Tables:
    """The files of a source, and which of their columns are read."""

    files: tuple[Path, ...]
    columns: Columns


def find_tables(source: Source, data: Data) -> Tables | None:
    """The tokenized Parquet and Arrow files of a source; None if it is something else. UserError if that cannot be
    said, or if their columns cannot be read for what they seem to say."""
    if is_hub(source) or source.format != "auto":
        return None
    path = source_path(source, data)
    saved = is_tokenized(path)
    if saved:
        if (path / CORPUS_FILE).is_file() or not (path / STATE_FILE).is_file() or (path / MARK).is_file():
            return None
        files = saved_files(path)
    elif path.is_dir():
        below = files_below(path)
        files = [p for p in below if p.suffix in SUFFIXES]
        if any(p.name == STATE_FILE for p in below):  # folders of save_to_disk in it
            named = {p for state in below if state.name == STATE_FILE for p in saved_files(state.parent)}
            files = [
                p for p in files if p.suffix != ".arrow" or p in named or p.parent not in {q.parent for q in named}
            ]
    else:
        files = [p for p in matching_files(source, data) if not ABOUT.fullmatch(p.name)]
        if not all(p.suffix in SUFFIXES for p in files):
            return None
    if not files:
        return None
    if (schema := _first_schema(source, files)) is None:
        return None
    kinds = {field.name: kind_of_type(field.type) for field in schema}
    types = {field.name: str(field.type) for field in schema}
    if not source.ids_field:
        if source.messages_field and source.messages_field.split(".")[0] in kinds:
            return None  # conversations, with tokens of somebody beside them
        columns = choose_columns(source, kinds, types, str(files[0]))
        text = source.text_field.split(".")[0].removesuffix("[]")
        if columns is not None and columns.ids == text:
            raise UserError(
                f"{files[0]} of data source {source.name!r} holds lists of integers in the column {text!r}, which "
                f'text_field names: if they are tokens, leave text_field out and set ids_field = "{text}".'
            )
        if columns is not None and not saved and text in kinds:
            raise UserError(
                f"{files[0]} of data source {source.name!r} has text, in the column {text!r}, and tokens, in "
                f'{columns.ids!r}: set ids_field = "{columns.ids}" to read the tokens, or format = "text" to tokenize '
                "the text."
            )
    else:
        columns = choose_columns(source, kinds, types, str(files[0]))
    if columns is None:
        return None
    if source.text_field != Source.text_field and not source.ids_field:
        raise UserError(
            f"{files[0]} of data source {source.name!r} holds tokens, in the column {columns.ids!r}, and no column "
            f'{source.text_field!r} (text_field): leave text_field out to read the tokens, or set format = "text" and '
            f"text_field to its text; it has {', '.join(kinds)}."
        )
    if path.is_dir() and not saved:
        other = next((p for p in below if p.name.endswith((".jsonl", ".txt", ".jsonl.gz", ".jsonl.zst"))), None)
        if other is not None and not ABOUT.fullmatch(other.name):
            raise UserError(
                f"{path} of data source {source.name!r} holds tokens ({files[0].name}) and text ({other.name}): name "
                "those of one kind by a glob."
            )
        check_splits(files, path, f"the path {source.path!r} of data source {source.name!r}")
    stems: dict[Path, Path] = {}
    for file in files:
        if stems.setdefault(file.with_suffix(""), file) != file:
            raise UserError(
                f"Data source {source.name!r} has {stems[file.with_suffix('')].name} and {file.name}, which would be "
                "read twice if they hold the same rows: name those of one kind by a glob."
            )
    return Tables(tuple(p.absolute() for p in files), columns)


def _first_schema(source: Source, files: Sequence[Path]) -> Any:
    """The schema of the first file; of the first that can be read, if damaged ones are left out; None if there is
    none."""
    for file in files:
        try:
            return schema_of(file)
        except UserError:
            if source.on_bad_record == "stop":
                raise
    return None


def schema_of(file: Path) -> Any:
    """The pyarrow schema of a file; UserError if it is none of its kind."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.read_schema(file) if file.suffix == ".parquet" else ArrowFile(file).schema
    except (pa.ArrowException, OSError, EOFError) as error:
        raise damaged(file, error) from error


def damaged(file: Path | str, error: BaseException) -> UserError:
    """For an error of pyarrow or of the system."""
    if is_limit(error):
        return cannot_read(file, error)
    what = "Parquet" if str(file).endswith(".parquet") else "Arrow"
    why = " ".join(str(error).split()).rstrip(".")
    return UserError(f"{file} is damaged, or no {what} file: {why}. Copy or make it again, or take it out.")


def check_schema(file: Path | str, schema: Any, columns: Columns) -> None:
    """UserError unless a file with this pyarrow schema has the columns that are read, and no other about the loss."""
    names = schema.names
    if missing := next((name for name in columns.names if name not in names), None):
        raise UserError(
            f"{file} has no column {missing!r}, which other files of its source have; it has "
            f"{', '.join(names) or 'none'}. Name files of one kind by a glob."
        )
    check_added(str(file), {field.name: kind_of_type(field.type) for field in schema}, columns)


def lists_of(file: Path | str, batch: Any, columns: Columns, row: int) -> dict[str, Lists]:
    """The columns of a record batch that are read. row: the number of its first row, for UserError."""
    import pyarrow as pa

    lists = {}
    for name in columns.names:
        column = batch.column(name)
        if column.null_count:
            raise UserError(
                f"{file} row {row + int(np.flatnonzero(column.is_null().to_numpy(zero_copy_only=False))[0])}: {name} "
                "is null. Take the row out, or write an empty list."
            )
        fixed = pa.types.is_fixed_size_list(column.type)
        kind = kind_of_type(column.type)
        plain = fixed or pa.types.is_list(column.type) or pa.types.is_large_list(column.type)
        number = kind == "ids" or (kind == "list" and kind_of_type(column.type.value_type) == "number")
        if not (plain and number) or (name == columns.ids and kind != "ids"):
            raise UserError(
                f"{file}: the column {name!r} is {column.type}, not a list of a number per token. Write it so, or set "
                f'ignore_fields = ["{name}"] if it says nothing of the loss.'
            )
        if fixed:
            offsets = (np.arange(len(column) + 1, dtype=np.int64) + column.offset) * column.type.list_size
        else:
            offsets = column.offsets.to_numpy(zero_copy_only=False).astype(np.int64)
        values = column.values
        if not (offsets[0] >= 0 and (np.diff(offsets) >= 0).all() and offsets[-1] <= len(values)):
            raise UserError(f"{file} is a damaged Arrow file: the offsets of {name} are out of order. Make it again.")
        if values.null_count and (inside := values.slice(int(offsets[0]), int(offsets[-1] - offsets[0]))).null_count:
            at = int(np.flatnonzero(inside.is_null().to_numpy(zero_copy_only=False))[0]) + int(offsets[0])
            where = row + int(np.searchsorted(offsets, at, side="right")) - 1
            raise UserError(f"{file} row {where}: {name} holds a null. Take the row out, or mend it.")
        lists[name] = Lists(offsets, values.to_numpy(zero_copy_only=False))
    return lists


def check_ids(place: str, low: int, high: int, tokenizer: Tokenizer) -> None:
    """UserError unless ids from `low` to `high` are the tokenizer's."""
    if low < 0 or high >= tokenizer.vocab_size:
        raise UserError(
            f"{place} holds ids from {low} to {high}, but the tokenizer in {tokenizer.folder} has those from 0 to "
            f"{tokenizer.vocab_size - 1}: set model.hf_assets_path to the tokenizer that made it, or name another "
            "column as ids_field."
        )


def pieces_of(batch: Any, tokens: int) -> Iterator[Any]:
    """A record batch in slices of about PIECE tokens, of which it has `tokens`."""
    rows = max(1, len(batch) * PIECE // max(1, tokens))
    return (batch.slice(at, rows) for at in range(0, len(batch), rows))


def ends_of(source: Source, columns: Columns, tokenizer: Tokenizer, data: Data) -> tuple[list[int], list[int]]:
    """The BOS and EOS that documents get if they lack them: none if a column says what is trained, or a key cuts."""
    if columns.loss is not None or columns.cut:
        return [], []
    encoder = make_encoder(source, tokenizer, data)
    return encoder.bos, encoder.eos


def refuse_column_keys(source: Source, because: str) -> None:
    """UserError if a key that speaks of the columns of tokenized rows is given for a source that has none."""
    if given := next((key for key in KEYS if getattr(source, key)), None):
        raise UserError(
            f"Data source {source.name!r} has {given} = {getattr(source, given)!r}, which is read for tokenized "
            f"Parquet, Arrow and MDS, but {because}: leave it out, or correct path."
        )


def warn_of_chunks(source: Source, columns: Columns, corpus: Corpus) -> None:
    """Log a warning if the rows have one length, as if a stream of tokens had been cut, and were given BOS or EOS."""
    lengths = corpus.lengths[:: max(1, len(corpus) // 1000)]
    if len(lengths) > 7 and lengths.min() == lengths.max() and columns.loss is None and not columns.cut:
        logger.warning(
            "%s: all rows have %d tokens, with the BOS and EOS of data.add_bos and add_eos, as if a stream had been "
            "cut to a length. Set document_end to the id that ends documents in it to have rows cut there, or to "
            "-1 to take rows as they are; neither adds BOS or EOS",
            source.name,
            lengths[0],
        )
