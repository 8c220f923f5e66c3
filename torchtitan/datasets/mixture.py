"""Which source each row of a stage comes from, so that every part of the stage has the shares that were asked for."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def source_of_rows(weights: Sequence[float], rows: int) -> np.ndarray:
    """int16[rows], the source of each row; the first rows do not depend on how many are asked for.

    Row i of source s has the time (i + 1/2) / share_s and the rows are taken in the order of time, so of any two
    sources each is within half a row of its exact share of their rows at any moment. A weight of 0
    gives no rows; the sum must be above 0.
    """
    shares = np.asarray(weights, dtype=np.float64)
    if len(shares) == 0 or not np.isfinite(shares).all() or (shares < 0).any() or shares.sum() <= 0:
        raise ValueError(f"weights must be finite, not negative and not all 0, got {list(weights)}")
    shares = shares / shares.sum()
    # The time of the last row is at most rows + S / 2 (each source is at most half a row behind its share), and by
    # then a source has at most share * time + 1/2 rows.
    counts = [math.ceil(share * (rows + len(shares) / 2) + 0.5) + 1 if share > 0 else 0 for share in shares]
    times = [(np.arange(count) + 0.5) / share for count, share in zip(counts, shares) if count]
    sources = np.repeat(np.arange(len(shares), dtype=np.int16), counts)
    return sources[np.argsort(np.concatenate(times), kind="stable")[:rows]]


def index_in_source(source_of_row: np.ndarray) -> np.ndarray:
    """int64[rows]: how many rows of the same source came before each row."""
    index = np.empty(len(source_of_row), dtype=np.int64)
    for source in np.unique(source_of_row):
        mine = source_of_row == source
        index[mine] = np.arange(int(mine.sum()))
    return index
