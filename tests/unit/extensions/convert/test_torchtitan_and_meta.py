"""torchtitan's and Meta's checkpoints: fixtures are written here, by their own layout, from transformers' weights."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from transformers import AutoModelForCausalLM, LlamaConfig

from tests.unit.extensions.convert.models import (
    ARCHITECTURES,
    LLAMA,
    our_logits,
    random_weights,
    some_tokens,
    with_rope,
)
from torchtitan.extensions.convert.torchtitan_and_meta import (
    _check_llama,
    args_from_params,
    open_meta,
    open_torchtitan,
    params_json,
    to_half_split,
    to_interleaved,
    write_meta,
    write_torchtitan,
)
from torchtitan.extensions.convert.weights import Weights
from torchtitan.models.registry import FLAVORS
from torchtitan.models.rope import RopeArgs, apply_rope, inverse_frequencies, rope_tables
from torchtitan.models.rope_scaling import Llama3Scaling, YarnScaling
from torchtitan.tools.errors import UserError

ARGS = with_rope(None)
THEIRS = {
    "q_proj": "attention.wq",
    "k_proj": "attention.wk",
    "v_proj": "attention.wv",
    "o_proj": "attention.wo",
    "gate_proj": "feed_forward.w1",
    "down_proj": "feed_forward.w2",
    "up_proj": "feed_forward.w3",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
}


@pytest.fixture(scope="module")
def reference() -> torch.nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=LLAMA.vocab_size,
        hidden_size=LLAMA.dim,
        intermediate_size=LLAMA.ffn_dim,
        num_hidden_layers=LLAMA.n_layers,
        num_attention_heads=LLAMA.n_heads,
        num_key_value_heads=LLAMA.n_kv_heads,
        rms_norm_eps=LLAMA.norm_eps,
        initializer_range=0.15,
        rope_parameters={"rope_type": "default", "rope_theta": 20000.0},
        tie_word_embeddings=False,
    )
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()


@pytest.fixture(scope="module")
def theirs(reference: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The reference's weights under Meta's and torchtitan's names, neighbouring rows rotating together."""
    result = {}
    for name, tensor in reference.state_dict().items():
        name = name.removeprefix("model.").replace("self_attn.", "").replace("mlp.", "")
        name = name.replace("embed_tokens", "tok_embeddings").replace("lm_head", "output")
        for old, new in THEIRS.items():
            name = name.replace(old, new)
        if name.endswith(("wq.weight", "wk.weight")):
            half = LLAMA.head_dim // 2
            heads = tensor.split(LLAMA.head_dim)
            rows = [head[j + part * half] for head in heads for j in range(half) for part in (0, 1)]
            tensor = torch.stack(rows)
        result[name] = tensor
    return result


def difference(weights: Weights, reference: torch.nn.Module) -> float:
    tokens = some_tokens(100)
    with torch.no_grad():
        expected = reference(tokens[None]).logits[0]
    assert expected.std() > 0.1
    return (our_logits(weights, tokens) - expected).abs().max().item()


def test_the_order_of_rows_is_that_of_complex_numbers():
    """Meta's and torchtitan's rotation as they write it (torch.view_as_complex), against ours on reordered rows."""
    generator = torch.Generator().manual_seed(0)
    wq, wk, x = (torch.randn(n, 20, generator=generator) for n in (3 * 16, 16, 7))
    positions = torch.arange(7)
    turns = torch.polar(torch.tensor(1.0), torch.outer(positions, inverse_frequencies(RopeArgs(), 16)).float())

    def complex_rotated(w: torch.Tensor) -> torch.Tensor:
        pairs = torch.view_as_complex((x @ w.T).view(7, -1, 8, 2))
        return torch.view_as_real(pairs * turns[:, None]).flatten(2)

    def half_rotated(w: torch.Tensor) -> torch.Tensor:
        rows = (x @ to_half_split(w, 16).T).view(7, -1, 16)
        return apply_rope(rows, rope_tables(RopeArgs(), 16, positions))

    expected = torch.einsum("qhd,kod->hqk", complex_rotated(wq), complex_rotated(wk))
    assert torch.allclose(torch.einsum("qhd,kod->hqk", half_rotated(wq), half_rotated(wk)), expected, atol=1e-4)
    assert torch.equal(to_interleaved(to_half_split(wq, 16), 16), wq)


@pytest.mark.parametrize("prefix", ["", "model."])
def test_torchtitan_in(prefix: str, theirs: dict, reference: torch.nn.Module, tmp_path: Path):
    state = {prefix + name: tensor for name, tensor in theirs.items()}
    state |= {prefix + "freqs_cis": torch.zeros(5), "optimizer.state.output.weight.exp_avg": torch.zeros(2)}
    dcp.save(state, checkpoint_id=tmp_path, no_dist=True)
    assert difference(open_torchtitan(tmp_path, ARGS), reference) < 1e-4
    with pytest.raises(UserError, match=r"feed_forward.w1.weight should be \[100, 64\] and is \[96, 64\]"):
        open_torchtitan(tmp_path, replace(ARGS, ffn_dim=100))
    with pytest.raises(UserError, match="qk_norm"):
        open_torchtitan(tmp_path, replace(ARGS, qk_norm=True))


def test_torchtitan_out(theirs: dict, tmp_path: Path):
    dcp.save(theirs, checkpoint_id=tmp_path / "a", no_dist=True)
    write_torchtitan(open_torchtitan(tmp_path / "a", ARGS), tmp_path / "b")
    back = {name: torch.empty_like(tensor) for name, tensor in theirs.items()}
    dcp.load(back, checkpoint_id=tmp_path / "b", no_dist=True)
    assert all(torch.equal(back[name], tensor) for name, tensor in theirs.items())

    tied = random_weights(with_rope(None, ARCHITECTURES["tied"]))
    write_torchtitan(tied, tmp_path / "tied")
    output = {"output.weight": torch.empty(LLAMA.vocab_size, LLAMA.dim)}
    dcp.load(output, checkpoint_id=tmp_path / "tied", no_dist=True)
    assert torch.equal(output["output.weight"], tied.read("tok_embeddings.weight"))
    assert open_torchtitan(tmp_path / "tied", tied.args).shapes == tied.shapes


def save_meta(theirs: dict, folder: Path, shards: int, embedding_dim: int, **params: object) -> None:
    """By Meta's layout: columns of wo and w2, rows of other matrices; norms in every file."""
    for i in range(shards):
        piece = {"rope.freqs": torch.zeros(4)}
        for name, tensor in theirs.items():
            dim = 1 if "wo." in name or "w2." in name else embedding_dim if "tok_emb" in name else 0
            piece[name] = tensor if tensor.ndim == 1 else tensor.chunk(shards, dim)[i].clone()
        torch.save(piece, folder / f"consolidated.{i:02}.pth")
    about = {"dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "norm_eps": 1e-5, "rope_theta": 20000.0}
    (folder / "params.json").write_text(json.dumps(about | params))


@pytest.mark.parametrize(("shards", "embedding_dim"), [(1, 0), (2, 0), (2, 1)], ids=["one", "llama3", "llama2"])
def test_meta_in(shards: int, embedding_dim: int, theirs: dict, reference: torch.nn.Module, tmp_path: Path):
    save_meta(theirs, tmp_path, shards, embedding_dim, vocab_size=-1 if embedding_dim else 128)
    weights = open_meta(tmp_path)
    assert replace(weights.args, rope=ARGS.rope) == ARGS
    assert difference(weights, reference) < 1e-4


def test_meta_out(theirs: dict, tmp_path: Path):
    (tmp_path / "a").mkdir()
    save_meta(theirs, tmp_path / "a", 2, 0, use_scaled_rope=True)
    weights = open_meta(tmp_path / "a")
    assert weights.args.rope.scaling == Llama3Scaling(8.0, 1.0, 4.0, 8192)
    write_meta(weights, tmp_path / "b")
    back = torch.load(tmp_path / "b" / "consolidated.00.pth")
    assert set(back) == set(theirs) and all(torch.equal(back[name], tensor) for name, tensor in theirs.items())
    assert open_meta(tmp_path / "b").args == weights.args
    for rope in (YarnScaling(4.0, 64), Llama3Scaling(16.0, 1.0, 4.0, 8192)):
        with pytest.raises(UserError, match="params.json"):
            write_meta(random_weights(with_rope(rope)), tmp_path / "c")
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("flavor", ["llama2_7b", "llama3_8b", "llama3.1_70b", "llama3.2_1b"])
def test_published_models_are_known_by_their_params(flavor: str):
    """And so have the published length, RoPE and tied embeddings, of which params.json says nothing."""
    args = FLAVORS[flavor]
    params = params_json(args)
    hidden = int(params["ffn_dim_multiplier"] * int(8 * args.dim / 3))  # the rule of Meta's code
    assert params["multiple_of"] * -(-hidden // params["multiple_of"]) == args.ffn_dim
    shapes = {"layers.0.feed_forward.w1.weight": (args.ffn_dim, 0), "tok_embeddings.weight": (args.vocab_size, 0)}
    assert args_from_params(params, shapes) == args


def test_a_window_has_no_form_there():
    """It would be lost without a word: another function beyond its length."""
    with pytest.raises(UserError, match="Meta's format is known for Llama only, and this model has sliding_window"):
        _check_llama(ARCHITECTURES["mistral, windows"], "Meta's")
