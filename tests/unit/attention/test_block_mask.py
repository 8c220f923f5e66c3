"""BlockMasks made from the ends of segments are those that PyTorch finds by evaluating every pair."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from torchtitan.attention.block_mask import block_mask, block_ranges
from torchtitan.attention.segments import Segments
from torchtitan.tools.constants import BLOCK

SIDES = ("kv", "full_kv", "q", "full_q")


def split(rng: np.random.Generator, total: int, parts: int) -> np.ndarray:
    """Ends of that many documents of at least a token: 0, ..., total."""
    return np.concatenate([[0], np.sort(rng.choice(np.arange(1, total), parts - 1, replace=False)), [total]])


def whole_documents(rng: np.random.Generator) -> Segments:
    total = int(rng.choice([BLOCK, 4 * BLOCK, 9 * BLOCK, int(rng.integers(2, 12 * BLOCK))]))
    parts = int(rng.choice([1, 2, 5, min(total, 60), total // 2 + 1]))
    return decorate(rng, Segments.whole(split(rng, total, min(parts, total - 1))))


def runs(rng: np.random.Generator) -> Segments:
    """Runs of queries whose keys lie anywhere in a buffer, overlapping others', as a context-parallel rank has them."""
    step = int(rng.choice([1, BLOCK // 2, BLOCK]))
    lengths = rng.integers(1, 1 + int(rng.choice([1, 4 * BLOCK // step])), int(rng.integers(1, 8))) * step
    num_keys = int(lengths.max()) + int(rng.integers(0, 14 * BLOCK))
    k_end = np.array([rng.integers(n, num_keys + 1) for n in lengths])
    if step == BLOCK and rng.random() < 0.5:  # aligned with the blocks, as they are in practice
        k_end = np.maximum(lengths, k_end // BLOCK * BLOCK)
    k_start = np.array([rng.integers(0, end - n + 1) for end, n in zip(k_end, lengths)])
    return decorate(rng, Segments(np.append(0, np.cumsum(lengths)), k_start, k_end, num_keys))


def decorate(rng: np.random.Generator, segments: Segments) -> Segments:
    """The same segments, some with a window, some of those with anchors."""
    window, anchor = None, None
    if rng.random() < 0.5:
        window = int(rng.choice([1, 7, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK, int(rng.integers(1, 9 * BLOCK))]))
        near = segments.k_start - rng.integers(0, 3, len(segments.k_start))
        far = np.array([rng.integers(-1, k + 1) for k in segments.k_start])
        anchor = rng.choice([None, 1, 2, 3])
        anchor = None if anchor is None else np.maximum([near, far, segments.k_start][anchor - 1], -1)
    if window is None and rng.random() < 0.3:
        anchor = np.array([rng.integers(-1, k + 1) for k in segments.k_start])
    return Segments(segments.cu_seqlens, segments.k_start, segments.k_end, segments.num_keys, window, anchor)


def lists(mask: BlockMask, side: str) -> list[list[int]]:
    counts, indices = getattr(mask, f"{side}_num_blocks"), getattr(mask, f"{side}_indices")
    assert counts.dtype == indices.dtype == torch.int32
    return [row[:n].tolist() for row, n in zip(indices[0, 0], counts[0, 0].tolist())]


def check(segments: Segments) -> None:
    ours = block_mask(block_ranges(segments))
    total, keys = segments.total, segments.num_keys
    theirs = create_block_mask(ours.mask_mod, None, None, total, keys, device="cpu")
    assert ours.shape == theirs.shape and ours.BLOCK_SIZE == theirs.BLOCK_SIZE
    for side in SIDES:
        assert getattr(ours, f"{side}_indices").shape == getattr(theirs, f"{side}_indices").shape
        assert lists(ours, side) == lists(theirs, side), side

    dense = segments.dense_mask()
    got = ours.mask_mod(torch.tensor(0), torch.tensor(0), torch.arange(total)[:, None], torch.arange(keys)[None])
    assert torch.equal(got, dense)
    rows, columns = -(-total // BLOCK), -(-keys // BLOCK)
    padded = torch.zeros(rows * BLOCK, columns * BLOCK, dtype=torch.bool)
    padded[:total, :keys] = dense
    touched = padded.view(rows, BLOCK, columns, BLOCK).any(3).any(1)
    assert torch.equal(ours.to_dense()[0, 0].bool(), touched)


@pytest.mark.parametrize("make", [whole_documents, runs])
def test_equals_create_block_mask(make):
    for seed in range(40):
        segments = make(np.random.default_rng(seed))
        try:
            check(segments)
        except AssertionError as error:
            raise AssertionError(f"{make.__name__}({seed}): {segments}") from error


def test_shortest_and_longest_documents():
    check(Segments.whole([0, 1]))
    check(Segments.whole(range(301)))
    check(Segments.whole([0, 8 * BLOCK]))
    check(Segments.whole([0, 8 * BLOCK], window=1))


def test_segments_in_a_block_whose_keys_are_apart():
    """The queries of one block see four separate ranges, the anchors' blocks among them."""
    k_end, lengths = np.array([1900, 700]), np.array([60, 68])
    check(Segments(np.append(0, np.cumsum(lengths)), np.array([1500, 400]), k_end, 2000, 100, np.array([900, 3])))


def test_an_anchor_can_complete_a_block():
    """All keys but a block's first are in the range; the anchor is that first one."""
    check(Segments(np.array([0, BLOCK]), np.array([BLOCK + 1]), np.array([4 * BLOCK]), 512, None, np.array([BLOCK])))


def test_ranges_can_be_sent_between_processes():
    segments = runs(np.random.default_rng(0))
    mask, copy = block_mask(block_ranges(segments)), block_mask(pickle.loads(pickle.dumps(block_ranges(segments))))
    assert all(lists(mask, side) == lists(copy, side) for side in SIDES)
    moved = block_ranges(segments).to("cpu")
    assert torch.equal(moved.first, block_ranges(segments).first) and moved.num_keys == segments.num_keys


def test_a_million_tokens_cost_no_more_than_their_blocks():
    """Keys of one 1M-token document, an eighth of its queries: the host's part is small, as would be sent to a GPU."""
    tokens, queries = 1 << 20, 1 << 17
    segments = Segments(np.array([0, queries]), np.array([0]), np.array([tokens]), tokens)
    ranges = block_ranges(segments)
    assert int(ranges.full.counts.sum()) == int(ranges.full_queries.counts.sum()) > 7_000_000
    assert ranges.full_queries.jumps.shape[1] <= tokens // BLOCK
