"""Data sheets of GPUs: memory, peak FLOP/s, links. The only place for such numbers."""

from __future__ import annotations

from dataclasses import dataclass

from torchtitan.tools.errors import UserError


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU. The numbers are from the vendor's data sheet, without sparsity."""

    name: str
    """Its name in scripts/estimate.py --gpu."""

    device_name: str
    """A part of torch.cuda.get_device_name() that identifies it."""

    memory_gib: float
    """The memory that PyTorch can use, rounded down: the data sheet's GB less what driver and ECC take."""

    bf16_tflops: float

    fp8_tflops: float | None
    """None if it does not have FP8."""

    link_gb: float
    """GB/s to the other GPUs of its node, per direction."""

    network_gb: float
    """GB/s per GPU to other nodes, per direction, in the vendor's usual server."""


# NVIDIA H100, H200, A100, L40S, GB200, HGX B200 and B300, and AMD Instinct MI300X data sheets. A100, H100, H200 and
# B200 servers: one network card of 200, 400, 400 and 400 Gb/s per GPU. The first whose device_name matches is used.
GPUS = (
    Gpu("h100_nvl", "H100 NVL", 92, 835, 1671, 300, 50),
    Gpu("h100_pcie", "H100 PCIe", 78, 756, 1513, 64, 25),
    Gpu("gh200", "GH200", 94, 989, 1979, 450, 50),
    Gpu("h100", "H100", 78, 989, 1979, 450, 50),
    Gpu("h200", "H200", 139, 989, 1979, 450, 50),
    Gpu("h800", "H800", 78, 989, 1979, 200, 50),
    Gpu("gb200", "GB200", 184, 2500, 5000, 900, 50),
    Gpu("b200", "B200", 178, 2250, 4500, 900, 50),
    Gpu("b300", "B300", 266, 2250, 4500, 900, 100),
    Gpu("a100_40g", "A100-SXM4-40GB", 39, 312, None, 300, 25),
    Gpu("a100", "A100", 78, 312, None, 300, 25),
    Gpu("a800", "A800", 78, 312, None, 200, 25),
    Gpu("l40s", "L40S", 44, 362, 733, 32, 25),
    Gpu("mi300x", "MI300X", 190, 1307, 2615, 448, 50),
)


def gpu_called(name: str) -> Gpu:
    """The GPU of that name, upper or lower case; UserError with the list of names if there is none."""
    for gpu in GPUS:
        if gpu.name == name.lower().replace("-", "_"):
            return gpu
    raise UserError(f'--gpu = "{name}" is not known; known are {", ".join(gpu.name for gpu in GPUS)}, and cpu.')


def gpu_of_device(device_name: str) -> Gpu | None:
    """The GPU whose device name PyTorch reports; None if it is not in the list."""
    return next((gpu for gpu in GPUS if gpu.device_name in device_name), None)
