"""What a stage will take, without a GPU: memory per rank by kind, host memory, FLOPs, a range for the step's time; and
the RoPE that it will have, with what training would refuse about it.

    python scripts/estimate.py --job.config_file train_configs/llama3_8b/128k.toml --world-size 8 --gpu h100
    python scripts/estimate.py --job.config_file my.toml --world-size 8 --training.seq_len 1048576 --fit fits.toml

If the stage does not fit, or takes over 95% of the GPU, it says which keys to change, cheapest first; --fit writes the
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
from torchtitan.extensions.cluster.check_config import check_tables
from torchtitan.extensions.cluster.rope_report import REFUSED, is_refused, rope_report
from torchtitan.extensions.cluster.slurm import replicas
from torchtitan.tools.errors import UserError


class Parser(argparse.ArgumentParser):
    """Exit code 1 for a mistake, not argparse's 2, which says here that nothing fits."""

    def error(self, message: str) -> NoReturn:
        self.exit(1, f"error: {message}\n")


def main(args: list[str]) -> int:
    """Exit code 0: it fits, or a change that fits was found; 2: no change that is tried here fits, or training would
    refuse the RoPE; 1: a mistake."""
    parser = Parser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="every other --table.key overrides the stage's key",
        allow_abbrev=False,
    )
    parser.add_argument("--world-size", "--world_size", type=int, required=True, help="processes on all nodes together")
    parser.add_argument("--gpu", default="h100", help="which GPU, or cpu (default: h100)")
    parser.add_argument(
        "--document-length", "--document_length", type=int, help="in tokens, of all documents; default: one per row"
    )
    parser.add_argument(
        "--host-memory-gib", "--host_memory_gib", type=float, default=1900, help="per node, for offloading (1900)"
    )
    parser.add_argument("--gpus-per-node", "--gpus_per_node", type=int, default=8)
    parser.add_argument("--fit", type=Path, help="write the cheapest change that fits as this TOML file")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    own, overrides = parser.parse_known_args(args)
    try:
        return estimate(own, overrides)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def estimate(own: argparse.Namespace, overrides: list[str]) -> int:
    """Exit code of main; UserError for a mistake."""
    from torchtitan.tools.gpus import gpu_called

    gpu = None if own.gpu == "cpu" else gpu_called(own.gpu)
    for name in ("world_size", "gpus_per_node", "document_length"):
        value = getattr(own, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} = {value} must be at least 1.")
    file = config_file(overrides)
    if own.fit is not None:
        check_fit(own.fit, own.gpu, file)
    config = load_config(overrides)
    if gpu and config.quantize.recipe_name != "none" and not config.quantize.emulate and gpu.fp8_tflops is None:
        raise UserError(
            f'quantize.recipe_name = "{config.quantize.recipe_name}", but {gpu.name} has no FP8: set it to "none", or '
            "name another --gpu."
        )
    check_tables(config, own.world_size)
    # PyTorch takes seconds to import: a mistake in the TOML should not
    from torchtitan.distributed.options.ulysses import check_ulysses
    from torchtitan.distributed.tensor_parallel import check_tensor_parallel
    from torchtitan.extensions.planner.advice import cheapest, possible_changes, single_tricks
    from torchtitan.extensions.planner.estimate_report import fit_toml, format_advice, format_estimate, make_estimate
    from torchtitan.extensions.planner.stage_numbers import numbers_of
    from torchtitan.models.flavor import architecture

    args = architecture(config.model)
    check_tensor_parallel(args, config.parallelism.tensor_parallel_degree)
    check_ulysses(args.n_heads, config.parallelism)
    stage = numbers_of(config, args, own.world_size, "cuda" if gpu else "cpu", own.document_length)
    ranks_per_host = min(own.gpus_per_node, own.world_size)
    result = make_estimate(stage, gpu, ranks_per_host)
    lacks_host = gpu is not None and result["host_gib"] > own.host_memory_gib
    say = (lambda *_: None) if own.json else print
    say(format_estimate(result, stage, gpu, ranks_per_host))
    if note := slurm_note(own, overrides):
        say(note)
    result["rope"] = rope_report(config)
    say("\n".join(result["rope"]))
    if gpu and config.model.attention_backend == "varlen":
        say("NOTE: counted for flex; the backward pass of varlen needs more (docs/planning.md)")
    if lacks_host:
        say(f"WARNING: {result['host_gib']:.0f} GiB of host memory are needed, of {own.host_memory_gib:g}")
    best, code = None, 0
    if gpu and (lacks_host or not result["fits"]):
        candidates = list(possible_changes(config, args, own.world_size, gpu, own.document_length))
        best = cheapest(candidates, gpu, ranks_per_host, own.host_memory_gib)
        single = single_tricks(candidates, config, own.world_size)
        each = [{"keys": c.keys, "peak_gib": c.gib, "slower": c.slower} for c in [*single, best] if c]
        result |= {"changes": each[: len(single)], "fit": each[-1] if best else None}
        say(f"\n{format_advice(single, best, gpu)}")
        if best is None:
            least = min(c.gib for c in candidates)
            say(
                f"no combination of these fits {gpu.name} ({gpu.memory_gib:g} GiB) and the host "
                f"({own.host_memory_gib:g} GiB); the least on the GPU is {least:.1f} GiB. More ranks, with "
                "a higher parallelism.context_parallel_degree, or a shorter training.seq_len would."
            )
            code = 2
    if own.json:
        print(json.dumps(result, indent=1))
    if own.fit is not None and best is not None and file is not None:
        base = load_config(["--job.config_file", file])
        own.fit.write_text(fit_toml(base, best, os.path.relpath(file, own.fit.resolve().parent)))
        print(f"wrote {own.fit}", file=sys.stderr)
    elif own.fit is not None and code == 0:
        print(f"it fits as it is: {own.fit} is not written", file=sys.stderr)
    return REFUSED if is_refused(result["rope"]) else code


def check_fit(fit: Path, gpu: str, file: str | None) -> None:
    """UserError if --fit FILE could not be written, or would have nothing to say."""
    if fit.exists():
        raise UserError(f"--fit {fit} exists, and nothing is written over: name another, or delete it.")
    if gpu == "cpu":
        raise UserError("--fit looks for what fits a GPU: --gpu cpu has no size to fit.")
    if not fit.resolve().parent.is_dir():
        raise UserError(f"--fit {fit}: there is no folder {fit.parent}.")
    if file is None:
        raise UserError("--fit writes a stage that extends the file of --job.config_file, and none is given.")


def slurm_note(own: argparse.Namespace, overrides: list[str]) -> str | None:
    """What to say if a Slurm job of this stage would keep a copy of the parameters on each node."""
    nodes = own.world_size // own.gpus_per_node
    if nodes < 2:
        return None
    with contextlib.redirect_stderr(io.StringIO()):
        copies = replicas(overrides, nodes, own.gpus_per_node)
    if not copies:
        return None
    return (
        f"NOTE: counted for parameters sharded over all {own.world_size} ranks. A Slurm job keeps a copy on "
        f"each of its {nodes} nodes unless told otherwise: give {' '.join(copies)} here, or set "
        "parallelism.data_parallel_replicate_degree = 1 in the TOML."
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
