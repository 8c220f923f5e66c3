"""The device mesh: which rank is which replica, shard, context part and tensor part."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh


@dataclass(frozen=True)
class ParallelDims:
    """Two views of the same ranks, tp innermost, so that its ranks are neighbours with the fastest links."""

    mesh: DeviceMesh
    """dp_replicate, dp_shard, cp, tp: who reads and computes what. It has all dimensions, most of size 1."""

    parameter_mesh: DeviceMesh
    """dp_replicate, fsdp, tp, with fsdp = dp_shard x cp: who holds which parameters. A mesh of its own, because
    dimensions cannot be joined through PyTorch's public interface."""

    @staticmethod
    def build(device_type: str, dp_replicate: int, dp_shard: int, cp: int, tp: int) -> ParallelDims:
        """Collective. The product of the degrees is the world size (config/checks.py makes sure of it)."""
        names = ("dp_replicate", "dp_shard", "cp", "tp")
        mesh = init_device_mesh(device_type, (dp_replicate, dp_shard, cp, tp), mesh_dim_names=names)
        sizes = (dp_replicate, dp_shard * cp, tp)
        return ParallelDims(mesh, init_device_mesh(device_type, sizes, mesh_dim_names=("dp_replicate", "fsdp", "tp")))

    def size(self, name: str) -> int:
        """Of a dimension of `mesh`."""
        return self.mesh[name].size()

    @property
    def dp_degree(self) -> int:
        """Ranks that read different rows."""
        return self.size("dp_replicate") * self.size("dp_shard")

    @property
    def dp_rank(self) -> int:
        """Which of the dp_degree shares of the rows this rank reads; cp and tp ranks of a group read the same."""
        return (
            self.mesh["dp_replicate"].get_local_rank() * self.size("dp_shard") + self.mesh["dp_shard"].get_local_rank()
        )

    @property
    def cp_rank(self) -> int:
        """Which part of a micro-batch's tokens this rank holds."""
        return self.mesh["cp"].get_local_rank()

    @property
    def counts_here(self) -> bool:
        """Whether this rank's loss and token counts enter a sum over the world: its tp copies hold the same numbers."""
        return self.mesh["tp"].get_local_rank() == 0

    @cached_property  # one object for all models that are built: torch.compile would see two equal meshes as two
    def tp_mesh(self) -> DeviceMesh:
        """Ranks that share each matrix."""
        return self.parameter_mesh["tp"]

    @cached_property
    def fsdp_mesh(self) -> DeviceMesh:
        """1-D for FSDP, 2-D (replicate, shard) for HSDP."""
        replicated = self.size("dp_replicate") > 1
        return self.parameter_mesh["dp_replicate", "fsdp"] if replicated else self.parameter_mesh["fsdp"]

    def groups(self) -> list[dist.ProcessGroup]:
        """Every process group of the mesh."""
        meshes = (self.mesh, self.parameter_mesh)
        return [mesh.get_group(name) for mesh in meshes for name in mesh.mesh_dim_names or ()]
