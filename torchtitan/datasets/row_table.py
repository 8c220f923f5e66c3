"""The rows of a stage as a table: which tokens of which document each row holds, computed once and memory-mapped.

Built from document lengths alone, in about a microsecond per piece; every rank and loader process then maps the same
files. The files' folder is named by a fingerprint of all that decides them.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from torchtitan.config.data_schema import Data
from torchtitan.datasets.mixture import Stream
from torchtitan.datasets.packing import CHOICE, Rows, order_rows, pack, tokens_wanted
from torchtitan.datasets.reading_order import Merged, merge
from torchtitan.tools.errors import UserError
from torchtitan.tools.folders import sync, written

PADDING_SEGMENT = 1024
"""Padding is cut into segments of at most this many tokens, so that masked tokens cost little attention."""


@dataclass(frozen=True)
class RowTable:
    """R rows of N parts; a part is tokens [start, start + length) of a document."""

    offsets: np.ndarray
    """int64[R + 1]: row r is the parts offsets[r] to offsets[r + 1]."""

    source: np.ndarray
    """int16[N]"""

    document: np.ndarray
    """int32[N], in the source."""

    epoch: np.ndarray
    """int32[N], how many times the source (or its long, or its short documents) had been read before."""

    start: np.ndarray
    """int32[N]"""

    length: np.ndarray
    """int32[N]; a separator after the document counts as part of it."""

    work: np.ndarray
    """int64[R], (query, key) pairs that the row's mask allows in a layer without a sliding window, padding included."""

    def __len__(self) -> int:
        """R."""
        return len(self.offsets) - 1


def build_table(
    streams: Sequence[Stream], data: Data, seq_len: int, rows: int, seed: int, short_window: int | None = None
) -> RowTable:
    """A pure function: the first rows do not depend on how many are asked for. short_window: see pack()."""
    merged, packed, order = _packed_rows(streams, data, seq_len, rows, seed, short_window)
    counts = np.diff(packed.offsets)
    stream, epoch = merged.stream[packed.pieces], merged.epoch[packed.pieces]
    offsets = np.concatenate([[0], np.cumsum(counts[order])])
    part = np.repeat(packed.offsets[:-1][order] - offsets[:-1], counts[order]) + np.arange(offsets[-1])
    stream, epoch, length = stream[part], epoch[part], packed.lengths[part]
    first = np.concatenate([[0], np.cumsum([len(s.documents) for s in streams])])
    piece = first[stream] + merged.piece[packed.pieces[part]]
    del merged, packed, part

    document = np.concatenate([s.documents for s in streams])
    in_parts = np.concatenate([_of_several(s.documents) for s in streams])[piece]
    in_parts |= length != np.concatenate([s.lengths for s in streams])[piece]
    document = document[piece]
    start = _starts(stream, epoch, document, length, np.flatnonzero(in_parts))
    return RowTable(
        offsets=offsets,
        source=np.array([s.source for s in streams], np.int16)[stream],
        document=document,
        epoch=epoch,
        start=start,
        length=length,
        work=_work(offsets, length, seq_len, data.cross_document_attention, short_window)
        + (_anchor_work(offsets, length) if data.anchor_attention else 0),
    )


def _packed_rows(
    streams: Sequence[Stream], data: Data, seq_len: int, rows: int, seed: int, short_window: int | None
) -> tuple[Merged, Rows, np.ndarray]:
    """The merged pieces, rows of them, and the order in which the rows are read: int64[rows]."""
    if data.packing == "single":
        merged = _merge_pieces(streams, rows + CHOICE, seed)
    else:
        merged = merge(streams, tokens_wanted(rows + CHOICE, seq_len), seed)
    packed = pack(merged.lengths, data.packing, seq_len, rows + CHOICE, seed, short_window)
    if len(streams) == 1:
        return merged, packed, np.arange(rows)
    counts = np.diff(packed.offsets)
    place = np.repeat(np.arange(len(counts)) * len(streams), counts) + merged.stream[packed.pieces]
    tokens = np.bincount(place, packed.lengths, len(counts) * len(streams)).reshape(len(counts), -1)
    return merged, packed, order_rows(tokens, np.array([s.share for s in streams]), seq_len, rows)


def _merge_pieces(streams: Sequence[Stream], count: int, seed: int) -> Merged:
    """At least `count` merged pieces, and not many more."""
    tokens = int(count / sum(s.share * len(s.lengths) / s.tokens for s in streams)) + 1
    while len((merged := merge(streams, tokens, seed)).lengths) < count:
        tokens += tokens // 2 + 1
    return merged


def _of_several(documents: np.ndarray) -> np.ndarray:
    """bool[P]: whether a piece is one of several of its document, which follow each other."""
    same = documents[1:] == documents[:-1]
    return np.concatenate([[False], same]) | np.concatenate([same, [False]])


def _starts(
    stream: np.ndarray, epoch: np.ndarray, document: np.ndarray, length: np.ndarray, partial: np.ndarray
) -> np.ndarray:
    """int32[N]: where each part begins in its document; 0 unless it is partial (indices `partial`).

    Packing decides how long the parts of a document are, not which part is which: they take its tokens in the order in
    which the parts are read, so that a document is read from its beginning to its end.
    """
    start = np.zeros(len(length), np.int32)
    epochs, documents = int(epoch.max()) + 1, int(document.max()) + 1
    reading = (stream[partial].astype(np.int64) * epochs + epoch[partial]) * documents + document[partial]
    order = np.argsort(reading, kind="stable")
    reading, partial = reading[order], partial[order]
    before = np.cumsum(length[partial], dtype=np.int64) - length[partial]
    is_first = np.concatenate([[True], reading[1:] != reading[:-1]])[: len(reading)]
    start[partial] = before - np.maximum.accumulate(np.where(is_first, before, 0))
    return start


def cut_padding(tokens: int) -> np.ndarray:
    """int64[k]: lengths of the segments that `tokens` of padding are cut into."""
    whole, rest = divmod(tokens, PADDING_SEGMENT)
    return np.array([PADDING_SEGMENT] * whole + [rest] * (rest > 0), np.int64)


def is_short(lengths: np.ndarray, short_window: int | None) -> bool:
    """Whether a row of documents of these lengths holds short documents only, which never see each other."""
    return short_window is not None and bool(lengths.max() <= short_window)


def _work(
    offsets: np.ndarray, length: np.ndarray, seq_len: int, cross_document: bool, short_window: int | None
) -> np.ndarray:
    n = length.astype(np.int64)
    tokens = np.add.reduceat(n, offsets[:-1])
    pairs = np.add.reduceat(n * (n + 1) // 2, offsets[:-1])
    if cross_document:
        together = np.maximum.reduceat(n, offsets[:-1]) > (short_window or 0)
        pairs = np.where(together, tokens * (tokens + 1) // 2, pairs)
    whole, rest = np.divmod(seq_len - tokens, PADDING_SEGMENT)
    return pairs + whole * (PADDING_SEGMENT * (PADDING_SEGMENT + 1) // 2) + rest * (rest + 1) // 2


def _anchor_work(offsets: np.ndarray, length: np.ndarray) -> np.ndarray:
    """int64[R]: the row's first token, as one more key for all but the first document, which has it anyway."""
    return np.add.reduceat(length, offsets[:-1], dtype=np.int64) - length[offsets[:-1]]


def save_table(table: RowTable, folder: Path) -> None:
    """Write the columns, a file each, so that the folder is complete or absent; UserError if that fails."""
    try:
        with written(folder, durable=True) as aside:
            shutil.rmtree(aside, ignore_errors=True)  # of a run that was killed
            aside.mkdir()
            for column in fields(table):
                np.save(aside / f"{column.name}.npy", getattr(table, column.name))
                sync(aside / f"{column.name}.npy")
    except OSError as error:
        raise UserError(
            f"data.cache_folder: the data plan cannot be written to {folder}: {error}. Make room there, or name "
            "another data.cache_folder."
        ) from error


def load_table(folder: Path) -> RowTable:
    """The columns, memory-mapped."""
    try:
        columns = {c.name: np.load(folder / f"{c.name}.npy", mmap_mode="r") for c in fields(RowTable)}
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"The data plan in {folder} is damaged ({error}): delete the folder.") from error
    return RowTable(**{name: np.asarray(column) for name, column in columns.items()})
