"""Concat packing against a ledger of tokens and a slow oracle."""

from __future__ import annotations

import numpy as np
import pytest

from torchtitan.datasets.packing import cut_row, order_epoch

LENGTHS = {
    "mixed": np.random.default_rng(1).integers(1, 60, 100),
    "one long": np.array([1000]),
    "exact": np.array([16] * 10),
    "single tokens": np.ones(70, np.int64),
    "with empty": np.array([0, 5, 0, 40, 0, 0, 3, 16, 0]),
}


@pytest.mark.parametrize("seq_len", [1, 16, 37])
@pytest.mark.parametrize("name", LENGTHS)
def test_rows_are_the_line_of_documents_cut_every_seq_len(name: str, seq_len: int) -> None:
    lengths = LENGTHS[name]
    order = order_epoch(lengths, seq_len, seed=3, source=1, epoch=2)
    line = [(d, t) for d in order.documents for t in range(lengths[d])]
    rows = len(line) // seq_len
    for row in range(rows):
        pieces = cut_row(order, row, seq_len)
        assert (pieces.stops > pieces.starts).all()
        read = [(d, t) for d, a, b in zip(pieces.documents, pieces.starts, pieces.stops) for t in range(a, b)]
        place = order.places[row]
        assert read == line[place * seq_len : (place + 1) * seq_len]
    assert sorted(order.places) == list(range(rows))
    for row in (-1, rows):
        with pytest.raises(IndexError):
            cut_row(order, row, seq_len)


@pytest.mark.parametrize("name", LENGTHS)
def test_ledger_each_token_at_most_once_an_epoch(name: str) -> None:
    lengths, seq_len = LENGTHS[name], 16
    order = order_epoch(lengths, seq_len, 0, 0, 0)
    used = [np.zeros(n, int) for n in lengths]
    for row in range(lengths.sum() // seq_len):
        pieces = cut_row(order, row, seq_len)
        for d, a, b in zip(pieces.documents, pieces.starts, pieces.stops):
            used[d][a:b] += 1
    counts = np.concatenate(used)
    assert counts.max() == 1
    assert (counts == 0).sum() == lengths.sum() % seq_len  # the tail


def test_the_order_is_a_permutation_that_each_number_changes() -> None:
    lengths = LENGTHS["mixed"]
    orders = [order_epoch(lengths, 8, *numbers).documents for numbers in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1))]
    for order in orders:
        assert sorted(order) == list(range(len(lengths)))
    assert len({tuple(order) for order in orders}) == 4
    assert (order_epoch(lengths, 8, 0, 0, 0).documents == orders[0]).all()


def test_rows_of_a_long_document_are_spread_over_the_epoch() -> None:
    """Otherwise a model would read one document for hundreds of steps on end."""
    order = order_epoch(np.array([100_000]), 100, 0, 0, 0)
    starts = np.array([cut_row(order, row, 100).starts[0] for row in range(1000)])
    assert (np.abs(np.diff(starts)) == 100).mean() < 0.02
    assert abs(np.corrcoef(starts, np.arange(1000))[0, 1]) < 0.1
