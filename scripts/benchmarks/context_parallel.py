"""How evenly context-parallel layouts spread attention, and how many remote keys they need: from the masks alone.

    python scripts/benchmarks/context_parallel.py [--rows 65536 524288] [--json layouts.json]

For rows of 64K to 1M tokens on 8 and 64 ranks and six mixes of document lengths it prints, for each layout, the
imbalance of attention (largest over mean of the ranks' query-key pairs) and the keys that a rank must receive, as a
share of what all-gather brings; then whether each promised bound holds. Needs no accelerator and no process group. PTRR
is PyTorch's load balancer for FlexAttention under context parallelism.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from torchtitan.attention.segments import Segments
from torchtitan.distributed.context_parallel.exchange import kv_received
from torchtitan.distributed.context_parallel.layout import LAYOUTS, balanced, block_work
from torchtitan.tools.constants import BLOCK

ROWS = (1 << 16, 1 << 17, 1 << 19, 1 << 20)
DEGREES = (8, 64)
MEAN_SHORT = 1800


def _until_full(total: int, draw: Callable[[], float]) -> list[int]:
    """Lengths drawn until they fill `total` tokens, the last one cut to fit."""
    lengths: list[int] = []
    left = total
    while left:
        lengths.append(min(max(int(draw()), 1), left))
        left -= lengths[-1]
    return lengths


def _short(total: int, rng: np.random.Generator) -> list[int]:
    sigma = 1.0
    return _until_full(total, lambda: rng.lognormal(np.log(MEAN_SHORT) - sigma**2 / 2, sigma))


def _parts(total: int, shares: tuple[float, ...]) -> list[int]:
    ends = np.round(np.cumsum(shares) * total).astype(int)
    return np.diff(ends, prepend=0).tolist()


MIXES: dict[str, Callable[[int, np.random.Generator], list[int]]] = {
    "one document": lambda total, rng: [total],
    "8 equal": lambda total, rng: [total // 8] * 8,
    "all short": _short,
    "half long, half short": lambda total, rng: [total // 2, *_short(total - total // 2, rng)],
    "0.6 / 0.25 / 0.15": lambda total, rng: _parts(total, (0.6, 0.25, 0.15)),
    "log-uniform 1K-512K": lambda total, rng: _until_full(
        total, lambda: np.exp(rng.uniform(np.log(1 << 10), np.log(1 << 19)))
    ),
}
RANDOM = ("all short", "half long, half short", "log-uniform 1K-512K")


def mix_segments(mix: str, total: int, seed: int, window: int | None = None) -> Segments:
    """A row of `total` tokens of the mix, its documents in random order."""
    rng = np.random.default_rng([seed, total])
    lengths = MIXES[mix](total, rng)
    if mix in RANDOM:
        rng.shuffle(lengths)
    return Segments.whole(np.concatenate([[0], np.cumsum(lengths)]), window)


def tiles(segments: Segments) -> np.ndarray:
    """int64[T/128]: how many 128 x 128 tiles of each block's mask row a block-sparse kernel computes (not empty)."""
    # A block sees keys in every block from that of its first key to itself: the document that continues into the block
    # reaches back without a gap, and other documents begin inside the block.
    token = np.arange(0, segments.total, BLOCK)
    first_key = segments.cu_seqlens[np.searchsorted(segments.cu_seqlens, token, side="right") - 1]
    if segments.window is not None:
        first_key = np.maximum(first_key, token - segments.window + 1)
    return token // BLOCK - first_key // BLOCK + 1


def imbalance(work: np.ndarray, owner: np.ndarray, cp: int) -> float:
    """Largest over mean of the ranks' summed `work` [blocks]: 1 is even; cp means that cp - 1 ranks are idle."""
    total = np.bincount(owner, weights=work, minlength=cp)
    return float(total.max() / total.mean())


def ptrr(segments: Segments, cp: int) -> np.ndarray:
    """int16[T/128]: the assignment of PyTorch's _PTRRLoadBalancer: blocks in falling number of tiles, dealt to the
    ranks back and forth. That class needs a BlockMask, which create_block_mask cannot make for a million tokens."""
    order = np.argsort(-tiles(segments), kind="stable")
    turn, place = np.divmod(np.arange(len(order)), cp)
    owner = np.empty(len(order), np.int16)
    owner[order] = np.where(turn % 2 == 0, place, cp - 1 - place)
    return owner


def measure(row: int, cp: int, mix: str, seeds: int) -> dict[str, Any]:
    """Imbalance (worst over seeds) and keys received (mean over seeds and ranks) of each layout."""
    result: dict[str, Any] = {"row": row, "cp": cp, "mix": mix}
    all_gather = (cp - 1) / cp * row
    runs: list[dict[str, float]] = []
    for seed in range(seeds if mix in RANDOM else 1):
        segments = mix_segments(mix, row, seed)
        work = block_work(segments)
        run: dict[str, float] = {}
        for name, layout in {**LAYOUTS, "ptrr": ptrr}.items():
            began = time.perf_counter()
            owner = layout(segments, cp)
            if name == "balanced":
                run["balanced ms"] = 1e3 * (time.perf_counter() - began)
                run["balanced tiles"] = imbalance(tiles(segments), owner, cp)
            run[f"{name} imbalance"] = imbalance(work, owner, cp)
            run[f"{name} kv"] = float(kv_received(segments, owner, cp).mean()) / all_gather
        runs.append(run)
    for key in runs[0]:
        values = [run[key] for run in runs]
        result[key] = float(np.mean(values) if key.endswith("kv") else max(values))
    return result


def layout_time(total: int, documents: int, cp: int) -> float:
    """Milliseconds that `balanced` takes on a row of `documents` documents: the median of 9 runs."""
    rng = np.random.default_rng(0)
    cuts = np.sort(rng.choice(np.arange(1, total), documents - 1, replace=False))
    segments = Segments.whole(np.concatenate([[0], cuts, [total]]))
    times = []
    for _ in range(9):
        began = time.perf_counter()
        balanced(segments, cp)
        times.append(1e3 * (time.perf_counter() - began))
    return float(np.median(times))


def one_document_bound(cp: int) -> float:
    """The fewest keys received, as a share of all-gather's, for one document of N tokens, evenly spread.

    Let m_k be the k-th smallest of the ranks' highest positions (k = 1 to cp). k ranks hold k N / cp tokens, all below
    m_k, and their share k / cp of the work. Work there is at most that of m_k's top k N / cp tokens, so
    m_k >= N / 2 + k N / (2 cp). The sum of (m_k - N / cp), over all-gather's (cp - 1) N, is 3/4 for every cp.
    """
    return float(sum(0.5 + k / (2 * cp) - 1 / cp for k in range(1, cp + 1)) / (cp - 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=list(ROWS), help="tokens per row")
    parser.add_argument("--cp", type=int, nargs="+", default=list(DEGREES), help="context-parallel degrees")
    parser.add_argument("--seeds", type=int, default=5, help="how many rows are drawn from each random mix")
    parser.add_argument("--json", type=Path, help="also write all numbers to this file")
    args = parser.parse_args()

    names = ("contiguous", "headtail", "ptrr", "balanced")
    results: list[dict[str, Any]] = []
    print("imbalance of attention (max/mean, worst seed) | keys received (share of all-gather's)")
    print(f"{'mix':24}" + "".join(f"{name:>19}" for name in names) + f"{'tiles':>8}{'ms':>7}")
    for row in args.rows:
        for cp in args.cp:
            print(f"\n{row >> 10}K tokens, cp {cp}")
            group = [measure(row, cp, mix, args.seeds) for mix in MIXES]
            for r in group:
                cells = "".join(f"{r[f'{n} imbalance']:9.3f} |{r[f'{n} kv']:7.1%} " for n in names)
                print(f"{r['mix']:24}{cells}{r['balanced tiles']:8.3f}{r['balanced ms']:7.1f}")
            mean = "".join(f"{'':9} |{np.mean([r[f'{n} kv'] for r in group]):7.1%} " for n in names)
            print(f"{'mean':24}{mean}")
            results += group

    print()
    checks = verdicts(results)
    for check in checks:
        print(f"{'PASS' if check['holds'] else 'FAIL'}  {check['what']}: {check['value']:.3f} (bound {check['bound']})")
    if args.json:
        args.json.write_text(json.dumps({"results": results, "verdicts": checks}, indent=1) + "\n")


def verdicts(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each bound with its value and whether it holds; bounds whose rows were not measured are left out."""
    checks: list[dict[str, Any]] = []

    def check(what: str, value: float, bound: float) -> None:
        checks.append({"what": what, "value": value, "bound": bound, "holds": value <= bound})

    check("balanced, all rows: worst imbalance", max(r["balanced imbalance"] for r in results), 1.05)
    for row, cp in sorted({(r["row"], r["cp"]) for r in results}):
        group = {r["mix"]: r["balanced kv"] for r in results if (r["row"], r["cp"]) == (row, cp)}
        check(f"{row >> 10}K cp {cp}: mean of the mixes' keys received", float(np.mean(list(group.values()))), 0.5)
        if (row, cp) == (1 << 19, 8):
            check("512K cp 8, all short: keys received", group["all short"], 0.05)
        least = one_document_bound(cp)
        # a little more than `least`, since blocks are not divided
        check(f"{row >> 10}K cp {cp}, one document: keys received (at least {least:.3f})", group["one document"], 0.76)
    for cp in DEGREES:
        check(f"ms for a layout of 1M tokens, 2,000 documents, cp {cp}", layout_time(1 << 20, 2000, cp), 20)
    return checks


if __name__ == "__main__":
    main()
