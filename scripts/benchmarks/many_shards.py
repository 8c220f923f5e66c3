"""Opens a stage of many sources of many shards and reads it at random: seconds, memory maps, open files, memory.

python scripts/benchmarks/many_shards.py --sources 32 --shards 2048
Each shard has a file of its own, as scripts/tokenize_corpus.py writes them.
"""

from __future__ import annotations

import argparse
import os
import resource
import tempfile
import time
from pathlib import Path

import numpy as np


def write_source(folder: Path, shards: int, documents: int, length: int) -> None:
    """A folder of save_to_disk in which each shard has `documents` documents of `length` tokens."""
    import json

    import pyarrow as pa

    folder.mkdir()
    names = [f"data-{i:05d}-of-{shards:05d}.arrow" for i in range(shards)]
    offsets = np.arange(documents + 1, dtype=np.int32) * length
    for number, name in enumerate(names):
        values = np.arange(number, number + documents * length, dtype=np.int32)
        batch = pa.record_batch([pa.ListArray.from_arrays(offsets, values)], ["input_ids"])
        with pa.OSFile(str(folder / name), "wb") as sink, pa.ipc.new_stream(sink, batch.schema) as writer:
            writer.write_batch(batch)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))


def main() -> None:
    """Write, open, read, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sources", type=int, default=32)
    parser.add_argument("--shards", type=int, default=2048, help="of each source")
    parser.add_argument("--documents", type=int, default=4, help="of each shard")
    parser.add_argument("--length", type=int, default=200, help="tokens of each document")
    parser.add_argument("--reads", type=int, default=200_000, help="documents that are read, in a random order")
    parser.add_argument("--scratch", help="folder for the corpora, deleted afterwards (default: the system's)")
    args = parser.parse_args()
    import pyarrow  # noqa: F401  (not a part of opening)

    from torchtitan.datasets.corpus import open_corpus

    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        folders = [Path(scratch) / f"source-{i}" for i in range(args.sources)]
        for folder in folders:
            write_source(folder, args.shards, args.documents, args.length)
        start = time.perf_counter()
        corpora = [open_corpus(folder) for folder in folders]
        opened = time.perf_counter() - start
        random = np.random.default_rng(0)
        where = zip(random.integers(0, len(corpora), args.reads), random.integers(0, len(corpora[0]), args.reads))
        places = [(int(source), int(document)) for source, document in where]
        start = time.perf_counter()
        tokens = sum(len(corpora[source].document(document)) for source, document in places)
        read = time.perf_counter() - start
        bound = Path("/proc/sys/vm/max_map_count").read_text().strip()
        maps = sum(scratch in line for line in Path("/proc/self/maps").read_text().splitlines())
        print(
            f"{args.sources} sources of {args.shards} shards: opened in {opened:.1f} s "
            f"({opened / args.sources / args.shards * 2048:.2f} s per 2,048 shards); {args.reads:,} documents of "
            f"{args.length} tokens read at random in {read:.1f} s ({tokens / read / 1e6:.1f} million tokens/s); then "
            f"{maps:,} shards are mapped (the system's bound is {bound} maps per process), "
            f"{len(os.listdir('/proc/self/fd'))} files open; peak memory "
            f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB"
        )


if __name__ == "__main__":
    main()
