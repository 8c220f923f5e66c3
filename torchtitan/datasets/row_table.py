"""The rows of a stage as a table: which tokens of which document each row holds, computed once and memory-mapped.

build_rows.py makes it, a group of rows at a time, and every rank and loader process then maps the same files
(table_files.py). Their folder is named by a fingerprint of all that decides them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

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

    tokens: np.ndarray
    """int64[S], tokens of each stream in all rows."""

    twice: np.ndarray
    """int64[K], the rows that hold a document twice, because their share of a stream is more than its epoch."""

    unlabelled: np.ndarray
    """int64[M, 7], the parts of rows that are left out because nothing in them has a label: number of the row, the row
    of the table that it would have come before, then stream, document, epoch, start and length."""

    def __len__(self) -> int:
        """R."""
        return len(self.offsets) - 1


def cut_padding(tokens: int) -> np.ndarray:
    """int64[k]: lengths of the segments that `tokens` of padding are cut into."""
    whole, rest = divmod(tokens, PADDING_SEGMENT)
    return np.array([PADDING_SEGMENT] * whole + [rest] * (rest > 0), np.int64)


def is_short(lengths: np.ndarray, short_window: int | None) -> bool:
    """Whether a row of documents of these lengths holds short documents only, which never see each other."""
    return short_window is not None and bool(lengths.max() <= short_window)
