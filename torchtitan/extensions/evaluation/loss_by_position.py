"""Negative log-likelihood by position: how well a model predicts as its context grows.

Held-out long documents, one a row, no packing. The token after each position p is scored, given the tokens 0 to p; with
a window of w, given those since the last multiple of w, so that every window scores the very same tokens. Means and
counts are kept by buckets of p. Memory is that of one layer's activations: logits exist for some positions at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import count, pairwise, takewhile

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from torchtitan.attention.segments import Segments
from torchtitan.models.rope import RopeArgs
from torchtitan.models.rope_scaling import DynamicNTKScaling, GeneScaling, LongRopeScaling
from torchtitan.models.transformer import Transformer
from torchtitan.tools.errors import UserError

CHUNK = 1024
"""Positions whose logits exist at a time: 0.6 GB in float32 at a vocabulary of 150 thousand."""

FIRST_EDGE = 512


@dataclass(frozen=True)
class Buckets:
    """Sums over the positions edges[i] to edges[i + 1] - 1."""

    edges: tuple[int, ...]
    """Ascending, from 0; one more than buckets."""

    nll: tuple[float, ...]
    """Mean negative log-likelihood in nats; NaN where nothing was counted."""

    count: tuple[int, ...]
    """Scored tokens."""

    @property
    def mean(self) -> float:
        """Over all scored tokens."""
        return sum(m * n for m, n in zip(self.nll, self.count) if n) / max(sum(self.count), 1)


def default_edges(length: int) -> tuple[int, ...]:
    """0, 512 and its doubles, length."""
    doubles = takewhile(lambda edge: edge < length, (FIRST_EDGE << k for k in count()))
    return (0, *doubles, length)


def check_edges(edges: Sequence[int], length: int) -> tuple[int, ...]:
    """The edges with 0 and length added where they lack; UserError unless they ascend within these."""
    whole = tuple(dict.fromkeys((0, *edges, length)))
    if any(a >= b for a, b in pairwise(whole)):
        raise UserError(
            f"--edges {' '.join(map(str, edges))} must ascend, above 0 and at most --length {length} (these two ends "
            "are added)."
        )
    return whole


def rope_for(rope: RopeArgs, length: int) -> RopeArgs:
    """The RoPE under which a document of `length` tokens is read, where that depends on the length.

    LongRoPE's short list up to the original length (as transformers does by the longest position), the base of a
    dynamic NTK that nothing has fixed to a length, and GeNE's factor, max(factor, ceil(length / L0)).
    """
    scaling = rope.scaling
    if isinstance(scaling, LongRopeScaling) and length <= scaling.original_max_position_embeddings:
        return replace(rope, scaling=replace(scaling, long_factor=scaling.short_factor))
    if isinstance(scaling, DynamicNTKScaling) and scaling.length is None:
        return replace(rope, scaling=replace(scaling, length=length))
    if isinstance(scaling, GeneScaling):
        factor = max(scaling.factor, math.ceil(length / scaling.original_max_position_embeddings))
        return replace(rope, scaling=replace(scaling, factor=float(factor)))
    return rope


@torch.no_grad()
def token_losses(
    model: Transformer,
    tokens: torch.Tensor,
    rope: RopeArgs | None = None,
    window: int | None = None,
    first: int = 0,
    chunk: int = CHUNK,
) -> torch.Tensor:
    """tokens int64 [T], one document -> float32 [T - 1 - first], on the CPU: -log p(token p + 1) for p = first, ...

    rope: instead of the model's own. window: context begins anew at its multiples. first: the tokens up to it are read
    but not scored.
    """
    inputs, labels = tokens[:-1], tokens[1:]
    total = len(inputs)
    window = min(window or total, total)
    segments = Segments.whole(np.array([*range(0, total, window), total]))
    positions = torch.arange(total, device=tokens.device) % window
    rope = rope_for(rope or model.args.rope, window)
    # all but the output matrix at once: logits of a long document would not fit
    output = model.output
    model.output = nn.Identity()  # type: ignore[assignment]
    try:
        hidden = model(inputs, positions, segments, rope=rope)
    finally:
        model.output = output
    losses = [
        F.cross_entropy(output(hidden[p : p + chunk]).float(), labels[p : p + chunk], reduction="none").cpu()
        for p in range(first, total, chunk)
    ]
    return torch.cat(losses) if losses else torch.zeros(0)


def loss_by_position(
    model: Transformer,
    documents: Iterable[torch.Tensor],
    edges: Sequence[int],
    rope: RopeArgs | None = None,
    window: int | None = None,
    chunk: int = CHUNK,
    on_document: Callable[[float], None] | None = None,
) -> Buckets:
    """Means and counts over documents (int64 [T] each, on the model's device). on_document: given each one's mean."""
    sums, counts = torch.zeros(len(edges) - 1, dtype=torch.float64), torch.zeros(len(edges) - 1, dtype=torch.int64)
    bounds = torch.tensor(edges[1:])
    for tokens in documents:
        losses = token_losses(model, tokens, rope, window, chunk=chunk)[: edges[-1]]
        bucket = torch.bucketize(torch.arange(len(losses)), bounds, right=True)
        sums.index_add_(0, bucket, losses.double())
        counts.index_add_(0, bucket, torch.ones_like(bucket))
        if on_document:
            on_document(float(losses.mean()))
    return Buckets(tuple(edges), tuple((sums / counts).tolist()), tuple(counts.tolist()))
