"""Peak memory of a rank: bytes by kind at the few moments of a step that can be the highest.

A formula a function, each for one rank, in bytes. They follow what the code allocates: parameters, gradients and
moments cut over FSDP's ranks; what FSDP2 gathers and reduces; what autograd keeps of a block (the inputs of its matrix
products, of its norms and of attention); the loss head's tiles; the keys and values of other ranks. A test holds them
against what a training step really allocates on the CPU (tests/distributed/test_planner.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from torchtitan.extensions.planner.stage_numbers import StageNumbers
from torchtitan.models.transformer import TransformerArgs, parameter_shapes

WIDE = 4
"""Bytes of float32, in which gradients are reduced and softmax is computed."""

CONTEXT_GIB = 2.0
"""CUDA context, libraries' workspaces and NCCL's buffers. An assumption: nothing has been measured on a GPU."""

FRAGMENTATION = 0.05
"""Share of the tensors' bytes that the allocator holds beside them, with expandable segments. An assumption too."""

IN_FLIGHT = 3
"""Checkpoints on their way to the host or back that are held on the device."""

Kinds = Mapping[str, float]


@dataclass(frozen=True)
class Moment:
    """A point of a training step, and the bytes that live there, by kind."""

    name: str
    kinds: Kinds

    @property
    def total(self) -> float:
        return sum(self.kinds.values())


@dataclass(frozen=True)
class Sizes:
    """Numbers of parameters of a tensor-parallel rank, over FSDP's ranks."""

    block: int
    embedding: int
    """The input embedding; 0 where it is the output matrix."""
    head: int
    """Output matrix and last norm."""
    blocks: int


def sizes(stage: StageNumbers) -> Sizes:
    """Matrices and their biases are cut over tensor-parallel ranks, norms are not."""
    return _sizes(stage.args, stage.tp)


@lru_cache(maxsize=64)
def _sizes(args: TransformerArgs, tp: int) -> Sizes:
    embedding, blocks, head = 0, 0, 0
    for name, shape in parameter_shapes(args).items():
        numel = math.prod(shape) // (1 if "norm" in name else tp)
        if name.startswith("layers."):
            blocks += numel
        elif name.startswith("tok_embeddings") and not args.tied_embeddings:
            embedding += numel
        else:
            head += numel
    return Sizes(blocks // args.n_layers, embedding, head, blocks)


def shard(stage: StageNumbers) -> float:
    """Parameters that a rank stores."""
    s = sizes(stage)
    return (s.blocks + s.embedding + s.head) / stage.fsdp


# ---- parameters, gradients, optimizer, and what FSDP moves -----------------------------------------------------------


def on_device(stage: StageNumbers, size: float) -> float:
    """0 where parameters, gradients and optimizer state live in host memory and that is another."""
    return 0 if stage.offload_parameters and stage.device == "cuda" else size


def parameters(stage: StageNumbers) -> float:
    return shard(stage) * stage.stored


def gradients(stage: StageNumbers) -> float:
    """Of all parameters: from the first backward to the optimizer's step."""
    return shard(stage) * stage.stored


def optimizer(stage: StageNumbers) -> float:
    """AdamW's two moments."""
    return shard(stage) * 2 * stage.state


def gathered(stage: StageNumbers, numel: int, buffers: int = 1) -> float:
    """Parameters in full, in the type of the computation: a copy to compute with, and FSDP's flat buffers."""
    return numel * stage.computed * (1 + buffers)


def reduced(stage: StageNumbers, numel: int) -> float:
    """FSDP's flat input of a reduce-scatter, in float32; it stays until the next one."""
    return numel * WIDE


# ---- what autograd keeps of a block ----------------------------------------------------------------------------------


def stream(stage: StageNumbers, copies: float = 1) -> float:
    """The residual stream [T, dim], cut along its tokens by tensor parallelism."""
    return copies * stage.tokens / stage.tp * stage.args.dim * stage.computed


def gathered_stream(stage: StageNumbers, copies: float = 1) -> float:
    """The same on every tensor-parallel rank whole: the input of matrices that are cut by their outputs."""
    return copies * stage.tokens * stage.args.dim * stage.computed


def norm_extra(stage: StageNumbers, width: float) -> float:
    """What RMSNorm keeps of an input [T, width] beside its result, which the next matrix keeps.

    CUDA's fused kernel keeps the input. On the CPU it is a chain of operators that keeps a float32 copy, where that is
    one, and the normalised float32 values.
    """
    numel = stage.tokens * width
    if stage.device == "cuda":
        return numel * stage.computed
    return numel * WIDE * 2


def head_widths(stage: StageNumbers) -> tuple[float, float]:
    """Width of a rank's query heads, and of its key or value heads."""
    args = stage.args
    return args.n_heads * args.head_dim / stage.tp, args.n_kv_heads * args.head_dim / stage.tp


def repeated_kv(stage: StageNumbers) -> float:
    """How often ulysses repeats key-value heads so that every rank has a whole number of them."""
    if stage.exchange != "ulysses" or stage.cp == 1:
        return 1
    heads = stage.args.n_kv_heads // stage.tp
    return math.lcm(heads, stage.cp) / heads


def kv_buffer(stage: StageNumbers) -> float:
    """The keys and values that attention reads: a rank's own, or with context parallelism a buffer of all it sees."""
    width = head_widths(stage)[1] * repeated_kv(stage)
    if stage.exchange == "ulysses":
        return stage.stream * 2 * width / stage.cp * stage.computed / stage.head_chunks
    return stage.keys * 2 * width * stage.computed


def attention_kept(stage: StageNumbers) -> Kinds:
    """Queries, keys, values, output, and the log-sum-exp of each query and head."""
    queries, kv = head_widths(stage)
    t, w = stage.tokens, stage.computed
    heads = stage.args.n_heads / stage.tp
    kept = t * (2 * queries * w + heads * WIDE)
    if stage.cp > 1 and stage.exchange == "ulysses":
        kept += t * queries * w  # the output once more, back in the order of tokens, for the matrix behind it
    if stage.args.qk_norm:
        kept += norm_extra(stage, queries + kv)
    return {"attention": kept, "keys and values": kv_buffer(stage)}


def kept_anyway(stage: StageNumbers) -> float:
    """Of a recomputed block, what selective checkpointing keeps: attention's output and log-sum-exp, and the results of
    every n-th matrix product."""
    if not stage.keeps_attention:
        return 0
    args, (queries, kv) = stage.args, head_widths(stage)
    kept = stage.tokens * (queries * stage.computed + args.n_heads / stage.tp * WIDE)
    if stage.kept_products:
        inner = [] if stage.mlp_tile is not None else [args.ffn_dim / stage.tp] * 2 + [args.dim]
        widths = [kv, kv, queries, args.dim, *inner]
        kept += stage.tokens * sum(widths[stage.kept_products - 1 :: stage.kept_products]) * stage.computed
    return kept


def norms_kept(stage: StageNumbers) -> float:
    """Both norms' inputs and results. A block's own input is counted as its checkpoint."""
    extra = 2 * norm_extra(stage, stage.args.dim / stage.tp)
    if stage.device == "cuda":
        extra -= stream(stage)
    return gathered_stream(stage, 2) + extra


def feed_forward_kept(stage: StageNumbers) -> float:
    """Results of w1, of silu, of w3, and their product, which w2 reads; in tiles, nothing."""
    return 4 * hidden(stage) if stage.mlp_tile is None else 0


def hidden(stage: StageNumbers) -> float:
    """One tensor [T, ffn_dim], or of a tile's tokens."""
    tokens = stage.tokens if stage.mlp_tile is None else min(stage.tokens, stage.mlp_tile * stage.tp)
    return tokens * stage.args.ffn_dim / stage.tp * stage.computed


def feed_forward_backward(stage: StageNumbers) -> float:
    """Beside what is kept: gradients of the product and of its two factors, while the product is gone already. In
    tiles: the same of a tile, with what is computed anew of it, the gradient of the input, and those of the matrices
    summed in float32."""
    if stage.mlp_tile is None:
        return 2 * hidden(stage)
    matrices = 3 * stage.args.dim * stage.args.ffn_dim / stage.tp
    return 6 * hidden(stage) + stream(stage) + matrices * (WIDE + stage.computed)


def block_kept(stage: StageNumbers) -> Kinds:
    """All that backward of one block reads, but its input."""
    return {**attention_kept(stage), "norms": norms_kept(stage), "feed-forward": feed_forward_kept(stage)}


def backward_extra(stage: StageNumbers) -> tuple[Kinds, Kinds]:
    """What backward of a block allocates beside what forward has kept: in its feed-forward, and in its attention.

    Attention: gradients of queries, keys, values and output, on the CPU in float32 first; the feed-forward's tensors
    are gone.
    """
    queries, _ = head_widths(stage)
    w, wide = stage.computed, WIDE if stage.device == "cpu" else 0
    gradient = stream(stage) + (gathered_stream(stage) if stage.tp > 1 else 0)
    kv = kv_buffer(stage)
    kv_gradients = kv * (1 + wide / w)
    if stage.cp > 1 and stage.exchange != "ulysses":
        kv_gradients = max(kv_gradients, kv * 3)  # a buffer for keys, one for values, both filled up with zeros
    q = stage.tokens * queries
    attention = {
        "gradients of activations": gradient + q * (2 * w + wide) + kv_gradients,
        "feed-forward": -feed_forward_kept(stage),
    }
    return {"gradients of activations": gradient + feed_forward_backward(stage)}, attention


def worst_of_block(stage: StageNumbers) -> Kinds:
    """A block in backward: what is kept (or computed anew) of it, and what backward adds, at its higher moment."""
    kept = block_kept(stage)
    return max((add(kept, extra) for extra in backward_extra(stage)), key=lambda kinds: sum(kinds.values()))


def add(*parts: Kinds) -> Kinds:
    total: dict[str, float] = {}
    for part in parts:
        for kind, value in part.items():
            total[kind] = total.get(kind, 0) + value
    return total


def kept_by(stage: StageNumbers, layers: int) -> Kinds:
    """What `layers` blocks keep from forward to backward, some of them recomputed."""
    again = layers * stage.recomputed_blocks
    on_device = min(again, IN_FLIGHT) if stage.offload_checkpoints and stage.device == "cuda" else again
    recomputed = {"checkpoints of blocks": stream(stage, on_device), "attention": again * kept_anyway(stage)}
    whole = layers - again
    # on the CPU the norms have copies of the blocks' inputs
    inputs = {"checkpoints of blocks": stream(stage, whole)} if stage.device == "cuda" else {}
    return add(recomputed, inputs, {kind: value * whole for kind, value in block_kept(stage).items()})


# ---- the two ends of the model ---------------------------------------------------------------------------------------


def inputs_and_rope(stage: StageNumbers) -> float:
    """Tokens, labels, positions (int64), and cos and sin in float32."""
    return stage.tokens * (3 * 8 + stage.args.head_dim * WIDE)


def head_forward(stage: StageNumbers) -> float:
    """The loss head, which computes gradients in its forward: those of its input and (float32) of its matrix, a tile of
    logits in float32 and in the type of the computation, the matrix's gradient of one tile; and the last norm."""
    w, words = stage.computed, stage.args.vocab_size / stage.tp
    tile = min(stage.loss_tile, stage.tokens * words * WIDE)
    matrix = words * stage.args.dim
    narrow = w / WIDE if w < WIDE else 0
    return last_norm(stage) + gathered_stream(stage, 2) + matrix * (WIDE + w) + tile * (1 + narrow)


def last_norm(stage: StageNumbers) -> float:
    return norm_extra(stage, stage.args.dim / stage.tp)


def head_backward(stage: StageNumbers) -> float:
    """Both gradients, and their products with the loss's own gradient in the type of the computation."""
    matrix = stage.args.vocab_size / stage.tp * stage.args.dim
    return last_norm(stage) + gathered_stream(stage, 2) + matrix * (WIDE + stage.computed)


# ---- the moments of a step -------------------------------------------------------------------------------------------


def moments(stage: StageNumbers) -> list[Moment]:
    """Where a step can have its peak. Gradients are there from the second micro-batch's forward on."""
    s, kept = sizes(stage), kept_by(stage, stage.args.n_layers)
    static = {
        "parameters": on_device(stage, parameters(stage)),
        "optimizer": on_device(stage, optimizer(stage)),
        "inputs, RoPE": inputs_and_rope(stage),
    }
    whole = {"gradients": on_device(stage, gradients(stage))}
    if stage.dp_replicate > 1 and stage.accumulation > 1:  # FSDP's sums before the all-reduce, in float32 on the device
        whole = {"gradients": shard(stage) * WIDE}
    so_far = whole if stage.accumulation > 1 else {}
    head_only = so_far or {"gradients": on_device(stage, s.head / stage.fsdp * stage.stored)}
    if not stage.reshard:
        kept = add(kept, {"gathered parameters": gathered(stage, s.blocks, buffers=0)})
    tied = {"gathered parameters": gathered(stage, s.head)} if stage.args.tied_embeddings else {}
    head = add(static, so_far, kept, {"gathered parameters": gathered(stage, s.head)})
    # the block in backward: its share of `kept`, if it is not recomputed, is what it computes with
    block = add(worst_of_block(stage), tied)
    if stage.recomputed_blocks < 1:
        block = add(block, {kind: -value for kind, value in block_kept(stage).items()})
    else:  # nor is what selective checkpointing has kept of it computed anew
        block = add(block, {"attention": -kept_anyway(stage)})
    block = add(
        block,
        {
            "gathered parameters": gathered(stage, s.block, 2 if stage.fsdp > 1 else 1),
            "gradients being reduced": s.block * stage.computed,
        },
    )
    last = {"gradients being reduced": reduced(stage, s.head)}
    previous = {"gradients being reduced": reduced(stage, s.block)}
    embedding = {"gradients being reduced": (s.embedding or s.head) * (stage.computed + WIDE)}
    return [
        Moment("loss head, forward", add(head, {"loss head": head_forward(stage)})),
        Moment("loss head, backward", add(head, {"loss head": head_backward(stage)})),
        Moment("backward of the last block", add(static, head_only, kept, block, last)),
        Moment("backward of the first block", add(static, whole, kept_by(stage, 1), block, previous)),
        Moment("backward of the embedding", add(static, whole, tied, embedding, previous)),
        Moment("optimizer", add(static, whole, {"optimizer's temporaries": parameters(stage) * stage.foreach})),
    ]


def peak(stage: StageNumbers) -> Moment:
    """The highest of them."""
    return max(moments(stage), key=lambda moment: moment.total)


def peak_gib(stage: StageNumbers) -> float:
    """GiB that a rank needs; on a GPU with what the tensors do not show."""
    gib = peak(stage).total / 2**30
    return gib * (1 + FRAGMENTATION) + CONTEXT_GIB if stage.device == "cuda" else gib
