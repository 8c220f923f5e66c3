"""Pieces of documents -> rows of at most seq_len tokens, a group of rows at a time.

A group is a run of the mixture's order: of each stream what it is due, of one epoch only, all of it placed. It ends
early where a stream's epoch ends. What room is left is filled with pieces from a little further on; the row with most
room may also begin the next epoch of a stream that has ended, and is then the group's last. So a row's contents depend
on its neighbourhood only, and a longer stage begins like a shorter one.
"""

from __future__ import annotations

import numpy as np

from torchtitan.datasets.fill_rows import SPARE_ROWS, LastRow, fill_gaps
from torchtitan.datasets.reading_order import Mixture
from torchtitan.datasets.row_parts import Group, Parts, best_fit, is_short_piece

GROUP_ROWS = 128
"""Rows packed together: enough pieces for best-fit to leave little room, few enough to keep the order of the pieces."""

GROUP_PIECES = 65_536
"""About how many pieces are packed together if they are short, so that memory does not grow with the row."""

CHOICE = 32
"""Rows among which the next one is chosen, so that the tokens so far have their shares."""


def make_group(mixture: Mixture, packing: str, seq_len: int, short_window: int | None = None) -> Group:
    """The next rows of the mixture, whose readers move on; the caller counts the rows that it uses.

    short_window: best-fit does not put pieces of at most this many tokens into one row with longer pieces.
    """
    budget = group_tokens(mixture, packing, seq_len)
    spare = budget * SPARE_ROWS / GROUP_ROWS if packing == "best_fit" else 0.0
    stream, piece, length, may_wait = _supply(mixture, budget + spare)
    parts = Parts(mixture)
    if packing == "best_fit":
        return _best_fit(parts, stream, piece, length, may_wait, seq_len, max(1, budget // seq_len), short_window)
    if packing == "concat":
        return _concat(parts, stream, piece, length, seq_len)
    _add(parts, stream, piece, length, np.arange(len(piece)))
    return parts.group(in_order=True)


def group_tokens(mixture: Mixture, packing: str, seq_len: int) -> int:
    """Tokens in a group that no end of an epoch cuts short."""
    shares = mixture.shares(np.array([mixture.row]))[0]
    pieces = [share * len(r.whole.lengths) / r.stream.tokens for share, r in zip(shares, mixture.readers)]
    mean = 1 / sum(pieces)
    if packing == "single":
        return int(GROUP_ROWS * mean) + 1
    return min(GROUP_ROWS * seq_len, max(seq_len, int(GROUP_PIECES * mean)))


def _supply(mixture: Mixture, budget: float) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(stream, piece, tokens) int64[N], in the order of the mixture: what is due in the next `budget` tokens, or until
    the first epoch ends; and bool[N], what need not be packed now: no epoch ends, and it has not waited already."""
    readers, horizon = mixture.readers, 2 * budget
    for reader in readers:
        if reader.left == 0:
            reader.begin()
    ends = [float(mixture.when(s, np.array([float(r.left)]), horizon)[0]) for s, r in enumerate(readers)]
    first = int(np.argmin(ends))
    span = mixture.until_change(budget)
    if ends[first] <= span:
        span = max(0.0, ends[first])
    elif ends[first] < 2 * span:  # so that no small group is left at the end
        span = ends[first] / 2
    due = mixture.due(span)
    is_end = ends[first] <= span
    if is_end:
        due[first] = readers[first].left
    found = []
    for s, reader in enumerate(readers):
        pieces, lengths = reader.look(due[s])
        middles = np.cumsum(lengths) - 0.5 * lengths
        count = max(int(np.searchsorted(middles, due[s], side="right")), int(reader.cut > 0))
        times = mixture.when(s, middles, horizon)
        if reader.cut:
            times[0] = -np.inf
        found.append((count, pieces, lengths, times))
    if not any(count for count, *_ in found):  # no piece is as short as that
        nearest = int(np.argmin([times[0] for *_, times in found]))
        found[nearest] = (1, *found[nearest][1:])
    columns: list[tuple[np.ndarray, ...]] = []
    for s, (count, pieces, lengths, times) in enumerate(found):
        may_wait = (np.arange(count) >= readers[s].waiting) & (not is_end)
        readers[s].take(np.ones(count, bool), lengths[:count])
        columns.append((times[:count], np.full(count, s), pieces[:count], lengths[:count], may_wait))
    times, *rest = (np.concatenate(column) for column in zip(*columns))
    order = np.argsort(times, kind="stable")
    stream, piece, length, may_wait = (column[order] for column in rest)
    return stream, piece, length, may_wait


def _add(parts: Parts, stream: np.ndarray, piece: np.ndarray, length: np.ndarray, row: np.ndarray) -> None:
    for s in range(len(parts.mixture.readers)):
        mine = np.flatnonzero(stream == s)
        parts.add(s, piece[mine], length[mine], row[mine], mine)


def _best_fit(
    parts: Parts,
    stream: np.ndarray,
    piece: np.ndarray,
    length: np.ndarray,
    may_wait: np.ndarray,
    seq_len: int,
    rows: int,
    short_window: int | None,
) -> Group:
    # Pieces that have waited choose their rows first.
    by_length = np.lexsort((-length, may_wait))
    bins = np.zeros(len(length), np.int64)
    short: list[bool] = []  # of each bin
    for is_short in (False, True):
        kind = by_length[is_short_piece(length[by_length], short_window) == is_short]
        if len(kind):
            bins[kind] = np.array(best_fit(length[kind].tolist(), seq_len)) + len(short)
            short += [is_short] * (int(bins[kind].max()) + 1 - len(short))
    stays = _let_wait(parts.mixture, stream, piece, length, bins, may_wait, seq_len, rows)
    kept = stays[bins]
    bins = (np.cumsum(stays) - 1)[bins]
    _add(parts, stream[kept], piece[kept], length[kept], bins[kept])
    room = seq_len - np.bincount(bins[kept], weights=length[kept]).astype(np.int64)
    emptiest, is_short_row = int(np.argmax(room)), np.array(short)[stays]
    last = LastRow(parts, emptiest, seq_len, short_window, is_short_row[emptiest])
    room[emptiest] -= last.fill(int(room[emptiest]))
    fill_gaps(parts, room, is_short_row, last)
    return parts.group(emptiest if last.begun.any() else None)


def _let_wait(
    mixture: Mixture,
    stream: np.ndarray,
    piece: np.ndarray,
    length: np.ndarray,
    bins: np.ndarray,
    may_wait: np.ndarray,
    seq_len: int,
    rows: int,
) -> np.ndarray:
    """bool[bins]: which rows to make, `rows` if possible. The emptiest others wait, if their pieces may and no share
    suffers: these come first in the next group."""
    count = int(bins.max()) + 1
    tokens = np.bincount(bins * len(mixture.readers) + stream, length, count * len(mixture.readers))
    tokens = tokens.reshape(count, -1)
    sums, filled = tokens.sum(axis=0), tokens.sum(axis=1)
    may = (np.bincount(bins, ~may_wait, count) == 0) & (filled < seq_len)
    stays = np.ones(count, bool)
    candidates = np.flatnonzero(may)
    for row in candidates[np.argsort(filled[candidates], kind="stable")][: max(0, count - rows)].tolist():
        without = sums - tokens[row]
        off, off_without = (float(np.abs(mixture.due(float(t.sum())) - t).max()) for t in (sums, without))
        if off_without <= max(off, seq_len / 4):
            stays[row], sums = False, without
    for s, reader in enumerate(mixture.readers):
        back = (stream == s) & ~stays[bins]
        reader.put_in_front(piece[back], int(length[back].sum()))
    return stays


def _concat(parts: Parts, stream: np.ndarray, piece: np.ndarray, length: np.ndarray, seq_len: int) -> Group:
    ends = np.cumsum(length)
    rows = -(-int(ends[-1]) // seq_len)
    stops = np.union1d(ends, np.arange(seq_len, int(ends[-1]), seq_len))
    starts = np.concatenate([[0], stops[:-1]])
    which = np.searchsorted(ends, starts, side="right")
    _add(parts, stream[which], piece[which], stops - starts, starts // seq_len)
    last = LastRow(parts, rows - 1, seq_len)
    last.fill(rows * seq_len - int(ends[-1]), cut=True)
    return parts.group(rows - 1 if last.begun.any() else None)


def order_rows(tokens: np.ndarray, shares: np.ndarray, behind: np.ndarray, seq_len: int) -> np.ndarray:
    """int64[R]: an order of rows in which the tokens so far have the streams' shares, and padding is spread evenly.

    tokens: float64[R, S], of each stream in each row. shares: float64[R, S], what the R rows should have. behind:
    float64[S], how many tokens of each stream were read beyond its share before. Every row is chosen among the first
    CHOICE that are left.
    """
    sums = tokens.sum(axis=1, keepdims=True)
    columns = np.concatenate([tokens, (sums - sums.mean()) / 2, sums], axis=1)  # shares count more than padding
    scale = 65536 / seq_len  # whole numbers, so that every machine chooses the same
    targets = np.concatenate([shares, np.zeros((len(tokens), 1))], axis=1)
    behind = np.rint(np.append(behind, 0.0) * scale)
    here, left = np.arange(len(tokens))[:CHOICE], columns[:CHOICE].copy()
    chosen = np.empty(len(tokens), np.int64)
    for i in range(len(tokens)):
        after = np.rint((left[:, :-1] - left[:, -1:] * targets[i]) * scale) + behind
        best = int((after**2).sum(axis=1).argmin())
        chosen[i], behind = here[best], after[best]
        new = i + CHOICE
        if new < len(tokens):
            here[best], left[best] = new, columns[new]
        else:
            here[best], left[best] = here[-1], left[-1]
            here, left = here[:-1], left[:-1]
    return chosen
