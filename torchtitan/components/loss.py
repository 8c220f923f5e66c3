"""Forward and backward of a micro-batch, and loss by position. The loss itself is in models/loss_head.py; over what it
is divided is the trainer's business."""

from __future__ import annotations

from typing import Protocol

import torch

from torchtitan.attention.backends import Mask
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


def train_micro_batch(model: Transformer, batch: Inputs, divisor: float, rope: RopeArgs | None = None) -> torch.Tensor:
    """Forward, and backward of the sum of token losses over divisor; gradients accumulate.

    divisor: the valid labels of the whole step, over all ranks. rope: see Transformer.forward. Returns the losses of
    this rank's tokens, float32 [t], detached.
    """
    loss, losses = model(batch.tokens, batch.positions, batch.mask, batch.long, rope, batch.labels, divisor)
    loss.backward()
    return losses


def position_bucket(index: torch.Tensor) -> torch.Tensor:
    """int64 [T]: 0 for a document's first token, b for those from 2^(b-1) to 2^b - 1; index int64 [T], from 0."""
    return torch.frexp(index.double())[1].long()
