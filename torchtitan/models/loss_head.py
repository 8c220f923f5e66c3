"""The output matrix, and the cross-entropy behind it computed tile by tile, so that a row's logits never exist whole.

At 128K tokens and a vocabulary of 128K they would be 64 GiB in float32. The loss of a tile of tokens needs that tile's
logits only, and so do its gradients: these are computed at once, in the forward pass, and kept as gradients of the
hidden states and of the matrix (as Liger's fused loss does, arXiv 2410.10989). Nothing is computed twice. However many
tiles there are, the matrix is gathered once and its gradient reduced once.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor, Partial, Replicate

from torchtitan.tools.constants import IGNORED_LABEL

SMALLEST_TILE = 128  # tokens


class OutputHead(nn.Module):
    """Hidden states to logits, or to the loss. Under tensor parallelism, which cuts the vocabulary, its weight and its
    input are DTensors."""

    def __init__(self, dim: int, vocab_size: int):
        super().__init__()
        self.weight: torch.Tensor = nn.Parameter(torch.empty(vocab_size, dim))
        self.tile_bytes = 1 << 30
        """Bytes of a tile's logits in float32, on this rank."""
        self.z_loss = 0.0
        """Weight of the squared logarithm of the softmax's denominator in what is minimised (PaLM, arXiv 2204.02311);
        reported losses are without it."""

    def forward(
        self,
        x: torch.Tensor,
        labels: torch.Tensor | None = None,
        divisor: float | torch.Tensor = 1.0,
        only: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """x [T, dim] -> logits [T, vocab_size], or [R, vocab_size] of the tokens `only`, int64 [R], and no others.

        With labels int64 [T] -> (the scalar to differentiate, the sum of the token losses over divisor; the token
        losses, float32 [T] in nats, 0 for ignored labels, not differentiable)."""
        weight: torch.Tensor = self.weight
        if labels is None:
            if isinstance(x, DTensor) and only is not None:
                x = DTensor.from_local(x.to_local()[only], x.device_mesh, x.placements)
            elif only is not None:
                x = x[only]
            logits = F.linear(x, weight)
            return logits.redistribute(placements=[Replicate()]).to_local() if isinstance(logits, DTensor) else logits
        group, first = None, 0
        if isinstance(weight, DTensor):
            group = weight.device_mesh.get_group()
            weight = weight.to_local()
            first = dist.get_rank(group) * len(weight)  # every rank has equally many words
        if isinstance(x, DTensor):
            x = x.to_local(grad_placements=[Partial()])  # a rank's gradient is the part of its words
        tile = max(self.tile_bytes // (4 * weight.shape[0]) // SMALLEST_TILE * SMALLEST_TILE, SMALLEST_TILE)
        differentiate = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
        loss, losses = _TiledLoss.apply(x, weight, labels, divisor, tile, self.z_loss, group, first, differentiate)
        return loss, losses


class _TiledLoss(torch.autograd.Function):
    """See the head of this file. group: the ranks that share the vocabulary. first: this rank's first word.
    differentiate: whether gradients are needed; ctx.needs_input_grad does not say so under no_grad."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        labels: torch.Tensor,
        divisor: float | torch.Tensor,
        tile: int,
        z_loss: float,
        group: dist.ProcessGroup | None,
        first: int,
        differentiate: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        wide = torch.promote_types(x.dtype, torch.float32)
        losses = torch.zeros(len(x), dtype=wide, device=x.device)
        penalty = losses.new_zeros(())
        if differentiate:
            grad_x = torch.empty_like(x)
            grad_weight = torch.zeros(weight.shape, dtype=wide, device=x.device)  # a sum over tiles: not in 16 bits
        for begin in range(0, len(x), tile):
            tokens = slice(begin, begin + tile)
            words = labels[tokens] - first
            here = (words >= 0) & (words < len(weight))
            words = torch.where(here, words, 0)[:, None]
            valid = labels[tokens] != IGNORED_LABEL
            logits = F.linear(x[tokens], weight).to(wide)
            top = logits.amax(-1)
            if group is not None:
                dist.all_reduce(top, op=dist.ReduceOp.MAX, group=group)
            logits.sub_(top[:, None])
            label_logit = torch.where(here, logits.gather(1, words)[:, 0], 0)
            logits.exp_()
            total = logits.sum(-1)
            if group is not None:
                both = torch.stack((total, label_logit))
                dist.all_reduce(both, group=group)
                total, label_logit = both
            losses[tokens] = torch.where(valid, total.log() - label_logit, 0)
            lse = total.log() + top
            if z_loss:
                penalty += (torch.where(valid, lse, 0).square() * z_loss).sum()
            if not differentiate:
                continue
            share = valid.to(wide) / divisor
            gradient = logits.mul_((share * (1 + 2 * z_loss * lse) / total)[:, None])  # of the logits
            gradient.scatter_add_(1, words, -(share * here)[:, None])
            del logits
            gradient = gradient.to(x.dtype)
            torch.mm(gradient, weight, out=grad_x[tokens])
            if gradient.dtype == wide:  # without a second matrix of its size to write and read
                grad_weight.addmm_(gradient.t(), x[tokens])
            else:
                grad_weight += gradient.t() @ x[tokens]
            del gradient
        if differentiate:
            ctx.save_for_backward(grad_x, grad_weight)
        ctx.mark_non_differentiable(losses)
        return (losses.sum() + penalty) / divisor, losses

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore
        grad_x, grad_weight = ctx.saved_tensors
        scaled = torch.empty(grad_weight.shape, dtype=grad_x.dtype, device=grad_x.device)
        torch.mul(grad_weight, grad, out=scaled)  # without a second float32 tensor of the matrix's size
        return grad_x * grad.to(grad_x.dtype), scaled, *[None] * 7
