"""What it costs to keep what a chain has read, in CPU seconds and bytes per checkpoint, and to plan the next stage.

    python scripts/benchmarks/read_so_far.py [--documents 10000000]

One source of documents of 50 to 500,000 tokens, planned best-fit in rows of 32K for 0.9 epochs, in one process. Made-up
lengths, no tokens: some 40 s and 1.5 GiB for 10 million documents.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np

from torchtitan.config.data_schema import Data, Source
from torchtitan.datasets.corpus import Corpus
from torchtitan.datasets.plan import Plan
from torchtitan.datasets.read_so_far import ReadSoFar, from_file, read_until, to_bytes

ROW, ROWS_PER_STEP = 32768, 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=10_000_000)
    args = parser.parse_args()
    lengths = np.exp(np.random.default_rng(0).normal(7, 1.1, args.documents)).clip(50, 500_000).astype(np.int64)
    ends = np.concatenate([[0], np.cumsum(lengths)])
    corpus = Corpus("made-up", [(ends, np.zeros(0, np.int32))], "made-up", None)
    data = Data(sources=(Source("source", "path"),))
    steps = int(0.9 * ends[-1]) // (ROW * ROWS_PER_STEP)
    with tempfile.TemporaryDirectory() as scratch:
        plan = Plan(data, [corpus], ROW, ROWS_PER_STEP, steps, seed=0, cache=Path(scratch))
        print(f"{args.documents:,} documents, {ends[-1] / 1e9:.1f}B tokens, {steps:,} steps")
        for step in (steps // 10, steps // 2, steps):
            start = time.process_time()
            content = to_bytes(read_until(ReadSoFar(), plan, step))
            saved = time.process_time()
            (Path(scratch) / "data_read.npz").write_bytes(content)
            read = from_file(Path(scratch) / "data_read.npz").now(corpus)
            loaded = time.process_time()
            print(
                f"step {step:,}: {len(content):,} bytes; {saved - start:.2f} s to make, {loaded - saved:.2f} s to read"
            )
        start = time.process_time()
        Plan(data, [corpus], 4 * ROW, ROWS_PER_STEP // 4, steps=steps // 20, seed=1, read=[read])
        print(f"the next stage, of {steps // 20:,} steps, is planned in {time.process_time() - start:.1f} CPU seconds")


if __name__ == "__main__":
    main()
