"""Pictures of evaluation results. Reads the JSON that the scripts write, so that runs can be drawn together."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display on a cluster
import matplotlib.pyplot as plt
import numpy as np


def draw_positions(results: list[dict[str, Any]], path: Path, title: str = "") -> None:
    """Perplexity by position: a line a curve, dashed where the context begins anew every `window` tokens.

    results: as scripts/loss_by_position.py writes them. A dotted upright line marks each trained length.
    """
    figure, axes = plt.subplots(figsize=(8, 4.5))
    for result in results:
        middles = [(a + b) / 2 for a, b in pairwise(result["edges"])]
        color = axes.plot([], [])[0].get_color()
        for curve in result["curves"]:
            reset = curve["window"] is not None
            axes.plot(
                middles,
                np.exp(curve["nll"]),
                color=color,
                linestyle="--" if reset else "-",
                linewidth=1 if reset else 2,
                marker=None if reset else ".",
                label=result["label"] + (f", reset every {curve['window']:,}" if reset else ""),
            )
    for length in sorted({r["trained_length"] for r in results if r["trained_length"]}):
        if length < max(r["length"] for r in results):
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
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_formatter(lambda value, _: f"{value:g}" if str(value)[0] in "25" else "")
    axes.set_xlabel("position in the document (tokens)")
    axes.set_ylabel("perplexity")
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.25, which="both")
    axes.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
