"""Hugging Face folders in: config.json to architecture, safetensors straight into sharded parameters."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from torch.distributed.checkpoint import HuggingFaceStorageReader

from torchtitan.models.rope import RopeArgs
from torchtitan.models.rope_config import rope_from_hf
from torchtitan.models.transformer import LayerType, Transformer, TransformerArgs, parameter_shapes
from torchtitan.tools.errors import UserError

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3", "olmo2", "olmo3")

_TOP = {
    "tok_embeddings.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "attention.q_norm": "self_attn.q_norm",
    "attention.k_norm": "self_attn.k_norm",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    # Olmo 2 and 3: there a norm of the same Hugging Face name stands elsewhere
    "attention_post_norm": "post_attention_layernorm",
    "ffn_post_norm": "post_feedforward_layernorm",
}


def hf_name(name: str) -> str:
    """Hugging Face's name of our parameter: layers.3.attention.wq.weight -> model.layers.3.self_attn.q_proj.weight."""
    if name in _TOP:
        return _TOP[name]
    _, layer, rest = name.split(".", 2)
    module, kind = rest.rsplit(".", 1)
    return f"model.layers.{layer}.{_LAYER[module]}.{kind}"


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
    if model_type not in MODEL_TYPES:
        raise refuse("model_type", f"supported are {', '.join(MODEL_TYPES)}")
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
            rope=_rope(config, str(path)),
            layer_types=layer_types,
            sliding_window=window,
        )
    except KeyError as e:
        raise UserError(f"{path} has no key {e}.") from None


def _sliding_layers(
    config: dict[str, Any], refuse: Callable[[str, str], UserError]
) -> tuple[tuple[LayerType, ...], int | None]:
    """(layer_types, sliding_window) by transformers' rules for each model_type; a key that is not there has the default
    of its configuration class."""
    layers, kind, window = config["num_hidden_layers"], config["model_type"], config.get("sliding_window", 4096)
    given = config.get("layer_types")
    if given and (len(given) != layers or set(given) - {"full_attention", "sliding_attention"}):
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
    if given and kind in ("olmo3", "qwen2", "qwen3"):
        slides = [name == "sliding_attention" for name in given]
    elif given and slides != [name == "sliding_attention" for name in given]:
        raise refuse("layer_types", f"transformers' {kind} does not read it, and has other layers (set it to null)")
    if not any(slides):
        return (), None
    if not isinstance(window, int) or window < 1:
        switched_off = kind in ("qwen2", "qwen3") and not config.get("use_sliding_window")
        key = "use_sliding_window" if switched_off else "sliding_window"
        raise refuse(key, "layer_types has sliding_attention, whose window must be a number of tokens")
    return tuple("sliding_attention" if slide else "full_attention" for slide in slides), window


def _rope(config: dict[str, Any], where: str) -> RopeArgs:
    """The RoPE of all layers, or of those without a window, where the others are not scaled.

    So it is in Olmo 3 also where rope_scaling does not say so (transformers 4.57 and 5.24, OLMo-core and vLLM agree;
    some versions of transformers in between scaled all layers).
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


def check_weights(folder: Path, args: TransformerArgs, asked: str = "") -> None:
    """Compare names and shapes in the safetensors headers with the model; UserError with the first mismatches.

    asked: the TOML keys and values that ask for the folder, for the message that there are none.

    Reads headers only, so that a wrong folder is refused before anything is allocated.
    """
    found: dict[str, tuple[int, ...]] = {}
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(
            f"{asked or folder}: there is no *.safetensors there. Name a folder with the weights, or leave the first "
            "key out to train from scratch."
        )
    for file in files:
        try:
            with safe_open(file, framework="pt") as f:
                for key in f.keys():  # noqa: SIM118  (not a dict)
                    found[key] = tuple(f.get_slice(key).get_shape())
        except (SafetensorError, OSError) as e:
            raise UserError(f"{file} cannot be read as safetensors: {e}. Is it whole? Fetch it again.") from None
    wanted = {hf_name(name): shape for name, shape in parameter_shapes(args).items()}
    wrong = [
        f"{name} should be {list(shape)} and is {list(found[name]) if name in found else 'missing'}"
        for name, shape in wanted.items()
        if found.get(name) != shape
    ]
    # a bias that the file has and the model lacks would be dropped in silence: another architecture
    known = set(wanted) | {"lm_head.weight"} if args.tied_embeddings else set(wanted)
    extra = [
        f"{name} {list(found[name])} has no place in the model"
        for name in found
        if name.startswith(("model.", "lm_head.")) and name not in known and not name.endswith("rotary_emb.inv_freq")
    ]
    if wrong or extra:
        lines = (wrong + extra)[:5]
        raise UserError(
            f"The weights in {folder} do not fit the model: {len(wrong)} of {len(wanted)} tensors differ, "
            f"{len(extra)} are left over. First: " + "; ".join(lines) + "."
        )


def load_weights(model: Transformer, folder: Path) -> None:
    """Copy the safetensors into the model's (sharded) parameters, cast to their dtype.

    Collective. Every rank reads just the slices of its own shards; nothing is held whole.
    """
    # named_parameters gives a tied matrix once, under the embedding's name, as the files do
    dcp.load(
        {hf_name(name): param.detach() for name, param in model.named_parameters()},
        storage_reader=HuggingFaceStorageReader(str(folder)),
    )
