"""Context-parallel attention equals dense attention in one process: all ranks of an exchange simulated in this one."""

from __future__ import annotations

import itertools
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from torchtitan.attention.backends import BACKENDS, dense
from torchtitan.attention.segments import Segments
from torchtitan.datasets.batch import PackedBatch
from torchtitan.distributed.context_parallel.exchange import Exchange, in_blocks, kv_received, plan_exchange
from torchtitan.distributed.context_parallel.layout import LAYOUTS
from torchtitan.distributed.context_parallel.local_batch import LocalBatch, local_batch
from torchtitan.models.transformer import Transformer, TransformerArgs, init_weights
from torchtitan.tools.constants import BLOCK, IGNORED_LABEL

DEGREES = (2, 3, 4, 8)
HEADS = ((4, 4), (4, 2), (8, 1))
COMBINATIONS = list(itertools.product(LAYOUTS, ("allgather", "needed"), ("sdpa", "dense")))
NAMES = ("out", "dq", "dk", "dv")


@pytest.fixture(autouse=True)
def one_thread():
    """Thousands of small kernels: on a busy machine their threads would mostly wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def documents(rng: np.random.Generator, row: int) -> np.ndarray:
    """Where the documents of a row end: one, many tiny, of all lengths, or whole blocks of 128."""
    kind = rng.choice(4, p=(0.15, 0.1, 0.6, 0.15))
    if kind == 0:
        return np.array([row])
    if kind == 1:
        return np.union1d(rng.integers(1, row + 1, 1000), [row])
    if kind == 3:
        return np.union1d(np.arange(BLOCK, row, BLOCK)[rng.random((row - 1) // BLOCK) < 0.5], [row])
    ends = [0]
    while ends[-1] < row:
        ends.append(min(row, ends[-1] + max(1, int(row ** rng.random()))))
    return np.array(ends[1:])


def packing(rng: np.random.Generator, cp: int) -> Segments:
    """A stream of 256 to 2048 tokens in one to three rows, now and then with a window, with anchors, or with both.

    Anchors are none, the document's first token, the row's, or any before it.
    """
    unit = BLOCK * cp
    most = 2048 if rng.random() < 0.1 else 1024
    total = unit * int(rng.integers(max(1, 256 // unit), most // unit, endpoint=True))
    rows = np.union1d(rng.integers(1, total, rng.integers(3)), [0, total])
    ends = np.concatenate([a + documents(rng, b - a) for a, b in zip(rows[:-1], rows[1:], strict=True)])
    cu = np.concatenate([[0], ends])
    window = max(1, int(total ** rng.random())) if rng.random() < 0.25 else None
    anchor = None
    if rng.random() < 0.25:
        starts = cu[:-1]
        row = rows[np.searchsorted(rows, starts, side="right") - 1]
        choices = (np.full(len(starts), -1), starts, row, row, rng.integers(0, starts + 1))
        anchor = np.choose(rng.integers(len(choices), size=len(starts)), choices)
    return Segments.whole(cu, window, anchor)


def plan_all(name: str, segments: Segments, owner: np.ndarray, cp: int) -> list[tuple[Segments, Exchange]]:
    return [plan_exchange(name, segments, owner, cp, rank) for rank in range(cp)]


def buffer_of(name: str, plans: list[tuple[Segments, Exchange]], owner: np.ndarray, rank: int) -> torch.Tensor:
    """The blocks of the stream in a rank's buffer of keys, from what the ranks say they send."""
    own = [torch.from_numpy(np.flatnonzero(owner == r)) for r in range(len(plans))]
    _, mine = plans[rank]
    if name == "allgather":
        available = torch.cat(own)
    else:
        parts = [own[rank]]
        for sender, (_, plan) in enumerate(plans):
            sent = own[sender][plan.send.split(plan.send_counts)[rank]]
            assert len(sent) == mine.receive_counts[sender], f"rank {sender} sends {rank} another number of blocks"
            assert (owner[sent] == sender).all()
            parts.append(sent)
        available = torch.cat(parts)
    assert torch.equal(mine.place[mine.inverse], torch.arange(len(available)))
    return available[mine.place]


def simulate(
    name: str, backend: str, segments: Segments, owner: np.ndarray, cp: int, *qkv: torch.Tensor
) -> torch.Tensor:
    """Attention over the stream by cp ranks; what GatheredAttention does, without a group."""
    plans = plan_all(name, segments, owner, cp)
    q, k, v = (in_blocks(x) for x in qkv)
    outs = []
    for rank, (local, _) in enumerate(plans):
        own, buffer = torch.from_numpy(np.flatnonzero(owner == rank)), buffer_of(name, plans, owner, rank)
        inputs = [x.index_select(0, i).flatten(0, 1) for x, i in ((q, own), (k, buffer), (v, buffer))]
        outs.append(in_blocks(BACKENDS[backend].attend(*inputs, BACKENDS[backend].prepare(local))))
    order = np.argsort(owner, kind="stable")  # by rank, as outs are
    return torch.cat(outs).index_select(0, torch.from_numpy(np.argsort(order))).flatten(0, 1)


def oracle(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, grad: torch.Tensor, segments: Segments) -> list:
    """Output and gradients of q, k and v by dense in float64, one query head at a time."""
    wide = [x.detach().double() for x in (q, k, v)]
    out, dq, dk, dv = (torch.zeros_like(wide[i]) for i in (0, 0, 1, 2))
    for h in range(q.shape[1]):
        g = h // (q.shape[1] // k.shape[1])
        leaves = [x[:, i : i + 1].clone().requires_grad_() for x, i in zip(wide, (h, g, g), strict=True)]
        result = dense(*leaves, segments)
        grads = torch.autograd.grad(result, leaves, grad[:, h : h + 1].double())
        for total, i, x in zip((out, dq, dk, dv), (h, h, g, g), (result.detach(), *grads), strict=True):
            total[:, i : i + 1] += x
    return [out, dq, dk, dv]


def random_inputs(seed: int, total: int, heads: tuple[int, int], dim: int = 8) -> list[torch.Tensor]:
    """q, k, v and the output's gradient."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(total, heads[i], dim, generator=generator) for i in (0, 1, 1, 0)]


@pytest.mark.timeout(900)
def test_attention_equals_dense_forward_and_backward() -> None:
    """Any packing, layout, exchange and backend: outputs and gradients of q, k and v are those of one process.

    Within 1e-10 in float64. In float32 within 1e-5, for gradients times the largest one if that is above 1: those of k
    and v are sums over all queries that see a key, where sdpa and dense in one process are off by some 1e-5 too.
    """
    rng = np.random.default_rng(0)
    combinations = itertools.cycle(itertools.product(COMBINATIONS, (torch.float32, torch.float64)))
    worst: dict[torch.dtype, dict[str, float]] = {d: dict.fromkeys(NAMES, 0.0) for d in (torch.float32, torch.float64)}
    for case in range(120):
        cp, heads = DEGREES[case % len(DEGREES)], HEADS[rng.integers(len(HEADS))]
        segments = packing(rng, cp)
        *qkv, grad = random_inputs(case, segments.total, heads)
        expected = oracle(*qkv, grad, segments)
        largest = max(1.0, *(float(x.abs().max()) for x in expected[1:]))
        for (layout, exchange, backend), dtype in itertools.islice(combinations, 2 if segments.total > 1024 else 3):
            leaves = [x.to(dtype, copy=True).requires_grad_() for x in qkv]
            out = simulate(exchange, backend, segments, LAYOUTS[layout](segments, cp), cp, *leaves)
            got = (out.detach(), *torch.autograd.grad(out, leaves, grad.to(dtype)))
            for name, a, b in zip(NAMES, got, expected, strict=True):
                error = float((a - b).abs().max())
                worst[dtype][name] = max(worst[dtype][name], error)
                bound = 1e-10 if dtype == torch.float64 else 1e-5 * (1.0 if name == "out" else largest)
                assert error < bound, f"{name} differs by {error}: {layout}, {exchange}, {backend}, {cp=}, {segments}"
    print("worst errors:", worst)


def test_ranks_see_exactly_what_the_stream_does() -> None:
    """Masks joined over ranks are the stream's, pair by pair; `needed` fetches no block of which no key is seen."""
    rng = np.random.default_rng(1)
    for _ in range(60):
        cp = int(rng.choice(DEGREES))
        segments = packing(rng, cp)
        mask = segments.dense_mask()
        for layout, exchange in itertools.product(LAYOUTS, ("allgather", "needed")):
            owner = LAYOUTS[layout](segments, cp)
            plans = plan_all(exchange, segments, owner, cp)
            assert sum(local.attended_pairs for local, _ in plans) == segments.attended_pairs
            for rank, (local, plan) in enumerate(plans):
                buffer = buffer_of(exchange, plans, owner, rank)
                assert local.num_keys == len(buffer) * BLOCK
                own = in_blocks(mask)[torch.from_numpy(owner == rank)].flatten(0, 1)
                seen = own.unflatten(1, (-1, BLOCK))[:, buffer].flatten(1)
                assert torch.equal(local.dense_mask(), seen)
                if exchange == "needed":
                    used = own.unflatten(1, (-1, BLOCK)).any(2).any(0)
                    assert torch.equal(used.nonzero().flatten(), buffer)
                    assert sum(plan.receive_counts) * BLOCK == kv_received(segments, owner, cp)[rank]


def test_a_token_moves_only_those_who_see_it() -> None:
    """Change a token's key and value: outputs of other documents, and of all before it, stay bit for bit."""
    rng = np.random.default_rng(2)
    for case, (layout, exchange, backend) in enumerate(COMBINATIONS * 4):
        cp, heads = int(rng.choice(DEGREES)), HEADS[case % len(HEADS)]
        segments = packing(rng, cp)
        q, k, v, _ = random_inputs(case, segments.total, heads)
        owner = LAYOUTS[layout](segments, cp)
        token = int(rng.integers(segments.total))
        before = simulate(exchange, backend, segments, owner, cp, q, k, v)
        k[token] += 1
        v[token] -= 1
        after = simulate(exchange, backend, segments, owner, cp, q, k, v)
        assert torch.equal((before != after).flatten(1).any(1), segments.dense_mask()[:, token])


def packed(rng: np.random.Generator, cp: int) -> PackedBatch:
    """A batch with all fields distinct; some segments hold several documents, some documents are padding."""
    cu = packing(rng, cp).cu_seqlens
    total = int(cu[-1])
    cu_documents = np.union1d(cu, rng.integers(1, total, rng.integers(20)))
    labels = torch.arange(total) + 10**6
    labels[torch.from_numpy(rng.random(total) < 0.2)] = IGNORED_LABEL
    return PackedBatch(
        torch.arange(total),
        labels,
        torch.from_numpy(rng.permutation(total)),
        torch.from_numpy(cu.astype(np.int32)),
        torch.from_numpy(cu_documents.astype(np.int32)),
        torch.from_numpy(rng.integers(-1, 5, len(cu_documents) - 1).astype(np.int16)),
    )


def test_shards_hold_every_token_once_with_what_belongs_to_it() -> None:
    """Over all ranks each token comes once, with its own label, position, source and index in its document."""
    rng = np.random.default_rng(3)
    for _ in range(24):
        cp = int(rng.choice((1, *DEGREES)))
        batch = packed(rng, cp)
        total = len(batch.tokens)
        source, index = [], []
        for start, end, s in zip(batch.cu_documents[:-1], batch.cu_documents[1:], batch.source, strict=True):
            source += [int(s)] * int(end - start)
            index += range(int(end - start))
        for layout, exchange in itertools.product(LAYOUTS, ("allgather", "needed", "ulysses")):
            shards = [local_batch(batch, "sdpa", layout, exchange, cp, rank) for rank in range(cp)]
            assert [len(s.tokens) for s in shards] == [total // cp] * cp

            def joined(name: str, shards: list[LocalBatch] = shards) -> torch.Tensor:
                return torch.cat([getattr(s, name) for s in shards])

            tokens = joined("tokens")
            assert torch.equal(tokens.sort().values, torch.arange(total))
            assert torch.equal(joined("labels"), batch.labels[tokens])
            assert torch.equal(joined("positions"), batch.positions[tokens])
            assert torch.equal(joined("source"), torch.tensor(source)[tokens])
            assert torch.equal(joined("index"), torch.tensor(index)[tokens])
            assert sum(s.num_valid for s in shards) == batch.num_valid
            pairs = [s.masks["full_attention"].segments.attended_pairs for s in shards]
            whole = Segments.whole(batch.cu_seqlens).attended_pairs
            for s in shards:
                assert (s.pairs, s.unpadded) == (whole, total - batch.num_padding)
                assert s.kv_of_all_gather == total - total // cp
                if exchange != "ulysses":
                    assert s.pairs_of_busiest == max(pairs)
            if exchange == "needed":
                assert all(s.kv_received <= s.kv_of_all_gather for s in shards)
            else:
                assert all(s.kv_received == s.kv_of_all_gather for s in shards)


def test_layers_with_windows_have_masks_of_their_own() -> None:
    """Over all ranks each kind of layer has the stream's mask, with anchors, on the same tokens; counts are means."""
    rng = np.random.default_rng(4)
    cases = itertools.product((1, 2, 4), LAYOUTS, ("allgather", "needed", "ulysses"), (0.75, 1.0))
    for cp, layout, exchange, share in cases:
        batch, window = packed(rng, cp), int(rng.integers(1, 300))
        cu = batch.cu_seqlens.numpy().astype(np.int64)
        anchor = np.maximum(rng.integers(-1, cu[:-1] + 1), -1)
        batch = replace(batch, anchor=torch.from_numpy(anchor.astype(np.int32)))
        shards = [local_batch(batch, "sdpa", layout, exchange, cp, rank, window, share) for rank in range(cp)]
        owner = np.empty(len(batch.tokens) // BLOCK, np.int64)
        for rank, s in enumerate(shards):
            owner[s.tokens[::BLOCK] // BLOCK] = rank
        kinds = {window: [s.masks["sliding_attention"] for s in shards]}
        if share < 1:
            kinds[None] = [s.masks["full_attention"] for s in shards]
        assert all(len(s.masks) == len(kinds) for s in shards)
        pairs, busiest, received = {}, {}, {}
        for kind, masks in kinds.items():
            whole = Segments.whole(cu, kind, anchor)
            pairs[kind] = whole.attended_pairs
            dense_mask = whole.dense_mask()
            if cp == 1 or exchange == "ulysses":
                assert all(torch.equal(mask.segments.dense_mask(), dense_mask) for mask in masks)
                busiest[kind], received[kind] = -(-pairs[kind] // cp), [len(batch.tokens) // cp * (cp - 1)] * cp
                continue
            plans = [(mask.segments, mask.exchange) for mask in masks]
            for rank, mask in enumerate(masks):
                buffer = buffer_of(exchange, plans, owner, rank)
                own = in_blocks(dense_mask)[torch.from_numpy(owner == rank)].flatten(0, 1)
                assert torch.equal(mask.segments.dense_mask(), own.unflatten(1, (-1, BLOCK))[:, buffer].flatten(1))
            busiest[kind] = max(mask.segments.attended_pairs for mask in masks)
            received[kind] = [(mask.segments.num_keys - len(s.tokens)) for mask, s in zip(masks, shards, strict=True)]

        def mean(counts: dict, share: float = share, window: int = window) -> float:
            return share * counts[window] + (1 - share) * counts.get(None, 0)

        for rank, s in enumerate(shards):
            assert s.pairs == pytest.approx(mean(pairs)) and s.pairs_of_busiest == pytest.approx(mean(busiest))
            assert s.kv_received == pytest.approx(mean({k: counts[rank] for k, counts in received.items()}))


def anchored_rows(rng: np.random.Generator, rows: int, seq_len: int) -> PackedBatch:
    """Rows of documents that share their row's first token, each row with some padding at its end."""
    cu, anchor, source = [0], [], []
    for begin in range(0, rows * seq_len, seq_len):
        ends = sorted({*rng.integers(1, seq_len, 4).tolist(), seq_len - 9, seq_len})
        cu += [begin + end for end in ends]
        padding = [end > seq_len - 9 for end in ends]
        anchor += [-1 if pad else begin for pad in padding]
        source += [-1 if pad else 0 for pad in padding]
    ends = torch.tensor(cu, dtype=torch.int32)
    tokens = torch.from_numpy(rng.integers(0, 50, rows * seq_len))
    positions = torch.arange(seq_len).repeat(rows)
    return PackedBatch(
        tokens,
        tokens,
        positions,
        ends,
        ends,
        torch.tensor(source, dtype=torch.int16),
        anchor=torch.tensor(anchor, dtype=torch.int32),
    )


def test_an_anchor_moves_its_row_and_others_move_their_document() -> None:
    """Through local_batch and a model with a sliding and a full layer."""
    rng = np.random.default_rng(5)
    args = TransformerArgs(
        32, 2, 2, 1, 16, 48, 50, layer_types=("sliding_attention", "full_attention"), sliding_window=8
    )
    model = Transformer(args).double()
    init_weights(model, 0)
    batch = anchored_rows(rng, 3, 64)

    @torch.no_grad()
    def run(tokens: torch.Tensor) -> torch.Tensor:
        local = local_batch(replace(batch, tokens=tokens), "sdpa", "balanced", "needed", 1, 0, 8, 0.5)
        return model(local.tokens, local.positions, local.masks)

    before = run(batch.tokens)
    cu, index = batch.cu_seqlens.tolist(), torch.arange(len(batch.tokens))
    for token in (0, 64, 65, 70, 100, 127, 130, *rng.integers(0, 192, 10).tolist()):
        changed = batch.tokens.clone()
        changed[token] = (changed[token] + 1) % 50
        moved = (run(changed) != before).any(1)
        segment = np.searchsorted(cu, token, side="right") - 1
        expected = (index >= token) & (index < cu[segment + 1])
        if token % 64 == 0:
            expected = (index >= token) & (index < token + 64 - 9)
        assert torch.equal(moved, expected), token


MEMORY = """
import re, sys, torch
from torchtitan.attention.backends import BACKENDS
from torchtitan.attention.segments import Segments
from torchtitan.distributed.context_parallel.exchange import ExchangedMask, GatheredAttention, OnTheirWay, plan_exchange
from torchtitan.distributed.context_parallel.layout import LAYOUTS

class Arrived:
    def wait(self): pass
    def send_back(self, grad): return grad

torch.set_num_threads(1)
total, cp = int(sys.argv[1]), 8
# not ru_maxrss, which a child begins with its parent's
def peak(): return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
before = peak()
segments = Segments.whole((0, total))
owner = LAYOUTS["balanced"](segments, cp)
local, plan = max((plan_exchange("needed", segments, owner, cp, r) for r in range(cp)), key=lambda x: x[0].num_keys)
assert local.total == total // cp and local.num_keys > total * 0.9
mask = ExchangedMask(local, BACKENDS["sdpa"].prepare(local), plan)
q = torch.randn(local.total, 2, 32, requires_grad=True)
kv, arrived = (torch.randn(n // 128, 128, 2, 1, 32, requires_grad=True) for n in (q.shape[0], local.num_keys - len(q)))
core = GatheredAttention(BACKENDS["sdpa"], "needed", None)
core.finish(q, OnTheirWay(kv, arrived, Arrived()), mask).sum().backward()
assert q.grad.any() and kv.grad.any() and arrived.grad.any()
print(peak() - before)
"""


@pytest.mark.timeout(300)
def test_memory_is_linear_on_a_rank_of_eight_at_64k() -> None:
    """A bool [T / cp, T] mask alone would be 512 MiB; buffer, attention and backward stay far below it."""
    run = subprocess.run([sys.executable, "-c", MEMORY, str(2**16)], stdout=subprocess.PIPE, text=True, check=True)
    print(f"peak memory grew by {int(run.stdout) / 2**20:.0f} MiB")
    buffer = 2**16 * 2 * 32 * 4  # of keys and values: less than that would not have been measured
    assert buffer < int(run.stdout) < 200 * 2**20
