"""Draw a stage's plan, from the plan.json of a run's dump folder or of scripts/plan.py --out; several go on one page.

    python scripts/plot_plan.py outputs/demo --out plan.png
    python scripts/plot_plan.py original.json cut_4k.json --out lengths.png

Upper left: each source's share of the tokens, asked for and got, and how often it is read; a thin line spans the shares
at the points of a schedule. Upper right: what becomes of its tokens. Lower left: tokens by length, of whole documents
upwards and of the parts in rows downwards. Documents are weighted by the source's share, so that the two halves differ
by filters, cutting and upsampling alone. Lower right: how much more work the busiest rank has than the mean rank, with
rows in slot order and with rows as they are dealt.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display on a cluster
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import SubFigure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter

from torchtitan.tools.errors import UserError

COLORS = [
    *("#3568a8", "#e0803a", "#4f9d69", "#c4504f", "#8266b0", "#96694c", "#d479b0", "#7f8790", "#b5ab35", "#3aa6b9"),
    *("#8fb3de", "#f3b98a", "#9fd0ae", "#e69c9b", "#bfaedb", "#c9a58e", "#efb5d6", "#bcc2c8", "#dcd68a", "#99d6e0"),
]
INK, FAINT, LIGHT = "#22272e", "#6b7280", "#e3e6ea"
BEFORE, AFTER = "#b8c4d3", "#35577d"
FATES = {  # in the order of the bar
    "read": AFTER,
    "not reached": LIGHT,
    "cut off by truncate": "#e9b44c",
    "below min_length": "#d98880",
    "above max_length": "#a9545c",
    "dropped, too long": "#7d3c47",
    "text of the evaluation": "#8266b0",
    "copies of others": "#bfaedb",
    "no part of the mix": "#b9bfc7",
}
STYLE: dict[str, Any] = {
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": FAINT,
    "axes.edgecolor": "#b9bfc7",
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "text.parse_math": False,  # a $ in a name is a $
}
LONGEST_NAME = 26
WIDTH = 13.0  # inches, like all sizes of the page
BAR = 0.27
OUTDENT = -0.31  # of the last picture, in its widths: room for its names


def main(args: list[str]) -> int:
    """Exit code 1, and one line, for a mistake of the user."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plans", nargs="+", type=Path, help="plan.json files, or folders that hold one")
    parser.add_argument("--out", type=Path, default=Path("plan.png"), help="the picture; .png, .pdf or .svg")
    own = parser.parse_args(args)
    try:
        reports = [(name_of(path), read(path)) for path in own.plans]
        known = plt.figure().canvas.get_supported_filetypes()
        if own.out.suffix.lstrip(".") not in known:
            raise UserError(f"--out {own.out}: the name must end in one of .{', .'.join(sorted(known))}.")
        with plt.rc_context(STYLE):
            draw(reports, own.out)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    finally:
        plt.close("all")
    print(own.out)
    return 0


def read(path: Path) -> dict[str, Any]:
    file = path / "plan.json" if path.is_dir() else path
    try:
        report = json.loads(file.read_text())
        if "packing" not in report["inputs"] or not report["sources"]:
            raise KeyError("inputs.packing")
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error}. Give a plan.json, or the dump folder of a run.") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{file} is not the report of a plan, or is of another version ({type(error).__name__}: {error}): write "
            "it again with scripts/plan.py --out."
        ) from error
    return report


def name_of(path: Path) -> str:
    return (path.parent if path.name == "plan.json" and path.parent.name else path).resolve().with_suffix("").name


def draw(reports: list[tuple[str, dict[str, Any]]], out: Path) -> None:
    heights = [5.75 + bars_height(report) for _, report in reports]
    figure = plt.figure(figsize=(WIDTH, sum(heights)), facecolor="white")
    pages = figure.subfigures(len(reports), 1, height_ratios=heights, squeeze=False)[:, 0]
    for page, height, (name, report) in zip(pages, heights, reports):
        draw_one(page, height, name, report)
    try:
        figure.savefig(out, dpi=130)
    except OSError as error:
        raise UserError(f"--out {out} cannot be written: {error}.") from error


def bars_height(report: dict[str, Any]) -> float:
    return BAR * (max(4, len(report["sources"])) + 1)


def draw_one(page: SubFigure, height: float, name: str, report: dict[str, Any]) -> None:
    inputs, upper = report["inputs"], bars_height(report)
    page.text(0.35 / WIDTH, 1 - 0.32 / height, name, fontsize=16, fontweight="bold", va="center")
    masked = "documents of a row see each other" if inputs["cross_document_attention"] else "documents masked"
    facts = (
        f"{report['steps']:,} steps of {inputs['rows_per_step']} rows of {inputs['seq_len']:,} tokens: "
        f"{short(report['tokens'])} tokens   ·   strategy {inputs['strategy']}   ·   packing {inputs['packing']}   ·   "
        f"positions {inputs['positions']}, {masked}"
    )
    page.text(0.35 / WIDTH, 1 - 0.66 / height, facts, color=FAINT, va="center")

    def place(left: float, bottom: float, width: float, tall: float, **options: Any) -> Axes:
        return page.add_axes((left / WIDTH, bottom / height, width / WIDTH, tall / height), **options)

    shares = place(2.15, height - 1.35 - upper, 4.85, upper)
    draw_shares(shares, report)
    draw_fates(place(7.55, height - 1.35 - upper, 5.1, upper, sharey=shares), report)
    draw_lengths(place(0.95, 0.7, 6.05, 2.6), report)
    draw_balance(place(8.75, 0.7, 3.9, 2.6), report)


def draw_shares(axes: Axes, report: dict[str, Any]) -> None:
    sources = report["sources"]
    ends = [max(s["share"], s["share_asked"], *asked_at_points(report, s["name"])) for s in sources]
    most = max(report["padding"], *ends)
    for y, (source, end) in enumerate(zip(sources, ends)):
        axes.barh(y, source["share"], 0.66, color=color(y))
        axes.plot([source["share_asked"]] * 2, [y - 0.42, y + 0.42], color=INK, linewidth=1.6)
        moving = asked_at_points(report, source["name"])
        if moving:
            axes.plot([min(moving), max(moving)], [y, y], color=INK, linewidth=0.9, marker="|", markersize=5)
        text = f"{source['share']:.1%}  ·  {epochs_text(source)}"
        axes.text(end + 0.02 * most, y, text, va="center", fontsize=8.5)
    padding, y = report["padding"], len(sources)
    axes.barh(y, padding, 0.66, color="white", edgecolor=FAINT, hatch="/////", linewidth=0.5)
    text = f"{padding:.1%} of the rows" if padding >= 0.005 else f"{padding:.3%} of the rows"
    axes.text(padding + 0.02 * most, y, text, va="center", fontsize=8.5, color=FAINT)
    axes.set_yticks(range(y + 1), [*(shorten(s["name"]) for s in sources), "padding"], color=INK)
    axes.tick_params(axis="y", length=0)
    axes.set_xlim(0, most * 1.7)
    axes.set_ylim(y + 0.6, -0.6)
    axes.xaxis.set_major_formatter(percent)
    axes.set_xticks([tick for tick in axes.get_xticks() if tick <= most * 1.06])
    axes.set_title("Share of the tokens (line: asked for)  ·  epochs")


def asked_at_points(report: dict[str, Any], name: str) -> list[float]:
    """The share of a source at the points of the schedules; empty if none of its streams moves."""
    schedule = report.get("schedule") or {"streams": []}  # older reports have none
    moving = {stream["documents"]: stream["asked"] for stream in schedule["streams"] if stream["source"] == name}
    entries = next(s["epochs"] for s in report["sources"] if s["name"] == name)
    still = sum(entry["share_asked"] for entry in entries if entry["documents"] not in moving)
    return [sum(at_point) + still for at_point in zip(*moving.values())]


def epochs_text(source: dict[str, Any]) -> str:
    entries = source["epochs"]
    if not entries:
        return "not read"
    if len(entries) == 1 and entries[0]["documents"] == "all":
        return f"{number(entries[0]['epochs'])}×"
    if len(entries) > 2:  # length_bins, from the shortest
        return " / ".join(number(e["epochs"]) for e in entries) + "×"
    return ", ".join(f"{e['documents']} {number(e['epochs'])}×" for e in entries)


def fates_of(source: dict[str, Any]) -> dict[str, float]:
    """Tokens of a source's corpus by what becomes of them in the stage."""
    left_out = source["left_out"]
    used = sum(e["tokens"] for e in source["epochs"])
    reached = sum(min(1.0, e["epochs"]) * e["tokens"] for e in source["epochs"])
    fates = {
        "read": reached,
        "not reached": used - reached,
        "cut off by truncate": left_out["truncated"][1],
        "below min_length": left_out["below_min_length"][1],
        "above max_length": left_out["above_max_length"][1],
        "dropped, too long": left_out["dropped"][1],
        "text of the evaluation": left_out["evaluation"][1],
        "copies of others": left_out["copies"][1],
    }
    # Beyond max_documents, of a source with weight 0, or of short documents if only long ones have a share. The
    # used documents count with their separators, the corpus without.
    fates["no part of the mix"] = max(0.0, source["tokens"] - sum(fates.values()))
    return fates


def draw_fates(axes: Axes, report: dict[str, Any]) -> None:
    sources = report["sources"]
    seen = set()
    for y, source in enumerate(sources):
        fates, begin = fates_of(source), 0.0
        total = sum(fates.values())
        for fate, tokens in fates.items():
            share = tokens / total
            axes.barh(y, share, 0.66, left=begin, color=FATES[fate])
            if share > 0:
                seen.add(fate)
            if share >= 0.07:
                ink = INK if fate in ("not reached", "cut off by truncate", "no part of the mix") else "white"
                axes.text(begin + share / 2, y, f"{share:.0%}", ha="center", va="center", fontsize=8, color=ink)
            begin += share
        axes.text(1.012, y, short(source["tokens"]), va="center", fontsize=8.5, color=FAINT)
    axes.tick_params(axis="y", length=0, labelleft=False)
    axes.set_xlim(0, 1.09)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1.0])
    axes.xaxis.set_major_formatter(percent)
    axes.spines["left"].set_visible(False)
    axes.set_title("What becomes of each source's tokens")
    shown = [fate for fate in FATES if fate in seen]
    axes.legend(
        handles=[Patch(color=FATES[fate]) for fate in shown],
        labels=shown,
        loc="upper left",
        bbox_to_anchor=(-0.005, -0.3 / bars_height(report)),
        ncols=4,
        handlelength=1.0,
        handleheight=1.0,
        columnspacing=1.4,
        borderpad=0,
        borderaxespad=0,
    )


def draw_lengths(axes: Axes, report: dict[str, Any]) -> None:
    sources = report["sources"]
    documents = [histogram(s["documents_by_length_from"], s["share"]) for s in sources]
    parts = [histogram(s["parts_by_length_from"], s["share"]) for s in sources]
    exponents = {e for h in documents + parts for e in h if sum(k.get(e, 0) for k in documents + parts) >= 0.002}
    first, last = min(exponents), max(exponents)
    highest = 0.0
    for sign, side in ((1, documents), (-1, parts)):
        base = dict.fromkeys(range(first, last + 1), 0.0)
        for index, found in enumerate(side):
            heights = dict.fromkeys(base, 0.0)
            for exponent, share in found.items():
                heights[min(last, max(first, exponent))] += share
            axes.bar(
                list(base),
                [sign * heights[e] for e in base],
                bottom=[sign * base[e] for e in base],
                width=0.9,
                color=color(index),
            )
            base = {e: base[e] + heights[e] for e in base}
        highest = max(highest, *base.values())
    axes.axhline(0, color=INK, linewidth=0.9)
    labels = [short_power(e) for e in range(first, last + 1)]
    labels[0] = f"< {short_power(first + 1)}"
    axes.set_xticks(range(first, last + 1), labels)
    axes.tick_params(axis="x", length=0)
    axes.set_xlim(first - 0.6, last + 0.6)
    axes.set_ylim(-1.12 * highest, 1.12 * highest)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{abs(value):.0%}"))
    axes.grid(axis="y", color=LIGHT, linewidth=0.7)
    axes.set_axisbelow(True)
    for text, y, edge in (("documents, as they are", 0.985, "top"), ("parts, as they stand in rows", 0.015, "bottom")):
        axes.text(0.012, y, text, va=edge, transform=axes.transAxes, fontsize=8.5, color=FAINT)
    axes.set_xlabel("length in tokens: from this to twice this")
    axes.set_title("Tokens by length (colours: sources, as above)")


def histogram(buckets: dict[str, dict[str, int]], share: float) -> dict[int, float]:
    """{exponent of the bucket's smallest length: its part of `share`}."""
    total = sum(bucket["tokens"] for bucket in buckets.values())
    return {int(n).bit_length() - 1: share * b["tokens"] / total for n, b in buckets.items()} if total else {}


def draw_balance(axes: Axes, report: dict[str, Any]) -> None:
    balance = report["imbalance"]
    axes.set_title("Work of the busiest rank beyond the mean rank's", x=OUTDENT)
    share = f"Attention: {report['attention_work']:.1%} of the pairs of whole rows."
    axes.text(OUTDENT, -0.2, share, transform=axes.transAxes, va="bottom", fontsize=8.5)
    groups = [
        ("step", "all", "over a step,\nall work"),
        ("step", "attention", "over a step,\nattention"),
        ("micro_batch", "all", "every micro-batch,\nall work"),
        ("micro_batch", "attention", "every micro-batch,\nattention"),
    ]
    excess = [(balance[when][f"{what}_before"] - 1, balance[when][f"{what}_after"] - 1) for when, what, _ in groups]
    most = max(value for pair in excess for value in pair)
    if most < 0.0005:
        even = "one rank: nothing to balance" if balance["ranks"] == 1 else "every rank has the same work"
        axes.text(0.5 + OUTDENT / 2, 0.5, even, ha="center", va="center", transform=axes.transAxes, color=FAINT)
        axes.set_axis_off()
        return
    for y, (before, after) in enumerate(excess):
        for at, value, fill in ((y - 0.19, before, BEFORE), (y + 0.19, after, AFTER)):
            axes.barh(at, value, 0.34, color=fill)
            axes.text(value + 0.012 * most, at, f"+{value:.1%}", va="center", fontsize=8.5)
    axes.set_yticks(range(len(groups)), [text for _, _, text in groups], color=INK, fontsize=8.5)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(3.55, -0.55)
    axes.set_xlim(0, most * 1.18)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"+{value:.0%}" if most > 0.05 else f"+{value:.1%}"))
    axes.legend(handles=[Patch(color=BEFORE), Patch(color=AFTER)], labels=["rows as they come", "rows as dealt"])
    facts = f"{balance['ranks']} ranks, {balance['rows_a_rank']} rows per rank, {balance['local_batch_size']} at a time"
    axes.text(1, -0.2, facts, transform=axes.transAxes, ha="right", va="bottom", fontsize=8.5, color=FAINT)


percent = FuncFormatter(lambda value, _: f"{value:.0%}")


def color(index: int) -> str:
    return COLORS[index % len(COLORS)]


def shorten(name: str) -> str:
    return name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 9]}…{name[-8:]}"


def short(tokens: float) -> str:
    """20970733664 -> '21.0B'."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if tokens >= 0.9995 * size:
            return f"{tokens / size:#.3g}".rstrip(".") + letter
    return f"{tokens:.0f}"


def short_power(exponent: int) -> str:
    """12 -> '4K'."""
    return f"{1 << exponent % 10}{['', 'K', 'M', 'G'][exponent // 10]}"


def number(epochs: float) -> str:
    if epochs < 0.01:
        return "<0.01"
    return f"{epochs:,.0f}" if epochs >= 99.5 else f"{epochs:.3g}" if epochs >= 1 else f"{epochs:.2g}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
