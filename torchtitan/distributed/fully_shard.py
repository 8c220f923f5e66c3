"""FSDP2 (and HSDP) over the blocks of the model, with gradients summed, not averaged."""

from __future__ import annotations

from functools import partial

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from torchtitan.models.transformer import Transformer


def apply_fully_shard(
    model: Transformer,
    mesh: DeviceMesh,
    param_dtype: torch.dtype,
    reduce_dtype: torch.dtype,
    reshard_after_forward: bool,
    cpu_offload: bool,
) -> None:
    """Shard parameters over the mesh's last dimension; replicate them over its first if it has two.

    cpu_offload: shards, their gradients and the optimizer's state are in host memory, and the CPU does its work.

    Used on one process too, where it only casts: one path for every layout.
    """
    # Inputs are left as they are: FSDP would round each block's float32 cos and sin to param_dtype. The stream takes
    # its dtype from the embedding's gathered weight.
    policy = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=reduce_dtype, cast_forward_inputs=False)
    offload = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda") if cpu_offload else OffloadPolicy()
    shard = partial(fully_shard, mesh=mesh, mp_policy=policy, offload_policy=offload)
    for block in model.layers.values():
        shard(block, reshard_after_forward=reshard_after_forward)
    if not model.args.tied_embeddings:
        # a tied matrix is used at both ends, so it belongs to the root and is gathered from its first use to its last
        shard(model.tok_embeddings, reshard_after_forward=reshard_after_forward)
        # backward begins with these: freed after forward, they would be gathered again at once
        shard([model.norm, model.output], reshard_after_forward=False)
    shard(model, reshard_after_forward=False)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # The loss is already divided by the number of valid labels of the whole step, so gradients are sums.
            module.set_gradient_divide_factor(1.0)
            # a plain sum, which gloo has too, instead of NCCL's scaled sum
            module.set_force_sum_reduction_for_comms(True)


def reduce_over_replicas(model: Transformer, enabled: bool) -> None:
    """Whether the next backward ends with HSDP's all-reduce; only the last micro-batch of a step needs it."""
    assert isinstance(model, FSDPModule)
    model.set_requires_all_reduce(enabled)
