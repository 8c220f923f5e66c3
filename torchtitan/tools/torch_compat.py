"""The only place where private PyTorch names are used, each in a function that says what it is for."""

from __future__ import annotations

import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store, _set_pg_timeout
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode  # sees every operator
from torch.utils._pytree import tree_iter as tree_iter  # the leaves of nested arguments


def set_timeout(seconds: int, groups: list[dist.ProcessGroup]) -> None:
    """Change the time-out of existing process groups; there is no public setter."""
    for group in groups:
        _set_pg_timeout(timedelta(seconds=seconds), group)


def default_store() -> dist.Store:
    """The key-value store in which the ranks met; init_process_group makes it and has no public way to get it."""
    return _get_default_store()


def storage_key(storage: torch.UntypedStorage) -> int:
    """A number that identifies a storage as long as it lives, whichever Python object stands for it."""
    return storage._cdata


def fake_process_group(world_size: int) -> None:
    """Make this process rank 0 of world_size ranks that do not exist; collectives return at once, with any values."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=world_size, store=FakeStore())


def record_memory_history(enabled: bool) -> None:
    """Start or stop recording CUDA allocations; PyTorch documents this function although its name is private."""
    if enabled:
        torch.cuda.memory._record_memory_history(max_entries=100_000)
    else:
        torch.cuda.memory._record_memory_history(enabled=None)


def write_memory_snapshot(path: Path) -> None:
    """Write the recorded CUDA allocations for pytorch.org/memory_viz."""
    torch.cuda.memory._dump_snapshot(str(path))


def cpu_flash_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output [B, H, T, D] and log-sum-exp [B, H, T] of the CPU's flash kernel; the public function drops the latter.

    q [B, H, T, D], k and v [B, Hkv, K, D]. A causal mask is aligned at the top left.
    """
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal)
    return out, lse


def cpu_flash_attention_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    causal: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k and v; out and lse may belong to a softmax over more keys than k."""
    dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, q, k, v, out, lse, 0.0, causal
    )
    return dq, dk, dv


def mark_dynamic(dimensions: list[tuple[torch.Tensor, int]]) -> None:
    """Tell torch.compile, before its first call, that these sizes will change: [(tensor, its dimension), ...]."""
    for tensor, dimension in dimensions:
        torch._dynamo.maybe_mark_dynamic(tensor, dimension)


def compilations() -> int:
    """How many times torch.compile has compiled a function in this process, recompilations included."""
    dynamo = sys.modules.get("torch._dynamo.utils")  # if it is not imported (a second), nothing has been compiled
    return dynamo.counters["frames"]["total"] if dynamo else 0


def attention_operators() -> set[Any]:
    """The operators of PyTorch's attention kernels, as a dispatch mode sees them; only those that exist."""
    aten = torch.ops.aten
    names = (
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
        "_flash_attention_forward",
        "_efficient_attention_forward",
    )
    operators: set[Any] = {getattr(aten, name).default for name in names if hasattr(aten, name)}
    if hasattr(torch.ops.torch_attn, "_varlen_attn"):
        operators.add(torch.ops.torch_attn._varlen_attn.default)
    operators.add(torch.ops.higher_order.flex_attention)
    if visible_regions() is not None:
        operators.add(torch._higher_order_ops.inductor_compiled_code)
    return operators


def visible_regions() -> dict[str, Any] | None:
    """Options of torch.compile with which dispatch modes see a compiled region as one operator.

    None if PyTorch is too old for them; such a region is then recomputed.
    """
    import torch._higher_order_ops  # here: only a process that recomputes pays for these imports
    import torch._inductor.config

    name = "wrap_inductor_compiled_regions"
    known = hasattr(torch._inductor.config, name) and hasattr(torch._higher_order_ops, "inductor_compiled_code")
    return {name: True} if known else None
