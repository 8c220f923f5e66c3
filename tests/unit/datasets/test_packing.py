"""Packing against slow oracles: every piece once and whole, rows full, order kept near, shares kept on the way."""

from __future__ import annotations

import numpy as np
import pytest

from torchtitan.datasets import packing
from torchtitan.datasets.packing import CHOICE, best_fit, order_rows, pack, tokens_wanted

RANDOM = np.random.default_rng(1)
SEQ_LEN = 64
LENGTHS = {
    "mixed": RANDOM.integers(1, 65, 60_000),
    "short": RANDOM.integers(1, 9, 300_000),
    "full": np.full(12_000, 64),
    "awkward": np.full(24_000, 35),  # no two in a row
    "awkward and short": np.where(RANDOM.random(40_000) < 0.3, 40, RANDOM.integers(1, 30, 40_000)),
}
ROWS = 3000


def rows_of(name: str, how: str, rows: int = ROWS, seed: int = 0) -> list[list[tuple[int, int]]]:
    """(piece, tokens) of each row."""
    packed = pack(LENGTHS[name].astype(np.int32), how, SEQ_LEN, rows, seed)
    assert packed.offsets[0] == 0 and packed.offsets[-1] == len(packed.pieces) == len(packed.lengths)
    parts = list(zip(packed.pieces.tolist(), packed.lengths.tolist()))
    return [parts[a:b] for a, b in zip(packed.offsets, packed.offsets[1:])]


def naive_best_fit(lengths: list[int], room: int) -> list[int]:
    rooms: list[int] = []
    bins = []
    for length in lengths:
        fits = [(left, bin) for bin, left in enumerate(rooms) if left >= length]
        if fits:
            _, bin = min(fits)
        else:
            bin = len(rooms)
            rooms.append(room)
        rooms[bin] -= length
        bins.append(bin)
    return bins


@pytest.mark.parametrize("seed", range(5))
def test_best_fit_is_the_definition(seed: int) -> None:
    lengths = np.random.default_rng(seed).integers(1, 101, 400)
    for order in (lengths, np.sort(lengths)[::-1]):
        assert best_fit(order.tolist(), 100) == naive_best_fit(order.tolist(), 100)


@pytest.mark.parametrize("how", ["best_fit", "single"])
@pytest.mark.parametrize("name", LENGTHS)
def test_pieces_stay_whole_and_are_used_once(name: str, how: str) -> None:
    rows = rows_of(name, how)
    assert len(rows) == ROWS
    used = [piece for row in rows for piece, _ in row]
    assert len(set(used)) == len(used)
    for row in rows:
        assert row and sum(n for _, n in row) <= SEQ_LEN
        assert all(n == LENGTHS[name][piece] for piece, n in row)
        assert how == "best_fit" or len(row) == 1


@pytest.mark.parametrize("name", LENGTHS)
def test_no_piece_waits_for_long(name: str) -> None:
    """All that came before are used, but those of the last blocks."""
    rows = rows_of(name, "best_fit")
    used = {piece for row in rows for piece, _ in row}
    unused = sorted(set(range(max(used))) - used)
    if unused:
        tokens_since = LENGTHS[name][unused[0] : max(used)].sum()
        assert tokens_since <= 4 * (packing.GROUP_ROWS + packing.SPARE_ROWS) * SEQ_LEN


@pytest.mark.parametrize("name, most", [("mixed", 0.02), ("short", 1e-9), ("full", 0.0)])
def test_best_fit_leaves_little_padding(name: str, most: float) -> None:
    filled = [sum(n for _, n in row) for row in rows_of(name, "best_fit")]
    assert 1 - np.mean(filled) / SEQ_LEN <= most


@pytest.mark.parametrize("name", LENGTHS)
def test_concat_is_the_line_cut_every_seq_len(name: str) -> None:
    rows = rows_of(name, "concat")
    line = [piece for piece, n in enumerate(LENGTHS[name]) for _ in range(n)]
    expected = [line[i * SEQ_LEN : (i + 1) * SEQ_LEN] for i in range(-(-ROWS // 128) * 128)]
    got = [[piece for piece, n in row for _ in range(n)] for row in rows]
    group = packing.GROUP_ROWS
    for begin in range(0, ROWS // group * group, group):
        assert sorted(got[begin : begin + group]) == sorted(expected[begin : begin + group])
    if name != "full":
        assert got[:group] != expected[:group]  # shuffled within the group


@pytest.mark.parametrize("how", ["best_fit", "concat", "single"])
@pytest.mark.parametrize("name", LENGTHS)
def test_more_rows_begin_the_same(name: str, how: str) -> None:
    longest = rows_of(name, how)
    for rows in (1, 100, 128, 129, 1000):
        assert rows_of(name, how, rows) == longest[:rows]
    assert how == "single" or rows_of(name, how, 100, seed=1) != longest[:100]


@pytest.mark.parametrize("how", ["best_fit", "concat", "single"])
@pytest.mark.parametrize("name", LENGTHS)
def test_tokens_wanted_are_enough(name: str, how: str) -> None:
    for rows in (1, 127, 128, 500):
        ends = np.cumsum(LENGTHS[name])
        stop = int(np.searchsorted(ends, tokens_wanted(rows, SEQ_LEN))) + 1
        assert stop < len(ends)
        assert len(pack(LENGTHS[name][:stop].astype(np.int32), how, SEQ_LEN, rows, 0).offsets) == rows + 1


def test_too_few_pieces_are_an_error() -> None:
    for how in ("best_fit", "concat", "single"):
        with pytest.raises(ValueError, match="not 1000"):
            pack(np.full(10, 64, np.int32), how, SEQ_LEN, 1000, 0)


@pytest.mark.parametrize("kind", ["pure", "one stream"])
def test_order_keeps_shares_and_no_row_waits(kind: str) -> None:
    random = np.random.default_rng(0)
    shares = np.array([0.5, 0.3, 0.15, 0.05]) if kind != "one stream" else np.ones(1)
    count = 4000
    tokens = np.zeros((count + CHOICE, len(shares)), np.int64)
    # as packing gives them: blocks of rows with the right shares, in a random order
    group = np.repeat(np.arange(len(shares)), np.rint(shares * 100).astype(int))
    streams = np.concatenate([random.permutation(group) for _ in range(count // 100 + 1)])[: count + CHOICE]
    tokens[np.arange(count + CHOICE), streams] = SEQ_LEN * 1000
    order = order_rows(tokens, shares, SEQ_LEN * 1000, count)
    assert len(set(order.tolist())) == count
    lag = np.arange(count) - order
    assert lag.min() > -CHOICE and lag.max() <= 2 * CHOICE + CHOICE
    off = np.abs(np.cumsum(tokens[order] - shares * SEQ_LEN * 1000, axis=0)).max() / (SEQ_LEN * 1000)
    as_packed = np.abs(np.cumsum(tokens[:count] - shares * SEQ_LEN * 1000, axis=0)).max() / (SEQ_LEN * 1000)
    assert off <= 2.5
    assert kind == "one stream" or off < 0.6 * as_packed
    assert (order_rows(tokens[: 500 + CHOICE], shares, SEQ_LEN * 1000, 500) == order[:500]).all()
