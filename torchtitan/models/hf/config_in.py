"""Hugging Face's config.json in: the architecture that it says.

config_keys.py has the table of its keys, rope_in.py reads the RoPE.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torchtitan.models.hf.config_keys import Key, misspelt, read_keys, refuse_other_models, shown, typed
from torchtitan.models.hf.folder import in_hub_cache
from torchtitan.models.hf.rope_in import rope_from_hf
from torchtitan.models.rope_method import ORIGINAL
from torchtitan.models.transformer import LayerType, TransformerArgs
from torchtitan.tools.errors import UserError
from torchtitan.tools.folders import read_json
from torchtitan.tools.logging import warn_once

CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
    "olmo3": "Olmo3ForCausalLM",
}


def read_config(folder: Path) -> TransformerArgs:
    """Architecture from folder/config.json; UserError for what this model cannot be (named, with its value).

    Also for a token id, there or in generation_config.json, that the vocabulary does not have.
    """
    path = folder / "config.json"
    try:
        config = read_json(path)
    except FileNotFoundError:
        raise UserError(
            f'model.flavor = "auto" reads the architecture from {path}, which does not exist. '
            f"Give model.hf_assets_path a Hugging Face folder, or name a flavor.{in_hub_cache(folder)}"
        ) from None
    except OSError as e:
        raise UserError(f"{path} cannot be read: {e.strerror}.") from None
    args = args_from_hf(config, str(path))
    check_token_ids(folder, args.vocab_size)
    return args


def check_token_ids(folder: Path, vocab_size: int) -> None:
    """UserError for an id of BOS, EOS or padding in the folder's JSON files that is no token of the vocabulary."""
    for file in (folder / "config.json", folder / "generation_config.json"):
        _check_token_ids(read_json(file) if file.is_file() else {}, vocab_size, file)


def args_from_hf(config: dict[str, Any], where: str) -> TransformerArgs:
    """The architecture that the keys of a config.json say; `where` begins the message of a UserError."""

    def refuse(key: str, works: str) -> UserError:
        return UserError(f"{where}: {key} = {shown(config.get(key))} is not supported; {works}.")

    kind = config.get("model_type")
    if kind is None:
        raise UserError(f"{where} has no model_type, which says how the model is built; {', '.join(CLASSES)} are read.")
    if not isinstance(kind, str) or kind not in CLASSES:
        raise refuse("model_type", f"supported are {', '.join(CLASSES)}")
    values = {"model_type": kind, **read_keys(config, kind, where)}
    refuse_other_models(config, where)
    if values["hidden_act"] not in ("silu", "swish"):
        raise refuse("hidden_act", "the feed-forward is SwiGLU, which is silu")
    if kind != "qwen2" and values["attention_bias"]:
        raise refuse("attention_bias", "only Qwen2's bias (query, key, value; not the output) is")
    if values["mlp_bias"]:
        raise refuse("mlp_bias", "the feed-forward has no bias")
    for sentence in [*_other_programs(config, kind), *misspelt(config, kind)]:
        warn_once(f"{where}: {sentence}")
    if kind in ("llama", "olmo2") and config.get("sliding_window") is not None:
        warn_once(
            f"{where}: sliding_window = {shown(config['sliding_window'])} is not read: a token of a {kind} sees all "
            "before it. transformers 5 drops what is beyond the window from its cache when it generates, so that it "
            "computes something else there: set sliding_window to null."
        )
    if config.get("dual_chunk_attention_config") is not None:
        values["trained_length"] = values["trained_length"] or _length_without_chunks(config, where)
    heads, kv_heads, head_dim = _heads(values, config, where)
    layer_types, window = _sliding_layers(values, refuse)
    olmo = kind in ("olmo2", "olmo3")
    return TransformerArgs(
        dim=values["hidden_size"],
        n_layers=values["num_hidden_layers"],
        n_heads=heads,
        n_kv_heads=kv_heads,
        head_dim=head_dim,
        ffn_dim=values["intermediate_size"],
        vocab_size=values["vocab_size"],
        norm_eps=values["rms_norm_eps"],
        qkv_bias=kind == "qwen2",
        qk_norm=kind == "qwen3" or olmo,
        qk_norm_joint=olmo,
        post_norm=olmo,
        tied_embeddings=values["tie_word_embeddings"],
        rope=rope_from_hf(values | {"rope_theta": config.get("rope_theta")}, where, head_dim),
        layer_types=layer_types,
        sliding_window=window,
    )


def _other_programs(config: dict[str, Any], kind: str) -> list[str]:
    """Sentences for keys by which a program may take the file for another model than model_type says."""
    sentences, classes = [], config.get("architectures")
    if classes and classes != [CLASSES[kind]]:
        sentences.append(
            f"architectures = {shown(classes)}, which vLLM goes by, and model_type = {shown(kind)}, which is read here "
            f"as in transformers: that is {CLASSES[kind]}. If the model is another one, the result is wrong."
        )
    if config.get("auto_map"):
        sentences.append(
            f"auto_map names code that comes with the model, which is not run: it is read as transformers' {kind}."
        )
    return sentences


def _heads(values: dict[str, Any], config: dict[str, Any], where: str) -> tuple[int, int, int]:
    """(heads, key-value heads, dimension of a head)"""
    heads, dim = values["num_attention_heads"], values["hidden_size"]
    kv_heads = heads if values["num_key_value_heads"] is None else values["num_key_value_heads"]
    if heads % kv_heads:
        default = "" if config.get("num_key_value_heads") else f" (the default of {values['model_type']})"
        raise UserError(
            f"{where}: num_attention_heads = {heads} is not a multiple of num_key_value_heads = {kv_heads}{default}."
        )
    head_dim = values["head_dim"]
    if head_dim is None and dim % heads:
        raise UserError(
            f"{where}: hidden_size = {dim} is not a multiple of num_attention_heads = {heads}, and head_dim is missing."
        )
    head_dim = head_dim or dim // heads
    if head_dim % 2:
        name = "head_dim" if config.get("head_dim") else "hidden_size / num_attention_heads"
        raise UserError(f"{where}: {name} = {head_dim} is odd, but RoPE turns pairs: it must be even.")
    return heads, kv_heads, head_dim


def _length_without_chunks(config: dict[str, Any], where: str) -> int | None:
    """The trained length of a model that goes on beyond it by dual chunk attention (Qwen 2.5 1M), which is not read."""
    name = "dual_chunk_attention_config"
    length = typed(config[name], Key("object"), name, where).get(ORIGINAL)
    trained = None if length is None else typed(length, Key("int"), f"{name}.{ORIGINAL}", where)
    warn_once(
        f"{where}: dual_chunk_attention_config is not read, as in transformers: attention is computed without it. "
        "Programs that have it compute something else for texts longer than its chunks."
        + (f" The trained length is its {ORIGINAL}, {trained:,}." if trained else "")
    )
    return trained


def _check_token_ids(keys: dict[str, Any], vocab_size: int, file: Path) -> None:
    """UserError unless the ids of BOS, EOS and padding in a file are tokens of the vocabulary."""
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = keys.get(key)
        for token in value if isinstance(value, list) else [] if value is None else [value]:
            if key == "pad_token_id" and token == -1:
                continue  # none, in Llama's first files
            if isinstance(token, bool) or not isinstance(token, int) or token < 0:
                raise UserError(f"{file}: {key} = {shown(value)} must be the id of a token, a whole number.")
            if token >= vocab_size:
                raise UserError(
                    f"{file}: {key} = {shown(value)}, but the vocabulary (vocab_size = {vocab_size} in config.json) "
                    f"ends at {vocab_size - 1}: one of them is of another model."
                )


def _sliding_layers(
    values: dict[str, Any], refuse: Callable[[str, str], UserError]
) -> tuple[tuple[LayerType, ...], int | None]:
    """(layer_types, sliding_window) by transformers' rules for each model_type."""
    layers, kind, window = values["num_hidden_layers"], values["model_type"], values["sliding_window"]
    names = values["layer_types"]
    if names and (len(names) != layers or set(names) - {"full_attention", "sliding_attention"}):
        raise refuse("layer_types", f'it must be "full_attention" or "sliding_attention" for each of {layers} layers')
    if kind in ("llama", "olmo2"):
        slides = [False] * layers
    elif kind == "mistral":
        slides = [window is not None] * layers
    elif kind == "olmo3":
        slides = [(i + 1) % 4 != 0 for i in range(layers)]
    else:
        window = window if values["use_sliding_window"] else None
        slides = [window is not None and i >= values["max_window_layers"] for i in range(layers)]
    if names and kind in ("olmo3", "qwen2", "qwen3"):
        slides = [name == "sliding_attention" for name in names]
    elif names and slides != [name == "sliding_attention" for name in names]:
        raise refuse("layer_types", f"transformers' {kind} does not read it, and has other layers (set it to null)")
    if not any(slides):
        return (), None
    if window is None:
        switched_off = kind in ("qwen2", "qwen3") and not values["use_sliding_window"]
        key = "use_sliding_window" if switched_off else "sliding_window"
        raise refuse(key, "layer_types has sliding_attention, whose window must be a number of tokens")
    return tuple("sliding_attention" if slide else "full_attention" for slide in slides), window
