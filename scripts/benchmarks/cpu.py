"""Training tokens/s and peak memory on the CPU: this trainer beside transformers' LlamaForCausalLM (sdpa).

    python scripts/benchmarks/cpu.py                       # SmolLM2-135M, 8 documents in a row of 4,096 tokens
    python scripts/benchmarks/cpu.py --layers 8 --steps 5  # a quicker look

Both sides train the same weights on the same packed rows in float32 with fused AdamW; their losses are compared, to
show that the work is the same. Each side is a process of its own, for its own peak memory, and the two take turns step
by step, so that other load on the machine slows both. The figure to quote is the ratio. Then this trainer's loss in one
tile takes turns with the loss in many tiles (--loss-tile-mib), in one process on one model.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from dataclasses import replace

from peers import SHARES, Step, ours, rows_of, transformers_llama, transformers_step

TOKENS = sum(SHARES)  # a row of 8 documents
ONE_TILE_MIB = 1024  # more than a row's logits, 768 MiB


def build(side: str, layers: int) -> Step:
    """A side's function that makes one training step and returns its loss; ours takes a loss tile's size in MiB."""
    import torch

    from torchtitan.models.registry import FLAVORS
    from torchtitan.tools.device import init_process_group

    device = torch.device("cpu")
    args = replace(FLAVORS["smollm2_135m"], n_layers=layers)
    rows = rows_of(args.vocab_size, TOKENS, 0, device)
    if side == "theirs":
        return transformers_step(transformers_llama(args, TOKENS), rows, TOKENS, 1)
    init_process_group(device, 0, 1, 60)
    return ours(args, argparse.Namespace(seq_len=TOKENS, processes=1, recompute=False), device, rows)


def serve(side: str, layers: int) -> None:
    """A child process: for each line read, one step, answered with its seconds, loss and the process's peak memory.

    A line is the size of our loss tile in MiB.
    """
    step = build(side, layers)
    for line in sys.stdin:
        start, processor = time.perf_counter(), time.process_time()
        loss = step(int(line)) if side == "ours" else step()
        seconds, processor = time.perf_counter() - start, time.process_time() - processor
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(json.dumps({"seconds": seconds, "processor": processor, "loss": loss, "peak_gib": peak}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=30, help="how many of SmolLM2-135M's 30 layers")
    parser.add_argument("--steps", type=int, default=4, help="timed steps per side, after one warm-up step")
    parser.add_argument(
        "--loss-tile-mib", type=int, default=64, help="tile size of the tiled loss; the other has one tile per row"
    )
    parser.add_argument("--serve", choices=["ours", "theirs"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.steps < 1 or args.loss_tile_mib < 1:
        parser.error("--steps and --loss-tile-mib must be at least 1")
    if args.serve:
        return serve(args.serve, args.layers)

    command = [sys.executable, __file__, "--layers", str(args.layers), "--serve"]
    sides = {
        side: subprocess.Popen([*command, side], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for side in ("ours", "theirs")
    }
    results: dict[str, list[dict]] = {side: [] for side in sides}
    for n in range(args.steps + 1):
        for side, process in sides.items():
            process.stdin.write(f"{ONE_TILE_MIB}\n")
            process.stdin.flush()
            line = process.stdout.readline()
            if not line:
                raise SystemExit(f"the side '{side}' died with exit code {process.wait()}; its error is above")
            results[side].append(json.loads(line))
        print(f"step {n}: " + ", ".join(f"{s} {r[-1]['seconds']:.1f} s" for s, r in results.items()), flush=True)
    sides["theirs"].stdin.close()
    sides["theirs"].wait()
    turns: list[tuple[int, list[dict]]] = [(ONE_TILE_MIB, []), (args.loss_tile_mib, [])]
    for _ in range(args.steps):
        for tile, steps in turns:
            sides["ours"].stdin.write(f"{tile}\n")
            sides["ours"].stdin.flush()
            steps.append(json.loads(sides["ours"].stdout.readline()))
    sides["ours"].stdin.close()
    sides["ours"].wait()

    print(f"\nSmolLM2-135M with {args.layers} layers, {len(SHARES)} documents in {TOKENS} tokens, float32, CPU")
    rates = {}
    for side, name in (("ours", "torchtitan-longcontext"), ("theirs", "transformers (sdpa)")):
        rates[side] = TOKENS / statistics.median(r["seconds"] for r in results[side][1:])
        peak = max(r["peak_gib"] for r in results[side])
        print(
            f"{name:24} {rates[side]:8.0f} tokens/s   peak {peak:6.2f} GiB   first loss {results[side][0]['loss']:.5f}"
        )
    print(f"{'ratio':24} {rates['ours'] / rates['theirs']:8.2f}x")
    more = []
    for what in ("seconds", "processor"):
        one, many = (statistics.median(step[what] for step in steps) for _, steps in turns)
        more.append(f"{many / one - 1:+.1%}")
    print(f"loss in tiles of {args.loss_tile_mib} MiB against one tile: step time {more[0]}, processor time {more[1]}")
    print("(on a machine that is busy with other jobs, processor time says more)")
    difference = max(abs(a["loss"] - b["loss"]) for a, b in zip(*results.values(), strict=True))
    print(f"largest difference between the losses of {args.steps + 1} steps: {difference:.1e}")


if __name__ == "__main__":
    main()
