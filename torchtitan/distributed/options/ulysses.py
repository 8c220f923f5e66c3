"""Ulysses (DeepSpeed, arXiv 2309.14509): heads for sequence. Each rank gets all tokens of 1/cp of the heads.

Perfectly balanced whatever the documents are, at four all-to-alls per layer (keys, values, queries, outputs); the
number of query heads bounds cp. If there are fewer key-value heads than ranks, or cp does not divide them, they are
repeated no more often than needed.

With chunks, a few heads are exchanged and computed at a time (the idea of Untied Ulysses, arXiv 2602.21196): a rank
then never holds all tokens of its whole share of the heads, at the price of computing attention once more in backward.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from torchtitan.attention.backends import Backend, Mask
from torchtitan.config.schema import Parallelism
from torchtitan.distributed.context_parallel.exchange import ExchangedMask, Permute, Receive, Send, in_blocks
from torchtitan.tools.errors import UserError


def check_ulysses(query_heads: int, parallelism: Parallelism) -> None:
    """UserError if the exchange is ulysses and the query heads of a tensor-parallel rank cannot be divided over the
    context-parallel ranks, or those of a rank into chunks. Without context parallelism nothing is exchanged."""
    cp, tp = parallelism.context_parallel_degree, parallelism.tensor_parallel_degree
    chunks = parallelism.context_parallel_head_chunks
    if parallelism.context_parallel_exchange != "ulysses" or cp == 1:
        return
    heads = query_heads // tp
    if heads % cp:
        works = [str(d) for d in range(1, heads + 1) if heads % d == 0]
        of = f"{query_heads} query heads / tensor_parallel_degree {tp} = {heads}" if tp > 1 else f"{heads} query heads"
        raise UserError(
            f'parallelism.context_parallel_exchange = "ulysses" gives each rank 1/{cp} of the heads, but the model\'s '
            f"{of} cannot be divided by context_parallel_degree = {cp}: {heads} / {cp} = {heads / cp:.2f}. "
            f'Degrees of {", ".join(works)} would work, or the exchange "needed", which has no such bound.'
        )
    share = heads // cp
    if share % chunks:
        works = [str(n) for n in range(1, share + 1) if share % n == 0]
        raise UserError(
            f"parallelism.context_parallel_head_chunks = {chunks} does not divide a rank's query heads: "
            f"{query_heads} / tensor_parallel_degree {tp} / context_parallel_degree {cp} = {share}. "
            f"{', '.join(works)} would."
        )


class HeadTransfer:
    """[blocks, 128, H, D] of a rank's tokens and all heads <-> [all blocks by rank, 128, H / cp, D].

    Has the methods of exchange.Transfer, so that Send and Receive can use it.
    """

    def __init__(self, group: dist.ProcessGroup, to_heads: bool):
        self.group, self.to_heads = group, to_heads
        self.work: Any = None

    def send(self, x: torch.Tensor) -> torch.Tensor:
        return self._exchange(x, self.to_heads)

    def send_back(self, grad: torch.Tensor) -> torch.Tensor:
        return self._exchange(grad, not self.to_heads)

    def collect(self, x: torch.Tensor, blocks: int) -> torch.Tensor:
        return self.arrange(x, not self.to_heads)

    def arrange(self, x: torch.Tensor, to_heads: bool) -> torch.Tensor:
        """What has arrived, [cp, blocks, 128, H / cp, D] by sender, in the shape that the class says."""
        return x.flatten(0, 1) if to_heads else x.movedim(0, 2).flatten(2, 3)

    def _exchange(self, x: torch.Tensor, to_heads: bool) -> torch.Tensor:
        cp = self.group.size()
        if x.dim() == 4:
            x = x.unflatten(2, (cp, -1)).movedim(2, 0) if to_heads else x.unflatten(0, (cp, -1))
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        self.work = dist.all_to_all_single(out, x.contiguous(), group=self.group, async_op=True)
        return out

    def wait(self) -> None:
        if self.work is not None:
            self.work.wait()
            self.work = None


class UlyssesAttention:
    """Attention over all tokens with this rank's share of the heads (models/attention.py calls it)."""

    def __init__(self, backend: Backend, group: dist.ProcessGroup, chunks: int = 1):
        self.backend, self.group, self.chunks = backend, group, chunks

    @torch.compiler.disable
    def start(self, k: torch.Tensor, v: torch.Tensor, mask: Mask) -> Any:
        """k and v [T, Hkv, D] of this rank's tokens."""
        return [self.send_kv(x) for x in (k, v)] if self.chunks == 1 else (k, v)

    @torch.compiler.disable
    def finish(self, q: torch.Tensor, started: Any, mask: Mask) -> torch.Tensor:
        """q [T, H, D] -> [T, H, D]."""
        if self.chunks == 1:
            return self.attend([self.send(q), *started], mask)
        return _ByChunks.apply(q, *started, self, mask)

    def send(self, x: torch.Tensor) -> OnItsWay:
        """Starts to exchange x [T, H, D], H a multiple of cp."""
        transfer = HeadTransfer(self.group, to_heads=True)
        return OnItsWay(Send.apply(in_blocks(x), transfer), transfer)

    def send_kv(self, x: torch.Tensor) -> OnItsWay:
        """Starts to exchange x [T, Hkv, D]."""
        # Query heads are a multiple of both, so also of their least common multiple: every rank then has a whole
        # number of KV heads, each read by equally many of its query heads.
        repeat = math.lcm(x.shape[1], self.group.size()) // x.shape[1]
        return self.send(x.repeat_interleave(repeat, dim=1))

    def attend(self, sent: list[OnItsWay], mask: Mask) -> torch.Tensor:
        """Queries, keys and values on their way -> [T, H, D] of this rank's tokens."""
        assert isinstance(mask, ExchangedMask)
        exchange = mask.exchange
        whole = []
        for part in sent:
            x = part.transfer.arrange(Receive.apply(part.arrived, part.transfer), to_heads=True)
            whole.append(Permute.apply(x, exchange.place, exchange.inverse).flatten(0, 1))
        q, k, v = whole
        out = in_blocks(self.backend.attend(q, k, v, mask.prepared))
        transfer = HeadTransfer(self.group, to_heads=False)
        arrived = Send.apply(Permute.apply(out, exchange.inverse, exchange.place), transfer)
        return transfer.arrange(Receive.apply(arrived, transfer), to_heads=False).flatten(0, 1)


@dataclass(frozen=True, eq=False)
class OnItsWay:
    """A tensor that has been sent."""

    arrived: torch.Tensor
    """Not to be read before Receive."""

    transfer: HeadTransfer


def head_chunks(query_heads: int, kv_heads: int, chunks: int) -> list[tuple[slice, list[int]]]:
    """The query heads of each chunk, and the KV heads that they read, one for each run of equally many query heads.

    A KV head is in several chunks if there are more chunks than KV heads, or if a chunk ends among its query heads; in
    the latter case it may be in one chunk twice.
    """
    size, readers = query_heads // chunks, query_heads // kv_heads
    run = math.gcd(size, readers)
    return [
        (slice(first, first + size), [head // readers for head in range(first, first + size, run)])
        for first in range(0, query_heads, size)
    ]


class _ByChunks(torch.autograd.Function):
    """UlyssesAttention chunk by chunk. Nothing of a chunk is kept for backward, which sends and computes it again.

    The next chunk is on its way while one is computed: all tokens of two chunks are held at a time. q, k and v are
    [T, H, D] and [T, Hkv, D] of this rank's tokens.
    """

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, core: UlyssesAttention, mask: Mask
    ) -> torch.Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.core, ctx.mask = core, mask
        chunks = head_chunks(q.shape[1], k.shape[1], core.chunks)
        out = torch.empty_like(q)
        following = _send_chunk(core, q, k, v, *chunks[0])
        for number, (heads, _) in enumerate(chunks):
            _, sent = following
            if number + 1 < len(chunks):
                following = _send_chunk(core, q, k, v, *chunks[number + 1])
            out[:, heads] = core.attend(sent, mask)
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        q, k, v = ctx.saved_tensors
        core, mask = ctx.core, ctx.mask
        chunks = head_chunks(q.shape[1], k.shape[1], core.chunks)
        dq = torch.empty_like(q)
        # a KV head may be in several chunks: a sum, not in 16 bits
        dk, dv = (torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32)) for x in (k, v))
        with torch.enable_grad():
            following = _send_chunk(core, q, k, v, *chunks[0])
            for number, (heads, kv_heads) in enumerate(chunks):
                leaves, sent = following
                if number + 1 < len(chunks):
                    following = _send_chunk(core, q, k, v, *chunks[number + 1])
                dq[:, heads], *parts = torch.autograd.grad(core.attend(sent, mask), leaves, grad[:, heads])
                for total, part in zip((dk, dv), parts, strict=True):
                    for head, of_head in zip(kv_heads, part.unbind(1), strict=True):
                        total[:, head] += of_head
                del leaves, sent, parts, part
        return dq, dk.to(k.dtype), dv.to(v.dtype), None, None


def _send_chunk(
    core: UlyssesAttention, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: slice, kv_heads: list[int]
) -> tuple[list[torch.Tensor], list[OnItsWay]]:
    """A chunk's queries, keys and values, as leaves if gradients are enabled, and the same on their way."""
    parts = [q[:, heads], *(torch.stack([x[:, head] for head in kv_heads], dim=1) for x in (k, v))]
    leaves = [x.detach().requires_grad_(torch.is_grad_enabled()) for x in parts]
    return leaves, [core.send(leaves[0]), *(core.send_kv(x) for x in leaves[1:])]
