"""Every RoPE of every model_type is read from its config.json as we computed it; and what servers read otherwise."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from tests.unit.extensions.convert.models import ARCHITECTURES, LLAMA, ORIGINAL, SCALINGS, TRAINED, with_rope
from torchtitan.extensions.convert.servers import LIMITS, notes_on_answers, serving_notes
from torchtitan.models.hf.config_in import read_config
from torchtitan.models.hf.config_out import config_json, left_out
from torchtitan.models.rope import rope_for, rope_tables
from torchtitan.models.rope_method import Scaling
from torchtitan.models.rope_scaling import DynamicNTKScaling, LongRopeScaling, YarnScaling
from torchtitan.models.transformer import TransformerArgs
from torchtitan.tools.errors import UserError

DOCS = Path(__file__).parents[4] / "docs" / "servers.md"
MODELS = ARCHITECTURES | {
    "mistral": LLAMA,
    "wide qwen2": replace(ARCHITECTURES["qwen2"], head_dim=24),
    "wide olmo2": replace(ARCHITECTURES["olmo2"], head_dim=24),
    "olmo3, no window": ARCHITECTURES["olmo2"],
}
ORIGINAL_TYPES = {"mistral": "mistral", "olmo3, no window": "olmo3"}


def written(args: TransformerArgs, folder: Path, original: dict[str, Any] | None = None) -> dict[str, Any]:
    config = config_json(args, "float32", original or {})
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return config


def fitted(scaling: Scaling | None, head_dim: int) -> Scaling | None:
    """With a number for each pair."""
    if not isinstance(scaling, LongRopeScaling):
        return scaling
    pairs = head_dim // 2
    return replace(
        scaling, short_factor=(scaling.short_factor * 2)[:pairs], long_factor=(scaling.long_factor * 2)[:pairs]
    )


@pytest.mark.parametrize("model", MODELS)
def test_transformers_computes_our_angles_from_every_export(
    model: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    """cos and sin of every kind of layer, below and beyond the original length; and it knows every key of the RoPE."""
    without_form = {"ntk", "dynamic"} if model == "olmo3" else set()
    without_form |= {"yarn_options"} if "olmo3" in model else set()
    for name, scaling in SCALINGS.items():
        args = with_rope(fitted(scaling, MODELS[model].head_dim), MODELS[model])
        if name in without_form:
            with pytest.raises(UserError, match="Olmo 3"):
                config_json(args, "float32", {"model_type": ORIGINAL_TYPES.get(model)})
            continue
        written(args, tmp_path, {"model_type": ORIGINAL_TYPES.get(model)})
        caplog.clear()
        rotary = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path)).model.rotary_emb
        said = [record.getMessage() for record in caplog.records if record.name.startswith("transformers")]
        vllms = [text for text in said if "short_mscale" in text]  # transformers does not know those two
        assert len(vllms) == len(said) and all("attention" not in text and "factor'" not in text for text in vllms)
        for n in (ORIGINAL, TRAINED):
            positions = torch.arange(n)
            for kind in getattr(rotary, "layer_types", [None]):
                rope = rope_for(replace(args.rope, scaling=None) if kind == "sliding_attention" else args.rope, n)
                theirs = rotary(torch.zeros(1), positions[None], **({"layer_type": kind} if kind else {}))
                for cos_or_sin, expected in zip(theirs, rope_tables(rope, args.head_dim, positions), strict=True):
                    difference = (cos_or_sin[0, :, : args.head_dim // 2] - expected[:, 0]).abs().max()
                    assert difference < 1e-4, (name, kind, n)


YARN = ((4.0, None), (4.0, 1.0), (16.0, 0.5), (16.0, 1 / (1 + 0.1 * math.log(16))), (1.0, 1.3), (0.5, None))


@pytest.mark.parametrize(("factor", "attention_factor"), YARN)
def test_mscale_says_what_attention_factor_says(factor: float, attention_factor: float | None, tmp_path: Path):
    """By transformers' rule, which needs both to be other than 0, and by mlx-lm's, which does not. 0.5: mscale is
    negative; 1 / (1 + 0.1 ln 16): it is 0."""
    scaling = YarnScaling(factor, ORIGINAL, attention_factor=attention_factor)
    form = written(with_rope(scaling), tmp_path)["rope_parameters"]
    expected = attention_factor if attention_factor is not None else 0.1 * math.log(max(factor, 1)) + 1
    assert form["attention_factor"] == expected
    if factor > 1:
        log = 0.1 * math.log(factor)
        assert (log * form["mscale"] + 1) / (log * form["mscale_all_dim"] + 1) == pytest.approx(expected, abs=1e-14)
        if abs(form["mscale"]) > 1e-9:
            by_mscale = {key: value for key, value in form.items() if key != "attention_factor"}
            config = AutoConfig.for_model("llama", head_dim=16, rope_parameters=by_mscale)
            assert ROPE_INIT_FUNCTIONS["yarn"](config, "cpu")[1] == pytest.approx(expected, abs=1e-14)
    else:
        assert not {"mscale", "mscale_all_dim"} & set(form)  # they can say nothing but 1
    again = read_config(tmp_path)
    assert again.rope.scaling == replace(scaling, attention_factor=expected)
    assert written(again, tmp_path)["rope_parameters"] == form and read_config(tmp_path) == again


def test_old_readers_find_the_rope_under_type(tmp_path: Path):
    for name, scaling in SCALINGS.items():
        config = config_json(with_rope(scaling), "float32", {})
        assert config.get("rope_scaling", {}).get("type") == config.get("rope_scaling", {}).get("rope_type"), name
    # transformers 4.57: Olmo 2's rope_scaling "must be a dictionary with two fields, `type` and `factor`"
    config = written(with_rope(SCALINGS["linear"], ARCHITECTURES["olmo2"]), tmp_path)
    assert config["rope_scaling"] == {"type": "linear", "factor": 4.0}
    assert read_config(tmp_path).rope.scaling == SCALINGS["linear"]


def test_a_window_that_no_layer_has_stays_in_the_file(tmp_path: Path):
    """transformers reads the same as from the original, and Olmo 3 runs: it asks for a number even so."""
    size = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    size |= {"num_key_value_heads": 2, "vocab_size": 128, "head_dim": 16, "max_position_embeddings": TRAINED}
    full = ["full_attention"] * 2
    originals: list[dict[str, Any]] = [
        {"model_type": "olmo3", "sliding_window": 4096, "layer_types": full},
        {"model_type": "olmo3", "layer_types": full},
        {"model_type": "qwen2", "use_sliding_window": False, "sliding_window": 131072, "max_window_layers": 28},
        {"model_type": "qwen3", "use_sliding_window": True, "sliding_window": 50, "max_window_layers": 2},
        {"model_type": "qwen3", "use_sliding_window": False, "sliding_window": None},
        {"model_type": "mistral", "sliding_window": None},
    ]
    for original in originals:
        (tmp_path / "config.json").write_text(json.dumps(size | original))
        before, args = AutoConfig.from_pretrained(tmp_path), read_config(tmp_path)
        config = written(args, tmp_path, original)
        after = AutoConfig.from_pretrained(tmp_path)
        assert read_config(tmp_path) == args
        assert original["model_type"] == "mistral" or after.layer_types == before.layer_types
        if original.get("use_sliding_window"):  # no layer is from the second on: said as not used
            assert (config["sliding_window"], after.use_sliding_window) == (50, False)
        else:
            assert after.sliding_window == before.sliding_window, original
        with torch.no_grad():
            assert AutoModelForCausalLM.from_config(after)(torch.arange(8)[None]).logits.isfinite().all()
    # a Llama and an Olmo 2 have no windows, but vLLM and llama.cpp would make some of the key
    for kind, architecture in (("llama", LLAMA), ("olmo2", ARCHITECTURES["olmo2"])):
        original = {"model_type": kind, "sliding_window": 50, "use_sliding_window": True}
        assert not {"sliding_window", "use_sliding_window"} & set(
            config_json(with_rope(None, architecture), "", original)
        )


def test_keys_that_may_change_what_a_server_computes_are_left_out_and_named():
    original = {
        "model_type": "qwen2",
        "dual_chunk_attention_config": {"chunk_size": 262144},
        "rope_scaling": {"type": "yarn", "factor": 4.0},
        "quantization_config": {"bits": 4},
        "partial_rotary_factor": 0.5,
        "num_nextn_predict_layers": 1,
        "max_sequence_length": 2048,  # vLLM takes the smallest of these for its longest context
        "model_max_length": 2048,
        "n_ctx": 2048,
        "use_dynamic_ntk": True,
        "num_mtp_modules": 1,
        "text_config": {},
        "task_specific_params": {"text-generation": {"max_length": 50}},
        "logit_scale": 0.1,
        "embedding_multiplier": 12,
        "head_dim": None,
        "use_mrope": False,
        "attention_dropout": 0.1,
        "pad_token_id": 5,
        "is_causal": False,  # switched off, it changes what is computed
        "transformers_weights": "model.safetensors",
        "max_window_layers": 28,
        "finetuned_from": "kept",
        "use_cache": False,
    }
    config = config_json(with_rope(None, ARCHITECTURES["qwen2"]), "float32", original)
    kept = {"attention_dropout", "pad_token_id", "max_window_layers", "finetuned_from", "head_dim", "model_type"}
    kept |= {"use_mrope"}
    assert config["use_cache"] is True
    assert set(left_out(original, config)) == set(original) - kept - {
        "rope_scaling",
        "use_cache",
        "transformers_weights",  # of the folder, not of the model
    }
    assert not {"is_causal", "transformers_weights"} & set(config)
    assert all(config[key] == original[key] for key in kept - {"head_dim"})


def of(scaling: str | Scaling | None, model: str = "llama", original: str | None = None, trained: int = TRAINED) -> str:
    """All notes of an export."""
    args = with_rope(SCALINGS[scaling] if isinstance(scaling, str) else scaling, MODELS[model])
    args = replace(args, rope=replace(args.rope, max_position_embeddings=trained))
    return " ".join(serving_notes(config_json(args, "float32", {"model_type": original})))


def test_what_servers_read_otherwise_is_said():
    assert of("none") == of("ntk") == of("ntk_by_parts") == of("yarn") == ""
    assert "vLLM takes LongRoPE's original length as its longest context: serve with --max-model-len 256." in of("gene")
    assert "llama.cpp leaves LongRoPE's lists out" in of("gene") and "short texts" not in of("gene")
    assert "serve short texts with --max-model-len 64." in of("longrope")
    assert "--yarn-beta-fast 8 --yarn-beta-slow 2" in of("yarn_options")
    share = 1 / (1 + 0.1 * math.log(4))
    assert f"--override-kv qwen2.rope.scaling.attn_factor=float:{share:.6g}." in of("yarn_options", "qwen2")
    assert "--override-kv llama.rope" in of("yarn_options", original="mistral")
    for scaling, longest in (("linear", 64), (YarnScaling(2.0, ORIGINAL), 128)):
        said = f"{longest}, and the model was trained for 256: serve with --override-kv llama.context_length=int:256."
        assert said in of(scaling)
    assert "vLLM refuses Qwen with a sliding window" in of("none", "qwen3, windows")
    assert "transformers 4 refuses Olmo 2" in of("yarn", "olmo2")
    assert "leaves the llama3 RoPE out" in of("llama3", "qwen3")
    assert "SGLang" not in of("yarn_options") and "SGLang has no attention factor" in of(
        YarnScaling(1.0, 64, attention_factor=1.3)
    )
    assert "TGI leaves linear scaling out: do not serve the model with it." in of("linear") and "TGI" not in of("gene")
    assert of(DynamicNTKScaling(4.0, ORIGINAL)).startswith("vLLM has no angles beyond max_position_embeddings")
    assert "Every server takes 256 tokens as the longest context, and the model was trained for 200" in of(
        "yarn", trained=200
    )
    beyond = "vLLM has no angles beyond YaRN's factor times the original length, and the model was trained for 300"
    assert f"{beyond}: serve texts of up to 256 tokens only." in of("yarn", trained=300)
    assert "mlx-lm lets each token see all before it" in of("none", "mistral, windows")
    assert "serve texts of up to 50 tokens only." in of("none", "mistral, windows")
    assert "window" not in of("none", "mistral, windows", trained=50)


def test_a_note_that_accounts_for_an_answer_names_options_and_is_for_the_version():
    config = config_json(with_rope(YarnScaling(4.0, ORIGINAL, 8.0, attention_factor=1.0)), "float32", {})
    noted = [options for _, options in notes_on_answers(config, "llama.cpp", "2026.10")]
    relative = f"{1 / (1 + 0.1 * math.log(4)):.6g}"
    assert noted == [
        {"--yarn-beta-fast": "8", "--yarn-beta-slow": "1"},
        {"--override-kv": f"llama.rope.scaling.attn_factor=float:{relative}"},
    ]
    assert len(notes_on_answers(config, "vLLM", "0.25.1")) == 1 and not notes_on_answers(config, "vLLM", "0.32.0")
    longrope = config_json(with_rope(SCALINGS["longrope"]), "float32", {})
    # it says what happens to a generation, not to the answer to one prompt
    assert "transformers" in " ".join(serving_notes(longrope)) and not notes_on_answers(longrope, "transformers", "5")
    olmo2 = config_json(with_rope(SCALINGS["yarn"], ARCHITECTURES["olmo2"]), "float32", {})
    for version, notes in (("4.57.6", 1), ("5.24.0", 0)):
        assert len(notes_on_answers(olmo2, "transformers", version)) == notes
    noted = [options for _, options in notes_on_answers(longrope, "vLLM", "0.32.0")]
    assert noted == [{"--max-model-len": "256"}, {"--max-model-len": "64"}]


def test_every_limit_of_a_server_stands_in_the_documentation():
    page = DOCS.read_text()
    table = page[page.index("## What servers read otherwise") :]
    for limit in LIMITS:
        row = f"| {limit.server} | {limit.what} | {limit.way or 'none'} |"
        assert row in table, f"docs/servers.md lacks the row: {row}"
    assert table[: table.index("## What servers answered")].count("\n| ") == len(LIMITS) + 1
