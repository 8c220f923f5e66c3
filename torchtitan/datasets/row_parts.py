"""A group of rows as parts of documents, in the making and made; and best-fit."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from torchtitan.datasets.reading_order import Mixture

_BIN_BITS = 20  # a bin's room and number in one integer


@dataclass(frozen=True)
class Group:
    """Rows as parts, N in all: those of a row in the order in which they lie in it."""

    row: np.ndarray
    """int64[N], in the group."""

    stream: np.ndarray
    document: np.ndarray
    epoch: np.ndarray
    length: np.ndarray
    """int64[N] each"""

    partial: np.ndarray
    """bool[N]: not a whole document."""

    last: int | None
    """The row that begins an epoch, and so must come after the others."""

    in_order: bool
    """Whether the rows lie in the order of the mixture."""


class Parts:
    """A group in the making."""

    def __init__(self, mixture: Mixture) -> None:
        self.mixture = mixture
        self.columns: list[tuple[np.ndarray, ...]] = []
        self.tokens = np.zeros(len(mixture.readers))
        self.added = 0

    def add(self, stream: int, pieces: np.ndarray, lengths: np.ndarray, rows: np.ndarray, place: np.ndarray) -> None:
        """Parts of the epoch that the stream's reader is in. place: by what those of a row are sorted."""
        reader, count = self.mixture.readers[stream], len(pieces)
        partial = reader.pieces.partial[pieces] | (lengths != reader.pieces.lengths[pieces])
        same = np.full(count, stream), reader.pieces.documents[pieces], np.full(count, reader.epoch)
        self.columns.append((rows, place, *same, lengths, partial))
        self.tokens[stream] += lengths.sum()

    def append(self, stream: int, pieces: np.ndarray, lengths: np.ndarray, rows: np.ndarray) -> None:
        """The same, behind all that was added so far."""
        self.add(stream, pieces, lengths, rows, 2**40 + self.added + np.arange(len(pieces)))
        self.added += len(pieces)

    def documents(self, stream: int, row: int) -> np.ndarray:
        """Of a stream in a row."""
        found = [c[3][(c[0] == row) & (c[2] == stream)] for c in self.columns]
        return np.concatenate(found)

    def group(self, last: int | None = None, in_order: bool = False) -> Group:
        columns = [np.concatenate(column) for column in zip(*self.columns)]
        order = np.lexsort((columns[1], columns[0]))
        row, _, stream, document, epoch, length, partial = (column[order] for column in columns)
        return Group(row, stream, document.astype(np.int64), epoch, length, partial, last, in_order)


def is_short_piece(lengths: np.ndarray, short_window: int | None) -> np.ndarray:
    """bool: pieces that do not share rows with others."""
    return lengths <= (short_window or 0)


def best_fit(lengths: Sequence[int], room: int, open_bins: Sequence[int] | None = None) -> list[int]:
    """The bin of each length: the one in which the least room is left over, or a new bin if none has room.

    Lengths in decreasing order make it best-fit decreasing (Ding et al., arXiv 2404.10830): at most 11/9 of the fewest
    bins and 1 more. O(n log bins), for bins in the hundreds. open_bins: the room of the bins that there are; then no
    new one is made, and -1 stands for what fits into none.
    """
    # sorted: room left << _BIN_BITS | bin
    rooms = sorted(left << _BIN_BITS | bin for bin, left in enumerate(open_bins or ()) if left)
    bins = []
    made = 0
    for length in lengths:
        at = bisect_left(rooms, length << _BIN_BITS)
        if at < len(rooms):
            left = rooms.pop(at) - (length << _BIN_BITS)
        elif open_bins is not None:
            bins.append(-1)
            continue
        else:
            left = (room - length) << _BIN_BITS | made
            made += 1
        bins.append(left & (1 << _BIN_BITS) - 1)
        if left >> _BIN_BITS:
            insort(rooms, left)
    return bins
