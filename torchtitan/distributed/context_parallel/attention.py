"""Puts context-parallel attention into a model, from outside."""

from __future__ import annotations

import torch.distributed as dist

from torchtitan.distributed.context_parallel.exchange import GatheredAttention
from torchtitan.distributed.options.ulysses import UlyssesAttention
from torchtitan.models.attention import Attention
from torchtitan.models.transformer import Transformer


def apply_context_parallel(model: Transformer, group: dist.ProcessGroup, exchange: str, head_chunks: int) -> None:
    """Let every layer's attention fetch the keys that its queries see from the ranks of group. It then needs the masks
    that local_batch.py makes.

    head_chunks: parallelism.context_parallel_head_chunks, of `ulysses` only.
    """
    for block in model.layers.values():
        attention = block.attention
        assert isinstance(attention, Attention)
        if exchange == "ulysses":
            attention.core = UlyssesAttention(model.backend, group, head_chunks)
        else:
            attention.core = GatheredAttention(model.backend, exchange, group)
