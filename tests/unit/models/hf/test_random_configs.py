"""60 random models in transformers and here: the same logits, gradients and, after an export, the same logits again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from tests.unit.models.hf.random_configs import COUNT, Case, random_case
from tests.unit.models.hf.readings import ours
from torchtitan.attention.segments import Segments
from torchtitan.extensions.convert.export import write_hugging_face
from torchtitan.extensions.convert.weights import open_hugging_face
from torchtitan.models.hf.config_in import read_config
from torchtitan.models.hf.weights import hf_name
from torchtitan.models.rope import rope_for
from torchtitan.models.transformer import Transformer
from torchtitan.tools.errors import UserError

CASES = [random_case(number) for number in range(COUNT)]


pytestmark = pytest.mark.usefixtures("one_process")  # load_weights is collective


def write_config(folder: Path, config: dict) -> None:
    (folder / "config.json").write_text(json.dumps(config))


def write_weights(case: Case, folder: Path) -> None:
    """Random weights by transformers' names and shapes for this config.json: one file, or two and their index."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    generator = torch.Generator().manual_seed(case.seed)
    tensors = {}
    for name, parameter in model.named_parameters():
        # small embeddings, beside which an eps shows; norms and biases are not what they are born as
        std = 0.03 if "embed" in name else 0.15 if parameter.ndim == 2 else 0.3
        tensors[name] = torch.randn(parameter.shape, generator=generator) * std + (1.0 if "norm" in name else 0.0)
    if "lm_head.weight" not in tensors and case.seed % 2:  # many published files have the tied matrix twice
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    if case.config["model_type"] == "llama" and case.seed % 4 == 0:  # as Llama's first files
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    if case.seed % 3:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return
    files = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    weight_map = {name: files[i % 2] for i, name in enumerate(tensors)}
    for file in files:
        save_file({n: t for n, t in tensors.items() if weight_map[n] == file}, folder / file, {"format": "pt"})
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def in_transformers(folder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def our_logits(model: Transformer, tokens: torch.Tensor) -> torch.Tensor:
    """As a document of that length is evaluated."""
    n = len(tokens)
    return model(tokens, torch.arange(n), Segments.whole((0, n)), rope=rope_for(model.args.rope, n))


def some_tokens(case: Case, n: int) -> torch.Tensor:
    """Without padding, ids 0 and 1, whose embedding has no gradient in transformers."""
    return torch.randint(2, case.config["vocab_size"], (n,), generator=torch.Generator().manual_seed(n))


@torch.no_grad()
def difference(case: Case, theirs: torch.nn.Module, model: Transformer) -> float:
    """The largest of a logit, below and beyond the original length, in units of the logits' spread."""
    worst = 0.0
    for n in (case.original - 3, 3 * case.original):
        tokens = some_tokens(case, n)
        expected = theirs(tokens[None]).logits[0]
        assert expected.std() > 0.05, "the logits are too flat to tell models apart"
        worst = max(worst, ((our_logits(model, tokens) - expected).abs().max() / max(expected.std(), 1.0)).item())
    return worst


def gradient_difference(case: Case, theirs: torch.nn.Module, model: Transformer) -> float:
    """The largest of a gradient, in units of the largest of its parameter."""
    n = 3 * case.original
    tokens = some_tokens(case, n + 1)
    loss, _ = model(
        tokens[:-1],
        torch.arange(n),
        Segments.whole((0, n)),
        rope=rope_for(model.args.rope, n),
        labels=tokens[1:],
        divisor=float(n),
    )
    loss.backward()
    F.cross_entropy(theirs(tokens[None, :-1]).logits[0], tokens[1:]).backward()
    expected = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    worst = 0.0
    for name, parameter in model.named_parameters():
        gradient = expected.pop(hf_name(name))
        assert gradient is not None and parameter.grad is not None and gradient.abs().max() > 0, name
        worst = max(worst, ((parameter.grad - gradient).abs().max() / gradient.abs().max()).item())
    assert not expected, "parameters that we have not"
    return worst


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_as_transformers(case: Case, tmp_path: Path):
    write_config(tmp_path, case.config)
    write_weights(case, tmp_path)
    theirs = in_transformers(tmp_path)
    write_config(tmp_path, case.spelled)
    model = ours(tmp_path)
    assert difference(case, theirs, model) < 1e-4
    assert gradient_difference(case, theirs, model) < 1e-3
    out = tmp_path / "export"
    write_hugging_face(open_hugging_face(tmp_path), out, tmp_path, shard_bytes=20_000 if case.seed % 2 else 10**9)
    again = in_transformers(out)
    assert difference(case, again, model) < 1e-4, "the export in transformers"
    assert difference(case, theirs, ours(out)) < 1e-4, "the export here"


UNSUPPORTED_TYPES = (
    "gemma",
    "gemma2",
    "gemma3_text",
    "phi3",
    "mixtral",
    "gpt_oss",
    "gpt2",
    "qwen2_moe",
    "qwen3_moe",
    "deepseek_v3",
    "cohere2",
    "granite",
    "smollm3",
    "ministral",
    "glm4",
    "starcoder2",
    "llama4_text",
    "olmo",
)


def refused(folder: Path) -> str:
    with pytest.raises(UserError) as error:
        read_config(folder)
    message = str(error.value)
    assert "\n" not in message and str(folder / "config.json") in message
    return message


@pytest.mark.parametrize("kind", UNSUPPORTED_TYPES)
def test_other_types_are_refused_by_name(kind: str, tmp_path: Path):
    """The config.json that transformers writes for the type's defaults."""
    AutoConfig.for_model(kind).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == kind
    message = refused(tmp_path)
    assert kind in message and "llama" in message, "what was found, and what works"
