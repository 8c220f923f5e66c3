"""The only place where private PyTorch names are used, each with what it is for."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _set_pg_timeout


def set_timeout(seconds: int, groups: list[dist.ProcessGroup]) -> None:
    """Change the longest wait of existing process groups; there is no public setter."""
    for group in groups:
        _set_pg_timeout(timedelta(seconds=seconds), group)


def record_memory_history(enabled: bool) -> None:
    """Start or stop recording CUDA allocations; documented for users, but underscored."""
    if enabled:
        torch.cuda.memory._record_memory_history(max_entries=100_000)
    else:
        torch.cuda.memory._record_memory_history(enabled=None)


def write_memory_snapshot(path: Path) -> None:
    """Write the recorded CUDA allocations for pytorch.org/memory_viz."""
    torch.cuda.memory._dump_snapshot(str(path))
