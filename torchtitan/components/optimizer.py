"""AdamW, its state as a flat dictionary of tensors by parameter name, and gradient clipping.

Names and DTensors, not indices and groups: such a state loads into any layout. Learning rate, betas and decay always
come from the TOML file, never from a checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from fnmatch import fnmatch
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw

from torchtitan.config.schema import Optimizer


class MixedAdamW(torch.optim.AdamW):
    """AdamW whose moments have another dtype than the parameters: each parameter's step is computed in float32, and the
    results are rounded to nearest when they are stored."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step; float32 copies of only one parameter exist at a time."""
        assert closure is None
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is None:
                    continue
                state = self.state[param]
                stored = (param, state["exp_avg"], state["exp_avg_sq"])
                wide = [x.to(torch.float32) for x in stored]
                adamw(
                    [wide[0]],
                    [param.grad.to(torch.float32)],
                    [wide[1]],
                    [wide[2]],
                    [],
                    [state["step"]],
                    foreach=group["foreach"],
                    fused=group["fused"],
                    amsgrad=False,
                    beta1=group["betas"][0],
                    beta2=group["betas"][1],
                    lr=group["lr"],
                    weight_decay=group["weight_decay"],
                    eps=group["eps"],
                    maximize=False,
                )
                for kept, computed in zip(stored, wide, strict=True):
                    if kept is not computed:  # .to() copies no float32 tensor
                        kept.copy_(computed)


def build_optimizer(model: nn.Module, config: Optimizer) -> torch.optim.AdamW:
    """AdamW (arXiv 1711.05101) over the model's parameters, without decay for those that config.no_decay names.

    The state is allocated here, so that a checkpoint can be read into it and memory does not grow at step 1.
    """
    decayed: list[nn.Parameter] = []
    exempt: list[nn.Parameter] = []
    for name, param in model.named_parameters():
        (exempt if any(fnmatch(name, pattern) for pattern in config.no_decay) else decayed).append(param)
    groups: list[dict[str, Any]] = [{"params": decayed}, {"params": exempt, "weight_decay": 0.0}]
    dtype = getattr(torch, config.state_dtype) if config.state_dtype else None
    mixed = dtype is not None and any(p.dtype != dtype for p in (*decayed, *exempt))
    optimizer = (MixedAdamW if mixed else torch.optim.AdamW)(
        [g for g in groups if g["params"]],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=config.implementation == "fused",
        foreach=config.implementation == "foreach",
    )
    for group in optimizer.param_groups:
        for param in group["params"]:
            optimizer.state[param] = {
                # the fused kernel needs the step on the parameter's device, the others on the CPU
                "step": torch.zeros((), device=param.device if config.implementation == "fused" else "cpu"),
                "exp_avg": torch.zeros_like(param, dtype=dtype),
                "exp_avg_sq": torch.zeros_like(param, dtype=dtype),
            }
    return optimizer


def optimizer_state(model: nn.Module, optimizer: torch.optim.AdamW) -> dict[str, torch.Tensor]:
    """{"layers.0.attention.wq.weight.exp_avg": tensor, ...}: the optimizer's own tensors, to save or to load into."""
    return {
        f"{name}.{key}": value
        for name, param in model.named_parameters()
        for key, value in optimizer.state[param].items()
    }


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float, group: dist.ProcessGroup) -> float:
    """Scale the gradients so that their global 2-norm is at most max_norm (0: do not scale); returns the norm before.

    Collective over group, which is gloo and has all ranks. Squares are summed in float64, and every rank gets the same
    sum to the bit: torch.nn.utils.clip_grad_norm_ sums in float32 (1e-5 off on a large matrix) and reduces over one
    mesh dimension after the other, so that ranks can differ and replicas can drift apart.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    squares = []
    for gradient in gradients:
        copies = 1
        if isinstance(gradient, DTensor):
            placements = enumerate(gradient.placements)
            copies = math.prod(gradient.device_mesh.size(dim) for dim, p in placements if p.is_replicate())
            gradient = gradient.to_local()
        squares.append(torch.linalg.vector_norm(gradient, dtype=torch.float64).square() / copies)
    total = torch.stack(squares).sum().cpu()
    dist.all_reduce(total, group=group)
    norm = math.sqrt(total)
    if max_norm and norm > max_norm:
        for gradient in gradients:
            gradient.mul_(max_norm / norm)
    return norm
