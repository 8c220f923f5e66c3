"""How fast a run is: rates over the steps since the last logged one."""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.distributed as dist

from torchtitan.components.setup import StageInputs
from torchtitan.config import JobConfig
from torchtitan.distributed.context_parallel.local_batch import LocalBatch
from torchtitan.distributed.parallel_dims import ParallelDims
from torchtitan.models.work import forward_flops, recomputed_by, training_flops, work_of
from torchtitan.tools.device import peak_flops, peak_memory_gib
from torchtitan.tools.torch_compat import compilations


class Throughput:
    """Counts what has been done since the last logged step.

    start: time.perf_counter() at that step, plus the seconds since then that were not training. steps: finished since
    then. tokens: of the global batches, without padding. waited: seconds that this rank waited for its loader.
    """

    def __init__(self, config: JobConfig, inputs: StageInputs, dims: ParallelDims, device: torch.device) -> None:
        self.config, self.plan, self.dims, self.device = config, inputs.plan, dims, device
        self.work, self.recomputed = work_of(inputs.args), recomputed_by(config, inputs.args)
        self.compiled_in_first_step = 0
        self.restart()

    def restart(self) -> None:
        """Start counting from zero."""
        self.start = time.perf_counter()
        self.steps = self.tokens = 0
        self.flops = self.recomputed_flops = self.waited = 0.0
        self.pairs = self.pairs_of_busiest = self.kv_received = self.kv_of_all_gather = 0.0

    def leave_out(self, seconds: float) -> None:
        """Do not count these seconds as training."""
        self.start += seconds

    def first_step_ended(self) -> None:
        """Compilations from now on are recompilations."""
        self.compiled_in_first_step = compilations()

    def add(self, batches: list[LocalBatch], tokens: int) -> None:
        """Count a step. batches: this rank's (other ranks have about as much work); tokens: of the global batch."""
        for batch in batches:
            self.flops += training_flops(self.work.parameters, batch.unpadded, self.work.width, batch.pairs)
            recomputed = self.recomputed
            self.recomputed_flops += forward_flops(recomputed.parameters, batch.unpadded, recomputed.width, batch.pairs)
            self.pairs += batch.pairs
            self.pairs_of_busiest += batch.pairs_of_busiest
            self.kv_received += batch.kv_received
            self.kv_of_all_gather += batch.kv_of_all_gather
        self.tokens += tokens
        self.steps += 1

    def gather(self, group: dist.ProcessGroup) -> dict[str, Any]:
        """Collective. The rates of metrics.jsonl (docs/training.md).

        memory_gib and recompilations are the largest of all ranks, cp_* are ratios of sums over all ranks; mfu, hfu and
        data_wait are this rank's.
        """
        largest = torch.tensor(
            [peak_memory_gib(self.device), compilations() - self.compiled_in_first_step], dtype=torch.float64
        )
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
        cp = self.dims.size("cp")
        work = torch.tensor([self.pairs_of_busiest * cp, self.pairs, self.kv_received, self.kv_of_all_gather])
        dist.all_reduce(work, group=group)
        seconds = time.perf_counter() - self.start
        ranks_per_row = cp * self.dims.size("tp")
        peak = peak_flops(self.device, self.config.metrics.peak_tflops)
        gathered = cp > 1 and self.config.parallelism.context_parallel_exchange != "ulysses"
        room = self.steps * self.plan.rows_per_step * self.config.training.seq_len
        return {
            "tokens_per_second": self.tokens / seconds,
            "padding": 1 - self.tokens / room,
            "cp_imbalance": float(work[0] / work[1]) if cp > 1 else None,
            "cp_kv_received": float(work[2] / work[3]) if gathered else None,
            "data_wait": self.waited / seconds,
            "mfu": self.flops / ranks_per_row / seconds / peak if peak else None,
            "hfu": (self.flops + self.recomputed_flops) / ranks_per_row / seconds / peak if peak else None,
            "memory_gib": float(largest[0]),
            "recompilations": int(largest[1]),
            "seconds_per_step": seconds / self.steps,
        }
