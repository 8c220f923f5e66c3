"""Recomputation of activations in backward (Chen et al., arXiv 1604.06174): of whole blocks, or of all of a block but
its expensive parts, optionally with the blocks' inputs kept in host memory."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from torchtitan.attention import flex
from torchtitan.config.schema import ActivationCheckpoint
from torchtitan.distributed.options.offload import HostCopies
from torchtitan.distributed.options.tiled_mlp import inside_tile
from torchtitan.models.transformer import Transformer, TransformerBlock
from torchtitan.tools.torch_compat import attention_operators

MATMULS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)


def apply_activation_checkpoint(model: Transformer, config: ActivationCheckpoint) -> None:
    """Keep only the input of each recomputed block, and with mode "selective" and option "op" what _Policy names.

    forward is replaced, not the module: parameter names stay, and FSDP's hooks stay outside of the recomputation.
    """
    every, context_fn = 1, _nothing_saved
    if config.mode == "selective" and config.selective_ac_option == "op":
        context_fn = partial(_selective, config.selective_ac_matmuls)
        for block in model.layers.values():
            assert isinstance(block, TransformerBlock)
            backend = block.attention.core.backend
            if backend.attend is flex.attend:
                # compiled, its kernels would not be seen by the policy
                block.attention.core.backend = replace(backend, attend=partial(flex.attend, visible=True))
    elif config.mode == "selective":
        every = int(config.selective_ac_option)
    copies = HostCopies() if config.offload else None
    for i, block in enumerate(model.layers.values()):
        if i % every == 0:
            block.forward = partial(_checkpointed, block.forward, context_fn, copies)  # type: ignore[method-assign]


def _checkpointed(
    forward: Callable[..., torch.Tensor], context_fn: Callable[[], Any], copies: HostCopies | None, *args: Any
) -> torch.Tensor:
    # checkpoint keeps args as saved tensors of an autograd node: hooks around it see these, and none of forward's own
    # saved tensors, which are recomputed.
    with copies.hooks() if copies else nullcontext():
        return checkpoint(forward, *args, use_reentrant=False, context_fn=context_fn)


def _nothing_saved() -> tuple[Any, Any]:
    return nullcontext(), nullcontext()


def _selective(every: int) -> tuple[Any, Any]:
    return create_selective_checkpoint_contexts(_Policy(every))


class _Policy:
    """Keeps what attention's kernels return, and every n-th matrix product (0: none).

    With long rows attention costs most to compute again, and its output is as small as the block's input. Products are
    counted in the order of execution: keys, values, queries, attention's output, w1, w3, w2. Products in compiled
    regions cannot be seen, and are recomputed; tiles of the feed-forward exist to be recomputed.
    """

    def __init__(self, every: int):
        self.every, self.attention = every, attention_operators()
        self.products = {False: 0, True: 0}
        """Matrix products so far, in forward and in the recomputation."""

    def __call__(self, context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        if operator in self.attention:
            return CheckpointPolicy.MUST_SAVE
        if self.every and operator in MATMULS and not inside_tile():
            self.products[context.is_recompute] += 1
            if self.products[context.is_recompute] % self.every == 0:
                return CheckpointPolicy.MUST_SAVE
        return CheckpointPolicy.PREFER_RECOMPUTE
