"""sdpa against the dense oracle on ragged segments; who moves when one token changes; memory."""

from __future__ import annotations

import random
import subprocess
import sys

import numpy as np
import pytest
import torch

from torchtitan.attention.backends import choose_backend, dense
from torchtitan.attention.sdpa import _lower_right
from torchtitan.attention.sdpa import attend as sdpa
from torchtitan.attention.segments import Segments
from torchtitan.models.registry import FLAVORS
from torchtitan.models.transformer import Transformer, init_weights
from torchtitan.tools.constants import IGNORED_LABEL
from torchtitan.tools.errors import UserError


def ragged(rng: random.Random, total: int) -> Segments:
    """Segments of 1 to total tokens, short ones more likely."""
    ends = [0]
    while ends[-1] < total:
        ends.append(min(total, ends[-1] + max(1, int(total ** rng.random()))))
    return Segments.whole(ends)


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (8, 1)])
def test_sdpa_equals_dense_forward_and_backward(heads: tuple[int, int]):
    rng = random.Random(0)
    for case in range(20):
        total = rng.choice([1, 2, 17, 64, 200])
        segments = ragged(rng, total)
        generator = torch.Generator().manual_seed(case)
        q, grad = (torch.randn(total, heads[0], 16, generator=generator) for _ in range(2))
        k, v = (torch.randn(total, heads[1], 16, generator=generator) for _ in range(2))
        results = []
        for backend in (sdpa, dense):
            leaves = [x.clone().requires_grad_() for x in (q, k, v)]
            out = backend(*leaves, segments)
            results.append([out, *torch.autograd.grad(out, leaves, grad)])
        for name, a, b in zip(("out", "dq", "dk", "dv"), *results, strict=True):
            assert torch.allclose(a, b, atol=1e-5), f"{name} differs by {(a - b).abs().max()} for {segments}"


def test_dense_equals_a_loop_over_queries():
    """The oracle's own oracle: softmax written out for each query."""
    segments = Segments.whole((0, 3, 4, 9))
    q, k, v = (torch.randn(9, h, 8, dtype=torch.float64) for h in (4, 2, 2))
    out = dense(q, k, v, segments)
    for i in range(9):
        start = max(s for s in segments.cu_seqlens.tolist() if s <= i)
        for h in range(4):
            weights = torch.softmax(k[start : i + 1, h // 2] @ q[i, h] / 8**0.5, 0)
            assert torch.allclose(out[i, h], weights @ v[start : i + 1, h // 2])


def test_attended_pairs_is_the_mask_counted():
    rng = random.Random(1)
    for _ in range(20):
        segments = ragged(rng, 100)
        assert segments.attended_pairs == segments.dense_mask().sum().item()


@pytest.mark.parametrize("cu_seqlens", [(0,), (1, 4), (0, 4, 4), (0, 5, 3)])
def test_segments_must_increase_from_zero(cu_seqlens: tuple[int, ...]):
    with pytest.raises(ValueError, match="cu_seqlens"):
        Segments.whole(cu_seqlens)


@pytest.mark.parametrize("backend", ["sdpa", "dense"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_token_moves_nothing_in_other_documents(backend: str, dtype: torch.dtype):
    """Change one token of a document: every logit, and every gradient of the loss on the others, stays bit for bit."""
    args = FLAVORS["debugmodel"]
    model = Transformer(args, backend).to(dtype)
    init_weights(model, seed=0)
    segments = Segments.whole((0, 30, 31, 80, 128))
    positions = torch.cat([torch.arange(n) for n in segments.lengths])
    tokens = torch.randint(0, args.vocab_size, (128,), generator=torch.Generator().manual_seed(0))
    changed = tokens.clone()
    changed[40] = (changed[40] + 1) % args.vocab_size  # in the third document
    labels = tokens.roll(-1)
    labels[31:80] = IGNORED_LABEL  # the loss is that of the other documents
    results = []
    for stream in (tokens, changed):
        model.zero_grad()
        logits = model(stream, positions, segments)
        torch.nn.functional.cross_entropy(logits.float(), labels, ignore_index=-100, reduction="sum").backward()
        gradients = {n: p.grad.clone() for n, p in model.named_parameters()}
        results.append((logits.detach(), gradients))
    (logits_a, gradients_a), (logits_b, gradients_b) = results
    moved = (logits_a != logits_b).any(1).nonzero().flatten().tolist()
    assert moved == list(range(40, 80)), "the change must reach its own document from there on, and no other"
    for name in gradients_a:
        assert torch.equal(gradients_a[name], gradients_b[name]), name


MEMORY = """
import resource, torch
from torchtitan.attention.sdpa import attend as sdpa
from torchtitan.attention.segments import Segments
total = int(__import__("sys").argv[1])
q = torch.randn(total, 2, 32, requires_grad=True)
k, v = (torch.randn(total, 1, 32, requires_grad=True) for _ in range(2))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
sdpa(q, k, v, Segments.whole((0, total // 2, total))).sum().backward()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


def test_sdpa_memory_is_linear_in_the_row():
    """At 16K tokens a bool [T, T] mask alone would be 256 MiB; the whole pass stays far below it."""
    run = subprocess.run([sys.executable, "-c", MEMORY, str(16384)], capture_output=True, text=True, check=True)
    assert int(run.stdout) < 150 * 2**20


def test_every_way_of_segments_equals_dense():
    """Keys that begin before the queries, keys shared by segments, windows, anchors; sdpa, and its way on CUDA too."""
    rng = np.random.default_rng(0)
    for case in range(120):
        count = rng.integers(1, 6)
        queries, before = rng.integers(1, 70, count), rng.integers(0, 2, count) * rng.integers(0, 90, count)
        keys = int((queries + before).max() + rng.integers(0, 50))
        start = np.array([rng.integers(0, keys - n + 1) for n in queries + before])
        window = int(rng.integers(1, 60)) if case % 3 == 0 else None
        anchor = np.array([rng.integers(-1, k + 1) for k in start]) if case % 4 == 0 else None
        cu = np.concatenate([[0], np.cumsum(queries)])
        segments = Segments(cu, start, start + queries + before, keys, window, anchor)
        assert segments.attended_pairs == segments.dense_mask().sum()
        heads, kv_heads = [(4, 4), (4, 2), (8, 1), (3, 1)][case % 4]
        q, grad = (torch.randn(segments.total, heads, 16) for _ in range(2))
        k, v = (torch.randn(keys, kv_heads, 16) for _ in range(2))
        backends = [dense, sdpa] + ([_lower_right] if window is None and anchor is None else [])
        results = []
        for backend in backends:
            leaves = [x.clone().requires_grad_() for x in (q, k, v)]
            out = backend(*leaves, segments)
            results.append([out, *torch.autograd.grad(out, leaves, grad)])
        for result in results[1:]:
            for a, b in zip(result, results[0], strict=True):
                assert torch.allclose(a, b, atol=1e-5, rtol=1e-5), (a - b).abs().max()


@pytest.mark.parametrize("name", ["flex", "varlen"])
def test_backends_that_cannot_train_on_a_cpu_say_what_can(name: str):
    with pytest.raises(UserError, match=f'"{name}".*"sdpa"'):
        choose_backend(name, "cpu")
    assert choose_backend(name, "cuda") == name
    assert (choose_backend("auto", "cuda"), choose_backend("auto", "cpu")) == ("flex", "sdpa")
