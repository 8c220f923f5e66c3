"""Packing against slow oracles: best-fit by its definition, rows full, shares kept on the way."""

from __future__ import annotations

import numpy as np
import pytest

from tests.unit.datasets.ledger import lengths_only, make_plan, rows_of
from torchtitan.datasets.packing import CHOICE, order_rows
from torchtitan.datasets.row_parts import best_fit

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


def naive_best_fit(lengths: list[int], rooms: list[int], room: int, new: bool = True) -> list[int]:
    rooms = list(rooms)
    bins = []
    for length in lengths:
        fits = [(left, bin) for bin, left in enumerate(rooms) if left >= length]
        if fits:
            bin = min(fits)[1]
        elif new:
            bin = len(rooms)
            rooms.append(room)
        else:
            bins.append(-1)
            continue
        rooms[bin] -= length
        bins.append(bin)
    return bins


@pytest.mark.parametrize("seed", range(5))
def test_best_fit_is_the_definition(seed: int) -> None:
    random = np.random.default_rng(seed)
    lengths, rooms = random.integers(1, 101, 400), random.integers(0, 101, 30).tolist()
    for order in (lengths, np.sort(lengths)[::-1]):
        assert best_fit(order.tolist(), 100) == naive_best_fit(order.tolist(), [], 100)
        assert best_fit(order.tolist(), 0, rooms) == naive_best_fit(order.tolist(), rooms, 0, new=False)


@pytest.mark.parametrize("name, most", [("mixed", 0.015), ("short", 1e-9), ("full", 0.0)])
def test_best_fit_leaves_little_padding(name: str, most: float) -> None:
    plan = make_plan([LENGTHS[name]], SEQ_LEN, ROWS)
    assert 1 - plan.table.length.sum() / (ROWS * SEQ_LEN) <= most


@pytest.mark.parametrize("name", LENGTHS)
def test_single_has_one_piece_in_a_row_and_concat_no_padding(name: str) -> None:
    plan = make_plan([LENGTHS[name]], SEQ_LEN, 1000, packing="single")
    assert (np.diff(plan.table.offsets) == 1).all()
    plan = make_plan([LENGTHS[name]], SEQ_LEN, 1000, packing="concat")
    assert plan.table.length.sum() == 1000 * SEQ_LEN


@pytest.mark.parametrize("how", ["best_fit", "concat", "single"])
def test_more_rows_begin_the_same_and_a_seed_changes_them(how: str) -> None:
    corpora = [LENGTHS["mixed"][:700], LENGTHS["awkward and short"][:3000], LENGTHS["short"][:900]]
    longest = rows_of(make_plan(corpora, SEQ_LEN, ROWS, packing=how))
    for rows in (1, 100, 128, 129, 1000):
        assert rows_of(make_plan(corpora, SEQ_LEN, rows, packing=how)) == longest[:rows]
    assert rows_of(make_plan(corpora, SEQ_LEN, 100, packing=how, seed=1)) != longest[:100]


def test_documents_of_a_row_of_one_kind(random_seed: int = 0) -> None:
    """With short_window, documents of at most so many tokens and longer ones never share a row."""
    plan = make_plan([LENGTHS["mixed"][:2000], LENGTHS["short"][:500]], SEQ_LEN, 600, short_window=20)
    for index in range(600):
        lengths = plan.row(index, 0).lengths
        assert (lengths <= 20).all() or (lengths > 20).all()


@pytest.mark.parametrize("kind", ["pure", "one stream"])
def test_order_keeps_shares(kind: str) -> None:
    random = np.random.default_rng(0)
    shares = np.array([0.5, 0.3, 0.15, 0.05]) if kind == "pure" else np.ones(1)
    streams = random.permutation(np.repeat(np.arange(len(shares)), np.rint(shares * 400).astype(int)))
    tokens = np.zeros((400, len(shares)))
    tokens[np.arange(400), streams] = 1000 * SEQ_LEN
    order = order_rows(tokens, np.tile(shares, (400, 1)), np.zeros(len(shares)), SEQ_LEN * 1000)
    assert sorted(order.tolist()) == list(range(400))
    assert (order <= np.arange(400) + CHOICE).all()  # none comes long before its place
    off = np.abs(np.cumsum(tokens[order] / (1000 * SEQ_LEN) - shares, axis=0)).max()
    assert off <= 0.8


def test_an_order_makes_good_what_was_behind() -> None:
    tokens = np.repeat(np.eye(2), 10, axis=0) * 64.0
    order = order_rows(tokens, np.full((20, 2), 0.5), np.array([-192.0, 192.0]), 64)
    assert (order[:5] < 10).all()


def test_rows_of_hundreds_of_thousands_of_documents() -> None:
    """Groups are small where pieces are short: one row of 4M tokens at a time (scripts/benchmarks/data.py: memory)."""
    corpus = lengths_only(np.full(400_000, 12))
    plan = make_plan([corpus], 4 << 20, 2)
    assert (np.add.reduceat(plan.table.length, plan.table.offsets[:-1]) > (4 << 20) - 12).all()
