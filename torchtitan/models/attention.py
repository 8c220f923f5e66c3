"""The attention layer: projections, optional QK norm, RoPE, and one of the segment backends.

Written on a stream [T, dim] without a batch dimension. The number of heads is read off the projected tensors, so that
tensor parallelism, applied from outside, needs no change here.
"""

from __future__ import annotations

import torch
from torch import nn

from torchtitan.attention.backends import BACKENDS, AttentionCore, LocalAttention, Mask
from torchtitan.models.rope import RopeTables, apply_rope


class Attention(nn.Module):
    """Grouped-query attention (arXiv 2305.13245) with QKV bias (Qwen2) or per-head QK norm (Qwen3) if asked for."""

    def __init__(
        self,
        dim: int,
        n_heads: int,
        n_kv_heads: int,
        head_dim: int,
        qkv_bias: bool,
        qk_norm: bool,
        norm_eps: float,
        backend: str,
    ):
        super().__init__()
        self.head_dim = head_dim
        self.wq = nn.Linear(dim, n_heads * head_dim, bias=qkv_bias)
        self.wk = nn.Linear(dim, n_kv_heads * head_dim, bias=qkv_bias)
        self.wv = nn.Linear(dim, n_kv_heads * head_dim, bias=qkv_bias)
        self.wo = nn.Linear(n_heads * head_dim, dim, bias=False)
        self.q_norm = nn.RMSNorm(head_dim, eps=norm_eps) if qk_norm else None
        self.k_norm = nn.RMSNorm(head_dim, eps=norm_eps) if qk_norm else None
        self.core: AttentionCore = LocalAttention(BACKENDS[backend])
        """Context parallelism puts another object with these two methods here, from outside."""

    def forward(self, x: torch.Tensor, rope: RopeTables, mask: Mask) -> torch.Tensor:
        """x [T, dim] -> [T, dim]."""
        k, v = (w(x).unflatten(-1, (-1, self.head_dim)) for w in (self.wk, self.wv))
        if self.k_norm is not None:
            k = self.k_norm(k)
        started = self.core.start(apply_rope(k, rope), v, mask)
        # queries last: keys and values that other ranks need are on their way meanwhile
        q = self.wq(x).unflatten(-1, (-1, self.head_dim))
        if self.q_norm is not None:
            q = self.q_norm(q)
        return self.wo(self.core.finish(apply_rope(q, rope), started, mask).flatten(1))
