"""Positions that skip: short rows stand for long ones (data.positions = "pose", "longrecipe", "cream" or "random").

n tokens get n different positions out of [0, limit), in rising order, drawn anew for every row, so that short rows show
the model the distances of long rows.

    pose        two runs, the second moved up by one skip                       PoSE, arXiv 2309.10400
    longrecipe  sentences stay whole, with gaps of all sizes between them       LongRecipe, arXiv 2409.00509
    cream       a head at 0, a tail at limit - 1, between them a run that
                ends near the middle more often than elsewhere                  CREAM, arXiv 2406.07138
    random      any n positions                                                 RPES, arXiv 2305.16843

PoSE's and CREAM's released code also jumps in the document where the positions jump; a row here is contiguous text.
"""

from __future__ import annotations

import numpy as np

CREAM_SIGMA = 3.0
"""The default of CREAM's released training script; its published commands do not set another."""

POSITIONS_SEED = 0x706F73  # keeps these draws apart from others that are seeded by three small numbers


def skipped_positions(
    method: str, lengths: np.ndarray, limit: int | None, seed: tuple[int, int, int], ends: np.ndarray | None = None
) -> np.ndarray:
    """Position ids of a row of T tokens in segments of the given lengths (int64[S]): int64[T].

    Every segment is placed by itself in [0, limit), from 0 on unless the method is `random`. seed and ends are those of
    positions.row_positions. ValueError for an unknown method, for a segment longer than limit, and for wrong ends.
    """
    if method not in ("pose", "longrecipe", "cream", "random"):
        raise ValueError(f"there is no position method {method!r}")
    if limit is None:
        raise ValueError(f"position method {method!r} needs a limit")
    random = np.random.default_rng([*seed, POSITIONS_SEED])
    stops = np.cumsum(lengths)
    positions = np.empty(lengths.sum(), np.int64)
    if method == "longrecipe":
        sentence_lengths, first = _sentences(ends, stops)
        for start, stop, a, b in zip(stops - lengths, stops, first, first[1:]):
            positions[start:stop] = longrecipe(sentence_lengths[a:b], limit, random)
    else:
        place = {"pose": pose, "cream": cream, "random": rpes}[method]
        for start, stop in zip((stops - lengths).tolist(), stops.tolist()):
            positions[start:stop] = place(stop - start, limit, random)
    return positions


def pose(n: int, limit: int, random: np.random.Generator) -> np.ndarray:
    """PoSE with one split: int64[n] from 0, the tokens after the first U[1, (n + 1) // 2] moved up by U[0, limit - n].

    ValueError unless 1 <= n <= limit.
    """
    _check(n, limit)
    positions = np.arange(n)
    first = random.integers(1, (n + 1) // 2, endpoint=True)
    positions[first:] += random.integers(limit - n, endpoint=True)
    return positions


def longrecipe(sentence_lengths: np.ndarray, limit: int, random: np.random.Generator) -> np.ndarray:
    """LongRecipe for sentences of the given lengths, int64[k], none empty, n tokens in all: int64[n] from 0.

    The sentences go into k of limit - n + k slots, in order; a slot without a sentence is one position that is
    skipped. As in the released code, k slots are drawn, the first is then replaced by slot 0, and at last the first
    U[1, (n + 1) // 2] tokens get 0, 1, 2, ..., which may cut a sentence. ValueError unless 1 <= n <= limit.
    """
    n, k = int(sentence_lengths.sum()), len(sentence_lengths)
    _check(n, limit)
    if sentence_lengths.min() < 1:
        raise ValueError(f"sentences must not be empty, got lengths {sentence_lengths.tolist()[:8]}")
    slots = rpes(k, limit - n + k, random)
    slots[0] = 0
    # Before slot s of sentence i lie i sentences and s - i skipped positions.
    positions = np.arange(n) + np.repeat(slots - np.arange(k), sentence_lengths)
    first = int(random.integers(1, (n + 1) // 2, endpoint=True))
    positions[:first] = np.arange(first)
    return positions


def cream(n: int, limit: int, random: np.random.Generator, sigma: float = CREAM_SIGMA) -> np.ndarray:
    """CREAM: int64[n], a head from 0, a tail that ends at limit - 1, and a middle of contiguous positions.

    With F = limit / n, head and tail have n // 3 tokens each, or, as often, 4 F (but no more than n // 3, which short
    segments would exceed). The middle ends at U[head + (mid - 1) a / 2, a n / 2 - tail - 1], where a is a normal draw
    of mean 1 + F and standard deviation sigma, cut down to an integer and into [2, 2 F]: the released code's
    interpolated distribution function without its grid of 1000 points, which large F outgrow. Middles end below
    a n / 2, so for F far above sigma few tokens but the tail's lie beyond limit / 2 + sigma n; a larger sigma spreads
    them. A single token is at 0, the second of two at limit - 1. ValueError unless 1 <= n <= limit.
    """
    _check(n, limit)
    positions = np.arange(n)
    if n == 1:
        return positions
    head = max(n // 3, 1)
    if random.integers(2):
        head = min(head, 4 * limit // n)
    tail = head
    mid = n - head - tail
    a = min(max(int(random.normal(1 + limit / n, sigma)), 2), 2 * limit // n)
    if mid:
        end = random.integers(head + (mid - 1) * a // 2, a * n // 2 - tail - 1, endpoint=True)
        positions[head : n - tail] += end - (head + mid - 1)
    positions[n - tail :] += limit - n
    return positions


def rpes(n: int, limit: int, random: np.random.Generator) -> np.ndarray:
    """Randomized positions: int64[n], a sorted sample of n different positions of [0, limit).

    ValueError unless 1 <= n <= limit.
    """
    _check(n, limit)
    return np.sort(random.choice(limit, n, replace=False, shuffle=False))


def _check(n: int, limit: int) -> None:
    if not 1 <= n <= limit:
        raise ValueError(f"{n} tokens cannot have different positions in [0, {limit})")


def _sentences(ends: np.ndarray | None, stops: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Lengths of a row's sentences, and the index of each segment's first sentence with their number at the end."""
    total = int(stops[-1]) if len(stops) else 0
    if ends is None or ends.shape != (total,):
        raise ValueError(f"longrecipe needs ends, bool[{total}], got {None if ends is None else ends.shape}")
    marks = ends.astype(bool)
    marks[stops - 1] = True
    last = np.flatnonzero(marks)
    first = np.concatenate([[0], np.searchsorted(last, stops - 1) + 1])
    return np.diff(last, prepend=-1), first
