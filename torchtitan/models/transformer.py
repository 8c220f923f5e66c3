"""One decoder-only transformer that is Llama, Mistral, Qwen2, Qwen3, SmolLM2, Olmo 2 or Olmo 3 by its arguments.

Blocks with RMSNorm before or after each branch, grouped-query attention over all tokens or within a sliding window,
RoPE and SwiGLU. Parameter names are torchtitan's. The input is a stream of T tokens with their positions and masks;
nothing here knows about parallelism. What distributed/parallelize.py changes from outside, beside the parameters:

- `attention.core` of every block: context parallelism; its `backend`: selective recomputation;
- `mlp` of every block: tiles of the feed-forward;
- `forward` of every block: compilation, then recomputation around it;
- `local_kv_heads` of the model: tensor parallelism;
- `output.tile_bytes` and `output.z_loss`: [training].
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from torchtitan.attention.backends import BACKENDS, Mask, Masks
from torchtitan.attention.segments import Segments
from torchtitan.models.attention import Attention
from torchtitan.models.loss_head import OutputHead
from torchtitan.models.rope import RopeArgs, RopeTables, rope_tables

LayerType = Literal["full_attention", "sliding_attention"]


@dataclass(frozen=True)
class TransformerArgs:
    """Architecture. head_dim times n_heads need not equal dim (Qwen3)."""

    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    ffn_dim: int
    vocab_size: int
    norm_eps: float = 1e-5
    qkv_bias: bool = False
    qk_norm: bool = False

    qk_norm_joint: bool = False
    """The QK norm is over all heads together, before they are split (Olmo 2 and 3)."""

    post_norm: bool = False
    """The outputs of attention and feed-forward are normalised before they are added, and their inputs are not."""

    tied_embeddings: bool = False
    rope: RopeArgs = field(default_factory=RopeArgs)

    layer_types: tuple[LayerType, ...] = ()
    """What each layer attends to; empty: full attention in all of them."""

    sliding_window: int | None = None
    """How many tokens a token sees at most in layers with a sliding window, itself included."""

    def __post_init__(self) -> None:
        unknown = set(self.layer_types) - {"full_attention", "sliding_attention"}
        if unknown or len(self.layer_types) not in (0, self.n_layers):
            raise ValueError(f"layer_types = {self.layer_types} must name the kinds of all {self.n_layers} layers")
        if (self.sliding_window is not None) != ("sliding_attention" in self.layer_types):
            raise ValueError(f"sliding_window = {self.sliding_window} does not fit layer_types = {self.layer_types}")
        if self.head_dim % 2 or self.n_heads % self.n_kv_heads:
            raise ValueError(
                f"head_dim = {self.head_dim} must be even, and n_heads = {self.n_heads} a multiple of "
                f"n_kv_heads = {self.n_kv_heads}"
            )

    @property
    def sliding_share(self) -> float:
        """The share of layers that have a sliding window."""
        return self.layer_types.count("sliding_attention") / self.n_layers


class FeedForward(nn.Module):
    """SwiGLU (arXiv 2002.05202): w2(silu(w1 x) * w3 x)."""

    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        self.w1 = nn.Linear(dim, hidden_dim, bias=False)
        self.w2 = nn.Linear(hidden_dim, dim, bias=False)
        self.w3 = nn.Linear(dim, hidden_dim, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, dim] -> [T, dim]."""
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class TransformerBlock(nn.Module):
    """Attention and feed-forward, each after its norm, or before it, added to the residual stream."""

    def __init__(self, args: TransformerArgs, attention_backend: str):
        super().__init__()
        self.attention = Attention(
            args.dim,
            args.n_heads,
            args.n_kv_heads,
            args.head_dim,
            args.qkv_bias,
            args.qk_norm,
            args.qk_norm_joint,
            args.norm_eps,
            attention_backend,
        )
        self.feed_forward = FeedForward(args.dim, args.ffn_dim)
        self.post_norm = args.post_norm
        # named by their places, so that the name alone says which of Hugging Face's parameters it is
        if args.post_norm:
            self.attention_post_norm = nn.RMSNorm(args.dim, eps=args.norm_eps)
            self.ffn_post_norm = nn.RMSNorm(args.dim, eps=args.norm_eps)
        else:
            self.attention_norm = nn.RMSNorm(args.dim, eps=args.norm_eps)
            self.ffn_norm = nn.RMSNorm(args.dim, eps=args.norm_eps)

    def forward(self, x: torch.Tensor, rope: RopeTables, mask: Mask) -> torch.Tensor:
        """x [T, dim] -> [T, dim]."""
        if self.post_norm:
            x = x + self.attention_post_norm(self.attention(x, rope, mask))
            return x + self.ffn_post_norm(self.mlp(x))
        x = x + self.attention(self.attention_norm(x), rope, mask)
        return x + self.mlp(self.ffn_norm(x))

    def mlp(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, dim] -> [T, dim]. options/tiled_mlp.py replaces it by a function that takes some tokens at a time."""
        return self.feed_forward(x)


class Transformer(nn.Module):
    """Token ids to logits, or to the loss. With tied embeddings `output.weight` is `tok_embeddings.weight`."""

    def __init__(self, args: TransformerArgs, attention_backend: str = "sdpa"):
        super().__init__()
        self.args = args
        self.backend = BACKENDS[attention_backend]
        self.tok_embeddings = nn.Embedding(args.vocab_size, args.dim)
        self.layers = nn.ModuleDict({str(i): TransformerBlock(args, attention_backend) for i in range(args.n_layers)})
        self.norm = nn.RMSNorm(args.dim, eps=args.norm_eps)
        self.output = OutputHead(args.dim, args.vocab_size)
        self.local_kv_heads = slice(None)
        """Of all key-value heads, those of this rank."""
        self.tie_embeddings()

    def tie_embeddings(self) -> None:
        """Make the output matrix the embedding again; code that replaces parameters must call this."""
        if self.args.tied_embeddings:
            self.output.weight = self.tok_embeddings.weight

    def forward(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        masks: Masks | Segments,
        long: torch.Tensor | None = None,
        rope: RopeArgs | None = None,
        labels: torch.Tensor | None = None,
        divisor: float = 1.0,
        only: torch.Tensor | None = None,
    ) -> Any:
        """tokens int64 [T], positions int64 [T], masks -> logits [T, vocab_size].

        labels, divisor: if given, the result is (loss to differentiate, token losses), as from OutputHead.
        only: int64 [R], the only tokens whose logits are returned, [R, vocab_size]; those of a long row would not fit.

        masks: of each kind of layer; or Segments without a window, to which the model adds that of its sliding layers.
        long: see rope_tables. rope: instead of the model's own (GeNE draws one per micro-batch; a search tries many).
        """
        args, rope = self.args, rope or self.args.rope
        if isinstance(masks, Segments):
            masks = self._masks_of(masks, tokens.device)
        window = masks["sliding_attention"].segments.window if args.sliding_share else None
        if window != args.sliding_window:
            raise ValueError(f"the mask's window is {window}, the model's {args.sliding_window}")
        tables = rope_tables(rope, args.head_dim, positions, long, self.local_kv_heads)
        sliding_tables = tables
        if args.sliding_window is not None and rope.layers == "full_attention" and rope.scaling is not None:
            sliding_tables = rope_tables(RopeArgs(rope.theta), args.head_dim, positions)
        x = self.tok_embeddings(tokens)
        by_kind = {"full_attention": tables, "sliding_attention": sliding_tables}
        kinds = args.layer_types or ("full_attention",) * args.n_layers
        for kind, layer in zip(kinds, self.layers.values(), strict=True):
            x = layer(x, by_kind[kind], masks[kind])
        x = self.norm(x)
        if labels is not None:
            return self.output(x, labels, divisor)
        return self.output(x) if only is None else self.output(x, only=only)

    def _masks_of(self, segments: Segments, device: torch.device) -> Masks:
        """Of all layers if every key is on this rank."""
        windowed = replace(segments, window=self.args.sliding_window)
        kinds = {"full_attention": segments, "sliding_attention": windowed}
        present = set(self.args.layer_types) or {"full_attention"}
        return {kind: Mask(kinds[kind], self.backend.prepare(kinds[kind])).to(device) for kind in sorted(present)}


@torch.no_grad()
def init_weights(model: Transformer, seed: int) -> None:
    """Fill the (possibly sharded) parameters; norms 1, biases 0, matrices normal with std 1 / sqrt(inputs).

    The matrices that write into the residual stream are smaller by sqrt(2 n_layers), so that the sum of all branches
    keeps its variance (GPT-2). The embedding has std 1, or that of the output matrix if it is tied to it.

    Each parameter is drawn whole from a generator seeded by (seed, its name) and cut to this rank's shard, so the
    values do not depend on the layout; a GPU draws other values than a CPU. Only one parameter is held whole at a time.
    """
    for name, param in model.named_parameters():
        if name.endswith("bias"):
            param.zero_()
        elif "norm" in name:
            param.fill_(1.0)
        else:
            # 32 bits: the CPU generator ignores the rest of a seed
            generator = torch.Generator(param.device).manual_seed(zlib.crc32(f"{seed} {name}".encode()))
            std = param.shape[-1] ** -0.5
            if name.endswith(("wo.weight", "w2.weight")):
                std /= (2 * model.args.n_layers) ** 0.5
            elif name == "tok_embeddings.weight" and not model.args.tied_embeddings:
                std = 1.0
            full = torch.randn(param.shape, generator=generator, device=param.device, dtype=torch.float32) * std
            full = full.to(param.dtype)
            if isinstance(param, DTensor):
                full = distribute_tensor(full, param.device_mesh, param.placements, src_data_rank=None)
            param.copy_(full)


def parameter_shapes(args: TransformerArgs) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the parameters, in the model's order, without allocating any."""
    with torch.device("meta"):
        return {name: tuple(p.shape) for name, p in Transformer(args).named_parameters()}


def parameter_counts(args: TransformerArgs) -> tuple[int, int]:
    """(all parameters, those that multiply activations: all but the input embedding), without allocating any."""
    total = sum(math.prod(shape) for shape in parameter_shapes(args).values())
    return total, total - (0 if args.tied_embeddings else args.vocab_size * args.dim)
