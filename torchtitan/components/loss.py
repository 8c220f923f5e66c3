"""Next-token cross-entropy, token by token: what is summed, and over what it is divided, is the trainer's business."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from torchtitan.datasets.loader import IGNORED_LABEL


def token_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """logits [T, V] (or a DTensor cut by vocabulary), labels int64 [T] -> float32 [T] in nats; 0 where ignored."""
    return F.cross_entropy(logits.float(), labels, ignore_index=IGNORED_LABEL, reduction="none")
