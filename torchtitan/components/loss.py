"""Next-token cross-entropy, token by token: over what it is divided is the trainer's business."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Protocol

import torch
import torch.nn.functional as F
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import loss_parallel

from torchtitan.attention.backends import Mask
from torchtitan.datasets.loader import IGNORED_LABEL
from torchtitan.models.rope import RopeArgs
from torchtitan.models.transformer import Transformer


class Inputs(Protocol):
    """What of a micro-batch the model and the loss are given, on the device."""

    @property
    def tokens(self) -> torch.Tensor: ...
    @property
    def labels(self) -> torch.Tensor: ...
    @property
    def positions(self) -> torch.Tensor: ...
    @property
    def mask(self) -> Mask: ...
    @property
    def long(self) -> torch.Tensor | None: ...


def token_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """logits [T, V] (or a DTensor cut by vocabulary), labels int64 [T] -> float32 [T] in nats; 0 where ignored."""
    return F.cross_entropy(logits.float(), labels, ignore_index=IGNORED_LABEL, reduction="none")


def train_micro_batch(
    model: Transformer, batch: Inputs, divisor: float, vocabulary_is_cut: bool, rope: RopeArgs | None = None
) -> torch.Tensor:
    """Forward, and backward of the sum of token losses over divisor; gradients accumulate.

    divisor: the valid labels of the whole step, over all ranks. rope: see Transformer.forward. Returns the losses of
    this rank's tokens, float32 [t], detached.
    """
    # the backward of a DTensor loss must run inside the context too
    with loss_parallel() if vocabulary_is_cut else nullcontext():
        logits = model(batch.tokens, batch.positions, batch.mask, batch.long, rope)
        losses = token_losses(logits, batch.labels)
        del logits
        (losses.sum() / divisor).backward()
    losses = losses.full_tensor() if isinstance(losses, DTensor) else losses
    return losses.detach()


def position_bucket(index: torch.Tensor) -> torch.Tensor:
    """int64 [T]: 0 for a document's first token, b for those from 2^(b-1) to 2^b - 1; index int64 [T], from 0."""
    return torch.frexp(index.double())[1].long()
