"""The layout `balanced`: attention's work even over the ranks, and few remote keys, whatever the documents are.

layout.py calls it and says what it promises. It sees a stream as the work of its blocks and the runs of blocks that are
documents, and knows nothing of masks.

A rank that holds any part of a document needs its keys up to the highest position held. So a document whole on one rank
costs nothing, a slice at its top costs the keys below it, and more of the same document's head costs nothing beyond
that. Ranks are filled one after another, each with its share of the work that remains:

1. the largest documents that fit whole;
2. of one that does not fit, a slice from the top, as large as the work allows;
3. for the rest the tokens with the least work: whole short documents, then the head of the next, or of the sliced
   document itself if that is the last.

So a single document comes out head-tail. Where ranks hold few blocks, some blocks are exchanged at the end.
"""

from __future__ import annotations

import numpy as np

EVEN = 0.004
"""Share of a rank's work by which a rank may miss its target to spare a cut through a document."""

UNEVEN = 1.02
"""Largest over mean work of the ranks above which they exchange blocks."""

FEW = 16
"""Blocks of a rank up to which all exchanges of one or two of them are looked at."""


def balance(work: np.ndarray, document: np.ndarray, cp: int) -> np.ndarray:
    """int16[B]: the owner of each block, B / cp blocks per rank.

    work: int64[B], of each block. document: int[B], which document each block belongs to, rising.
    """
    start = np.concatenate([[0], np.flatnonzero(np.diff(document)) + 1])
    before = np.concatenate([[0], np.cumsum(work)])
    owner = _fill(before, start, np.append(start[1:], len(work)), len(work) // cp, cp)
    _even_out(owner, work, cp)
    return owner


def _fill(before: np.ndarray, lo: np.ndarray, hi: np.ndarray, per_rank: int, cp: int) -> np.ndarray:
    """int16[B]: the owner of each block when the ranks are filled one after another from the pieces [lo, hi).

    before: [B + 1], the work of all blocks before each one, so that the work of a run is a difference. A piece is what
    is left of a document: one run of blocks, because ranks take from its ends.
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

    Returns how many of the lightest and of the heaviest pieces it takes whole, and for each piece that it cuts (index,
    blocks from the bottom, blocks from the top).
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
        # Documents are short here: cut the smallest that serves, and give back some light ones to have more to cut.
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
                # More from its top is more work; nothing from its top needs the fewest keys.
                c = int(at[can[np.argmin((hi - lo)[at[can]])]])
                s = np.arange(t + 1)
                got = before[hi[c]] - before[hi[c] - s] + before[lo[c] + t - s] - before[lo[c]]
                near = np.flatnonzero(np.abs(got - w) <= target * EVEN)
                top = int(near[0] if len(near) else np.argmin(np.abs(got - w)))
                return light - back, heavy, [(c, t - top, top)]

    # A slice from the top of the heaviest piece left, as large as the work allows, or of the piece with the heaviest
    # top if the former is too small or too even; then light pieces whole, and the head of the next.
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
    """The best choice of `blocks` blocks: a slice of piece c's top, the pieces before j whole, and the head of piece j
    (or of c itself). Returns how far its work is from `need`, j, and the cuts as _share returns them."""
    start, end, size = int(lo[c]), int(hi[c]), int(hi[c] - lo[c])
    s = np.arange(min(blocks, size) + 1)
    j = np.minimum(np.searchsorted(sizes, blocks - s, side="right") - 1, c)
    head = blocks - s - sizes[j]
    other = (j < c) & (head <= sizes[j + 1] - sizes[j])
    # Among equal documents the sliced one's own head comes first: the rank already has the keys that it needs.
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


def _even_out(owner: np.ndarray, work: np.ndarray, cp: int) -> None:
    """Let the busiest rank exchange blocks, as many each way, with a rank that has less work; changes `owner` in place.

    Goes on while largest over mean work is above UNEVEN and an exchange lowers the larger work of the two, at most
    4 cp times. The busiest rank's heaviest blocks go for the other's lightest, as few as close the gap; the four ranks
    with least work are tried. If that is not enough and a rank holds few blocks, all exchanges of one or two blocks
    are looked at.
    """
    held = np.argsort(owner, kind="stable").reshape(cp, -1)
    blocks = held.shape[1]
    total = work[held].sum(1)
    mean = float(total.mean())
    # What one rank may give for as many blocks of another: indices of its blocks, and how many ranks to try it with.
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
    """The fewest blocks of one rank and of another (indices into the work of their blocks, mine and theirs) whose
    exchange brings one of the two ranks near the mean. surplus, lack: how far they are from it."""
    up, down = np.argsort(theirs, kind="stable"), np.argsort(-mine, kind="stable")
    want = min(surplus, lack)
    moved = np.cumsum(mine[down] - theirs[up])
    n = int(np.argmax(moved >= want)) if moved.max() >= want else int(np.argmax(moved))
    rest = want - (float(moved[n - 1]) if n else 0.0)
    give, take = mine[down[n:]], theirs[up[n:]]
    near = np.searchsorted(take, give - rest)
    near = np.stack([np.maximum(near - 1, 0), np.minimum(near, len(take) - 1)])
    side, x = np.unravel_index(int(np.abs(give - take[near] - rest).argmin()), near.shape)
    return np.append(down[:n], down[n + x]), np.append(up[:n], up[n + near[side, x]])
