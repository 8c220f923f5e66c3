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

from torchtitan.extensions.planner.job import Job
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


def sizes(job: Job) -> Sizes:
    """Matrices and their biases are cut over tensor-parallel ranks, norms are not."""
    return _sizes(job.args, job.tp)


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


def shard(job: Job) -> float:
    """Parameters that a rank stores."""
    s = sizes(job)
    return (s.blocks + s.embedding + s.head) / job.fsdp


# ---- parameters, gradients, optimizer, and what FSDP moves -----------------------------------------------------------


def on_device(job: Job, size: float) -> float:
    """0 where parameters, gradients and optimizer state live in host memory and that is another."""
    return 0 if job.offload_parameters and job.device == "cuda" else size


def parameters(job: Job) -> float:
    return shard(job) * job.stored


def gradients(job: Job) -> float:
    """Of all parameters: from the first backward to the optimizer's step."""
    return shard(job) * job.stored


def optimizer(job: Job) -> float:
    """AdamW's two moments."""
    return shard(job) * 2 * job.state


def host(job: Job) -> Kinds:
    """What a rank keeps in host memory. Pinned memory is handed out in powers of two."""
    kinds: dict[str, float] = {}
    if job.offload_parameters:
        kinds |= {"parameters": parameters(job), "gradients": gradients(job), "optimizer": optimizer(job)}
    if job.offload_checkpoints:
        layers = round(job.args.n_layers * job.recomputed_blocks)
        kinds["checkpoints of blocks"] = layers * (1 << (int(stream(job)) - 1).bit_length())
    return kinds


def gathered(job: Job, numel: int, buffers: int = 1) -> float:
    """Parameters in full, in the type of the computation: a copy to compute with, and FSDP's flat buffers."""
    return numel * job.computed * (1 + buffers)


def reduced(job: Job, numel: int) -> float:
    """FSDP's flat input of a reduce-scatter, in float32; it stays until the next one."""
    return numel * WIDE


# ---- what autograd keeps of a block ----------------------------------------------------------------------------------


def stream(job: Job, copies: float = 1) -> float:
    """The residual stream [T, dim], cut along its tokens by tensor parallelism."""
    return copies * job.tokens / job.tp * job.args.dim * job.computed


def gathered_stream(job: Job, copies: float = 1) -> float:
    """The same on every tensor-parallel rank whole: the input of matrices that are cut by their outputs."""
    return copies * job.tokens * job.args.dim * job.computed


def norm_extra(job: Job, width: float) -> float:
    """What RMSNorm keeps of an input [T, width] beside its result, which the next matrix keeps.

    CUDA's fused kernel keeps the input. On the CPU it is a chain of operators that keeps a float32 copy, where that is
    one, and the normalised float32 values.
    """
    numel = job.tokens * width
    if job.device == "cuda":
        return numel * job.computed
    return numel * WIDE * 2


def head_widths(job: Job) -> tuple[float, float]:
    """Width of a rank's query heads, and of its key or value heads."""
    args = job.args
    return args.n_heads * args.head_dim / job.tp, args.n_kv_heads * args.head_dim / job.tp


def repeated_kv(job: Job) -> float:
    """How often ulysses repeats key-value heads so that every rank has a whole number of them."""
    if job.exchange != "ulysses" or job.cp == 1:
        return 1
    heads = job.args.n_kv_heads // job.tp
    return math.lcm(heads, job.cp) / heads


def kv_buffer(job: Job) -> float:
    """The keys and values that attention reads: a rank's own, or with context parallelism a buffer of all it sees."""
    width = head_widths(job)[1] * repeated_kv(job)
    if job.exchange == "ulysses":
        return job.stream * 2 * width / job.cp * job.computed / job.head_chunks
    return job.keys * 2 * width * job.computed


def attention_kept(job: Job) -> Kinds:
    """Queries, keys, values, output, and the log-sum-exp of each query and head."""
    queries, kv = head_widths(job)
    t, w = job.tokens, job.computed
    heads = job.args.n_heads / job.tp
    kept = t * (2 * queries * w + heads * WIDE)
    if job.cp > 1 and job.exchange == "ulysses":
        kept += t * queries * w  # the output once more, back in the order of tokens, for the matrix behind it
    if job.args.qk_norm:
        kept += norm_extra(job, queries + kv)
    return {"attention": kept, "keys and values": kv_buffer(job)}


def kept_anyway(job: Job) -> float:
    """Of a recomputed block, what selective checkpointing keeps: attention's output and log-sum-exp, and the results of
    every n-th matrix product."""
    if not job.keeps_attention:
        return 0
    args, (queries, kv) = job.args, head_widths(job)
    kept = job.tokens * (queries * job.computed + args.n_heads / job.tp * WIDE)
    if job.kept_products:
        inner = [] if job.mlp_tile is not None else [args.ffn_dim / job.tp] * 2 + [args.dim]
        widths = [kv, kv, queries, args.dim, *inner]
        kept += job.tokens * sum(widths[job.kept_products - 1 :: job.kept_products]) * job.computed
    return kept


def norms_kept(job: Job) -> float:
    """Both norms' inputs and results. A block's own input is counted as its checkpoint."""
    extra = 2 * norm_extra(job, job.args.dim / job.tp)
    if job.device == "cuda":
        extra -= stream(job)
    return gathered_stream(job, 2) + extra


def feed_forward_kept(job: Job) -> float:
    """Results of w1, of silu, of w3, and their product, which w2 reads; in tiles, nothing."""
    return 4 * hidden(job) if job.mlp_tile is None else 0


def hidden(job: Job) -> float:
    """One tensor [T, ffn_dim], or of a tile's tokens."""
    tokens = job.tokens if job.mlp_tile is None else min(job.tokens, job.mlp_tile * job.tp)
    return tokens * job.args.ffn_dim / job.tp * job.computed


def feed_forward_backward(job: Job) -> float:
    """Beside what is kept: gradients of the product and of its two factors, while the product is gone already. In
    tiles: the same of a tile, with what is computed anew of it, the gradient of the input, and those of the matrices
    summed in float32."""
    if job.mlp_tile is None:
        return 2 * hidden(job)
    matrices = 3 * job.args.dim * job.args.ffn_dim / job.tp
    return 6 * hidden(job) + stream(job) + matrices * (WIDE + job.computed)


def block_kept(job: Job) -> Kinds:
    """All that backward of one block reads, but its input."""
    return {**attention_kept(job), "norms": norms_kept(job), "feed-forward": feed_forward_kept(job)}


def backward_extra(job: Job) -> tuple[Kinds, Kinds]:
    """What backward of a block allocates beside what forward has kept: in its feed-forward, and in its attention.

    Attention: gradients of queries, keys, values and output, on the CPU in float32 first; the feed-forward's tensors
    are gone.
    """
    queries, _ = head_widths(job)
    w, wide = job.computed, WIDE if job.device == "cpu" else 0
    gradient = stream(job) + (gathered_stream(job) if job.tp > 1 else 0)
    kv = kv_buffer(job)
    kv_gradients = kv * (1 + wide / w)
    if job.cp > 1 and job.exchange != "ulysses":
        kv_gradients = max(kv_gradients, kv * 3)  # a buffer for keys, one for values, both filled up with zeros
    q = job.tokens * queries
    attention = {
        "gradients of activations": gradient + q * (2 * w + wide) + kv_gradients,
        "feed-forward": -feed_forward_kept(job),
    }
    return {"gradients of activations": gradient + feed_forward_backward(job)}, attention


def worst_of_block(job: Job) -> Kinds:
    """A block in backward: what is kept (or computed anew) of it, and what backward adds, at its higher moment."""
    kept = block_kept(job)
    return max((add(kept, extra) for extra in backward_extra(job)), key=lambda kinds: sum(kinds.values()))


def add(*parts: Kinds) -> Kinds:
    total: dict[str, float] = {}
    for part in parts:
        for kind, value in part.items():
            total[kind] = total.get(kind, 0) + value
    return total


def kept_by(job: Job, layers: int) -> Kinds:
    """What `layers` blocks keep from forward to backward, some of them recomputed."""
    again = layers * job.recomputed_blocks
    on_device = min(again, IN_FLIGHT) if job.offload_checkpoints and job.device == "cuda" else again
    recomputed = {"checkpoints of blocks": stream(job, on_device), "attention": again * kept_anyway(job)}
    whole = layers - again
    # on the CPU the norms have copies of the blocks' inputs
    inputs = {"checkpoints of blocks": stream(job, whole)} if job.device == "cuda" else {}
    return add(recomputed, inputs, {kind: value * whole for kind, value in block_kept(job).items()})


# ---- the two ends of the model ---------------------------------------------------------------------------------------


def inputs_and_rope(job: Job) -> float:
    """Tokens, labels, positions (int64), and cos and sin in float32."""
    return job.tokens * (3 * 8 + job.args.head_dim * WIDE)


def head_forward(job: Job) -> float:
    """The loss head, which computes gradients in its forward: those of its input and (float32) of its matrix, a tile of
    logits in float32 and in the type of the computation, the matrix's gradient of one tile; and the last norm."""
    w, words = job.computed, job.args.vocab_size / job.tp
    tile = min(job.loss_tile, job.tokens * words * WIDE)
    matrix = words * job.args.dim
    narrow = w / WIDE if w < WIDE else 0
    return last_norm(job) + gathered_stream(job, 2) + matrix * (WIDE + w) + tile * (1 + narrow)


def last_norm(job: Job) -> float:
    return norm_extra(job, job.args.dim / job.tp)


def head_backward(job: Job) -> float:
    """Both gradients, and their products with the loss's own gradient in the type of the computation."""
    matrix = job.args.vocab_size / job.tp * job.args.dim
    return last_norm(job) + gathered_stream(job, 2) + matrix * (WIDE + job.computed)


# ---- the moments of a step -------------------------------------------------------------------------------------------


def moments(job: Job) -> list[Moment]:
    """Where a step can have its peak. Gradients are there from the second micro-batch's forward on."""
    s, kept = sizes(job), kept_by(job, job.args.n_layers)
    static = {
        "parameters": on_device(job, parameters(job)),
        "optimizer": on_device(job, optimizer(job)),
        "inputs, RoPE": inputs_and_rope(job),
    }
    whole = {"gradients": on_device(job, gradients(job))}
    if job.dp_replicate > 1 and job.accumulation > 1:  # FSDP's sums before the all-reduce, in float32 on the device
        whole = {"gradients": shard(job) * WIDE}
    so_far = whole if job.accumulation > 1 else {}
    head_only = so_far or {"gradients": on_device(job, s.head / job.fsdp * job.stored)}
    if not job.reshard:
        kept = add(kept, {"gathered parameters": gathered(job, s.blocks, buffers=0)})
    tied = {"gathered parameters": gathered(job, s.head)} if job.args.tied_embeddings else {}
    head = add(static, so_far, kept, {"gathered parameters": gathered(job, s.head)})
    # the block in backward: its share of `kept`, if it is not recomputed, is what it computes with
    block = add(worst_of_block(job), tied)
    if job.recomputed_blocks < 1:
        block = add(block, {kind: -value for kind, value in block_kept(job).items()})
    else:  # nor is what selective checkpointing has kept of it computed anew
        block = add(block, {"attention": -kept_anyway(job)})
    block = add(
        block,
        {
            "gathered parameters": gathered(job, s.block, 2 if job.fsdp > 1 else 1),
            "gradients being reduced": s.block * job.computed,
        },
    )
    last = {"gradients being reduced": reduced(job, s.head)}
    previous = {"gradients being reduced": reduced(job, s.block)}
    embedding = {"gradients being reduced": (s.embedding or s.head) * (job.computed + WIDE)}
    return [
        Moment("loss head, forward", add(head, {"loss head": head_forward(job)})),
        Moment("loss head, backward", add(head, {"loss head": head_backward(job)})),
        Moment("backward of the last block", add(static, head_only, kept, block, last)),
        Moment("backward of the first block", add(static, whole, kept_by(job, 1), block, previous)),
        Moment("backward of the embedding", add(static, whole, tied, embedding, previous)),
        Moment("optimizer", add(static, whole, {"optimizer's temporaries": parameters(job) * job.foreach})),
    ]


def peak(job: Job) -> Moment:
    """The highest of them."""
    return max(moments(job), key=lambda moment: moment.total)


def peak_gib(job: Job) -> float:
    """GiB that a rank needs; on a GPU with what the tensors do not show."""
    gib = peak(job).total / 2**30
    return gib * (1 + FRAGMENTATION) + CONTEXT_GIB if job.device == "cuda" else gib
