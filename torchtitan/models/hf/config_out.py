"""Hugging Face's config.json out.

The RoPE is in it twice, as transformers 5 reads it (rope_parameters) and as transformers 4 and older servers do
(rope_theta and rope_scaling): with only the former transformers 4 would silently use a theta of 10,000.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from torchtitan.models.hf.config_in import CLASSES
from torchtitan.models.rope import RopeArgs
from torchtitan.models.rope_method import ORIGINAL
from torchtitan.models.transformer import TransformerArgs
from torchtitan.tools.errors import UserError
from torchtitan.tools.folders import read_json

# Written anew, or of no meaning in another folder.
_REPLACED = (
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "rope_type",
    ORIGINAL,  # at the top level it would override the one beside the factor
    "trained_length",
    "layer_types",
    "_name_or_path",
    "return_dict",  # false: transformers 5 cannot load
    "transformers_weights",  # names a file that the export may not have
    "transformers_version",
)
# An original key whose name has one of these words may change what a server computes or how much it reads, and nothing
# here has trained with it. Keys of the layers that are trained are written anew.
_FUNCTION_WORDS = re.compile(
    "rope|rotary|theta|ntk|position|len|seq|ctx|context|window|swa|chunk|sparse|attention|attn|sink|scal|factor|logit|"
    "alibi|clip|mult|residual|norm|bias|temperature|layer|predict|mtp|draft|specul|expert|moe|lora|quant|causal"
)
_KEPT = ("attention_dropout",)
_WINDOW_KEYS = {
    "mistral": ("sliding_window",),
    "olmo3": ("sliding_window",),
    "qwen2": ("sliding_window", "use_sliding_window", "max_window_layers"),
    "qwen3": ("sliding_window", "use_sliding_window", "max_window_layers"),
}


def original_config(folder: Path | None) -> dict[str, Any]:
    """The config.json of the folder that a model was trained from; empty if it has none."""
    path = folder / "config.json" if folder else None
    return read_json(path) if path and path.is_file() else {}


def model_type(args: TransformerArgs, original: str | None) -> str:
    """Hugging Face's model_type; UserError if none fits. original: that of the model it was trained from."""
    traits = {name for name in ("qkv_bias", "qk_norm", "qk_norm_joint", "post_norm") if getattr(args, name)}
    share = args.sliding_share
    kinds = {
        frozenset({"qk_norm", "qk_norm_joint", "post_norm"}): "olmo3" if share or original == "olmo3" else "olmo2",
        frozenset({"qk_norm"}): "qwen3",
        frozenset({"qkv_bias"}): "qwen2",
        frozenset[str](): "mistral" if original == "mistral" or share == 1 else "llama" if share == 0 else None,
    }
    kind = kinds.get(frozenset(traits))
    if kind is None:
        windows = f" and a sliding window in {share:.0%} of the layers" if share else ""
        what = " and ".join(sorted(traits, reverse=True)) or "plain layers"
        raise UserError(f"A model with {what}{windows} has no model_type in Hugging Face's config.json.")
    scaled_by_kind = args.rope.layers == "full_attention" and share > 0
    if args.rope.scaling and kind == "olmo3" and share and not scaled_by_kind:
        raise UserError(
            "Hugging Face's Olmo 3 rescales RoPE in full-attention layers only, and this model was trained with "
            'rope.layers = "all": an export would load with wrong positions in layers with a sliding window.'
        )
    if args.rope.scaling and kind != "olmo3" and scaled_by_kind:
        raise UserError(
            f'rope.layers = "full_attention" has no form in the config.json of {kind}: all of its layers would be '
            "rescaled on load."
        )
    return kind


def config_json(
    args: TransformerArgs, dtype: str, original: dict[str, Any], bos: int | None = None, eos: int | None = None
) -> dict[str, Any]:
    """The config.json of a model. original: that of the folder it was trained from, whose other keys are kept.

    dtype: of the weights. bos, eos: the tokenizer's, used if the original has none.
    """
    kind = model_type(args, original.get("model_type"))
    kept = _kept(original, kind)
    config: dict[str, Any] = {
        "initializer_range": 0.02,
        "attention_dropout": 0.0,
        **kept,
        "use_cache": True,  # what a training with recomputation has left as false makes generation slow
        "architectures": [CLASSES[kind]],
        "model_type": kind,
        "hidden_act": "silu",
        "hidden_size": args.dim,
        "intermediate_size": args.ffn_dim,
        "num_hidden_layers": args.n_layers,
        "num_attention_heads": args.n_heads,
        "num_key_value_heads": args.n_kv_heads,
        "head_dim": args.head_dim,
        "vocab_size": args.vocab_size,
        "rms_norm_eps": args.norm_eps,
        "tie_word_embeddings": args.tied_embeddings,
        "dtype": dtype,
        "torch_dtype": dtype,
        **_rope(args, kind),
    }
    if kind in ("llama", "qwen3", "olmo2", "olmo3"):
        config["attention_bias"] = False
    if kind == "llama":
        config["mlp_bias"] = False
    config |= _windows(args, kind, kept)
    for name, value in (("bos_token_id", bos), ("eos_token_id", eos)):
        config[name] = value if original.get(name) is None else original[name]
    return config


def left_out(original: dict[str, Any], config: dict[str, Any]) -> list[str]:
    """The keys of the original config.json with a value that are neither in the one that is written nor replaced."""
    return [key for key, value in original.items() if value is not None and key not in (*config, *_REPLACED)]


def _kept(original: dict[str, Any], kind: str) -> dict[str, Any]:
    """The keys of the original that stay: values that are no objects and whose name has no word of a function, and what
    is switched off."""
    if original.get("model_type") != kind:  # its keys mean something else
        return {}
    known = (*_KEPT, *_WINDOW_KEYS.get(kind, ()))

    def stays(key: str, value: Any) -> bool:
        off = value is False and key != "is_causal"
        return key in known or off or not (isinstance(value, dict) or _FUNCTION_WORDS.search(key.lower()))

    return {k: v for k, v in original.items() if k not in _REPLACED and stays(k, v)}


def _windows(args: TransformerArgs, kind: str, kept: dict[str, Any]) -> dict[str, Any]:
    """Which layers slide. Where none does, the window of the original stays: transformers asks Olmo 3 for a number."""
    if kind in ("llama", "olmo2"):
        return {}
    if kind == "mistral":
        return {"sliding_window": args.sliding_window}  # null: no layer slides. Absent, it is 4,096
    keys: dict[str, Any] = {
        "sliding_window": args.sliding_window or kept.get("sliding_window") or (4096 if kind == "olmo3" else None),
        "layer_types": list(args.layer_types) or ["full_attention"] * args.n_layers,
    }
    if kind in ("qwen2", "qwen3"):
        keys["use_sliding_window"] = args.sliding_window is not None
        slides = [name == "sliding_attention" for name in args.layer_types]
        if any(slides):
            keys["max_window_layers"] = slides.index(True)
    return keys


def _rope(args: TransformerArgs, kind: str) -> dict[str, Any]:
    form, length = rope_to_hf(args.rope, args.head_dim)
    config = {"rope_parameters": form, "rope_theta": form["rope_theta"], "max_position_embeddings": length}
    if length != args.rope.max_position_embeddings:  # what transformers or vLLM make of the length is not the length
        config["trained_length"] = args.rope.max_position_embeddings
    name = form["rope_type"]
    if name != "default":  # "type": what rope_type was called; some readers know no other name
        config["rope_scaling"] = {"type": name, **{key: value for key, value in form.items() if key != "rope_theta"}}
    if kind == "olmo2" and name in ("linear", "dynamic"):  # transformers 4 refuses Olmo 2 with any key beside these
        config["rope_scaling"] = {"type": name, "factor": form["factor"]}
    if name in ("longrope", "llama3"):
        # the only place where transformers 4 looks for the length beyond which longrope's long list holds
        config[ORIGINAL] = form[ORIGINAL]
    if kind == "olmo3" and form.get("truncate") is False:
        raise UserError(
            "YaRN with truncate = false cannot be exported for Olmo 3: transformers 5 looks for truncate where Olmo 3 "
            "does not have it, and would load the model with truncate = true, that is, with other frequencies. Train "
            "a last stage with rope.truncate = true and export that, or evaluate from the checkpoint."
        )
    if kind == "olmo3" and args.sliding_share and form["rope_theta"] != args.rope.theta:
        raise UserError(
            f"RoPE whose scaling is a larger base ({args.rope.theta:g} -> {form['rope_theta']:g}: ntk, dynamic) in the "
            "full-attention layers alone has no form in Olmo 3's config.json: the layers with a sliding window would "
            "load with that base too."
        )
    if kind == "olmo3":  # transformers 5 reads it by kind of layer; 4 rescales the full-attention layers by itself
        plain = {"rope_type": "default", "rope_theta": form["rope_theta"]}
        config["rope_parameters"] = {"full_attention": form, "sliding_attention": plain}
    return config


def rope_to_hf(rope: RopeArgs, head_dim: int) -> tuple[dict[str, Any], int]:
    """(rope_parameters, max_position_embeddings) for config.json; UserError if Hugging Face has no form for it."""
    length = rope.max_position_embeddings
    if length is None:
        raise UserError(
            "The length that the model was trained for is not known, and config.json needs max_position_embeddings: "
            "give it (scripts/convert.py --max-position-embeddings)."
        )
    if rope.scaling is None:
        return {"rope_type": "default", "rope_theta": rope.theta}, length
    form = rope.scaling.hf(rope.theta, head_dim)
    # transformers says that a factor "must be a float"
    form = {k: float(v) if k in ("rope_theta", "factor", "attention_factor") else v for k, v in form.items()}
    return form, rope.scaling.hf_length(length)
