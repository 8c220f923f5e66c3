"""Hugging Face's config.json in: the architecture and the RoPE that it says."""

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

CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
    "olmo3": "Olmo3ForCausalLM",
}


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
    if model_type not in CLASSES:
        raise refuse("model_type", f"supported are {', '.join(CLASSES)}")
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
