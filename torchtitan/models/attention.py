"""The attention layer: projections, optional QK norm, RoPE, and one of the segment backends.

Written on a stream [T, dim] without a batch dimension. The number of heads is read off the projected tensors, so that
tensor parallelism, applied from outside, needs no change here.
"""

from __future__ import annotations

import torch
from torch import nn

from torchtitan.attention.backends import BACKENDS
from torchtitan.attention.segments import Segments
from torchtitan.models.rope import apply_rope


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
        # a Python loop over ragged segments: nothing for torch.compile to gain, and it must not recompile a length
        self.attend = torch.compiler.disable(BACKENDS[backend])

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, segments: Segments) -> torch.Tensor:
        """x [T, dim], cos and sin float32 [T, head_dim / 2] -> [T, dim]."""
        q, k, v = (w(x).unflatten(-1, (-1, self.head_dim)) for w in (self.wq, self.wk, self.wv))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        return self.wo(self.attend(q, k, v, segments).flatten(1))
