"""Context-parallel attention on real gloo ranks equals dense attention in one process, outputs and gradients."""

from __future__ import annotations

import itertools
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

from tests.distributed.harness import spawn
from torchtitan.attention.backends import BACKENDS, Mask, dense
from torchtitan.attention.segments import Segments
from torchtitan.distributed.context_parallel.exchange import ExchangedMask, GatheredAttention, in_blocks, plan_exchange
from torchtitan.distributed.context_parallel.layout import LAYOUTS
from torchtitan.distributed.options.ulysses import HeadTransfer, UlyssesAttention
from torchtitan.tools.constants import BLOCK

# Of KV heads 4 divide by 2 and 4 ranks, 1 is fewer than ranks, 3 divide by neither.
HEADS = ((4, 4), (12, 3), (4, 2), (8, 1))
EXCHANGES = ("allgather", "needed", "ulysses")


def packing(rng: np.random.Generator, cp: int, number: int) -> Segments:
    """Some 500 to 1500 tokens: one document, one per block (contiguous then sends nothing), or of all lengths, now
    and then with a window or anchors."""
    total = BLOCK * cp * int(rng.integers(1, 3, endpoint=True)) * (1 if cp > 2 else 2)
    if number == 0:
        return Segments.whole((0, total))
    if number == 1:
        return Segments.whole(range(0, total + 1, BLOCK))
    ends = [0]
    while ends[-1] < total:
        ends.append(min(total, ends[-1] + max(1, int(total ** rng.random()))))
    window = int(total ** rng.random()) if number % 4 == 2 else None
    anchor = np.array([rng.integers(-1, start + 1) for start in ends[:-1]]) if number % 4 == 3 else None
    return Segments.whole(ends, window, anchor)


def make_core(exchange: str, chunks: int = 1) -> Any:
    backend, group = BACKENDS["sdpa"], dist.group.WORLD
    if exchange == "ulysses":
        return UlyssesAttention(backend, group, chunks)
    return GatheredAttention(backend, exchange, group)


def attention(core: Any, mask: Mask, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """As in a layer."""
    started = core.start(k, v, mask)
    return core.finish(q, started, mask)


def two_layers(
    core: Any, mask: Mask, checkpointed: bool, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> torch.Tensor:
    layer = partial(attention, core, mask)
    if checkpointed:
        layer = partial(checkpoint, layer, use_reentrant=False)
    return layer(layer(q, k.cos(), v.sin()), k, v).cos()


def with_gradients(out: torch.Tensor, leaves: list[torch.Tensor], grad: torch.Tensor) -> list[torch.Tensor]:
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def whole_stream(x: torch.Tensor, owner: np.ndarray, world_size: int) -> torch.Tensor:
    """All ranks' tokens in the stream's order."""
    parts = [torch.empty_like(x) for _ in range(world_size)]
    dist.all_gather(parts, x.contiguous())
    by_rank = np.argsort(owner, kind="stable")
    return in_blocks(torch.cat(parts))[torch.from_numpy(np.argsort(by_rank))].flatten(0, 1)


def attention_on_ranks(packings: int, rank: int, world_size: int) -> list[tuple[str, list[float], bool | None]]:
    """What was run, the largest errors of out, dq, dk and dv, and whether checkpointing left it as it was on all ranks:
    tried with one layout a packing, in turn."""
    dist.init_process_group("gloo", rank=rank, world_size=world_size, timeout=timedelta(seconds=120))
    results = []
    for number in range(packings):
        rng = np.random.default_rng((world_size, number))
        segments, heads = packing(rng, world_size, number), HEADS[int(rng.integers(len(HEADS)))]
        generator = torch.Generator().manual_seed(number)
        q, k, v, grad = (torch.randn(segments.total, heads[i], 16, generator=generator) for i in (0, 1, 1, 0))
        expected = []
        if rank == 0:
            leaves = [x.double().requires_grad_() for x in (q, k, v)]
            expected = with_gradients(dense(*leaves, segments), leaves, grad.double())
        for exchange, (place, layout) in itertools.product(EXCHANGES, enumerate(LAYOUTS)):
            owner = LAYOUTS[layout](segments, world_size)
            local, plan = plan_exchange(exchange, segments, owner, world_size, rank)
            mask, core = ExchangedMask(local, BACKENDS["sdpa"].prepare(local), plan), make_core(exchange)
            own = torch.from_numpy(owner == rank)
            *leaves, my_grad = (in_blocks(x)[own].flatten(0, 1) for x in (q, k, v, grad))
            leaves = [x.requires_grad_() for x in leaves]
            mine = with_gradients(attention(core, mask, *leaves), leaves, my_grad)
            got = [whole_stream(x, owner, world_size) for x in mine]
            errors = [float((a - b).abs().max()) for a, b in zip(got, expected)]
            same = None
            if number % len(LAYOUTS) == place:
                twice = [with_gradients(two_layers(core, mask, c, *leaves), leaves, my_grad) for c in (False, True)]
                equal = torch.tensor(all(torch.equal(a, b) for a, b in zip(*twice, strict=True)))
                dist.all_reduce(equal, dist.ReduceOp.MIN)
                same = bool(equal)
            results.append((f"packing {number}, {heads} heads, {exchange}, {layout}", errors, same))
    dist.destroy_process_group()
    return results


def chunks_on_ranks(packings: int, rank: int, world_size: int) -> list[tuple[str, int, list[float], bool, list[int]]]:
    """For every number of chunks that the heads allow: how much out, dq, dk and dv differ from one chunk's, against
    their largest value; whether checkpointing changes anything; number and largest size of the buffers, in elements,
    and that of all queries."""
    dist.init_process_group("gloo", rank=rank, world_size=world_size, timeout=timedelta(seconds=120))
    sent: list[int] = []
    exchange = HeadTransfer._exchange

    def counted(self: HeadTransfer, x: torch.Tensor, to_heads: bool) -> torch.Tensor:
        sent.append(x.numel())
        return exchange(self, x, to_heads)

    HeadTransfer._exchange = counted  # type: ignore[method-assign]
    results = []
    for number, heads in itertools.product(range(0, packings, 2), HEADS):
        segments = packing(np.random.default_rng((world_size, number)), world_size, number)
        owner = LAYOUTS["balanced"](segments, world_size)
        local, plan = plan_exchange("ulysses", segments, owner, world_size, rank)
        mask, t = ExchangedMask(local, BACKENDS["sdpa"].prepare(local), plan), segments.total // world_size
        generator = torch.Generator().manual_seed(rank)
        *leaves, grad = (torch.randn(t, heads[i], 16, generator=generator) for i in (0, 1, 1, 0))
        leaves = [x.requires_grad_() for x in leaves]
        share = heads[0] // world_size
        whole: list[torch.Tensor] = []
        for chunks in (n for n in range(1, share + 1) if share % n == 0):
            sent.clear()
            core = make_core("ulysses", chunks)
            mine = with_gradients(attention(core, mask, *leaves), leaves, grad)
            buffers = [len(sent), max(sent), heads[0] * t * 16]
            whole = whole or mine
            errors = [float((a - b).abs().max() / b.abs().max()) for a, b in zip(mine, whole)]
            twice = [with_gradients(two_layers(core, mask, c, *leaves), leaves, grad) for c in (False, True)]
            same = all(torch.equal(a, b) for a, b in zip(*twice, strict=True))
            results.append((f"packing {number}, {heads} heads", chunks, errors, same, buffers))
    HeadTransfer._exchange = exchange  # type: ignore[method-assign]
    dist.destroy_process_group()
    return results


def on_ranks(case: tuple[Any, int], rank: int, world_size: int) -> Any:
    function, packings = case
    return function(packings, rank, world_size)


@pytest.mark.parametrize("world_size, packings", [(2, 12), (4, 12)])
def test_attention_on_ranks_equals_dense(world_size: int, packings: int, tmp_path: Path) -> None:
    """Every layout and exchange, any packing and heads; under activation checkpointing the same bit for bit.

    Twelve packings: so windows and anchors, which every fourth one has, meet all three layouts under checkpointing.
    """
    results, chunked = spawn(world_size, on_ranks, [(attention_on_ranks, packings), (chunks_on_ranks, 3)], tmp_path)
    assert len(results) == packings * len(EXCHANGES) * len(LAYOUTS)
    print("worst errors of out, dq, dk, dv:", np.max([errors for _, errors, _ in results], axis=0))
    for what, errors, same in results:
        assert max(errors) < 1e-5, f"{what}: out, dq, dk, dv differ by {errors}"
        assert same is not False, f"{what}: checkpointing changes outputs or gradients"
    assert sum(same is not None for _, _, same in results) == packings * len(EXCHANGES)
    assert {chunks for _, chunks, *_ in chunked} == ({1, 2, 3, 4, 6} if world_size == 2 else {1, 2, 3})
    for what, chunks, errors, same, (sends, largest, elements) in chunked:
        assert max(errors) < 1e-6, f"{what}, {chunks} chunks: out, dq, dk, dv differ by {errors} from one chunk's"
        assert same, f"{what}, {chunks} chunks: checkpointing changes outputs or gradients"
        # q, k, v, out and their gradients; in backward q, k, v and out are sent once more
        assert sends == (8 if chunks == 1 else 12 * chunks), what
        assert largest == elements / chunks, f"{what}: a buffer of {largest} elements, in {chunks} chunks of {elements}"
