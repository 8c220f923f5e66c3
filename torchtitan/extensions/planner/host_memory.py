"""Host memory that offloading needs, estimated for scripts/estimate.py and for the warning at a run's start."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from torchtitan.components.hooks import Hook
from torchtitan.extensions.planner.memory import Kinds, gradients, optimizer, parameters, stream
from torchtitan.extensions.planner.stage_numbers import StageNumbers, numbers_of
from torchtitan.tools.device import available_host_memory
from torchtitan.tools.logging import logger

USED_BY_OTHERS = 0.1
"""Share of the available host memory that is left to everything else: loaders, the page cache, Python."""


def host_kinds(stage: StageNumbers) -> Kinds:
    """Bytes that a rank keeps in host memory, by kind. Pinned memory is allocated in powers of two, so the input of a
    block counts as the next power."""
    kinds: dict[str, float] = {}
    if stage.offload_parameters:
        kinds |= {"parameters": parameters(stage), "gradients": gradients(stage), "optimizer": optimizer(stage)}
    if stage.offload_checkpoints:
        layers = round(stage.args.n_layers * stage.checkpointing.blocks)
        kinds["checkpoints of blocks"] = layers * (1 << (int(stream(stage)) - 1).bit_length())
    return kinds


def host_bytes(stage: StageNumbers) -> float:
    """Bytes that a rank keeps in host memory."""
    return sum(host_kinds(stage).values())


def host_gib(stage: StageNumbers, ranks: int) -> float:
    """GiB of host memory that `ranks` ranks on one host need together."""
    return host_bytes(stage) * ranks / 2**30


def host_memory_warning(bytes_per_rank: float, ranks: int, available: int | None) -> str | None:
    """What to log if `ranks` ranks on one host need more of its memory than is available (bytes; None: unknown)."""
    needed = bytes_per_rank * ranks
    if available is None or needed <= available * (1 - USED_BY_OTHERS):
        return None
    return (
        f"training.enable_cpu_offload and activation_checkpoint.offload need about {needed / 2**30:.1f} GiB of host "
        f"memory ({bytes_per_rank / 2**30:.1f} GiB per rank, {ranks} on this host), and {available / 2**30:.1f} GiB "
        "are available. More ranks that share the parameters, more hosts, or a higher context_parallel_degree need "
        "less per host."
    )


class HostMemoryCheck(Hook):
    """Warns, before anything is allocated, if offloading needs more memory than this host has."""

    def configured(self, trainer: Any) -> None:
        """Each rank asks for its own host."""
        stage = numbers_of(trainer.config, trainer.inputs.args, dist.get_world_size())
        ranks = trainer.hosts.count(trainer.hosts[trainer.rank])
        if warning := host_memory_warning(host_bytes(stage), ranks, available_host_memory()):
            logger.warning(warning)
