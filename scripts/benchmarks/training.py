"""A few steps of one stage: tokens/s, MFU by the mask, HFU, peak memory, exposed communication.

    python scripts/benchmarks/training.py --processes 2 --steps 5 --job.config_file train_configs/demo/1k.toml
    python scripts/benchmarks/training.py --processes 8 --steps 10 --json result.json \\
        --job.config_file my.toml --compile.enable

The stage's data are read; its dump folder is neither read nor written, and nothing is saved. MFU and HFU need the
device's peak (metrics.peak_tflops for an unknown GPU). Exposed communication is the share of one more step, under
PyTorch's profiler, in which rank 0's GPU runs NCCL's kernels and no others. It cannot be measured on the CPU, where
gloo's threads and the computation share the cores.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from torchtitan.config import JobConfig, load_config
from torchtitan.extensions.cluster.launch import launch
from torchtitan.tools.errors import UserError

Interval = tuple[float, float]


def main(args: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="every other --table.key overrides the stage's key",
        allow_abbrev=False,
    )
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--steps", type=int, default=5, help="timed steps")
    parser.add_argument("--warmup", type=int, default=2, help="steps before the timed ones")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    own, overrides = parser.parse_known_args(args)
    try:
        if min(own.processes, own.steps, own.warmup) < 1:
            raise UserError("--processes, --steps and --warmup must be at least 1.")
        config = load_config(overrides)
        if "RANK" not in os.environ:
            return launch([sys.executable, __file__, *args], own.processes)
        numbers = measure(config, own.steps, own.warmup)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if os.environ["RANK"] == "0":
        print(as_table(numbers))
        if own.json:
            own.json.write_text(json.dumps(numbers, indent=1) + "\n")
    return 0


def only_steps(config: JobConfig, steps: int, folder: str) -> JobConfig:
    """The stage without saving, gates, a previous stage or initial weights."""
    warmup = min(config.lr_scheduler.warmup_steps, steps)
    return replace(
        config,
        job=replace(config.job, dump_folder=folder),
        training=replace(config.training, steps=steps),
        lr_scheduler=replace(config.lr_scheduler, warmup_steps=warmup),
        checkpoint=replace(
            config.checkpoint, enable=False, last_save_in_hf=False, initial_load_in_hf=False, initial_load_path=None
        ),
        metrics=replace(config.metrics, enable_tensorboard=False, enable_wandb=False),
        stage=replace(config.stage, after=None, run_chain=False, gates=()),
    )


def measure(config: JobConfig, steps: int, warmup: int) -> dict[str, Any]:
    """Collective; the numbers of the run are rank 0's."""
    import torch
    import torch.distributed as dist

    from torchtitan.extensions.wiring import build_trainer, check
    from torchtitan.tools.device import peak_flops, peak_memory_gib
    from torchtitan.tools.logging import init_logger

    rank, local_rank, ranks = (int(os.environ[k]) for k in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
    init_logger(rank, ranks)
    with tempfile.TemporaryDirectory() as folder:
        config = only_steps(config, warmup + steps + 1, folder)
        check(config, ranks)
        trainer = build_trainer(config, rank, local_rank, ranks)
        cuda = trainer.device.type == "cuda"
        done, seconds = trainer.throughput, []
        for step in range(warmup + steps):
            if step == warmup:
                done.restart()
            start = time.perf_counter()
            trainer.train_step()
            if cuda:
                torch.cuda.synchronize()
            dist.barrier(trainer.cpu_group)
            seconds.append(time.perf_counter() - start)
        # read before the traced step adds to them
        tokens, flops, recomputed_flops = done.tokens, done.flops, done.recomputed_flops
        memory = torch.tensor(peak_memory_gib(trainer.device), dtype=torch.float64)
        dist.all_reduce(memory, op=dist.ReduceOp.MAX, group=trainer.cpu_group)
        exposed = exposed_communication(trainer) if cuda else None
        peak = peak_flops(trainer.device, config.metrics.peak_tflops)
        ranks_per_row = trainer.dims.size("cp") * trainer.dims.size("tp")
        trainer.close()
    each = statistics.median(seconds[warmup:])
    model = flops / ranks_per_row / steps
    hardware = model + recomputed_flops / ranks_per_row / steps
    return {
        "device": torch.cuda.get_device_name(local_rank) if cuda else "cpu",
        "processes": ranks,
        "steps": steps,
        "seconds_per_step": each,
        "tokens_per_second": tokens / steps / each,
        "tokens_per_second_per_process": tokens / steps / each / ranks,
        "model_tflops_per_process": model / each / 1e12,
        "mfu": model / each / peak if peak else None,
        "hfu": hardware / each / peak if peak else None,
        "memory_gib": float(memory),
        "memory_is": "reserved CUDA memory" if cuda else "resident set",
        "exposed_communication": exposed,
    }


def exposed_communication(trainer: Any) -> float:
    """Share of one step in which this GPU runs collectives and nothing else. Collective; needs CUDA."""
    import torch
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        start = time.perf_counter()
        trainer.train_step()
        torch.cuda.synchronize()
        microseconds = (time.perf_counter() - start) * 1e6
    kernels = [e for e in profiler.events() if e.device_type == DeviceType.CUDA]
    spans = [("nccl" in e.name.lower(), (e.time_range.start, e.time_range.end)) for e in kernels]
    collectives = [span for is_nccl, span in spans if is_nccl]
    others = [span for is_nccl, span in spans if not is_nccl]
    return uncovered(collectives, others) / microseconds


def uncovered(of: Iterable[Interval], by: Iterable[Interval]) -> float:
    """Length of what the intervals `of` cover and the intervals `by` do not."""
    by = list(by)
    return length([*of, *by]) - length(by)


def length(intervals: Iterable[Interval]) -> float:
    """Length of the union of the intervals."""
    total, end = 0.0, float("-inf")
    for a, b in sorted(intervals):
        total += max(b - max(a, end), 0)
        end = max(end, b)
    return total


def as_table(numbers: dict[str, Any]) -> str:
    def share(value: float | None, why: str) -> str:
        return f"{value:.1%}" if value is not None else f"- ({why})"

    rows = {
        "device": f"{numbers['processes']} x {numbers['device']}",
        "seconds per step (median)": f"{numbers['seconds_per_step']:.3f}",
        "tokens/s": f"{numbers['tokens_per_second']:,.0f}",
        "tokens/s per process": f"{numbers['tokens_per_second_per_process']:,.0f}",
        "TFLOP/s per process, by the mask": f"{numbers['model_tflops_per_process']:.4g}",
        "MFU, by the mask": share(numbers["mfu"], "metrics.peak_tflops is not known"),
        "HFU": share(numbers["hfu"], "metrics.peak_tflops is not known"),
        f"peak memory ({numbers['memory_is']})": f"{numbers['memory_gib']:.2f} GiB",
        "exposed communication": share(numbers["exposed_communication"], "not measured on the CPU"),
    }
    return "\n".join(f"| {name} | {value} |" for name, value in rows.items())


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    os._exit(code)  # as torchtitan/train.py ends: gloo's threads may outlive the interpreter's
