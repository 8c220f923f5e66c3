"""Segments: the one description of which token may attend to which.

A stream of T tokens is cut into consecutive segments; a token attends to itself and to the earlier tokens of its own
segment, and to nothing else. Backends, FLOP counts and reports all derive from this, never from positions or from
an end-of-document token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Segments:
    """Segment ends of a stream, as FlashAttention's varlen interface gives them.

    cu_seqlens: S+1 increasing offsets, the first 0 and the last T. Kept as Python integers because every backend
    loops over them or builds index tensors on the host.
    """

    cu_seqlens: tuple[int, ...]

    def __post_init__(self) -> None:
        cu = self.cu_seqlens
        if len(cu) < 2 or cu[0] != 0 or any(b <= a for a, b in zip(cu, cu[1:], strict=False)):
            raise ValueError(f"cu_seqlens must increase from 0, got {cu[:8]}{'...' if len(cu) > 8 else ''}")

    @staticmethod
    def from_tensor(cu_seqlens: torch.Tensor) -> Segments:
        """cu_seqlens: integer tensor [S+1] on the CPU."""
        return Segments(tuple(cu_seqlens.tolist()))

    @property
    def total(self) -> int:
        """T, the number of tokens."""
        return self.cu_seqlens[-1]

    @property
    def lengths(self) -> list[int]:
        """Tokens of each segment; they sum to T."""
        return [b - a for a, b in zip(self.cu_seqlens, self.cu_seqlens[1:], strict=False)]

    @property
    def attended_pairs(self) -> int:
        """Number of (query, key) pairs that the mask allows: sum of n (n + 1) / 2."""
        return sum(n * (n + 1) // 2 for n in self.lengths)

    def dense_mask(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """The mask as bool [T, T], True where the row's query may see the column's key. Quadratic: for oracles."""
        lengths = torch.tensor(self.lengths, device=device)
        segment = torch.repeat_interleave(torch.arange(len(lengths), device=device), lengths)
        same = segment[:, None] == segment[None, :]
        return same & torch.ones_like(same).tril()
