"""Time to make FlexAttention's BlockMask, with this package and with PyTorch's create_block_mask.

    python scripts/benchmarks/block_mask.py [--device cuda] [--no-pytorch] [--threads 2]

The stream holds 2,000 documents at 1M tokens and as many per token at the other lengths, or a single document. A rank
of 8 has two sixteenths of the stream as queries, one counted from each end (head-tail), and a buffer of all keys.
"device" is the copy to the device and the expansion there. create_block_mask is timed at 32K tokens without context
parallelism and without compilation: it holds all pairs at once, 10 GB. Times are medians. The CPU's peak memory is read
from Linux's /proc.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from torch.nn.attention.flex_attention import create_block_mask

from torchtitan.attention.block_mask import block_mask, block_ranges, mask_of_ranges
from torchtitan.attention.segments import Segments
from torchtitan.tools.constants import BLOCK

RANKS = 8


def documents(total: int, count: int) -> np.ndarray:
    """Ends of `count` documents of random lengths that sum to `total` tokens; the first is 0."""
    cuts = np.random.default_rng(0).choice(np.arange(1, total), count - 1, replace=False)
    return np.concatenate([[0], np.sort(cuts), [total]])


def head_tail(ends: np.ndarray, rank: int) -> Segments:
    """A rank's share: of the stream's 16 chunks it has numbers `rank` and 15 - rank as queries.

    A chunk's queries of a document see the document's keys up to the chunk's end, in a buffer of the whole stream.
    """
    total = int(ends[-1])
    chunk = total // (2 * RANKS)
    starts, stops, first_keys = [], [], []
    for number in (rank, 2 * RANKS - 1 - rank):
        low, high = number * chunk, (number + 1) * chunk
        inner = ends[(ends > low) & (ends < high)]
        cuts = np.concatenate([[low], inner, [high]])
        starts.append(cuts[:-1])
        stops.append(cuts[1:])
        first_keys.append(ends[np.searchsorted(ends, cuts[:-1], side="right") - 1])
    start, stop, first = (np.concatenate(x) for x in (starts, stops, first_keys))
    return Segments(np.append(0, np.cumsum(stop - start)), first, stop, total)


def median_ms(times: list[float]) -> str:
    return f"{1000 * statistics.median(times):8.1f} ms"


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def time_ours(segments: Segments, device: str, repeats: int) -> tuple[str, str]:
    """Medians: of the work on the host, and of the copy to the device with the expansion there."""
    host, expand = [], []
    for _ in range(repeats + 1):  # the first one warms up
        begin = time.perf_counter()
        ranges = block_ranges(segments)
        host.append(time.perf_counter() - begin)
        synchronize(device)
        begin = time.perf_counter()
        block_mask(ranges.to(device))
        synchronize(device)
        expand.append(time.perf_counter() - begin)
    return median_ms(host[1:]), median_ms(expand[1:])


def peak_gib(device: str) -> str:
    """Peak memory since reset_peak: the device's, or the process's resident memory."""
    if device.startswith("cuda"):
        return f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB"
    status = Path("/proc/self/status")
    if not status.exists():
        return "unknown"
    line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM"))
    return f"{int(line.split()[1]) / 2**20:.1f} GiB"


def reset_peak(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
    elif Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="where the mask is expanded: cpu or cuda")
    parser.add_argument("--repeats", type=int, default=9, help="how many times each is measured; the median is shown")
    parser.add_argument("--no-pytorch", action="store_true", help="skip create_block_mask, which takes 10 GB and 27 s")
    parser.add_argument(
        "--threads", type=int, default=1, help="CPU threads; on a busy machine, more threads wait longer"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    print(f"{'tokens':>9} {'documents':>9} {'queries':>8} {'layout':<18} {'host':>11} {'device':>11}")
    for total in (1 << 15, 1 << 17, 1 << 20):
        count = max(2, round(2000 * total / (1 << 20)))
        ends = documents(total, count)
        whole, one = Segments.whole(ends), np.array([0, total])
        for name, segments, number in (
            ("one rank", whole, count),
            (f"rank 3 of {RANKS}", head_tail(ends, 3), count),
            (f"rank 3 of {RANKS}", head_tail(one, 3), 1),
        ):
            host, device = time_ours(segments, options.device, options.repeats)
            print(f"{total:>9,} {number:>9,} {segments.total:>8,} {name:<18} {host} {device}", flush=True)

    if not options.no_pytorch:
        total = 1 << 15
        ranges = block_ranges(Segments.whole(documents(total, 62))).to(options.device)
        mask_mod = mask_of_ranges(ranges.first, ranges.last, ranges.anchor)
        reset_peak(options.device)
        begin = time.perf_counter()
        create_block_mask(mask_mod, None, None, total, total, device=options.device, BLOCK_SIZE=BLOCK)
        synchronize(options.device)
        seconds = time.perf_counter() - begin
        print(f"create_block_mask at {total:,} tokens, one rank: {seconds:.1f} s, peak {peak_gib(options.device)}")


if __name__ == "__main__":
    main()
