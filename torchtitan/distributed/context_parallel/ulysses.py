"""Ulysses (DeepSpeed, arXiv 2309.14509): heads for sequence. Each rank gets all tokens of 1/cp of the heads.

Perfectly balanced whatever the documents are, at four all-to-alls a layer (keys, values, queries, outputs); the number
of query heads bounds cp. Where there are fewer key-value heads than ranks, or cp does not divide them, they are
repeated just as often as is needed.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist

from torchtitan.attention.backends import Backend, Mask
from torchtitan.distributed.context_parallel.exchange import Permute, Start, Wait, in_blocks
from torchtitan.tools.errors import UserError


def check_ulysses(query_heads: int, cp: int, tp: int) -> None:
    """UserError where the query heads of a tensor-parallel rank cannot be divided over the context-parallel ranks."""
    heads = query_heads // tp
    if heads % cp:
        works = [str(d) for d in range(1, heads + 1) if heads % d == 0]
        of = f"{query_heads} query heads / tensor_parallel_degree {tp} = {heads}" if tp > 1 else f"{heads} query heads"
        raise UserError(
            f'parallelism.context_parallel_exchange = "ulysses" gives each rank 1/{cp} of the heads, but the model\'s '
            f"{of} cannot be divided by context_parallel_degree = {cp}: {heads} / {cp} = {heads / cp:.2f}. "
            f'Degrees of {", ".join(works)} would work, or the exchange "needed", which has no such bound.'
        )


class HeadTransfer:
    """[blocks, 128, H, D] of a rank's tokens and all heads <-> [all blocks by rank, 128, H / cp, D]."""

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
        """What has arrived, [cp, blocks, 128, H / cp, D] by sender, in its final form."""
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

    def __init__(self, backend: Backend, group: dist.ProcessGroup):
        self.backend, self.group = backend, group

    @torch.compiler.disable
    def start(self, k: torch.Tensor, v: torch.Tensor, mask: Mask) -> Any:
        """k and v [T, Hkv, D] of this rank's tokens."""
        kv_heads, cp = k.shape[1], self.group.size()
        # Query heads are a multiple of both, so also of their least common multiple: every rank then has a whole
        # number of KV heads, each read by equally many of its query heads.
        repeat = math.lcm(kv_heads, cp) // kv_heads
        return [self._launch(x.repeat_interleave(repeat, dim=1)) for x in (k, v)]

    @torch.compiler.disable
    def finish(self, q: torch.Tensor, started: Any, mask: Mask) -> torch.Tensor:
        """q [T, H, D] -> [T, H, D]."""
        exchange = mask.exchange
        whole = []
        for arrived, transfer in (self._launch(q), *started):
            x = transfer.arrange(Wait.apply(arrived, transfer), to_heads=True)
            whole.append(Permute.apply(x, exchange.place, exchange.inverse).flatten(0, 1))
        q, k, v = whole
        out = in_blocks(self.backend.attend(q, k, v, mask.prepared))
        transfer = HeadTransfer(self.group, to_heads=False)
        arrived = Start.apply(Permute.apply(out, exchange.inverse, exchange.place), transfer)
        return transfer.arrange(Wait.apply(arrived, transfer), to_heads=False).flatten(0, 1)

    def _launch(self, x: torch.Tensor) -> Any:
        transfer = HeadTransfer(self.group, to_heads=True)
        return Start.apply(in_blocks(x), transfer), transfer
