"""The device mesh: which rank is which replica, shard, context part and tensor part."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh


@dataclass(frozen=True)
class ParallelDims:
    """A mesh with the dimensions dp_replicate, dp_shard, cp, tp, in that order; all are there, most of size 1.

    tp is innermost, so that its ranks are neighbours with the fastest links; dp_replicate is outermost.
    """

    mesh: DeviceMesh

    @staticmethod
    def build(device_type: str, dp_replicate: int, dp_shard: int, cp: int, tp: int) -> ParallelDims:
        """Collective. The degrees multiply to the world size (config/checks.py has seen to it)."""
        names = ("dp_replicate", "dp_shard", "cp", "tp")
        return ParallelDims(init_device_mesh(device_type, (dp_replicate, dp_shard, cp, tp), mesh_dim_names=names))

    def size(self, name: str) -> int:
        return self.mesh[name].size()

    @property
    def dp_degree(self) -> int:
        """Ranks that read different rows."""
        return self.size("dp_replicate") * self.size("dp_shard")

    @property
    def dp_rank(self) -> int:
        """Which of the dp_degree shares of the rows this rank reads; tp ranks of a group read the same."""
        return (
            self.mesh["dp_replicate"].get_local_rank() * self.size("dp_shard") + self.mesh["dp_shard"].get_local_rank()
        )

    @property
    def counts_here(self) -> bool:
        """Whether this rank's loss and token counts enter a sum over the world: its tp copies hold the same ones."""
        return self.mesh["tp"].get_local_rank() == 0

    @property
    def fsdp_mesh(self) -> DeviceMesh:
        """1-D for FSDP, 2-D (replicate, shard) for HSDP."""
        return self.mesh["dp_replicate", "dp_shard"] if self.size("dp_replicate") > 1 else self.mesh["dp_shard"]

    def groups(self) -> list[dist.ProcessGroup]:
        """Every process group of the mesh."""
        assert self.mesh.mesh_dim_names is not None
        return [self.mesh.get_group(name) for name in self.mesh.mesh_dim_names]
