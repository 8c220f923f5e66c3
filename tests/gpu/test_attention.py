"""FlexAttention and varlen on a real GPU, forward and backward, against a mask that is written out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters

from torchtitan.attention import flex, varlen
from torchtitan.attention.segments import Segments

pytestmark = pytest.mark.gpu

HEADS, KV_HEADS, HEAD_DIM = 6, 2, 64
TOTAL = 1024  # queries, in all masks


def dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: Segments) -> torch.Tensor:
    """The oracle: softmax over the allowed keys, in the tensors' dtype."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = torch.einsum("thd,khd->htk", q, k) / q.shape[-1] ** 0.5
    return torch.einsum("htk,khd->thd", scores.masked_fill(~segments.dense_mask("cuda"), -torch.inf).softmax(-1), v)


def documents(seed: int, window: int | None = None) -> Segments:
    rng = np.random.default_rng(seed)
    return Segments.whole(
        np.concatenate([[0], np.sort(rng.choice(np.arange(1, TOTAL), 6, replace=False)), [TOTAL]]), window
    )


def runs(num_keys: int, seed: int, step: int = 1, window: int | None = None, anchors: bool = False) -> Segments:
    """Four runs of queries, as a context-parallel rank's, whose ends and keys are multiples of `step`."""
    rng = np.random.default_rng(seed)
    cuts = np.sort(rng.choice(np.arange(1, TOTAL // step), 3, replace=False)) * step
    cu = np.concatenate([[0], cuts, [TOTAL]])
    k_end = np.array([rng.integers(n // step, num_keys // step + 1) * step for n in np.diff(cu)])
    k_start = np.array([rng.integers(0, end - n + 1) for end, n in zip(k_end, np.diff(cu))])
    return Segments(cu, k_start, k_end, num_keys, window, k_start // 2 if anchors else None)


PLAIN = {
    "a document": Segments.whole([0, TOTAL]),
    "documents": documents(0),
    "tokens": Segments.whole(range(TOTAL + 1)),
    "documents, window": documents(1, window=100),
    "runs": runs(3000, 0),
    "runs of blocks": runs(4096, 1, step=128),
    "runs, window": runs(2500, 2, window=77),
}
MASKS = PLAIN | {
    "by chance as many keys": replace(documents(2), keys_vary=True),
    "runs, anchors": runs(2500, 3, window=77, anchors=True),
    "fewer keys": runs(1500, 4),
    "many keys": runs(9000, 5),
}


@pytest.fixture(autouse=True)
def exact_float32() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def check(
    backend: tuple[Callable, Callable], segments: Segments, dtype: torch.dtype, tolerance: float, grouped: bool = True
) -> None:
    """Output and gradients within `tolerance` of float64's, relative to the largest entry of each (or 1)."""
    prepare, attend = backend
    generator = torch.Generator("cuda").manual_seed(0)

    def random(rows: int, heads: int) -> torch.Tensor:
        return torch.randn(rows, heads, HEAD_DIM, device="cuda", generator=generator).to(dtype).requires_grad_()

    kv_heads = KV_HEADS if grouped else HEADS
    tensors = [random(TOTAL, HEADS), random(segments.num_keys, kv_heads), random(segments.num_keys, kv_heads)]
    exact = [x.detach().double().requires_grad_() for x in tensors]
    weights = random(TOTAL, HEADS).detach()

    out = attend(*tensors, prepare(segments).pin_memory().to("cuda"))
    assert out.dtype == dtype and out.shape == tensors[0].shape
    expected = dense(*exact, segments)
    got = [out, *torch.autograd.grad(out, tensors, weights)]
    want = [expected, *torch.autograd.grad(expected, exact, weights.double())]
    for name, a, b in zip(("output", "dq", "dk", "dv"), got, want):
        # where every query sees one key only, gradients of queries and keys are 0
        error = ((a.double() - b).abs().max() / b.abs().max().clamp(min=1)).item()
        assert error < tolerance, f"{name}: {error:.1e}"


@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 2e-2), (torch.float32, 5e-5)])
def test_flex(dtype: torch.dtype, tolerance: float, grouped: bool):
    torch.compiler.reset()  # PyTorch refuses to compile a function for more than 8 kinds of input
    for segments in MASKS.values():
        check((flex.prepare, flex.attend), segments, dtype, tolerance, grouped)


@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize("name", PLAIN)
def test_varlen(name: str, grouped: bool):
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("FlashAttention needs compute capability 8.0")
    check((varlen.prepare, varlen.attend), PLAIN[name], torch.bfloat16, 2e-2, grouped)


def test_flex_is_compiled_once_for_all_masks():
    """Forward and backward, from code that torch.compile is told to leave alone; the first mask is of a rank whose
    number of keys varies, but has as many as queries."""
    torch.compiler.reset()
    flex.compiled_attend.cache_clear()
    counters.clear()
    attend = torch.compiler.disable(flex.attend)
    for name, segments in sorted(MASKS.items(), key=lambda item: not item[1].keys_vary):
        check((flex.prepare, attend), segments, torch.bfloat16, 2e-2)
        assert counters["stats"]["unique_graphs"] == 1, f"compiled again for {name}"


def test_expanding_a_mask_does_not_wait_for_the_device():
    prepared = flex.prepare(MASKS["runs"]).pin_memory().to("cuda")
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        tables = prepared.tables
    finally:
        torch.cuda.set_sync_debug_mode(before)
    for ours, on_cpu in zip(tables, flex.prepare(MASKS["runs"]).tables):
        assert torch.equal(ours.cpu(), on_cpu)
