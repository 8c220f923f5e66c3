"""Which device and which collectives: decided here, once."""

from __future__ import annotations

import contextlib
import gc
import os
import resource
import socket
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from torchtitan.tools.errors import UserError
from torchtitan.tools.gpus import gpu_of_device


def device_type() -> str:
    """cuda where PyTorch sees a GPU, else cpu."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def pick_device(local_rank: int) -> torch.device:
    """The GPU of this local rank, made current, or the CPU where there is none."""
    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        if local_rank >= count:
            raise UserError(
                f"There is no GPU for process {local_rank} (from 0) of this machine: PyTorch sees {count}. Start one "
                f"process a GPU, e.g. NGPU={count}; CUDA_VISIBLE_DEVICES decides which are seen."
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        return device
    return torch.device("cpu")


def make_deterministic() -> None:
    """Ask for kernels that give the same bits every time; before anything runs on the GPU."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS refuses to be deterministic without it
    torch.use_deterministic_algorithms(True)


def host_name() -> str:
    """This machine's name; under Slurm the one that its commands know."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def record_collectives(folder: Path, size: int) -> None:
    """Have NCCL's flight recorder keep the last `size` collectives, and write them to folder/rank_N on a time-out.

    Before the process group is made, which reads these variables; those that are set already stay.
    """
    folder.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("TORCH_NCCL_TRACE_BUFFER_SIZE", str(size))
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
    os.environ.setdefault("TORCH_NCCL_DEBUG_INFO_TEMP_FILE", str(folder / "rank_"))


def init_process_group(device: torch.device, rank: int, world_size: int, timeout_seconds: int) -> None:
    """gloo for CPU tensors, NCCL beside it for CUDA tensors. One process needs no launcher."""
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    # device_id is left out: given to a mixed backend it also binds gloo to the GPU
    store = dist.HashStore() if world_size == 1 else None
    dist.init_process_group(
        backend, store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=timeout_seconds)
    )


def peak_flops(device: torch.device, tflops: float | None) -> float | None:
    """Peak bf16 FLOP/s of one device: the TOML's, else the data sheet's, else None (then MFU is not reported)."""
    if tflops is not None:
        return tflops * 1e12
    if device.type == "cuda":
        gpu = gpu_of_device(torch.cuda.get_device_name(device))
        return gpu.bf16_tflops * 1e12 if gpu else None
    return None


def peak_memory_gib(device: torch.device) -> float:
    """Highest use so far: reserved CUDA memory, or the resident set of the process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on macOS, in KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def available_host_memory() -> int | None:
    """Bytes that processes of this machine can still have, of its memory and of their control group; None: unknown."""
    free = []
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        free.append(int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1]) * 1024)
    with contextlib.suppress(OSError, ValueError):  # "max", where there is no limit, is no number
        group = Path("/sys/fs/cgroup")  # inside a container its own
        free.append(int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    return min(free) if free else None


class GarbageCollection:
    """Run Python's collector only every `freq` steps: a collection on one rank stalls all the others."""

    def __init__(self, freq: int):
        self.freq = freq
        gc.disable()
        gc.collect()

    def run(self, step: int) -> None:
        if step % self.freq == 0:
            gc.collect(1)
