"""How well a model does on long text: loss by position on held-out documents, a needle in a haystack, RULER, recall.

    python scripts/evaluate.py --job.config_file stage.toml                      # the stage's newest checkpoint
    python scripts/evaluate.py --model ./SmolLM2 --out before.json \\
        --evaluation.texts books/*.txt --evaluation.length 16384 --evaluation.needle_lengths 4096 8192 16384
    python scripts/evaluate.py --model outputs/checkpoint/step-1000 --processes 8 \\
        --parallelism.context_parallel_degree 8 --evaluation.needle_lengths 131072 1048576 --out after.json
    python scripts/evaluate.py --model ./Llama-3.1-8B --out ruler.json --evaluation.tasks ruler recall \\
        --evaluation.task_lengths 4096 32768 131072 --evaluation.task_items 100 --evaluation.generate

--model is a Hugging Face folder or a checkpoint of a run. A stage is evaluated as its [evaluation] and [parallelism]
tables say; any --table.key overrides them. --processes N starts N processes here; torchrun and srun can start them too.
Parameters are held in the dtype in which they compute (training.mixed_precision_param). --out defaults to
evaluation/step-N.json of the stage; pictures are written beside it. docs/evaluation.md explains the numbers.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

from torchtitan.config import JobConfig
from torchtitan.extensions.cluster.launch import launch
from torchtitan.extensions.evaluation.checks import check_asked, check_evaluation, longest_asked
from torchtitan.extensions.evaluation.command_line import parser_of, resolve_request, text_table
from torchtitan.tools.errors import UserError
from torchtitan.tools.folders import make_writable


def main(args: list[str]) -> int:
    """0; 1 and one line for a mistake; or the code of a process that failed."""
    parser = parser_of(__doc__)
    parser.add_argument("--label", help="name of the model in tables and pictures")
    options, overrides = parser.parse_known_args(args)
    rank = int(os.environ.get("RANK", "0"))
    try:
        config, folder = resolve_request(options, overrides)
        check_questions(options, config)
        if "RANK" not in os.environ and options.processes > 1:
            return launch([sys.executable, __file__, *args], options.processes)
        result = run(options, config, folder)
        if rank == 0:
            from torchtitan.extensions.evaluation.results import write_result

            print(as_table(result))
            if options.out:
                write_result(result, options.out)
                print(options.out)
            else:
                print("note: nothing is saved; --out FILE.json saves the result", file=sys.stderr)
    except UserError as error:
        if rank == 0:
            print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def check_questions(options: argparse.Namespace, config: JobConfig) -> None:
    """UserError if nothing is asked, or something that cannot be asked."""
    check_asked(config)
    check_evaluation(config)
    if options.out is not None:
        if options.out.suffix != ".json":
            raise UserError(f"--out {options.out} should end with .json: pictures are written beside it.")
        make_writable("--out", options.out.parent)


def run(options: argparse.Namespace, config: JobConfig, folder: Path) -> dict[str, Any]:
    """On every rank: prepares the questions, loads the model, asks it. docs/evaluation.md describes the result."""
    # PyTorch takes seconds to import: a mistake on the command line should be reported before
    from torchtitan.extensions.evaluation import loading
    from torchtitan.extensions.evaluation.evaluate import evaluate, prepare
    from torchtitan.extensions.evaluation.results import settings_in
    from torchtitan.tools.device import peak_memory_gib
    from torchtitan.tools.logging import init_logger

    began = time.perf_counter()
    rank, _, world_size = loading.rank_and_world_size()
    init_logger(rank, world_size)
    on_disk = loading.inspect_model(folder, config, longest_asked(config), options.tokenizer)
    prepared = prepare(config, on_disk.tokenizer, on_disk.args, on_disk.ends_of_turn)
    loading.check_own_results(options, on_disk)
    if options.of_stage and settings_in(options.out) not in (None, prepared.settings):
        raise UserError(f"{options.out} holds the stage's answers to other questions: give --out, or delete that file.")
    with loading.model_on_ranks(on_disk, config) as (model, ranks), progress(rank) as on_part:
        e = config.evaluation
        numbers = evaluate(model, ranks, on_disk.tokenizer, prepared, e.windows, e.generate, on_part)
    manifest = on_disk.manifest
    return {
        "label": options.label or on_disk.label,
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


@contextmanager
def progress(rank: int) -> Iterator[Callable[[str, int, int], None]]:
    """Shows on rank 0 what is under way: as bars on a terminal, as lines elsewhere. Yields evaluate()'s on_part."""
    from rich.console import Console
    from rich.progress import Progress

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


def as_table(result: dict[str, Any]) -> str:
    """The result as text."""
    lines = [f"{result['label']}: {result['seconds']} s, {result['peak_gib']} GiB at most in the first process"]
    for name, text in result["perplexity"].items():
        gains = text["gains_of_context"]
        rows = [["positions", "tokens", "loss", *(f"w {gain['window']:,}" for gain in gains)]]
        for i, (begin, end) in enumerate(pairwise(text["edges"])):
            losses = [text["nll"][i], *(gain["nll_cut"][i] for gain in gains)]
            shown = ["-" if loss is None else f"{loss:.4f}" for loss in losses]
            rows.append([f"{begin:,} - {end:,}", f"{text['count'][i]:,}", *shown])
        lines += ["", f"loss by position, {name}", *text_table(rows)]
    for task, grid in result["tasks"].items():
        if grid["depths"]:
            for what, meaning in HOW:
                cells = {f"{depth:.0%}": [row[d] for row in grid[what]] for d, depth in enumerate(grid["depths"])}
                lines += percents(f"{task}, {meaning}", "depth", [grid], grid["lengths"], cells)
            lines += cut_answers([grid])
    return "\n".join(lines + tables_of_tasks(result))


HOW = (("exact", "answer is the likeliest"), ("score", "found in what was written"))


def tables_of_tasks(result: dict[str, Any]) -> list[str]:
    """Lines of the tasks without depths, and of the means of groups, by length."""
    from torchtitan.extensions.evaluation.tasks import group_name, mean_at_length

    grids = {task: grid for task, grid in result["tasks"].items() if not grid["depths"]}
    lengths = sorted({n for grid in (*grids.values(), *result["groups"].values()) for n in grid["lengths"]})
    lines = []
    for what, meaning in HOW:
        cells = {task: [mean_at_length(grid, what, n) for n in lengths] for task, grid in grids.items()}
        for group, means in result["groups"].items():
            by_length = dict(zip(means["lengths"], means[what], strict=True))
            cells[group_name(group, means)] = [by_length.get(n) for n in lengths]
        lines += percents(f"tasks, {meaning}", "task", grids.values(), lengths, cells)
    return lines + cut_answers(grids.values())


def percents(
    title: str, head: str, grids: Iterable[dict[str, Any]], lengths: list[int], cells: dict[str, list[float | None]]
) -> list[str]:
    """A table with a row per entry of cells and a column per length; nothing if no cell has a number."""
    if all(cell is None for row in cells.values() for cell in row):
        return []
    rows = [[name, *("-" if cell is None else f"{cell:.0%}" for cell in row)] for name, row in cells.items()]
    return ["", f"{title}, of {total(grids, 'count')}", *text_table([[head, *(f"{n:,}" for n in lengths)], *rows])]


def total(grids: Iterable[dict[str, Any]], what: str) -> int:
    return sum(n or 0 for grid in grids for row in grid[what] for n in row)


def cut_answers(grids: Iterable[dict[str, Any]]) -> list[str]:
    cut = total(grids, "cut")
    return [f"{cut} answers were cut at the tokens that they may have"] if cut else []


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # as torchtitan/train.py ends
