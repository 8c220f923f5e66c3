"""The loss of a step: forward and backward of its micro-batches; means over the global batch, by source and position.

models/loss_head.py computes the losses of single tokens.
"""

from __future__ import annotations

import torch

from torchtitan.components.setup import StageInputs
from torchtitan.distributed.context_parallel.local_batch import LocalBatch
from torchtitan.models.rope import RopeArgs
from torchtitan.models.transformer import Transformer
from torchtitan.tools.constants import IGNORED_LABEL
from torchtitan.tools.errors import UserError

BUCKETS = 33
"""How many buckets of positions: one for 0, then one per power of two up to 2^31."""


def train_micro_batch(
    model: Transformer, batch: LocalBatch, divisor: float, rope: RopeArgs | None = None
) -> torch.Tensor:
    """Forward, and backward of the sum of token losses divided by `divisor`; gradients accumulate.

    batch: on the model's device. divisor: the number of valid labels of the step, over all ranks. rope: see
    Transformer.forward. Returns the losses of this rank's tokens, float32 [t], detached.
    """
    loss, losses = model(batch.tokens, batch.positions, batch.masks, batch.long, rope, batch.labels, divisor)
    loss.backward()
    return losses


def position_bucket(index: torch.Tensor) -> torch.Tensor:
    """int64 [T]: bucket 0 for index 0, bucket b for 2^(b-1) to 2^b - 1. index: int64 [T], a token's in its document."""
    return torch.frexp(index.double())[1].long()


def sum_losses(batches: list[LocalBatch], token_losses: list[torch.Tensor], sources: int) -> torch.Tensor:
    """float64 [sources + BUCKETS, 2], on the CPU: sum of losses and number of labels, by source, then by position.

    token_losses: float32 [t] of each micro-batch, on any device.
    """
    sums = torch.zeros(sources + BUCKETS, 2, dtype=torch.float64)
    by_source, by_position = sums.split([sources, BUCKETS])
    for batch, losses in zip(batches, token_losses, strict=True):
        counted = torch.stack((losses.double().cpu(), (batch.labels != IGNORED_LABEL).double()), dim=1)
        # padding (source -1) has no loss and no label: it adds nothing to source 0
        by_source.index_add_(0, batch.source.clamp(min=0), counted)
        by_position.index_add_(0, position_bucket(batch.index), counted)
    return sums


def mean_losses(sums: torch.Tensor, valid: int, names: list[str]) -> tuple[float, dict[str, float], dict[str, float]]:
    """The step's loss, its loss by source name, and its loss by the first position of each bucket.

    sums: of sum_losses(), over all ranks; valid: labels of the global batch; names: of the sources.
    """
    by_source, by_position = sums.split([len(names), BUCKETS])
    return (
        float(by_source[:, 0].sum()) / valid,
        {name: float(total / n) for name, (total, n) in zip(names, by_source, strict=True) if n > 0},
        {str(2 ** (b - 1) if b else 0): float(total / n) for b, (total, n) in enumerate(by_position) if n},
    )


def check_labels(valid: int, step: int) -> None:
    """UserError if the step has no label, and so no loss."""
    if valid == 0:
        raise UserError(
            f"No token of step {step} has a label: every segment of its rows has one token, or belongs to a "
            "conversation that was cut off before its first response."
        )


def check_tokens(batches: list[LocalBatch], inputs: StageInputs, finished_steps: int) -> None:
    """UserError for a token id outside the vocabulary, for which a tensor-parallel embedding would return zeros."""
    vocab_size = inputs.args.vocab_size
    for batch in batches:
        wrong = (batch.tokens < 0) | (batch.tokens >= vocab_size)
        if wrong.any():
            source = inputs.plan.names[int(batch.source[wrong][0])]
            raise UserError(
                f"Step {finished_steps + 1} reads token {int(batch.tokens[wrong][0])} of source {source!r}, but the "
                f"model's vocabulary is 0 to {vocab_size - 1}: the source was tokenized with another tokenizer, or its "
                "files are damaged."
            )
