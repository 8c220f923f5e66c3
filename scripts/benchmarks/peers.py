"""The same training in this trainer and in its peers, in turns, on one machine.

    python scripts/benchmarks/peers.py --processes 2 --layers 4
    python scripts/benchmarks/peers.py --processes 8 --flavor llama3.2_1b --seq-len 131072 --steps 10       # on GPUs

Every process trains rows of its own, each of eight documents, data-parallel under FSDP2: in float32 on the CPU; on GPUs
with bfloat16 computation of float32 parameters. --recompute recomputes whole blocks. Peers: transformers'
LlamaForCausalLM under FSDP2 (sdpa with a document mask on the CPU; on GPUs flash_attention_2 if it is installed), and
on GPUs, if liger-kernel is installed, the same with its fused loss. The losses are printed, to show that the work is
the same. torchtitan 0.2.2 has this package's name and cannot be in the same Python, so it is left out. The figures to
quote are the ratios.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from torchtitan.extensions.cluster.launch import launch

SHARES = (1490, 1021, 640, 385, 260, 150, 101, 49)  # of 4,096 tokens: the documents of a row

Step = Callable[..., float]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--flavor", default="smollm2_135m", help="a Llama of torchtitan/models/registry.py")
    parser.add_argument("--layers", type=int, help="how many of its layers (default: all)")
    parser.add_argument("--seq-len", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=3, help="timed steps per round")
    parser.add_argument("--rounds", type=int, default=2, help="how many turns each side takes")
    parser.add_argument("--recompute", action="store_true", help="full activation checkpointing on every side")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    parser.add_argument("--serve", choices=list(SIDES), help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    own = parser.parse_args()
    if own.serve:
        return serve(own)
    results: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES if is_available(side)}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "numbers.json"
        for _ in range(own.rounds):
            for side, rounds in results.items():
                command = [sys.executable, __file__, *sys.argv[1:], "--serve", side, "--out", str(out)]
                if code := launch(command, own.processes):
                    print(f"error: {side} ended with exit code {code}; its error is above", file=sys.stderr)
                    return code
                rounds.append(json.loads(out.read_text()))
    table = {side: summarize(rounds, own.seq_len * own.processes) for side, rounds in results.items()}
    print(f"\n{own.flavor}, {own.layers or 'all'} layers, rows of {own.seq_len} tokens, {own.processes} processes")
    for side, row in table.items():
        print(
            f"{side:20} {row['tokens_per_second']:10,.0f} tokens/s  {row['peak_gib']:7.2f} GiB  "
            f"{row['tokens_per_second'] / table['ours']['tokens_per_second']:6.2f}x  losses "
            + ", ".join(f"{loss:.5f}" for loss in row["losses"])
        )
    if own.json:
        own.json.write_text(json.dumps(table, indent=1) + "\n")
    return 0


def summarize(rounds: list[dict[str, Any]], tokens: int) -> dict[str, Any]:
    """The numbers of a side's rounds; tokens: per step, of all processes."""
    seconds = [s for one in rounds for s in one["seconds"]]
    peak = max(one["peak_gib"] for one in rounds)
    return {
        "tokens_per_second": tokens / statistics.median(seconds),
        "peak_gib": peak,
        "losses": rounds[0]["losses"],
    }


def is_available(side: str) -> bool:
    """Liger's side needs CUDA and liger-kernel."""
    if side != "transformers, liger":
        return True
    import torch

    return torch.cuda.is_available() and importlib.util.find_spec("liger_kernel") is not None


def serve(own: argparse.Namespace) -> int:
    """One rank of one side: a warm-up step, then the timed steps; rank 0 writes the numbers."""
    import torch
    import torch.distributed as dist

    from torchtitan.models.registry import FLAVORS
    from torchtitan.tools.device import init_process_group, peak_memory_gib, pick_device

    rank, local_rank, ranks = (int(os.environ[k]) for k in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
    device = pick_device(local_rank)
    init_process_group(device, rank, ranks, 600)
    group = dist.new_group(backend="gloo")
    args = FLAVORS[own.flavor]
    args = replace(args, n_layers=own.layers or args.n_layers)
    step = SIDES[own.serve](args, own, device, rows_of(args.vocab_size, own.seq_len, rank, device))
    seconds, losses = [], []
    for _ in range(own.steps + 1):
        dist.barrier(group)
        start = time.perf_counter()
        loss = torch.tensor(step())
        dist.barrier(group)
        seconds.append(time.perf_counter() - start)
        dist.all_reduce(loss, group=group)
        losses.append(float(loss))
    memory = torch.tensor(peak_memory_gib(device), dtype=torch.float64)
    dist.all_reduce(memory, op=dist.ReduceOp.MAX, group=group)
    if rank == 0:
        own.out.write_text(json.dumps({"seconds": seconds[1:], "losses": losses, "peak_gib": float(memory)}))
    dist.barrier(group)
    return 0


def documents(seq_len: int) -> list[int]:
    """Lengths of a row's documents, which sum to seq_len."""
    lengths = [seq_len * share // sum(SHARES) for share in SHARES]
    lengths[0] += seq_len - sum(lengths)
    return lengths


def rows_of(vocab_size: int, seq_len: int, rank: int, device: Any) -> Iterator[tuple[Any, Any, Any]]:
    """This rank's rows, the same for every side: tokens, labels, positions, int64[seq_len] each."""
    import torch

    lengths = documents(seq_len)
    generator = torch.Generator().manual_seed(rank)
    positions = torch.cat([torch.arange(n) for n in lengths])
    while True:
        tokens = torch.randint(0, vocab_size, (seq_len,), generator=generator)
        labels = tokens.roll(-1)
        labels[torch.tensor(lengths).cumsum(0) - 1] = -100
        yield tokens.to(device), labels.to(device), positions.to(device)


def ours(args: Any, own: argparse.Namespace, device: Any, rows: Iterator[Any]) -> Step:
    """This trainer's model and optimizer; a step can be given how many MiB of logits it makes at a time."""
    import torch

    from torchtitan.attention.segments import Segments
    from torchtitan.components.optimizer import build_optimizer
    from torchtitan.config.schema import ActivationCheckpoint, JobConfig, Optimizer, Training
    from torchtitan.distributed.parallel_dims import ParallelDims
    from torchtitan.distributed.parallelize import build_sharded_model
    from torchtitan.models.transformer import init_weights

    computed = "bfloat16" if device.type == "cuda" else "float32"
    config = JobConfig(
        training=Training(seq_len=own.seq_len, mixed_precision_param=computed),  # type: ignore[arg-type]
        activation_checkpoint=ActivationCheckpoint(mode="full" if own.recompute else "none"),
    )
    dims = ParallelDims.build(device.type, 1, own.processes, 1, 1)
    model = build_sharded_model(args, config, dims, device)
    init_weights(model, seed=0)
    optimizer = build_optimizer(model, Optimizer(lr=1e-4))
    ends = torch.tensor([0, *documents(own.seq_len)]).cumsum(0)
    divisor = float(own.processes * (own.seq_len - len(SHARES)))

    def step(loss_tile_mib: int | None = None) -> float:
        if loss_tile_mib is not None:
            model.output.tile_bytes = loss_tile_mib << 20
        tokens, labels, positions = next(rows)
        loss, _ = model(tokens, positions, Segments.whole(ends), labels=labels, divisor=divisor)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def transformers_llama(args: Any, seq_len: int, flash: bool = False) -> Any:
    """transformers' LlamaForCausalLM in float32, with the weights that `ours` starts from."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from torchtitan.models.hf.weights import hf_name
    from torchtitan.models.transformer import Transformer, init_weights

    config = LlamaConfig(
        vocab_size=args.vocab_size,
        hidden_size=args.dim,
        intermediate_size=args.ffn_dim,
        num_hidden_layers=args.n_layers,
        num_attention_heads=args.n_heads,
        num_key_value_heads=args.n_kv_heads,
        head_dim=args.head_dim,
        rms_norm_eps=args.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": args.rope.theta},
        max_position_embeddings=seq_len,
        tie_word_embeddings=args.tied_embeddings,
        attn_implementation="flash_attention_2" if flash else "sdpa",
        use_cache=False,
    )
    model = LlamaForCausalLM(config).float().train()
    start = Transformer(replace(args, rope=replace(args.rope, scaling=None)))
    init_weights(start, seed=0)
    model.load_state_dict({hf_name(n): p.detach() for n, p in start.named_parameters()}, strict=False)
    return model


def transformers_step(model: Any, rows: Iterator[Any], seq_len: int, processes: int) -> Step:
    """A training step; transformers makes the document mask from the positions.

    Its loss is a mean over a rank's labels, of which all ranks have as many; FSDP2 averages over ranks.
    """
    import torch

    from torchtitan.components.optimizer import build_optimizer
    from torchtitan.config.schema import Optimizer

    optimizer = build_optimizer(model, Optimizer(lr=1e-4))
    firsts = torch.tensor([0, *documents(seq_len)[:-1]]).cumsum(0)

    def step() -> float:
        tokens, _, positions = next(rows)
        labels = tokens.clone()
        labels[firsts] = -100  # transformers shifts the labels itself: a document's first token is not a target
        loss = model(input_ids=tokens[None], position_ids=positions[None], labels=labels[None]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item() / processes

    return step


def transformers_fsdp2(
    args: Any, own: argparse.Namespace, device: Any, rows: Iterator[Any], liger: bool = False
) -> Step:
    import torch
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    cuda = device.type == "cuda"
    if liger:
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        # the fused loss alone: its other kernels are not compared here
        apply_liger_kernel_to_llama(rope=False, swiglu=False, rms_norm=False, fused_linear_cross_entropy=True)
    flash = cuda and importlib.util.find_spec("flash_attn") is not None
    model = transformers_llama(args, own.seq_len, flash).to(device)
    if own.recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16 if cuda else None, reduce_dtype=torch.float32)
    mesh = torch.distributed.init_device_mesh(device.type, (own.processes,))
    for block in model.model.layers:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    return transformers_step(model, rows, own.seq_len, own.processes)


def transformers_liger(*args: Any) -> Step:
    return transformers_fsdp2(*args, liger=True)


SIDES: dict[str, Callable[..., Step]] = {
    "ours": ours,
    "transformers, FSDP2": transformers_fsdp2,
    "transformers, liger": transformers_liger,
}

if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # as torchtitan/train.py ends
