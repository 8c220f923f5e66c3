"""Tokenized Parquet of others, and Arrow that cannot be mapped -> documents, for a corpus folder of tokenize.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from torchtitan.datasets.corpus import ASSISTANT, CORPUS_FORMAT
from torchtitan.datasets.mapped import ArrowFile
from torchtitan.datasets.tokenizer import Tokenizer
from torchtitan.extensions.ingest.encoder import tokenizer_metadata
from torchtitan.extensions.ingest.token_columns import Columns
from torchtitan.extensions.ingest.token_rows import Lists, RowError, documents_of
from torchtitan.extensions.ingest.token_tables import (
    PIECE,
    check_ids,
    check_schema,
    damaged,
    lists_of,
    pieces_of,
)
from torchtitan.tools.errors import UserError


@dataclass(frozen=True)
class TablePart:
    """The row groups [start, stop) of a .parquet, or all record batches of an .arrow file. size: bytes, about."""

    path: str
    start: int
    stop: int
    size: int


def parts_of(file: Path) -> list[TablePart]:
    """What one process converts at a time."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        if file.suffix != ".parquet":
            return [TablePart(str(file), 0, 1, file.stat().st_size)]
        groups = pq.ParquetFile(file).metadata
        return [
            TablePart(str(file), i, i + 1, groups.row_group(i).total_byte_size) for i in range(groups.num_row_groups)
        ]
    except (pa.ArrowException, OSError) as error:
        raise damaged(file, error) from error


class TokenReader:
    """In the place of an encoder: what rows of token ids become. bos, eos: the ids that documents get if they lack them
    (ends_of). dtype: of ids that are bytes, in MDS shards."""

    def __init__(self, columns: Columns, tokenizer: Tokenizer, bos: list[int], eos: list[int], dtype: str = "") -> None:
        self.columns, self.tokenizer, self.bos, self.eos, self.dtype = columns, tokenizer, bos, eos, dtype
        self._unlabelled = 0

    @property
    def key(self) -> list[Any]:
        """What the documents depend on beside the content and the columns, as JSON."""
        return [CORPUS_FORMAT, self.tokenizer.fingerprint, bool(self.bos), bool(self.eos)]

    @property
    def metadata(self) -> dict[str, Any]:
        """The same in words, for corpus.json."""
        taken_as_they_are = self.columns.loss is not None or self.columns.cut
        ends = {} if taken_as_they_are else {"add_bos": bool(self.bos), "add_eos": bool(self.eos)}
        return tokenizer_metadata(self.tokenizer) | ends | {"columns": self.columns.describe()}

    def closing(self) -> dict[str, Any]:
        """What is counted in a unit, beside its documents."""
        counts, self._unlabelled = {"left_out": {"no_label": self._unlabelled}}, 0
        return counts if self.columns.loss else {}

    def documents(
        self, lists: Mapping[str, Lists], place: Callable[[int], str], whole: bool = False
    ) -> Iterator[np.ndarray]:
        """The documents of rows in order, int32[n], or [2, n] with roles; empty ones for units.py to count. place(row):
        for errors. whole: they get no ends."""
        try:
            found = documents_of(self.columns, lists)
        except RowError as error:
            row, why = error.args
            raise UserError(f"{place(row)}: {why}") from error
        self._unlabelled += found.unlabelled
        yield from [np.empty(0, np.int32)] * found.empty
        ids = lists[self.columns.ids]
        first = int(ids.offsets[0])
        for start, stop, row in zip(found.starts.tolist(), found.stops.tolist(), found.rows.tolist()):
            values = ids.values[start:stop]
            check_ids(place(row), int(values.min()), int(values.max()), self.tokenizer)
            document = values.astype(np.int32)
            if found.trained is not None:
                trained = found.trained[start - first : stop - first]
                yield np.stack([document, np.where(trained, np.int32(ASSISTANT), np.int32(0))])
                continue
            bos = self.bos if not whole and document[0] not in self.bos else []
            eos = self.eos if not whole and document[-1] not in self.eos else []
            yield np.concatenate([np.array(bos, np.int32), document, np.array(eos, np.int32)])


def read_part(part: TablePart, reader: TokenReader) -> Iterator[np.ndarray]:
    """The documents of a part, in order."""
    import pyarrow as pa

    try:
        for row, batch in _batches(part, reader.columns):
            lists = lists_of(part.path, batch, reader.columns, row)
            yield from reader.documents(lists, lambda at: f"{part.path} row {row + at}")  # noqa: B023
    except (pa.ArrowException, OSError, EOFError) as error:
        raise damaged(part.path, error) from error


def _batches(part: TablePart, columns: Columns) -> Iterator[tuple[int, Any]]:
    """Record batches of some PIECE tokens, with the number of their first row in the file."""
    import pyarrow.parquet as pq

    row = 0
    if not part.path.endswith(".parquet"):
        arrow = ArrowFile(part.path)
        check_schema(part.path, arrow.schema, columns)
        for batch in arrow.batches:
            for piece in pieces_of(batch, len(batch.column(columns.ids).values) if len(batch) else 0):
                yield row, piece
                row += len(piece)
        return
    file = pq.ParquetFile(part.path)
    check_schema(part.path, file.schema_arrow, columns)
    row = sum(file.metadata.row_group(i).num_rows for i in range(part.start))
    group = file.metadata.row_group(part.start)
    leaves = map(group.column, range(group.num_columns))  # a column of lists is called "NAME.list.element" here
    tokens = max(leaf.num_values for leaf in leaves if f"{leaf.path_in_schema}.".startswith(f"{columns.ids}."))
    rows = max(1, group.num_rows * PIECE // max(1, tokens))
    for batch in file.iter_batches(rows, row_groups=list(range(part.start, part.stop)), columns=columns.names):
        yield row, batch
        row += len(batch)
