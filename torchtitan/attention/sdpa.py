"""Attention segment by segment with PyTorch's fused kernels: memory linear in the queries and keys, on any device.

On the CPU a segment whose keys begin before its queries takes two calls, for its prefix (every query sees every key)
and its diagonal (causal), merged by their log-sum-exp as in FlashAttention (arXiv 2205.14135). With a window or anchors
attention goes in tiles of queries, each under a small explicit mask.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right

from torchtitan.attention.segments import Segments
from torchtitan.tools.torch_compat import cpu_flash_attention, cpu_flash_attention_backward

TILE = 256
"""Queries under one explicit mask; a tile's mask has TILE x (TILE + window) entries."""


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: Segments) -> torch.Tensor:
    """q [T, H, D], k and v [K, Hkv, D] -> [T, H, D]."""
    if segments.window is not None or segments.anchor is not None:
        return _masked_tiles(q, k, v, segments)
    if q.device.type == "cpu":
        return _Flash.apply(q, k, v, segments)
    return _lower_right(q, k, v, segments)


def _parts(segments: Segments) -> list[tuple[int, int, int, int, bool]]:
    """(first query, end, first key, end, causal) of each kernel call: a segment's diagonal, then its prefix if any."""
    parts = []
    bounds = (segments.cu_seqlens[:-1], segments.cu_seqlens[1:], segments.k_start, segments.k_end)
    for q0, q1, k0, k1 in zip(*(x.tolist() for x in bounds), strict=True):
        diagonal = k1 - (q1 - q0)
        parts.append((q0, q1, diagonal, k1, True))
        if diagonal > k0:
            parts.append((q0, q1, k0, diagonal, False))
    return parts


class _Flash(torch.autograd.Function):
    """All segments in one autograd node: a thousand documents are not a thousand nodes, and gradients are written in
    place."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: Segments) -> torch.Tensor:
        heads = [x.transpose(0, 1)[None] for x in (q, k, v)]  # [1, H, T, D]
        out = torch.empty_like(q)
        out_heads = out.transpose(0, 1)[None]
        lse = torch.empty(1, q.shape[1], q.shape[0], dtype=torch.promote_types(q.dtype, torch.float32))
        for q0, q1, k0, k1, causal in _parts(segments):
            part, part_lse = cpu_flash_attention(
                heads[0][:, :, q0:q1], heads[1][:, :, k0:k1], heads[2][:, :, k0:k1], causal
            )
            if not causal:  # the prefix: merge with the diagonal, which came before
                diagonal, diagonal_lse = out_heads[:, :, q0:q1], lse[:, :, q0:q1]
                both = torch.logaddexp(diagonal_lse, part_lse)
                part = (diagonal_lse - both).exp()[..., None] * diagonal + (part_lse - both).exp()[..., None] * part
                part_lse = both
            out_heads[:, :, q0:q1] = part
            lse[:, :, q0:q1] = part_lse
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.segments = segments
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, None]:  # type: ignore[override]
        q, k, v, out, lse = ctx.saved_tensors
        grad_h, q_h, k_h, v_h, out_h = (x.transpose(0, 1)[None] for x in (grad, q, k, v, out))
        # Sums over segments, which share keys if a rank holds several runs of a document.
        wide = torch.promote_types(q.dtype, torch.float32)
        dq, dk, dv = (torch.zeros_like(x, dtype=wide) for x in (q, k, v))
        dq_h, dk_h, dv_h = (x.transpose(0, 1)[None] for x in (dq, dk, dv))
        for q0, q1, k0, k1, causal in _parts(ctx.segments):
            rows, keys = slice(q0, q1), slice(k0, k1)
            # With the merged output and log-sum-exp each part's gradient is its share of the whole softmax's.
            parts = cpu_flash_attention_backward(
                grad_h[:, :, rows],
                q_h[:, :, rows],
                k_h[:, :, keys],
                v_h[:, :, keys],
                out_h[:, :, rows],
                lse[:, :, rows],
                causal,
            )
            for total, where, part in zip((dq_h, dk_h, dv_h), (rows, keys, keys), parts, strict=True):
                total[:, :, where] += part
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None


def _lower_right(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: Segments) -> torch.Tensor:
    """One call per segment with PyTorch's public bottom-right causal bias, whose CUDA kernels need no explicit mask."""
    repeat = q.shape[1] // k.shape[1]
    # split if the keys allow it: its backward is one concatenation; each slice's backward fills a tensor of all rows
    bounds = list(zip(segments.k_start.tolist(), segments.k_end.tolist()))
    keys_of: list[Any]
    cu = segments.cu_seqlens
    if segments.num_keys == cu[-1] and (segments.k_start == cu[:-1]).all() and (segments.k_end == cu[1:]).all():
        keys_of = [x.split(segments.lengths) for x in (k, v)]
    else:
        keys_of = [[x[k0:k1] for k0, k1 in bounds] for x in (k, v)]
    outs = []
    for rows, *kv in zip(q.split(segments.lengths), *keys_of, strict=True):
        # KV heads are repeated here: only some of the kernels with a bias know grouped queries
        ks, vs = (x.repeat_interleave(repeat, dim=1).transpose(0, 1)[None] for x in kv)
        bias = causal_lower_right(len(rows), ks.shape[2])
        out = F.scaled_dot_product_attention(rows.transpose(0, 1)[None], ks, vs, attn_mask=bias)
        outs.append(out[0].transpose(0, 1))
    return torch.cat(outs)


def _masked_tiles(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: Segments) -> torch.Tensor:
    """Tiles of queries, each on the keys that it may see, its anchor in front, under an explicit mask."""
    first, last, anchor = (torch.from_numpy(x) for x in segments.key_ranges())
    ends = sorted({*segments.cu_seqlens[1:].tolist(), *range(TILE, segments.total, TILE)})
    outs = []
    for rows, q1 in zip(q.split([b - a for a, b in zip([0, *ends], ends)]), ends, strict=True):
        q0 = q1 - len(rows)
        k0, k1 = int(first[q0]), int(last[q1 - 1]) + 1  # within a segment both rise
        keys = torch.arange(k0, k1)
        extra = int(anchor[q0:q1].max())  # a tile is inside a segment: one anchor, or -1
        if 0 <= extra < k0:
            keys = torch.cat((torch.tensor([extra]), keys))
        mask = (keys >= first[q0:q1, None]) & (keys <= last[q0:q1, None]) | (keys == anchor[q0:q1, None])
        index = keys.to(q.device)
        ks, vs = (x.index_select(0, index).transpose(0, 1)[None] for x in (k, v))
        out = F.scaled_dot_product_attention(
            rows.transpose(0, 1)[None],
            ks,
            vs,
            attn_mask=mask.to(q.device)[None, None],
            enable_gqa=q.shape[1] != k.shape[1],
        )
        outs.append(out[0].transpose(0, 1))
    return torch.cat(outs)
