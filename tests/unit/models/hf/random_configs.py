"""Random config.json files of the supported model types: small models in every spelling that Hugging Face knows.

A configuration is a function of its number alone, so that a failure can be repeated by it. Expected is what
transformers makes of `config`; `spelled` says the same in another way (null for a missing key, text for a number),
which transformers 5 refuses and older files have.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

TYPES = ("llama", "mistral", "qwen2", "qwen3", "olmo2", "olmo3")
ROPES = (
    "default",
    "no theta",
    "linear",
    "dynamic",
    "yarn",
    "yarn options",
    "yarn mscale",
    "llama3",
    "longrope",
    "lists",
)
SPELLINGS = ("rope_type", "type", "rope_parameters", "theta outside", "both")
COUNT = len(TYPES) * len(ROPES)


@dataclass(frozen=True)
class Case:
    name: str
    """Number, model type, RoPE and its spelling."""
    seed: int
    config: dict[str, Any]
    spelled: dict[str, Any]
    original: int
    """Tokens before the RoPE was rescaled; a third of the longest text that is compared."""


def random_case(number: int) -> Case:
    """Every model type meets every RoPE once; all else is drawn."""
    draw = random.Random(2100 + number)
    kind, rope = TYPES[number % len(TYPES)], ROPES[number // len(TYPES)]
    config = _sizes(kind, draw)
    original = draw.choice((16, 24, 32))
    spelling = draw.choice(SPELLINGS)
    if kind == "olmo3":  # transformers 5 reads its "type" as no scaling, and its theta in one of its two places
        spelling = {"type": "rope_type", "theta outside": "rope_parameters"}.get(spelling, spelling)
    config |= _rope(kind, rope, spelling, original, config, draw)
    config |= _windows(kind, config["num_hidden_layers"], draw)
    name = f"{number:02}-{kind}-{rope}-{spelling}".replace(" ", "_")
    return Case(name, number, config, _spelled(config, draw), original)


def _head_dim(config: dict[str, Any]) -> int:
    usual = config["hidden_size"] // config["num_attention_heads"]
    return config.get("head_dim") or (128 if config["model_type"] == "qwen3" else usual)


def _sizes(kind: str, draw: random.Random) -> dict[str, Any]:
    heads = draw.choice((2, 4, 6, 8))
    config: dict[str, Any] = {
        "model_type": kind,
        "num_attention_heads": heads,
        "num_key_value_heads": draw.choice([n for n in (1, 2, 3, 4, 6, 8) if heads % n == 0]),
        "hidden_size": heads * draw.choice((8, 12, 16)),
        "intermediate_size": draw.choice((40, 56, 96)),
        "num_hidden_layers": draw.choice((4, 5)) if kind == "olmo3" else draw.choice((2, 3)),
        "vocab_size": draw.choice((50, 64, 90)),
        "bos_token_id": 1,
        "eos_token_id": draw.choice((2, [2, 3])),
        "pad_token_id": draw.choice((None, 0)),
    }
    if draw.random() < 0.6:
        config["head_dim"] = draw.choice((8, 12, 16, 20))
        if kind != "llama":  # transformers' Llama refuses a width that is not a multiple of its heads
            config["hidden_size"] += draw.choice((0, 2, 10))
    if draw.random() < 0.7:
        config["rms_norm_eps"] = draw.choice((1e-5, 1e-6, 1e-3, 2.5e-4))
    if draw.random() < 0.6:
        config["tie_word_embeddings"] = draw.random() < 0.6
    if draw.random() < 0.5:
        config["hidden_act"] = "silu"
    if draw.random() < 0.3 and kind != "mistral":  # Mistral's and Qwen's defaults are no function of the heads
        if kind in ("llama", "olmo2", "olmo3"):
            del config["num_key_value_heads"]
        elif kind == "qwen2":
            config["num_key_value_heads"] = None
    extras = {"torch_dtype": "float32", "use_cache": False, "initializer_range": 0.01, "attention_dropout": 0.0}
    extras |= {"pretraining_tp": 1} if kind == "llama" else {}
    extras |= {} if kind in ("mistral", "qwen2") else {"attention_bias": False}
    return config | {key: value for key, value in extras.items() if draw.random() < 0.3}


def _rope(
    kind: str, rope: str, spelling: str, original: int, config: dict[str, Any], draw: random.Random
) -> dict[str, Any]:
    """rope_theta, rope_scaling, rope_parameters and the lengths."""
    factor = draw.choice((2, 4.0, 2.5, 8))
    theta = draw.choice((10000, 5e5, 1e6, 1234.5, 700.0))
    if kind == "olmo3" and spelling == "rope_type":
        theta = 5e5  # any other stays in the full-attention layers alone in transformers 5, and in all of them in 4
    length = round(original * factor)
    beside: dict[str, Any] = {"max_position_embeddings": original if rope in ("linear", "dynamic") else length}
    form = _method(kind, rope, factor, original, _head_dim(config) // 2, draw)
    if "original_max_position_embeddings" in form and kind != "olmo3" and draw.random() < 0.3:
        beside["original_max_position_embeddings"] = form["original_max_position_embeddings"]
        if draw.random() < 0.5:
            del form["original_max_position_embeddings"]
    name = form.pop("rope_type")
    theta_key = {} if rope == "no theta" else {"rope_theta": theta}
    if spelling in ("type", "rope_type"):
        scaling = None if name == "default" and draw.random() < 0.5 else {spelling: name, **form}
        return beside | theta_key | {"rope_scaling": scaling}
    form = {"rope_type": name, **form}
    if kind == "olmo3":
        nested = {"full_attention": form | theta_key, "sliding_attention": {"rope_type": "default"} | theta_key}
        old = {**theta_key, "rope_scaling": form} if spelling == "both" else {}
        return beside | old | {"rope_parameters": nested}
    if spelling == "theta outside":
        return beside | theta_key | {"rope_parameters": form}
    old = {**theta_key, "rope_scaling": {**form, "type": name}} if spelling == "both" else {}
    return beside | old | {"rope_parameters": form | theta_key}


def _method(kind: str, rope: str, factor: float, original: int, pairs: int, draw: random.Random) -> dict[str, Any]:
    length = {"original_max_position_embeddings": original}

    def some(**keys: tuple[Any, ...]) -> dict[str, Any]:
        return {key: draw.choice(values) for key, values in keys.items() if draw.random() < 0.7}

    def rising(top: float) -> list[float]:
        return sorted(round(draw.uniform(1, top), 3) for _ in range(pairs))

    if rope in ("default", "no theta"):
        return {"rope_type": "default"}
    if rope in ("linear", "dynamic"):
        return {"rope_type": rope, "factor": factor}
    if rope == "yarn":
        return {"rope_type": "yarn", "factor": draw.choice((factor, factor, None)), **length}
    if rope == "yarn options":
        truncate = {} if kind == "olmo3" else some(truncate=(True, False))  # transformers 5 does not find Olmo 3's
        options = some(beta_fast=(1.5, 2, 4.0, None), beta_slow=(0.25, 0.5, None), attention_factor=(1.0, 1.3))
        return {"rope_type": "yarn", "factor": factor, **length, **options, **truncate}
    if rope == "yarn mscale":
        return {"rope_type": "yarn", "factor": factor, **length, **some(mscale=(1.0, 0.7), mscale_all_dim=(1.0, 0.5))}
    if rope == "llama3":
        low, high = draw.choice(((1.0, 4.0), (1, 2), (0.5, 3.0)))
        return {"rope_type": "llama3", "factor": factor, "low_freq_factor": low, "high_freq_factor": high, **length}
    lists = {"short_factor": rising(1.4), "long_factor": rising(8)}
    if rope == "longrope":
        return {"rope_type": "longrope", **lists, **length}
    return {"rope_type": "longrope", **lists, **length, **some(attention_factor=(1.0, 1.21), factor=(factor, 3.0))}


def _windows(kind: str, layers: int, draw: random.Random) -> dict[str, Any]:
    window = draw.choice((5, 11, 18))
    if kind in ("llama", "olmo2"):
        return draw.choice(({}, {}, {"sliding_window": None}))
    if kind == "mistral":
        return draw.choice(({"sliding_window": window}, {"sliding_window": None}, {}))
    types = [draw.choice(("sliding_attention", "full_attention")) for _ in range(layers)]
    if kind == "olmo3":
        return {"sliding_window": window} | draw.choice(({}, {"layer_types": types}))
    return draw.choice(
        (
            {},
            {"use_sliding_window": False, "sliding_window": window, "max_window_layers": 1},
            {"use_sliding_window": True, "sliding_window": window, "max_window_layers": draw.randrange(layers + 1)},
            {"use_sliding_window": True, "sliding_window": window, "layer_types": types},
            {"use_sliding_window": True, "sliding_window": window},  # max_window_layers is 28: no layer slides
            {"use_sliding_window": False, "sliding_window": None, "layer_types": ["full_attention"] * layers},
        )
    )


def _spelled(config: dict[str, Any], draw: random.Random) -> dict[str, Any]:
    absent = ("rms_norm_eps", "tie_word_embeddings", "hidden_act", "rope_theta", "num_key_value_heads", "head_dim")
    nulls = {key: None for key in absent if key not in config and draw.random() < 0.5}
    if config["model_type"] not in ("llama", "olmo2", "olmo3"):
        nulls.pop("num_key_value_heads", None)
    if "rope_parameters" not in config and "rope_scaling" not in config:
        nulls["rope_scaling"] = None
    texts = ("hidden_size", "num_attention_heads", "rms_norm_eps", "rope_theta", "max_position_embeddings")
    return config | nulls | {key: str(config[key]) for key in texts if key in config and draw.random() < 0.2}
