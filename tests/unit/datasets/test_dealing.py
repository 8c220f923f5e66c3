"""Dealing the rows of a step: a partition whatever the layout, even work, the figures of the report."""

from __future__ import annotations

import numpy as np
import pytest

from torchtitan.config.data_schema import Data, Source
from torchtitan.datasets.corpus import Corpus
from torchtitan.datasets.dealing import deal, imbalance, undealt
from torchtitan.datasets.plan import Plan
from torchtitan.models.work import training_flops

LAYOUTS = [(1, 1), (2, 1), (8, 1), (2, 4), (4, 2), (16, 4), (64, 1)]


@pytest.mark.parametrize("dp, local", LAYOUTS)
def test_every_row_is_dealt_once(dp: int, local: int) -> None:
    work = np.random.default_rng(0).integers(1, 10**12, 64)
    for dealt in (deal(work, dp, local), undealt(64, dp, local)):
        assert dealt.shape == (dp, 64 // dp // local, local)
        assert sorted(dealt.ravel()) == list(range(64))
    assert (deal(work, dp, local) == deal(work.copy(), dp, local)).all()


@pytest.mark.parametrize("dp, local", LAYOUTS[1:6])
def test_no_micro_batch_is_far_from_the_others_of_its_round(dp: int, local: int) -> None:
    """The spread in a round is at most what the sorted rows drop over that round."""
    work = np.random.default_rng(1).lognormal(10, 2, 64).astype(np.int64)
    per_rank = work[deal(work, dp, local)].sum(axis=2)
    descending = -np.sort(-work)
    for number in range(per_rank.shape[1]):
        begin, end = number * dp * local, (number + 1) * dp * local
        drop = sum(descending[r] - descending[min(r + dp, end) - 1] for r in range(begin, end, dp))
        assert per_rank[:, number].max() - per_rank[:, number].min() <= drop


def test_imbalance_by_hand() -> None:
    work = np.array([8, 1, 1, 2])
    dealt = np.array([[[0], [1]], [[2], [3]]])  # rank 0: 8 then 1, rank 1: 1 then 2
    assert imbalance(work, dealt) == (9 / 6, (8 + 2) / 6)
    assert imbalance(np.ones(4, int), dealt) == (1.0, 1.0)


def test_an_8b_model_on_a_60_40_mix_over_8_ranks() -> None:
    """64K rows, 16 a rank a step: 60 % in documents of at least 64K tokens, 40 % short ones, as ProLong's."""
    random = np.random.default_rng(0)
    long = np.exp(random.uniform(np.log(65536), np.log(500_000), 2000)).astype(np.int64)
    short = np.exp(random.normal(6.6, 1.2, 200_000)).clip(30, 60_000).astype(np.int64)
    corpora = [
        Corpus(name, [(np.concatenate([[0], np.cumsum(n)]), np.zeros(0, np.int32))], name, None)
        for name, n in (("long", long), ("short", short))
    ]
    data = Data(sources=(Source("long", "l", 0.6), Source("short", "s", 0.4)))
    plan = Plan(data, corpora, seq_len=65536, rows_per_step=128, steps=40, seed=0)
    # Llama 3.1 8B: 7.5e9 parameters in matrix products, 32 layers of 32 heads of 128
    linear, pair = training_flops(7_504_924_672, 65536, 0, 0), training_flops(0, 0, 32 * 32 * 128, 1)
    dealt, before = [], []
    for step in range(plan.steps):
        work = plan.work(step) * pair + linear
        dealt.append(imbalance(work, deal(plan.work(step), 8, 1)))
        before.append(imbalance(work, undealt(128, 8, 1)))
    (step_after, micro_after), (step_before, micro_before) = np.mean(dealt, axis=0), np.mean(before, axis=0)
    assert step_after <= 1.05 and micro_after <= 1.05
    assert step_before > 1.08 and micro_before > 1.2  # so that there was something to even out
