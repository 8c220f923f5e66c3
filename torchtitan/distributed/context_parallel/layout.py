"""Layouts: which context-parallel rank holds which tokens of a stream.

A layout is a function (segments, cp) -> owner int16[T / 128]. A stream of T tokens is cut into blocks of 128, and each
of cp ranks holds exactly T / 128 / cp of them, so that activations and all work per token are equal everywhere. What a
layout decides is how evenly attention's work falls, and how many remote keys each rank must receive. It follows from
the stream's mask (`Segments.whole`) alone, in numpy on the host: a pure function, which every rank evaluates for itself
with the same result. ValueError if T is not a multiple of 128 cp.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from torchtitan.attention.segments import Segments
from torchtitan.distributed.context_parallel.balance import balance
from torchtitan.tools.constants import BLOCK


def block_work(segments: Segments) -> np.ndarray:
    """int64[T/128]: (query, key) pairs that each block's queries attend to, exact, in O(documents + blocks).

    The first n queries of a document see n (n + 1) / 2 keys; with a window of w, r (r + 1) / 2 fewer if r = n - w > 0.
    An anchor before the document is one key more for every query; one at its start, for the r that no longer see it.
    Raises ValueError if T is not a multiple of 128 or the segments' keys are not their queries.
    """
    _blocks_per_rank(segments, 1)
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


def work_per_rank(segments: Segments, owner: np.ndarray, cp: int) -> np.ndarray:
    """float64[cp]: the (query, key) pairs that each rank's queries attend to."""
    return np.bincount(owner, weights=block_work(segments), minlength=cp)


def contiguous(segments: Segments, cp: int) -> np.ndarray:
    """Equal runs in stream order. Few remote keys, and the last rank has most work."""
    return np.repeat(np.arange(cp, dtype=np.int16), _blocks_per_rank(segments, cp))


def headtail(segments: Segments, cp: int) -> np.ndarray:
    """Each rank has a run at the front of the stream and the mirrored one at its back: even for one document.

    Known as zigzag. If a rank has an odd number of blocks, the front run has one more.
    """
    per_rank, ranks = _blocks_per_rank(segments, cp), np.arange(cp, dtype=np.int16)
    front = (per_rank + 1) // 2
    return np.concatenate([np.repeat(ranks, front), np.repeat(ranks[::-1], per_rank - front)])


def balanced(segments: Segments, cp: int) -> np.ndarray:
    """Attention's work within 5% of equal for any documents, wherever blocks of 128 allow it, and among such layouts
    few remote keys: short documents stay whole on one rank. How is in balance.py."""
    _blocks_per_rank(segments, cp)
    # A block belongs to the document of its first token: only that document's keys are needed from further back.
    # Cut there, a document costs its neighbour at most the one block that both share.
    return balance(block_work(segments), _document_of(segments, np.arange(0, segments.total, BLOCK)), cp)


def _document_of(segments: Segments, token: np.ndarray) -> np.ndarray:
    return np.searchsorted(segments.cu_seqlens, token, side="right") - 1


def _blocks_per_rank(segments: Segments, cp: int) -> int:
    cu = segments.cu_seqlens
    if not (np.array_equal(segments.k_start, cu[:-1]) and np.array_equal(segments.k_end, cu[1:])):
        raise ValueError("a layout is made from a whole stream's segments, whose keys are their queries")
    if segments.total % (BLOCK * cp):
        raise ValueError(
            f"{segments.total} tokens are not a multiple of {BLOCK} x {cp}: every rank holds as many blocks"
        )
    return segments.total // (BLOCK * cp)


LAYOUTS: dict[str, Callable[[Segments, int], np.ndarray]] = {
    "contiguous": contiguous,
    "headtail": headtail,
    "balanced": balanced,
}
