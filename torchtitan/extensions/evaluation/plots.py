"""Pictures of evaluation results, from the JSON that the scripts write: several runs can be drawn together."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display on a cluster
import matplotlib.pyplot as plt
import numpy as np


def draw_positions(results: list[dict[str, Any]], path: Path, title: str = "") -> None:
    """Perplexity by position, a line per curve: dashed if its context is a window, dotted if it begins anew.

    results: as scripts/loss_by_position.py writes them. A dotted vertical line marks each trained length.
    """
    figure, axes = plt.subplots(figsize=(8, 4.5))
    for result in results:
        middles = [(a + b) / 2 for a, b in pairwise(result["edges"])]
        color = axes.plot([], [])[0].get_color()
        for curve in result["curves"]:
            perplexity = np.exp(np.array(curve["nll"], dtype=float))
            style = {"linewidth": 2, "marker": ".", "label": result["label"]}
            if curve["window"] or curve["reset_every"]:
                style = _cut_style(result["label"], curve["window"], curve["reset_every"])
            axes.plot(middles, perplexity, color=color, **style)
    for length in sorted({r["trained_length"] for r in results if r["trained_length"]}):
        if length < max(r["length"] for r in results):
            _mark_trained(axes, length)
    _label_perplexity(figure, axes, title)
    save(figure, path)


def _cut_style(label: str, window: int | None, reset_every: int | None) -> dict[str, Any]:
    """How a curve with less than full context is drawn: nothing else tells the two kinds apart."""
    how = f"within {window:,}" if window else f"reset every {reset_every:,}"
    return {"linewidth": 1, "linestyle": "--" if window else ":", "label": f"{label}, {how}"}


def _mark_trained(axes: Any, length: int) -> None:
    """A dotted vertical line, and what it means."""
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


def _label_perplexity(figure: Any, axes: Any, title: str) -> None:
    """Perplexity by position: a logarithmic vertical axis with plain numbers, labels, grid and legend."""
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


def needle_figure(grid: dict[str, Any], title: str = "") -> Any:
    """A task's scores by length (across) and depth (down), red to green: of what was written, else `exact`.

    grid: as mean_by_length_and_depth gives it. A cell's number is its mean in percent.
    """
    writes = any(cell is not None for row in grid["score"] for cell in row)
    values = np.array(grid["score" if writes else "exact"], dtype=float).T  # [depths, lengths]
    depths = [f"{d:.0%}" for d in grid["depths"]] if grid["depths"] else ["all"]
    return _heatmap(values, grid["lengths"], depths, "depth of the needle", title, writes)


def tasks_figure(grids: dict[str, Any], title: str = "") -> Any:
    """Scores by length (across) and task (down) of tasks without depths; grids: by task, as
    mean_by_length_and_depth gives them. Scores of what was written, if anything was, else `exact`."""
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
    """values: float [rows, lengths], 0 to 1, NaN where there is none."""
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
    """Figures by name: one per task with depths, and "tasks" for all others; result: of evaluate()."""
    grids, label = result["tasks"], result["label"]
    figures = {task: needle_figure(grid, label) for task, grid in grids.items() if grid["depths"]}
    without = {task: grid for task, grid in grids.items() if not grid["depths"]}
    if without:
        figures["tasks"] = tasks_figure(without, label)
    return figures


def position_figure(result: dict[str, Any]) -> Any:
    """Perplexity by position, a line per text, dashed if the context is cut to a window; result: of evaluate(). Gains
    without a "stride", in old results, are of a context that began anew."""
    figure, axes = plt.subplots(figsize=(8, 4.5))

    def draw(edges: list[int], nll: list[float | None], **style: Any) -> Any:
        middles = [(a + b) / 2 for a, b in pairwise(edges)]
        return axes.plot(middles, np.exp(np.array(nll, dtype=float)), marker=".", **style)[0]

    for name, one in result["perplexity"].items():
        color = draw(one["edges"], one["nll"], label=name).get_color()
        for gain in one["gains_of_context"]:
            cut = (gain["window"], None) if "stride" in gain else (None, gain["window"])
            draw(gain["edges"], gain["nll_cut"], color=color, **_cut_style(name, *cut))
    _label_perplexity(figure, axes, result["label"])
    return figure


def comparison_figure(
    results: list[dict[str, Any]],
    labels: list[str],
    texts: list[str],
    tasks: list[str],
    trained_length: int | None = None,
) -> Any:
    """Loss by position on the left, scores by length on the right, or one of them; a colour per result.

    results: of evaluate(). A dotted vertical line marks the trained length, if the picture goes beyond it.
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
    """A line style per text."""
    for i, (result, label) in enumerate(zip(results, labels, strict=True)):
        for j, text in enumerate(texts):
            if one := result["perplexity"].get(text):
                middles = [(a + b) / 2 for a, b in pairwise(one["edges"])]
                style: dict[str, Any] = {"color": f"C{i % 10}", "linestyle": ("-", "--", "-.", ":")[j % 4]}
                name = f"{label}, {text}" if len(texts) > 1 else label
                axes.plot(middles, np.array(one["nll"], dtype=float), marker=".", label=name, **style)
    axes.set(xlabel="position in the document (tokens)", ylabel="loss (nats per token)")


def _draw_scores(axes: Any, results: list[dict[str, Any]], labels: list[str], tasks: list[str]) -> None:
    """Each task pale, and in bold their mean at the lengths that all of them have. Scores of what was written, if every
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
