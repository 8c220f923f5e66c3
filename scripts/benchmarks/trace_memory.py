"""The planner's peak beside a trace of the trainer's own code, on tensors without memory and ranks that do not exist.

    python scripts/benchmarks/trace_memory.py --job.config_file train_configs/llama3_8b/128k.toml --world-size 8
    python scripts/benchmarks/trace_memory.py --world-size 8 --job.config_file my.toml \\
        --parallelism.context_parallel_degree 8

Rank 0's model is built and sharded as in training, over PyTorch's fake process group, and makes two steps on one row of
one document under FakeTensorMode; the bytes alive after each operator of the second step are counted. That needs no GPU
and little memory. It follows what the CPU allocates, as `estimate.py --gpu cpu` does: neither includes what CUDA's
kernels, its allocator and NCCL add. Exit code 2 if the two differ by more than 15%.
"""

from __future__ import annotations

import argparse
import sys
import time

from torchtitan.config import JobConfig, load_config
from torchtitan.tools.errors import UserError

APART = 0.15


def main(args: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="every other --table.key overrides the stage's key",
        allow_abbrev=False,
    )
    parser.add_argument("--world-size", "--world_size", type=int, required=True)
    own, overrides = parser.parse_known_args(args)
    try:
        if own.world_size < 1:
            raise UserError(f"--world-size = {own.world_size} must be at least 1.")
        return compare(load_config(overrides), own.world_size)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def compare(config: JobConfig, world_size: int) -> int:
    from torchtitan.components.setup import model_args
    from torchtitan.extensions.cluster.check_config import check_tables
    from torchtitan.extensions.planner.memory import peak
    from torchtitan.extensions.planner.stage_numbers import numbers_of

    check_tables(config, world_size)
    if config.optimizer.implementation != "fused":
        raise UserError(
            f'optimizer.implementation = "{config.optimizer.implementation}" reads its step from memory that a '
            'trace does not have: only "fused" can be traced.'
        )
    args = model_args(config, None)
    planned = peak(numbers_of(config, args, world_size, "cpu"))
    start = time.perf_counter()
    traced = trace(config, args, world_size)
    apart = planned.total / traced - 1
    print(f"traced  {traced / 2**30:9.2f} GiB ({time.perf_counter() - start:.0f} s)")
    print(f"planned {planned.total / 2**30:9.2f} GiB at {planned.name}: {apart:+.1%}")
    return 2 if abs(apart) > APART else 0


def trace(config: JobConfig, args: object, world_size: int) -> int:
    """Bytes at the peak of rank 0's second step."""
    import torch
    import torch.distributed as dist
    from torch._subclasses.fake_tensor import FakeTensorMode

    from torchtitan.components.loss import train_micro_batch
    from torchtitan.components.optimizer import build_optimizer
    from torchtitan.config.checks import accumulation_steps, resolve_shard_degree
    from torchtitan.datasets.batch import PackedBatch
    from torchtitan.distributed.context_parallel.local_batch import local_batch
    from torchtitan.distributed.parallel_dims import ParallelDims
    from torchtitan.distributed.parallelize import build_sharded_model
    from torchtitan.extensions.planner.live_memory import LiveBytes
    from torchtitan.tools.torch_compat import fake_process_group

    p, t = config.parallelism, config.training
    fake_process_group(world_size)
    degrees = (p.data_parallel_replicate_degree, resolve_shard_degree(config, world_size))
    dims = ParallelDims.build("cpu", *degrees, p.context_parallel_degree, p.tensor_parallel_degree)
    model = build_sharded_model(args, config, dims, torch.device("meta"))  # type: ignore[arg-type]
    ends = torch.arange(0, t.seq_len * t.local_batch_size + 1, t.seq_len, dtype=torch.int32)
    total = int(ends[-1])
    batch = PackedBatch(
        tokens=torch.zeros(total, dtype=torch.int64),
        labels=torch.zeros(total, dtype=torch.int64),
        positions=torch.arange(total) % t.seq_len,
        cu_seqlens=ends,
        cu_documents=ends,
        source=torch.zeros(len(ends) - 1, dtype=torch.int16),
    )
    local = local_batch(
        batch,
        "sdpa",
        p.context_parallel_layout,
        p.context_parallel_exchange,
        p.context_parallel_degree,
        0,
        model.args.sliding_window,
        model.args.sliding_share,
    )
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, LiveBytes() as live:
        model.to_empty(device="cpu")
        model.tie_embeddings()
        optimizer = build_optimizer(model, config.optimizer)
        tensors = {n: mode.from_tensor(getattr(local, n)) for n in ("tokens", "labels", "positions")}
        for _ in range(2):
            live.reset()
            for _ in range(min(accumulation_steps(config, world_size), 2)):  # a third has the same peak as the second
                # copies, so that no micro-batch's inputs are alive before it
                inputs = type(local)(**{**vars(local), **{n: x.clone() for n, x in tensors.items()}})
                train_micro_batch(model, inputs, float(total))
            optimizer.step()
            optimizer.zero_grad()
    dist.destroy_process_group()
    return live.peak


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
