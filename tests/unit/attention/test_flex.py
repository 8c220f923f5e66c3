"""The two backends for CUDA, as far as a CPU can run them: FlexAttention compiled without gradients and uncompiled
with them; of varlen, whose kernel is CUDA's only, what it is given."""

from __future__ import annotations

import functools
import pickle
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters

from torchtitan.attention import flex, varlen
from torchtitan.attention.segments import Segments
from torchtitan.tools.errors import UserError

HEADS, KV_HEADS, HEAD_DIM = 4, 2, 16
TOTAL = 300  # queries, in all masks


def dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The oracle: softmax over the allowed keys of a bool mask [T, K]."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = torch.einsum("thd,khd->htk", q, k) / q.shape[-1] ** 0.5
    return torch.einsum("htk,khd->thd", scores.masked_fill(~mask, -torch.inf).softmax(-1), v)


def inputs(segments: Segments, kv_heads: int = KV_HEADS) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    k, v = torch.randn(2, segments.num_keys, kv_heads, HEAD_DIM, generator=generator)
    return torch.randn(segments.total, HEADS, HEAD_DIM, generator=generator), k, v


def runs(num_keys: int, seed: int, window: int | None = None, anchors: bool = False) -> Segments:
    """TOTAL queries in five runs, each on its keys somewhere in the buffer."""
    rng = np.random.default_rng(seed)
    cu = np.concatenate([[0], np.sort(rng.choice(np.arange(1, TOTAL), 4, replace=False)), [TOTAL]])
    k_end = np.array([rng.integers(n, num_keys + 1) for n in np.diff(cu)])
    k_start = np.array([rng.integers(0, end - n + 1) for end, n in zip(k_end, np.diff(cu))])
    return Segments(cu, k_start, k_end, num_keys, window, k_start // 2 if anchors else None)


MASKS = {
    "by chance as many keys": replace(Segments.whole([0, 200, TOTAL]), keys_vary=True),
    "runs": runs(1000, seed=0),
    "fewer keys": runs(700, seed=1),
    "window": runs(2000, seed=2, window=40),
    "anchors": runs(1300, seed=3, window=40, anchors=True),
    "a document": Segments.whole([0, TOTAL]),
    "documents": Segments.whole([0, 1, 100, 128, 299, TOTAL]),
    "tokens": Segments.whole(range(TOTAL + 1)),
    "many keys": runs(5000, seed=4),
}


def test_tokens_are_brought_near_where_the_kernels_would_wrap():
    """Keys and values that arrive in one buffer, 1M and more of them; nothing is allocated on this device."""
    for tokens, stride in ((1 << 20, 128), ((1 << 20) - 1, 2048)):
        buffer = torch.empty(tokens, 2, 8, 128, dtype=torch.bfloat16, device="meta")
        k = flex._addressable(buffer[:, 0])
        assert k.stride() == ((128, tokens * 128, 1) if stride == 128 else (2048, 128, 1))
        assert k.shape == (tokens, 8, 128) and len(k) * k.stride(0) < 2**31
    x = torch.randn(5, 3, 2)
    assert flex._addressable(x) is x


@torch.compiler.disable
def attend_from_disabled_code(*args):
    return flex.attend(*args)


@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"), reason="PyTorch compiles it for AVX2 and later"
)
def test_compiled_once_for_all_masks():
    """Also when the first call comes from code that torch.compile is told to leave alone, as the model's is."""
    torch.compiler.reset()
    flex.compiled_attend.cache_clear()
    counters.clear()
    for number, (name, segments) in enumerate(MASKS.items()):
        q, k, v = inputs(segments)
        attend = flex.attend if number % 2 else attend_from_disabled_code
        with torch.no_grad():
            got = attend(q, k, v, flex.prepare(segments).to("cpu"))
        assert counters["stats"]["unique_graphs"] == 1, f"compiled again for {name}"
        torch.testing.assert_close(got, dense(q, k, v, segments.dense_mask()), msg=name)


@pytest.mark.parametrize("kv_heads", [HEADS, KV_HEADS])
@pytest.mark.parametrize("name", ["runs", "anchors", "documents"])
def test_gradients(name: str, kv_heads: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *_: None)
    segments = MASKS[name]
    tensors = [x.requires_grad_() for x in inputs(segments, kv_heads)]
    out = flex.attend(*tensors, flex.prepare(segments))
    expected = dense(*tensors, segments.dense_mask())
    torch.testing.assert_close(out, expected)
    weights = torch.randn_like(out)
    got = torch.autograd.grad((out * weights).sum(), tensors)
    torch.testing.assert_close(got, torch.autograd.grad((expected * weights).sum(), tensors))


def test_layers_share_the_expanded_mask():
    prepared = flex.prepare(MASKS["runs"])
    assert prepared.tables is prepared.tables
    assert "tables" not in vars(prepared.to("cpu")), "the loader's copy is not expanded before it is moved"
    assert pickle.loads(pickle.dumps(flex.prepare(MASKS["runs"]))).ranges.num_keys == 1000


@pytest.fixture
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, object]]]:
    """A stand-in for PyTorch's varlen_attn with the documented meaning, in the version that a test asks for."""
    calls: list[dict[str, object]] = []

    def compute(q, k, v, cu_q, cu_k, max_q, max_k, left: int, **seen):
        calls.append(seen | {"kv_heads": k.shape[1], "keys": k.shape[0]})
        assert max_q == cu_q.diff().max() and max_k == cu_k.diff().max()
        assert cu_q[-1] == q.shape[0] and cu_k[-1] == k.shape[0] and cu_q.dtype == cu_k.dtype == torch.int32
        outs = []
        for q_begin, q_end, begin, end in zip(cu_q[:-1], cu_q[1:], cu_k[:-1], cu_k[1:]):
            own = torch.arange(q_end - q_begin)[:, None] + (end - begin) - (q_end - q_begin)
            key = torch.arange(end - begin)
            mask = (key <= own) & ((key >= own - left) if left >= 0 else True)
            outs.append(dense(q[q_begin:q_end].float(), k[begin:end].float(), v[begin:end].float(), mask))
        return torch.cat(outs).to(q.dtype)

    def newest(q, k, v, cu_q, cu_k, max_q, max_k, *, window_size=(-1, -1), enable_gqa=False):
        assert window_size[1] == 0 and enable_gqa == (q.shape[1] != k.shape[1])
        return compute(q, k, v, cu_q, cu_k, max_q, max_k, window_size[0])

    def without_gqa(q, k, v, cu_q, cu_k, max_q, max_k, *, window_size=(-1, -1)):
        assert window_size[1] == 0 and q.shape[1] == k.shape[1]
        return compute(q, k, v, cu_q, cu_k, max_q, max_k, window_size[0])

    def without_window(q, k, v, cu_q, cu_k, max_q, max_k, is_causal=False):
        assert is_causal and q.shape[1] == k.shape[1]
        return compute(q, k, v, cu_q, cu_k, max_q, max_k, -1)

    versions = {"newest": newest, "without_gqa": without_gqa, "without_window": without_window}
    monkeypatch.setattr(varlen, "varlen_attn", versions[request.param])
    monkeypatch.setattr(varlen, "_options", functools.cache(varlen._options.__wrapped__))
    yield calls


@pytest.mark.parametrize("kernel", ["newest", "without_gqa", "without_window"], indirect=True)
@pytest.mark.parametrize("name", ["runs", "window", "documents", "tokens"])
def test_varlen(name: str, kernel: list[dict[str, object]], request: pytest.FixtureRequest):
    segments = MASKS[name]
    q, k, v = (x.to(torch.bfloat16) for x in inputs(segments))
    prepared = pickle.loads(pickle.dumps(varlen.prepare(segments))).to("cpu")
    if segments.window and "without_window" in request.node.name:
        with pytest.raises(UserError, match="window of 40 keys needs a newer PyTorch"):
            varlen.attend(q, k, v, prepared)
        return
    got = varlen.attend(q, k, v, prepared)
    expected = dense(q.float(), k.float(), v.float(), segments.dense_mask())
    torch.testing.assert_close(got, expected.to(torch.bfloat16))
    assert (prepared.index is None) == (name in ("documents", "tokens"))
    if segments.window:
        assert kernel[0]["keys"] <= TOTAL + 5 * (segments.window - 1), "only keys within the windows are gathered"


def test_what_varlen_refuses():
    with pytest.raises(ValueError, match="no anchors"):
        varlen.prepare(MASKS["anchors"])
    with pytest.raises(UserError, match="bfloat16 or float16 and was given torch.float32"):
        varlen.attend(*inputs(MASKS["runs"]), varlen.prepare(MASKS["runs"]))
