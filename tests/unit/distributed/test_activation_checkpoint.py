"""What each mode of recomputation computes again, counted; block inputs on the host."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from torchtitan.attention.segments import Segments
from torchtitan.config.schema import ActivationCheckpoint
from torchtitan.distributed.activation_checkpoint import apply_activation_checkpoint
from torchtitan.distributed.options import offload
from torchtitan.distributed.options.tiled_mlp import apply_tiled_mlp
from torchtitan.models.transformer import Transformer, TransformerArgs, init_weights

LAYERS, TOKENS, DIM = 4, 96, 32
ARGS = TransformerArgs(
    dim=DIM, n_layers=LAYERS, n_heads=4, n_kv_heads=2, head_dim=8, ffn_dim=80, vocab_size=64, tied_embeddings=True
)
ATTENTION = "aten::_scaled_dot_product_flash_attention_for_cpu"
SELECTIVE = {"mode": "selective"}


class Operators(TorchDispatchMode):
    """Counts the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[function.name()] += 1
        return function(*args, **(kwargs or {}))


def work(tile: int | None = None, **options: Any) -> tuple[int, int]:
    """Attention kernels and matrix products of a forward and backward, those of the output head left out."""
    model = Transformer(ARGS)
    init_weights(model, 0)
    if tile is not None:
        apply_tiled_mlp(model, tile, tp=1)
    config = ActivationCheckpoint(**options)
    if config.mode != "none":
        apply_activation_checkpoint(model, config)
    tokens = torch.arange(TOKENS) % ARGS.vocab_size
    mask = Segments.whole(np.array([0, 60, TOKENS]))
    with Operators() as seen:
        loss, _ = model(tokens, torch.arange(TOKENS), mask, labels=tokens, divisor=1.0)
        loss.backward()
    return seen.counts[ATTENTION], seen.counts["aten::mm"] - 1  # its gradients are written into matrices that it has


def test_what_is_computed_again():
    """Two documents are two kernels per block; a block has 7 products, and 14 in backward.

    The last one, w2, is never computed again: nothing that backward needs comes after it.
    """
    plain = 2 * LAYERS, 21 * LAYERS
    assert work() == plain
    assert work(mode="full") == (4 * LAYERS, 27 * LAYERS)
    assert work(mode="full", offload=True) == (4 * LAYERS, 27 * LAYERS)
    assert work(**SELECTIVE, selective_ac_matmuls=0) == (2 * LAYERS, 27 * LAYERS)
    assert work(**SELECTIVE, selective_ac_matmuls=1) == plain
    assert work(**SELECTIVE) == (2 * LAYERS, 24 * LAYERS)  # values, attention's output and w3 are there
    assert work(**SELECTIVE, selective_ac_option="2") == (3 * LAYERS, 24 * LAYERS)
    assert work(**SELECTIVE, selective_ac_option=str(LAYERS)) == (2 * LAYERS + 2, 21 * LAYERS + 6)


def test_tiles_of_the_feed_forward_are_computed_again_once():
    """Also inside a recomputed block: 4 products outside; 3 per tile, 3 again, and 6 in backward."""
    tiles = 3  # 40, 40, 16 tokens
    assert work(tile=40) == (2 * LAYERS, (4 * 3 + tiles * 12) * LAYERS)
    assert work(tile=40, mode="full") == (4 * LAYERS, (4 * 4 + tiles * 12) * LAYERS)
    assert work(tile=40, **SELECTIVE, selective_ac_matmuls=1) == (2 * LAYERS, (4 * 3 + tiles * 12) * LAYERS)


def test_only_block_inputs_go_to_the_host_and_come_back_in_time(monkeypatch: pytest.MonkeyPatch):
    """They are needed in the reverse order, and each but the last was fetched one block ahead."""
    events: list[tuple[str, int]] = []
    hosts: list[torch.Tensor] = []

    class Recorded(offload.HostCopies):
        def to_host(self, tensor: torch.Tensor) -> Any:
            copy = super().to_host(tensor)
            assert tensor.shape == (TOKENS, DIM) and copy.host.data_ptr() != tensor.data_ptr()
            events.append(("leaves", len(hosts)))
            hosts.append(copy.host)
            return copy

        def to_device(self, copy: Any) -> torch.Tensor:
            events.append(("needed", next(i for i, host in enumerate(hosts) if host is copy.host)))
            return super().to_device(copy)

        def _fetched(self, copy: Any) -> torch.Tensor:
            if copy.device_copy is None:
                events.append(("fetched", next(i for i, host in enumerate(hosts) if host is copy.host)))
            return super()._fetched(copy)

    monkeypatch.setattr("torchtitan.distributed.activation_checkpoint.HostCopies", Recorded)
    work(mode="full", offload=True)
    expected = [("leaves", i) for i in range(LAYERS)] + [("needed", LAYERS - 1), ("fetched", LAYERS - 1)]
    for i in reversed(range(LAYERS - 1)):
        expected += [("fetched", i), ("needed", i)]
    assert events == expected
