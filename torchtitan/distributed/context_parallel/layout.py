"""Layouts: which context-parallel rank holds which tokens of a stream.

A stream of T tokens is cut into blocks of 128, and each of cp ranks holds exactly T/128/cp of them, so that activations
and all per-token work are equal everywhere. What a layout decides is how evenly attention's work falls, and how many
foreign keys each rank must receive. Everything here follows from the stream's mask (`Segments.whole`) alone, in numpy
on the host: a pure function, which every rank evaluates for itself, with the same result.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from torchtitan.attention.segments import Segments
from torchtitan.tools.constants import BLOCK

EVEN = 0.004
"""Share of a rank's work by which `balanced` lets a rank miss its target to spare a cut through a document."""

UNEVEN = 1.02
"""Imbalance above which `balanced` exchanges blocks between ranks."""

FEW = 16
"""Blocks of a rank up to which all exchanges of one or two of them are looked at."""


def block_work(segments: Segments) -> np.ndarray:
    """int64[T/128]: (query, key) pairs that each block's queries attend to, exact, in O(documents + blocks).

    The first n queries of a document see n (n + 1) / 2 keys; with a window of w, r (r + 1) / 2 fewer if r = n - w > 0.
    An anchor before the document is one key more for every query; one at its start, for the r that no longer see it.
    Raises ValueError if T isn't a multiple of 128 or the segments' keys aren't their queries.
    """
    _check(segments)
    starts = segments.cu_seqlens[:-1]

    def pairs(n: np.ndarray, document: np.ndarray) -> np.ndarray:
        beyond = np.maximum(n - segments.window, 0) if segments.window is not None else np.zeros_like(n)
        seen = n * (n + 1) // 2 - beyond * (beyond + 1) // 2
        if segments.anchor is None:
            return seen
        anchor, start = segments.anchor[document], starts[document]
        return seen + np.where(anchor < 0, 0, np.where(anchor < start, n, beyond))

    before = np.zeros(len(starts) + 1, np.int64)
    np.cumsum(pairs(np.diff(segments.cu_seqlens), np.arange(len(starts))), out=before[1:])
    bounds = np.arange(0, segments.total + 1, BLOCK)
    document = np.minimum(_document_of(segments, bounds), len(starts) - 1)
    return np.diff(before[document] + pairs(bounds - starts[document], document))


def first_key_block(segments: Segments) -> np.ndarray:
    """int64[T/128]: the first block, other than the anchor's, that holds a key which the block's queries see.

    A block's queries see keys in every block from there to their own: those of the document that goes on into the block
    reach back without a gap, and further documents begin inside the block.
    """
    _check(segments)
    token = np.arange(0, segments.total, BLOCK)
    key = segments.cu_seqlens[_document_of(segments, token)]
    if segments.window is not None:
        key = np.maximum(key, token - segments.window + 1)
    return key // BLOCK


def imbalance(work: np.ndarray, owner: np.ndarray, cp: int) -> float:
    """Largest over mean of the ranks' summed `work` [blocks]; 1 is even, and `cp` - 1 ranks idle is cp."""
    total = np.bincount(owner, weights=work, minlength=cp)
    return float(total.max() / total.mean())


def contiguous(segments: Segments, cp: int) -> np.ndarray:
    """int16[T/128]: equal runs in stream order. Few foreign keys, and the last rank works hardest."""
    return np.repeat(np.arange(cp, dtype=np.int16), _blocks_per_rank(segments, cp))


def headtail(segments: Segments, cp: int) -> np.ndarray:
    """int16[T/128]: each rank a run at the front of the stream and the mirrored one at its back, even for one document.

    Known as zigzag. Of m blocks a rank the front run has the odd one, so any m will do.
    """
    per_rank, ranks = _blocks_per_rank(segments, cp), np.arange(cp, dtype=np.int16)
    front = (per_rank + 1) // 2
    return np.concatenate([np.repeat(ranks, front), np.repeat(ranks[::-1], per_rank - front)])


def balanced(segments: Segments, cp: int) -> np.ndarray:
    """int16[T/128]: attention's work even for any documents, and among such layouts few foreign keys.

    A rank that holds any part of a document needs its keys up to the highest position held. So a document whole on one
    rank costs nothing, a slice at its top costs the keys below it, and more of the same document's head nothing beyond
    that. Ranks are filled one after another, each with its share of what remains: the largest documents that fit whole;
    of one that doesn't, a slice from the top, as large as the work allows; and the lightest tokens for the rest: whole
    short documents, then the head of the next, or of the sliced document itself if that is the last. A single document
    so comes out head-tail. Where blocks are few and coarse, some are exchanged at last.
    """
    per_rank = _blocks_per_rank(segments, cp)
    work = block_work(segments)
    # A block belongs to the document of its first token: only that document's keys are needed from further back.
    # Cut there, a document costs its neighbour at most the one block that both share.
    document = _document_of(segments, np.arange(0, segments.total, BLOCK))
    lo = np.concatenate([[0], np.flatnonzero(np.diff(document)) + 1])
    owner = _fill(np.concatenate([[0], np.cumsum(work)]), lo, np.append(lo[1:], len(work)), per_rank, cp)
    _polish(owner, work, cp)
    return owner


def _fill(before: np.ndarray, lo: np.ndarray, hi: np.ndarray, per_rank: int, cp: int) -> np.ndarray:
    """The owner [blocks] that filling the ranks one after another from pieces [lo, hi) of the stream gives.

    `before` [blocks + 1] is the work of all blocks before each: any run's work is a difference. A piece is what is left
    of a document: one run of blocks, since ranks take from its ends.
    """
    owner = np.full(len(before) - 1, cp - 1, np.int16)
    left = int(before[-1])
    for rank in range(cp - 1):
        order = np.argsort((before[hi] - before[lo]) / (hi - lo), kind="stable")
        lo, hi = lo[order], hi[order]
        light, heavy, cuts = _share(before, lo, hi, per_rank, left / (cp - rank))
        bottom, top = np.zeros_like(lo), np.zeros_like(lo)
        bottom[:light] = (hi - lo)[:light]
        top[len(lo) - heavy :] = (hi - lo)[len(lo) - heavy :]
        for piece, below, above in cuts:
            bottom[piece], top[piece] = below, above
        for i in np.flatnonzero(bottom + top):
            owner[lo[i] : lo[i] + bottom[i]] = rank
            owner[hi[i] - top[i] : hi[i]] = rank
        left -= int((before[lo + bottom] - before[lo] + before[hi] - before[hi - top]).sum())
        lo, hi = lo + bottom, hi - top
        lo, hi = lo[lo < hi], hi[lo < hi]
    return owner


def _share(
    before: np.ndarray, lo: np.ndarray, hi: np.ndarray, blocks: int, target: float
) -> tuple[int, int, list[tuple[int, int, int]]]:
    """What one rank takes of the pieces [lo, hi), sorted by work per block, to have `blocks` and work near `target`.

    Returns how many of the lightest pieces and how many of the heaviest it takes whole, and for each piece that it cuts
    (index, blocks from the bottom, blocks from the top).
    """
    pieces = len(lo)
    sizes, loads = np.zeros(pieces + 1, np.int64), np.zeros(pieces + 1, np.int64)
    np.cumsum(hi - lo, out=sizes[1:])
    np.cumsum(before[hi] - before[lo], out=loads[1:])

    # The heaviest k whole, for the largest k for which the lightest blocks fill the rest within the target.
    fits = int(np.searchsorted(sizes[-1] - sizes[::-1], blocks, side="right"))
    rest = blocks - (sizes[-1] - sizes[::-1][:fits])
    total = loads[-1] - loads[::-1][:fits] + np.interp(rest, sizes, loads)
    heavy = max(int(np.count_nonzero(total <= target * (1 + EVEN))) - 1, 0)
    blocks -= int(sizes[-1] - sizes[pieces - heavy])
    need = target - float(loads[-1] - loads[pieces - heavy])
    pieces -= heavy
    light = min(int(np.searchsorted(sizes, blocks, side="right")) - 1, pieces)
    if blocks == sizes[light] and abs(need - loads[light]) <= target * EVEN:
        return light, heavy, []
    if heavy:
        # Documents are short here: a cut through the smallest that can serve, giving back some light ones to widen it.
        for back in (0, 1, 2, 4, 8):
            if back > light:
                break
            t, w = int(blocks - sizes[light - back]), need - float(loads[light - back])
            if t == 0:
                continue
            at = np.arange(light - back, pieces)
            at = at[hi[at] - lo[at] >= t]
            least = before[lo[at] + t] - before[lo[at]]
            most = before[hi[at]] - before[hi[at] - t]
            can = np.flatnonzero((least <= w + target * EVEN) & (most >= w - target * EVEN))
            if len(can):
                # The more of it comes from the top, the more work; none from the top needs the fewest keys.
                c = int(at[can[np.argmin((hi - lo)[at[can]])]])
                s = np.arange(t + 1)
                got = before[hi[c]] - before[hi[c] - s] + before[lo[c] + t - s] - before[lo[c]]
                near = np.flatnonzero(np.abs(got - w) <= target * EVEN)
                top = int(near[0] if len(near) else np.argmin(np.abs(got - w)))
                return light - back, heavy, [(c, t - top, top)]

    # A slice from the top of the heaviest piece left, as large as the work allows, or of that with the heaviest top if
    # the former is too small or too even; then light pieces whole, and the head of the next.
    best: tuple[float, int, list[tuple[int, int, int]]] | None = None
    for attempt in range(2):
        c = pieces - 1
        if attempt:
            c = int(np.argmax(before[hi[:pieces]] - before[np.maximum(hi[:pieces] - blocks, lo[:pieces])]))
        miss, j, cuts = _slice(before, lo, hi, sizes, loads, c, blocks, need)
        if best is None or miss < best[0]:
            best = miss, j, cuts
        if miss <= target * 2 * EVEN:
            break
    assert best is not None
    return best[1], heavy, best[2]


def _slice(
    before: np.ndarray,
    lo: np.ndarray,
    hi: np.ndarray,
    sizes: np.ndarray,
    loads: np.ndarray,
    c: int,
    blocks: int,
    need: float,
) -> tuple[float, int, list[tuple[int, int, int]]]:
    """How far from `need` the work of `blocks` blocks is at best that are a top slice of piece c, pieces 0 to j whole
    and a head of j's, or of c's if j is none; j; and the cuts."""
    start, end, size = int(lo[c]), int(hi[c]), int(hi[c] - lo[c])
    s = np.arange(min(blocks, size) + 1)
    j = np.minimum(np.searchsorted(sizes, blocks - s, side="right") - 1, c)
    head = blocks - s - sizes[j]
    other = (j < c) & (head <= sizes[j + 1] - sizes[j])
    # Of documents alike the sliced one's own head comes first: the rank has all that it needs.
    mean = (loads[1:] - loads[:-1]) / (sizes[1:] - sizes[:-1])
    other &= (mean[j] < 0.97 * mean[c]) | (head > size - s)
    first = np.where(other, lo[j], start)
    got = before[end] - before[end - s] + loads[j] - before[first]
    got = got + before[np.minimum(first + head, len(before) - 1)]
    miss = np.where(other | (head <= size - s), np.abs(got - need), np.inf)
    i = len(s) - 1 - int(np.argmin(miss[::-1]))
    if other[i]:
        return float(miss[i]), int(j[i]), [(c, 0, int(s[i])), (int(j[i]), int(head[i]), 0)]
    return float(miss[i]), int(j[i]), [(c, int(head[i]), int(s[i]))]


def _polish(owner: np.ndarray, work: np.ndarray, cp: int) -> None:
    """Exchanges blocks, as many each way, between the hardest working rank and another while the larger work of the two
    falls by it and the imbalance is above UNEVEN, at most 4 cp times; changes `owner` in place.

    The one's heaviest blocks go for the other's lightest, as few as close the gap, with the four ranks that work least.
    Where that isn't enough and a rank holds few blocks, all exchanges of one or two blocks are looked at.
    """
    held = np.argsort(owner, kind="stable").reshape(cp, -1)
    blocks = held.shape[1]
    total = work[held].sum(1)
    mean = float(total.mean())
    # What one rank may give for as much of another: indices of its blocks, and with how many ranks that is looked at.
    parcels: list[tuple[np.ndarray, int]] = []
    if 1 < blocks <= FEW:
        pairs = np.stack(np.triu_indices(blocks, 1), axis=1)
        parcels = [(np.arange(blocks)[:, None], cp - 1), (pairs, min(1 + (1 << 14) // len(pairs) ** 2, cp - 1))]
    fair = UNEVEN * mean
    for _ in range(4 * cp):
        heavy, lights = int(total.argmax()), np.argsort(total, kind="stable")
        if total[heavy] <= fair:
            break
        best = float(total[heavy]) * (1 - 1e-6)
        swap: tuple[int, np.ndarray, np.ndarray] | None = None
        for light in lights[: min(4, cp - 1)].tolist():
            give, take = _runs(work[held[heavy]], work[held[light]], total[heavy] - mean, mean - total[light])
            change = work[held[heavy, give]].sum() - work[held[light, take]].sum()
            worst = max(total[heavy] - change, total[light] + change)
            if worst < best:
                best, swap = worst, (light, give, take)
        for index, most in parcels:
            if best <= fair:
                break
            load, among = work[held[:, index]].sum(2), lights[:most]
            change = load[heavy, None, :, None] - load[among, None, :]
            worst = np.maximum(total[heavy] - change, total[among, None, None] + change)
            i, x, y = np.unravel_index(int(worst.argmin()), worst.shape)
            if worst[i, x, y] < best:
                best, swap = float(worst[i, x, y]), (int(among[i]), index[x], index[y])
        if swap is None:
            break
        light, give, take = swap
        held[heavy, give], held[light, take] = held[light, take], held[heavy, give]
        total[[heavy, light]] = work[held[[heavy, light]]].sum(1)
    owner[held] = np.arange(cp, dtype=np.int16)[:, None]


def _runs(mine: np.ndarray, theirs: np.ndarray, surplus: float, lack: float) -> tuple[np.ndarray, np.ndarray]:
    """The fewest blocks, of one rank and another, whose exchange brings one of the two near the mean."""
    up, down = np.argsort(theirs, kind="stable"), np.argsort(-mine, kind="stable")
    want = min(surplus, lack)
    moved = np.cumsum(mine[down] - theirs[up])
    n = int(np.argmax(moved >= want)) if moved.max() >= want else int(np.argmax(moved))
    rest = want - (float(moved[n - 1]) if n else 0.0)
    given, taken = mine[down[n:]], theirs[up[n:]]
    near = np.searchsorted(taken, given - rest)
    near = np.stack([np.maximum(near - 1, 0), np.minimum(near, len(taken) - 1)])
    side, x = np.unravel_index(int(np.abs(given - taken[near] - rest).argmin()), near.shape)
    return np.append(down[:n], down[n + x]), np.append(up[:n], up[n + near[side, x]])


def _document_of(segments: Segments, token: np.ndarray) -> np.ndarray:
    return np.searchsorted(segments.cu_seqlens, token, side="right") - 1


def _blocks_per_rank(segments: Segments, cp: int) -> int:
    _check(segments)
    if segments.total % (BLOCK * cp):
        raise ValueError(f"{segments.total} tokens are no multiple of {BLOCK} x {cp}: each of {cp} ranks holds as many")
    return segments.total // (BLOCK * cp)


def _check(segments: Segments) -> None:
    cu = segments.cu_seqlens
    if segments.total % BLOCK:
        raise ValueError(f"{segments.total} tokens are no multiple of {BLOCK}")
    if not (np.array_equal(segments.k_start, cu[:-1]) and np.array_equal(segments.k_end, cu[1:])):
        raise ValueError("a layout is made from a whole stream's segments, whose keys are their queries")


LAYOUTS: dict[str, Callable[[Segments, int], np.ndarray]] = {
    "contiguous": contiguous,
    "headtail": headtail,
    "balanced": balanced,
}
