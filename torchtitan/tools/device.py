"""The device, its process group, and what else depends on the machine."""

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
    """cuda if PyTorch sees a GPU, else cpu."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def pick_device(local_rank: int) -> torch.device:
    """The GPU of this local rank, made current, or the CPU if there is no GPU; UserError if there are too few GPUs."""
    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        if local_rank >= count:
            raise UserError(
                f"There is no GPU for process {local_rank} (from 0) of this machine: PyTorch sees {count}. Start one "
                f"process per GPU, e.g. NGPU={count}; CUDA_VISIBLE_DEVICES decides which GPUs are seen."
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        return device
    return torch.device("cpu")


def make_deterministic() -> None:
    """Ask for kernels that give the same bits every time. Call it before anything runs on the GPU."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS refuses to be deterministic without it
    torch.use_deterministic_algorithms(True)


def host_name() -> str:
    """This machine's name; under Slurm the name that Slurm's commands use."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def host_names(group: dist.ProcessGroup) -> list[str]:
    """Collective over group, which has all ranks. The host name of each rank."""
    hosts: list[str] = [""] * dist.get_world_size(group)
    dist.all_gather_object(hosts, host_name(), group)
    return hosts


def record_collectives(folder: Path, size: int) -> None:
    """Have NCCL's flight recorder keep the last `size` collectives, and write them to folder/rank_N on a time-out.

    Call it before init_process_group, which reads these environment variables; a variable that is set already stays.
    """
    folder.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("TORCH_NCCL_TRACE_BUFFER_SIZE", str(size))
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
    os.environ.setdefault("TORCH_NCCL_DEBUG_INFO_TEMP_FILE", str(folder / "rank_"))


def init_process_group(device: torch.device, rank: int, world_size: int, timeout_seconds: int) -> None:
    """Collective. gloo for CPU tensors, and NCCL for CUDA tensors. A single process needs no launcher."""
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    # device_id is left out: given to a mixed backend it also binds gloo to the GPU
    store = dist.HashStore() if world_size == 1 else None
    dist.init_process_group(
        backend, store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=timeout_seconds)
    )


def peak_flops(device: torch.device, tflops: float | None) -> float | None:
    """Peak bf16 FLOP/s of one device: `tflops` * 1e12 if given, else of its data sheet; None if it is not known."""
    if tflops is not None:
        return tflops * 1e12
    if device.type == "cuda":
        gpu = gpu_of_device(torch.cuda.get_device_name(device))
        return gpu.bf16_tflops * 1e12 if gpu else None
    return None


def peak_memory_gib(device: torch.device) -> float:
    """The peak so far in GiB: of reserved CUDA memory, or on the CPU of the process' resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on macOS, in KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def available_host_memory() -> int | None:
    """Bytes that are still free for this process, in the machine and in its control group; None: unknown."""
    free = []
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        free.append(int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1]) * 1024)
    with contextlib.suppress(OSError, ValueError):  # ValueError: "max" stands for no limit
        group = Path("/sys/fs/cgroup")  # inside a container, the container's
        free.append(int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    return min(free) if free else None


class GarbageCollection:
    """Run Python's garbage collector only every `freq` steps: a collection on one rank stalls all other ranks."""

    def __init__(self, freq: int):
        self.freq = freq
        gc.disable()
        gc.collect()

    def run(self, step: int) -> None:
        if step % self.freq == 0:
            gc.collect(1)
