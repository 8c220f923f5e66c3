"""config.json out: the inverse of huggingface.read_config.

The RoPE stands in it twice, as transformers 5 reads it (rope_parameters) and as transformers 4 and older servers do
(rope_theta and rope_scaling): a file with only the former gives transformers 4 a theta of 10,000, in silence.
"""

from __future__ import annotations

from typing import Any

from torchtitan.models.rope_config import rope_to_hf
from torchtitan.models.transformer import TransformerArgs
from torchtitan.tools.errors import UserError

_CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
# what an original config.json may say that is not true of what is written: the RoPE's old keys (a top-level
# original_max_position_embeddings would override the one beside the factor), custom code, another format of weights
_STALE = (
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "rope_type",
    "original_max_position_embeddings",
    "auto_map",
    "quantization_config",
    "_name_or_path",
    "transformers_version",
)


def model_type(args: TransformerArgs, original: str | None) -> str:
    """Hugging Face's model_type; UserError where no model there is this one. original: what it was trained from."""
    if args.qkv_bias and args.qk_norm:
        raise UserError("A model with both qkv_bias and qk_norm has no model_type in Hugging Face's config.json.")
    if args.qk_norm:
        return "qwen3"
    if args.qkv_bias:
        return "qwen2"
    return "mistral" if original == "mistral" else "llama"


def config_json(
    args: TransformerArgs, dtype: str, original: dict[str, Any], bos: int | None = None, eos: int | None = None
) -> dict[str, Any]:
    """The config.json of a model; original: that of the folder it was trained from, whose other keys are kept.

    dtype: of the weights. bos, eos: the tokenizer's, where the original has none.
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
        # Mistral's default, and that of Qwen where the switch is on, is a window of 4,096
        "sliding_window": None,
        **_rope(args),
    }
    if kind in ("llama", "qwen3"):
        config["attention_bias"] = False
    if kind == "llama":
        config["mlp_bias"] = False
    if kind in ("qwen2", "qwen3"):
        config["use_sliding_window"] = False
    if "layer_types" in config:
        config["layer_types"] = ["full_attention"] * args.n_layers
    for name, value in (("bos_token_id", bos), ("eos_token_id", eos)):
        given = original.get(name)
        config[name] = value if given is None else given
    return config


def _rope(args: TransformerArgs) -> dict[str, Any]:
    form, length = rope_to_hf(args.rope, args.head_dim)
    config = {"rope_parameters": form, "rope_theta": form["rope_theta"], "max_position_embeddings": length}
    if form["rope_type"] != "default":
        config["rope_scaling"] = {key: value for key, value in form.items() if key != "rope_theta"}
    if form["rope_type"] == "longrope":
        # the only place where transformers 4 looks for the length beyond which the long list holds
        config["original_max_position_embeddings"] = form["original_max_position_embeddings"]
    return config
