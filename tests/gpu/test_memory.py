"""On a real GPU: block inputs on the host and the order of streams, tiled feed-forward, recomputation around compiled
flex."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from torchtitan.attention import flex
from torchtitan.attention.segments import Segments
from torchtitan.config.schema import ActivationCheckpoint
from torchtitan.distributed.activation_checkpoint import apply_activation_checkpoint
from torchtitan.distributed.options.offload import HostCopies
from torchtitan.distributed.options.tiled_mlp import apply_tiled_mlp
from torchtitan.models.transformer import Transformer, TransformerArgs, init_weights

pytestmark = pytest.mark.gpu

ARGS = TransformerArgs(dim=256, n_layers=6, n_heads=4, n_kv_heads=2, head_dim=64, ffn_dim=896, vocab_size=512)
TOKENS, CUTS = 4096, (0, 1000, 1300, 4096)
SELECTIVE = {"mode": "selective"}


class SlowCopies(HostCopies):
    """Every copy is late by some 50 ms of the GPU: who does not wait for it reads what was there before."""

    def _late(self) -> None:
        if self.stream is not None:
            with torch.cuda.stream(self.stream):
                torch.cuda._sleep(100_000_000)

    def to_host(self, tensor: torch.Tensor) -> Any:
        self._late()
        return super().to_host(tensor)

    def to_device(self, copy: Any) -> torch.Tensor:
        self._late()
        return super().to_device(copy)


def gradients(tile: int | None = None, **options: Any) -> tuple[dict[str, torch.Tensor], int]:
    """Of two micro-batches with compiled flex, and the bytes that were alive at most, above those before."""
    before = torch.cuda.memory_allocated()
    model = Transformer(ARGS, "flex").cuda()
    init_weights(model, 0)
    if tile is not None:
        apply_tiled_mlp(model, tile, tp=1)
    config = ActivationCheckpoint(**options)
    if config.mode != "none":
        apply_activation_checkpoint(model, config)
    tokens = torch.arange(TOKENS, device="cuda") % ARGS.vocab_size
    positions = torch.arange(TOKENS, device="cuda")
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats()
        loss, _ = model(tokens, positions, Segments.whole(np.array(CUTS)), labels=tokens, divisor=float(TOKENS))
        loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert len(found) == len(list(model.parameters()))
    return found, torch.cuda.max_memory_allocated() - before


@pytest.fixture(scope="module")
def plain() -> tuple[dict[str, torch.Tensor], int]:
    return gradients()


@pytest.mark.parametrize(
    ("options", "tile"),
    [
        ({"mode": "full"}, None),
        ({"mode": "full", "offload": True}, None),
        (SELECTIVE, None),
        (SELECTIVE | {"selective_ac_matmuls": 0, "offload": True}, 1000),
        (SELECTIVE | {"selective_ac_option": "2"}, None),
        ({}, 1000),
    ],
    ids=str,
)
def test_gradients_are_those_of_the_plain_path(options: dict[str, Any], tile: int | None, plain):
    """And the memory is less."""
    found, peak = gradients(tile, **options)
    for name, gradient in plain[0].items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max()), msg=name)
    assert peak < plain[1]


def test_a_slow_side_stream_corrupts_nothing(monkeypatch: pytest.MonkeyPatch, plain):
    """Neither what is copied away, whose memory is used again, nor what is fetched before it is needed."""
    monkeypatch.setattr("torchtitan.distributed.activation_checkpoint.HostCopies", SlowCopies)
    found, _ = gradients(mode="full", offload=True)
    for name, gradient in plain[0].items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max()), msg=name)


def test_flex_is_not_computed_again():
    """The compiled forward kernel runs once a block and micro-batch, where its result is kept."""
    torch.compiler.reset()
    flex.compiled_attend.cache_clear()
    calls = {}
    for name, options in {"full": {"mode": "full"}, "selective": SELECTIVE}.items():
        gradients(**options)  # compiles
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
            gradients(**options)
        calls[name] = sum(event.count for event in seen.key_averages() if "flex_attention" in event.key)
    # two micro-batches: forward, backward and, with full, forward again
    assert calls["full"] - calls["selective"] == 2 * ARGS.n_layers, calls
