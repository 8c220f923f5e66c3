"""What a config.json means to transformers, and what it means here: the same facts of both, to be compared.

For the facts nothing is allocated but RoPE, so that files of 405B parameters can be read too.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from torchtitan.models.hf.config_in import read_config
from torchtitan.models.hf.weights import check_weights, load_weights
from torchtitan.models.rope import RopeArgs, inverse_frequencies, rope_for
from torchtitan.models.transformer import Transformer, TransformerArgs

Facts = dict[str, Any]


def in_transformers(folder: Path, lengths: tuple[int, ...]) -> Facts:
    """Any exception of transformers': it does not read the file."""
    config = AutoConfig.from_pretrained(folder)
    kind = config.model_type
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None)
    if kind in ("llama", "olmo2", "mistral"):  # they do not look at it
        types = ["sliding_attention" if kind == "mistral" and window is not None else "full_attention"]
        types *= config.num_hidden_layers
    name = kind.capitalize()
    rotary_class = getattr(import_module(f"transformers.models.{kind}.modeling_{kind}"), name + "RotaryEmbedding")
    ropes = {}
    for layer_type in sorted(set(types)):
        rotary = rotary_class(config)
        by_type = (layer_type,) if kind == "olmo3" else ()
        prefix = f"{layer_type}_" if by_type else ""
        for length in lengths:
            rotary(torch.zeros(1), torch.tensor([[length - 1]]), *by_type)
            frequencies = getattr(rotary, prefix + "inv_freq")
            ropes[layer_type, length] = (frequencies.clone(), getattr(rotary, prefix + "attention_scaling"))
    return {
        "hidden_size": config.hidden_size,
        "layers": config.num_hidden_layers,
        "heads": config.num_attention_heads,
        "key_value_heads": config.num_key_value_heads,
        "head_dim": head_dim,
        "intermediate_size": config.intermediate_size,
        "vocab_size": config.vocab_size,
        "eps": config.rms_norm_eps,
        "tied": config.tie_word_embeddings,
        "windows": tuple(window if t == "sliding_attention" else None for t in types),
        "ropes": ropes,
    }


def here(folder: Path, lengths: tuple[int, ...]) -> Facts:
    """UserError: we do not read the file."""
    return facts_of(read_config(folder), lengths)


def facts_of(args: TransformerArgs, lengths: tuple[int, ...]) -> Facts:
    types = args.layer_types or ("full_attention",) * args.n_layers
    ropes = {}
    for layer_type in sorted(set(types)):
        for length in lengths:
            rope = rope_for(args.rope, length)
            if layer_type == "sliding_attention" and rope.layers == "full_attention":
                rope = RopeArgs(rope.theta)
            frequencies = inverse_frequencies(rope, args.head_dim, torch.float32)
            if rope.scaling:
                frequencies = rope.scaling.of_tokens(frequencies, None, slice(None))
            ropes[layer_type, length] = (frequencies, rope.scaling.magnitude() if rope.scaling else 1.0)
    return {
        "hidden_size": args.dim,
        "layers": args.n_layers,
        "heads": args.n_heads,
        "key_value_heads": args.n_kv_heads,
        "head_dim": args.head_dim,
        "intermediate_size": args.ffn_dim,
        "vocab_size": args.vocab_size,
        "eps": args.norm_eps,
        "tied": args.tied_embeddings,
        "windows": tuple(args.sliding_window if t == "sliding_attention" else None for t in types),
        "ropes": ropes,
    }


def differences(theirs: Facts, ours: Facts) -> list[str]:
    """Each fact that differs, with both values; frequencies to 1e-6 of themselves."""
    found = [
        f"{key}: {theirs[key]} and here {ours[key]}" for key in theirs if key != "ropes" and theirs[key] != ours[key]
    ]
    for key in theirs["ropes"].keys() & ours["ropes"].keys():
        (their_frequencies, their_scale), (frequencies, scale) = theirs["ropes"][key], ours["ropes"][key]
        same = frequencies.shape == their_frequencies.shape and torch.allclose(
            frequencies, their_frequencies, rtol=1e-6, atol=0.0
        )
        if not same or abs(scale / their_scale - 1) > 1e-6:
            found.append(f"RoPE of {key}: {their_frequencies[-3:]} * {their_scale}, here {frequencies[-3:]} * {scale}")
    return found


def ours(folder: Path) -> Transformer:
    """The model in a folder, with its weights. Collective."""
    args = read_config(folder)
    check_weights(folder, args)
    model = Transformer(args)
    load_weights(model, folder)
    return model
