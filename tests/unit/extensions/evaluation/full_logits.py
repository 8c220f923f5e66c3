"""The slow witness of losses: one document, all logits at once, dense attention in float64."""

from __future__ import annotations

import torch

from torchtitan.attention.segments import Segments
from torchtitan.models.rope import RopeArgs
from torchtitan.models.transformer import Transformer


@torch.no_grad()
def losses_of_all_logits(
    model: Transformer, tokens: torch.Tensor, rope: RopeArgs | None = None, exact: bool = True
) -> torch.Tensor:
    """tokens int64 [T] at positions 0, 1, ... -> float32 [T - 1]. exact: False leaves dtype and backend as they are."""
    reference = model
    if exact:
        reference = Transformer(model.args, "dense").double()
        reference.load_state_dict(model.state_dict())
    total = len(tokens) - 1
    logits = reference(tokens[:-1], torch.arange(total), Segments.whole([0, total]), rope=rope)
    return -logits.log_softmax(-1)[torch.arange(total), tokens[1:]].float()
