"""The attention layer: projections, optional QK norm, RoPE, and one of the segment backends.

Written for a stream [T, dim] without a batch dimension. The number of heads is read from the projected tensors, so that
tensor parallelism, applied from outside, needs no change here.
"""

from __future__ import annotations

import torch
from torch import nn

from torchtitan.attention.backends import BACKENDS, AttentionCore, LocalAttention, Mask
from torchtitan.models.rope import RopeTables, apply_rope


class Attention(nn.Module):
    """Grouped-query attention (arXiv 2305.13245), optionally with QKV bias (Qwen2) or QK norm: of each head by itself
    (Qwen3) or of all heads together (Olmo 2 and 3)."""

    def __init__(
        self,
        dim: int,
        n_heads: int,
        n_kv_heads: int,
        head_dim: int,
        qkv_bias: bool,
        qk_norm: bool,
        qk_norm_joint: bool,
        norm_eps: float,
        backend: str,
    ):
        super().__init__()
        self.head_dim = head_dim
        self.wq = nn.Linear(dim, n_heads * head_dim, bias=qkv_bias)
        self.wk = nn.Linear(dim, n_kv_heads * head_dim, bias=qkv_bias)
        self.wv = nn.Linear(dim, n_kv_heads * head_dim, bias=qkv_bias)
        self.wo = nn.Linear(n_heads * head_dim, dim, bias=False)
        self.qk_norm_joint = qk_norm_joint
        widths = (n_heads * head_dim, n_kv_heads * head_dim) if qk_norm_joint else (head_dim, head_dim)
        self.q_norm, self.k_norm = (nn.RMSNorm(width, eps=norm_eps) if qk_norm else None for width in widths)
        self.core: AttentionCore = LocalAttention(BACKENDS[backend])
        """Context parallelism replaces it from outside (distributed/context_parallel/attention.py)."""

    def forward(self, x: torch.Tensor, rope: RopeTables, mask: Mask) -> torch.Tensor:
        """x [T, dim] -> [T, dim]."""
        k, v = self._heads(self.wk(x), self.k_norm), self._heads(self.wv(x), None)
        started = self.core.start(apply_rope(k, rope), v, mask)
        # queries last: keys and values that other ranks need are on their way meanwhile
        q = self._heads(self.wq(x), self.q_norm)
        return self.wo(self.core.finish(apply_rope(q, rope), started, mask).flatten(1))

    def _heads(self, x: torch.Tensor, norm: nn.Module | None) -> torch.Tensor:
        """x [T, H * D] -> [T, H, D], normalised before or after it is split into heads, or not at all."""
        if norm is not None and self.qk_norm_joint:
            x = norm(x)
        x = x.unflatten(-1, (-1, self.head_dim))
        return norm(x) if norm is not None and not self.qk_norm_joint else x
