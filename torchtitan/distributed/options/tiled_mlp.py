"""The feed-forward over tiles of tokens, so that its hidden units, 3.5 times as wide as the stream in Llama 3, exist
for one tile at a time (Arctic Long Sequence Training, arXiv 2506.13996).

Forward keeps the input only; backward computes each tile again and sums the gradients of the matrices over tiles in
float32. All tiles run between the hooks of the block, so FSDP2 gathers its parameters and reduces their gradients as
often as without tiles. Under tensor parallelism a tile has tokens of every rank: the stream is gathered and scattered
tile by tile, in as many bytes as without tiles.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from torchtitan.models.transformer import Transformer, TransformerBlock

_depth = 0


def inside_tile() -> bool:
    """Whether a tile's forward is running, which backward computes again: its results are not worth keeping."""
    return _depth > 0


@contextmanager
def _a_tile() -> Iterator[None]:
    global _depth
    _depth += 1
    try:
        yield
    finally:
        _depth -= 1


def apply_tiled_mlp(model: Transformer, tile_tokens: int, tp: int) -> None:
    """Compute every feed-forward for tile_tokens at a time; each of tp ranks has 1 / tp of them in its stream."""
    for block in model.layers.values():
        assert isinstance(block, TransformerBlock)
        block.mlp = partial(_tiled, block.feed_forward, max(tile_tokens // tp, 1))  # type: ignore[method-assign]


# its loop and its second autograd in backward are not for torch.compile; the module inside may be compiled by itself
@torch.compiler.disable
def _tiled(module: nn.Module, tile: int, x: torch.Tensor) -> torch.Tensor:
    """x [t, dim] -> [t, dim]."""
    if isinstance(x, DTensor):  # cut by tokens by tensor parallelism's norm, as the module expects its input
        x = x.to_local()
    if len(x) <= tile or not (torch.is_grad_enabled() and x.requires_grad):
        return torch.cat([module(part) for part in x.split(tile)])
    kept = _Keep.apply(x)
    return _Tiled.apply(kept, kept.grad_fn, module, tile, *module.parameters())


class _Keep(torch.autograd.Function):
    """The identity, which saves its input for _Tiled.

    Saved before the tiles run, and not by _Tiled after them: the recomputation of a block ends when all tensors that
    were saved exist again, and the feed-forward comes last.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return grad


class _Tiled(torch.autograd.Function):
    """See the head of this file. kept: the node of _Keep. parameters: the module's, which receive their gradients."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, kept: Any, module: nn.Module, tile: int, *parameters: torch.Tensor
    ) -> torch.Tensor:
        ctx.kept, ctx.module, ctx.tile = kept, module, tile
        out = torch.empty_like(x)
        with _a_tile():
            for part, result in zip(x.split(tile), out.split(tile), strict=True):
                result.copy_(module(part))
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        (x,) = ctx.kept.saved_tensors
        parameters = tuple(ctx.module.parameters())
        grad_x = torch.empty_like(x)
        sums = [torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for p in parameters]
        pieces = (tensor.split(ctx.tile) for tensor in (x, grad, grad_x))
        for part, part_grad, result in zip(*pieces, strict=True):
            part = part.detach().requires_grad_()
            with torch.enable_grad():
                out = ctx.module(part)
            part_grad_x, *part_sums = torch.autograd.grad(out, (part, *parameters), part_grad)
            result.copy_(part_grad_x)
            for total, share in zip(sums, part_sums, strict=True):
                total += share
        return grad_x, None, None, None, *(s.to(p.dtype) for s, p in zip(sums, parameters, strict=True))
