"""Documents -> rows of exactly seq_len tokens.

Concat: in every epoch the documents are laid end to end in a new order, the line is cut every seq_len tokens, and the
rows are shuffled, so that a long document's rows do not follow one another. Each token is used at most once an epoch;
the tail that does not fill a row is left out. A row is described by its pieces, which say what to read; nothing here
reads tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class EpochOrder:
    """The documents and rows of a source in the order of one epoch."""

    documents: np.ndarray
    """int64[n]"""

    ends: np.ndarray
    """int64[n], where each ends on the line of all tokens."""

    places: np.ndarray
    """int64[rows]: the place on the line, in rows, of the epoch's first, second, ... row."""


@dataclass(frozen=True)
class Pieces:
    """What a row is made of, in order: tokens [starts, stops) of documents; int64[P] each, no piece empty."""

    documents: np.ndarray
    starts: np.ndarray
    stops: np.ndarray


def order_epoch(lengths: np.ndarray, seq_len: int, seed: int, source: int, epoch: int) -> EpochOrder:
    """Order of a source's documents (lengths int64[n]) and rows in an epoch, seeded by the last three numbers."""
    random = np.random.default_rng([seed, source, epoch])
    documents = random.permutation(len(lengths))
    return EpochOrder(
        documents, np.cumsum(lengths[documents], dtype=np.int64), random.permutation(int(lengths.sum()) // seq_len)
    )


def cut_row(order: EpochOrder, row: int, seq_len: int) -> Pieces:
    """Pieces of row `row` of the epoch, O(pieces + log n). IndexError beyond the epoch's last whole row."""
    if not 0 <= row < len(order.places):
        raise IndexError(f"row {row} of an epoch of {len(order.places)} rows")
    begin = int(order.places[row]) * seq_len
    end = begin + seq_len
    first = int(np.searchsorted(order.ends, begin, side="right"))
    last = int(np.searchsorted(order.ends, end, side="left"))
    ends = order.ends[first : last + 1]
    begins = np.concatenate([order.ends[first - 1 : first] if first else np.zeros(1, np.int64), ends[:-1]])
    starts, stops = np.maximum(begins, begin) - begins, np.minimum(ends, end) - begins
    filled = stops > starts  # a foreign corpus may hold empty documents
    return Pieces(order.documents[first : last + 1][filled], starts[filled], stops[filled])
