"""Pictures of evaluation results, made from the JSON that the scripts write."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display on a cluster
import matplotlib.pyplot as plt
import numpy as np

Curve = tuple[list[int], list[float | None], int | None, int | None]
"""The edges of ranges of positions, their losses, and what cuts the context: window, or reset_every."""


def draw_positions(results: list[dict[str, Any]], path: Path, title: str = "") -> None:
    """Write perplexity by position as PNG: a colour per result, the trained lengths as dotted vertical lines.

    results: as scripts/loss_by_position.py writes them.
    """
    figure = _perplexity_figure(
        [(r["label"], [(r["edges"], c["nll"], c["window"], c["reset_every"]) for c in r["curves"]]) for r in results],
        title,
    )
    for length in sorted({r["trained_length"] for r in results if r["trained_length"]}):
        if length < max(r["length"] for r in results):
            _mark_trained(figure.axes[0], length)
    save(figure, path)


def position_figure(result: dict[str, Any]) -> Any:
    """Perplexity by position, a colour per text; result: of evaluate(). In old results a gain of context has no
    "stride": its context began anew."""
    curves: list[tuple[str, list[Curve]]] = []
    for name, text in result["perplexity"].items():
        of_text: list[Curve] = [(text["edges"], text["nll"], None, None)]
        for gain in text["gains_of_context"]:
            cut = (gain["window"], None) if "stride" in gain else (None, gain["window"])
            of_text.append((gain["edges"], gain["nll_cut"], *cut))
        curves.append((name, of_text))
    return _perplexity_figure(curves, result["label"])


def _perplexity_figure(curves: list[tuple[str, list[Curve]]], title: str) -> Any:
    """Curves by label, a colour per label: dashed if the context is cut to a window, dotted if it begins anew."""
    figure, axes = plt.subplots(figsize=(8, 4.5))
    for i, (label, of_label) in enumerate(curves):
        for edges, nll, window, reset_every in of_label:
            style: dict[str, Any] = {"linewidth": 2, "marker": ".", "label": label}
            if window or reset_every:
                how = f"within {window:,}" if window else f"reset every {reset_every:,}"
                style = {"linewidth": 1, "linestyle": "--" if window else ":", "label": f"{label}, {how}"}
            axes.plot(_middles(edges), np.exp(np.array(nll, dtype=float)), color=f"C{i % 10}", **style)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    low, high = axes.get_ylim()
    shown = "25" if high / low > 5 else "123456789"
    axes.yaxis.set_minor_formatter(lambda value, _: f"{value:g}" if str(value)[0] in shown else "")
    axes.set(xlabel="position in the document (tokens)", ylabel="perplexity")
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.25, which="both")
    axes.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    return figure


def _middles(edges: list[int]) -> list[float]:
    return [(a + b) / 2 for a, b in pairwise(edges)]


def _mark_trained(axes: Any, length: int) -> None:
    """A dotted vertical line with its meaning."""
    axes.axvline(length, color="grey", linestyle=":", linewidth=1)
    axes.annotate(
        f"trained to {length:,}",
        (length, 1),
        xycoords=("data", "axes fraction"),
        xytext=(4, -12),
        textcoords="offset points",
        fontsize=8,
        color="grey",
    )


def needle_figure(grid: dict[str, Any], title: str = "") -> Any:
    """Scores of a task with depths, in percent, by length (across) and depth (down), red to green: of what was written,
    else `exact`. grid: as mean_by_length_and_depth gives it."""
    writes = any(cell is not None for row in grid["score"] for cell in row)
    values = np.array(grid["score" if writes else "exact"], dtype=float).T  # [depths, lengths]
    depths = [f"{d:.0%}" for d in grid["depths"]]
    return _heatmap(values, grid["lengths"], depths, "depth of the needle", title, writes)


def tasks_figure(grids: dict[str, Any], title: str = "") -> Any:
    """Scores by length (across) and task (down) of tasks without depths: of what was written, if anything was, else
    `exact`. grids: by task, as mean_by_length_and_depth gives them."""
    writes = any(row[0] is not None for grid in grids.values() for row in grid["score"])
    lengths = sorted({n for grid in grids.values() for n in grid["lengths"]})
    values = np.full((len(grids), len(lengths)), np.nan)
    for i, grid in enumerate(grids.values()):
        for n, row in zip(grid["lengths"], grid["score" if writes else "exact"], strict=True):
            values[i, lengths.index(n)] = np.nan if row[0] is None else row[0]
    return _heatmap(values, lengths, list(grids), None, title, writes)


def _heatmap(
    values: np.ndarray, lengths: list[int], rows: list[str], what: str | None, title: str, writes: bool
) -> Any:
    """values: float [rows, lengths], 0 to 1, NaN if there is none; what: what rows are."""
    size = (max(4.0, 1.5 + 0.7 * len(lengths)), max(2.5, 1.6 + 0.45 * len(rows)))
    figure, axes = plt.subplots(figsize=size)
    axes.imshow(values * 100, cmap="RdYlGn", vmin=0, vmax=100, aspect="auto")
    axes.set_xticks(range(len(lengths)), [_short(n) for n in lengths])
    axes.set_yticks(range(len(rows)), rows)
    for (row, column), value in np.ndenumerate(values * 100):
        if np.isfinite(value):
            axes.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=8)
    axes.set_xlabel("length (tokens)")
    if what:
        axes.set_ylabel(what)
    axes.set_title(f"{title}\n{_meaning(writes)}, %", fontsize=9)
    figure.tight_layout()
    return figure


def _meaning(writes: bool) -> str:
    return "found in what was written" if writes else "answer is the likeliest"


def task_figures(result: dict[str, Any]) -> dict[str, Any]:
    """Figures by name: one per task with depths, and "tasks" for all other tasks; result: of evaluate()."""
    grids, label = result["tasks"], result["label"]
    figures = {task: needle_figure(grid, label) for task, grid in grids.items() if grid["depths"]}
    without = {task: grid for task, grid in grids.items() if not grid["depths"]}
    if without:
        figures["tasks"] = tasks_figure(without, label)
    return figures


def comparison_figure(
    results: list[dict[str, Any]],
    labels: list[str],
    texts: list[str],
    tasks: list[str],
    trained_length: int | None = None,
) -> Any:
    """Loss by position on the left, scores by length on the right, or only one of them; a colour per result.

    results: of evaluate(). A dotted vertical line marks the trained length if the picture goes beyond it.
    """
    figure, panels = plt.subplots(1, bool(texts) + bool(tasks), figsize=(11, 4.5), squeeze=False)
    if texts:
        _draw_losses(panels[0][0], results, labels, texts)
    if tasks:
        _draw_scores(panels[0][-1], results, labels, tasks)
    for axes in panels[0]:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda value, _: _short(round(value)))
        if trained_length and trained_length < axes.get_xlim()[1]:
            _mark_trained(axes, trained_length)
        axes.grid(alpha=0.25, which="both")
        axes.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    return figure


def _draw_losses(axes: Any, results: list[dict[str, Any]], labels: list[str], texts: list[str]) -> None:
    """A colour per result, a line style per text."""
    for i, (result, label) in enumerate(zip(results, labels, strict=True)):
        for j, text in enumerate(texts):
            if losses := result["perplexity"].get(text):
                style: dict[str, Any] = {"color": f"C{i % 10}", "linestyle": ("-", "--", "-.", ":")[j % 4]}
                name = f"{label}, {text}" if len(texts) > 1 else label
                axes.plot(
                    _middles(losses["edges"]), np.array(losses["nll"], dtype=float), marker=".", label=name, **style
                )
    axes.set(xlabel="position in the document (tokens)", ylabel="loss (nats per token)")


def _draw_scores(axes: Any, results: list[dict[str, Any]], labels: list[str], tasks: list[str]) -> None:
    """Each task pale, and in bold the mean of all tasks at lengths that all have. Scores of what was written if every
    result has them, else `exact`."""
    grids = [[result["tasks"][task] for task in tasks if task in result["tasks"]] for result in results]
    writes = all(any(c is not None for row in grid["score"] for c in row) for several in grids for grid in several)
    for i, (label, several) in enumerate(zip(labels, grids, strict=True)):
        by_length: dict[int, list[float]] = {}
        for grid in several:
            rows = [[c for c in row if c is not None] for row in grid["score" if writes else "exact"]]
            points = {n: 100 * sum(row) / len(row) for n, row in zip(grid["lengths"], rows, strict=True) if row}
            for n, value in points.items():
                by_length.setdefault(n, []).append(value)
            if len(tasks) > 1:
                axes.plot(list(points), list(points.values()), color=f"C{i % 10}", linewidth=1, alpha=0.25)
        lengths = sorted(n for n, values in by_length.items() if len(values) == len(tasks))
        mean = [sum(by_length[n]) / len(tasks) for n in lengths]
        axes.plot(lengths, mean, color=f"C{i % 10}", linewidth=2, marker=".", label=label)
    what = f"mean of {len(tasks)} tasks" if len(tasks) > 1 else tasks[0]
    axes.set(xlabel="length (tokens)", ylabel=f"{what}: {_meaning(writes)}, %", ylim=(-3, 103))


def save(figure: Any, path: Path) -> None:
    """Write the figure as PNG, and free it."""
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _short(length: int) -> str:
    return f"{length // 1024}K" if length % 1024 == 0 else f"{length:,}"
