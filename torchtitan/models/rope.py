"""Rotary position embedding (Su et al., arXiv 2104.09864) from explicit positions.

Angles are computed in float64, because a float32 product of a position and a frequency is off by 0.25 rad from 2^22
on; cos and sin are kept in float32 and the rotation is done in float32. The tables are made once per micro-batch and
passed to every layer. Pairs are (j, j + D/2), as in Hugging Face checkpoints, so weights load without permutation.
How the frequencies are rescaled for longer contexts is in rope_scaling.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal, NamedTuple

import torch

from torchtitan.models.rope_method import Scaling, plain_frequencies


@dataclass(frozen=True)
class RopeArgs:
    """Base (theta) of the rotary frequencies and how they are rescaled."""

    theta: float = 10000.0
    scaling: Scaling | None = None

    layers: Literal["all", "full_attention"] = "all"
    """Which layers the scaling is for; full_attention: those without a sliding window."""

    max_position_embeddings: int | None = None
    """The length in tokens that the model has been, or is being, trained for; None: not known."""


class RopeTables(NamedTuple):
    """cos and sin float32 [T, 1, D / 2], or [T, Hkv, D / 2] if key-value heads differ (HARPE)."""

    cos: torch.Tensor
    sin: torch.Tensor


def inverse_frequencies(rope: RopeArgs, head_dim: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Radians per token for each pair: [D / 2]; longrope: [2, D / 2], short and long; harpe: [Hkv, D / 2]."""
    if rope.scaling is None:
        return plain_frequencies(rope.theta, head_dim, dtype)
    return rope.scaling.frequencies(rope.theta, head_dim, dtype)


def longest_wavelength(rope: RopeArgs, head_dim: int) -> float:
    """Tokens in which the slowest pair turns once. HARPE: in the head where that is shortest. LongRoPE: under the long
    list."""
    freqs = inverse_frequencies(rope, head_dim)
    if rope.scaling:
        freqs = rope.scaling.of_tokens(freqs, None, slice(None))
    return 2 * math.pi / float(freqs.amin(-1).max())


@lru_cache(maxsize=64)
def _inverse_frequencies_on(rope: RopeArgs, head_dim: int, device: torch.device) -> torch.Tensor:
    return inverse_frequencies(rope, head_dim).to(device)


def rope_tables(
    rope: RopeArgs, head_dim: int, positions: torch.Tensor, long: torch.Tensor | None = None, heads: slice = slice(None)
) -> RopeTables:
    """The tables for positions int64 [T].

    long: bool [T], which tokens use LongRoPE's long list; None: all. heads: which key-value heads, if they differ.
    """
    freqs = _inverse_frequencies_on(rope, head_dim, positions.device)
    if rope.scaling:
        freqs = rope.scaling.of_tokens(freqs, long, heads)
    angles = positions.double()[:, None, None] * freqs
    magnitude = rope.scaling.magnitude() if rope.scaling else 1.0
    return RopeTables((angles.cos() * magnitude).float(), (angles.sin() * magnitude).float())


def rope_for(rope: RopeArgs, length: int) -> RopeArgs:
    """The RoPE for reading a document of `length` tokens: LongRoPE's short list up to the original length; the base of
    a dynamic NTK unless a stage has fixed it; GeNE's factor max(factor, ceil(length / L0))."""
    return replace(rope, scaling=rope.scaling.at_length(length)) if rope.scaling else rope


def drawn_rope(rope: RopeArgs, seq_len: int, seed: int, step: int, micro_batch: int) -> RopeArgs | None:
    """The RoPE of a micro-batch under a method that draws it (GeNE), the same on all ranks; None: it is not drawn."""
    scaling = rope.scaling.drawn(seq_len, seed, step, micro_batch) if rope.scaling else None
    return replace(rope, scaling=scaling) if scaling else None


def apply_rope(x: torch.Tensor, tables: RopeTables) -> torch.Tensor:
    """Rotate x [T, H, D], H a multiple of the tables' heads; computed in float32, returned in x's dtype."""
    cos, sin = tables
    if 1 < cos.shape[1] < x.shape[1]:  # query heads have the tables of their key-value head
        cos, sin = (t.repeat_interleave(x.shape[1] // t.shape[1], dim=1) for t in (cos, sin))
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)
