"""A micro-batch -> what one context-parallel rank computes of it: its tokens, and what they see. Runs in the loader.

Without context parallelism it is the same path with one rank.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from torchtitan.attention.backends import BACKENDS, Mask
from torchtitan.attention.segments import Segments
from torchtitan.datasets.loader import IGNORED_LABEL, PackedBatch
from torchtitan.distributed.context_parallel.exchange import BLOCK, plan_exchange
from torchtitan.distributed.context_parallel.layout import LAYOUTS, block_work


@dataclass(frozen=True)
class LocalBatch:
    """The t = T / cp tokens of a rank; see PackedBatch for tokens, labels and positions."""

    tokens: torch.Tensor
    labels: torch.Tensor
    positions: torch.Tensor

    source: torch.Tensor
    """int64[t]: the source of each token, -1 for padding."""

    index: torch.Tensor
    """int64[t]: how many tokens of its document come before it in this row."""

    mask: Mask

    long: torch.Tensor | None
    """bool[t], see PackedBatch."""

    pairs: int
    """(query, key) pairs of the whole micro-batch."""

    pairs_of_busiest: int
    """Those of the rank that has most."""

    unpadded: int
    """Tokens of the whole micro-batch without padding."""

    kv_received: int
    """Tokens whose keys and values come from other ranks in every layer (`ulysses`: all others', of fewer heads)."""

    kv_of_all_gather: int
    """The same if all keys and values were gathered: those of the other ranks' tokens."""

    def to(self, device: torch.device | str) -> LocalBatch:
        """The model's inputs on a device; source and index stay. Asynchronous from pinned memory."""
        names = ("tokens", "labels", "positions", *(["long"] if self.long is not None else []))
        moved = {n: getattr(self, n).to(device, non_blocking=True) for n in names}
        return replace(self, **moved, mask=self.mask.to(device))

    def pin_memory(self, device: torch.device | str | None = None) -> LocalBatch:
        """In pinned memory; called by the DataLoader, which passes a device in some versions."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return LocalBatch(**{n: v.pin_memory() if hasattr(v, "pin_memory") else v for n, v in values.items()})

    @property
    def num_valid(self) -> int:
        """Labels of this rank that are trained on."""
        return int((self.labels != IGNORED_LABEL).sum())


def shard(batch: PackedBatch, backend: str, layout: str, exchange: str, cp: int, rank: int) -> LocalBatch:
    """The part of context-parallel rank `rank` of `cp`; T is a multiple of 128 cp where cp > 1."""
    segments = Segments.whole(batch.cu_seqlens)
    documents = batch.cu_documents.numpy().astype(np.int64)
    tokens: dict[str, Any] = {
        "tokens": batch.tokens,
        "labels": batch.labels,
        "positions": batch.positions,
        "source": batch.token_sources,
        "index": torch.from_numpy(np.arange(documents[-1]) - np.repeat(documents[:-1], np.diff(documents))),
        "long": batch.long,
    }
    pairs = segments.attended_pairs
    prepare = BACKENDS[backend].prepare
    elsewhere = len(batch.tokens) // cp * (cp - 1)
    whole = partial(LocalBatch, pairs=pairs, unpadded=len(batch.tokens) - batch.num_padding, kv_of_all_gather=elsewhere)
    if cp == 1:
        return whole(**tokens, mask=Mask(segments, prepare(segments)), pairs_of_busiest=pairs, kv_received=0)
    owner = LAYOUTS[layout](segments, cp).astype(np.int64)
    local, plan = plan_exchange(exchange, segments, owner, cp, rank)
    own = torch.from_numpy(np.flatnonzero(owner == rank))
    mine: dict[str, Any] = {
        name: None if x is None else x.unflatten(0, (-1, BLOCK))[own].flatten() for name, x in tokens.items()
    }
    if exchange == "ulysses":  # heads are divided, not the pairs
        busiest = -(-pairs // cp)
    else:
        busiest = int(np.bincount(owner, weights=block_work(segments), minlength=cp).max())
    received = sum(plan.receive_counts) - plan.receive_counts[rank]
    return whole(**mine, mask=Mask(local, prepare(local), plan), pairs_of_busiest=busiest, kv_received=received * BLOCK)
