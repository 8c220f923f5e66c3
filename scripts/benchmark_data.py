"""The data room in figures: planning, packing, dealing and reading, beside a plain Hugging Face datasets loop.

    python scripts/benchmark_data.py                                        # some 3 minutes
    python scripts/benchmark_data.py --documents 100000 --tokens 10000000   # a quicker look

Planning runs in a process of its own on one core (its memory is its own). Reading is from files that have just been
read once, so that the page cache is warm: tokens/s that one loader process delivers to the training process. The plain
loop is what a user writes first: it iterates over the same dataset folder, joins the lists, cuts rows of the same
length, makes labels and positions, and turns them into tensors. The figures to quote are those of one run.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from torchtitan.config.job_config import Data, Source
from torchtitan.datasets.corpus import Corpus, open_corpus
from torchtitan.datasets.dealing import deal, imbalance, undealt
from torchtitan.datasets.loader import build_loader
from torchtitan.datasets.mixture import build_streams
from torchtitan.datasets.plan import Plan
from torchtitan.datasets.row_table import build_table
from torchtitan.tools.flops import training_flops

ROW = 65536


def lognormal(
    mean: float, deviation: float, documents: int, seed: int, low: int = 30, high: int = 200_000
) -> np.ndarray:
    """Lengths int64[documents]; mean and deviation of their logarithm."""
    return np.exp(np.random.default_rng(seed).normal(mean, deviation, documents)).clip(low, high).astype(np.int64)


def corpus_of(lengths: np.ndarray) -> Corpus:
    """Lengths without tokens, for plans that are not read."""
    return Corpus("none", [(np.concatenate([[0], np.cumsum(lengths)]), np.zeros(0, np.int32))], "none", None)


def plan_one_core(documents: int, tokens: int) -> dict[str, float]:
    """Seconds and GiB to plan `tokens` of rows of 64K from so many documents in four sources."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    lengths = np.split(lognormal(6.9, 1.1, documents, 0), [documents * i // 10 for i in (4, 7, 9)])
    data = Data(sources=tuple(Source(str(i), str(i), w) for i, w in enumerate((0.4, 0.3, 0.2, 0.1))))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    streams, _ = build_streams(data, lengths, [0] * 4, ROW)
    table = build_table(streams, data, ROW, tokens // ROW, 0)
    return {
        "seconds": time.perf_counter() - start,
        "gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "gib_before": before / 2**20,
        "documents": documents,
        "corpus_tokens": float(sum(n.sum() for n in lengths)),
        "rows": len(table),
        "parts": len(table.length),
        "padding": 1 - float(table.length.sum(dtype=np.int64)) / (len(table) * ROW),
    }


def packing(documents: int) -> None:
    """Best-fit beside concat on documents of 100 to 500,000 tokens in four domains, rows of 32K."""
    seq_len, scale = 32768, documents / 10_000
    domains = {"books": (11.3, 0.8, 1000), "code": (9.0, 1.3, 2000), "web": (6.6, 1.1, 5000), "wiki": (6.0, 1.4, 2000)}
    lengths = [lognormal(m, d, int(n * scale), i, 100, 500_000) for i, (m, d, n) in enumerate(domains.values())]
    corpora = [corpus_of(n) for n in lengths]
    splits = {}
    for how in ("best_fit", "concat"):
        sources = tuple(Source(name, name, w) for name, w in zip(domains, (0.35, 0.25, 0.25, 0.15)))
        plan = Plan(Data(sources=sources, packing=how), corpora, seq_len, 16, 300, 0)  # type: ignore[arg-type]
        t = plan.table
        whole = np.concatenate(lengths)[np.cumsum([0, *map(len, lengths)])[t.source] + t.document]
        splits[how] = int(((whole <= seq_len) & (t.start + t.length < whole)).sum())
        padding = 1 - t.length.sum(dtype=np.int64) / (len(t) * seq_len)
        print(f"  {how:<9} {padding:8.4%} padding, {splits[how]:,} splits of documents that fit a row")
    if splits["concat"]:
        print(f"  splits fall by {1 - splits['best_fit'] / splits['concat']:.1%}")


def dealing(steps: int) -> None:
    """Work of the busiest of 8 ranks over the mean: Llama 3.1 8B, 16 rows of 64K a rank, 60% long documents."""
    long = np.exp(np.random.default_rng(0).uniform(math.log(65536), math.log(500_000), 2000)).astype(np.int64)
    data = Data(sources=(Source("long", "l", 0.6), Source("short", "s", 0.4)))
    corpora = [corpus_of(long), corpus_of(lognormal(6.6, 1.2, 200_000, 1, 30, 60_000))]
    plan = Plan(data, corpora, ROW, 128, steps, 0)
    # 7.5e9 parameters in matrix products, 32 layers of 32 heads of 128
    linear, pair = training_flops(7_504_924_672, ROW, 0, 0), training_flops(0, 0, 32 * 32 * 128, 1)
    found: dict[str, list[tuple[float, float]]] = {}
    for step in range(steps):
        pairs = plan.work(step)
        for when, rows in (("as they come", undealt(128, 8, 1)), ("dealt", deal(pairs, 8, 1))):
            found.setdefault(f"attention + linear, {when}", []).append(imbalance(pairs * pair + linear, rows))
            found.setdefault(f"attention alone, {when}", []).append(imbalance(pairs, rows))
    for name, values in sorted(found.items()):
        step_mean, micro_batch_mean = np.mean(values, axis=0)
        print(f"  {name:<36} {step_mean:.3f} over a step, {micro_batch_mean:.3f} meeting in every micro-batch")


def write_corpus(folder: Path, tokens: int) -> None:
    """Documents of some 3,000 tokens on average, as datasets' save_to_disk writes them."""
    import datasets

    datasets.disable_progress_bars()
    random = np.random.default_rng(0)

    def documents() -> Iterator[dict[str, np.ndarray]]:
        made = 0
        for length in lognormal(7.0, 1.4, tokens // 500, 2):
            if made >= tokens:
                return
            made += int(length)
            yield {"input_ids": random.integers(0, 128_000, length, dtype=np.int32)}

    features = datasets.Features({"input_ids": datasets.List(datasets.Value("int32"))})
    cache = str(folder.parent / "cache")
    datasets.Dataset.from_generator(documents, features=features, cache_dir=cache).save_to_disk(str(folder))


def read_ours(folder: Path, num_workers: int) -> float:
    """Tokens/s of one epoch or so of rows of 64K, through the loader, from the second batch on."""
    corpus = open_corpus(folder)
    for index in range(len(corpus)):  # warm
        corpus.document(index).max()
    steps = max(8, corpus.tokens // ROW)
    plan = Plan(Data(sources=(Source("a", "a"),)), [corpus], ROW, 1, steps, 0)
    batches = iter(build_loader(plan, 0, 1, 1, num_workers=num_workers))
    for _ in range(4):  # what was made while the worker started
        next(batches)
    start = time.perf_counter()
    tokens = sum(len(batch.tokens) for batch in batches)
    return tokens / (time.perf_counter() - start)


def read_plainly(folder: Path, most: int) -> float:
    """Tokens/s of the loop that a user writes first, over at most so many tokens."""
    import datasets

    dataset = datasets.load_from_disk(str(folder))
    made, tokens, labels, positions = 0, [], [], []
    start = time.perf_counter()
    for record in dataset:
        ids = record["input_ids"]
        tokens += ids
        labels += [*ids[1:], -100]
        positions += range(len(ids))
        while len(tokens) >= ROW:
            made += sum(len(torch.tensor(column[:ROW])) for column in (tokens, labels, positions)) // 3
            tokens, labels, positions = tokens[ROW:], labels[ROW:], positions[ROW:]
        if made >= most:
            break
    return made / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=10_000_000, help="documents of the planned stage")
    parser.add_argument("--plan-tokens", type=int, default=20_000_000_000, help="tokens of the planned stage")
    parser.add_argument("--packed-documents", type=int, default=10_000, help="documents that best-fit and concat pack")
    parser.add_argument("--steps", type=int, default=100, help="steps over which the ranks' work is averaged")
    parser.add_argument("--tokens", type=int, default=100_000_000, help="tokens of the corpus that is read")
    parser.add_argument("--plain-tokens", type=int, default=10_000_000, help="tokens that the plain loop reads")
    parser.add_argument("--only-plan", action="store_true", help=argparse.SUPPRESS)  # the process of its own
    args = parser.parse_args()
    if args.only_plan:
        print(json.dumps(plan_one_core(args.documents, args.plan_tokens)))
        return

    versions = f"python {platform.python_version()}, torch {torch.__version__}, numpy {np.__version__}"
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, {versions}")
    sizes = ["--documents", str(args.documents), "--plan-tokens", str(args.plan_tokens)]
    output = subprocess.run(
        [sys.executable, __file__, "--only-plan", *sizes], check=True, capture_output=True, text=True
    )
    p = json.loads(output.stdout)
    print(f"planning on one core: {p['rows'] * ROW:,} tokens of 64K rows from {p['documents']:,} documents")
    print(f"  {p['seconds']:.1f} s, {p['gib']:.2f} GiB peak ({p['gib_before']:.2f} before), {p['padding']:.4%} padding")
    print("packing documents of 100 to 500,000 tokens into rows of 32K:")
    packing(args.packed_documents)
    print("work of the busiest of 8 ranks over the mean, 8B model, 16 rows of 64K a rank, 60/40 mix:")
    dealing(args.steps)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "corpus"
        write_corpus(folder, args.tokens)
        print(f"reading {args.tokens:,} tokens from a warm cache into rows of 64K, tokens/s:")
        worker, here = read_ours(folder, 1), read_ours(folder, 0)
        plain = read_plainly(folder, args.plain_tokens)
    print(f"  one loader process          {worker:14,.0f}")
    print(f"  in the training process     {here:14,.0f}")
    print(f"  plain datasets loop         {plain:14,.0f}  (ours, one process: {worker / plain:.0f}x)")


if __name__ == "__main__":
    main()
