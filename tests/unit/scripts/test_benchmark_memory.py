"""What scripts/benchmarks/memory.py prints, held to what is promised of it, at sizes that take a second."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch.distributed as dist

from tests.scripts import load_script

benchmark = load_script("benchmarks/memory")


@pytest.fixture(scope="module", autouse=True)
def no_process_group_is_left() -> Iterator[None]:
    yield
    dist.destroy_process_group()


def test_the_tiled_loss_takes_at_most_a_tenth():
    """32K tokens, 128K words, the width of an 8B model; counted on tensors without memory."""
    plain, tiled = (benchmark.count("loss", 32768, 4096, tiled, fake=True)[0] for tiled in (False, True))
    assert plain >= 3 * 4 * 32768 * benchmark.WORDS  # logits, their softmax, their gradient
    assert tiled <= plain / 10


def test_full_recomputation_keeps_the_blocks_inputs_only():
    """2 bytes x dim a token and layer, in bfloat16."""
    few, many = (benchmark.count("model", 2048, layers, 64, {"mode": "full"}, False)[1] for layers in (2, 4))
    assert (many - few) / 2 / 2048 == pytest.approx(2 * 64, rel=0.1)
    few, many = (benchmark.count("model", 2048, layers, 64, {}, False)[1] for layers in (2, 4))
    assert (many - few) / 2 / 2048 > 10 * 2 * 64


def test_memory_grows_linearly():
    options = {"mode": "full", "mlp_tile_tokens": 256}
    small, middle, large = (benchmark.count("model", n, 1, 64, options, True)[0] for n in (2048, 4096, 16384))
    assert (large - middle) / 12288 == pytest.approx((middle - small) / 2048, rel=0.05)
