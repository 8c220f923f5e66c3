"""Peak memory of training on the CPU, in one process: the tiled loss, activations by mode, and growth with length.

    python scripts/benchmarks/memory.py            # all of it; a few minutes
    python scripts/benchmarks/memory.py loss       # or one of loss, activations, length

Bytes of live tensors are counted after every operator. That misses what a kernel uses inside itself, so a separate
process does the same work uncounted, and the growth of its peak resident set is printed beside the count. The plain
loss at 32K tokens, whose float32 logits alone are 16 GiB, is counted on tensors without memory (FakeTensorMode).
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from torchtitan.extensions.planner.live_memory import LiveBytes

MIB = 2**20
WORDS = 131072


def peak_resident() -> int:
    """The process's largest resident set in bytes since reset_resident()."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) * 1024


def reset_resident() -> None:
    """Start peak_resident() anew (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")


# ---- what is measured: functions that prepare their inputs and return the work ------------------------------------


def loss(tokens: int, dim: int, tiled: bool) -> Callable[[], Any]:
    """Forward and backward of the output head and its loss, in bfloat16; weight and hidden states exist before."""
    from torchtitan.models.loss_head import OutputHead

    with torch.device("meta"):
        head = OutputHead(dim, WORDS)
    head.weight = torch.nn.Parameter(torch.full((WORDS, dim), 0.01, dtype=torch.bfloat16))
    x = torch.full((tokens, dim), 0.01, dtype=torch.bfloat16, requires_grad=True)
    labels = torch.zeros(tokens, dtype=torch.int64)

    def work() -> None:
        result = head(x, labels, 1.0)[0] if tiled else F.cross_entropy(F.linear(x, head.weight).float(), labels)
        result.backward()

    return work


def model_step(tokens: int, layers: int, dim: int, options: dict[str, Any], backward: bool) -> Callable[[], Any]:
    """Forward, and backward if `backward`, of a model in bfloat16 under FSDP2, over documents of 1,024 tokens."""
    from torchtitan.attention.segments import Segments
    from torchtitan.config.schema import ActivationCheckpoint, JobConfig, Training
    from torchtitan.distributed.parallel_dims import ParallelDims
    from torchtitan.distributed.parallelize import build_sharded_model
    from torchtitan.models.transformer import TransformerArgs, init_weights
    from torchtitan.tools.device import init_process_group

    if not torch.distributed.is_initialized():
        init_process_group(torch.device("cpu"), 0, 1, 60)
    heads = dim // 32
    args = TransformerArgs(dim, layers, heads, heads // 2, 32, 7 * dim // 2, vocab_size=512)
    config = JobConfig(
        training=Training(loss_tile_mib=1, mlp_tile_tokens=options.get("mlp_tile_tokens")),
        activation_checkpoint=ActivationCheckpoint(
            mode=options.get("mode", "none"), selective_ac_matmuls=options.get("selective_ac_matmuls", 2)
        ),
    )
    model = build_sharded_model(args, config, ParallelDims.build("cpu", 1, 1, 1, 1), torch.device("cpu"))
    init_weights(model, 0)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)  # as in every micro-batch except the first
    inputs = torch.arange(tokens) % args.vocab_size
    positions = torch.arange(tokens) % 1024
    mask = Segments.whole(torch.arange(0, tokens + 1, 1024).numpy())

    def work() -> Any:
        total, _ = model(inputs, positions, mask, labels=inputs, divisor=float(tokens))
        if backward:
            total.backward()
        return total

    return work


WORKS: dict[str, Callable[..., Callable[[], Any]]] = {"loss": loss, "model": model_step}


def count(name: str, *arguments: Any, fake: bool = False) -> tuple[int, int]:
    """(peak bytes beyond those at the beginning, bytes that the result keeps alive); fake: tensors have no memory."""
    if fake:
        from torch._subclasses.fake_tensor import FakeTensorMode
    with FakeTensorMode() if fake else nullcontext():
        work = WORKS[name](*arguments)
        gc.collect()
        with LiveBytes(only_new=True) as seen:
            result = work()
            gc.collect()
            kept = seen.now()
            del result
    return seen.peak, kept


def resident(name: str, *arguments: Any) -> int:
    """By how many bytes the resident set of a separate process grows during the same work."""
    command = [sys.executable, __file__, "--resident", json.dumps([name, *arguments])]
    # glibc then returns blocks of 64 KiB and more to the system at once, instead of keeping them for reuse
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    if run.returncode:
        raise SystemExit(f"{name}{arguments} ended with {run.returncode}:\n{run.stderr}")
    return int(run.stdout.split()[-1])


def serve(name: str, *arguments: Any) -> None:
    """A child process: prepare, warm up on few tokens, and print by how many bytes the peak grew."""
    torch.set_num_threads(1)
    warm = (256, *arguments[1:]) if name == "loss" else (1024, *arguments[1:])
    WORKS[name](*warm)()
    work = WORKS[name](*arguments)
    gc.collect()
    reset_resident()
    before = peak_resident()
    work()
    print(peak_resident() - before)


def row(*cells: Any) -> None:
    print("| " + " | ".join(f"{c:,.1f}" if isinstance(c, float) else str(c) for c in cells) + " |", flush=True)


def losses() -> None:
    """Tiled: at most a tenth of plain up to a width of about 5,000; beyond, the matrix's gradient alone is more."""
    print(f"\nExtra memory of the output head and loss, forward and backward, {WORDS:,} words, bfloat16, MiB:\n")
    row("dim, tokens", "loss", "counted", "how", "resident set")
    row("---", "---", "---:", "---", "---:")
    for dim, tokens, tiled, allocated in (
        (64, 2048, False, True),
        (64, 2048, True, True),
        (64, 32768, False, False),
        (64, 32768, True, True),
        (4096, 32768, False, False),
        (4096, 32768, True, False),
        (8192, 32768, False, False),
        (8192, 32768, True, False),
    ):
        peak, _ = count("loss", tokens, dim, tiled, fake=not allocated)
        rss = resident("loss", tokens, dim, tiled) / MIB if allocated else "-"
        how = "allocated" if allocated else "fake tensors"
        row(f"{dim:,}, {tokens:,}", "tiled" if tiled else "plain", peak / MIB, how, rss)


MODES: dict[str, dict[str, Any]] = {
    "none": {},
    "none, tiled feed-forward": {"mlp_tile_tokens": 512},
    "selective, matmuls 2": {"mode": "selective"},
    "selective, matmuls 0": {"mode": "selective", "selective_ac_matmuls": 0},
    "selective, matmuls 0, tiled feed-forward": {
        "mode": "selective",
        "selective_ac_matmuls": 0,
        "mlp_tile_tokens": 512,
    },
    "full": {"mode": "full"},
    "full, tiled feed-forward": {"mode": "full", "mlp_tile_tokens": 512},
}


def activations() -> None:
    """Full recomputation: at most 2 bytes x dim x 1.1 per token and layer."""
    dim, tokens = 256, 4096
    print(
        f"\nBytes per token in bfloat16, dim {dim}, feed-forward {7 * dim // 2}, {tokens:,} tokens; kept after forward,"
    )
    print(
        "per layer (difference of 6 and 2 layers), in units of 2 dim; and the peak of forward and backward, 2 layers:\n"
    )
    row("mode", "kept per layer", "/ (2 dim)", "peak")
    row("---", "---:", "---:", "---:")
    for mode, options in MODES.items():
        few, many = (count("model", tokens, layers, dim, options, False)[1] for layers in (2, 6))
        kept = (many - few) / 4 / tokens
        peak = count("model", tokens, 2, dim, options, True)[0] / tokens
        row(mode, kept, f"{kept / 2 / dim:.3f}", peak)


def lengths() -> None:
    """Linear: bytes per further token are the same from 8K to 32K as from 32K to 128K tokens, within 5%."""
    dim, layers, options = 128, 2, {"mode": "full", "mlp_tile_tokens": 256}
    print(f"\nPeak of forward and backward by length: dim {dim}, {layers} layers, full recomputation, tiled loss and")
    print("feed-forward, documents of 1,024 tokens:\n")
    row("tokens", "counted MiB", "bytes per token", "per further token", "resident set MiB")
    row("---:", "---:", "---:", "---:", "---:")
    before = None
    for tokens in (8192, 32768, 131072):
        peak, _ = count("model", tokens, layers, dim, options, True)
        further = (peak - before[1]) / (tokens - before[0]) if before else "-"
        before = tokens, peak
        grown = resident("model", tokens, layers, dim, options, True) / MIB
        row(f"{tokens:,}", peak / MIB, peak / tokens, further, grown)


PARTS = {"loss": losses, "activations": activations, "length": lengths}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=f"any of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--resident", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.resident:
        return serve(*json.loads(args.resident))
    for part in args.parts or PARTS:
        if part not in PARTS:
            parser.error(f"there is no part {part}: {', '.join(PARTS)}")
        PARTS[part]()


if __name__ == "__main__":
    main()
