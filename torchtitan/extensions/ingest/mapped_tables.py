"""Tokenized Arrow files of others, read in place: nothing is copied.

Every row is looked at once. What was found, such as where documents lie, is kept in data.cache_folder/token_index for
as long as the file's size and times stay the same.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from torchtitan.config.data_schema import Data, Source
from torchtitan.datasets.corpus import ASSISTANT, Corpus
from torchtitan.datasets.mapped import ArrowFile, FileState, MappedNumbers
from torchtitan.datasets.tokenizer import Tokenizer
from torchtitan.extensions.ingest.source_files import file_state, source_path
from torchtitan.extensions.ingest.token_columns import Columns
from torchtitan.extensions.ingest.token_files import TokenCorpus
from torchtitan.extensions.ingest.token_index import MOST_BYTES, kept_indexes
from torchtitan.extensions.ingest.token_rows import Documents, RowError, documents_of
from torchtitan.extensions.ingest.token_tables import (
    PIECE,
    Tables,
    check_ids,
    check_schema,
    damaged,
    ends_of,
    lists_of,
    pieces_of,
)
from torchtitan.tools.constants import IGNORED_LABEL
from torchtitan.tools.errors import UserError

logger = logging.getLogger(__name__)

INDEX_FORMAT = 1
SAMPLES = 64  # pieces of a file that are looked at, of a huge source


@dataclass(frozen=True)
class RolesOf:
    """int8 roles, read by slices of the ids, from a column of labels, a mask or roles. shift: where its values begin
    for the first of the ids."""

    numbers: MappedNumbers
    kind: str
    shift: int

    def __getitem__(self, ids: slice) -> np.ndarray:
        """The roles of some ids."""
        said = self.numbers[slice(ids.start + self.shift, ids.stop + self.shift)]
        if self.kind == "roles":
            return said.astype(np.int8)
        return np.where(said != (IGNORED_LABEL if self.kind == "labels" else 0), ASSISTANT, 0).astype(np.int8)


@dataclass(frozen=True)
class TableIndex:
    """What is known of an Arrow file. shards: of each record batch with documents, how many it has, then dtype, first
    byte and count of its ids, and the same of the column that says what is trained, with its shift. bounds: int64[2,
    documents]. first, last: ids of each document. The rest as of a TokenIndex; unlabelled: documents of which no token
    is trained."""

    shards: list[list[Any]]
    bounds: np.ndarray
    first: np.ndarray
    last: np.ndarray
    lowest: int
    highest: int
    empty: int
    unlabelled: int
    sampled: bool
    digest: str


class CompressedError(Exception):
    """A file cannot be mapped: it is compressed, or a column that is read holds single bits."""


def open_tables(source: Source, tables: Tables, tokenizer: Tokenizer, data: Data) -> Corpus | None:
    """The corpus over the maps of a source's files; None if not all of them can be mapped."""
    if any(file.suffix != ".arrow" for file in tables.files):
        return None
    columns = tables.columns
    cache = Path(data.cache_folder).expanduser().absolute()
    try:
        indexes = _indexes(tables, cache)
    except CompressedError:
        return None
    if not any(index.bounds.shape[1] for index in indexes):
        raise UserError(
            f"{tables.files[0].parent} of data source {source.name!r} is empty: its files hold no document with a token"
            f"{' that is trained' if columns.loss else ''}."
        )
    for file, index in zip(tables.files, indexes, strict=True):
        if index.bounds.shape[1]:
            check_ids(f"{file} of data source {source.name!r}", index.lowest, index.highest, tokenizer)
    bos, eos = ends_of(source, columns, tokenizer, data)
    shards, roles = [], []
    for file, index in zip(tables.files, indexes, strict=True):
        state = FileState.of(file)
        at = 0
        for count, ids, said, shift in index.shards:
            shards.append((index.bounds[:, at : at + count], _numbers(state, ids)))
            at += count
            if columns.loss is not None:
                roles.append(RolesOf(_numbers(state, said), columns.loss[1], shift))
    first = np.concatenate([index.first for index in indexes])
    last = np.concatenate([index.last for index in indexes])
    lacks = np.stack([~np.isin(first, bos) & bool(bos), ~np.isin(last, eos) & bool(eos)])
    identity = [columns.key, [index.digest for index in indexes], bos, eos]
    fingerprint = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
    unlabelled = sum(index.unlabelled for index in indexes)
    corpus = TokenCorpus(
        str(source_path(source, data)),
        shards,
        fingerprint,
        max(index.highest for index in indexes),
        lacks,
        (bos, eos),
        tokenizer.vocab_size,
        roles if columns.loss is not None else None,
        {"no_label": unlabelled} if unlabelled else None,
    )
    logger.info(
        "%s: tokenized Arrow, read in place, files: %d; %s; documents: %d, left out because empty: %d, because no "
        "token is trained: %d; tokens: %d; documents that lacked BOS and get it: %d, EOS: %d; %s ids are %d to %d",
        source.name,
        len(tables.files),
        columns.describe(),
        len(corpus),
        sum(index.empty for index in indexes),
        unlabelled,
        corpus.tokens,
        *lacks.sum(1),
        "of a sample the" if any(index.sampled for index in indexes) else "the",
        min(index.lowest for index in indexes),
        max(index.highest for index in indexes),
    )
    return corpus


def _numbers(state: FileState, where: Sequence[Any]) -> MappedNumbers:
    dtype, begin, count = where
    return MappedNumbers(state, np.dtype(dtype), begin, count)


def _indexes(tables: Tables, cache: Path) -> list[TableIndex]:
    """The index of each file, from the cache if it has it. CompressedError if one cannot be mapped."""
    files, columns = tables.files, tables.columns
    total = sum(file.stat().st_size for file in files)
    plain = not columns.said and not (columns.end or -1) >= 0 and columns.begin is None
    sampled = total > MOST_BYTES and plain

    def key(file: Path) -> tuple[str, list[Any]]:
        stat = file.stat()
        what = ["table", INDEX_FORMAT, str(file), columns.key, sampled]
        return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:24], [file_state(stat)]

    return kept_indexes(
        files,
        files,
        key,
        lambda file: _index(file, columns, sampled),
        TableIndex,
        cache,
        "a sample of its ids is" if sampled else "its rows are",
        before=lambda: _check_mappable(tables),
        threads=4,  # each holds a piece of rows, as ids, labels and masks
    )


def _check_mappable(tables: Tables) -> None:
    """CompressedError if a file cannot be mapped, as far as its first record batch shows."""
    import pyarrow as pa

    for file in tables.files:
        try:
            arrow = ArrowFile(file)
            check_schema(file, arrow.schema, tables.columns)
            batch = next((batch for batch in arrow.batches if len(batch)), None)
            if batch is not None:
                lists_of(file, batch.slice(0, 1), tables.columns, 0)
                _where(arrow, batch, tables.columns)
        except (pa.ArrowException, OSError, EOFError) as error:
            raise damaged(file, error) from error


def _where(arrow: ArrowFile, batch: Any, columns: Columns) -> list[list[Any]]:
    """Where the ids, and the column that says what is trained, lie in a file: dtype, first byte, count."""
    import pyarrow as pa

    found: list[list[Any]] = []
    for name in [columns.ids, *([columns.loss[0]] if columns.loss else [])]:
        values = batch.column(name).values
        numbers = None if pa.types.is_boolean(values.type) else arrow.numbers(values)
        if numbers is None:
            raise CompressedError(name)
        found.append([numbers.dtype.str, numbers.begin, numbers.count])
    return found


def _index(file: Path, columns: Columns, sampled: bool) -> TableIndex:
    import pyarrow as pa

    shards: list[list[Any]] = []
    found: list[Documents] = []
    ends: list[tuple[np.ndarray, np.ndarray]] = []
    lows: list[int] = []
    highs: list[int] = []
    digest = hashlib.sha256()
    row = number = 0
    try:
        arrow = ArrowFile(file)
        check_schema(file, arrow.schema, columns)
        every = max(1, arrow.state.size // (8 * PIECE * SAMPLES)) if sampled else 1
        for batch in arrow.batches:
            count = 0
            # The loss column of a batch may begin elsewhere in its values than the ids do, but rows have equal lengths.
            place = None
            for piece in pieces_of(batch, len(batch.column(columns.ids).values) if len(batch) else 0):
                lists = lists_of(file, piece, columns, row)
                try:
                    documents = documents_of(columns, lists)
                except RowError as error:
                    raise UserError(f"{file} row {row + error.args[0]}: {error.args[1]}") from error
                row += len(piece)
                found.append(documents)
                ids = lists[columns.ids]
                if place is None:
                    place = _where(arrow, batch, columns)
                    loss = lists[columns.loss[0]] if columns.loss else ids
                    shift = int(loss.offsets[0]) - int(ids.offsets[0])
                count += len(documents.starts)
                if not len(documents.starts):
                    continue
                ends.append((ids.values[documents.starts], ids.values[documents.stops - 1]))
                looked = [*ends[-1]]
                if number % every == 0:
                    looked.append(_inside(ids.values, documents))
                number += 1
                lows.append(int(min(part.min() for part in looked)))
                highs.append(int(max(part.max() for part in looked)))
                digest.update(looked[-1].tobytes())
                digest.update((documents.stops - documents.starts).tobytes())
                if documents.trained is not None:
                    digest.update(np.packbits(documents.trained).tobytes())
            if count and place is not None:
                shards.append([count, place[0], place[-1], shift])
    except (pa.ArrowException, OSError, EOFError) as error:
        raise damaged(file, error) from error
    nothing = np.empty(0, np.int64)
    return TableIndex(
        shards,
        np.stack([np.concatenate([nothing, *(getattr(d, end) for d in found)]) for end in ("starts", "stops")]),
        np.concatenate([nothing, *(first for first, _ in ends)]),
        np.concatenate([nothing, *(last for _, last in ends)]),
        min(lows, default=0),
        max(highs, default=0),
        sum(d.empty for d in found),
        sum(d.unlabelled for d in found),
        sampled,
        digest.hexdigest(),
    )


def _inside(values: np.ndarray, documents: Documents) -> np.ndarray:
    """The ids of the documents, one behind the other."""
    starts, stops = documents.starts, documents.stops
    if np.array_equal(starts[1:], stops[:-1]):
        return values[starts[0] : stops[-1]]
    return np.concatenate([values[start:stop] for start, stop in zip(starts.tolist(), stops.tolist())])
