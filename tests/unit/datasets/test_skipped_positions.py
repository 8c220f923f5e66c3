"""Skipped positions: each method against a literal oracle, its properties for all small sizes, its distribution."""

from __future__ import annotations

import itertools
import math
import random as python_random
import tracemalloc
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest

from torchtitan.datasets.positions import row_positions
from torchtitan.datasets.skipped_positions import CREAM_SIGMA, cream, longrecipe, pose, rpes

SHORT = ("pose", "longrecipe", "cream", "random")
SIZES = [(n, limit) for n in range(1, 9) for limit in (n, n + 1, 2 * n - 1, 2 * n, 3 * n + 1, 40) if limit >= n]
SIZES += [(31, 100), (64, 256), (97, 10_000), (1000, 1001), (300, 2**22)]


def sentences_of(n: int, random: np.random.Generator) -> np.ndarray:
    """Lengths of random sentences, n tokens in all."""
    cuts = np.flatnonzero(random.random(n - 1) < 0.3) + 1
    return np.diff(cuts, prepend=0, append=n)


def place(method: str, n: int, limit: int, random: np.random.Generator) -> np.ndarray:
    if method == "longrecipe":
        return longrecipe(sentences_of(n, random), limit, random)
    functions: dict[str, Callable[..., np.ndarray]] = {"pose": pose, "cream": cream, "random": rpes}
    return functions[method](n, limit, random)


def runs(positions: np.ndarray) -> list[list[int]]:
    """The runs of consecutive positions."""
    return [run.tolist() for run in np.split(positions, np.flatnonzero(np.diff(positions) != 1) + 1)]


def far_apart(a: np.ndarray, b: np.ndarray) -> float:
    """The largest distance of two samples' distribution functions (Kolmogorov-Smirnov)."""
    at = np.concatenate([a, b])
    share = [np.searchsorted(np.sort(sample), at, side="right") / len(sample) for sample in (a, b)]
    return float(np.abs(share[0] - share[1]).max())


# All methods


@pytest.mark.parametrize("method", SHORT)
@pytest.mark.parametrize("n, limit", SIZES)
def test_positions_rise_and_stay_below_the_limit(method: str, n: int, limit: int) -> None:
    random = np.random.default_rng(n)
    for _ in range(30):
        positions = place(method, n, limit, random)
        assert positions.dtype == np.int64 and positions.shape == (n,)
        assert positions[0] >= 0 and positions[-1] < limit and (np.diff(positions) > 0).all()
        if method != "random":
            assert positions[0] == 0
        if n == limit:
            assert positions.tolist() == list(range(n))


COVERED = [(method, 64, limit) for method in SHORT for limit in (128, 256, 512)]
COVERED += [(method, 64, limit) for method in SHORT if method != "cream" for limit in (1000, 2**20)]


@pytest.mark.parametrize("method, n, limit", COVERED)
def test_every_region_is_reached(method: str, n: int, limit: int) -> None:
    """In every 1/32 of [0, limit) tokens come to lie, and as far from the first and from the last token.

    Not so with CREAM of a large factor, whose middles gather below limit / 2 by intention.
    """
    random = np.random.default_rng(0)
    rows = np.stack([place(method, n, limit, random) for _ in range(1500)])
    for reached in (rows, rows - rows[:, :1], rows[:, -1:] - rows):
        assert np.bincount((reached * 32 // limit).ravel(), minlength=32).min() > 0


@pytest.mark.parametrize("method", SHORT)
@pytest.mark.parametrize("n, limit", [(0, 10), (11, 10), (2, 1)])
def test_what_does_not_fit_is_refused(method: str, n: int, limit: int) -> None:
    random = np.random.default_rng(0)
    with pytest.raises(ValueError, match=f"{n} tokens.*{limit}"):
        if method == "longrecipe":
            longrecipe(np.ones(n, np.int64), limit, random)
        else:
            place(method, n, limit, random)


# PoSE


def test_pose_is_its_formula() -> None:
    for n, limit in SIZES:
        made, drawn = np.random.default_rng(n), np.random.default_rng(n)
        for _ in range(10):
            first, skip = int(drawn.integers(1, (n + 1) // 2 + 1)), int(drawn.integers(0, limit - n + 1))
            assert pose(n, limit, made).tolist() == [i if i < first else i + skip for i in range(n)]


def test_poses_split_and_skip_are_uniform_and_do_not_depend_on_each_other() -> None:
    n, limit, draws = 9, 29, 40_000
    random = np.random.default_rng(0)
    rows = np.stack([pose(n, limit, random) for _ in range(draws)])
    assert max(len(runs(row)) for row in rows) == 2
    skips = rows[:, -1] - (n - 1)
    shares = np.bincount(skips) / draws
    assert shares.shape == (limit - n + 1,) and np.abs(shares * (limit - n + 1) - 1).max() < 0.12
    moved = skips > 0
    first = (rows[moved] == np.arange(n)).sum(1)
    shares = np.bincount(first) / moved.sum()
    assert shares[0] == 0 and shares[1:].shape == ((n + 1) // 2,) and np.abs(shares[1:] * 5 - 1).max() < 0.06
    assert abs(np.corrcoef(first, skips[moved])[0, 1]) < 0.02


# LongRecipe


def literal_longrecipe(lengths: list[int], limit: int, slots: list[int], first: int) -> list[int]:
    """The list of the paper's Algorithm 1, made of sentences and of places that stay empty."""
    n = sum(lengths)
    filled: list[list[int | None]] = [[None] for _ in range(limit - n + len(lengths))]
    token = 0
    for sentence, (slot, length) in enumerate(zip(slots, lengths)):
        filled[slot if sentence else 0] = list(range(token, token + length))
        token += length
    flat = list(itertools.chain.from_iterable(filled))
    assert len(flat) == limit
    positions = [flat.index(i) for i in range(n)]
    return list(range(first)) + positions[first:]


def test_longrecipe_is_its_algorithm() -> None:
    for n, limit in SIZES:
        if limit > 10_000:
            continue
        for seed in range(5):
            lengths = sentences_of(n, np.random.default_rng(seed))
            made, drawn = np.random.default_rng(seed), np.random.default_rng(seed)
            slots = rpes(len(lengths), limit - n + len(lengths), drawn).tolist()
            first = int(drawn.integers(1, (n + 1) // 2 + 1))
            expected = literal_longrecipe(lengths.tolist(), limit, slots, first)
            assert len(expected) == n
            assert longrecipe(lengths, limit, made).tolist() == expected


def test_longrecipe_keeps_sentences_whole_but_for_one_cut_in_the_first_half() -> None:
    random = np.random.default_rng(0)
    for n, limit in ((50, 51), (50, 400), (301, 5000)):
        for _ in range(50):
            lengths = sentences_of(n, random)
            inside = np.delete(np.diff(longrecipe(lengths, limit, random)), np.cumsum(lengths)[:-1] - 1)
            starts = np.delete(np.arange(n - 1), np.cumsum(lengths)[:-1] - 1)
            broken = starts[inside != 1]
            assert len(broken) <= 1 and (broken < (n + 1) // 2).all()


def test_longrecipe_leaves_out_as_the_released_code_does() -> None:
    """Sentences of 1 token, 3 slots left for the second of two: the larger of two different numbers below 4."""
    random, draws = np.random.default_rng(0), 12_000
    counts = Counter(int(longrecipe(np.array([1, 1]), 4, random)[1]) for _ in range(draws))
    assert set(counts) == {1, 2, 3}
    assert all(abs(counts[slot] / draws - slot / 6) < 0.02 for slot in counts)


def test_longrecipe_gaps_are_many_and_of_all_sizes() -> None:
    random = np.random.default_rng(0)
    lengths = np.full(100, 10)
    steps = np.concatenate([np.diff(longrecipe(lengths, 10_000, random)) for _ in range(50)])
    gaps = steps[steps > 1] - 1
    assert 70 < len(gaps) / 50 < 80  # of 99 ends of sentences the reset to 0, 1, 2, ... takes a quarter on the mean
    assert gaps.min() == 1 and gaps.max() > 400


def test_longrecipe_refuses_empty_sentences() -> None:
    with pytest.raises(ValueError, match="empty"):
        longrecipe(np.array([3, 0, 2]), 10, np.random.default_rng(0))


# CREAM


def test_cream_is_its_formula() -> None:
    for n, limit in SIZES:
        if n < 3:
            continue
        factor, branches = limit / n, set()
        made, drawn = np.random.default_rng(n), np.random.default_rng(n)
        for _ in range(10):
            branch = int(drawn.integers(2))
            head = tail = min(math.floor(4 * limit / n), n // 3) if branch else n // 3
            mid = n - head - tail
            a = math.floor(np.clip(drawn.normal(1 + factor, CREAM_SIGMA), 2, math.floor(2 * limit / n)))
            lowest, highest = math.floor(head + (mid - 1) * (a / 2)), math.floor((a / 2) * n) - tail - 1
            end = int(drawn.integers(lowest, highest + 1))
            middle = list(range(end - mid + 1, end + 1))
            assert len(middle) == mid and middle[0] >= head and end < limit - tail
            expected = list(range(head)) + middle + list(range(limit - tail, limit))
            assert cream(n, limit, made).tolist() == expected
            branches.add(branch)
        assert branches == {0, 1}


def released_cream(n: int, factor: int, sigma: float, random: python_random.Random) -> list[int]:
    """As the authors draw it: whole factors, a uniform number through a distribution function at 1000 points."""
    grid = np.linspace(2, 2 * factor, 1000)
    cdf = np.array([0.5 * (1 + math.erf((x - 1 - factor) / (sigma * math.sqrt(2)))) for x in grid])
    head = tail = n // 3 if random.randint(0, 1) == 0 else 4 * factor
    mid = n - head - tail
    a = int(np.interp(random.random(), cdf, grid))
    end = random.randint(int(head + (mid - 1) * (a / 2)), int(a / 2 * n - tail - 1))
    return [*range(head), *range(end - mid + 1, end + 1), *range(factor * n - tail, factor * n)]


@pytest.mark.parametrize("factor", [2, 4, 16])
@pytest.mark.parametrize("sigma", [1.0, CREAM_SIGMA])
def test_cream_is_distributed_as_in_the_released_code(factor: int, sigma: float) -> None:
    n, draws = 300, 1500
    random, theirs = np.random.default_rng(0), python_random.Random(0)
    made = np.array([cream(n, factor * n, random, sigma) for _ in range(draws)])
    released = np.array([released_cream(n, factor, sigma, theirs) for _ in range(draws)])
    for token in (0, 80, 150, 220, 299):  # in the head or the middle, in the middle, in the middle or the tail
        # Two samples of one distribution are further apart than this once in a thousand times.
        assert far_apart(made[:, token], released[:, token]) < 1.95 * math.sqrt(2 / draws)


def test_cream_has_a_head_a_tail_and_a_middle() -> None:
    random = np.random.default_rng(0)
    heads = Counter()
    for _ in range(2000):
        positions = cream(300, 300 * 16, random)
        parts = runs(positions)
        assert len(parts) == 3 or (len(parts) == 2 and positions[-1] == 300 * 16 - 1)
        assert positions[-1] == 300 * 16 - 1
        heads[len(parts[-1])] += 1
    assert set(heads) == {100, 4 * 16} and abs(heads[100] / 2000 - 0.5) < 0.05


def test_cream_of_the_shortest() -> None:
    random = np.random.default_rng(0)
    assert cream(1, 100, random).tolist() == [0]
    assert cream(2, 100, random).tolist() == [0, 99]
    for _ in range(20):
        first, middle, last = cream(3, 100, random)
        assert (first, last) == (0, 99) and 0 < middle < 99


# RPES


def test_random_takes_every_subset_as_often() -> None:
    random, draws = np.random.default_rng(0), 12_000
    counts = Counter(tuple(rpes(3, 6, random).tolist()) for _ in range(draws))
    assert set(counts) == set(itertools.combinations(range(6), 3))
    assert all(abs(count / draws * 20 - 1) < 0.16 for count in counts.values())


@pytest.mark.parametrize("n", [2**16, 2**19])
def test_long_targets_take_little_memory(n: int) -> None:
    limit = 2**22
    tracemalloc.start()
    try:
        for method in SHORT:
            lengths, ends = np.array([n]), np.arange(n) % 20 == 0
            positions = row_positions(method, lengths, limit, (0, 0, 0), ends)
            assert (np.diff(positions) > 0).all() and positions[-1] < limit
        assert tracemalloc.get_traced_memory()[1] < 100 * 2**20
    finally:
        tracemalloc.stop()
