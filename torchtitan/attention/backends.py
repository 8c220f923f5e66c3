"""Attention over segments, in several ways that must agree.

Every backend is a function (q, k, v, segments) -> output with q [T, H, D], k and v [T, Hkv, D], H a multiple of Hkv
(query head h reads KV head h // (H / Hkv)), output [T, H, D] in q's dtype; logits are scaled by 1/sqrt(D).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from torchtitan.attention.segments import Segments

Backend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Segments], torch.Tensor]


def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: Segments) -> torch.Tensor:
    """One causal scaled_dot_product_attention a segment: memory linear in T, work only where the mask allows it."""
    # split, not slices: its backward is one concatenation, where each slice's backward would fill a tensor of T rows
    parts = [
        F.scaled_dot_product_attention(
            qs.transpose(0, 1)[None],
            ks.transpose(0, 1)[None],
            vs.transpose(0, 1)[None],
            is_causal=True,
            enable_gqa=q.shape[1] != k.shape[1],
        )[0].transpose(0, 1)
        for qs, ks, vs in zip(*(x.split(segments.lengths) for x in (q, k, v)), strict=True)
    ]
    return torch.cat(parts)


def dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: Segments) -> torch.Tensor:
    """Softmax over an explicit [T, T] mask, in float32 (or float64 for float64 input): the oracle of the tests."""
    repeat = q.shape[1] // k.shape[1]
    dtype = torch.promote_types(q.dtype, torch.float32)
    qh, kh, vh = (x.to(dtype).transpose(0, 1) for x in (q, k, v))
    kh, vh = (x.repeat_interleave(repeat, dim=0) for x in (kh, vh))
    scores = qh @ kh.transpose(1, 2) / q.shape[-1] ** 0.5
    scores = scores.masked_fill(~segments.dense_mask(q.device), float("-inf"))
    return (scores.softmax(-1) @ vh).transpose(0, 1).to(q.dtype)


BACKENDS: dict[str, Backend] = {"sdpa": sdpa, "dense": dense}
