"""Hugging Face's config.json out (config_json) and in (read_config).

The RoPE is in it twice, as transformers 5 reads it (rope_parameters) and as transformers 4 and older servers do
(rope_theta and rope_scaling): with only the former transformers 4 would silently use a theta of 10,000.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from torchtitan.models import rope_scaling
from torchtitan.models.rope import RopeArgs
from torchtitan.models.rope_method import ORIGINAL
from torchtitan.models.transformer import LayerType, TransformerArgs
from torchtitan.tools.errors import UserError

_CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
    "olmo3": "Olmo3ForCausalLM",
}
# Keys of an original config.json that are not true of the model that is written: the RoPE's old keys (a top-level
# original_max_position_embeddings would override the one beside the factor), custom code, another format of weights.
_STALE = (
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "rope_type",
    "original_max_position_embeddings",
    "trained_length",
    "auto_map",
    "quantization_config",
    "_name_or_path",
    "transformers_version",
)


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
    kept = {k: v for k, v in original.items() if k not in _STALE} if original.get("model_type") == kind else {}
    config: dict[str, Any] = {
        "initializer_range": 0.02,
        "use_cache": True,
        "attention_dropout": 0.0,
        **kept,
        "architectures": [_CLASSES[kind]],
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
    if kind not in ("llama", "olmo2"):
        config["sliding_window"] = args.sliding_window  # absent, Mistral's is 4,096
    if kind in ("qwen2", "qwen3"):
        config["use_sliding_window"] = args.sliding_window is not None
        slides = [name == "sliding_attention" for name in args.layer_types]
        if any(slides):
            config["max_window_layers"] = slides.index(True)
    if kind in ("qwen2", "qwen3", "olmo3"):
        config["layer_types"] = list(args.layer_types) or ["full_attention"] * args.n_layers
    else:
        config.pop("layer_types", None)
    for name, value in (("bos_token_id", bos), ("eos_token_id", eos)):
        config[name] = value if original.get(name) is None else original[name]
    return config


def _rope(args: TransformerArgs, kind: str) -> dict[str, Any]:
    form, length = rope_to_hf(args.rope, args.head_dim)
    config = {"rope_parameters": form, "rope_theta": form["rope_theta"], "max_position_embeddings": length}
    if length != args.rope.max_position_embeddings:  # what transformers or vLLM make of the length is not the length
        config["trained_length"] = args.rope.max_position_embeddings
    if form["rope_type"] != "default":
        config["rope_scaling"] = {key: value for key, value in form.items() if key != "rope_theta"}
    if form["rope_type"] == "longrope":
        # the only place where transformers 4 looks for the length beyond which the long list holds
        config["original_max_position_embeddings"] = form["original_max_position_embeddings"]
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


def read_config(folder: Path) -> TransformerArgs:
    """Architecture from folder/config.json; UserError for what this model cannot be (named, with its value)."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(
            f'model.flavor = "auto" reads the architecture from {path}, which does not exist. '
            "Give model.hf_assets_path a Hugging Face folder, or name a flavor."
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise UserError(f"{path} is not valid JSON: {e}") from None

    def refuse(key: str, works: str) -> UserError:
        return UserError(f"{path}: {key} = {config.get(key)!r} is not supported; {works}.")

    model_type = config.get("model_type")
    if model_type not in _CLASSES:
        raise refuse("model_type", f"supported are {', '.join(_CLASSES)}")
    if config.get("hidden_act", "silu") != "silu":
        raise refuse("hidden_act", "the feed-forward is SwiGLU, which is silu")
    if model_type != "qwen2" and config.get("attention_bias"):
        raise refuse("attention_bias", "only Qwen2's bias (query, key, value; not the output) is")
    if config.get("mlp_bias"):
        raise refuse("mlp_bias", "the feed-forward has no bias")
    olmo = model_type in ("olmo2", "olmo3")
    try:
        heads, dim = config["num_attention_heads"], config["hidden_size"]
        layer_types, window = _sliding_layers(config, refuse)
        return TransformerArgs(
            dim=dim,
            n_layers=config["num_hidden_layers"],
            n_heads=heads,
            n_kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or dim // heads,
            ffn_dim=config["intermediate_size"],
            vocab_size=config["vocab_size"],
            norm_eps=config.get("rms_norm_eps", 1e-6),
            qkv_bias=model_type == "qwen2",
            qk_norm=model_type == "qwen3" or olmo,
            qk_norm_joint=olmo,
            post_norm=olmo,
            tied_embeddings=config.get("tie_word_embeddings", False),
            rope=_rope_of_layers(config, str(path)),
            layer_types=layer_types,
            sliding_window=window,
        )
    except KeyError as e:
        raise UserError(f"{path} has no key {e}.") from None


def _sliding_layers(
    config: dict[str, Any], refuse: Callable[[str, str], UserError]
) -> tuple[tuple[LayerType, ...], int | None]:
    """(layer_types, sliding_window) by transformers' rules for each model_type; a missing key has the default of its
    configuration class."""
    layers, kind, window = config["num_hidden_layers"], config["model_type"], config.get("sliding_window", 4096)
    names = config.get("layer_types")
    if names and (len(names) != layers or set(names) - {"full_attention", "sliding_attention"}):
        raise refuse("layer_types", f'it must be "full_attention" or "sliding_attention" for each of {layers} layers')
    if kind in ("llama", "olmo2"):
        slides = [False] * layers
    elif kind == "mistral":
        slides = [window is not None] * layers
    elif kind == "olmo3":
        slides = [(i + 1) % 4 != 0 for i in range(layers)]
    else:
        window = window if config.get("use_sliding_window") else None
        slides = [window is not None and i >= config.get("max_window_layers", 28) for i in range(layers)]
    if names and kind in ("olmo3", "qwen2", "qwen3"):
        slides = [name == "sliding_attention" for name in names]
    elif names and slides != [name == "sliding_attention" for name in names]:
        raise refuse("layer_types", f"transformers' {kind} does not read it, and has other layers (set it to null)")
    if not any(slides):
        return (), None
    if not isinstance(window, int) or window < 1:
        switched_off = kind in ("qwen2", "qwen3") and not config.get("use_sliding_window")
        key = "use_sliding_window" if switched_off else "sliding_window"
        raise refuse(key, "layer_types has sliding_attention, whose window must be a number of tokens")
    return tuple("sliding_attention" if slide else "full_attention" for slide in slides), window


def _rope_of_layers(config: dict[str, Any], where: str) -> RopeArgs:
    """The RoPE of all layers, or of those without a window if the others are not scaled.

    Olmo 3's layers with a window are not scaled even if rope_scaling does not say so (transformers 4.57 and 5.24,
    OLMo-core and vLLM agree; some versions of transformers in between scaled all layers).
    """
    rope = rope_from_hf(config, where)
    by_kind = config.get("rope_parameters") or {}
    sliding = by_kind.get("sliding_attention")
    if sliding is None or sliding == by_kind.get("full_attention"):
        olmo = config["model_type"] == "olmo3" and (sliding is None or rope.scaling is None)
        return replace(rope, layers="full_attention") if olmo else rope
    if sliding.get("rope_type", "default") != "default" or sliding.get("rope_theta", rope.theta) != rope.theta:
        raise UserError(
            f"{where}: rope_parameters.sliding_attention = {sliding} is not supported; it must be the default RoPE "
            f"with the rope_theta of full_attention, {rope.theta:g}."
        )
    return replace(rope, layers="full_attention")  # the one that is scaled, whichever key it was read from


def rope_from_hf(config: dict[str, Any], where: str) -> RopeArgs:
    """The RoPE of a config.json; `where` begins the message of a UserError."""
    # transformers 5 keeps everything in rope_parameters; 4 has rope_theta and rope_scaling, which win if both exist
    rope = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
    length = config.get("trained_length") or config.get("max_position_embeddings")  # the former is ours, see _rope
    # a model with windows has RoPE by kind of layer: {"full_attention": {...}, "sliding_attention": {...}}
    layers: Literal["all", "full_attention"] = "all"
    if "full_attention" in rope:
        sliding = rope.get("sliding_attention", rope["full_attention"])
        layers = "all" if sliding == rope["full_attention"] else "full_attention"
        rope = dict(rope["full_attention"])
    theta = float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return RopeArgs(theta, None, layers, length)
    methods = {method.rope_type: method for method in rope_scaling.methods() if method.in_hf}
    if kind not in methods:
        *others, last = ["default", *methods]
        raise UserError(
            f'{where}: rope_type = "{kind}" is not supported; supported are {", ".join(others)} and {last}.'
        )
    beside = {key: config.get(key) for key in (ORIGINAL, "max_position_embeddings")}
    values = {**rope, **{key: value for key, value in beside.items() if value}, "trained_length": length}
    try:
        scaling = methods[kind].from_hf({key: value for key, value in values.items() if value or value is False})
    except KeyError as e:
        raise UserError(f"{where}: the {kind} rope scaling lacks {e.args[0]}.") from None
    return RopeArgs(theta, scaling, layers, length)


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
