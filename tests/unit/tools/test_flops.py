"""The closed form for FLOPs against PyTorch's own counter."""

from __future__ import annotations

import torch
from torch.utils.flop_counter import FlopCounterMode

from torchtitan.attention.segments import Segments
from torchtitan.models.registry import FLAVORS
from torchtitan.models.transformer import Transformer, init_weights, parameter_counts
from torchtitan.tools.flops import training_flops


def test_flops_equal_those_counted_on_the_dense_oracle():
    """The oracle computes all T x T pairs, so it is counted with a mask that allows them all."""
    args = FLAVORS["debugmodel"]
    model = Transformer(args, "dense")
    init_weights(model, 0)
    total = 64
    with FlopCounterMode(display=False) as counter:
        logits = model(torch.arange(total), torch.arange(total), Segments.whole((0, total)))
        logits.sum().backward()
    width = args.n_layers * args.n_heads * args.head_dim
    expected = training_flops(parameter_counts(args)[1], total, width, total * total)
    # norms' weights multiply element by element and are not counted by PyTorch: a thousandth of the parameters
    assert abs(counter.get_total_flops() / expected - 1) < 2e-3


def test_masked_pairs_cost_nothing():
    whole = training_flops(1000, 100, 64, Segments.whole((0, 100)).attended_pairs)
    halves = training_flops(1000, 100, 64, Segments.whole((0, 50, 100)).attended_pairs)
    assert whole - halves == 12 * 64 * 50 * 50
