"""Rotary position embedding (Su et al., arXiv 2104.09864) from explicit positions.

Angles are computed in float64, because a float32 product of a position and a frequency is off by 0.25 rad from 2^22
on; cos and sin are kept in float32 and the rotation is done in float32. The tables are made once a micro-batch and
handed to every layer. Pairs are (j, j + D/2), as in Hugging Face checkpoints, so weights load without permutation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch


@dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1's frequency rescaling: long wavelengths are slowed by `factor`, short ones kept, a ramp in between."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class RopeArgs:
    """Base (theta) of the rotary frequencies and how they are rescaled."""

    theta: float = 10000.0
    scaling: Llama3Scaling | None = None


def inverse_frequencies(rope: RopeArgs, head_dim: int) -> torch.Tensor:
    """Radians a token for each pair: float64 [head_dim / 2]."""
    pairs = torch.arange(0, head_dim, 2, dtype=torch.float64)
    freqs = rope.theta ** (-pairs / head_dim)
    s = rope.scaling
    if s is None:
        return freqs
    rotations = s.original_max_position_embeddings * freqs / (2 * math.pi)  # turns within the original window
    keep = ((rotations - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)).clamp(0, 1)
    return freqs * (keep + (1 - keep) / s.factor)


@lru_cache(maxsize=16)
def _inverse_frequencies_on(rope: RopeArgs, head_dim: int, device: torch.device) -> torch.Tensor:
    return inverse_frequencies(rope, head_dim).to(device)


def rope_tables(rope: RopeArgs, head_dim: int, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin for positions int64 [T]: two float32 [T, head_dim / 2]."""
    angles = positions.double()[:, None] * _inverse_frequencies_on(rope, head_dim, positions.device)
    return angles.cos().float(), angles.sin().float()


def apply_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate x [T, H, D] by the tables [T, D / 2]; computed in float32, returned in x's dtype."""
    a, b = x.float().chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)
