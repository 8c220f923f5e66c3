"""Results of evaluations side by side: what an extension costs at short context, and what it gains at long.

    python scripts/compare.py before.json after.json
    python scripts/compare.py outputs/64k/evaluation/step-500.json outputs/512k/evaluation/step-*.json \\
        --labels 64K 512K --plot compared.png

Each file is a result of scripts/evaluate.py or a stage's evaluation/step-N.json (docs/evaluation.md); differences are
to the first. Losses are in nats per token. What some results lack (texts, ranges of positions, tasks, lengths, depths)
is left out of a difference and listed at the end.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from torchtitan.extensions.evaluation.command_line import check_at_least, text_table
from torchtitan.tools.errors import UserError
from torchtitan.tools.folders import read_json

SIGNIFICANT = 0.01
"""Nats: a larger difference of losses is marked; Fu et al. (arXiv 2402.10171) call it significant."""

MARK = "*"
WAYS = {"exact": "answer is the likeliest", "score": "found in what was written"}
ASKED = {
    "texts": "files of text",
    "generate": "answers are generated",
    "add_bos": "BOS before documents and questions",
    "seed": "seed of the questions",
    "tokenizer": "other tokenizers",
    "questions": "other documents or questions",
}
SHOWN = ("texts", "generate", "add_bos", "seed")
"""Keys of "asked" whose values are shown; others are hashes."""

PICTURES = (".png", ".pdf", ".svg")
Result = dict[str, Any]
Range = tuple[int, int]
Notes = list[tuple[str, str]]
"""How results differ beside their numbers: (in which way, what)."""


def main(args: list[str]) -> int:
    """0; 1 and one line for a mistake."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("results", nargs="+", type=Path, help="JSON files; all are compared with the first")
    parser.add_argument("--labels", nargs="+", help="names of the results, instead of those in the files")
    parser.add_argument("--short", type=int, help="tokens of short context (the first result's trained length)")
    parser.add_argument("--plot", type=Path, help="picture to draw: loss by position, and scores by length")
    options = parser.parse_args(args)
    try:
        if len(options.results) < 2:
            raise UserError(f"{options.results[0]} is the only result: give at least two to compare.")
        if options.labels and len(options.labels) != len(options.results):
            raise UserError(f"--labels has {len(options.labels)} names for {len(options.results)} results.")
        check_at_least(options, short=1)
        if options.plot and options.plot.suffix not in PICTURES:
            raise UserError(f"--plot {options.plot} should end with {', '.join(PICTURES)}.")
        results = [read(path) for path in options.results]
        labels = options.labels or [result["label"] for result in results]
        if len(set(labels)) < len(labels):
            labels = [str(path) for path in options.results]
        print(compare(results, labels, options.short))
        if options.plot:
            from torchtitan.extensions.evaluation import plots  # matplotlib takes a second

            texts, tasks = (shared(result[part] for result in results) for part in ("perplexity", "tasks"))
            figure = plots.comparison_figure(results, labels, texts, tasks, options.short or trained_length(results[0]))
            options.plot.parent.mkdir(parents=True, exist_ok=True)
            plots.save(figure, options.plot)
            print(f"\n{options.plot}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def read(path: Path) -> Result:
    """The result in a file; UserError that names the file if it holds no result."""
    try:
        result: Result = read_json(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from None
    try:
        str(result["label"])
        for text in result["perplexity"].values():
            if not len(text["edges"]) - 1 == len(text["nll"]) == len(text["count"]):
                raise ValueError
        for grid in result["tasks"].values():
            for key in (*WAYS, "count"):
                if [len(row) for row in grid[key]] != [len(grid["depths"] or [None])] * len(grid["lengths"]):
                    raise ValueError
    except (KeyError, TypeError, AttributeError, ValueError):
        raise UserError(f"{path} is not a result of scripts/evaluate.py or of a stage (docs/evaluation.md).") from None
    return result


def shared(parts: Iterable[dict[str, Any]]) -> list[str]:
    """Names that the first part and at least one other have, in the first part's order."""
    first, *others = parts
    return [name for name in first if any(name in other for other in others)]


def trained_length(result: Result) -> int | None:
    """How many tokens the model was trained for; None if that is not known."""
    length: int | None = (result.get("rope") or {}).get("max_position_embeddings")
    return length


def compare(results: Sequence[Result], labels: Sequence[str], short: int | None = None) -> str:
    """The comparison as text; UserError if the first result has nothing in common with any other."""
    lines: list[str] = []
    notes: Notes = []
    compared = 0
    for name in shared(result["perplexity"] for result in results):
        table, missing = losses(name, results, labels, short or trained_length(results[0]))
        lines += table
        notes += missing
        compared += bool(table)
    for way in WAYS:
        table, missing = scores(way, results, labels)
        lines += table
        notes += missing
        compared += bool(table)
    if not compared:
        raise UserError(f"Nothing in common: {'; '.join(f'{n} has {has(r)}' for n, r in zip(labels, results))}.")
    for part, called in (("perplexity", "text"), ("tasks", "task")):
        for name in dict.fromkeys(name for result in results for name in result[part]):
            notes += only_in(f"{called} {name}", labels, [name in result[part] for result in results])
    if len({result.get("dtype") for result in results}) > 1:
        notes.append(("dtype", ", ".join(f"{r.get('dtype')} ({n})" for n, r in zip(labels, results))))
    for key, what in ASKED.items():
        values = [(result.get("asked") or {}).get(key) for result in results]
        if len({json.dumps(value) for value in values if value is not None}) > 1:
            shown = ", ".join(f"{v if key in SHOWN else i + 1} ({n})" for i, (v, n) in enumerate(zip(values, labels)))
            notes.append((what, shown))
    if notes:
        ways: dict[str, dict[str, None]] = {}
        for way, what in notes:
            ways.setdefault(way, {})[what] = None
        lines += ["", "not the same in all:", *(f"  {way}: {'; '.join(whats)}" for way, whats in ways.items())]
    return "\n".join(lines[1:])


def has(result: Result) -> str:
    """A description of what a result holds."""
    parts = [f"the loss on {name} by {len(text['nll'])} ranges" for name, text in result["perplexity"].items()]
    parts += [f"{name} at {', '.join(f'{n:,}' for n in grid['lengths'])}" for name, grid in result["tasks"].items()]
    return ", ".join(parts) or "nothing"


def only_in(what: str, labels: Sequence[str], have: Sequence[bool]) -> Notes:
    """Which results have `what`; nothing if all do."""
    if all(have):
        return []
    return [(f"only in {', '.join(label for label, has_it in zip(labels, have) if has_it)}", what)]


def losses(name: str, results: Sequence[Result], labels: Sequence[str], short: int | None) -> tuple[list[str], Notes]:
    """Lines about a text, loss (perplexity) by position and then at short and long context; and how results differ."""
    texts = [result["perplexity"].get(name) for result in results]
    tables, counts = [by_range(text, "nll") for text in texts], [by_range(text, "count") for text in texts]
    first, *others = tables
    ranges = [part for part in first if any(part in other for other in others)]
    notes: Notes = []
    for part in sorted({part for table in tables for part in table}):
        about = {label: part in table for label, table in zip(labels, tables) if table}
        notes += only_in(f"{name}, positions {span(part)}", list(about), list(about.values()))
    if not ranges:
        return [], notes
    rows = [["positions", "tokens", labels[0], *(cell for label in labels[1:] for cell in (label, "difference"))]]
    for part in ranges:
        row = [span(part), f"{counts[0][part]:,}", loss_cell(first[part])]
        for table in others:
            row += [loss_cell(table.get(part)), difference_cell(first[part], table.get(part))]
        rows.append(row)
        if len({count[part] for count in counts if part in count}) > 1:
            notes.append(("other documents, or another tokenizer", f"{name}, positions {span(part)}"))
    lines = ["", f"loss by position, {name}: nats per token (perplexity)", *text_table(rows)]
    lines.append(f"{MARK} a difference of more than {SIGNIFICANT} nats")
    if short is None:
        return [*lines, "short and long context: the first result has no trained length; name it with --short N"], notes
    for part in ranges:
        if part[0] < short < part[1]:
            notes.append(("neither short nor long context", f"{name}, positions {span(part)}"))
    rows = [[f"difference to {labels[0]}", f"short context (to {short:,})", "long context (beyond)"]]
    for label, table in zip(labels[1:], others):
        both = [part for part in ranges if first[part] is not None and table.get(part) is not None]
        within = [part for part in both if part[1] <= short], [part for part in both if part[0] >= short]
        rows.append([label, *(mean_difference(first, table, counts[0], parts) for parts in within)])
    return [*lines, "", *text_table(rows)], notes


def by_range(text: Result | None, key: str) -> dict[Range, Any]:
    """Losses ("nll") or numbers of tokens ("count") by range of positions; text: a text's part of a result."""
    return dict(zip(pairwise(text["edges"]), text[key], strict=True)) if text else {}


def span(part: Range) -> str:
    return f"{part[0]:,} - {part[1]:,}"


def loss_cell(nll: float | None) -> str:
    return "-" if nll is None else f"{nll:.4f} ({math.exp(min(nll, 700)):.2f})"


def difference_cell(a: float | None, b: float | None) -> str:
    """b - a in nats, marked if it is larger than SIGNIFICANT."""
    if a is None or b is None:
        return "-  "
    return f"{b - a:+.4f} {MARK if abs(b - a) > SIGNIFICANT else ' '}"


def mean_difference(
    first: dict[Range, Any], other: dict[Range, Any], count: dict[Range, int], parts: Sequence[Range]
) -> str:
    """Both results' means over ranges of positions, weighted by the first result's numbers of tokens."""
    total = sum(count[part] for part in parts)
    if not total:
        return "-  "
    a, b = (sum(table[part] * count[part] for part in parts) / total for table in (first, other))
    return f"{loss_cell(a)} -> {loss_cell(b)}  {difference_cell(a, b)}"


def scores(way: str, results: Sequence[Result], labels: Sequence[str]) -> tuple[list[str], Notes]:
    """Lines about all tasks by length, scored one way, means over the depths that all have; and how results differ."""
    rows: list[list[str]] = []
    notes: Notes = []
    means: dict[int, list[list[float]]] = {}
    for task in shared(result["tasks"] for result in results):
        grids = [result["tasks"].get(task) for result in results]
        about = [(label, grid) for label, grid in zip(labels, grids) if grid]
        names = [label for label, _ in about]
        depths = [d for d in about[0][1]["depths"] or [None] if all(d in (g["depths"] or [None]) for _, g in about)]
        for depth in dict.fromkeys(d for _, grid in about for d in grid["depths"] or [None]):
            called = "all" if depth is None else f"{depth:.0%}"
            notes += only_in(f"{task}, depth {called}", names, [depth in (g["depths"] or [None]) for _, g in about])
        for length in sorted({n for _, grid in about for n in grid["lengths"]}):
            notes += only_in(f"{task} at {length:,}", names, [length in grid["lengths"] for _, grid in about])
            shares = [cell_mean(grid, way, length, depths) for grid in grids]
            if shares[0] is None or all(share is None for share in shares[1:]):
                continue
            asked = [sum(cells_of(grid, "count", length, depths)) for grid in grids if grid]
            if len(set(asked)) > 1:
                notes.append(("another number of questions", f"{task} at {length:,} ({', '.join(map(str, asked))})"))
            rows.append([task, f"{length:,}", str(asked[0]), *score_cells(shares)])
            if all(share is not None for share in shares):
                means.setdefault(length, []).append(shares)
    if not rows:
        return [], notes
    for length, several in sorted(means.items()):
        if len(several) > 1:
            mean = [sum(column) / len(several) for column in zip(*several)]
            rows.append([f"mean of {len(several)}", f"{length:,}", "", *score_cells(mean)])
    head = ["task", "length", "asked", labels[0], *(cell for label in labels[1:] for cell in (label, "difference"))]
    return ["", f"tasks, {WAYS[way]}", *text_table([head, *rows])], notes


def cells_of(grid: Result, what: str, length: int, depths: Sequence[float | None]) -> list[Any]:
    """Cells of a task's grid at a length and some depths; cells in which nothing was asked or written are left out."""
    if length not in grid["lengths"]:
        return []
    row = grid[what][grid["lengths"].index(length)]
    columns = grid["depths"] or [None]
    return [row[columns.index(d)] for d in depths if row[columns.index(d)] is not None]


def cell_mean(grid: Result | None, way: str, length: int, depths: Sequence[float | None]) -> float | None:
    cells = cells_of(grid, way, length, depths) if grid else []
    return sum(cells) / len(cells) if cells else None


def score_cells(shares: Sequence[float | None]) -> list[str]:
    """Shares in percent; each but the first is followed by its difference to the first in percentage points."""
    first = shares[0]
    cells = ["-" if first is None else f"{first:.1%}"]
    for share in shares[1:]:
        both = share is not None and first is not None
        cells += [f"{share:.1%}", f"{(share - first) * 100:+.1f}"] if both else ["-", "-"]
    return cells


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
