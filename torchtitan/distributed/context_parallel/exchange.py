"""How keys and values reach the ranks whose queries see them, for any assignment of blocks of 128 tokens to ranks.

plan_exchange works out on the host, in the loader, what one rank holds and sends, and the Segments of its queries
against the buffer of keys that results. GatheredAttention transfers them in every layer: `allgather` fetches all keys,
`needed` only the blocks that some local query may see. Both send KV heads, before they are repeated for query heads.
The transfer starts as soon as keys and values exist and is waited for after the queries are projected; gradients go
back to their owners in the same way, under the backward of that projection.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from torchtitan.attention.backends import Backend, Mask
from torchtitan.attention.segments import Segments
from torchtitan.tools.constants import BLOCK
from torchtitan.tools.movable import Movable

# Renamed in PyTorch 2.13, the old names deprecated.
ALL_GATHER = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
REDUCE_SCATTER = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@dataclass(frozen=True)
class Exchange(Movable):
    """One rank's part of the transfer; everything is counted in blocks of 128 tokens."""

    send: torch.Tensor
    """int64: this rank's blocks in the order in which they are sent, by destination; a block may go to several ranks.
    Empty unless the exchange is `needed`."""

    send_counts: tuple[int, ...]
    """Blocks for each rank."""

    receive_counts: tuple[int, ...]
    """Blocks from each rank."""

    place: torch.Tensor
    """int64[B], a permutation: block j of the buffer is block place[j] of those at hand (`needed`: this rank's blocks,
    then those received; else all ranks' blocks by rank)."""

    inverse: torch.Tensor
    """The inverse of place."""


@dataclass(eq=False)
class ExchangedMask(Mask):
    """A mask whose keys, or some of them, come from other ranks."""

    exchange: Exchange


@dataclass(frozen=True)
class Runs:
    """The stream cut where documents and other ranks' blocks begin: a run has one owner and is of one document."""

    start: np.ndarray
    end: np.ndarray
    owner: np.ndarray
    first_key: np.ndarray
    """The first token of the stream that the run's queries may see, its anchor aside."""
    anchor: np.ndarray | None


def cut(segments: Segments, owner: np.ndarray) -> Runs:
    """Runs of a stream whose queries are its keys; owner int[T / 128] is the rank of each block."""
    cu = segments.cu_seqlens
    changes = (np.flatnonzero(np.diff(owner)) + 1) * BLOCK
    start = np.union1d(cu[:-1], changes)
    end = np.append(start[1:], segments.total)
    document = np.searchsorted(cu, start, side="right") - 1
    first_key = cu[document]
    if segments.window is not None:
        first_key = np.maximum(first_key, start - segments.window + 1)
    anchor = None if segments.anchor is None else segments.anchor[document]
    return Runs(start, end, owner[start // BLOCK].astype(np.int64), first_key, anchor)


def needed_blocks(runs: Runs, num_blocks: int, cp: int) -> np.ndarray:
    """bool[cp, num_blocks]: the blocks with a key that some query of the rank may see, its own blocks among them."""
    changes = np.zeros((cp, num_blocks + 1), np.int32)
    np.add.at(changes, (runs.owner, runs.first_key // BLOCK), 1)
    np.add.at(changes, (runs.owner, (runs.end - 1) // BLOCK + 1), -1)
    needed = np.cumsum(changes[:, :-1], axis=1) > 0
    if runs.anchor is not None:
        has = runs.anchor >= 0
        needed[runs.owner[has], runs.anchor[has] // BLOCK] = True
    return needed


def kv_received(segments: Segments, owner: np.ndarray, cp: int) -> np.ndarray:
    """int64[cp]: tokens whose keys each rank receives under `needed`; all-gather brings T - T / cp of them to each."""
    needed = needed_blocks(cut(segments, owner), len(owner), cp)
    return (needed.sum(1) - np.bincount(owner, minlength=cp)) * BLOCK


def plan_exchange(name: str, segments: Segments, owner: np.ndarray, cp: int, rank: int) -> tuple[Segments, Exchange]:
    """The segments of a rank's queries against its buffer of keys, and how the buffer is filled.

    segments: of the whole stream. owner: int64[T / 128], the rank of each block; every rank owns equally many.
    """
    num_blocks = len(owner)
    if name != "needed":
        even, none = (num_blocks // cp,) * cp, torch.empty(0, dtype=torch.int64)
        by_rank = np.argsort(owner, kind="stable")  # all blocks, rising within a rank
        exchange = Exchange(none, even, even, torch.from_numpy(np.argsort(by_rank)), torch.from_numpy(by_rank))
        if name == "ulysses":
            return segments, exchange
        return _local_segments(segments, cut(segments, owner), rank, np.arange(num_blocks)), exchange
    runs = cut(segments, owner)
    needed = needed_blocks(runs, num_blocks, cp)
    held = np.flatnonzero(owner == rank)
    sent = [np.flatnonzero(needed[other, held]) if other != rank else held[:0] for other in range(cp)]
    buffer = np.flatnonzero(needed[rank])
    received = buffer[owner[buffer] != rank]
    received = received[np.argsort(owner[received], kind="stable")]
    available = np.concatenate([held, received])
    place = np.argsort(available)  # available[place] is the buffer, in the stream's order
    slot = np.full(num_blocks, -1)
    slot[buffer] = np.arange(len(buffer))
    counts = np.bincount(owner[received].astype(np.int64), minlength=cp)
    exchange = Exchange(
        torch.from_numpy(np.concatenate(sent)),
        tuple(len(blocks) for blocks in sent),
        tuple(counts.tolist()),
        torch.from_numpy(place),
        torch.from_numpy(np.argsort(place)),
    )
    return replace(_local_segments(segments, runs, rank, slot), keys_vary=True), exchange


def _local_segments(segments: Segments, runs: Runs, rank: int, slot: np.ndarray) -> Segments:
    """The segments of the rank's runs. slot: int[B], where block b of the stream lies in the rank's buffer."""
    mine = runs.owner == rank
    start, end, first = runs.start[mine], runs.end[mine], runs.first_key[mine]

    def at(token: np.ndarray) -> np.ndarray:
        return slot[token // BLOCK] * BLOCK + token % BLOCK

    anchor = None
    if runs.anchor is not None:
        anchor = runs.anchor[mine]
        anchor = np.where(anchor >= 0, at(np.maximum(anchor, 0)), -1)
    num_keys = (int(slot.max()) + 1) * BLOCK
    cu = np.concatenate([[0], np.cumsum(end - start)])
    return Segments(cu, at(first), at(end - 1) + 1, num_keys, segments.window, anchor)


# ---- in every layer -------------------------------------------------------------------------------------------------


class Transfer:
    """One collective on its way, and later the one that brings its gradients back."""

    def __init__(self, group: dist.ProcessGroup, exchange: Exchange, uneven: bool):
        self.group, self.exchange, self.uneven = group, exchange, uneven
        self.work: Any = None

    def send(self, x: torch.Tensor) -> torch.Tensor:
        """x [blocks, ...] -> what arrives, by sender; it must not be read before wait()."""
        if not self.uneven:
            out = x.new_empty(x.shape[0] * self.group.size(), *x.shape[1:])
            self.work = ALL_GATHER(out, x.contiguous(), group=self.group, async_op=True)
            return out
        return self._all_to_all(x.index_select(0, self.exchange.send), back=False)

    def send_back(self, grad: torch.Tensor) -> torch.Tensor:
        """The gradient of what arrived -> what arrives at the owners; it must not be read before wait()."""
        if not self.uneven:
            out = grad.new_empty(grad.shape[0] // self.group.size(), *grad.shape[1:])
            self.work = REDUCE_SCATTER(out, grad.contiguous(), group=self.group, async_op=True)
            return out
        return self._all_to_all(grad, back=True)

    def collect(self, x: torch.Tensor, blocks: int) -> torch.Tensor:
        """The gradients [blocks, ...] of this rank's blocks from what send_back has brought; those of a block that
        several ranks used are summed in float32."""
        if not self.uneven:
            return x
        total = x.new_zeros(blocks, *x.shape[1:], dtype=torch.promote_types(x.dtype, torch.float32))
        return total.index_add_(0, self.exchange.send, x.to(total.dtype)).to(x.dtype)

    def _all_to_all(self, x: torch.Tensor, back: bool) -> torch.Tensor:
        counts = [list(self.exchange.send_counts), list(self.exchange.receive_counts)]
        ours, theirs = reversed(counts) if back else counts
        out = x.new_empty(sum(theirs), *x.shape[1:])
        self.work = dist.all_to_all_single(out, x.contiguous(), theirs, ours, group=self.group, async_op=True)
        return out

    def wait(self) -> None:
        """Until what is on its way has arrived."""
        if self.work is not None:
            self.work.wait()
            self.work = None


class Send(torch.autograd.Function):
    """x -> what arrives from the other ranks; backward waits for its gradient, which Receive's backward has sent."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, transfer: Any) -> torch.Tensor:
        ctx.transfer, ctx.blocks = transfer, x.shape[0]
        return transfer.send(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        transfer = ctx.transfer
        transfer.wait()
        returned, transfer.returned = transfer.returned, None
        return transfer.collect(returned, ctx.blocks), None


class Receive(torch.autograd.Function):
    """Waits for what arrives; backward sends its gradient back and does not wait for that."""

    @staticmethod
    def forward(ctx: Any, arrived: torch.Tensor, transfer: Any) -> torch.Tensor:
        ctx.transfer = transfer
        transfer.wait()
        return arrived.view_as(arrived)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        ctx.transfer.returned = ctx.transfer.send_back(grad)
        return grad, None


class Permute(torch.autograd.Function):
    """Blocks in another order. Backward permutes too; that of index_select would add into zeros."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, place: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
        ctx.inverse = inverse
        return x.index_select(0, place)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:  # type: ignore[override]
        return grad.index_select(0, ctx.inverse), None, None


def in_blocks(x: torch.Tensor) -> torch.Tensor:
    """[T, ...] -> [T / 128, 128, ...]."""
    return x.unflatten(0, (-1, BLOCK))


@dataclass(eq=False)
class OnTheirWay:
    """What start() hands to finish(). Neither a tuple nor frozen: a compiled layer looks into these, and would be
    compiled anew for every other number of blocks."""

    local: torch.Tensor
    """[blocks, 128, 2, Hkv, D]: keys and values of this rank's tokens."""

    arrived: torch.Tensor
    """The same of other ranks' tokens, not to be read before Receive."""

    transfer: Transfer


class GatheredAttention:
    """Local queries on the keys and values that `allgather` or `needed` brings (models/attention.py calls it)."""

    def __init__(self, backend: Backend, name: str, group: dist.ProcessGroup):
        self.backend, self.uneven, self.group = backend, name == "needed", group

    @torch.compiler.disable
    def start(self, k: torch.Tensor, v: torch.Tensor, mask: Mask) -> OnTheirWay:
        """k and v [T, Hkv, D] of this rank's tokens."""
        assert isinstance(mask, ExchangedMask)
        kv = in_blocks(torch.stack((k, v), dim=1))  # one message for both
        transfer = Transfer(self.group, mask.exchange, self.uneven)
        return OnTheirWay(kv, Send.apply(kv, transfer), transfer)

    @torch.compiler.disable
    def finish(self, q: torch.Tensor, started: OnTheirWay, mask: Mask) -> torch.Tensor:
        """q [T, H, D] -> [T, H, D]."""
        assert isinstance(mask, ExchangedMask)
        arrived = Receive.apply(started.arrived, started.transfer)
        available = torch.cat((started.local, arrived)) if self.uneven else arrived
        buffer = Permute.apply(available, mask.exchange.place, mask.exchange.inverse).flatten(0, 1)
        return self.backend.attend(q, buffer[:, 0], buffer[:, 1], mask.prepared)
