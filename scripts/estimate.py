"""What a stage will take, without a GPU: memory a rank by kind, host memory, FLOPs, a range for the step's time.

    python scripts/estimate.py --job.config_file train_configs/llama3_8b/128k.toml --world-size 8 --gpu h100
    python scripts/estimate.py --job.config_file my.toml --world-size 8 --training.seq_len 1048576 --fit fits.toml

Where it does not fit, or takes over 95% of the GPU, it says which keys to change, cheapest first; --fit writes the
cheapest change as a stage that extends the file. --gpu cpu counts what the CPU allocates. An analytic model:
docs/planning.md says how far to trust it.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import sys
from pathlib import Path
from typing import NoReturn

from torchtitan.config import load_config
from torchtitan.config.manager import config_file
from torchtitan.extensions.cluster.slurm import replicas
from torchtitan.tools.errors import UserError


class Parser(argparse.ArgumentParser):
    """Mistakes end with 1, as 2 says that nothing fits."""

    def error(self, message: str) -> NoReturn:
        self.exit(1, f"error: {message}\n")


def main(args: list[str]) -> int:
    """0: it fits, or a change that fits has been found; 2: nothing that is known here fits; 1: a mistake."""
    parser = Parser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="every other --table.key is an override of the stage's",
        allow_abbrev=False,
    )
    parser.add_argument("--world-size", "--world_size", type=int, required=True, help="processes, over all nodes")
    parser.add_argument("--gpu", default="h100", help="which GPU, or cpu (default: h100)")
    parser.add_argument("--document-length", "--document_length", type=int, help="of all documents; default: one a row")
    parser.add_argument(
        "--host-memory-gib", "--host_memory_gib", type=float, default=1900, help="of a machine, for offload (1900)"
    )
    parser.add_argument("--gpus-per-node", "--gpus_per_node", type=int, default=8)
    parser.add_argument("--fit", type=Path, help="write the cheapest change that fits as this TOML file")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    own, overrides = parser.parse_known_args(args)
    try:
        return estimate(own, overrides)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def estimate(own: argparse.Namespace, overrides: list[str]) -> int:
    from torchtitan.tools.gpus import gpu_called

    gpu = None if own.gpu == "cpu" else gpu_called(own.gpu)
    for name in ("world_size", "gpus_per_node", "document_length"):
        value = getattr(own, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} = {value} must be at least 1.")
    if own.fit is not None and own.fit.exists():
        raise UserError(f"--fit {own.fit} exists, and nothing is written over: name another, or delete it.")
    if own.fit is not None and gpu is None:
        raise UserError("--fit looks for what fits a GPU: --gpu cpu has no size to fit.")
    if own.fit is not None and not own.fit.resolve().parent.is_dir():
        raise UserError(f"--fit {own.fit}: there is no folder {own.fit.parent}.")
    config = load_config(overrides)
    if gpu and config.quantize.recipe_name != "none" and not config.quantize.emulate and gpu.fp8_tflops is None:
        raise UserError(
            f'quantize.recipe_name = "{config.quantize.recipe_name}", but {gpu.name} has no FP8: set it to "none", or '
            "name another --gpu."
        )
    # the imports of PyTorch take seconds: a mistake in the TOML should not
    from torchtitan.extensions.cluster.check_config import check_tables

    check_tables(config, own.world_size)
    from torchtitan.distributed.options.ulysses import check_ulysses
    from torchtitan.distributed.tensor_parallel import check_tensor_parallel
    from torchtitan.extensions.planner.advice import changes, cheapest, single_tricks
    from torchtitan.extensions.planner.estimate_report import advice_as_text, as_dict, as_text, fit_toml
    from torchtitan.extensions.planner.speed import step_of
    from torchtitan.extensions.planner.stage_numbers import numbers_of
    from torchtitan.models.registry import architecture

    args, p = architecture(config.model), config.parallelism
    check_tensor_parallel(args, p.tensor_parallel_degree)
    if p.context_parallel_exchange == "ulysses" and p.context_parallel_degree > 1:
        check_ulysses(args.n_heads, p.context_parallel_degree, p.tensor_parallel_degree, p.context_parallel_head_chunks)
    job = numbers_of(config, args, own.world_size, "cuda" if gpu else "cpu", own.document_length)
    step = step_of(job, gpu) if gpu else None
    ranks_a_host = min(own.gpus_per_node, own.world_size)
    plan = as_dict(job, gpu, step, ranks_a_host)
    if not own.json:
        print(as_text(job, gpu, step, ranks_a_host))
        nodes = own.world_size // own.gpus_per_node
        with contextlib.redirect_stderr(io.StringIO()):
            copies = nodes > 1 and replicas(overrides, nodes, own.gpus_per_node)
        if copies:
            print(
                f"NOTE: counted for parameters sharded over all {own.world_size} ranks. A Slurm job keeps a copy on "
                f"each of its {nodes} nodes unless told otherwise: give {' '.join(copies)} here, or set "
                "parallelism.data_parallel_replicate_degree = 1 in the TOML."
            )
        if gpu and config.model.attention_backend == "varlen":
            print("NOTE: counted for flex; varlen's backward has more (docs/planning.md)")
    if gpu is None:
        if own.json:
            print(json.dumps(plan, indent=1))
        return 0
    lacks_host = plan["host_gib"] > own.host_memory_gib
    if lacks_host and not own.json:
        print(f"WARNING: {plan['host_gib']:.0f} GiB of host memory are needed, of {own.host_memory_gib:g}")
    if plan["fits"] and not lacks_host:
        if own.json:
            print(json.dumps(plan, indent=1))
        if own.fit is not None:
            print(f"it fits as it is: {own.fit} is not written", file=sys.stderr)
        return 0
    candidates = list(changes(config, args, own.world_size, gpu, own.document_length))
    best = cheapest(candidates, gpu, ranks_a_host, own.host_memory_gib)
    single = single_tricks(candidates, config, args, own.world_size)
    if own.json:
        found = {"keys": best.keys, "peak_gib": best.gib, "slower": best.slower} if best else None
        each = [{"keys": c.keys, "peak_gib": c.gib, "slower": c.slower} for c in single]
        print(json.dumps({**plan, "changes": each, "fit": found}, indent=1))
    else:
        print(f"\n{advice_as_text(single, best, gpu)}")
    if best is None:
        if not own.json:
            least = min(candidates, key=lambda c: c.gib)
            print(
                f"no combination of these fits {gpu.name} ({gpu.memory_gib:g} GiB) and the host "
                f"({own.host_memory_gib:g} GiB); the least on the GPU is {least.gib:.1f} GiB. More ranks, with "
                "a higher parallelism.context_parallel_degree, or a shorter training.seq_len would."
            )
        return 2
    if own.fit is not None:
        file = config_file(overrides)
        if file is None:
            raise UserError("--fit writes a stage that extends the file of --job.config_file, and none is given.")
        base = load_config(["--job.config_file", file])
        relative = os.path.relpath(file, own.fit.resolve().parent)
        own.fit.write_text(fit_toml(base, best, relative))
        print(f"wrote {own.fit}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
