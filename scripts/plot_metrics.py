"""Plot a run's loss over tokens, in total and by source, from its metrics.jsonl, beside the unigram model's loss.

Bold and dotted lines are running means over seven logged steps; the pale line is the loss as logged.

    python scripts/plot_metrics.py outputs/a outputs/b --out loss.png                       runs on top of each other
    python scripts/plot_metrics.py outputs/demo/1k outputs/demo/4k --chain --out loss.png   stages one after the other
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no display on a cluster
import matplotlib.pyplot as plt


def smooth(values: Sequence[float], reach: int = 3) -> list[float]:
    """Running mean over `reach` values to either side, fewer at the ends."""
    windows = (values[max(0, i - reach) : i + reach + 1] for i in range(len(values)))
    return [sum(w) / len(w) for w in windows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="dump folders")
    parser.add_argument("--out", type=Path, default=Path("loss.png"))
    parser.add_argument(
        "--chain", action="store_true", help="each run begins at the token count where the previous run ends"
    )
    args = parser.parse_args()

    figure, axes = plt.subplots(figsize=(8, 4.5))
    begin = 0
    for run in args.runs:
        try:
            steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
            plan = json.loads((run / "plan.json").read_text())
        except OSError as e:
            raise SystemExit(f"{run} is not a run's dump folder: {e}") from None
        steps = [s for s in steps if s["loss"] is not None]  # null for skipped steps
        if not steps:
            raise SystemExit(f"{run / 'metrics.jsonl'} has no line yet: the first step is not logged.")
        for step in steps:
            step["tokens_seen"] += begin
        tokens = [s["tokens_seen"] for s in steps]
        begin = tokens[-1] if args.chain else 0
        (line,) = axes.plot(tokens, smooth([s["loss"] for s in steps]), linewidth=2, label=f"{run.name}: loss")
        color = line.get_color()
        axes.plot(tokens, [s["loss"] for s in steps], color=color, alpha=0.3, linewidth=1)
        for source in plan["inputs"]["sources"]:
            found = [
                (s["tokens_seen"], s["loss_by_source"][source["name"]])
                for s in steps
                if source["name"] in s["loss_by_source"]
            ]
            if len(plan["inputs"]["sources"]) > 1 and found:
                x, y = zip(*found, strict=True)
                axes.plot(x, smooth(y), color=color, linestyle=":", linewidth=1)
                axes.annotate(source["name"], (x[-1], smooth(y)[-1]), fontsize=8, color=color)
        axes.axhline(
            plan["unigram_nats"],
            color=color,
            linestyle="--",
            linewidth=1,
            label=f"{run.name}: unigram model, {plan['unigram_nats']:.2f} nats",
        )
    axes.set_xlabel("tokens")
    axes.set_ylabel("cross-entropy (nats per token)")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(args.out, dpi=130)
    print(args.out)


if __name__ == "__main__":
    main()
