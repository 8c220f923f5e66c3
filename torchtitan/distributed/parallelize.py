"""Applies parallelism, recomputation and compilation to a model on the meta device, and gives it memory."""

from __future__ import annotations

import torch

from torchtitan.attention.backends import choose_backend
from torchtitan.config.schema import JobConfig
from torchtitan.distributed.activation_checkpoint import apply_activation_checkpoint
from torchtitan.distributed.context_parallel.attention import apply_context_parallel
from torchtitan.distributed.fully_shard import apply_fully_shard
from torchtitan.distributed.options.quantize import apply_quantize
from torchtitan.distributed.options.tiled_mlp import apply_tiled_mlp
from torchtitan.distributed.parallel_dims import ParallelDims
from torchtitan.distributed.tensor_parallel import apply_tensor_parallel
from torchtitan.models.transformer import Transformer, TransformerArgs, TransformerBlock
from torchtitan.tools.device import device_type
from torchtitan.tools.errors import UserError


def check_compile_backend(name: str) -> None:
    """UserError if torch.compile has no such backend, or the backend does not work here, for example without a
    compiler."""
    if name not in torch.compiler.list_backends(exclude_tags=()):
        raise UserError(
            f'compile.backend = "{name}" is not a backend of torch.compile here; these are: '
            f"{', '.join(torch.compiler.list_backends())}."
        )
    try:
        torch.compile(lambda x: x.sin() + 1, backend=name)(torch.ones(2, device=device_type()))
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        raise UserError(
            f'compile.backend = "{name}" cannot compile here: {lines[0]} Repair that (inductor needs a C++ compiler on '
            "a CPU, Triton on a GPU), or set compile.enable = false."
        ) from error


def build_sharded_model(
    args: TransformerArgs, config: JobConfig, dims: ParallelDims, device: torch.device
) -> Transformer:
    """The model with uninitialised parameters, of which this rank holds only its shards.

    The order matters: context parallelism changes what attention calls, tensor parallelism cuts the matrices,
    compilation and recomputation wrap a block's forward, and FSDP2 comes last, so that its hooks stay outside of both.
    """
    with torch.device("meta"):
        backend = choose_backend(config.model.attention_backend, device.type)
        model = Transformer(args, backend).to(getattr(torch, config.training.dtype))
    model.output.tile_bytes = config.training.loss_tile_mib << 20
    model.output.z_loss = config.training.z_loss
    if config.quantize.recipe_name != "none":
        apply_quantize(model, config.quantize, dims.size("tp"))
    if dims.size("cp") > 1:
        p = config.parallelism
        group = dims.mesh.get_group("cp")
        apply_context_parallel(model, group, p.context_parallel_exchange, p.context_parallel_head_chunks)
    if dims.size("tp") > 1:
        apply_tensor_parallel(model, dims.tp_mesh)
    tiles = config.training.mlp_tile_tokens
    if tiles is not None:
        apply_tiled_mlp(model, tiles, dims.size("tp"))
    if config.compile.enable:
        for block in model.layers.values():
            assert isinstance(block, TransformerBlock)
            if tiles is not None:  # the loop over tiles stays outside
                mlp = block.feed_forward
                mlp.forward = torch.compile(mlp.forward, backend=config.compile.backend)  # type: ignore[method-assign]
            block.forward = torch.compile(block.forward, backend=config.compile.backend)  # type: ignore[method-assign]
    if config.activation_checkpoint.mode != "none":
        apply_activation_checkpoint(model, config.activation_checkpoint)
    apply_fully_shard(
        model,
        dims.fsdp_mesh,
        getattr(torch, config.training.mixed_precision_param),
        getattr(torch, config.training.mixed_precision_reduce),
        config.parallelism.fsdp_reshard_after_forward,
        config.training.enable_cpu_offload,
    )
    return model.to_empty(device="cpu" if config.training.enable_cpu_offload else device)
