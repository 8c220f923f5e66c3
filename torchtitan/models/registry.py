"""The flavors: published sizes, with the numbers of the models' config.json on the Hugging Face hub."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torchtitan.models.rope import RopeArgs
from torchtitan.models.rope_scaling import Llama3Scaling
from torchtitan.models.transformer import LayerType, TransformerArgs


def _args(dim: int, n_layers: int, n_heads: int, n_kv_heads: int, ffn_dim: int, **others: Any) -> TransformerArgs:
    others.setdefault("head_dim", dim // n_heads)
    return TransformerArgs(dim, n_layers, n_heads, n_kv_heads, ffn_dim=ffn_dim, **others)


def _rope(theta: float, length: int, llama3_factor: float | None = None) -> RopeArgs:
    scaling = Llama3Scaling(llama3_factor, 1.0, 4.0, 8192) if llama3_factor else None
    return RopeArgs(theta, scaling, max_position_embeddings=length)


_LLAMA = {"vocab_size": 32000, "rope": _rope(1e4, 2048), "norm_eps": 1e-6}
_LLAMA2 = {"vocab_size": 32000, "rope": _rope(1e4, 4096)}
_LLAMA3 = {"vocab_size": 128256, "rope": _rope(5e5, 8192)}
_LLAMA3_1 = {"vocab_size": 128256, "rope": _rope(5e5, 131072, 8.0)}
_LLAMA3_2 = {"vocab_size": 128256, "rope": _rope(5e5, 131072, 32.0), "tied_embeddings": True}
_QWEN2_5 = {"vocab_size": 151936, "rope": _rope(1e6, 32768), "norm_eps": 1e-6, "qkv_bias": True}
_QWEN2_5_TIED = {**_QWEN2_5, "tied_embeddings": True}
_QWEN2_5_7B = {**_QWEN2_5, "vocab_size": 152064}
_QWEN2_5_LARGE = {**_QWEN2_5_7B, "norm_eps": 1e-5}
_QWEN3 = {"vocab_size": 151936, "rope": _rope(1e6, 40960), "norm_eps": 1e-6, "qk_norm": True, "head_dim": 128}
_QWEN3_TIED = {**_QWEN3, "tied_embeddings": True}
# Before its extension to 65,536 tokens by YaRN (factor 8) in the layers without a window, which a stage here must do.
# Checked against copies of the config.json of the 7B and 32B Instruct and Think models, not of the base models.
_OLMO3 = {
    "vocab_size": 100278,
    "rope": RopeArgs(5e5, layers="full_attention", max_position_embeddings=8192),
    "norm_eps": 1e-6,
    "qk_norm": True,
    "qk_norm_joint": True,
    "post_norm": True,
    "sliding_window": 4096,
}
_THREE_SLIDE: tuple[LayerType, ...] = (*("sliding_attention",) * 3, "full_attention")
_SMOLLM2 = {"vocab_size": 49152, "rope": _rope(1e5, 8192), "tied_embeddings": True}

FLAVORS: dict[str, TransformerArgs] = {
    # 6.8M parameters, for the demo and the tests; its vocabulary is that of assets/tokenizer
    "debugmodel": _args(256, 6, 4, 2, 768, vocab_size=4096, rope=RopeArgs(1e4)),
    "llama_7b": _args(4096, 32, 32, 32, 11008, **_LLAMA),
    "llama2_7b": _args(4096, 32, 32, 32, 11008, **_LLAMA2),
    "llama2_13b": _args(5120, 40, 40, 40, 13824, **_LLAMA2),
    "llama2_70b": _args(8192, 80, 64, 8, 28672, **_LLAMA2),
    "llama3_8b": _args(4096, 32, 32, 8, 14336, **_LLAMA3),
    "llama3_70b": _args(8192, 80, 64, 8, 28672, **_LLAMA3),
    "llama3_405b": _args(16384, 126, 128, 8, 53248, **_LLAMA3),
    "llama3.1_8b": _args(4096, 32, 32, 8, 14336, **_LLAMA3_1),
    "llama3.1_70b": _args(8192, 80, 64, 8, 28672, **_LLAMA3_1),
    "llama3.1_405b": _args(16384, 126, 128, 8, 53248, **_LLAMA3_1),
    "llama3.2_1b": _args(2048, 16, 32, 8, 8192, **_LLAMA3_2),
    "llama3.2_3b": _args(3072, 28, 24, 8, 8192, **_LLAMA3_2),
    "mistral_7b_v0.3": _args(4096, 32, 32, 8, 14336, vocab_size=32768, rope=_rope(1e6, 32768)),
    "qwen2.5_0.5b": _args(896, 24, 14, 2, 4864, **_QWEN2_5_TIED),
    "qwen2.5_1.5b": _args(1536, 28, 12, 2, 8960, **_QWEN2_5_TIED),
    "qwen2.5_3b": _args(2048, 36, 16, 2, 11008, **_QWEN2_5_TIED),
    "qwen2.5_7b": _args(3584, 28, 28, 4, 18944, **_QWEN2_5_7B),
    "qwen2.5_14b": _args(5120, 48, 40, 8, 13824, **_QWEN2_5_LARGE),
    "qwen2.5_32b": _args(5120, 64, 40, 8, 27648, **_QWEN2_5_LARGE),
    "qwen2.5_72b": _args(8192, 80, 64, 8, 29568, **_QWEN2_5_LARGE),
    "qwen3_0.6b": _args(1024, 28, 16, 8, 3072, **_QWEN3_TIED),
    "qwen3_1.7b": _args(2048, 28, 16, 8, 6144, **_QWEN3_TIED),
    "qwen3_4b": _args(2560, 36, 32, 8, 9728, **_QWEN3_TIED),
    "qwen3_8b": _args(4096, 36, 32, 8, 12288, **_QWEN3),
    "qwen3_14b": _args(5120, 40, 40, 8, 17408, **_QWEN3),
    "qwen3_32b": _args(5120, 64, 64, 8, 25600, **_QWEN3),
    "olmo3_7b": _args(4096, 32, 32, 32, 11008, layer_types=_THREE_SLIDE * 8, **_OLMO3),
    "olmo3_32b": _args(5120, 64, 40, 8, 27648, layer_types=_THREE_SLIDE * 16, **_OLMO3),
    "smollm2_135m": _args(576, 30, 9, 3, 1536, **_SMOLLM2),
    "smollm2_360m": _args(960, 32, 15, 5, 2560, **_SMOLLM2),
    "smollm2_1.7b": replace(_args(2048, 24, 32, 32, 8192, **_SMOLLM2), rope=_rope(130000.0, 8192)),
}
