"""One decoder-only transformer that is Llama, Mistral, Qwen2, Qwen3 or SmolLM2 by its arguments.

Pre-norm blocks with RMSNorm, grouped-query attention, RoPE and SwiGLU. Parameter names are torchtitan's. The input is
a stream of T tokens with their positions and what they may see; nothing here knows about parallelism.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from torchtitan.attention.backends import BACKENDS, Mask
from torchtitan.attention.segments import Segments
from torchtitan.models.attention import Attention
from torchtitan.models.rope import RopeArgs, RopeTables, rope_tables


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
    tied_embeddings: bool = False
    rope: RopeArgs = field(default_factory=RopeArgs)


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
    """Attention and feed-forward, each behind its norm and added to the residual stream."""

    def __init__(self, args: TransformerArgs, attention_backend: str):
        super().__init__()
        self.attention = Attention(
            args.dim,
            args.n_heads,
            args.n_kv_heads,
            args.head_dim,
            args.qkv_bias,
            args.qk_norm,
            args.norm_eps,
            attention_backend,
        )
        self.feed_forward = FeedForward(args.dim, args.ffn_dim)
        self.attention_norm = nn.RMSNorm(args.dim, eps=args.norm_eps)
        self.ffn_norm = nn.RMSNorm(args.dim, eps=args.norm_eps)

    def forward(self, x: torch.Tensor, rope: RopeTables, mask: Mask) -> torch.Tensor:
        """x [T, dim] -> [T, dim]."""
        x = x + self.attention(self.attention_norm(x), rope, mask)
        return x + self.feed_forward(self.ffn_norm(x))


class Transformer(nn.Module):
    """Token ids to logits. With tied embeddings `output.weight` is `tok_embeddings.weight`."""

    def __init__(self, args: TransformerArgs, attention_backend: str = "sdpa"):
        super().__init__()
        self.args = args
        self.backend = BACKENDS[attention_backend]
        self.tok_embeddings = nn.Embedding(args.vocab_size, args.dim)
        self.layers = nn.ModuleDict({str(i): TransformerBlock(args, attention_backend) for i in range(args.n_layers)})
        self.norm = nn.RMSNorm(args.dim, eps=args.norm_eps)
        self.output = nn.Linear(args.dim, args.vocab_size, bias=False)
        self.local_kv_heads = slice(None)
        """Of all key-value heads, those of this rank; tensor parallelism changes it from outside."""
        self.tie_embeddings()

    def tie_embeddings(self) -> None:
        """Make the output matrix the embedding again; whatever replaces parameters must call this."""
        if self.args.tied_embeddings:
            self.output.weight = self.tok_embeddings.weight

    def forward(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        mask: Mask | Segments,
        long: torch.Tensor | None = None,
        rope: RopeArgs | None = None,
    ) -> torch.Tensor:
        """tokens int64 [T], positions int64 [T], what they see -> logits [T, vocab_size].

        long: see rope_tables. rope: instead of the model's own (GeNE draws one a micro-batch; a search tries many).
        """
        if isinstance(mask, Segments):
            mask = Mask(mask, self.backend.prepare(mask)).to(tokens.device)
        tables = rope_tables(rope or self.args.rope, self.args.head_dim, positions, long, self.local_kv_heads)
        x = self.tok_embeddings(tokens)
        for layer in self.layers.values():
            x = layer(x, tables, mask)
        return self.output(self.norm(x))


@torch.no_grad()
def init_weights(model: Transformer, seed: int) -> None:
    """Fill the (possibly sharded) parameters; norms 1, biases 0, matrices normal with std 1 / sqrt(inputs).

    The matrices that write into the residual stream are smaller by sqrt(2 n_layers), so that the sum of all branches
    keeps its variance (GPT-2). The embedding has std 1, or as a matrix of its output if it is tied to it.

    Each parameter is drawn whole from a generator seeded by (seed, its name) and cut to this rank's shard, so the
    values do not depend on the layout. Only one parameter is ever held whole.
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


def parameter_counts(args: TransformerArgs) -> tuple[int, int]:
    """(all parameters, those that multiply activations: all but the input embedding), without allocating any."""
    with torch.device("meta"):
        model = Transformer(args)
    total = sum(p.numel() for p in model.parameters())
    embedding = 0 if args.tied_embeddings else model.tok_embeddings.weight.numel()
    return total, total - embedding
