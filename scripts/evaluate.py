"""How a model does on long text: loss by position on held-out documents, a needle in a haystack, RULER and recall.

    python scripts/evaluate.py --job.config_file stage.toml                      # the stage's newest checkpoint
    python scripts/evaluate.py --model ./SmolLM2 --out before.json \\
        --evaluation.texts books/*.txt --evaluation.length 16384 --evaluation.needle_lengths 4096 8192 16384
    python scripts/evaluate.py --model outputs/checkpoint/step-1000 --processes 8 \\
        --parallelism.context_parallel_degree 8 --evaluation.needle_lengths 131072 1048576 --out after.json
    python scripts/evaluate.py --model ./Llama-3.1-8B --out ruler.json --evaluation.tasks ruler recall \\
        --evaluation.task_lengths 4096 32768 131072 --evaluation.task_items 100 --evaluation.generate

--model is a Hugging Face folder or a checkpoint of a run. A stage is evaluated as its [evaluation] and [parallelism]
tables say, which any --table.key overrides; --processes N are started here, or by torchrun or srun. Parameters
are held in the type in which they compute (training.mixed_precision_param). --out is evaluation/step-N.json of the
stage unless it is given; its pictures lie beside it. docs/evaluation.md explains the numbers.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torchtitan.config import JobConfig
from torchtitan.extensions.cluster.launch import launch
from torchtitan.extensions.evaluation.checks import check_asked, check_evaluation, longest_asked
from torchtitan.extensions.evaluation.command_line import make_folder, parser_of, what_is_asked
from torchtitan.tools.errors import UserError


def main(args: list[str]) -> int:
    """0; 1 and one line for a mistake; or the code of a process that failed."""
    parser = parser_of(__doc__)
    parser.add_argument("--label", help="name of the model in tables and pictures")
    own, overrides = parser.parse_known_args(args)
    rank = int(os.environ.get("RANK", "0"))
    try:
        config, folder = what_is_asked(own, overrides)
        check_questions(own, config)
        if "RANK" not in os.environ and own.processes > 1:
            return launch([sys.executable, __file__, *args], own.processes)
        result = run(own, config, folder)
        if rank == 0:
            from torchtitan.extensions.evaluation.results import write

            print(as_table(result))
            if own.out:
                write(result, own.out)
                print(own.out)
            else:
                print("note: nothing is saved; --out FILE.json saves the result", file=sys.stderr)
    except UserError as error:
        if rank == 0:
            print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def check_questions(own: argparse.Namespace, config: JobConfig) -> None:
    """UserError if nothing is asked, or something that cannot be."""
    check_asked(config)
    check_evaluation(config)
    if own.out is not None and own.out.suffix != ".json":
        raise UserError(f"--out {own.out} should end with .json: pictures lie beside it under its name.")
    if own.out is not None:
        make_folder(own.out)


def run(own: argparse.Namespace, config: JobConfig, folder: Path) -> dict[str, Any]:
    """On every rank: prepares the questions, loads the model, asks. The result: docs/evaluation.md."""
    # PyTorch takes seconds to import: a mistake on the command line should not
    from torchtitan.extensions.evaluation.evaluate import evaluate, prepare
    from torchtitan.extensions.evaluation.loading import check_own_results, loaded, model_for, rank_and_world_size
    from torchtitan.extensions.evaluation.results import settings_in
    from torchtitan.tools.device import peak_memory_gib
    from torchtitan.tools.logging import init_logger

    began = time.perf_counter()
    rank, _, world_size = rank_and_world_size()
    init_logger(rank, world_size)
    on_disk = model_for(folder, config, longest_asked(config), own.tokenizer)
    prepared = prepare(config, on_disk.tokenizer, on_disk.args)
    check_own_results(own, on_disk)
    if own.of_stage and settings_in(own.out) not in (None, prepared.settings):
        raise UserError(f"{own.out} holds the stage's answers to other questions: give --out, or delete it.")
    with loaded(on_disk, config) as (model, ranks), progress(rank) as on_part:
        e = config.evaluation
        numbers = evaluate(model, ranks, on_disk.tokenizer, prepared, e.windows, e.generate, on_part)
    manifest = on_disk.manifest
    return {
        "label": own.label or on_disk.label,
        "model": str(folder),
        "step": manifest["step"] if manifest else None,
        "tokens_seen": manifest["tokens_seen"] if manifest else None,
        "rope": asdict(on_disk.args.rope),
        "dtype": config.training.mixed_precision_param,
        "world_size": world_size,
        **numbers,
        "seconds": round(time.perf_counter() - began, 1),
        "peak_gib": round(peak_memory_gib(ranks.device), 2),
    }


def progress(rank: int) -> Any:
    """Shows what is under way: in bars on a terminal, as lines elsewhere; on rank 0 alone."""
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
    """The result as text."""
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
        for what, meaning in HOW:
            if any(cell is not None for row in grid[what] for cell in row):
                rows = {f"{depth:.0%}": [row[d] for row in grid[what]] for d, depth in enumerate(grid["depths"])}
                lines += ["", f"{task}, {meaning}, of {sum(map(sum, grid['count']))}"]
                lines += percents("depth", grid["lengths"], rows)
        lines += cut_answers([grid])
    return "\n".join(lines + tables_of_tasks(result))


HOW = (("exact", "answer is the likeliest"), ("score", "found in what was written"))


def tables_of_tasks(result: dict[str, Any]) -> list[str]:
    """Lines of the tasks without depths, and of the means of groups, by length."""
    from torchtitan.extensions.evaluation.tasks import at_length, group_name

    grids = {task: grid for task, grid in result["tasks"].items() if not grid["depths"]}
    lines = []
    lengths = sorted({n for grid in (*grids.values(), *result["groups"].values()) for n in grid["lengths"]})
    for what, meaning in HOW:
        rows = {task: [at_length(grid, what, n) for n in lengths] for task, grid in grids.items()}
        for group, means in result["groups"].items():
            by_length = dict(zip(means["lengths"], means[what], strict=True))
            rows[group_name(group, means)] = [by_length.get(n) for n in lengths]
        if any(cell is not None for row in rows.values() for cell in row):
            asked = sum(sum(map(sum, grid["count"])) for grid in grids.values())
            lines += ["", f"tasks, {meaning}, of {asked}", *percents("task", lengths, rows)]
    return lines + cut_answers(grids.values())


def percents(head: str, lengths: list[int], rows: dict[str, list[float | None]]) -> list[str]:
    """A line per row and a column per length."""
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
