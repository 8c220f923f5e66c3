"""What a model multiplies: parameters and attention, once in forward, twice in backward, and again if recomputed.

FLOPs count only the attention that the mask allows: they are what MFU and HFU are made of. MFU counts what the model
needs, forward and backward; HFU what the hardware is made to do, recomputation included (PaLM, arXiv 2204.02311,
appendix B; Korthikanti et al., arXiv 2205.05198). Neither counts padding, nor the logits that a flash kernel computes
again inside its backward.
"""

from __future__ import annotations

from dataclasses import dataclass

from torchtitan.config.schema import JobConfig
from torchtitan.models.transformer import TransformerArgs


@dataclass(frozen=True)
class Work:
    """Parameters that multiply a token's activations, and the width that multiplies a (query, key) pair; over all
    layers."""

    projections: float
    """wq, wk, wv and wo."""

    inner: float
    """w1 and w3 of the feed-forward."""

    outer: float
    """Its w2."""

    output: float
    """The output matrix."""

    width: float
    """layers * heads * head_dim: see forward_flops."""

    @property
    def parameters(self) -> float:
        """All that multiply a token's activations."""
        return self.projections + self.inner + self.outer + self.output


@dataclass(frozen=True)
class Recomputed:
    """What backward computes a second time, in the units of Work."""

    parameters: float = 0
    width: float = 0


def work_of(args: TransformerArgs) -> Work:
    """The work of the whole model. Norms and biases multiply or add element by element and are not counted."""
    heads, kv = args.n_heads * args.head_dim, args.n_kv_heads * args.head_dim
    layers, dim, ffn = args.n_layers, args.dim, args.ffn_dim
    return Work(
        projections=layers * dim * 2 * (heads + kv),
        inner=layers * 2 * dim * ffn,
        outer=layers * dim * ffn,
        output=args.vocab_size * dim,
        width=layers * heads,
    )


@dataclass(frozen=True)
class Checkpointing:
    """Which results of a model's blocks backward computes anew, by [activation_checkpoint]."""

    blocks: float
    """The share of blocks that are recomputed."""

    keeps_attention: bool
    """Whether recomputed blocks keep the output of their attention."""

    kept_products: int
    """If so, they also keep every n-th matrix product; 0: none."""


def checkpointing_of(config: JobConfig, args: TransformerArgs) -> Checkpointing:
    """What distributed/activation_checkpoint.py does with a model under this configuration."""
    ac = config.activation_checkpoint
    option = ac.selective_ac_option if ac.mode == "selective" else ""
    every = 0 if ac.mode == "none" else int(option) if option not in ("", "op") else 1
    return Checkpointing(
        blocks=-(-args.n_layers // every) / args.n_layers if every else 0,
        keeps_attention=option == "op",
        kept_products=0 if config.compile.enable else ac.selective_ac_matmuls,
    )


def recomputed_by(config: JobConfig, args: TransformerArgs) -> Recomputed:
    """What backward computes a second time under this configuration, over the whole model.

    Tiles of the feed-forward and chunks of heads recompute themselves, in every block.

    The last product of a block is not recomputed if nothing that backward reads comes after it: PyTorch ends the
    recomputation with the last tensor that is read, which is w2's input unless a norm follows.
    """
    kept = checkpointing_of(config, args)
    work = work_of(args)
    projections, width = work.projections * kept.blocks, work.width * kept.blocks
    inner, outer = work.inner * kept.blocks, work.outer * kept.blocks * args.post_norm
    if kept.keeps_attention:
        width = 0
        if kept.kept_products:
            heads, kv = args.n_heads * args.head_dim, args.n_kv_heads * args.head_dim
            products = [kv, kv, heads, heads, args.ffn_dim, args.ffn_dim]  # widths beside dim, in order of execution
            products += [args.ffn_dim] * args.post_norm
            done = [0 if (i + 1) % kept.kept_products == 0 else size for i, size in enumerate(products)]
            layers = args.n_layers * kept.blocks * args.dim
            projections, inner, outer = (layers * sum(done[part]) for part in (slice(4), slice(4, 6), slice(6, 7)))
    if config.training.mlp_tile_tokens is not None:
        # in backward; also in the recomputation of their block, if a norm follows them
        times = 1 + kept.blocks * args.post_norm
        inner, outer = work.inner * times, work.outer * times
    if config.parallelism.context_parallel_head_chunks > 1:
        width = work.width
    return Recomputed(projections + inner + outer, width)


def training_flops(matmul_parameters: float, tokens: float, attention_width: float, attended_pairs: float) -> float:
    """FLOPs of forward and backward without recomputation.

    Each parameter that multiplies activations costs 6 FLOPs per token (PaLM, appendix B). Each allowed (query, key)
    pair costs, for each unit of attention_width = layers * heads * head_dim, 2 for the logit and 2 for the value, three
    times over for forward and backward.
    """
    return 3 * forward_flops(matmul_parameters, tokens, attention_width, attended_pairs)


def forward_flops(matmul_parameters: float, tokens: float, attention_width: float, attended_pairs: float) -> float:
    """FLOPs of forward alone, or of its recomputation."""
    return 2.0 * matmul_parameters * tokens + 4.0 * attention_width * attended_pairs
