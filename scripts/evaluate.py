"""What a model makes of long text: loss by position on held-out documents, a needle in a haystack, RULER and recall.

    python scripts/evaluate.py --job.config_file stage.toml                      # the stage's newest checkpoint
    python scripts/evaluate.py --model ./SmolLM2 --out before.json --data.add_bos false \\
        --evaluation.texts books/*.txt --evaluation.length 16384 --evaluation.needle_lengths 4096 8192 16384
    python scripts/evaluate.py --model outputs/checkpoint/step-1000 --processes 8 \\
        --parallelism.context_parallel_degree 8 --evaluation.needle_lengths 131072 1048576 --out after.json
    python scripts/evaluate.py --model ./Llama-3.1-8B --out ruler.json --evaluation.tasks ruler recall \\
        --evaluation.task_lengths 4096 32768 131072 --evaluation.task_items 100 --evaluation.generate

--model is a Hugging Face folder or a checkpoint of a run. A stage is evaluated as its [evaluation] and [parallelism]
tables say, which any --table.key overrides; --processes of them are started here, or by torchrun or srun. Parameters
are held in the type in which they compute (training.mixed_precision_param). Beside --out, which is
evaluation/step-N.json of the stage unless it is said, lie its pictures. docs/evaluation.md explains the numbers.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torchtitan.components.manifest import MANIFEST, complete_steps, find_damage, read_manifest
from torchtitan.config import JobConfig, load_config
from torchtitan.config.checks import check_asked, check_evaluation, check_ranges, resolve_shard_degree
from torchtitan.config.job_config import Rope
from torchtitan.config.manager import config_file
from torchtitan.tools.errors import UserError
from torchtitan.tools.launch import launch


def main(args: list[str]) -> int:
    """0; 1 and one line for a mistake; or the code of a process that failed."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="every other --table.key is one of a stage's TOML (./run_train.sh --help)",
        allow_abbrev=False,
    )
    parser.add_argument("--model", type=Path, help="Hugging Face folder or checkpoint, instead of the stage's own")
    parser.add_argument("--step", type=int, help="the stage's checkpoint of this step, not its newest")
    parser.add_argument("--tokenizer", type=Path, help="folder of the tokenizer, if it is not the model's or the run's")
    parser.add_argument("--processes", type=int, default=1, help="to start here (1)")
    parser.add_argument("--label", help="name of the model in tables and pictures")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    own, overrides = parser.parse_known_args(args)
    rank = int(os.environ.get("RANK", "0"))
    try:
        config, folder = what_is_asked(own, overrides)
        if "RANK" not in os.environ and own.processes > 1:
            return launch([sys.executable, __file__, *args], own.processes)
        result = run(own, config, folder, has_stage=config_file(overrides) is not None)
        if rank == 0:
            from torchtitan.evaluation.stage import write

            if own.out:
                write(result, own.out)
            print(as_table(result) + (f"\n{own.out}" if own.out else ""))
    except UserError as error:
        if rank == 0:
            print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def what_is_asked(own: argparse.Namespace, overrides: list[str]) -> tuple[JobConfig, Path]:
    """The configuration and the folder of the weights; everything that can be told without PyTorch."""
    config = load_config(overrides)
    stage = config_file(overrides)
    if own.processes < 1:
        raise UserError(f"--processes = {own.processes} must be at least 1.")
    if own.model is None and stage is None:
        raise UserError("Nothing to evaluate: give --model FOLDER, or --job.config_file STAGE.toml.")
    if own.model is not None and own.step is not None:
        raise UserError("--step is of a stage's own checkpoints: --model names one by its folder (.../step-1000).")
    check_asked(config)
    check_ranges(config)
    check_evaluation(config)
    resolve_shard_degree(config, int(os.environ.get("WORLD_SIZE", own.processes)))
    folder = own.model
    if folder is None:
        checkpoints = Path(config.job.dump_folder) / config.checkpoint.folder
        steps = complete_steps(checkpoints)
        if own.step is not None and own.step not in steps:
            raise UserError(f"--step = {own.step}: {checkpoints} has {', '.join(map(str, steps)) or 'none'}.")
        if not steps:
            raise UserError(f"{checkpoints} has no complete checkpoint: train the stage first, or give --model.")
        step = steps[-1] if own.step is None else own.step
        folder = checkpoints / f"step-{step}"
        own.out = own.out or Path(config.job.dump_folder) / "evaluation" / f"step-{step}.json"
    if own.out is not None and own.out.suffix != ".json":
        raise UserError(f"--out {own.out} should end with .json: pictures lie beside it under its name.")
    if not (folder / MANIFEST).is_file() and not (folder / "config.json").is_file():
        steps = complete_steps(folder) if folder.is_dir() else []
        there = f"; it holds checkpoints: name one, such as {folder / f'step-{steps[-1]}'}" if steps else ""
        raise UserError(
            f"--model {folder} has neither config.json nor manifest.json{there}. It should be a Hugging Face folder, "
            "or a checkpoint of a run (outputs/checkpoint/step-1000)."
        )
    training = replace(config.training, dtype=config.training.mixed_precision_param)
    return replace(config, training=training), folder


def run(own: argparse.Namespace, config: JobConfig, folder: Path, has_stage: bool) -> dict[str, Any]:
    """On every rank: build, load, ask. The result, in the form that docs/evaluation.md describes."""
    # PyTorch takes seconds to import: a mistake on the command line should not
    import torch.distributed as dist

    from torchtitan.attention.backends import choose_backend
    from torchtitan.components.checkpoint import load
    from torchtitan.components.tokenizer import load_tokenizer
    from torchtitan.distributed.context_parallel.ulysses import check_ulysses
    from torchtitan.distributed.parallel_dims import ParallelDims
    from torchtitan.distributed.parallelize import build_sharded_model
    from torchtitan.distributed.tensor_parallel import check_tensor_parallel
    from torchtitan.evaluation.forward import Ranks
    from torchtitan.evaluation.loading import tokenizer_of
    from torchtitan.evaluation.stage import evaluate, prepare
    from torchtitan.models.architecture import args_from_manifest
    from torchtitan.models.huggingface import check_weights, load_weights, read_config
    from torchtitan.models.rope_config import build_rope
    from torchtitan.tools.device import init_process_group, peak_memory_gib, pick_device
    from torchtitan.tools.logging import init_logger

    began = time.perf_counter()
    rank, local_rank, world_size = (int(os.environ.get(*pair)) for pair in RANK_VARIABLES)
    init_logger(rank, world_size)
    manifest = None
    if (folder / MANIFEST).is_file():
        if damage := find_damage(folder):
            raise UserError(f"{folder} is damaged: {damage}")
        manifest = read_manifest(folder)
        args = args_from_manifest(manifest["architecture"])
        tokenizer = load_tokenizer(own.tokenizer or tokenizer_of(folder))
        if tokenizer.fingerprint != manifest["tokenizer"]:
            raise UserError(f"{folder} was not trained with the tokenizer in {tokenizer.folder}: give --tokenizer.")
    else:
        args = read_config(folder)
        check_weights(folder, args)
        tokenizer = load_tokenizer(own.tokenizer or folder)
    if not has_stage and config.rope != Rope():  # a stage's own checkpoint has its RoPE already
        length = config.evaluation.length or config.training.seq_len
        rope = build_rope(config.rope, args.rope, args.head_dim, args.n_kv_heads, length)
        args = replace(args, rope=rope)
    p = config.parallelism
    check_tensor_parallel(args, p.tensor_parallel_degree)
    if p.context_parallel_exchange == "ulysses":
        check_ulysses(args.n_heads, p.context_parallel_degree, p.tensor_parallel_degree, p.context_parallel_head_chunks)
    prepared = prepare(config, tokenizer, args)

    device = pick_device(local_rank)
    backend = choose_backend(config.model.attention_backend, device.type)
    init_process_group(device, rank, world_size, config.comm.init_timeout_seconds)
    try:
        shards = resolve_shard_degree(config, world_size)
        degrees = (p.data_parallel_replicate_degree, shards, p.context_parallel_degree, p.tensor_parallel_degree)
        dims = ParallelDims.build(device.type, *degrees)
        group = dist.new_group(backend="gloo")
        model = build_sharded_model(args, config, dims, device)
        model.tie_embeddings()
        if manifest:
            load(folder, {"model": {name: param.detach() for name, param in model.named_parameters()}}, group)
        else:
            load_weights(model, folder)
        ranks = Ranks.of(dims, device, backend, p.context_parallel_layout, p.context_parallel_exchange, group)
        with progress(rank) as on_part:
            e = config.evaluation
            found = evaluate(model, ranks, tokenizer, prepared, e.windows, e.generate, on_part)
    finally:
        dist.destroy_process_group()
    name = f"{manifest['stage']}, step {manifest['step']}" if manifest else folder.resolve().name
    return {
        "label": own.label or name,
        "model": str(folder),
        "step": manifest["step"] if manifest else None,
        "tokens_seen": manifest["tokens_seen"] if manifest else None,
        "rope": asdict(args.rope),
        "dtype": config.training.mixed_precision_param,
        "world_size": world_size,
        **found,
        "seconds": round(time.perf_counter() - began, 1),
        "peak_gib": round(peak_memory_gib(device), 2),
    }


RANK_VARIABLES = (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1"))


def progress(rank: int) -> Any:
    """What is under way, in a bar on a terminal and a line each elsewhere; nothing on other ranks."""
    from contextlib import contextmanager

    from rich.console import Console
    from rich.progress import Progress

    @contextmanager
    def context() -> Any:
        console = Console(stderr=True)
        bars: dict[str, Any] = {}
        with Progress(console=console, disable=rank > 0 or not console.is_terminal) as shown:

            def on_part(what: str, done: int, total: int) -> None:
                if what not in bars:
                    bars[what] = shown.add_task(what, total=total)
                shown.update(bars[what], completed=done)
                if rank == 0 and not console.is_terminal:
                    print(f"{what}: {done} of {total}", file=sys.stderr, flush=True)

            yield on_part

    return context()


def as_table(result: dict[str, Any]) -> str:
    """For people."""
    from itertools import pairwise

    lines = [f"{result['label']}: {result['seconds']} s, {result['peak_gib']} GiB at most in the first process"]
    for name, one in result["perplexity"].items():
        gains = one["gains_of_context"]
        heads = ["positions", "tokens", "loss", *(f"w {gain['window']:,}" for gain in gains)]
        lines += ["", f"loss by position, {name}", "".join(f"{head:>18}" for head in heads)]
        for i, (begin, end) in enumerate(pairwise(one["edges"])):
            cells = [one["nll"][i], *(gain["nll_cut"][i] for gain in gains)]
            shown = "".join(f"{'-' if c is None else format(c, '.4f'):>18}" for c in cells)
            lines.append(f"{f'{begin:,} - {end:,}':>18}{one['count'][i]:>18,}{shown}")
    for task, grid in result["tasks"].items():
        if not grid["depths"]:
            continue
        for what, said in HOW:
            if any(cell is not None for row in grid[what] for cell in row):
                rows = {f"{depth:.0%}": [row[d] for row in grid[what]] for d, depth in enumerate(grid["depths"])}
                lines += ["", f"{task}, {said}, of {sum(map(sum, grid['count']))}"]
                lines += percents("depth", grid["lengths"], rows)
        lines += cut_answers([grid])
    return "\n".join(lines + tables_of_tasks(result))


HOW = (("exact", "answer is the likeliest"), ("score", "found in what was written"))


def tables_of_tasks(result: dict[str, Any]) -> list[str]:
    """Tasks that have no depths, and the means of groups, by length."""
    from torchtitan.evaluation.tasks import at_length, group_name

    grids = {task: grid for task, grid in result["tasks"].items() if not grid["depths"]}
    lines = []
    lengths = sorted({n for grid in (*grids.values(), *result["groups"].values()) for n in grid["lengths"]})
    for what, said in HOW:
        rows = {task: [at_length(grid, what, n) for n in lengths] for task, grid in grids.items()}
        for group, means in result["groups"].items():
            there = dict(zip(means["lengths"], means[what], strict=True))
            rows[group_name(group, means)] = [there.get(n) for n in lengths]
        if any(cell is not None for row in rows.values() for cell in row):
            asked = sum(sum(map(sum, grid["count"])) for grid in grids.values())
            lines += ["", f"tasks, {said}, of {asked}", *percents("task", lengths, rows)]
    return lines + cut_answers(grids.values())


def percents(head: str, lengths: list[int], rows: dict[str, list[float | None]]) -> list[str]:
    """A line a row and a column a length."""
    wide = max(10, *(len(name) + 2 for name in rows))
    lines = ["".join([f"{head:>{wide}}", *(f"{n:>10,}" for n in lengths)])]
    for name, cells in rows.items():
        shown = ("-" if cell is None else f"{cell:.0%}" for cell in cells)
        lines.append("".join([f"{name:>{wide}}", *(f"{cell:>10}" for cell in shown)]))
    return lines


def cut_answers(grids: Iterable[dict[str, Any]]) -> list[str]:
    cut = sum(sum(map(sum, grid["cut"])) for grid in grids)
    return [f"{cut} answers were cut at the tokens that they may have"] if cut else []


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # as torchtitan/train.py ends
