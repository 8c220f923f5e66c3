"""Which rank computes which rows of a step: the same rows whoever computes them, with the attention work even.

All rows have the same number of tokens, so only the cost of attention differs. It grows with the squares of the
segments: data-parallel ranks that took packed rows in slot order would differ by factors of 1.7 to 5.
"""

from __future__ import annotations

import numpy as np


def deal(work: np.ndarray, dp_degree: int, local_batch_size: int) -> np.ndarray:
    """int64[dp_degree, accumulation, local_batch_size]: the rows of a step (work int64[rows]) that each rank takes.

    The rows go round by round, heaviest first, one to each rank, the heaviest of a round to the rank that has least so
    far. Ranks wait for each other in every micro-batch, and the rows of a round have about the same weight.
    """
    rounds = np.argsort(-work, kind="stable").reshape(-1, dp_degree)
    load = np.zeros(dp_degree, np.int64)
    dealt = np.empty((dp_degree, len(rounds)), np.int64)
    for number, rows in enumerate(rounds):
        lightest = np.argsort(load, kind="stable")
        dealt[lightest, number] = rows
        load[lightest] += work[rows]
    return dealt.reshape(dp_degree, -1, local_batch_size)


def undealt(rows: int, dp_degree: int, local_batch_size: int) -> np.ndarray:
    """What deal() would return if ranks took the rows in slot order; for comparison."""
    return np.arange(rows).reshape(-1, dp_degree, local_batch_size).swapaxes(0, 1)


def imbalance(work: np.ndarray, dealt: np.ndarray) -> tuple[float, float]:
    """Work of the busiest rank divided by the mean of the ranks: (over the step, by micro-batch and then summed).

    The second decides how long ranks wait if they meet in every micro-batch, as under FSDP.
    """
    by_micro_batch = work[dealt].sum(axis=2, dtype=np.float64)  # [dp, accumulation]
    mean = by_micro_batch.sum() / len(dealt)
    return float(by_micro_batch.sum(axis=1).max() / mean), float(by_micro_batch.max(axis=0).sum() / mean)
