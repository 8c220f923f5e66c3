"""What config.json says is read as transformers reads it, or refused with the file, the key and the value."""

import json
import math
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.olmo3.modeling_olmo3 import Olmo3RotaryEmbedding

from tests.distributed import harness
from torchtitan.models.hf.config_in import CLASSES, read_config
from torchtitan.models.hf.config_keys import KEYS, NEEDED, default_of
from torchtitan.models.rope import inverse_frequencies, rope_for
from torchtitan.tools import logging as logs
from torchtitan.tools.errors import UserError

DROP = object()
TINY = {key: value for key, value in harness.TINY.items() if key != "head_dim"} | {"max_position_embeddings": 128}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SHORT, LONG = [1.0 + 0.1 * i for i in range(8)], [1.0 + 2.0 * i for i in range(8)]
LONGROPE = {"rope_type": "longrope", "short_factor": SHORT, "long_factor": LONG}
OLMO3 = {"model_type": "olmo3", "rope_theta": 500000.0, "num_hidden_layers": 4}
LINEAR = {"rope_type": "linear", "factor": 4.0}


def write(folder: Path, **changes: Any) -> Path:
    config = {key: value for key, value in (TINY | changes).items() if value is not DROP}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def warnings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is warned of from here on, as in a process that has not read anything yet."""
    messages: list[str] = []
    monkeypatch.setattr(logs, "_said", set())
    monkeypatch.setattr(logs.logger, "handlers", [])
    monkeypatch.setattr(logs.logger, "warning", messages.append)
    return messages


# ---- the table ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CLASSES)
def test_defaults_are_those_of_transformers_configuration_classes(kind: str):
    theirs = {field.name: field.default for field in fields(CONFIG_MAPPING[kind])}
    theirs["rope_theta"] = CONFIG_MAPPING[kind].default_theta
    compared = {key for key in KEYS if key in theirs and default_of(key, kind) is not NEEDED}
    assert {"rms_norm_eps", "tie_word_embeddings", "max_position_embeddings", "num_key_value_heads"} <= compared
    assert {key: default_of(key, kind) for key in compared} == {key: theirs[key] for key in compared}


def test_the_page_names_every_key():
    page = (Path(__file__).parents[4] / "docs/rope.md").read_text()
    assert not [key for key in KEYS if f"`{key}`" not in page]


@pytest.mark.parametrize("kind", CLASSES)
def test_missing_keys_and_null_have_the_defaults_of_transformers(kind: str, tmp_path: Path):
    """hidden_size, heads and the like are needed; the rest may be missing, and null is the same."""
    rest = {key: DROP for key in TINY if key in KEYS and default_of(key, kind) is not NEEDED}
    args = read_config(write(tmp_path, model_type=kind, num_attention_heads=32, hidden_size=64 * 32, **rest))
    theirs = AutoConfig.from_pretrained(tmp_path)
    rope = theirs.rope_parameters.get("full_attention", theirs.rope_parameters)
    assert args.norm_eps == theirs.rms_norm_eps and args.n_kv_heads == theirs.num_key_value_heads
    assert args.head_dim == getattr(theirs, "head_dim", 64) and args.tied_embeddings == theirs.tie_word_embeddings
    assert args.rope.theta == rope["rope_theta"] and args.rope.scaling is None
    assert args.rope.max_position_embeddings == theirs.max_position_embeddings
    null = dict.fromkeys((*rest, "rms_norm_eps", "head_dim", "rope_scaling", "hidden_act", "layer_types"))
    null.pop("num_key_value_heads")  # null: as many as heads
    write(tmp_path, model_type=kind, num_attention_heads=32, hidden_size=64 * 32, num_key_value_heads=DROP, **null)
    assert read_config(tmp_path) == args
    write(tmp_path, model_type=kind, num_attention_heads=32, hidden_size=64 * 32, **rest, num_hidden_layers=5)
    theirs = AutoConfig.from_pretrained(tmp_path)
    types = getattr(theirs, "layer_types", ["sliding_attention" if kind == "mistral" else "full_attention"] * 5)
    args = read_config(tmp_path)
    assert args.layer_types == (tuple(types) if "sliding_attention" in types else ())
    assert args.sliding_window == (theirs.sliding_window if "sliding_attention" in types else None)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "olmo2", "olmo3"])
def test_null_key_value_heads_are_as_many_as_heads(kind: str, tmp_path: Path):
    assert read_config(write(tmp_path, model_type=kind, num_key_value_heads=None)).n_kv_heads == 4
    assert AutoConfig.from_pretrained(tmp_path).num_key_value_heads == 4


def test_null_window_of_mistral_is_none(tmp_path: Path):
    assert read_config(write(tmp_path, model_type="mistral", sliding_window=None)).layer_types == ()
    assert AutoConfig.from_pretrained(tmp_path).sliding_window is None


def test_text_that_is_a_number_is_the_number(tmp_path: Path):
    """YAML's 1e-05 is a text; numbers of another type are read if they say the same."""
    scaling = YARN | {"attention_factor": 1.5}
    expected = read_config(write(tmp_path, rope_scaling=scaling, rms_norm_eps=1e-5))
    as_text = {key: str(value) for key, value in TINY.items()}
    text = {key: str(value) for key, value in scaling.items()}
    assert read_config(write(tmp_path, **as_text, rope_scaling=text, rms_norm_eps="1e-05")) == expected
    whole = {"hidden_size": 64.0, "vocab_size": "4096.0", "num_hidden_layers": " 2 "}
    assert read_config(write(tmp_path, **whole, rope_scaling=scaling | {"factor": 4}, rms_norm_eps=1e-5)) == expected


BAD = [float("nan"), float("inf"), -1, 0, True, False, "x", "", "nan", "inf", [64], {}, 10**400, "1e999", "-3"]


@pytest.mark.parametrize("key", [key for key, rule in KEYS.items() if rule.type in ("int", "number")])
def test_what_is_no_number_is_refused_with_file_key_and_value(key: str, tmp_path: Path):
    for value in BAD + ([64.5, "64.5"] if KEYS[key].type == "int" else []):
        if value == 0 and key == "max_window_layers" and value is not False:
            continue
        write(tmp_path, **{key: value})
        with pytest.raises(UserError) as error:
            read_config(tmp_path)
        shown = json.dumps(value)[:60]
        assert f"{tmp_path}/config.json: {key} = {shown}" in str(error.value) and "must be" in str(error.value)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"rope_scaling": 1}, "rope_scaling = 1"),
        ({"rope_scaling": "linear"}, 'rope_scaling = "linear"'),
        ({"rope_scaling": []}, r"rope_scaling = \[\]"),
        ({"rope_parameters": [LINEAR]}, "rope_parameters = "),
        ({"model_type": ["llama"]}, "model_type = "),
        ({"model_type": DROP}, "config.json has no model_type"),
        ({"hidden_act": 3}, "hidden_act = 3 must be a text"),
        ({"tie_word_embeddings": "false"}, 'tie_word_embeddings = "false" must be true or false'),
        ({"attention_bias": 0}, "attention_bias = 0 must be true or false"),
        ({"layer_types": "full_attention"}, "layer_types = .* must be a list of texts"),
        ({"layer_types": [1, 2]}, "layer_types = .* must be a list of texts"),
        ({"head_dim": 15}, "head_dim = 15 is odd"),
        ({"hidden_size": 60}, "hidden_size / num_attention_heads = 15 is odd"),
        ({"hidden_size": 66}, "hidden_size = 66 is not a multiple of num_attention_heads = 4"),
        ({"num_key_value_heads": 3}, "num_attention_heads = 4 is not a multiple of num_key_value_heads = 3"),
        ({"num_key_value_heads": 8}, "not a multiple of num_key_value_heads = 8"),
        ({"model_type": "qwen2", "num_key_value_heads": DROP}, r"num_key_value_heads = 32 \(the default of qwen2\)"),
        ({"hidden_size": DROP}, "hidden_size is missing"),
        ({"vocab_size": None}, "vocab_size is null"),
        ({"hidden_size": DROP, "hiden_size": 64}, "hidden_size is missing.* hiden_size: is that misspelt"),
        ({"eos_token_id": 4096}, "config.json: eos_token_id = 4096, but the vocabulary"),
        ({"eos_token_id": [2, 5000]}, r"eos_token_id = \[2, 5000\], but"),
        ({"pad_token_id": 4096}, "pad_token_id = 4096"),
        ({"bos_token_id": "1"}, 'bos_token_id = "1" must be the id'),
        ({"bos_token_id": -1}, "bos_token_id = -1 must be the id"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5 is not supported.* only as 1"),
        ({"attention_multiplier": 0.1}, "attention_multiplier = 0.1 is not supported"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping = 30.0"),
        ({"clip_qkv": 8}, "clip_qkv = 8"),
        ({"is_causal": False}, "is_causal = false is not supported.* only as true"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention = true"),
        ({"rope_condense_ratio": 8}, '"rope_type": "linear", "factor": 8'),
        ({"is_causal": False}, "is_causal = false is not supported"),
        ({"use_dynamic_ntk": True}, "use_dynamic_ntk = true is not supported"),
        # each number is possible, and RoPE is not
        ({"rope_theta": 1e299}, r"theta = 1e\+299 turns its pairs by .* one of these numbers is wrong"),
        ({"rope_scaling": LINEAR | {"factor": 1e-9}}, "rope_scaling: RoPE with theta = 10000, factor = 1e-09 turns"),
        ({"rope_scaling": YARN | {"factor": 1e299}}, r"factor = 1e\+299.* is wrong"),
        ({"rope_scaling": YARN | {"mscale": -20, "mscale_all_dim": 1}}, "multiplies cos and sin by -"),
        ({"rope_scaling": YARN | {"mscale": 1, "mscale_all_dim": -10 / math.log(4)}}, "cannot be computed"),
    ],
)
def test_wrong_values_are_named(change: dict[str, Any], named: str, tmp_path: Path):
    with pytest.raises(UserError, match=named):
        read_config(write(tmp_path, **change))


def test_other_models_keys_that_change_nothing_are_read_over(tmp_path: Path, warnings: list[str]):
    expected = read_config(write(tmp_path))
    harmless = {"partial_rotary_factor": 1.0, "final_logit_softcapping": None, "rope_condense_ratio": 1}
    usual = {
        "pretraining_tp": 1,
        "attention_dropout": 0.1,
        "use_cache": True,
        "torch_dtype": "bfloat16",
        "pad_token_id": -1,
    }
    names = {"_name_or_path": "x", "initializer_range": 0.02, "architectures": ["LlamaForCausalLM"], "bos_token_id": 1}
    assert read_config(write(tmp_path, **harmless, **usual, **names, max_length=20)) == expected
    assert not warnings


def test_ids_of_generation_config_name_that_file(tmp_path: Path):
    (write(tmp_path) / "generation_config.json").write_text('{"eos_token_id": [2, 128009]}')
    with pytest.raises(UserError, match=r"generation_config.json: eos_token_id = \[2, 128009\], but the vocabulary"):
        read_config(tmp_path)
    (tmp_path / "generation_config.json").write_text("[]")
    with pytest.raises(UserError, match="generation_config.json holds a list"):
        read_config(tmp_path)


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff\xfe{", b'{"a": 1' + b"0" * 5000 + b"}", b"[" * 100_000])
def test_what_is_no_json_object_is_named(content: bytes, tmp_path: Path):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(UserError, match=f"{tmp_path}/config.json"):
        read_config(tmp_path)


def test_a_folder_in_its_place_is_named_and_marks_of_encoding_are_read_over(tmp_path: Path):
    expected = read_config(write(tmp_path))
    text = (tmp_path / "config.json").read_text()
    for encoding in ("utf-8-sig", "utf-16"):
        (tmp_path / "config.json").write_text(text, encoding=encoding)
        assert read_config(tmp_path) == expected
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").mkdir()
    with pytest.raises(UserError, match="config.json cannot be read: Is a directory"):
        read_config(tmp_path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rms_norm_epsilon": 1e-5}, "rms_norm_epsilon .* Is rms_norm_eps meant.*has its default, 1e-06"),
        ({"num_kv_heads": 1}, "num_kv_heads .* num_key_value_heads = 2 is read"),
        ({"tie_embeddings": True}, "tie_embeddings .* tie_word_embeddings"),
        ({"dual_chunk_attention_config": {"chunk_size": 64}}, "dual_chunk_attention_config is not read"),
        ({"rope_type": "yarn"}, 'rope_type = "yarn" is not read: .* in rope_scaling or rope_parameters'),
        ({"beta_fast": 16}, "beta_fast = 16 is not read: .* in rope_scaling or rope_parameters"),
        ({"rotary_emb_base": 1e6}, "rotary_emb_base = 1000000.0 is not read"),
        ({"logit_softcap": 30}, "logit_softcap = 30 is not read"),
        ({"auto_map": {"AutoModelForCausalLM": "a.B"}}, "auto_map names code"),
        ({"architectures": ["Qwen2ForCausalLM"]}, r'\["Qwen2ForCausalLM"\], which vLLM .* that is LlamaForCausalLM'),
    ],
)
def test_misspelt_keys_are_warned_of_once(change: dict[str, Any], said: str, tmp_path: Path, warnings: list[str]):
    expected = read_config(write(tmp_path))
    for _ in range(2):
        assert read_config(write(tmp_path, **change)) == expected
    (message,) = warnings
    assert re.search(said, message)


# ---- RoPE -----------------------------------------------------------------------------------------------------------

READ = {
    "nothing": {},
    "theta beside": {"rope_theta": 5e5},
    "theta inside": {"rope_theta": DROP, "rope_parameters": {"rope_type": "default", "rope_theta": 7e4}},
    "theta nowhere": {"rope_theta": DROP, "rope_scaling": LINEAR},
    "theta in all places": {"rope_scaling": LINEAR, "rope_parameters": LINEAR | {"rope_theta": 10000.0}},
    "legacy type": {"rope_scaling": {"type": "linear", "factor": 2.0}},
    "both types": {"rope_scaling": {"type": "linear", "rope_type": "linear", "factor": 2.0}},
    "linear": {"rope_scaling": LINEAR},
    "dynamic": {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}},
    "yarn": {"rope_scaling": YARN},
    "yarn, factor null": {"rope_scaling": YARN | {"factor": None}},
    "yarn without the original length": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
    "yarn, original length beside": {
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0},
        "original_max_position_embeddings": 32,
    },
    "yarn, factor null, original length beside": {
        "rope_scaling": {"rope_type": "yarn", "factor": None},
        "original_max_position_embeddings": 32,
    },
    "yarn, less than once": {"rope_scaling": YARN | {"factor": 0.5}},
    "yarn, factor null, original length longer": {
        "rope_scaling": YARN | {"factor": None, "original_max_position_embeddings": 256}
    },
    "yarn, zeros": {"rope_scaling": YARN | {"beta_fast": 0, "beta_slow": 0, "mscale": 0, "mscale_all_dim": 0}},
    "yarn, nulls": {"rope_scaling": YARN | {"beta_fast": None, "attention_factor": None, "mscale": None}},
    "yarn, mscale": {"rope_scaling": YARN | {"mscale": 1.0, "mscale_all_dim": 0.7}},
    "yarn, one mscale": {"rope_scaling": YARN | {"mscale": 0.7}},
    "yarn, both scales": {"rope_scaling": YARN | {"mscale": 1.0, "mscale_all_dim": 0.7, "attention_factor": 1.25}},
    "yarn, betas": {"rope_scaling": YARN | {"beta_fast": 16, "beta_slow": 2}},
    "yarn, not truncated": {"rope_scaling": YARN | {"truncate": False}},
    "yarn, attn_factor": {"rope_scaling": YARN | {"attn_factor": 0.878}},
    "yarn, finetuned": {"rope_scaling": YARN | {"finetuned": True}},
    "llama3": {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 32}},
    "llama3 without the original length": {"rope_scaling": LLAMA3},
    "longrope": {"rope_scaling": LONGROPE | {"factor": 4.0, "original_max_position_embeddings": 32}},
    "longrope without a factor": {"rope_scaling": LONGROPE | {"original_max_position_embeddings": 32}},
    "longrope, original length beside": {"rope_scaling": LONGROPE, "original_max_position_embeddings": 32},
    "longrope without anything": {"rope_scaling": LONGROPE},
    "longrope, attention_factor": {
        "rope_scaling": LONGROPE | {"original_max_position_embeddings": 32, "attention_factor": 1.1}
    },
    "empty": {"rope_scaling": {}},
    "default, original length": {"rope_scaling": {"rope_type": "default", "original_max_position_embeddings": 32}},
}


@pytest.mark.parametrize("name", READ)
def test_angles_are_those_of_transformers(name: str, tmp_path: Path):
    """Within the original length, at max_position_embeddings, and beyond it."""
    rope = read_config(write(tmp_path, **READ[name])).rope
    theirs = LlamaRotaryEmbedding(AutoConfig.from_pretrained(tmp_path))
    for length in (20, 128, 200):
        theirs(torch.zeros(1, 1, 16), torch.arange(length)[None])
        at = rope_for(rope, length)
        freqs = inverse_frequencies(at, 16, torch.float32)
        freqs = at.scaling.of_tokens(freqs, None, slice(None)) if at.scaling else freqs
        torch.testing.assert_close(freqs, theirs.inv_freq, rtol=1e-6, atol=0)
        assert (at.scaling.magnitude() if at.scaling else 1.0) == pytest.approx(theirs.attention_scaling, rel=1e-9)


def test_null_in_a_rope_is_as_missing(tmp_path: Path):
    expected = read_config(write(tmp_path, rope_scaling={"rope_type": "yarn", "factor": 4.0}))
    null = dict.fromkeys(("original_max_position_embeddings", "beta_fast", "mscale", "attention_factor"))
    assert read_config(write(tmp_path, rope_scaling=null | {"rope_type": "yarn", "factor": 4.0})) == expected
    assert expected.rope.scaling.original_max_position_embeddings == 128


def test_su_is_longrope(tmp_path: Path):
    """As Phi-3's first files call it, which its configuration class and vLLM read so."""
    old = {"type": "su", "short_factor": SHORT, "long_factor": LONG, "original_max_position_embeddings": 32}
    expected = read_config(write(tmp_path, rope_scaling=LONGROPE | {"original_max_position_embeddings": 32}))
    assert read_config(write(tmp_path, rope_scaling=old)) == expected
    assert read_config(write(tmp_path, rope_scaling=old | {"rope_type": "longrope"})) == expected
    assert expected.rope.scaling.magnitude() == pytest.approx(math.sqrt(1 + math.log(4) / math.log(32)))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"rope_scaling": {"factor": 4.0}}, "no rope_type.* drop factor"),
        ({"rope_scaling": {"rope_type": "default", "factor": 4.0}}, "rope_scaling.factor = 4.0 has no effect"),
        ({"rope_scaling": YARN | {"beta_fasst": 8}}, "rope_scaling.beta_fasst = 8 .* is beta_fast meant"),
        ({"rope_scaling": LINEAR | {"beta_fast": 8}}, "rope_scaling.beta_fast = 8 is not a key of the linear RoPE"),
        ({"rope_scaling": LINEAR | {"attn_factor": 8}}, "attn_factor = 8 is not a key of the linear RoPE"),
        ({"rope_parameters": {"rope_type": "default", "mrope_section": [1]}}, "rope_parameters.mrope_section"),
        ({"rope_scaling": LINEAR | {"partial_rotary_factor": 0.5}}, "rope_scaling.partial_rotary_factor = 0.5"),
        ({"rope_scaling": {"rope_type": "yarn", "type": "linear", "factor": 2.0}}, '"yarn".*"linear"'),
        ({"rope_scaling": {"rope_type": "mrope", "factor": 2.0}}, 'rope_type = "mrope" is not supported'),
        ({"rope_scaling": {"rope_type": 3, "factor": 2.0}}, "rope_scaling.rope_type = 3 must be a text"),
        ({"rope_scaling": {"rope_type": "linear"}}, "linear rope scaling lacks factor"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "yarn rope scaling lacks factor"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "llama3 rope scaling lacks low_freq_factor"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 8.0}}, "longrope rope scaling lacks long_factor"),
        ({"rope_scaling": YARN | {"factor": "four"}}, 'rope_scaling.factor = "four" must be a number greater than 0'),
        ({"rope_scaling": YARN | {"factor": -0.5}}, "rope_scaling.factor = -0.5"),
        ({"rope_scaling": YARN | {"factor": 0}}, "rope_scaling.factor = 0 "),
        ({"rope_scaling": YARN | {"factor": [4.0]}}, r"rope_scaling.factor = \[4.0\]"),
        ({"rope_scaling": YARN | {"factor": True}}, "rope_scaling.factor = true"),
        ({"rope_scaling": YARN | {"attention_factor": 0}}, "attention_factor = 0 must be"),
        ({"rope_scaling": YARN | {"attention_factor": True}}, "attention_factor = true must be"),
        ({"rope_scaling": YARN | {"truncate": 1}}, "truncate = 1 must be true or false"),
        (
            {"rope_scaling": YARN | {"original_max_position_embeddings": 32.5}},
            "original_max_position_embeddings = 32.5",
        ),
        ({"rope_scaling": YARN | {"beta_fast": 1, "beta_slow": 32}}, "beta_fast = 1 must be greater than beta_slow"),
        ({"rope_scaling": LLAMA3 | {"high_freq_factor": 1}}, "high_freq_factor = 1 must be greater"),
        ({"rope_scaling": LONGROPE | {"long_factor": LONG[1:]}}, "long_factor has 7 numbers, but heads of 16 have 8"),
        ({"rope_scaling": LONGROPE | {"long_factor": [0.0, *LONG[1:]]}}, r"long_factor\[0\] = 0.0"),
        ({"rope_scaling": LONGROPE | {"long_factor": 2.0}}, "long_factor = 2.0 must be a list of numbers"),
        ({"rope_scaling": LONGROPE | {"long_mscale": 1.3}}, "long_mscale = 1.3, which vLLM reads"),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
            "rope_theta = 500000, but rope_theta = 10000",
        ),
        ({"rope_scaling": LINEAR, "rope_parameters": YARN}, "rope_scaling = .* and rope_parameters = .* are two RoPEs"),
        ({"rope_scaling": YARN, "original_max_position_embeddings": 64}, "= 32 and .* = 64 contradict"),
        (
            {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 64}},
            "= 64 and max_position_embeddings = 128 contradict",
        ),
        ({"rope_parameters": {"full_attention": YARN}}, "by kind of layer"),
        (OLMO3 | {"rope_parameters": {"full_attention": YARN, "factor": 2}}, "rope_parameters.factor stands beside"),
        (OLMO3 | {"rope_parameters": {"full_attention": 3}}, "rope_parameters.full_attention = 3 must be an object"),
        (
            {
                "model_type": "olmo3",
                "rope_theta": DROP,
                "rope_parameters": {"full_attention": YARN | {"rope_theta": 1e4}},
            },
            "rope_parameters.sliding_attention = null is not supported",
        ),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}, "head_dim": 2}, "head_dim = 2"),
    ],
)
def test_a_rope_that_would_be_another_is_refused_by_name(change: dict[str, Any], named: str, tmp_path: Path):
    with pytest.raises(UserError, match=f"{tmp_path}/config.json: .*{named}"):
        read_config(write(tmp_path, **change))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rope_scaling": YARN | {"attn_factor": 0.878}}, "attn_factor = 0.878 is not read.* multiplied by 1.13863"),
        ({"rope_scaling": LLAMA3}, "original_max_position_embeddings, so max_position_embeddings = 128"),
        (OLMO3 | {"rope_theta": 1e4}, "default with theta 10000, .* load default with theta 10000, and 500000"),
        (OLMO3 | {"rope_theta": 1e4, "rope_parameters": {"full_attention": YARN}}, "theta 10000, and 500000 there"),
        (OLMO3 | {"rope_parameters": YARN}, "yarn with theta 500000, .* load default with theta 500000"),
        (OLMO3 | {"rope_scaling": {"type": "linear", "factor": 2.0}}, "linear with .* load default"),
        (OLMO3 | {"rope_scaling": YARN | {"truncate": False}}, "as if truncate were true"),
        (OLMO3 | {"rope_parameters": {"full_attention": YARN | {"truncate": False}}}, "as if truncate were true"),
    ],
)
def test_what_programs_read_differently_is_warned_of(
    change: dict[str, Any], said: str, tmp_path: Path, warnings: list[str]
):
    read_config(write(tmp_path, **change))
    assert len(warnings) == 1 and re.search(said, warnings[0])


@pytest.mark.parametrize("change", [{"rope_theta": 1e4}, {"rope_parameters": YARN}, {"rope_scaling": LINEAR}])
def test_olmo3_in_transformers5_is_as_the_warning_says(change: dict[str, Any], tmp_path: Path, warnings: list[str]):
    if "rope_scaling" in change:
        change = {"rope_scaling": {"type": "linear", "factor": 4.0}}
    read_config(write(tmp_path, **OLMO3 | change))
    rope = AutoConfig.from_pretrained(tmp_path).rope_parameters
    full, sliding = rope["full_attention"], rope["sliding_attention"]
    said = f"would load {full['rope_type']} with theta {full['rope_theta']:g}, and {sliding['rope_theta']:g} there"
    assert said in warnings[0]


def test_a_window_of_a_llama_is_felt_in_transformers_cache_alone(tmp_path: Path, warnings: list[str]):
    read_config(write(tmp_path, sliding_window=4))
    assert len(warnings) == 1 and "sliding_window = 4 is not read: a token of a llama" in warnings[0]
    torch.manual_seed(0)
    models = {
        window: AutoModelForCausalLM.from_config(_config(tmp_path, sliding_window=window)) for window in (4, None)
    }
    models[4].load_state_dict(models[None].state_dict())
    whole, cached = (
        {window: read(model) for window, model in models.items()} for read in (_read_at_once, _read_by_cache)
    )
    assert torch.equal(whole[4], whole[None]) and not torch.allclose(cached[4], cached[None], atol=1e-3)
    assert torch.allclose(cached[None], whole[None], atol=1e-3)


def _config(folder: Path, **change: Any) -> Any:
    return AutoConfig.from_pretrained(write(folder, **change), initializer_range=0.5)


TEXT = torch.arange(12)[None]


def _read_at_once(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(TEXT).logits[:, -1]


def _read_by_cache(model: Any) -> torch.Tensor:
    """As in generation: the last token alone, with the cache of those before it."""
    with torch.no_grad():
        cache = model(TEXT[:, :-1], use_cache=True).past_key_values
        return model(TEXT[:, -1:], cache=cache, use_cache=True).logits[:, -1]


def test_olmo3_rescales_layers_without_a_window(tmp_path: Path, warnings: list[str]):
    """rope_scaling for the whole model, as the published files have it."""
    rope = read_config(write(tmp_path, **OLMO3, rope_scaling=YARN)).rope
    theirs = Olmo3RotaryEmbedding(AutoConfig.from_pretrained(tmp_path))
    assert rope.layers == "full_attention" and rope.theta == 500000.0
    torch.testing.assert_close(
        inverse_frequencies(rope, 16, torch.float32), theirs.full_attention_inv_freq, rtol=1e-6, atol=0
    )
    assert theirs.full_attention_attention_scaling == pytest.approx(rope.scaling.magnitude())
    table = {"full_attention": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}}
    assert read_config(write(tmp_path, **OLMO3, rope_parameters=table)).rope == rope
    assert AutoConfig.from_pretrained(tmp_path).rope_parameters["full_attention"]["rope_type"] == "yarn"
    assert not warnings
    assert theirs.sliding_attention_inv_freq[-1] == pytest.approx(500000.0 ** (-14 / 16), rel=1e-5)


@pytest.mark.parametrize(
    ("change", "trained"),
    [
        # lmsys/vicuna-7b-v1.5-16k: FastChat and vLLM multiply by the factor
        ({"max_position_embeddings": 4096, "rope_scaling": LINEAR, "max_sequence_length": 16384}, 16384),
        ({"max_position_embeddings": 4096, "rope_scaling": LINEAR}, 16384),
        ({"max_position_embeddings": 2048, "rope_scaling": LINEAR | {"factor": 8.0}}, 16384),
        # Llama-2-7b-longlora-8k
        ({"max_position_embeddings": 4096, "rope_scaling": LINEAR | {"factor": 2.0}}, 8192),
        # the number counts the factor: LongChat, LLaMA-2-7B-32K, chinese-alpaca-2-13b-16k
        ({"max_position_embeddings": 16384, "rope_scaling": LINEAR | {"factor": 8.0}}, 16384),
        ({"max_position_embeddings": 32768, "rope_scaling": LINEAR | {"factor": 8.0}}, 32768),
        ({"max_position_embeddings": 16384, "rope_scaling": LINEAR}, 16384),
        # the file says more
        ({"max_position_embeddings": 8192, "rope_scaling": LINEAR, "max_sequence_length": 32768}, 32768),
        ({"max_position_embeddings": 4096, "rope_scaling": LINEAR, "max_sequence_length": 4096}, 4096),
        ({"max_position_embeddings": 8192, "rope_scaling": LINEAR, "trained_length": 32768}, 32768),
        ({"max_position_embeddings": 8192, "rope_scaling": LINEAR, "original_max_position_embeddings": 8192}, 32768),
        # transformers and vLLM 0.32 take the number for the whole length in these types
        ({"rope_scaling": YARN}, 128),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}, 128),
        ({"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 32}}, 128),
        ({"rope_scaling": LONGROPE | {"original_max_position_embeddings": 32}}, 128),
    ],
)
def test_the_length_that_a_model_was_trained_for(change: dict[str, Any], trained: int, tmp_path: Path):
    assert read_config(write(tmp_path, **change)).rope.max_position_embeddings == trained
