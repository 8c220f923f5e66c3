"""A micro-batch -> what one context-parallel rank computes of it: its tokens, and what they see. Runs in the loader.

Without context parallelism it is the same path with one rank.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from torchtitan.attention.backends import BACKENDS, Mask, Masks
from torchtitan.attention.segments import Segments
from torchtitan.datasets.batch import PackedBatch
from torchtitan.distributed.context_parallel.exchange import ExchangedMask, plan_exchange
from torchtitan.distributed.context_parallel.layout import LAYOUTS, work_per_rank
from torchtitan.tools.constants import BLOCK, IGNORED_LABEL
from torchtitan.tools.movable import Movable


@dataclass(frozen=True)
class LocalBatch(Movable):
    """The t = T / cp tokens of a rank; see PackedBatch for tokens, labels and positions."""

    stay = ("source", "index")

    tokens: torch.Tensor
    labels: torch.Tensor
    positions: torch.Tensor

    source: torch.Tensor
    """int64[t]: the source of each token, -1 for padding."""

    index: torch.Tensor
    """int64[t]: how many tokens of its document come before each token in its row."""

    masks: Masks
    """What the tokens see, in each kind of layer."""

    long: torch.Tensor | None
    """bool[t], see PackedBatch."""

    pairs: float
    """(query, key) pairs of the whole micro-batch; the mean over layers, some of which may have a sliding window."""

    pairs_of_busiest: float
    """The pairs of the rank that has most in a layer; the mean over layers."""

    unpadded: int
    """Tokens of the whole micro-batch that are not padding."""

    kv_received: float
    """Tokens whose keys and values come from other ranks in a layer (`ulysses`: those of all other ranks, of fewer
    heads); the mean over layers."""

    kv_of_all_gather: int
    """The same under all-gather: the tokens of all other ranks."""

    @property
    def num_valid(self) -> int:
        """Labels of this rank that are trained on."""
        return int((self.labels != IGNORED_LABEL).sum())


def local_batch(
    batch: PackedBatch,
    backend: str,
    layout: str,
    exchange: str,
    cp: int,
    rank: int,
    sliding_window: int | None = None,
    sliding_share: float = 0.0,
) -> LocalBatch:
    """The part of context-parallel rank `rank` of `cp`; T is a multiple of 128 cp if cp > 1.

    sliding_window, sliding_share: of the model's layers. A token has the same rank in all layers. The layout balances
    the full-attention layers, if the model has any. Each kind of layer has its own mask and exchange.
    """
    anchor = None if batch.anchor is None else batch.anchor.numpy().astype(np.int64)
    full = Segments.whole(batch.cu_seqlens, anchor=anchor)
    kinds = {"full_attention": full, "sliding_attention": replace(full, window=sliding_window)}
    shares = {"full_attention": 1 - sliding_share, "sliding_attention": sliding_share}
    shares = {kind: share for kind, share in shares.items() if share > 0}
    documents = batch.cu_documents.numpy().astype(np.int64)
    tokens: dict[str, Any] = {
        "tokens": batch.tokens,
        "labels": batch.labels,
        "positions": batch.positions,
        "source": batch.token_sources,
        "index": torch.from_numpy(np.arange(documents[-1]) - np.repeat(documents[:-1], np.diff(documents))),
        "long": batch.long,
    }
    owner = None
    if cp > 1:
        owner = LAYOUTS[layout](kinds[next(iter(shares))], cp).astype(np.int64)
        own = torch.from_numpy(np.flatnonzero(owner == rank))
        tokens = {n: None if x is None else x.unflatten(0, (-1, BLOCK))[own].flatten() for n, x in tokens.items()}
    layers = {kind: _layer(kinds[kind], backend, exchange, owner, cp, rank) for kind in shares}
    counts = [layer[1:] for layer in layers.values()]
    pairs, busiest, received = np.average(counts, axis=0, weights=list(shares.values()))
    return LocalBatch(
        **tokens,
        masks={kind: layer[0] for kind, layer in layers.items()},
        pairs=float(pairs),
        pairs_of_busiest=float(busiest),
        unpadded=len(batch.tokens) - batch.num_padding,
        kv_received=float(received),
        kv_of_all_gather=len(batch.tokens) // cp * (cp - 1),
    )


def _layer(
    segments: Segments, backend: str, exchange: str, owner: np.ndarray | None, cp: int, rank: int
) -> tuple[Mask, int, int, int]:
    """For layers that see by `segments`: the mask of a rank's queries; pairs, pairs_of_busiest, kv_received."""
    prepare, pairs = BACKENDS[backend].prepare, segments.attended_pairs
    if owner is None:
        return Mask(segments, prepare(segments)), pairs, pairs, 0
    local, transfer = plan_exchange(exchange, segments, owner, cp, rank)
    even = exchange == "ulysses"  # heads are divided, not the pairs
    busiest = -(-pairs // cp) if even else int(work_per_rank(segments, owner, cp).max())
    received = sum(transfer.receive_counts) - transfer.receive_counts[rank]
    return ExchangedMask(local, prepare(local), transfer), pairs, busiest, received * BLOCK
