"""Pieces of documents -> rows of at most seq_len tokens, in an order in which any stretch of the stage has its shares.

The pieces come merged (reading_order.py) and are packed in groups of some rows, so that a row's contents depend on its
neighbourhood only, and a longer stage begins like a shorter one. What does not fill a row waits for the next group.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np

GROUP_ROWS = 128
"""Rows packed together: enough pieces for best-fit to leave little room, few enough to keep the order of the pieces."""

SPARE_ROWS = 4
"""Rows' worth of further pieces that best-fit packs with a group: the fullest rows are taken, the others wait."""

CHOICE = 32
"""Rows among which the next one is chosen, so that the tokens so far have their shares."""

GROUP_SEED = 2  # apart from the streams' seeds, which end in 1
_BIN_BITS = 20  # a bin's room and number in one integer


@dataclass(frozen=True)
class Rows:
    """Rows as runs of parts: parts offsets[r] to offsets[r + 1] make row r."""

    offsets: np.ndarray
    """int64[R + 1]"""

    pieces: np.ndarray
    """int32[N], which of the merged pieces each part is of."""

    lengths: np.ndarray
    """int32[N], its tokens: the whole piece, unless concat cuts it."""


Group = tuple[np.ndarray, np.ndarray, np.ndarray]  # row in the group, piece, tokens of each part; by row


def pack(
    lengths: np.ndarray, packing: str, seq_len: int, rows: int, seed: int, short_window: int | None = None
) -> Rows:
    """`rows` rows of the merged pieces (lengths int32[N]); ValueError if these are not enough.

    short_window: best-fit does not put pieces of at most this many tokens into one row with longer pieces.

    The rows of a group come in a random order, seeded by (seed, group): best-fit makes the fullest first, and concat
    puts the rows of a long document side by side.
    """
    packers: dict[str, Callable[[np.ndarray, int], Iterator[Group]]] = {
        "best_fit": partial(_best_fit_groups, short_window=short_window),
        "concat": _concat_groups,
        "single": _single_groups,
    }
    counts, pieces, tokens, made = [], [], [], 0
    for number, (row, piece, count) in enumerate(packers[packing](lengths, seq_len)):
        size = int(row[-1]) + 1
        in_order = packing == "single"  # pieces come shuffled, and merged with the right shares
        place = np.arange(size) if in_order else np.random.default_rng([seed, number, GROUP_SEED]).permutation(size)
        order = np.argsort(place[row], kind="stable")
        pieces.append(piece[order].astype(np.int32))
        tokens.append(count[order].astype(np.int32))
        counts.append(np.bincount(place[row], minlength=size))
        made += size
        if made >= rows:
            break
    if made < rows:
        raise ValueError(f"{len(lengths)} pieces make {made} rows, not {rows}")
    offsets = np.concatenate([[0], np.cumsum(np.concatenate(counts)[:rows])])
    return Rows(offsets, np.concatenate(pieces)[: offsets[-1]], np.concatenate(tokens)[: offsets[-1]])


def tokens_wanted(rows: int, seq_len: int) -> int:
    """Tokens of merged pieces that are enough for `rows` rows under every packing."""
    # Each group takes what fills it and leaves less than half of what it had, in at most GROUP_ROWS + SPARE_ROWS rows.
    return (-(-rows // GROUP_ROWS) * GROUP_ROWS + 2 * (GROUP_ROWS + SPARE_ROWS)) * seq_len


def best_fit(lengths: list[int], room: int) -> list[int]:
    """The bin of each length: the one in which the least room is left over, or a new bin if none has room.

    Lengths in decreasing order make it best-fit decreasing (Ding et al., arXiv 2404.10830): at most 11/9 of the fewest
    bins and 1 more. O(n log bins), for bins in the hundreds.
    """
    rooms: list[int] = []  # sorted: room left << _BIN_BITS | bin
    bins = []
    made = 0
    for length in lengths:
        at = bisect_left(rooms, length << _BIN_BITS)
        if at < len(rooms):
            left = rooms.pop(at) - (length << _BIN_BITS)
        else:
            left = (room - length) << _BIN_BITS | made
            made += 1
        bins.append(left & (1 << _BIN_BITS) - 1)
        if left >> _BIN_BITS:
            insort(rooms, left)
    return bins


def _best_fit_groups(lengths: np.ndarray, seq_len: int, short_window: int | None = None) -> Iterator[Group]:
    ends = np.cumsum(lengths, dtype=np.int64)
    waiting = np.zeros(0, np.int64)
    begin = 0
    while begin < len(lengths):
        wanted = (GROUP_ROWS + SPARE_ROWS) * seq_len - int(lengths[waiting].sum())
        end = int(np.searchsorted(ends, (ends[begin - 1] if begin else 0) + wanted)) + 1
        pieces = np.concatenate([waiting, np.arange(begin, min(end, len(lengths)))])
        is_new = pieces >= begin
        begin = end
        # Pieces that have waited choose their rows first, and these rows come first: none waits for long.
        by_length = np.lexsort((-lengths[pieces], is_new))
        pieces, is_new = pieces[by_length], is_new[by_length]
        bins = np.empty(len(pieces), np.int64)
        made = 0
        for kind in _kinds(lengths[pieces], short_window):
            bins[kind] = np.array(best_fit(lengths[pieces][kind].tolist(), seq_len)) + made
            made = int(bins[kind].max()) + 1
        filled = np.bincount(bins, weights=lengths[pieces]).astype(np.int64)
        all_new = np.bincount(bins, weights=~is_new) == 0
        rank = np.empty(len(filled), np.int64)
        rank[np.lexsort((-filled, all_new))] = np.arange(len(filled))
        row = rank[bins]
        # within a row the order of the merge, not that of the lengths
        order = np.lexsort((pieces, row))
        row, pieces = row[order], pieces[order]
        taken = int(np.searchsorted(row, GROUP_ROWS))
        waiting = np.sort(pieces[taken:])
        yield row[:taken], pieces[:taken], lengths[pieces[:taken]]


def _kinds(lengths: np.ndarray, short_window: int | None) -> list[np.ndarray]:
    """Masks of the pieces that may share rows; none is empty."""
    if short_window is None:
        return [np.ones(len(lengths), bool)]
    return [kind for kind in (lengths <= short_window, lengths > short_window) if kind.any()]


def _concat_groups(lengths: np.ndarray, seq_len: int) -> Iterator[Group]:
    ends = np.cumsum(lengths, dtype=np.int64)
    size = GROUP_ROWS * seq_len
    for begin in range(0, int(ends[-1]) // size * size, size):
        cuts = np.arange(begin, begin + size + 1, seq_len)
        first, last = np.searchsorted(ends, begin, side="right"), np.searchsorted(ends, begin + size, side="left")
        stops = np.union1d(np.minimum(ends[first : last + 1], begin + size), cuts[1:])
        starts = np.concatenate([[begin], stops[:-1]])
        yield (starts - begin) // seq_len, np.searchsorted(ends, starts, side="right"), stops - starts


def _single_groups(lengths: np.ndarray, seq_len: int) -> Iterator[Group]:
    for begin in range(0, len(lengths), GROUP_ROWS):
        pieces = np.arange(begin, min(begin + GROUP_ROWS, len(lengths)))
        yield np.arange(len(pieces)), pieces, lengths[pieces]


def order_rows(tokens: np.ndarray, shares: np.ndarray, seq_len: int, count: int) -> np.ndarray:
    """int64[count]: the order in which rows are read, so that the tokens read so far have the streams' shares.

    tokens: int64[R, S], tokens of each stream in each row. Every row is chosen among the first CHOICE that are left
    (the oldest if it makes no difference, or if the oldest has waited for 2 * CHOICE rows), so R must be at least
    count + CHOICE, and a longer stage begins the same.
    """
    excess = tokens - shares * tokens.sum(axis=1, keepdims=True)
    # Whole numbers, so that every machine chooses the same: sums of products below 2^53 have no rounding.
    excess = np.rint(excess * (65536 / seq_len))
    squares = (excess**2).sum(axis=1)
    here, candidates, here_squares = np.arange(CHOICE), excess[:CHOICE].copy(), squares[:CHOICE].copy()
    behind = np.zeros(tokens.shape[1])
    chosen = np.empty(count, np.int64)
    for i in range(count):
        best = int((here_squares + 2.0 * (candidates @ behind)).argmin()) if here[0] + 2 * CHOICE > i else 0
        chosen[i] = here[best]
        behind += candidates[best]
        for kept, all_rows in ((here, None), (candidates, excess), (here_squares, squares)):
            kept[best:-1] = kept[best + 1 :]
            kept[-1] = i + CHOICE if all_rows is None else all_rows[i + CHOICE]
    return chosen
