"""Recomputation of activations in backward (Chen et al., arXiv 1604.06174)."""

from __future__ import annotations

from functools import partial

from torch.utils.checkpoint import checkpoint

from torchtitan.models.transformer import Transformer


def apply_activation_checkpoint(model: Transformer) -> None:
    """Keep only each block's input and recompute the block in backward.

    forward is replaced, not the module: parameter names stay, and FSDP's hooks stay outside of the recomputation.
    """
    for block in model.layers.values():
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)  # type: ignore[method-assign]
