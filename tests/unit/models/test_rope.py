"""RoPE: precision at long positions, relativity, the rotation itself."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import dataclass, field, replace
from decimal import Decimal, getcontext
from typing import Any, get_args, get_type_hints

import pytest
import torch

from torchtitan.attention.segments import Segments
from torchtitan.config.schema import JobConfig, Rope
from torchtitan.models import rope_scaling
from torchtitan.models.architecture import as_json, rope_from_manifest
from torchtitan.models.hf.config_out import config_json, rope_to_hf
from torchtitan.models.hf.rope_in import rope_from_hf
from torchtitan.models.registry import FLAVORS
from torchtitan.models.rope import (
    RopeArgs,
    apply_rope,
    drawn_rope,
    inverse_frequencies,
    longest_wavelength,
    rope_for,
    rope_tables,
)
from torchtitan.models.rope_change import lost_rope
from torchtitan.models.rope_checks import check_rope
from torchtitan.models.rope_config import build_rope, rope_warnings, smallest_theta
from torchtitan.models.rope_method import Scaling, ntk_theta, plain_frequencies
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
from torchtitan.models.transformer import Transformer, init_weights
from torchtitan.tools.errors import UserError


def test_frequencies_are_the_definition():
    freqs = inverse_frequencies(RopeArgs(500000.0), 128)
    assert freqs.dtype == torch.float64
    assert freqs[5].item() == pytest.approx(500000.0 ** (-10 / 128), rel=1e-15)


def test_tables_are_right_at_four_million_tokens():
    """float32 angles would be off by 0.25 rad here; ours are exact to float32's last digits."""
    getcontext().prec = 50
    positions = torch.tensor([0, 1, 65535, 2**22 + 1, 2**24 + 3])
    rope, head_dim = RopeArgs(500000.0), 64
    cos, sin = rope_tables(rope, head_dim, positions)
    assert cos.dtype == sin.dtype == torch.float32
    two_pi = 2 * Decimal("3.14159265358979323846264338327950288419716939937510")
    for i, position in enumerate(positions.tolist()):
        for j in range(head_dim // 2):
            frequency = (Decimal(500000).ln() * Decimal(-2 * j) / Decimal(head_dim)).exp()
            angle = float((Decimal(position) * frequency) % two_pi)
            assert cos[i, 0, j].item() == pytest.approx(math.cos(angle), abs=1e-6)
            assert sin[i, 0, j].item() == pytest.approx(math.sin(angle), abs=1e-6)


@pytest.mark.parametrize("scaling", [None, Llama3Scaling(8.0, 1.0, 4.0, 64)])
def test_only_distances_matter(scaling: Llama3Scaling | None):
    """q at m times k at n depends on m - n alone, also a million tokens further on."""
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 2, 32, generator=generator) for _ in range(2))

    def product(m: int, n: int) -> torch.Tensor:
        tables = [rope_tables(RopeArgs(10000.0, scaling), 32, torch.tensor([p])) for p in (m, n)]
        return (apply_rope(q, tables[0]) * apply_rope(k, tables[1])).sum(-1)

    near = product(50, 20)
    assert not torch.allclose(near, product(50, 21), atol=1e-3)
    for shift in (1, 1000, 1_000_000):
        assert torch.allclose(near, product(50 + shift, 20 + shift), atol=1e-5)


def test_rotation_keeps_norms_and_is_done_in_float32():
    x = torch.randn(10, 3, 64, dtype=torch.bfloat16)
    tables = rope_tables(RopeArgs(), 64, torch.arange(10))
    y = apply_rope(x, tables)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, apply_rope(x.float(), tables).bfloat16())
    rotated = apply_rope(x.float(), tables)
    assert torch.allclose(rotated.norm(dim=-1), x.float().norm(dim=-1), rtol=1e-5)
    assert torch.equal(rotated[0], x[0].float()), "position 0 is not rotated"


def transformers_rope(parameters: dict, head_dim: int, length: int, seq_len: int | None = None):
    """(inverse frequencies, attention factor) of transformers' own init function."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = LlamaConfig(
        hidden_size=4 * head_dim,
        num_attention_heads=4,
        head_dim=head_dim,
        max_position_embeddings=length,
        rope_parameters=dict(parameters),
    )
    return ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, "cpu", seq_len=seq_len)


@pytest.mark.parametrize(
    "scaling",
    [
        LinearScaling(8.0),
        Llama3Scaling(8.0, 1.0, 4.0, 8192),
        Llama3Scaling(128.0, 1.0, 32.0, 4096),
        YarnScaling(16.0, 4096),
        YarnScaling(8.0, 8192, beta_fast=4.0),
        YarnScaling(8.0, 8192, truncate=False),
        YarnScaling(4.0, 32768, attention_factor=1.25),
        YarnScaling(40.0, 4096, mscale=1.0, mscale_all_dim=0.7),
    ],
    ids=str,
)
def test_frequencies_are_those_of_transformers(scaling: Scaling):
    """To the last bit when computed in float32, as transformers does; in float64 they differ by its rounding only."""
    for head_dim in (64, 96, 128):
        for theta in (1e4, 5e5, 1.28e8):
            parameters = scaling.hf(theta, head_dim)
            if isinstance(scaling, YarnScaling) and scaling.mscale:
                parameters |= {"mscale": scaling.mscale, "mscale_all_dim": scaling.mscale_all_dim}
                del parameters["attention_factor"]  # transformers' rule, not what we computed
            expected, factor = transformers_rope(parameters, head_dim, 131072)
            assert torch.equal(scaling.frequencies(theta, head_dim, torch.float32), expected)
            assert scaling.magnitude() == pytest.approx(factor, rel=1e-15)
            exact = scaling.frequencies(theta, head_dim)
            assert torch.allclose(exact, expected.double(), rtol=1e-5, atol=0)


def test_longrope_and_dynamic_are_those_of_transformers():
    generator = torch.Generator().manual_seed(0)
    short, long = (tuple((1 + 8 * torch.rand(48, generator=generator)).tolist()) for _ in range(2))
    scaling = LongRopeScaling(8192, long, short, factor=16.0)
    parameters = scaling.hf(5e5, 96)
    del parameters["attention_factor"]
    for row, seq_len in enumerate((8192, 8193)):
        expected, factor = transformers_rope(parameters, 96, 131072, seq_len)
        assert torch.equal(scaling.frequencies(5e5, 96, torch.float32)[row], expected)
        assert scaling.magnitude() == pytest.approx(factor, rel=1e-15)
    for seq_len in (100, 8192, 20000, 81920):
        dynamic = DynamicNTKScaling(10.0, 8192, seq_len)
        parameters = {"rope_type": "dynamic", "rope_theta": 5e5, "factor": 10.0}
        expected, _ = transformers_rope(parameters, 128, 8192, seq_len)
        assert torch.equal(dynamic.frequencies(5e5, 128, torch.float32), expected)


def test_printed_numbers_of_the_papers():
    """recipes.md 1 and 1.1: what LongRecipe, ProLong's discussion and YaRN's code print."""
    assert ntk_theta(5e5, 8, 128) == pytest.approx(4.134e6, rel=1e-3)
    assert ntk_theta(5e5, 64, 128) == pytest.approx(3.418e7, rel=1e-3)
    for (factor, original, length, theta), expected in {
        (10.0, 8192, 81920, 5e5): 4.8877e7,
        (16.0, 8192, 131072, 5e5): 1.31461e8,
        (4.0, 32768, 131072, 1e6): 1.35402e7,
    }.items():
        assert DynamicNTKScaling(factor, original, length).theta(theta, 128) == pytest.approx(expected, rel=1e-5)
    assert YarnScaling(16.0, 4096).ramp(1e4, 128) == (20, 46)
    assert YarnScaling(16.0, 8192).ramp(5e5, 128) == (18, 35)
    assert YarnScaling(16.0, 8192, beta_fast=4.0).ramp(5e5, 128) == (28, 35)
    factors = {2: 1.069315, 4: 1.138629, 8: 1.207944, 16: 1.277259, 32: 1.346574, 128: 1.485203, 512: 1.623832}
    for factor, expected in factors.items():
        assert YarnScaling(float(factor), 4096).magnitude() == pytest.approx(expected, abs=1e-6)
    assert LongRopeScaling(8192, (), (), factor=16.0).magnitude() == pytest.approx(1.143544, abs=1e-6)
    # UltraLong's alpha 1, beta 4 in its two readings (recipes.md 1.2), s = 128
    plain = inverse_frequencies(RopeArgs(5e5), 128)
    by_index = YarnScaling(128.0, 8192, beta_fast=4.0).frequencies(5e5, 128) / plain
    by_rotation = Llama3Scaling(128.0, 1.0, 4.0, 8192).frequencies(5e5, 128) / plain
    for pair, rotation, index in ((29, 0.805, 0.858), (31, 0.426, 0.575), (33, 0.174, 0.291)):
        assert by_rotation[pair].item() == pytest.approx(rotation, abs=1e-3)
        assert by_index[pair].item() == pytest.approx(index, abs=1e-3)
    assert torch.allclose(by_rotation[:29], by_index[:29]) and torch.allclose(by_rotation[35:], by_index[35:])


def test_closed_forms():
    """Methods without an independent implementation, from their definitions."""
    plain = inverse_frequencies(RopeArgs(1e4), 128)
    assert torch.allclose(LinearScaling(4.0).frequencies(1e4, 128) * 4, plain, rtol=1e-15)
    ntk = NTKScaling(4.0).frequencies(1e4, 128)
    assert ntk[0] == plain[0] and ntk[-1].item() == pytest.approx(plain[-1].item() / 4, rel=1e-12)
    # NTK-by-parts, written with its own gamma (arXiv 2309.00071)
    turns = 4096 * plain / (2 * math.pi)
    gamma = ((turns - 1) / (32 - 1)).clamp(0, 1)
    expected = (1 - gamma) * plain / 16 + gamma * plain
    table = Rope(type="ntk_by_parts", factor=16.0, original_max_position_embeddings=4096)
    ours = inverse_frequencies(build_rope(table, RopeArgs(1e4), 128, 8, 65536), 128)
    assert torch.allclose(ours, expected, rtol=1e-12)
    # GeNE on Llama-2: the first pair with fewer than 3 turns in 4096 is 38; r^w_j with w_j = j / 38 up to there
    gene = plain / GeneScaling(16.0, 4096).frequencies(1e4, 128)
    weights = torch.tensor([min(j / 38, 1.0) for j in range(64)], dtype=torch.float64)
    assert torch.allclose(gene, 16.0**weights, rtol=1e-12)
    bases = (1e6, 2e6, 5e6)
    for head, base in enumerate(bases):
        assert torch.equal(HarpeScaling(bases).frequencies(1.0, 64)[head], inverse_frequencies(RopeArgs(base), 64))


def test_gene_draws_as_its_code_does():
    scaling = GeneScaling(16.0, 4096)
    assert scaling.choices(16384) == ([4, 8, 12, 16], [0.25] * 4)
    factors, probabilities = scaling.choices(4096)
    assert factors == list(range(1, 17)) and sum(probabilities) == pytest.approx(1)
    assert probabilities[0] == probabilities[-1] == 0.25 and probabilities[1] == pytest.approx(0.5 / 14)
    drawn = [scaling.drawn(16384, 0, step, i).factor for step in range(100) for i in range(2)]
    assert set(drawn) == {4.0, 8.0, 12.0, 16.0}
    assert drawn == [scaling.drawn(16384, 0, step, i).factor for step in range(100) for i in range(2)]
    assert drawn != [scaling.drawn(16384, 1, step, i).factor for step in range(100) for i in range(2)]


def test_heads_have_their_own_base():
    """HARPE: each query head turns with its key-value head's base; a rank with half of the heads has its half."""
    rope = RopeArgs(1e4, HarpeScaling((1e4, 1e6)))
    positions = torch.arange(50)
    x = torch.randn(50, 4, 32)  # two query heads to a key-value head
    rotated = apply_rope(x, rope_tables(rope, 32, positions))
    for head in range(4):
        alone = apply_rope(x[:, head : head + 1], rope_tables(RopeArgs((1e4, 1e6)[head // 2]), 32, positions))
        assert torch.equal(rotated[:, head : head + 1], alone)
    assert torch.equal(rotated[:, 2:], apply_rope(x[:, 2:], rope_tables(rope, 32, positions, heads=slice(1, 2))))


def test_each_token_uses_its_own_longrope_table():
    short, long = (1.0,) * 16, tuple(1.0 + j for j in range(16))
    rope = RopeArgs(1e4, LongRopeScaling(64, long, short, attention_factor=1.0))
    positions, is_long = torch.arange(40), torch.arange(40) % 3 == 0
    mixed = rope_tables(rope, 32, positions, is_long).cos
    all_long = rope_tables(rope, 32, positions).cos
    plain = rope_tables(RopeArgs(1e4), 32, positions).cos
    assert torch.equal(mixed[is_long], all_long[is_long]) and torch.equal(mixed[~is_long], plain[~is_long])
    assert not torch.equal(all_long, plain)


def test_theta_auto_follows_the_length():
    before = RopeArgs(1e5, max_position_embeddings=8192)
    rope = build_rope(Rope(theta="auto"), RopeArgs(1e4, max_position_embeddings=2048), 64, 3, 65536, before)
    assert rope.theta == pytest.approx(1e5 * 8 ** (64 / 62)) and rope.max_position_embeddings == 65536
    assert build_rope(Rope(theta="auto"), before, 64, 3, 4096).theta == 1e5, "a shorter stage keeps its base"
    with pytest.raises(UserError, match='rope.theta = "auto"'):
        build_rope(Rope(theta="auto"), RopeArgs(1e4), 64, 3, 65536)


def test_a_base_too_small_for_the_length_is_warned_of():
    assert rope_warnings(RopeArgs(1e4), 64, 40000) == []
    [warning] = rope_warnings(RopeArgs(1e4), 64, 60000)
    assert "47,1" in warning and "60,000" in warning  # 2 pi 1e4^(62/64) = 47,116
    enough = smallest_theta(60000, 64)
    assert rope_warnings(RopeArgs(enough * 1.001), 64, 60000) == []
    assert len(rope_warnings(RopeArgs(enough * 0.999), 64, 60000)) == 1


@pytest.mark.parametrize(
    ("table", "named"),
    [
        (Rope(type="longrope", original_max_position_embeddings=64, long_factor=(1.0, 2.0)), "rope.long_factor has 2"),
        (
            Rope(type="longrope", original_max_position_embeddings=64, long_factor=(1.0,) * 32, short_factor=(1.0,)),
            "rope.short_factor has 1",
        ),
        (Rope(type="harpe", bases=(1e4,)), "rope.bases has 1 numbers, but the model has 3"),
    ],
)
def test_lists_of_the_wrong_length_are_refused(table: Rope, named: str):
    with pytest.raises(UserError, match=named):
        build_rope(table, RopeArgs(), 64, 3, 128)


@pytest.mark.parametrize(
    "scaling",
    [
        None,
        LinearScaling(8.0),
        Llama3Scaling(8.0, 1.0, 4.0, 8192),
        YarnScaling(16.0, 4096, 24.0, 2.0, False, 1.5),
        LongRopeScaling(4096, (2.0,) * 32, (1.0,) * 32, 1.0, 16.0),
        DynamicNTKScaling(4.0, 4096),
        YarnScaling(4.0, 4096, attention_factor=1.1),  # trained beyond what its factor covers
    ],
    ids=str,
)
def test_hugging_faces_form_reads_back(scaling: Scaling | None):
    """With the length that it was trained for, also if max_position_embeddings must be another number."""
    rope = RopeArgs(5e5, scaling, max_position_embeddings=65536)
    config = config_json(replace(FLAVORS["smollm2_135m"], rope=rope), "float32", {})
    legacy = {k: v for k, v in config.items() if k != "rope_parameters"}
    modern = {k: v for k, v in config.items() if k not in ("rope_scaling", "rope_theta")}
    for keys in (config, legacy, modern):
        again = rope_from_hf(keys, "x")
        assert again == rope
        assert torch.equal(inverse_frequencies(again, 64), inverse_frequencies(rope, 64))


def test_harpe_has_no_hugging_face_form():
    with pytest.raises(UserError, match="harpe"):
        rope_to_hf(RopeArgs(1e4, HarpeScaling((1e4, 1e6)), max_position_embeddings=64), 64)


def test_rows_of_one_batch_use_their_own_longrope_table():
    """LongRoPE2's mixed windows, by logits: a short row as the unscaled model has it, a long one as the rescaled."""
    scaling = LongRopeScaling(64, tuple(1.0 + j for j in range(32)), (1.0,) * 32, attention_factor=1.0)
    args = replace(FLAVORS["debugmodel"], n_layers=2, vocab_size=64)
    model = Transformer(replace(args, rope=RopeArgs(1e4, scaling)))
    init_weights(model, seed=0)
    tokens = torch.randint(0, 64, (200,), generator=torch.Generator().manual_seed(0))
    positions = torch.cat([torch.arange(60), torch.arange(140)])
    with torch.no_grad():
        mixed = model(tokens, positions, Segments.whole((0, 60, 200)), torch.arange(200) >= 60)
        short = model(tokens[:60], positions[:60], Segments.whole((0, 60)), rope=RopeArgs(1e4))
        long = model(tokens[60:], positions[60:], Segments.whole((0, 140)), rope=RopeArgs(1e4, scaling))
        wrong = model(tokens[:60], positions[:60], Segments.whole((0, 60)))
    assert torch.allclose(mixed, torch.cat([short, long]), atol=1e-5)
    assert not torch.allclose(mixed[:60], wrong, atol=1e-2), "the tables do not differ enough to tell"


def test_olmos_sliding_layers_are_not_rescaled_by_oversight():
    table = Rope(type="yarn", factor=8.0, original_max_position_embeddings=8192)
    with pytest.raises(UserError, match='set rope.layers = "full_attention"'):
        build_rope(table, FLAVORS["olmo3_7b"].rope, 128, 32, 65536)
    built = build_rope(replace(table, layers="full_attention"), FLAVORS["olmo3_7b"].rope, 128, 32, 65536)
    assert built.layers == "full_attention"


def test_the_length_that_a_model_covers():
    """What is exported as max_position_embeddings: not less than in the previous stage, and all of GeNE's factor."""
    model, before = RopeArgs(1e4, max_position_embeddings=4096), RopeArgs(1e6, max_position_embeddings=524288)
    assert build_rope(Rope(), model, 64, 3, 65536).max_position_embeddings == 65536
    assert build_rope(Rope(theta=1e6), model, 64, 3, 65536, before).max_position_embeddings == 524288
    gene = Rope(type="gene", factor=16.0, original_max_position_embeddings=4096)
    assert build_rope(gene, model, 64, 3, 16384).max_position_embeddings == 65536


LONG16, LONG2 = (LongRopeScaling(8192, (c,) * 64, (1.0,) * 64) for c in (16.0, 2.0))


@pytest.mark.parametrize(
    ("old", "new", "lost"),
    [
        (RopeArgs(5e5), RopeArgs(8e6), False),
        (RopeArgs(8e6), RopeArgs(5e5), True),
        (RopeArgs(5e5), RopeArgs(5e5, YarnScaling(16.0, 8192)), False),
        (RopeArgs(5e5, YarnScaling(16.0, 8192)), RopeArgs(5e5, YarnScaling(32.0, 8192)), False),
        (RopeArgs(5e5, YarnScaling(16.0, 8192)), RopeArgs(5e5, YarnScaling(8.0, 8192)), True),
        (RopeArgs(1e4, YarnScaling(4.0, 8192)), RopeArgs(10001.0), True),
        (RopeArgs(5e5, YarnScaling(16.0, 8192)), RopeArgs(5e5, LinearScaling(2.0)), True),
        (RopeArgs(5e5, YarnScaling(4.0, 8192)), RopeArgs(5e5, YarnScaling(4.0, 32768)), True),  # compounded
        (RopeArgs(5e5, NTKScaling(8.0)), RopeArgs(ntk_theta(5e5, 2.0, 128)), True),
        (RopeArgs(5e5, LONG16), RopeArgs(5e5, LONG2), True),
        (RopeArgs(5e5, HarpeScaling((1e6, 5e6))), RopeArgs(5e6), False),
        (RopeArgs(5e5, HarpeScaling((1e6, 5e6))), RopeArgs(5e5, HarpeScaling((1e4, 5e6))), True),
        (RopeArgs(5e5, Llama3Scaling(8.0, 1.0, 4.0, 8192)), RopeArgs(5e5), True),
        (RopeArgs(5e5, Llama3Scaling(8.0, 1.0, 4.0, 8192)), RopeArgs(5e5, Llama3Scaling(128.0, 1.0, 4.0, 8192)), False),
        (RopeArgs(1e4, GeneScaling(16.0, 4096)), RopeArgs(1e4), True),
    ],
    ids=str,
)
def test_what_a_stage_may_not_take_back(old: RopeArgs, new: RopeArgs, lost: bool):
    """Decided by what the model sees, whatever the methods are called."""
    assert (lost_rope(old, new, 128) is not None) == lost


def test_auto_goes_on_from_what_ntk_made_of_theta():
    before = RopeArgs(5e5, NTKScaling(8.0), max_position_embeddings=65536)
    rope = build_rope(Rope(theta="auto", type="none"), RopeArgs(5e5), 128, 8, 131072, before)
    assert rope.theta == pytest.approx(ntk_theta(5e5, 16.0, 128)) and lost_rope(before, rope, 128) is None


def test_dynamic_ntk_keeps_its_base_once_it_has_one():
    dynamic = Rope(type="dynamic", factor=10.0, original_max_position_embeddings=8192)
    long = build_rope(dynamic, RopeArgs(5e5), 128, 8, 131072)
    later = build_rope(dynamic, RopeArgs(5e5), 128, 8, 65536, long)  # a stage with shorter rows
    assert later.scaling == long.scaling
    assert build_rope(Rope(), long, 128, 8, 1024).scaling == long.scaling
    assert rope_for(long, 1024) == long, "evaluation reads it as it was trained, and as it is exported"


def test_a_factor_too_small_for_the_length_is_warned_of():
    yarn = RopeArgs(5e5, YarnScaling(4.0, 8192))
    assert rope_warnings(yarn, 128, 32768) == []
    assert "covers 32,768" in rope_warnings(yarn, 128, 131072)[0]


def test_all_missing_keys_are_named_at_once():
    both = "needs rope.factor and rope.original_max_position_embeddings, which are not set"
    with pytest.raises(UserError, match=both):
        check_rope(JobConfig(rope=Rope(type="yarn")))
    with pytest.raises(UserError, match="needs rope.original_max_position_embeddings, which is not set"):
        check_rope(JobConfig(rope=Rope(type="yarn", factor=2.0)))


@dataclass(frozen=True)
class HalvedScaling(Scaling):
    """A method that nobody has: every frequency is divided by factor and by 2."""

    factor: float
    truncate: bool = True
    rope_type: str = field(default="halved", init=False)
    in_hf = True

    def frequencies(self, theta: float, head_dim: int, dtype: Any = None) -> torch.Tensor:
        return plain_frequencies(theta, head_dim, dtype) / (2 * self.factor)


def test_a_method_is_its_class_and_its_keys(monkeypatch: pytest.MonkeyPatch):
    """Keys, checks, frequencies, manifest and config.json follow from the class; the schema names its type."""
    monkeypatch.setattr(rope_scaling, "HalvedScaling", HalvedScaling, raising=False)
    table = Rope(type="halved", factor=3.0, truncate=False)  # type: ignore[arg-type]
    check_rope(JobConfig(rope=table))
    with pytest.raises(UserError, match="needs rope.factor"):
        check_rope(JobConfig(rope=replace(table, factor=None)))
    with pytest.raises(UserError, match="rope.beta_fast = 4.0 is read by rope.type = ntk_by_parts, yarn only"):
        check_rope(JobConfig(rope=replace(table, beta_fast=4.0)))
    rope = build_rope(table, RopeArgs(1e4), 64, 3, 8192)
    assert rope.scaling == HalvedScaling(3.0, False)
    positions = torch.tensor([0, 7, 100])
    expected = positions.double()[:, None] * inverse_frequencies(RopeArgs(1e4), 64) / 6
    assert torch.allclose(rope_tables(rope, 64, positions).cos[:, 0], expected.cos().float(), atol=1e-7)
    assert rope_from_manifest(json.loads(json.dumps(as_json(rope)))) == rope
    config = config_json(replace(FLAVORS["smollm2_135m"], rope=rope), "float32", {})
    form = {"rope_type": "halved", "rope_theta": 1e4, "factor": 3.0, "truncate": False}
    assert config["rope_parameters"] == form and rope_from_hf(config, "x") == rope
    assert rope_for(rope, 100) == rope and drawn_rope(rope, 8192, 0, 1, 2) is None
    assert longest_wavelength(rope, 64) == pytest.approx(6 * longest_wavelength(RopeArgs(1e4), 64))


@pytest.mark.parametrize("changed", ["frequencies", "magnitude", "of_tokens", "at_length", "drawn"])
def test_a_method_without_a_form_in_config_json_is_not_exported_as_another(changed: str):
    scaling = type("Nameless", (Scaling,), {"rope_type": "halved", changed: lambda *_: None})()
    with pytest.raises(UserError, match="no form in config.json.*in_hf in Nameless"):
        scaling.hf(1e4, 64)


def test_every_rope_type_of_the_schema_has_a_method():
    types = get_args(get_type_hints(Rope)["type"])
    assert set(types) == {"model", "none"} | {kind for method in rope_scaling.methods() for kind in method.toml()}


def test_rope_is_checked_without_pytorch():
    code = (
        "import sys; from torchtitan.config import JobConfig; from torchtitan.models.rope_checks import check_rope; "
        "check_rope(JobConfig()); assert not {'torch', 'numpy'} & set(sys.modules), sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
