"""source_of_rows: shares hold on every prefix and a longer stage begins like a shorter one."""

from __future__ import annotations

import numpy as np
import pytest

from torchtitan.datasets.mixture import index_in_source, source_of_rows

RANDOM = np.random.default_rng(0)
WEIGHTS = [[1.0], [1, 1], [3, 1], [0.7, 0.3], [1e-3, 1], [2, 0, 1], [1, 1, 1, 1], [0.6, 0.3, 0.07, 0.03]]
WEIGHTS += [list(RANDOM.dirichlet([0.5] * n)) for n in (2, 3, 5, 8, 13)]


@pytest.mark.parametrize("weights", WEIGHTS)
def test_every_pair_has_its_share_on_every_prefix(weights: list[float]) -> None:
    rows = source_of_rows(weights, 3000)
    assert rows.dtype == np.int16 and len(rows) == 3000
    counts = np.stack([np.cumsum(rows == s) for s in range(len(weights))])
    for a in range(len(weights)):
        for b in range(len(weights)):
            if weights[a] + weights[b] > 0:
                share = weights[a] / (weights[a] + weights[b])
                assert np.abs(counts[a] - (counts[a] + counts[b]) * share).max() <= 0.5 + 1e-6


@pytest.mark.parametrize("weights", WEIGHTS)
def test_a_longer_stage_begins_the_same(weights: list[float]) -> None:
    longest = source_of_rows(weights, 2000)
    for rows in (0, 1, 2, 7, 100, 1999):
        assert (source_of_rows(weights, rows) == longest[:rows]).all()


def test_only_the_proportions_matter() -> None:
    assert (source_of_rows([3, 1], 500) == source_of_rows([0.75, 0.25], 500)).all()


def test_index_in_source_counts_each_source() -> None:
    rows = source_of_rows([0.5, 0.3, 0.2], 500)
    index = index_in_source(rows)
    seen = [0, 0, 0]
    for source, i in zip(rows, index):
        assert i == seen[source]
        seen[source] += 1


@pytest.mark.parametrize("weights", [[], [0, 0], [1, -1], [float("nan"), 1], [float("inf"), 1]])
def test_bad_weights(weights: list[float]) -> None:
    with pytest.raises(ValueError):
        source_of_rows(weights, 3)
