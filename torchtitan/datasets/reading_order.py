"""Where each stream stands, and what it is due: epochs that never overlap, and shares of the tokens.

A Reader is a stream's place in its pieces: an epoch is a new order of all of them, and the next one begins only when
nothing of it is left. A Mixture holds the readers of a stage and knows how far each stream is from its share.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from torchtitan.datasets.curriculum import integral
from torchtitan.datasets.mixture import Stream

STREAM_SEED = 1

MOVES = 0.05
"""How far a share may move among rows that are packed together."""


@dataclass(frozen=True)
class Pieces:
    """What an epoch of a stream is made of."""

    documents: np.ndarray
    """int32[P], the document of each piece. The pieces of a document follow each other."""

    lengths: np.ndarray
    """int32[P]"""

    partial: np.ndarray
    """bool[P]: whether a piece does not begin its document, or does not end it."""


def pieces_of(stream: Stream) -> Pieces:
    """A whole epoch."""
    same = stream.documents[1:] == stream.documents[:-1]
    partial = np.concatenate([[False], same]) | np.concatenate([same, [False]])
    return Pieces(stream.documents, stream.lengths, partial)


class Reader:
    """A stream's place. The queue: pieces that were passed over, then those that nobody has looked at.

    first: of the first epoch, if it is not a whole one. seed: of the orders; what the stream is comes to it.
    """

    def __init__(self, stream: Stream, seed: Sequence[int], first: Pieces | None = None) -> None:
        self.stream = stream
        # Seeded by what the stream is, not by its number: another source's options do not reorder this one.
        self.seed = [*seed, stream.source, STREAM_SEED, *stream.kind.encode()]
        self.whole = pieces_of(stream)
        self.epoch = -1
        self.begin(first)

    def begin(self, pieces: Pieces | None = None) -> None:
        """The next epoch."""
        self.epoch += 1
        self.pieces = self.whole if pieces is None else pieces
        order = np.arange(len(self.pieces.lengths), dtype=np.int32)
        np.random.default_rng([*self.seed, self.epoch]).shuffle(order)
        self.order, self.looked = order, 0
        self.passed = order[:0]
        self.waiting = 0  # how many of the queue's first pieces have waited for a row
        self.cut = 0  # tokens of the queue's first piece that are read already
        self.left = self.tokens = int(self.pieces.lengths.sum(dtype=np.int64))

    def look(self, tokens: float, most: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """The queue's first pieces (int32[k]) and what is left of each (int64[k]): at least `tokens` tokens if the
        epoch has so many, at most `most` pieces."""
        count = int(max(0.0, min(tokens, self.left)) / self.tokens * len(self.order) * 1.1) + 16
        while True:
            count = min(count, most or count)
            new = self.order[self.looked : self.looked + max(0, count - len(self.passed))]
            pieces = np.concatenate([self.passed[:count], new])
            lengths = self.pieces.lengths[pieces].astype(np.int64)
            if len(lengths):
                lengths[0] -= self.cut
            ends = np.cumsum(lengths)
            if len(pieces) < count or count == most or ends[-1] >= tokens:
                stop = int(np.searchsorted(ends, tokens)) + 1
                return pieces[:stop], lengths[:stop]
            count *= 2

    def take(self, taken: np.ndarray, lengths: np.ndarray) -> None:
        """Read those of the queue's first pieces for which taken (bool[k]) holds; lengths int64[k], as look() says."""
        count = len(taken)
        at_front = min(count, len(self.passed))
        seen = np.concatenate([self.passed[:count], self.order[self.looked : self.looked + count - at_front]])
        self.passed = np.concatenate([seen[~taken], self.passed[at_front:]])
        self.looked += count - at_front
        self.left -= int(lengths[taken].sum())
        self.waiting -= int(taken[: self.waiting].sum())
        if count and taken[0]:
            self.cut = 0

    def put_back(self, piece: int, tokens: int) -> None:
        """The piece was taken, but its last `tokens` tokens come first in what is read next."""
        self.put_in_front(np.array([piece], np.int32), tokens)
        self.cut = int(self.pieces.lengths[piece]) - tokens

    def put_in_front(self, pieces: np.ndarray, tokens: int) -> None:
        """The pieces, of `tokens` tokens, were taken, and come first in what is read next."""
        self.passed = np.concatenate([pieces.astype(np.int32), self.passed])
        self.waiting += len(pieces)
        self.left += tokens


def curve_of(stream: Stream) -> np.ndarray:
    """float64[k, 2], (step, share), also of a share that is always the same."""
    return np.array([[0.0, stream.share]]) if stream.curve is None else stream.curve


class Mixture:
    """The readers of a stage and what each has read of what its share says.

    row: how many rows are made. per_row: tokens that a row is expected to hold. goal, read: tokens of each stream that
    should be, and are, in the rows so far; both have the same sum.
    """

    def __init__(self, readers: Sequence[Reader], rows_per_step: int, first_row: int, per_row: float) -> None:
        self.readers = list(readers)
        self.curves = [curve_of(reader.stream) for reader in readers]
        steady = all(len(curve) == 1 for curve in self.curves)
        self.steady = np.array([curve[0, 1] for curve in self.curves]) if steady else None
        self.rows_per_step, self.row, self.per_row = rows_per_step, first_row, per_row
        self.goal, self.read = np.zeros(len(readers)), np.zeros(len(readers))

    def shares(self, rows: np.ndarray) -> np.ndarray:
        """float64[len(rows), S]: in the middle of these rows, counted from the stage's beginning."""
        steps = (rows + 0.5) / self.rows_per_step
        return np.stack([np.interp(steps, *curve.T) for curve in self.curves], axis=1)

    def _due(self, stream: int, tokens: np.ndarray) -> np.ndarray:
        """What of the next tokens of all streams is one's."""
        steps = (self.row + np.append(0.0, tokens) / self.per_row) / self.rows_per_step
        areas = integral(self.curves[stream], steps) * self.rows_per_step * self.per_row
        return np.asarray(areas[1:] - areas[0])

    def due(self, tokens: float) -> np.ndarray:
        """float64[S]: how many of the next `tokens` tokens are each stream's, so that it has its share after them."""
        if self.steady is not None:
            return self.goal - self.read + self.steady * tokens
        parts = [float(self._due(s, np.array([tokens]))[0]) for s in range(len(self.readers))]
        return self.goal - self.read + np.array(parts)

    def when(self, stream: int, tokens: np.ndarray, horizon: float) -> np.ndarray:
        """After how many tokens of all streams `tokens` (float64[k]) more of one are due; inf if that is never, or
        beyond the horizon of a share that changes."""
        tokens = tokens - (self.goal - self.read)[stream]
        if len(self.curves[stream]) == 1:
            return np.asarray(tokens / self.curves[stream][0, 1])
        times = np.linspace(0, horizon, 513)
        return np.where(tokens < 0, tokens, np.interp(tokens, self._due(stream, times), times, right=np.inf))

    def until_change(self, tokens: float) -> float:
        """Of the next `tokens` tokens those in which no share moves by more than MOVES; at least a row's."""
        if self.steady is not None:
            return tokens
        rows = self.row + np.linspace(0, tokens / self.per_row, 257)
        shares = self.shares(rows)
        moved = np.flatnonzero((np.abs(shares - shares[0]) > MOVES).any(axis=1))
        return max(self.per_row, float(rows[moved[0]] - self.row) * self.per_row) if len(moved) else tokens

    def count(self, tokens: np.ndarray, rows: int | None = None) -> None:
        """Rows were made: tokens float64[R, S] of each stream in each of them. rows: how many count; None: all."""
        shares = self.shares(self.row + np.arange(len(tokens)))
        self.goal += (shares * tokens.sum(axis=1, keepdims=True)).sum(axis=0)
        self.read += tokens.sum(axis=0)
        self.row += len(tokens) if rows is None else rows
        self.per_row = max(1.0, float(tokens.sum()) / len(tokens))
