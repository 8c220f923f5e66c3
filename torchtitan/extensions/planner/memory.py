"""Peak memory of a rank: bytes by kind at the few moments of a step that can be the highest.

One function per formula, and each returns bytes on one rank unless it says otherwise. They follow what the code
allocates: parameters, gradients and optimizer state cut over FSDP's ranks; what FSDP2 gathers and reduces; what
autograd keeps of a block (the inputs of its matrix products, of its norms and of attention); the loss head's tiles; the
keys and values of other ranks. A test compares them with what a training step really allocates on the CPU
(tests/distributed/test_planner.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from torchtitan.distributed.options.offload import IN_FLIGHT
from torchtitan.extensions.planner.stage_numbers import StageNumbers
from torchtitan.models.transformer import TransformerArgs, parameter_shapes

WIDE = 4
"""Bytes of float32, in which gradients are reduced and softmax is computed."""

CONTEXT_GIB = 2.0
"""CUDA's context, the libraries' workspaces and NCCL's buffers. An assumption: nothing was measured on a GPU."""

FRAGMENTATION = 0.05
"""Bytes that the allocator holds beyond the tensors', as a share of them, with expandable segments. Assumed too."""

ON_DEVICE = IN_FLIGHT + 1
"""Offloaded checkpoints that the device holds at most: in forward those on their way to the host and the next block's
input; backward holds fewer, the one in use and the one on its way back."""

Kinds = Mapping[str, float]
"""Bytes by kind."""


@dataclass(frozen=True)
class Moment:
    """A point of a training step, and the bytes that are allocated there."""

    name: str
    kinds: Kinds

    @property
    def total(self) -> float:
        return sum(self.kinds.values())


@dataclass(frozen=True)
class Sizes:
    """How many parameters a tensor-parallel rank has, before FSDP cuts them."""

    block: int
    embedding: int
    """The input embedding; 0 if it is the output matrix too."""
    head: int
    """Output matrix and last norm."""
    blocks: int

    @property
    def total(self) -> int:
        return self.blocks + self.embedding + self.head


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


def shard_numel(stage: StageNumbers) -> float:
    """How many parameters a rank stores: a mean, since not every size divides."""
    return sizes(stage).total / stage.fsdp


# ---- parameters, gradients, optimizer, and what FSDP moves -----------------------------------------------------------


def on_device(stage: StageNumbers, size: float) -> float:
    """`size`, or 0 if parameters, gradients and optimizer state are in the host's memory instead of the device's."""
    return 0 if stage.offload_parameters and stage.device == "cuda" else size


def parameters(stage: StageNumbers) -> float:
    """What a rank stores of them, in training.dtype."""
    return shard_numel(stage) * stage.stored


def gradients(stage: StageNumbers) -> float:
    """As many as parameters, in their dtype: from the first backward to the optimizer's step."""
    return shard_numel(stage) * stage.stored


def optimizer(stage: StageNumbers) -> float:
    """AdamW's two moments, in optimizer.state_dtype."""
    return shard_numel(stage) * 2 * stage.state


def gathered(stage: StageNumbers, numel: int, buffers: int = 1) -> float:
    """`numel` parameters in full, in the dtype of the computation: a copy to compute with, and FSDP's flat buffers."""
    return numel * stage.computed * (1 + buffers)


# ---- what autograd keeps of a block ----------------------------------------------------------------------------------


def stream(stage: StageNumbers, copies: float = 1) -> float:
    """The residual stream [T, dim], cut along its tokens by tensor parallelism."""
    return copies * stage.tokens / stage.tp * stage.args.dim * stage.computed


def gathered_stream(stage: StageNumbers, copies: float = 1) -> float:
    """The same, whole on every tensor-parallel rank: the input of matrices that are cut by their outputs."""
    return copies * stage.tokens * stage.args.dim * stage.computed


def norm_extra(stage: StageNumbers, width: float) -> float:
    """What RMSNorm keeps of an input [T, width] beside its result, which the next matrix keeps.

    CUDA's fused kernel keeps the input. On the CPU, a chain of operators keeps a float32 copy of it and the normalised
    float32 values.
    """
    return stage.tokens * width * (stage.computed if stage.device == "cuda" else WIDE * 2)


def head_widths(stage: StageNumbers) -> tuple[float, float]:
    """Features per token of a rank's query heads, and of its key (or value) heads."""
    args = stage.args
    return args.n_heads * args.head_dim / stage.tp, args.n_kv_heads * args.head_dim / stage.tp


def repeated_kv(stage: StageNumbers) -> float:
    """How many times ulysses repeats key-value heads so that every rank has a whole number of them."""
    if stage.exchange != "ulysses" or stage.cp == 1:
        return 1
    heads = stage.args.n_kv_heads // stage.tp
    return math.lcm(heads, stage.cp) / heads


def kv_buffer(stage: StageNumbers) -> float:
    """The keys and values that attention reads: a rank's own and, under context parallelism, those that it receives."""
    width = head_widths(stage)[1] * repeated_kv(stage)
    if stage.exchange == "ulysses":
        return stage.stream * 2 * width / stage.cp * stage.computed / stage.head_chunks
    return stage.keys * 2 * width * stage.computed


def attention_kept(stage: StageNumbers) -> Kinds:
    """Of a block's attention: queries, keys, values, output, and the log-sum-exp of each query and head."""
    queries, kv = head_widths(stage)
    t, w = stage.tokens, stage.computed
    heads = stage.args.n_heads / stage.tp
    kept = t * (2 * queries * w + heads * WIDE)
    if stage.cp > 1 and stage.exchange == "ulysses":
        kept += t * queries * w  # the output again, back in the order of tokens, for the next matrix
    if stage.args.qk_norm:
        kept += norm_extra(stage, queries + kv)
    return {"attention": kept, "keys and values": kv_buffer(stage)}


def kept_anyway(stage: StageNumbers) -> float:
    """What selective checkpointing keeps of a recomputed block: attention's output and log-sum-exp, and the results of
    every n-th matrix product."""
    if not stage.checkpointing.keeps_attention:
        return 0
    args, (queries, kv) = stage.args, head_widths(stage)
    kept = stage.tokens * (queries * stage.computed + args.n_heads / stage.tp * WIDE)
    if every := stage.checkpointing.kept_products:
        inner = [] if stage.mlp_tile is not None else [args.ffn_dim / stage.tp] * 2 + [args.dim]
        widths = [kv, kv, queries, args.dim, *inner]
        kept += stage.tokens * sum(widths[every - 1 :: every]) * stage.computed
    return kept


def norms_kept(stage: StageNumbers) -> float:
    """Inputs and results of a block's two norms. The block's own input is counted as its checkpoint."""
    extra = 2 * norm_extra(stage, stage.args.dim / stage.tp)
    if stage.device == "cuda":
        extra -= stream(stage)
    return gathered_stream(stage, 2) + extra


def feed_forward_kept(stage: StageNumbers) -> float:
    """Results of w1, of silu and of w3, and the product that w2 reads; with tiles, nothing."""
    return 4 * hidden(stage) if stage.mlp_tile is None else 0


def hidden(stage: StageNumbers) -> float:
    """One tensor [T, ffn_dim]; with tiles, of a tile's tokens."""
    tokens = stage.tokens if stage.mlp_tile is None else min(stage.tokens, stage.mlp_tile * stage.tp)
    return tokens * stage.args.ffn_dim / stage.tp * stage.computed


def feed_forward_backward(stage: StageNumbers) -> float:
    """What backward adds: gradients of the product and of its two factors, less the product, which is freed by then.

    With tiles: the same for a tile, what is recomputed of it, the gradient of the input, and the gradients of the
    matrices, summed in float32.
    """
    if stage.mlp_tile is None:
        return 2 * hidden(stage)
    matrices = 3 * stage.args.dim * stage.args.ffn_dim / stage.tp
    return 6 * hidden(stage) + stream(stage) + matrices * (WIDE + stage.computed)


def block_kept(stage: StageNumbers) -> Kinds:
    """All that backward of one block reads, except the block's input."""
    return {**attention_kept(stage), "norms": norms_kept(stage), "feed-forward": feed_forward_kept(stage)}


def backward_extra(stage: StageNumbers) -> tuple[Kinds, Kinds]:
    """What backward of a block allocates beside what forward has kept: (in its feed-forward, in its attention).

    Attention: gradients of queries, keys, values and output, on the CPU in float32 first; the feed-forward's tensors
    are freed by then.
    """
    queries, _ = head_widths(stage)
    w, wide = stage.computed, WIDE if stage.device == "cpu" else 0
    gradient = stream(stage) + (gathered_stream(stage) if stage.tp > 1 else 0)
    kv = kv_buffer(stage)
    kv_gradients = kv * (1 + wide / w)
    if stage.cp > 1 and stage.exchange != "ulysses":
        kv_gradients = max(kv_gradients, kv * 3)  # a buffer for keys and one for values, both padded with zeros
    q = stage.tokens * queries
    attention = {
        "gradients of activations": gradient + q * (2 * w + wide) + kv_gradients,
        "feed-forward": -feed_forward_kept(stage),
    }
    return {"gradients of activations": gradient + feed_forward_backward(stage)}, attention


def worst_of_block(stage: StageNumbers) -> Kinds:
    """A block in backward: what is kept or recomputed of it and what backward adds, at the higher of two moments."""
    kept = block_kept(stage)
    return max((add(kept, extra) for extra in backward_extra(stage)), key=lambda kinds: sum(kinds.values()))


def add(*parts: Kinds) -> Kinds:
    """The sum of the parts, kind by kind; a part's bytes can be negative."""
    total: dict[str, float] = {}
    for part in parts:
        for kind, value in part.items():
            total[kind] = total.get(kind, 0) + value
    return total


def kept_by(stage: StageNumbers, layers: int) -> Kinds:
    """What `layers` blocks, some of them recomputed, keep from forward to backward."""
    again = layers * stage.checkpointing.blocks
    on_device = min(again, ON_DEVICE) if stage.offload_checkpoints and stage.device == "cuda" else again
    recomputed = {"checkpoints of blocks": stream(stage, on_device), "attention": again * kept_anyway(stage)}
    whole = layers - again
    # on the CPU the norms have copies of the blocks' inputs
    inputs = {"checkpoints of blocks": stream(stage, whole)} if stage.device == "cuda" else {}
    return add(recomputed, inputs, {kind: value * whole for kind, value in block_kept(stage).items()})


# ---- the two ends of the model ---------------------------------------------------------------------------------------


def inputs_and_rope(stage: StageNumbers) -> float:
    """Tokens, labels and positions (int64), cos and sin (float32)."""
    return stage.tokens * (3 * 8 + stage.args.head_dim * WIDE)


def head_forward(stage: StageNumbers) -> float:
    """The loss head, which computes gradients in its forward, and the last norm.

    Gradients of its input, of its matrix (float32) and of the matrix from one tile; a tile of logits in float32 and in
    the dtype of the computation.
    """
    w, words = stage.computed, stage.args.vocab_size / stage.tp
    tile = min(stage.loss_tile, stage.tokens * words * WIDE)
    matrix = words * stage.args.dim
    narrow = w / WIDE if w < WIDE else 0
    last_norm = norm_extra(stage, stage.args.dim / stage.tp)
    return last_norm + gathered_stream(stage, 2) + matrix * (WIDE + w) + tile * (1 + narrow)


def head_backward(stage: StageNumbers) -> float:
    """Both gradients, and their products with the loss's own gradient in the dtype of the computation."""
    matrix = stage.args.vocab_size / stage.tp * stage.args.dim
    last_norm = norm_extra(stage, stage.args.dim / stage.tp)
    return last_norm + gathered_stream(stage, 2) + matrix * (WIDE + stage.computed)


# ---- the moments of a step -------------------------------------------------------------------------------------------


def moments(stage: StageNumbers) -> list[Moment]:
    """Where a step can have its peak. From the second micro-batch's forward on, gradients are allocated."""
    s, kept = sizes(stage), kept_by(stage, stage.args.n_layers)
    static = {
        "parameters": on_device(stage, parameters(stage)),
        "optimizer": on_device(stage, optimizer(stage)),
        "inputs, RoPE": inputs_and_rope(stage),
    }
    whole = {"gradients": on_device(stage, gradients(stage))}
    if stage.dp_replicate > 1 and stage.accumulation > 1:  # FSDP's sums, in float32 on the device
        whole = {"gradients": shard_numel(stage) * WIDE}
    so_far = whole if stage.accumulation > 1 else {}
    head_only = so_far or {"gradients": on_device(stage, s.head / stage.fsdp * stage.stored)}
    if not stage.reshard:
        kept = add(kept, {"gathered parameters": gathered(stage, s.blocks, buffers=0)})
    tied = {"gathered parameters": gathered(stage, s.head)} if stage.args.tied_embeddings else {}
    head = add(static, so_far, kept, {"gathered parameters": gathered(stage, s.head)})
    # the block in backward: if it is not recomputed, what it computes with is already in `kept`
    block = add(worst_of_block(stage), tied)
    if stage.checkpointing.blocks < 1:
        block = add(block, {kind: -value for kind, value in block_kept(stage).items()})
    else:  # and what selective checkpointing has kept of it is not recomputed
        block = add(block, {"attention": -kept_anyway(stage)})
    block = add(
        block,
        {
            "gathered parameters": gathered(stage, s.block, 2 if stage.fsdp > 1 else 1),
            "gradients being reduced": s.block * stage.computed,
        },
    )
    # FSDP's flat input of a reduce-scatter, in float32, lives until the next reduce-scatter
    last = {"gradients being reduced": s.head * WIDE}
    previous = {"gradients being reduced": s.block * WIDE}
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
    """The highest of a step's moments."""
    return max(moments(stage), key=lambda moment: moment.total)


def peak_gib(stage: StageNumbers) -> float:
    """GiB that a rank needs; on a GPU, with fragmentation and CUDA's context added."""
    gib = peak(stage).total / 2**30
    return gib * (1 + FRAGMENTATION) + CONTEXT_GIB if stage.device == "cuda" else gib
