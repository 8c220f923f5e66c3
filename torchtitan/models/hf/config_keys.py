"""The keys of Hugging Face's config.json that are read: type, bounds and default, as a table; how a value is read.

A default is that of transformers 5.24's configuration class of the model_type; a test compares them. transformers
4.57 has the same ones but for Olmo 3's rope_theta, 10,000 there: 5.24's counts, because 4.57 writes that key into every
file.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import fields
from difflib import get_close_matches
from typing import Any, NamedTuple

from torchtitan.models.rope_scaling import methods
from torchtitan.tools.errors import UserError

NEEDED = object()
"""The default of a key without one."""


class Key(NamedTuple):
    type: str
    """int, number (more than `least`), bool, text, object; lists: texts, numbers."""

    default: Any = NEEDED
    """For all model types, or a dict by model_type, with "" for those that it does not name."""

    least: float = 1


# num_key_value_heads and head_dim None: num_attention_heads, and hidden_size / num_attention_heads
KEYS: dict[str, Key] = {
    "hidden_size": Key("int"),
    "intermediate_size": Key("int"),
    "num_hidden_layers": Key("int"),
    "num_attention_heads": Key("int"),
    "vocab_size": Key("int"),
    "num_key_value_heads": Key("int", {"mistral": 8, "qwen2": 32, "qwen3": 32, "": None}),
    "head_dim": Key("int", {"qwen3": 128, "": None}, least=2),
    "hidden_act": Key("text", "silu"),
    "rms_norm_eps": Key("number", {"olmo2": 1e-5, "olmo3": 1e-5, "": 1e-6}, least=0),
    "tie_word_embeddings": Key("bool", False),
    "attention_bias": Key("bool", False),
    "mlp_bias": Key("bool", False),
    "max_position_embeddings": Key("int", {"mistral": 131072, "qwen2": 32768, "qwen3": 32768, "": 2048}),
    "sliding_window": Key("int", 4096),
    "use_sliding_window": Key("bool", False),
    "max_window_layers": Key("int", 28, least=0),
    "layer_types": Key("texts", None),
    "rope_theta": Key("number", {"olmo3": 500000.0, "": 10000.0}),
    "rope_scaling": Key("object", None),
    "rope_parameters": Key("object", None),
    "original_max_position_embeddings": Key("int", None),
    "max_sequence_length": Key("int", None),
    "trained_length": Key("int", None),
}

# What null says, where it is not what a missing key says.
NULL: dict[str, Any] = {"num_key_value_heads": None, "sliding_window": None}

# Keys of other models that change what a model computes and do not show in its weights, and the values with which they
# change nothing.
OTHER_MODELS: dict[str, tuple[Any, ...]] = {
    "partial_rotary_factor": (1,),
    "rotary_pct": (1,),
    "rotary_emb_fraction": (1,),
    "rope_interleave": (False,),
    "rope_interleaved": (False,),
    "no_rope_layers": ([],),
    "no_rope_layer_interval": (0,),
    "alibi": (False,),
    "attention_multiplier": (),
    "query_pre_attn_scalar": (),
    "embedding_multiplier": (1,),
    "residual_multiplier": (1,),
    "logits_scaling": (1,),
    "logit_scale": (1,),
    "scale_emb": (1,),
    "scale_depth": (),
    "clip_qkv": (),
    "attn_logit_softcapping": (0,),
    "final_logit_softcapping": (0,),
    "attention_chunk_size": (),
    "is_causal": (True,),  # false: each token sees all after it too, in transformers 5 and vLLM
    "use_bidirectional_attention": (False,),
    "attn_temperature_tuning": (False, 0),
    "parallel_residual": (False,),
    "use_parallel_residual": (False,),
    "rope_condense_ratio": (1,),
    "use_logn_attn": (False,),
    "use_dynamic_ntk": (False,),
    "use_mrope": (False,),
}

# Words of keys that say something of the angles, or of numbers that attention and logits are multiplied by.
_CHANGES = re.compile(r"rope|rotary|ntk|yarn|alibi|logn|soft_?cap|multiplier|(^|_)scale(_|$)")

# Keys that look like one of KEYS and mean something else.
_HARMLESS = {"attention_dropout", "hidden_dropout", "max_length", "max_seq_len", "seq_length", "vocab_file"}


def shown(value: Any) -> str:
    """A value as JSON has it, cut after 60 characters."""
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:60] + "..."


def default_of(key: str, model_type: str) -> Any:
    """What a missing key means; NEEDED if it must be there."""
    default = KEYS[key].default
    return default.get(model_type, default[""]) if isinstance(default, dict) else default


def read_keys(config: dict[str, Any], model_type: str, where: str) -> dict[str, Any]:
    """All keys of KEYS, each in its type; `where` (the file) begins the message of a UserError."""
    values = {}
    for key, rule in KEYS.items():
        value = config.get(key)
        if value is not None:
            values[key] = typed(value, rule, key, where)
            continue
        values[key] = NULL[key] if key in config and key in NULL else default_of(key, model_type)
        if values[key] is NEEDED:
            near = get_close_matches(key, set(config) - set(KEYS), 1, 0.75)
            hint = f" It has {near[0]}: is that misspelt?" if near else ""
            state = "is null" if key in config else "is missing"
            raise UserError(f"{where}: {key} {state}, and the model cannot be built without it.{hint}")
    return values


def typed(value: Any, rule: Key, key: str, where: str) -> Any:
    """A value of a JSON file, not null, in the type of its key. Text that is a number is read as the number; UserError
    names the file, the key and the value if it cannot be the key's."""
    kind, least = rule.type, rule.least
    if kind in ("int", "number"):
        number = _as_number(value)
        if kind == "int" and number is not None and number == int(number) and least <= number < 2**31:
            return int(number)
        if kind == "number" and number is not None and least < number < 1e300:
            return float(number)
        wanted = f"a whole number of at least {least:g} and less than 2^31"
        if kind == "number":
            wanted = "a number" if least == -math.inf else f"a number greater than {least:g}"
    elif kind == "numbers":
        if isinstance(value, list) and value:
            return tuple(typed(v, Key("number", least=least), f"{key}[{i}]", where) for i, v in enumerate(value))
        wanted = "a list of numbers"
    elif kind == "texts":
        if isinstance(value, list) and all(isinstance(v, str) for v in value):
            return value
        wanted = "a list of texts"
    else:
        python, wanted = {
            "bool": (bool, "true or false"),
            "text": (str, "a text"),
            "object": (dict, "an object with keys of its own"),
        }[kind]
        if isinstance(value, python):
            return value
    raise UserError(f"{where}: {key} = {shown(value)} must be {wanted}.")


def _as_number(value: Any) -> float | int | None:
    """The finite number that a JSON value is or, as text, says; None if it is none."""
    if isinstance(value, str):
        try:
            value = int(value) if value.strip().lstrip("+-").isdecimal() else float(value)
        except ValueError:
            return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if isinstance(value, int) or math.isfinite(value) else None


def refuse_other_models(config: dict[str, Any], where: str) -> None:
    """UserError for a key that would change what the model computes, and is of other models."""
    for key, harmless in OTHER_MODELS.items():
        value = config.get(key)
        if value is None or value in harmless:
            continue
        way = f"only as {' or '.join(shown(v) for v in harmless) or 'null'}"
        if key == "rope_condense_ratio":  # of LongChat's first models; transformers does not read it
            way = f'as "rope_scaling": {{"rope_type": "linear", "factor": {shown(value)}}}, with {key} set to null'
        raise UserError(
            f"{where}: {key} = {shown(value)} is not supported. It changes what a model computes, and works {way}."
        )


def misspelt(config: dict[str, Any], model_type: str) -> list[str]:
    """A sentence for each key that is not known but looks like one that is read."""
    sentences = []
    inside = {f.name for method in methods() if method.in_hf for f in fields(method)} - {*KEYS, "length"}
    for key, value in config.items():
        if key in KEYS or key in OTHER_MODELS or key in _HARMLESS or value in (None, False, [], {}):
            continue
        if key in inside or _CHANGES.search(key):
            place = "in other models only"
            if key in inside:
                place = "in rope_scaling or rope_parameters, and not beside them"
            sentences.append(f"{key} = {shown(value)} is not read: it counts {place}.")
            continue
        for near in get_close_matches(key, KEYS, 1, 0.75):
            used = f"{near} = {shown(config[near])} is read" if near in config else f"{near} is missing"
            default = default_of(near, model_type)
            if near not in config and default is not None:
                used += f" and has its default, {shown(default)}"
            sentences.append(f"{key} is not a key of {model_type} and not read. Is {near} meant? {used}.")
    return sentences
