"""Tensor parallelism with sequence parallelism (Megatron, arXiv 1909.08053 and 2205.05198), from outside the model.

Projections are cut by heads and by hidden units, the embedding and the output by vocabulary. Between them the stream
[T, dim] is cut along its tokens, so norms and residuals cost a rank 1/tp.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from torchtitan.models.transformer import Transformer, TransformerArgs
from torchtitan.tools.errors import UserError


def check_tensor_parallel(args: TransformerArgs, tp: int) -> None:
    """UserError if tp does not divide what it cuts, or would cut a norm."""
    if tp > 1 and args.qk_norm_joint:
        raise UserError(
            f"parallelism.tensor_parallel_degree = {tp} gives each rank some of the heads, but this model (Olmo 2, "
            "Olmo 3) normalises queries and keys over all heads together, which would need a reduction over ranks in "
            "every layer and is not supported. Set it to 1, and use data_parallel_shard_degree or "
            "context_parallel_degree."
        )
    sizes = {
        "query heads": args.n_heads,
        "key-value heads": args.n_kv_heads,
        "feed-forward units": args.ffn_dim,
        "vocabulary entries": args.vocab_size,
    }
    for what, size in sizes.items():
        if size % tp:
            works = [str(d) for d in range(1, args.n_kv_heads + 1) if not any(n % d for n in sizes.values())]
            raise UserError(
                f"parallelism.tensor_parallel_degree = {tp} does not divide the model's {size} {what} "
                f"({size} / {tp} = {size / tp:.2f}); {', '.join(works)} would."
            )


def apply_tensor_parallel(model: Transformer, mesh: DeviceMesh) -> None:
    """Distribute every parameter over the tp mesh; the output matrix by vocabulary, as OutputHead expects it."""
    tokens = Shard(0)
    parallelize_module(
        model,
        mesh,
        {
            "tok_embeddings": RowwiseParallel(input_layouts=Replicate(), output_layouts=tokens),
            "norm": SequenceParallel(sequence_dim=0),
        },
    )
    # What the embedding returns may be a reduce-scatter that still runs. PyTorch (2.13) loses the gradient of such a
    # tensor if it goes into a compiled block; a copy is complete.
    model.tok_embeddings.register_forward_hook(lambda module, inputs, output: output.clone())
    distribute_module(model.output, mesh, _cut_by_vocabulary, _gather_tokens)
    heads = model.args.n_kv_heads // mesh.size()
    model.local_kv_heads = slice(mesh.get_local_rank() * heads, (mesh.get_local_rank() + 1) * heads)
    model.tie_embeddings()  # both were cut by vocabulary, each into a tensor of its own
    for block in model.layers.values():
        plan: dict[str, ParallelStyle] = {
            "attention_norm": SequenceParallel(sequence_dim=0),
            "attention": PrepareModuleInput(
                input_layouts=(tokens, None, None), desired_input_layouts=(Replicate(), None, None)
            ),
            "attention.wq": ColwiseParallel(),
            "attention.wk": ColwiseParallel(),
            "attention.wv": ColwiseParallel(),
            "attention.wo": RowwiseParallel(output_layouts=tokens),
            "ffn_norm": SequenceParallel(sequence_dim=0),
            "feed_forward": PrepareModuleInput(input_layouts=(tokens,), desired_input_layouts=(Replicate(),)),
            "feed_forward.w1": ColwiseParallel(),
            "feed_forward.w3": ColwiseParallel(),
            "feed_forward.w2": RowwiseParallel(output_layouts=tokens),
        }
        if model.args.qk_norm:
            # one weight for all heads: the heads are cut as a sequence would be, the weight is replicated
            plan["attention.q_norm"] = SequenceParallel(sequence_dim=1, use_local_output=True)
            plan["attention.k_norm"] = SequenceParallel(sequence_dim=1, use_local_output=True)
        parallelize_module(block, mesh, plan)


def _cut_by_vocabulary(name: str, module: nn.Module, mesh: DeviceMesh) -> None:
    for key, param in list(module.named_parameters(recurse=False)):
        module.register_parameter(key, nn.Parameter(distribute_tensor(param, mesh, [Shard(0)])))


def _gather_tokens(module: nn.Module, inputs: tuple[Any, ...], mesh: DeviceMesh) -> Any:
    x = inputs[0] if isinstance(inputs[0], DTensor) else DTensor.from_local(inputs[0], mesh, [Shard(0)])
    return x.redistribute(placements=[Replicate()]), *inputs[1:]
