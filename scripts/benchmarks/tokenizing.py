"""Speed of tokenizing on this machine: tokenize_source beside Hugging Face `datasets` with the same tokenizer.

    python scripts/benchmarks/tokenizing.py                          # 100 MB of text; needs 1 GB under --scratch
    python scripts/benchmarks/tokenizing.py --megabytes 1 --turns 1  # a quick look

Both read the same .jsonl, use as many processes, and end with a folder of tokens on disk; they take turns, so that
other load on the machine slows both. `datasets` is used as its documentation does: load_dataset("json"), then
map(batched=True, num_proc=...) over the tokenizer's __call__, then save_to_disk; the map alone is timed too. The
folders are compared: the ids must be the same. The figure to quote is the ratio.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from data import machine, table, whole

REPOSITORY = Path(__file__).parents[2]

TEXT = ("README.md", "docs/*.md", "torchtitan/**/*.py")
"""Whose lines the documents are made of: English and code."""


def write_text(path: Path, size: int) -> None:
    """A .jsonl of about `size` bytes: random runs of this repository's lines, lognormal in length."""
    lines = [line for glob in TEXT for file in sorted(REPOSITORY.glob(glob)) for line in file.read_text().split("\n")]
    draw = random.Random(0)
    with path.open("w") as file:
        while file.tell() < size:
            count = min(len(lines), max(1, int(draw.lognormvariate(3.5, 1.2))))
            begin = draw.randrange(len(lines) - count + 1)
            document = "\n".join(lines[begin : begin + count])
            if document.strip():  # we leave blank ones out
                file.write(json.dumps({"text": document}) + "\n")


def time_ours(text: Path, assets: Path, scratch: Path, processes: int) -> tuple[float, Path]:
    """Seconds, and the corpus."""
    from torchtitan.config.data_schema import Data, Source
    from torchtitan.datasets.tokenizer import load_tokenizer
    from torchtitan.extensions.ingest.tokenize import tokenize_source

    tokenizer = load_tokenizer(assets)
    data = Data(folder=str(text.parent), cache_folder=str(scratch / "ours"), add_bos=False, add_eos=False)
    begin = time.perf_counter()
    folder = tokenize_source(Source(name="text", path=text.name), tokenizer, data, processes)
    return time.perf_counter() - begin, folder


def time_datasets(text: Path, assets: Path, scratch: Path, processes: int) -> tuple[float, float, Path]:
    """Seconds in all, seconds of map, and the folder."""
    import datasets
    from transformers import PreTrainedTokenizerFast

    datasets.disable_progress_bars()
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(assets / "tokenizer.json"))

    def encode(batch: dict[str, Any]) -> dict[str, Any]:
        # Text that spells a special token is text, as with us.
        ids = tokenizer(batch["text"], add_special_tokens=False, split_special_tokens=True)["input_ids"]
        return {"input_ids": ids}

    begin = time.perf_counter()
    loaded = datasets.load_dataset("json", data_files=str(text), split="train", cache_dir=str(scratch / "theirs"))
    before = time.perf_counter()
    mapped = loaded.map(encode, batched=True, num_proc=processes, remove_columns=loaded.column_names)
    seconds = time.perf_counter() - before
    mapped.save_to_disk(str(scratch / "saved"))
    return time.perf_counter() - begin, seconds, scratch / "saved"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=whole, default=100, help="of text")
    parser.add_argument("--assets", type=Path, default=REPOSITORY / "assets/tokenizer", help="folder of tokenizer.json")
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--turns", type=whole, default=3, help="how many times each side is timed")
    parser.add_argument("--scratch", help="folder for text and tokens, deleted afterwards (default: the system's)")
    args = parser.parse_args()
    print(machine())
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        text = Path(scratch) / "text.jsonl"
        write_text(text, args.megabytes * 10**6)
        rates: dict[str, list[float]] = {"ours": [], "datasets": [], "map": []}
        for turn in range(args.turns):
            folder = Path(scratch) / str(turn)
            folder.mkdir()
            ours, corpus = time_ours(text, args.assets, folder, args.processes)
            theirs, mapping, saved = time_datasets(text, args.assets, folder, args.processes)
            tokens, documents = compare(corpus, saved)
            for side, seconds in (("ours", ours), ("datasets", theirs), ("map", mapping)):
                rates[side].append(tokens / seconds / 1e6)
    median = {side: statistics.median(values) for side, values in rates.items()}
    table(
        f"Tokenizing {documents:,} documents, {tokens:,} tokens, {args.megabytes:,} MB of .jsonl, {args.processes} "
        f"processes, median of {args.turns} turns:",
        [
            ("from text to a folder of tokens", "million tokens/s", "ours over it"),
            ("tokenize_source", f"{median['ours']:.2f}", ""),
            (
                "load_dataset, map, save_to_disk",
                f"{median['datasets']:.2f}",
                f"{median['ours'] / median['datasets']:.2f}x",
            ),
            ("its map alone", f"{median['map']:.2f}", f"{median['ours'] / median['map']:.2f}x"),
        ],
    )


def compare(corpus: Path, saved: Path) -> tuple[int, int]:
    """Tokens and documents; AssertionError unless both folders hold the same ids."""
    import numpy as np

    from torchtitan.datasets.corpus import open_corpus

    ours, theirs = open_corpus(corpus), open_corpus(saved)
    assert np.array_equal(ours.lengths, theirs.lengths), "the documents have other lengths"
    for index in range(0, len(ours), max(1, len(ours) // 10_000)):
        assert np.array_equal(ours.document(index), theirs.document(index)), f"document {index} differs"
    return ours.tokens, len(ours)


if __name__ == "__main__":
    main()
