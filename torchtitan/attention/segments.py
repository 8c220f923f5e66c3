"""Segments: the one description of which query may see which key.

As FlashAttention's varlen does, a mask is a list of (query range, key range), causal with the last query aligned to the
last key (bottom-right). Without context parallelism a segment is a document and both ranges are equal; on a
context-parallel rank it is a run of a document's tokens as queries, with the document up to the run's end as keys,
found somewhere in a buffer of keys. Backends, FLOP counts and reports all derive from this, never from positions or
from an end-of-document token.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from torchtitan.tools.movable import Movable


@dataclass(frozen=True, eq=False)
class Segments(Movable):
    """S segments over T queries and a buffer of K keys. They stay on the host.

    Query i of a segment (counted from 0, of n) is aligned with key number a = k_end - n + i, its own token. It sees the
    keys max(k_start, a - window + 1) to a, and the segment's anchor.
    """

    cu_seqlens: np.ndarray
    """int64[S + 1]: query ranges, increasing from 0 to T; segment s has queries cu_seqlens[s] to cu_seqlens[s + 1]."""

    k_start: np.ndarray
    """int64[S]: first key."""

    k_end: np.ndarray
    """int64[S]: one past the last key; k_end - k_start is at least the number of queries."""

    num_keys: int
    """K."""

    window: int | None = None
    """Sliding window: how many keys a query sees at most, its own included (Mistral's convention); None: all."""

    anchor: np.ndarray | None = None
    """int64[S]: one more key that all queries of the segment see (AnchorAttention, arXiv 2411.13476), at most the
    segment's first key; -1: none."""

    keys_vary: bool = False
    """Whether K differs between this rank's micro-batches, so that compiled code must not rely on it."""

    def __post_init__(self) -> None:
        cu, lengths = self.cu_seqlens, np.diff(self.cu_seqlens)
        if len(cu) < 2 or cu[0] != 0 or (lengths <= 0).any():
            raise ValueError(f"cu_seqlens must increase from 0, got {cu[:8].tolist()}{'...' if len(cu) > 8 else ''}")
        if not len(self.k_start) == len(self.k_end) == len(lengths):
            raise ValueError(f"{len(lengths)} query ranges, {len(self.k_start)} and {len(self.k_end)} key bounds")
        wrong = (self.k_start < 0) | (self.k_end > self.num_keys) | (self.k_end - self.k_start < lengths)
        if wrong.any():
            s = int(wrong.argmax())
            raise ValueError(
                f"segment {s}: {lengths[s]} queries on the keys {self.k_start[s]} to {self.k_end[s]} of {self.num_keys}"
            )
        if self.window is not None and self.window < 1:
            raise ValueError(f"a window must have at least 1 key, got {self.window}")
        if self.anchor is not None and (self.anchor > self.k_start).any():
            raise ValueError("an anchor must not come after its segment's first key")

    @staticmethod
    def whole(
        cu_seqlens: np.ndarray | torch.Tensor | tuple[int, ...] | list[int],
        window: int | None = None,
        anchor: np.ndarray | None = None,
    ) -> Segments:
        """Segments whose queries are their keys: cu_seqlens are the ends of the documents (or rows) of a stream."""
        cu = np.asarray(cu_seqlens, dtype=np.int64)
        total = int(cu[-1]) if len(cu) else 0
        return Segments(cu, cu[:-1], cu[1:], total, window, anchor)

    @property
    def total(self) -> int:
        """T, the number of queries."""
        return int(self.cu_seqlens[-1])

    @property
    def lengths(self) -> list[int]:
        """Queries of each segment; they sum to T."""
        return np.diff(self.cu_seqlens).tolist()

    def key_ranges(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """int64[T] each: for each query the first key of its range, the last key (its own token), and its anchor or -1.

        The anchor is -1 also if the range holds it anyway.
        """
        lengths = np.diff(self.cu_seqlens)
        within = np.arange(self.total) - np.repeat(self.cu_seqlens[:-1], lengths)
        last = np.repeat(self.k_end - lengths, lengths) + within
        first = np.repeat(self.k_start, lengths)
        if self.window is not None:
            first = np.maximum(first, last - self.window + 1)
        if self.anchor is None:
            return first, last, np.full(self.total, -1)
        anchor = np.repeat(self.anchor, lengths)
        return first, last, np.where(anchor < first, anchor, -1)

    @property
    def attended_pairs(self) -> int:
        """Number of (query, key) pairs that the mask allows."""
        if self.window is None and self.anchor is None:
            n, k = np.diff(self.cu_seqlens), self.k_end - self.k_start
            return int((n * (2 * k - n + 1) // 2).sum())
        first, last, anchor = self.key_ranges()
        return int((last - first + 1 + (anchor >= 0)).sum())

    def dense_mask(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """The mask as bool [T, K], True where the row's query may see the column's key. Quadratic: for oracles."""
        first, last, anchor = (torch.from_numpy(x).to(device)[:, None] for x in self.key_ranges())
        key = torch.arange(self.num_keys, device=device)
        return ((key >= first) & (key <= last)) | (key == anchor)
