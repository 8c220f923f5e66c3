"""Tiny random models of every architecture and RoPE that can be exported, and what is compared of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from torchtitan.attention.segments import Segments
from torchtitan.datasets.tokenizer import load_tokenizer
from torchtitan.extensions.convert.export import write_hugging_face
from torchtitan.extensions.convert.weights import Weights, open_checkpoint, parameter_shapes, write_checkpoint
from torchtitan.models.rope import RopeArgs
from torchtitan.models.rope_method import Scaling
from torchtitan.models.rope_scaling import (
    DynamicNTKScaling,
    GeneScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    NTKScaling,
    YarnScaling,
)
from torchtitan.models.transformer import LayerType, Transformer, TransformerArgs

TOKENIZER = load_tokenizer(Path(__file__).parents[4] / "assets" / "tokenizer").fingerprint
ORIGINAL, TRAINED, HEAD_DIM, VOCABULARY = 64, 256, 16, 128
LLAMA = TransformerArgs(64, 2, 4, 2, HEAD_DIM, 96, VOCABULARY, 1e-5)
_SHORT = tuple(1 + j / 50 for j in range(HEAD_DIM // 2))
_LONG = tuple(1 + j for j in range(HEAD_DIM // 2))
SCALINGS: dict[str, Scaling | None] = {
    "none": None,
    "linear": LinearScaling(4.0),
    "ntk": NTKScaling(4.0),
    "dynamic": DynamicNTKScaling(4.0, ORIGINAL, TRAINED),
    "ntk_by_parts": Llama3Scaling(4.0, 1.0, 32.0, ORIGINAL),
    "yarn": YarnScaling(4.0, ORIGINAL),
    "yarn_options": YarnScaling(4.0, ORIGINAL, 8.0, 2.0, truncate=False, attention_factor=1.0),
    "yarn_mscale": YarnScaling(4.0, ORIGINAL, mscale=1.0, mscale_all_dim=0.7),
    "llama3": Llama3Scaling(8.0, 1.0, 4.0, ORIGINAL),
    "longrope": LongRopeScaling(ORIGINAL, _LONG, _SHORT, 1.1, 4.0),
    "longrope_default": LongRopeScaling(ORIGINAL, _LONG, _SHORT, None, 4.0),
    "gene": GeneScaling(4.0, ORIGINAL),
}
OLMO2 = replace(LLAMA, qk_norm=True, qk_norm_joint=True, post_norm=True, norm_eps=1e-6)
SLIDING: tuple[LayerType, LayerType] = ("sliding_attention", "full_attention")
ARCHITECTURES = {
    "llama": LLAMA,
    "wide_heads": replace(LLAMA, head_dim=24),
    "qwen2": replace(LLAMA, qkv_bias=True, norm_eps=1e-6),
    "qwen3": replace(LLAMA, qk_norm=True, head_dim=24, norm_eps=1e-6),
    "tied": replace(LLAMA, tied_embeddings=True),
    "mistral, windows": replace(LLAMA, layer_types=SLIDING[:1] * 2, sliding_window=50),
    "qwen2, windows": replace(LLAMA, qkv_bias=True, norm_eps=1e-6, layer_types=SLIDING[::-1], sliding_window=50),
    "qwen3, windows": replace(LLAMA, qk_norm=True, norm_eps=1e-6, layer_types=SLIDING, sliding_window=50),
    "olmo2": OLMO2,
    "olmo3": replace(OLMO2, layer_types=SLIDING, sliding_window=50),
}


def with_rope(scaling: Scaling | None, args: TransformerArgs = LLAMA, theta: float = 20000.0) -> TransformerArgs:
    """Olmo 3 rescales RoPE in its full-attention layers only."""
    layers = "full_attention" if args.post_norm and args.layer_types else "all"
    return replace(args, rope=RopeArgs(theta, scaling, layers, TRAINED))


def random_weights(args: TransformerArgs, seed: int = 0) -> Weights:
    """Large enough for logits far from 0; biases and norms are not what they are born as."""
    generator = torch.Generator().manual_seed(seed)
    shapes = parameter_shapes(args)
    tensors = {
        name: torch.randn(shape, generator=generator) * (0.15 if len(shape) == 2 else 0.3)
        + (1.0 if "norm" in name else 0)
        for name, shape in shapes.items()
    }
    return Weights(Path("memory"), args, shapes, {n: t.dtype for n, t in tensors.items()}, tensors.__getitem__)


def save(args: TransformerArgs, folder: Path, seed: int = 0) -> Path:
    """A checkpoint as training writes it: folder/step-0."""
    return write_checkpoint(random_weights(args, seed), folder, {"tokenizer": TOKENIZER, "seq_len": TRAINED})


def export(checkpoint: Path, out: Path, dtype: str | None, assets: Path | None = None, **parts: int) -> None:
    """A checkpoint as a Hugging Face folder, as the trainer writes it."""
    write_hugging_face(open_checkpoint(checkpoint).cast(dtype), out, assets, **parts)


@torch.no_grad()
def our_logits(weights: Weights, tokens: torch.Tensor) -> torch.Tensor:
    """[T, V]; LongRoPE's long list beyond the original length, as transformers does it."""
    model = Transformer(weights.args)
    for name, parameter in model.named_parameters():
        parameter.copy_(weights.read(name))
    long = torch.full((len(tokens),), len(tokens) > ORIGINAL)
    return model(tokens, torch.arange(len(tokens)), Segments.whole((0, len(tokens))), long)


def some_tokens(n: int) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (n,), generator=torch.Generator().manual_seed(n))
