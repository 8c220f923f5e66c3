"""The room that a group of rows has left: filled with what is due next, and with what fits from further on."""

from __future__ import annotations

import numpy as np

from torchtitan.datasets.row_parts import Parts, best_fit, is_short_piece

SPARE_ROWS = 8
SPARE_PIECES = 2048
"""Rows' worth of further pieces, and how many at most, from which gaps are filled."""


class LastRow:
    """The row of a group that may begin epochs. begun: bool[S], whose."""

    def __init__(self, parts: Parts, row: int, seq_len: int, short_window: int | None = None, short: bool = False):
        self.parts, self.row, self.seq_len, self.short_window, self.short = parts, row, seq_len, short_window, short
        self.mixture = parts.mixture
        self.shares = self.mixture.shares(np.array([self.mixture.row]))[0]
        # A stream whose share of a row is more than its epoch must have documents twice in it.
        self.tiny = [s * seq_len > r.stream.tokens for s, r in zip(self.shares, self.mixture.readers)]
        self.begun = np.zeros(len(self.shares), bool)

    def fill(self, room: int, cut: bool = False) -> int:
        """Put what is due into it, epoch after epoch. cut: fill it wholly and cut the last piece. Returns how many
        tokens were put into it."""
        left = room
        for ahead in (False, True) if cut else (False,):
            while left > 0:
                ended = [reader.left == 0 for reader in self.mixture.readers]
                added = self._begin_epochs(left)
                added += self._add_due(left - added, cut, ahead)
                left -= added
                now = [reader.left == 0 for reader in self.mixture.readers]
                if not added or (now == ended and not ahead):
                    break
        return room - left

    def _due(self, room: int) -> np.ndarray:
        return self.mixture.due(float(self.parts.tokens.sum()) + room) - self.parts.tokens

    def _begin_epochs(self, room: int) -> int:
        """Of streams that have ended and are due; those that fit in several times, at once."""
        added = 0
        for s, (reader, due) in enumerate(zip(self.mixture.readers, self._due(room))):
            if reader.left or due <= 0 or self.shares[s] <= 0:
                continue
            reader.begin()
            self.begun[s] = True
            for _ in range(int(min(due, room - added) // reader.tokens) if self.tiny[s] else 0):
                pieces, lengths = reader.look(reader.left)
                if not self._fits(lengths).all():
                    break
                added += int(lengths.sum())
                reader.take(np.ones(len(pieces), bool), lengths)
                self.parts.append(s, pieces, lengths, np.full(len(pieces), self.row))
                reader.begin()
        return added

    def _fits(self, lengths: np.ndarray) -> np.ndarray:
        return is_short_piece(lengths, self.short_window) == self.short

    def may_take(self, stream: int, pieces: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """bool[k]: which pieces of a stream's queue may be put into it."""
        may = self._fits(lengths)
        if self.begun[stream] and not self.tiny[stream]:
            documents = self.mixture.readers[stream].pieces.documents[pieces]
            may &= ~np.isin(documents, self.parts.documents(stream, self.row))
        return may

    def _look(self, stream: int, tokens: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Pieces of a stream's queue, their tokens, and which of them may be taken: of these at least `tokens` tokens,
        if there are."""
        reader, wanted = self.mixture.readers[stream], tokens
        if not tokens:
            return reader.passed[:0], np.zeros(0, np.int64), np.zeros(0, bool)
        while True:
            pieces, lengths = reader.look(wanted)
            may = self.may_take(stream, pieces, lengths)
            missing = tokens - int(lengths[may].sum())
            if missing <= 0 or lengths.sum() >= reader.left:
                return pieces, lengths, may
            wanted = 2 * int(lengths.sum()) + missing

    def _add_due(self, room: int, cut: bool, ahead: bool) -> int:
        """What is due; with `ahead`, what comes next whether it is due or not. Returns how many tokens."""
        offers: list[tuple[np.ndarray, ...]] = []
        looked: list[tuple[np.ndarray, np.ndarray]] = []
        for s, (reader, due) in enumerate(zip(self.mixture.readers, self._due(room))):
            wanted = float(room) if ahead else min(due, room)
            if reader.left == 0 or wanted <= 0 or self.shares[s] <= 0:
                wanted = 0.0
            pieces, lengths, may = self._look(s, wanted)
            middles = np.cumsum(lengths * may) - 0.5 * lengths
            may &= cut | (middles <= wanted)
            times = self.mixture.when(s, self.parts.tokens[s] + middles, 2.0 * self.parts.tokens.sum() + 2 * room)
            looked.append((pieces, lengths))
            offers.append((times[may], np.full(int(may.sum()), s), np.flatnonzero(may), lengths[may]))
        times, stream, index, length = (np.concatenate(column) for column in zip(*offers))
        order = np.argsort(times if cut else -length, kind="stable")
        chosen, left, rest = [], room, 0
        for i, tokens in zip(order.tolist(), length[order].tolist()):
            if tokens <= left or (cut and left):
                chosen.append(i)
                rest = max(0, tokens - left)
                left -= tokens - rest
        for s, (pieces, lengths) in enumerate(looked):
            mine = np.array([i for i in chosen if stream[i] == s], np.int64)
            if not len(mine):
                continue
            taken = np.zeros(len(pieces), bool)
            taken[index[mine]] = True
            reader = self.mixture.readers[s]
            reader.take(taken, lengths)
            mine = mine[np.argsort(times[mine], kind="stable")]
            tokens = length[mine]
            if rest and mine[-1] == chosen[-1]:
                reader.put_back(int(pieces[index[mine[-1]]]), rest)
                tokens[-1] -= rest
            self.parts.append(s, pieces[index[mine]], tokens, np.full(len(mine), self.row))
        return room - left


def fill_gaps(parts: Parts, room: np.ndarray, short: np.ndarray, last: LastRow) -> None:
    """Put pieces from further on into the room (int64[R], changed) that the rows have left; an epoch that began in the
    last row goes on there only. A gap is better than a share that suffers."""
    for _ in range(8):
        soon = min(float(room.sum()), last.seq_len / 2)  # what others leave empty is not due
        due = parts.mixture.due(float(parts.tokens.sum()) + soon) - parts.tokens + last.seq_len / 4
        offers: list[tuple[np.ndarray, ...]] = []
        looked: list[tuple[np.ndarray, np.ndarray]] = []
        for s, reader in enumerate(parts.mixture.readers):
            wanted = last.shares[s] * SPARE_ROWS * last.seq_len if room.any() and reader.left and due[s] > 0 else 0
            pieces, lengths = reader.look(wanted, SPARE_PIECES) if wanted else (reader.passed[:0],) * 2
            lengths = lengths.astype(np.int64)
            may = (lengths <= min(due[s], room.max())) & (not last.begun[s] or last.may_take(s, pieces, lengths))
            looked.append((pieces, lengths))
            offers.append((np.full(int(may.sum()), s), np.flatnonzero(may), lengths[may]))
        stream, index, length = (np.concatenate(column) for column in zip(*offers))
        row = np.full(len(length), -1)
        order = np.argsort(-length, kind="stable")
        only_last, short_piece = last.begun[stream[order]], is_short_piece(length[order], last.short_window)
        for rows, candidates in (
            (np.array([last.row]), order[only_last]),
            *((np.flatnonzero(short == kind), order[~only_last & (short_piece == kind)]) for kind in (False, True)),
        ):
            if len(rows) and len(candidates) and room[rows].max() >= length[candidates[-1]]:
                bins = np.array(best_fit(length[candidates].tolist(), 0, room[rows].tolist()))
                row[candidates[bins >= 0]] = rows[bins[bins >= 0]]
                room -= np.bincount(row[candidates[bins >= 0]], length[candidates[bins >= 0]], len(room)).astype(int)
        for s, (pieces, lengths) in enumerate(looked):
            placed = np.flatnonzero((stream == s) & (row >= 0))
            mine = _at_most(placed, length[placed], due[s])
            np.add.at(room, row[np.setdiff1d(placed, mine)], length[np.setdiff1d(placed, mine)])
            if len(mine):
                taken = np.zeros(len(pieces), bool)
                taken[index[mine]] = True
                parts.mixture.readers[s].take(taken, lengths)
                parts.append(s, pieces[index[mine]], length[mine], row[mine])
        if not (row >= 0).any():
            return


def _at_most(indices: np.ndarray, lengths: np.ndarray, most: float) -> np.ndarray:
    """Of the indices, one after the other, those whose lengths fit into `most` tokens."""
    chosen = []
    for index, tokens in zip(indices.tolist(), lengths.tolist()):
        if tokens <= most:
            chosen.append(index)
            most -= tokens
    return np.array(chosen, np.int64)
