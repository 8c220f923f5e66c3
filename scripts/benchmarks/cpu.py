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

LENGTHS = (1490, 1021, 640, 385, 260, 150, 101, 49)  # 8 documents, 4,096 tokens


def batches(vocab_size: int):
    """The same rows for both sides: tokens, labels, positions."""
    import torch

    generator = torch.Generator().manual_seed(0)
    positions = torch.cat([torch.arange(n) for n in LENGTHS])
    while True:
        tokens = torch.randint(0, vocab_size, (sum(LENGTHS),), generator=generator)
        labels = tokens.roll(-1)
        labels[torch.tensor(LENGTHS).cumsum(0) - 1] = -100
        yield tokens, labels, positions


def ours(layers: int):
    """A function that makes one training step, with `loss_tile_mib` MiB of logits at a time, and returns its loss."""
    import torch

    from torchtitan.attention.segments import Segments
    from torchtitan.components.optimizer import build_optimizer
    from torchtitan.config.schema import JobConfig, Optimizer, Training
    from torchtitan.distributed.parallel_dims import ParallelDims
    from torchtitan.distributed.parallelize import build_sharded_model
    from torchtitan.models.registry import FLAVORS
    from torchtitan.models.transformer import init_weights
    from torchtitan.tools.device import init_process_group

    device = torch.device("cpu")
    init_process_group(device, 0, 1, 60)
    args = replace(FLAVORS["smollm2_135m"], n_layers=layers)
    config = JobConfig(training=Training(mixed_precision_param="float32"))
    model = build_sharded_model(args, config, ParallelDims.build("cpu", 1, 1, 1, 1), device)
    init_weights(model, seed=0)
    optimizer = build_optimizer(model, Optimizer(lr=1e-4))
    rows = batches(args.vocab_size)
    ends = torch.tensor((0, *LENGTHS)).cumsum(0)

    def step(loss_tile_mib: int = 1024) -> float:  # a row's logits are 768 MiB
        model.output.tile_bytes = loss_tile_mib << 20
        tokens, labels, positions = next(rows)
        mask = Segments.whole(ends)
        loss, _ = model(tokens, positions, mask, labels=labels, divisor=float((labels >= 0).sum()))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def theirs(layers: int):
    """The same with transformers, which makes its document mask from the positions."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from torchtitan.components.optimizer import build_optimizer
    from torchtitan.config.schema import Optimizer
    from torchtitan.models.hf.weights import hf_name
    from torchtitan.models.registry import FLAVORS
    from torchtitan.models.transformer import Transformer, init_weights

    args = replace(FLAVORS["smollm2_135m"], n_layers=layers)
    config = LlamaConfig(
        vocab_size=args.vocab_size,
        hidden_size=args.dim,
        intermediate_size=args.ffn_dim,
        num_hidden_layers=layers,
        num_attention_heads=args.n_heads,
        num_key_value_heads=args.n_kv_heads,
        rms_norm_eps=args.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": args.rope.theta},
        tie_word_embeddings=True,
        attn_implementation="sdpa",
        use_cache=False,
    )
    model = LlamaForCausalLM(config).float().train()
    start = Transformer(args)
    init_weights(start, seed=0)
    model.load_state_dict({hf_name(n): p.detach() for n, p in start.named_parameters()}, strict=False)
    del start
    optimizer = build_optimizer(model, Optimizer(lr=1e-4))
    rows = batches(args.vocab_size)
    firsts = torch.tensor((0, *LENGTHS[:-1])).cumsum(0)

    def step() -> float:
        tokens, _, positions = next(rows)
        labels = tokens.clone()
        labels[firsts] = -100  # transformers shifts the labels itself: a document's first token is no target
        loss = model(input_ids=tokens[None], position_ids=positions[None], labels=labels[None]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def serve(side: str, layers: int) -> None:
    """A child process: for each line read, one step, answered with its seconds, loss and the process's peak memory.

    A line that is a number is the loss tile's size in MiB.
    """
    step = {"ours": ours, "theirs": theirs}[side](layers)
    for line in sys.stdin:
        start, processor = time.perf_counter(), time.process_time()
        loss = step(int(line)) if line.strip().isdigit() else step()
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
            process.stdin.write("step\n")
            process.stdin.flush()
            line = process.stdout.readline()
            if not line:
                raise SystemExit(f"the side '{side}' died with exit code {process.wait()}; its error is above")
            results[side].append(json.loads(line))
        print(f"step {n}: " + ", ".join(f"{s} {r[-1]['seconds']:.1f} s" for s, r in results.items()), flush=True)
    sides["theirs"].stdin.close()
    sides["theirs"].wait()
    turns: list[tuple[int, list[dict]]] = [(1024, []), (args.loss_tile_mib, [])]
    for _ in range(args.steps):
        for tile, steps in turns:
            sides["ours"].stdin.write(f"{tile}\n")
            sides["ours"].stdin.flush()
            steps.append(json.loads(sides["ours"].stdout.readline()))
    sides["ours"].stdin.close()
    sides["ours"].wait()

    tokens = sum(LENGTHS)
    print(f"\nSmolLM2-135M with {args.layers} layers, {len(LENGTHS)} documents in {tokens} tokens, float32, CPU")
    rates = {}
    for side, name in (("ours", "torchtitan-longcontext"), ("theirs", "transformers (sdpa)")):
        rates[side] = tokens / statistics.median(r["seconds"] for r in results[side][1:])
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
