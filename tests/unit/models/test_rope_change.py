"""What a stage's RoPE does to weights trained with another: how far it takes them, what it takes back, what piles up.

Frequencies are transformers' own (ROPE_INIT_FUNCTIONS) or closed formulas written out here.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from torchtitan.config.schema import Rope
from torchtitan.models.registry import FLAVORS
from torchtitan.models.rope import RopeArgs
from torchtitan.models.rope_change import (
    beyond_trained,
    changed_magnitude,
    counts_from_less,
    coverage,
    lengths_covered,
    lost_rope,
    piled_up,
    ways_out,
)
from torchtitan.models.rope_config import build_rope
from torchtitan.models.rope_scaling import (
    DynamicNTKScaling,
    GeneScaling,
    HarpeScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    NTKScaling,
    YarnScaling,
)

K = 1024


def trained(theta: float, length: int | None, scaling: Any = None) -> RopeArgs:
    return RopeArgs(theta, scaling, max_position_embeddings=length)


def ntk(theta: float, growth: float, head_dim: int = 128) -> float:
    return theta * growth ** (head_dim / (head_dim - 2))


LLAMA2, LLAMA3, LLAMA3_1 = (FLAVORS[name].rope for name in ("llama2_7b", "llama3_8b", "llama3.1_8b"))
QWEN, SMOLLM, OLMO = (FLAVORS[name].rope for name in ("qwen2.5_7b", "smollm2_135m", "olmo3_7b"))
YARN_HF = trained(1e6, 32 * K, YarnScaling(4.0, 32 * K))  # switched on in config.json: max_position_embeddings stays
LONG = LongRopeScaling(8 * K, (16.0,) * 64, (1.0,) * 64)


@pytest.mark.parametrize(
    ("old", "new", "reach", "covers"),
    [
        # untouched: what the weights were trained to
        (LLAMA3, LLAMA3, 128 * K, 8 * K),
        (LLAMA3, LLAMA3, 512 * K, 8 * K),
        (LLAMA3_1, LLAMA3_1, 256 * K, 128 * K),
        (QWEN, QWEN, 256 * K, 32 * K),
        (YARN_HF, YARN_HF, 256 * K, 128 * K),
        (LLAMA3, LLAMA3, 8 * K + 1, 8 * K),
        # another base: the slowest pair is slowed (b'/b)^(126/128)
        (LLAMA3, RopeArgs(5.05e5), 128 * K, 8 * K * 1.01 ** (126 / 128)),
        (LLAMA3, RopeArgs(8e6), 256 * K, 8 * K * 16 ** (126 / 128)),
        (LLAMA3, RopeArgs(ntk(5e5, 16) * 0.95), 128 * K, 128 * K * 0.95 ** (126 / 128)),
        (LLAMA2, RopeArgs(1e4, NTKScaling(2.0)), 16 * K, 8 * K),
        # a factor too small; the original length of another model
        (LLAMA3, RopeArgs(5e5, YarnScaling(2.0, 8 * K)), 32 * K, 16 * K),
        (LLAMA2, RopeArgs(1e4, LinearScaling(2.0)), 16 * K, 8 * K),
        (LLAMA3, RopeArgs(5e5, Llama3Scaling(8.0, 1.0, 4.0, 8 * K)), 128 * K, 64 * K),
        (LLAMA3_1, RopeArgs(5e5, Llama3Scaling(16.0, 1.0, 4.0, 8 * K)), 512 * K, 256 * K),
        (LLAMA3_1, RopeArgs(5e5, YarnScaling(16.0, 8 * K)), 512 * K, None),
        (LLAMA3, RopeArgs(5e5, YarnScaling(16.0, 64 * K)), 128 * K, None),  # pairs between 8K and 64K stay
        (trained(1e4, 16 * K, LinearScaling(4.0)), RopeArgs(1e4, LinearScaling(4.0)), 64 * K, 16 * K),
        (LLAMA2, RopeArgs(1e4, GeneScaling(2.0, 4 * K)), 16 * K, 8 * K),  # read at 2, though drawn at 4
        (LLAMA3, RopeArgs(5e5, LongRopeScaling(8 * K, (4.0,) * 64, (4.0,) * 64)), 128 * K, 32 * K),
        (
            LLAMA3,
            RopeArgs(5e5, LongRopeScaling(64 * K, (16.0,) * 64, (1.0,) * 64)),
            128 * K,
            8 * K,
        ),  # short rows to 64K
        (LLAMA2, RopeArgs(1e4, HarpeScaling((1e4, 5e6))), 16 * K, 4 * K),  # one head stays
        (LLAMA2, RopeArgs(1e4, DynamicNTKScaling(1.0, 8 * K, 16 * K)), 32 * K, 8 * K),  # from 8K: s' = 2
    ],
    ids=str,
)
def test_rows_beyond_what_rope_covers(old: RopeArgs, new: RopeArgs, reach: int, covers: float | None):
    text = beyond_trained(old, new, 128, reach)
    assert text and f"position {reach:,}" in text[0] and f"trained to {lengths_covered(old):,} tokens" in text[0]
    if covers is not None:
        assert coverage(old, new, 128, reach=reach) == pytest.approx(covers, rel=1e-9)


@pytest.mark.parametrize(
    ("old", "new", "reach"),
    [
        (LLAMA3, LLAMA3, 8 * K),
        (LLAMA3, LLAMA3, 128),
        (LLAMA3, RopeArgs(8e6), 64 * K),  # ProLong
        (trained(8e6, 64 * K), RopeArgs(1.28e8), 512 * K),
        (LLAMA3, RopeArgs(ntk(5e5, 16)), 128 * K),
        (trained(5e6, 128 * K), RopeArgs(1e7), 256 * K),  # Qwen2.5-1M: 1.1% short
        (LLAMA2, RopeArgs(5e5), 32 * K),  # Llama 2 Long
        (LLAMA2, RopeArgs(1e4, NTKScaling(8.0)), 32 * K),
        (LLAMA2, RopeArgs(1e4, DynamicNTKScaling(1.0, 4 * K, 32 * K)), 32 * K),
        (LLAMA2, RopeArgs(1e4, LinearScaling(8.0)), 32 * K),
        (LLAMA2, RopeArgs(1e4, YarnScaling(16.0, 4 * K)), 64 * K),
        (LLAMA2, RopeArgs(1e4, YarnScaling(16.0, 2 * K)), 64 * K),  # a shorter original length slows more pairs
        (LLAMA2, RopeArgs(1e4, GeneScaling(16.0, 4 * K)), 16 * K),
        (LLAMA2, RopeArgs(1e4, HarpeScaling((1e6, 5e6))), 128 * K),
        (LLAMA3, RopeArgs(5e5, LONG), 128 * K),
        (YARN_HF, YARN_HF, 128 * K),
        (trained(1e4, 64 * K, YarnScaling(32.0, 4 * K)), RopeArgs(1e4, YarnScaling(32.0, 4 * K)), 128 * K),
        (trained(1e4, 16 * K, GeneScaling(16.0, 4 * K)), RopeArgs(1e4, GeneScaling(16.0, 4 * K)), 64 * K),
        (LLAMA3_1, RopeArgs(5e5, Llama3Scaling(128.0, 1.0, 4.0, 8 * K)), 1024 * K),  # UltraLong
        (trained(1e4, None), RopeArgs(1e4), 64 * K),  # not known: nothing to compare with
    ],
    ids=str,
)
def test_rows_that_rope_covers(old: RopeArgs, new: RopeArgs, reach: int):
    assert beyond_trained(old, new, 128, reach) is None


def test_the_arithmetic_of_the_message():
    """Llama 3 at 128K: w_63 = 2 pi 5e5^(126/128); pairs with w_j > 8,192, counted here by the formula."""
    text = beyond_trained(LLAMA3, LLAMA3, 128, 128 * K)
    wavelengths = [2 * math.pi * 5e5 ** (2 * j / 128) for j in range(64)]
    never = sum(w > 8192 for w in wavelengths)
    assert text and f"{wavelengths[-1]:,.0f} tokens." in text[1]
    assert text[1].startswith(f"{never} pairs of 64 have not turned once within 8,192") and never == 29
    assert "16 times as far, but this stage's RoPE has the same frequencies" in text[0]
    partial = beyond_trained(LLAMA3, RopeArgs(5.05e5), 128, 128 * K)
    assert partial and "frequencies that are enough for 8,273." in partial[0] and "1.01 times as slowly" in partial[1]
    # "1 times as slowly" is not said
    partial = beyond_trained(LLAMA3, RopeArgs(5.005e5), 128, 128 * K)
    assert partial and "as slowly" not in partial[1]


def test_layers_with_a_window_see_no_farther_than_it():
    """All layers slide: nothing is beyond. Three of four (Olmo 3): the others decide; theirs is the rescaling."""
    yarn = RopeArgs(5e5, YarnScaling(8.0, 8 * K), "full_attention")
    assert beyond_trained(LLAMA3, LLAMA3, 128, 64 * K, (4096,)) is None
    assert beyond_trained(LLAMA3, LLAMA3, 128, 64 * K, (16 * K,)) is not None
    assert beyond_trained(OLMO, OLMO, 128, 64 * K, (None, 4096)) is not None
    assert beyond_trained(OLMO, yarn, 128, 64 * K, (None, 4096)) is None
    assert beyond_trained(OLMO, yarn, 128, 64 * K, (None, 16 * K)) is not None
    scaled = replace(yarn, layers="all")
    assert lost_rope(scaled, yarn, 128) is None
    lost = lost_rope(scaled, yarn, 128, windows=(None, 4096))
    assert lost and "in layers with a sliding window" in lost


def transformers_frequencies(parameters: dict[str, Any], length: int) -> torch.Tensor:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = LlamaConfig(
        hidden_size=512,
        num_attention_heads=4,
        head_dim=128,
        max_position_embeddings=length,
        rope_parameters=dict(parameters),
    )
    if parameters["rope_type"] == "default":
        return 1.0 / (parameters["rope_theta"] ** (torch.arange(0, 128, 2).float() / 128))
    frequencies: torch.Tensor = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, "cpu", seq_len=length)[0]
    return frequencies


CHAIN = (
    RopeArgs(5e5),
    RopeArgs(8e6),
    RopeArgs(5e5, LinearScaling(8.0)),
    RopeArgs(5e5, YarnScaling(16.0, 8 * K)),
    RopeArgs(8e6, YarnScaling(16.0, 8 * K)),
    RopeArgs(5e5, YarnScaling(128.0, 8 * K, beta_fast=4.0)),
    RopeArgs(5e5, YarnScaling(16.0, 32 * K)),
    RopeArgs(5e5, Llama3Scaling(8.0, 1.0, 4.0, 8 * K)),
    RopeArgs(5e5, Llama3Scaling(128.0, 1.0, 4.0, 8 * K)),
    RopeArgs(8e6, Llama3Scaling(8.0, 1.0, 4.0, 8 * K)),
    RopeArgs(5e5, Llama3Scaling(64.0, 1.0, 32.0, 4 * K)),
)


@pytest.mark.parametrize("old", CHAIN, ids=str)
def test_every_pair_is_compared(old: RopeArgs):
    """Against all others, by transformers' frequencies: refused if, and only if, a pair turns over 1% faster."""

    def parameters(rope: RopeArgs) -> dict[str, Any]:
        plain = {"rope_type": "default", "rope_theta": rope.theta}
        return rope.scaling.hf(rope.theta, 128) if rope.scaling else plain

    was = transformers_frequencies(parameters(old), 128 * K)
    for new in CHAIN:
        faster = int((transformers_frequencies(parameters(new), 128 * K) > was * 1.01).sum())
        found = lost_rope(old, new, 128)
        originals = [getattr(r.scaling, "original_max_position_embeddings", 0) for r in (old, new)]
        if not faster and type(old.scaling) is type(new.scaling) and originals[1] > originals[0]:
            assert found and f"original_max_position_embeddings {originals[0]} -> {originals[1]}" in found
        else:
            assert (found or "").startswith(f"{faster} of 64 pairs would turn faster" if faster else ""), (new, found)
            assert bool(found) == bool(faster), (new, found)


@pytest.mark.parametrize(
    ("old", "new", "reach", "lost"),
    [
        (RopeArgs(8e6), RopeArgs(5e5, YarnScaling(64.0, 8 * K)), 0, "would turn faster"),  # issue 21
        (RopeArgs(5e5, LONG), RopeArgs(5e5, replace(LONG, long_factor=(32.0,) * 64)), 0, None),
        (RopeArgs(5e5, LONG), RopeArgs(5e5, LinearScaling(16.0)), 0, None),
        (RopeArgs(5e5, LONG), RopeArgs(5e5, LinearScaling(8.0)), 0, "64 of 64"),  # slower than the short list alone
        (RopeArgs(5e5, replace(LONG, short_factor=(16.0,) * 64)), RopeArgs(5e5, LONG), 0, "64 of 64"),  # short rows
        (
            RopeArgs(5e5, LONG),
            RopeArgs(5e5, replace(LONG, original_max_position_embeddings=16 * K)),
            0,
            "8192 -> 16384",
        ),
        (RopeArgs(1e4, HarpeScaling((1e6, 5e6))), RopeArgs(1e4, HarpeScaling((5e6, 1e6))), 0, "63 of 64"),
        (RopeArgs(1e4, HarpeScaling((1e6, 5e6))), RopeArgs(1e4, HarpeScaling((1e6, 5e6))), 0, None),
        (RopeArgs(1e6), RopeArgs(1e4, HarpeScaling((1e6, 9e5))), 0, "would turn faster"),
        (RopeArgs(1e4, GeneScaling(16.0, 4 * K)), RopeArgs(1e4, GeneScaling(16.0, 4 * K)), 16 * K, None),
        (RopeArgs(1e4, GeneScaling(16.0, 4 * K)), RopeArgs(1e4, GeneScaling(8.0, 4 * K)), 16 * K, "would turn faster"),
        # after another method GeNE draws 4 of 16 at least
        (RopeArgs(1e4, LinearScaling(16.0)), RopeArgs(1e4, GeneScaling(16.0, 4 * K)), 16 * K, "would turn faster"),
        (
            RopeArgs(1e4, DynamicNTKScaling(2.0, 4 * K, 32 * K)),
            RopeArgs(1e4, DynamicNTKScaling(2.0, 4 * K, 16 * K)),
            0,
            "would turn faster",
        ),
        (RopeArgs(1e4), RopeArgs(1e4, DynamicNTKScaling(2.0, 4 * K)), 0, None),  # as in config.json, no length yet
        (RopeArgs(1e6), RopeArgs(0.995e6), 0, None),
        (RopeArgs(1e6), RopeArgs(0.98e6), 0, "would turn faster"),
    ],
    ids=str,
)
def test_methods_with_more_than_one_list(old: RopeArgs, new: RopeArgs, reach: int, lost: str | None):
    found = lost_rope(old, new, 128, reach)
    assert (lost in found) if lost and found else (found == lost)


@pytest.mark.parametrize(
    ("model", "new", "said"),
    [
        # 16^(126/128) = 15.3 of the base, 16 of YaRN, 245 together
        (LLAMA3, RopeArgs(8e6, YarnScaling(16.0, 8 * K)), ["15.3 times, yarn 16 times", "245 times as slowly"]),
        # against Llama 3.1, whose own factor 8 is in both
        (LLAMA3_1, replace(LLAMA3_1, theta=8e6), ["15.3 times, llama3 8 times", "15.3 times as slowly"]),
        (LLAMA2, RopeArgs(5e5, LinearScaling(4.0)), ["47 times, linear 4 times"]),
        (LLAMA2, RopeArgs(1e6, NTKScaling(4.0)), ["ntk 4 times", "set rope.theta = 10000, or"]),
        (LLAMA2, RopeArgs(1e5, NTKScaling(4.0)), None),  # 38.6 times for rows that are 32 times as long
        # the base is the weights' own, whatever the architecture has
        (trained(8e6, 64 * K), RopeArgs(8e6, YarnScaling(2.0, 64 * K)), None),
        # 4 times each for rows that are 16 times as long
        (LLAMA3, RopeArgs(ntk(5e5, 4), YarnScaling(4.0, 8 * K)), None),
        (
            trained(5e5, 32 * K),
            RopeArgs(ntk(5e5, 16), YarnScaling(4.0, 32 * K)),
            ["16 times, yarn 4 times"],
        ),  # 64 for 4
        (trained(5e5, None), RopeArgs(ntk(5e5, 2), YarnScaling(2.0, 8 * K)), ["own RoPE. If only"]),
        (LLAMA3, RopeArgs(8e6), None),
        (LLAMA3, RopeArgs(5e5, YarnScaling(16.0, 8 * K)), None),
        (LLAMA2, RopeArgs(1e4, HarpeScaling((1e6, 5e6))), None),
        (LLAMA3_1, LLAMA3_1, None),
    ],
    ids=str,
)
def test_two_rescalings_that_multiply_are_said(model: RopeArgs, new: RopeArgs, said: list[str] | None):
    text = piled_up(model, new, 128, 128 * K)
    assert (text is None) == (said is None)
    assert all(words in (text or "") for words in said or [])


def test_a_changed_attention_factor_is_said():
    yarn16, yarn32 = (RopeArgs(1e4, YarnScaling(f, 4 * K)) for f in (16.0, 32.0))
    assert "1.277, and were by 1: attention's logits become 1.63" in (changed_magnitude(LLAMA2, yarn16) or "")
    assert "1.347, and were by 1.277" in (changed_magnitude(yarn16, yarn32) or "")
    assert "1, and were by 1.277" in (changed_magnitude(yarn16, RopeArgs(1e4, LinearScaling(16.0))) or "")
    assert changed_magnitude(LLAMA2, RopeArgs(5e5)) is None


@pytest.mark.parametrize(
    ("flavor", "reach", "table", "expected"),
    [
        (
            "llama3_8b",
            128 * K,
            Rope(),
            ['theta = "auto" (which is 8.35994e+06)', 'type = "yarn", factor = 16, original_max'],
        ),
        (
            "llama3_8b",
            128 * K,
            Rope(theta=1e6),
            ['theta = "auto"', "factor = 16, original_max_position_embeddings = 8192"],
        ),
        ("qwen2.5_7b", 256 * K, Rope(), ['theta = "auto"', "factor = 8, original_max_position_embeddings = 32768"]),
        ("llama3.1_8b", 1024 * K, Rope(), ['theta = "auto"', 'type = "llama3", factor = 128']),
        ("olmo3_7b", 64 * K, Rope(), ['theta = "auto"', 'layers = "full_attention"']),
        ("llama2_7b", 16 * K, Rope(type="linear", factor=2.0), ["rope.factor = 4"]),
        (
            "llama3_8b",
            32 * K,
            Rope(type="yarn", factor=2.0, original_max_position_embeddings=8 * K),
            ["rope.factor = 4"],
        ),
        # with an original length that leaves pairs alone no factor would do
        (
            "llama3_8b",
            128 * K,
            Rope(type="yarn", factor=16.0, original_max_position_embeddings=64 * K),
            ['type = "yarn", original_max_position_embeddings = 8192'],
        ),
        ("llama2_7b", 30_000, Rope(type="ntk", factor=2.0), ["rope.factor = 7.33"]),
        (
            "llama2_7b",
            16 * K,
            Rope(type="gene", factor=2.0, original_max_position_embeddings=4 * K),
            ["rope.factor = 4"],
        ),
    ],
)
def test_the_ways_out_work(flavor: str, reach: int, table: Rope, expected: list[str]):
    """Each is what the arithmetic gives (theta: the NTK-aware rule), and nothing is refused with it."""
    args = FLAVORS[flavor]
    windows = (None,) if args.sliding_window is None else (None, args.sliding_window)

    def build(changed: Rope) -> RopeArgs:
        return build_rope(changed, args.rope, args.head_dim, args.n_kv_heads, reach, args.rope)

    found = ways_out(table, build, args.rope, args.head_dim, reach, windows)
    assert len(found) == len(expected) and all(words in text for words, text in zip(expected, found)), found
    if table == Rope():
        rope = build(Rope(theta="auto"))
        growth = reach / (args.rope.max_position_embeddings or 0)
        assert rope.theta == pytest.approx(ntk(args.rope.theta, growth))
        assert beyond_trained(args.rope, rope, 128, reach, windows) is None


def test_a_way_out_keeps_the_base_of_the_weights():
    """After theta 8e6, YaRN's table without it: the factor alone would have to be absurd."""
    old, table = trained(8e6, 64 * K), Rope(type="yarn", factor=2.0, original_max_position_embeddings=64 * K)

    def build(changed: Rope) -> RopeArgs:
        return build_rope(changed, LLAMA3, 128, 8, 128 * K, old)

    assert ways_out(table, build, old, 128, 128 * K, (None,)) == ["rope.factor = 2, theta = 8e+06"]
    assert ways_out(replace(table, type="gene"), build, old, 128, 128 * K, (None,)) == [
        "rope.factor = 2, theta = 8e+06"
    ]


def test_a_way_out_leaves_layers_with_a_window_as_they_are():
    """Olmo 3 with YaRN in its full-attention layers: the same with a larger factor."""
    old = RopeArgs(5e5, YarnScaling(8.0, 8 * K), "full_attention", 64 * K)
    found = ways_out(
        Rope(), lambda table: build_rope(table, old, 128, 8, 128 * K, old), old, 128, 128 * K, (None, 4096)
    )
    assert found[-1].startswith('rope.type = "yarn", factor = 16, ') and 'layers = "full_attention"' in found[-1]


def test_a_factor_against_less_than_unscaled_weights_know_is_said():
    """As from a config.json that a stage with a raised base was exported to: 64 times 8K for 8 times the length."""
    weights = trained(8e6, 64 * K)
    said = counts_from_less(weights, RopeArgs(8e6, YarnScaling(64.0, 8 * K)))
    assert said and "embeddings = 8,192, but the weights know 65,536 tokens with theta 8e+06 alone" in said
    assert counts_from_less(weights, RopeArgs(8e6, YarnScaling(8.0, 64 * K))) is None
    assert counts_from_less(weights, RopeArgs(8e6, LinearScaling(8.0))) is None
    assert counts_from_less(LLAMA3_1, RopeArgs(5e5, YarnScaling(64.0, 8 * K))) is None  # its own llama3 counts from 8K
    assert counts_from_less(weights, RopeArgs(5e5, YarnScaling(64.0, 8 * K))) is None  # its base is gone
    assert counts_from_less(trained(8e6, None), RopeArgs(8e6, YarnScaling(64.0, 8 * K))) is None
