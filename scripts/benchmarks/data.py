"""Speed and quality of torchtitan/datasets on this machine: planning a stage, dealing, packing and reading rows.

    python scripts/benchmarks/data.py                              # full sizes; needs 1 GB under --scratch
    python scripts/benchmarks/data.py --parts packing imbalance    # what does not depend on the machine
    python scripts/benchmarks/data.py --documents 1e5 --stage-tokens 2e8 --tokens 1e7 --plain-tokens 2e6  # a quick look

Documents are synthetic: lengths drawn from lognormal distributions, token ids at random. Reading is timed beside a
plain-Python loop over Hugging Face `datasets` that packs documents of the same corpus into rows of the same length; the
two take turns, so that other load on the machine slows both. The figure to quote there is the ratio.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import platform
import resource
import statistics
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

# NumPy, torch and torchtitan are imported by the parts that need them: the planning process is forked from this one,
# and what is in memory here would count as its own.
if TYPE_CHECKING:
    import numpy as np
    import torch

    from torchtitan.datasets.corpus import Corpus
    from torchtitan.datasets.plan import Plan

ROW = 65536
PARTS = ("planning", "imbalance", "packing", "reading")

STAGE_SOURCES = {
    "web": (6.6, 1.1, 0.60, 0.45),
    "code": (6.5, 1.3, 0.20, 0.25),
    "wiki": (6.2, 1.2, 0.15, 0.10),
    "papers": (8.3, 1.2, 0.05, 0.20),
}
"""Mean and deviation of the logarithm of the lengths, share of the documents, weight."""

DOMAINS = {
    "books": (11.3, 0.8, 0.1, 0.35),
    "code": (9.0, 1.3, 0.2, 0.25),
    "web": (6.6, 1.1, 0.5, 0.25),
    "wiki": (6.0, 1.4, 0.2, 0.15),
}
"""The same for packing; with 10,000 documents, these are what the tests pack."""


def table(title: str, rows: list[tuple[str, ...]]) -> None:
    """A Markdown table; the first row is its head."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths)) + " |" for row in rows]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    print(f"\n{title}\n\n" + "\n".join(lines), flush=True)


def lengths_only(name: str, lengths: np.ndarray) -> Corpus:
    """A corpus that can be planned but not read."""
    import numpy as np

    from torchtitan.datasets.corpus import Corpus

    return Corpus(name, [(np.concatenate([[0], np.cumsum(lengths)]), np.zeros(0, np.int32))], name, None)


# 1. Planning


def time_planning(documents: int, tokens: int, row: int = ROW, length: int | None = None) -> dict[str, Any]:
    """In a separate process on one core: seconds to make the plan, and that process's peak memory. length: of every
    document, in one source, instead of STAGE_SOURCES."""
    core = min(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {core})
    import numpy as np

    from torchtitan.config.data_schema import Data, Source
    from torchtitan.datasets.build_rows import Stage, make_chunks
    from torchtitan.datasets.mixture import build_streams
    from torchtitan.datasets.table_files import load_table, write_table

    random = np.random.default_rng(0)
    lengths = [
        np.exp(random.normal(mean, deviation, max(1, int(documents * share)))).clip(16, 1_000_000).astype(np.int64)
        for mean, deviation, share, _ in STAGE_SOURCES.values()
    ]
    data = Data(sources=tuple(Source(name, name, values[3]) for name, values in STAGE_SOURCES.items()))
    if length is not None:
        lengths, data = [np.full(documents, length)], Data(sources=(Source("short", "short"),))
    rows = -(-tokens // row)
    start = time.perf_counter()
    streams, _ = build_streams(data, lengths, [0] * len(lengths), row, range(1))
    with tempfile.TemporaryDirectory() as scratch:
        write_table(make_chunks(Stage(streams, data, row, rows, seed=0)), Path(scratch) / "plan")
        seconds = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        made = load_table(Path(scratch) / "plan")
    return {
        "seconds": seconds,
        "peak_gib": peak,
        "documents": sum(map(len, lengths)),
        "mean": sum(int(n.sum()) for n in lengths) / sum(map(len, lengths)),
        "rows": len(made),
        "parts": len(made.length),
        "padding": 1 - int(made.length.sum(dtype="int64")) / (rows * row),
    }


def planning(args: argparse.Namespace) -> None:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork")) as pool:
        got = pool.submit(time_planning, args.documents, args.stage_tokens).result()
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork")) as pool:  # a peak of its own
        short = pool.submit(time_planning, args.short_documents, args.short_rows << 22, 4 << 20, 12).result()
    table(
        f"Planning a stage of {args.stage_tokens / 1e9:g} billion tokens from {got['documents']:,} document lengths in "
        f"{len(STAGE_SOURCES)} weighted sources (mean {got['mean']:.0f} tokens), best_fit, one core:",
        [
            ("planning", "", "target"),
            ("seconds", f"{got['seconds']:.1f}", "60"),
            ("peak memory of the process", f"{got['peak_gib']:.2f} GiB", "4 GiB"),
            (f"rows of {ROW:,}", f"{got['rows']:,}", ""),
            ("parts of documents in them", f"{got['parts']:,}", ""),
            ("padding", f"{got['padding']:.3%}", ""),
            (
                f"{short['rows']} rows of 4M, {args.short_documents:,} documents of 12 tokens: seconds",
                f"{short['seconds']:.1f}",
                "",
            ),
            ("their peak memory", f"{short['peak_gib']:.2f} GiB", "1 GiB"),
        ],
    )


# 2. Imbalance


def imbalance(args: argparse.Namespace) -> None:
    """60% of the tokens are in documents of at least 64K tokens, 40% in short ones, as in ProLong."""
    import numpy as np

    from torchtitan.config.data_schema import Data, Source
    from torchtitan.datasets import dealing
    from torchtitan.datasets.plan import Plan
    from torchtitan.models.work import training_flops

    ranks, per_rank = 8, 16
    random = np.random.default_rng(0)
    long = np.exp(random.uniform(np.log(65536), np.log(500_000), 2000)).astype(np.int64)
    short = np.exp(random.normal(6.6, 1.2, 200_000)).clip(30, 60_000).astype(np.int64)
    data = Data(sources=(Source("long", "long", 0.6), Source("short", "short", 0.4)))
    corpora = [lengths_only("long", long), lengths_only("short", short)]
    plan = Plan(data, corpora, ROW, rows_per_step=ranks * per_rank, steps=args.steps, seed=0)
    # Llama 3.1 8B: its parameters in matrix products; 32 layers of 32 heads of 128
    linear, pair = training_flops(7_504_924_672, ROW, 0, 0), training_flops(0, 0, 32 * 32 * 128, 1)

    rows = [("work of the busiest rank / mean", "as they come", "dealt", "dealt, worst step")]
    for what, per_row in (("attention alone", 0.0), ("attention and linear layers", linear)):
        before, after = [], []
        for step in range(plan.steps):
            work = plan.work(step) * pair + per_row
            before.append(dealing.imbalance(work, dealing.undealt(len(work), ranks, 1)))
            after.append(dealing.imbalance(work, dealing.deal(plan.work(step), ranks, 1)))
        columns = zip(np.mean(before, axis=0), np.mean(after, axis=0), np.max(after, axis=0))
        for where, values in zip(("over the step", "in lock-step micro-batches"), columns):
            rows.append((f"{what}, {where}", *(f"{value:.3f}" for value in values)))
    table(
        f"Work of an 8B model (FLOPs that the mask allows) over {ranks} data-parallel ranks, {ROW:,}-token rows, "
        f"{per_rank} per rank and step, 60% long and 40% short documents, mean of {args.steps} steps:",
        rows,
    )


# 3. Packing


def split_readings(plan: Plan) -> tuple[int, int]:
    """(how many times a document that fits in a row is read, how many of these in several parts or cut off)."""
    import numpy as np

    t = plan.table
    most = max(map(len, plan.corpora))
    reading = (t.source.astype(np.int64) * (int(t.epoch.max()) + 1) + t.epoch) * most + t.document
    whole = np.concatenate([corpus.lengths for corpus in plan.corpora])
    first = np.cumsum([0, *map(len, plan.corpora)])
    length = whole[first[t.source] + t.document]
    fits = length <= plan.seq_len
    readings = np.unique(reading[fits])
    split = np.unique(reading[fits & (t.length < length)])
    return len(readings), len(split)


def packing(args: argparse.Namespace) -> None:
    import numpy as np

    from torchtitan.config.data_schema import Data, Source
    from torchtitan.datasets.plan import Plan

    row, rows_per_step = 32768, 16
    random = np.random.default_rng(0)
    corpora = []
    for name, (mean, deviation, share, _) in DOMAINS.items():
        count = max(2, int(args.packing_documents * share))
        lengths = np.exp(random.normal(mean, deviation, count)).clip(100, 500_000).astype(np.int64)
        lengths[:2] = 100, 500_000
        corpora.append(lengths_only(name, lengths))
    sources = tuple(Source(name, name, values[3]) for name, values in DOMAINS.items())
    steps = max(1, sum(corpus.tokens for corpus in corpora) // (row * rows_per_step))
    rows = [("packing", "padding", "readings of documents that fit in a row", "of these split")]
    for how in ("best_fit", "concat"):
        plan = Plan(Data(sources=sources, packing=how), corpora, row, rows_per_step, steps, seed=0)
        filled = sum(plan.tokens_in_step(step) for step in range(steps))
        readings, split = split_readings(plan)
        padding = 1 - filled / (steps * rows_per_step * row)
        rows.append((how, f"{padding:.3%}", f"{readings:,}", f"{split:,} ({split / readings:.1%})"))
    table(
        f"Packing {sum(map(len, corpora)):,} documents of 100 to 500,000 tokens in {len(DOMAINS)} weighted domains "
        f"into {steps * rows_per_step:,} rows of {row:,} (as many tokens as the documents have):",
        rows,
    )


# 4. Reading


def write_corpus(folder: Path, tokens: int) -> None:
    """At least `tokens` tokens, in the format of datasets' save_to_disk: input_ids, list<int32>."""
    import datasets
    import numpy as np
    import pyarrow as pa

    random = np.random.default_rng(0)
    mean, deviation = STAGE_SOURCES["web"][:2]
    count = int(tokens / np.exp(mean + deviation**2 / 2) * 1.2) + 100
    lengths = np.exp(random.normal(mean, deviation, count)).clip(16, ROW).astype(np.int64)
    lengths = lengths[: int(np.searchsorted(np.cumsum(lengths), tokens)) + 1]
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    values = random.integers(0, 128_256, offsets[-1], dtype=np.int32)
    column = pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))
    datasets.disable_progress_bars()
    datasets.Dataset(pa.table({"input_ids": column})).save_to_disk(str(folder))


def plain_rows(documents: Iterable[dict[str, list[int]]], seq_len: int) -> Iterator[tuple[torch.Tensor, ...]]:
    """Tokens, labels and positions int64[seq_len], document ends int32[D], as a plain-Python packing makes them.

    Lists are concatenated and cut every seq_len tokens. Like this project's rows: a label is the next token of the same
    document, -100 at its end and where a row cuts it; positions begin at 0 in each document and each row.
    """
    import torch

    tokens: list[int] = []
    labels: list[int] = []
    positions: list[int] = []
    ends: list[int] = [0]
    for document in documents:
        ids = document["input_ids"]
        while ids:
            piece, ids = ids[: seq_len - len(tokens)], ids[seq_len - len(tokens) :]
            tokens += piece
            labels += piece[1:]
            labels.append(-100)
            positions += range(len(piece))
            ends.append(len(tokens))
            if len(tokens) == seq_len:
                yield (*map(torch.tensor, (tokens, labels, positions)), torch.tensor(ends, dtype=torch.int32))
                tokens, labels, positions, ends = [], [], [], [0]


def plain_loader(folder: Path, seq_len: int, workers: int) -> Iterable[Any]:
    """plain_rows of a folder, in `workers` DataLoader workers."""
    from datasets import load_from_disk
    from torch.utils.data import DataLoader, IterableDataset

    class PlainRows(IterableDataset):
        def __iter__(self) -> Iterator[tuple[torch.Tensor, ...]]:
            return plain_rows(load_from_disk(str(folder)), seq_len)

    context = "fork" if workers else None
    return DataLoader(PlainRows(), batch_size=None, num_workers=workers, multiprocessing_context=context)


def our_loader(folder: Path, seq_len: int, workers: int) -> Iterable[Any]:
    """A folder's tokens, except the tail, through build_loader, as a training rank reads them."""
    from torchtitan.config.data_schema import Data, Source
    from torchtitan.datasets.corpus import open_corpus
    from torchtitan.datasets.loader import build_loader
    from torchtitan.datasets.plan import Plan

    corpus = open_corpus(folder)
    steps = corpus.tokens // seq_len
    plan = Plan(Data(sources=(Source("corpus", str(folder)),)), [corpus], seq_len, rows_per_step=1, steps=steps, seed=0)
    loader = build_loader(plan, dp_rank=0, dp_degree=1, local_batch_size=1, num_workers=workers)
    return ((b.tokens, b.labels, b.positions, b.cu_seqlens) for b in loader)


def tokens_per_second(rows: Iterable[Any], seq_len: int, count: int) -> float:
    """Over at most `count` rows after the first, which waits for the worker to start; every token is read here."""
    iterator = iter(rows)
    next(iterator)
    start, got = time.perf_counter(), 0
    for row in itertools.islice(iterator, count):
        for tensor in row:
            tensor.sum()
        got += 1
    if not got:
        raise SystemExit("--tokens and --plain-tokens must each be at least two rows")
    return got * seq_len / (time.perf_counter() - start)


def reading(args: argparse.Namespace) -> None:
    import torch

    torch.set_num_threads(1)  # reading a row is little work: idle threads would take the worker's core
    plain_count = args.plain_tokens // args.row - 1
    our_count = args.tokens // args.row - 1
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        folder = Path(scratch) / "corpus"
        write_corpus(folder, args.tokens)
        for file in sorted(folder.glob("*.arrow")):  # into the page cache
            with file.open("rb") as opened:
                while opened.read(2**24):
                    pass
        rates: dict[tuple[str, int], list[float]] = {}
        for _, workers in itertools.product(range(args.turns), (1, 0)):
            ours = tokens_per_second(our_loader(folder, args.row, workers), args.row, our_count)
            plain = tokens_per_second(plain_loader(folder, args.row, workers), args.row, plain_count)
            rates.setdefault(("ours", workers), []).append(ours / 1e6)
            rates.setdefault(("plain", workers), []).append(plain / 1e6)
    rows = [("million tokens/s", "build_loader", "plain Python", "ratio", "target")]
    for workers, where, target in ((1, "one loader worker", "10"), (0, "in the training process", "")):
        ours, plain = (statistics.median(rates[side, workers]) for side in ("ours", "plain"))
        rows.append((where, f"{ours:.1f}", f"{plain:.2f}", f"{ours / plain:.1f}x", target))
    table(
        f"Reading rows of {args.row:,} from a warm page cache, local_batch_size 1, median of {args.turns} turns; "
        f"build_loader (best_fit, shuffled) {args.tokens / 1e6:g}M tokens per turn, the plain loop "
        f"{args.plain_tokens / 1e6:g}M:",
        rows,
    )
    print(
        "\nThe plain loop: load_from_disk, documents in their order as Python lists, concatenated and cut; labels,\n"
        "positions and document ends as lists too, torch.tensor of each for every row; in a DataLoader."
    )


def machine() -> str:
    """Date, cores, memory, load and versions, without which no figure can be read."""
    from importlib.metadata import version

    cpu = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    model = next((line.split(":", 1)[1].strip() for line in cpu.splitlines() if line.startswith("model name")), "CPU")
    gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "numpy", "datasets"))
    return (
        f"{time.strftime('%Y-%m-%d')}, {len(os.sched_getaffinity(0))} cores ({model}), {gib:.0f} GiB, "
        f"load {os.getloadavg()[0]:.1f}; Python {platform.python_version()}, {packages}"
    )


def whole(text: str) -> int:
    """20_000, 20000 or 2e4."""
    return int(float(text))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--documents", type=whole, default=10_000_000, help="planning: document lengths")
    parser.add_argument("--stage-tokens", type=whole, default=20_000_000_000, help="planning: tokens of the stage")
    parser.add_argument("--short-documents", type=whole, default=1_000_000, help="planning: documents of 12 tokens")
    parser.add_argument("--short-rows", type=whole, default=24, help="planning: rows of 4M tokens for these")
    parser.add_argument("--steps", type=whole, default=40, help="imbalance: steps")
    parser.add_argument("--packing-documents", type=whole, default=10_000, help="packing: documents")
    parser.add_argument("--tokens", type=whole, default=100_000_000, help="reading: tokens of the corpus on disk")
    parser.add_argument(
        "--plain-tokens", type=whole, default=10_000_000, help="reading: how many of them the plain loop reads"
    )
    parser.add_argument("--row", type=whole, default=ROW, help="reading: tokens per row")
    parser.add_argument("--turns", type=whole, default=3, help="reading: how many times each side is timed")
    parser.add_argument("--scratch", help="reading: folder for the corpus, deleted afterwards (default: the system's)")
    args = parser.parse_args()
    args.plain_tokens = min(args.plain_tokens, args.tokens)
    print(machine())
    functions = {"planning": planning, "imbalance": imbalance, "packing": packing, "reading": reading}
    for part in PARTS:  # planning first, while this process is small
        if part in args.parts:
            functions[part](args)


if __name__ == "__main__":
    main()
