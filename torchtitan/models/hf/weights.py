"""Hugging Face's weights: the names of our parameters there, and safetensors straight into sharded parameters."""

from __future__ import annotations

from pathlib import Path

import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from torch.distributed.checkpoint import HuggingFaceStorageReader

from torchtitan.models.transformer import Transformer, TransformerArgs, parameter_shapes
from torchtitan.tools.errors import UserError

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


def check_weights(folder: Path, args: TransformerArgs, asked: str = "") -> None:
    """Compare names and shapes in the safetensors headers with the model; UserError with the first mismatches.

    Reads headers only, so that a wrong folder is refused before anything is allocated. asked: the TOML keys and values
    that name the folder, for the message.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(
            f"{asked or folder}: the folder has no *.safetensors. Name a folder with the weights, or leave the first "
            "key out to train from scratch."
        )
    for file in files:
        try:
            with safe_open(file, framework="pt") as f:
                for key in f.keys():  # noqa: SIM118  (not a dict)
                    shapes[key] = tuple(f.get_slice(key).get_shape())
        except (SafetensorError, OSError) as e:
            raise UserError(f"{file} cannot be read as safetensors: {e}. Is it whole? Fetch it again.") from None
    expected = {hf_name(name): shape for name, shape in parameter_shapes(args).items()}
    wrong = [
        f"{name} should be {list(shape)} and is {list(shapes[name]) if name in shapes else 'missing'}"
        for name, shape in expected.items()
        if shapes.get(name) != shape
    ]
    # a bias that the file has and the model lacks would be dropped in silence: another architecture
    known = set(expected) | {"lm_head.weight"} if args.tied_embeddings else set(expected)
    extra = [
        f"{name} {list(shape)} has no place in the model"
        for name, shape in shapes.items()
        if name.startswith(("model.", "lm_head.")) and name not in known and not name.endswith("rotary_emb.inv_freq")
    ]
    if wrong or extra:
        lines = (wrong + extra)[:5]
        raise UserError(
            f"The weights in {folder} do not fit the model: {len(wrong)} of {len(expected)} tensors differ, "
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
