"""From segments to FlexAttention's BlockMask, in time proportional to the number of blocks.

PyTorch's create_block_mask evaluates the mask for all T x K pairs; here the blocks that a mask touches are derived from
the ends of its segments. `block_ranges` does that on the host, in a loader process, and returns small tensors that
travel with the batch; `block_mask` expands them on the device, without waiting for it. Both directions are built: the
key blocks of each query block for the forward pass, the query blocks of each key block for the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.attention.flex_attention import BlockMask

from torchtitan.attention.segments import Segments
from torchtitan.tools.constants import BLOCK
from torchtitan.tools.movable import Movable


@dataclass(frozen=True, eq=False)
class BlockLists(Movable):
    """For each of R rows (blocks of one side) an increasing list of columns (blocks of the other), as runs of columns.

    The differences of a list are mostly ones: c, 1, 1, ... and another number at the start of each run of consecutive
    columns. Only the latter are kept.
    """

    counts: torch.Tensor
    """int32[R]: columns in each row's list."""

    jumps: torch.Tensor
    """int64[2, N]: place in the flat [R, width] table of differences, and the difference, for each of N runs."""

    width: int
    """Columns in the longest list, at least 1."""

    columns: int
    """C, the number of all columns."""

    def expand(self) -> torch.Tensor:
        """int32[R, C] on the tensors' device: each row's list, followed by any valid columns."""
        rows = self.counts.shape[0]
        # In most masks the lists are short compared with C: the sums run over the width of the longest one only.
        table = torch.ones(rows, self.width, dtype=torch.int32, device=self.counts.device)
        table.view(-1)[self.jumps[0]] = self.jumps[1].to(torch.int32)
        lists = table.cumsum(1, dtype=torch.int32).clamp_(max=self.columns - 1)
        if self.width == self.columns:
            return lists
        if lists.is_cpu:  # the operating system's zeros: unlike torch.zeros they cost nothing until they are written
            out = torch.from_numpy(np.zeros((rows, self.columns), dtype=np.int32))
        else:
            out = torch.zeros(rows, self.columns, dtype=torch.int32, device=lists.device)
        out[:, : self.width] = lists
        return out


@dataclass(frozen=True, eq=False)
class BlockRanges(Movable):
    """A mask over T queries and K keys: exactly, by query, and as blocks that are seen in part or in full."""

    first: torch.Tensor
    """int32[T]: first key of the query's range."""

    last: torch.Tensor
    """int32[T]: last key of the query's range."""

    anchor: torch.Tensor
    """int32[T]: one more key, before the range, or -1."""

    num_keys: int
    """K."""

    partial: BlockLists
    """For each query block the key blocks that it sees in part."""

    full: BlockLists
    """For each query block the key blocks of which each of its queries sees every key."""

    partial_queries: BlockLists
    """`partial` the other way around: for each key block its query blocks."""

    full_queries: BlockLists
    """`full` the other way around."""


def block_ranges(segments: Segments) -> BlockRanges:
    """The blocks that a mask touches, on the host.

    As in create_block_mask, a block is seen in full only if it has all its 128 queries and 128 keys.
    """
    first, last, anchor = segments.key_ranges()
    # An anchor right before the range becomes its first key. After that no query needs its anchor to see a whole block.
    joined = (anchor >= 0) & (anchor == first - 1)
    first, anchor = np.where(joined, anchor, first), np.where(joined, -1, anchor)

    total = segments.total
    query_blocks, key_blocks = -(-total // BLOCK), -(-segments.num_keys // BLOCK)
    # A piece is one segment's queries in one block. Within it `first` and `last` do not fall, the ranges of successive
    # queries touch, and a query has an anchor if the previous one has: the ends of a piece tell everything.
    begins = np.union1d(segments.cu_seqlens[:-1], np.arange(0, total, BLOCK))
    ends = np.append(begins[1:], total) - 1
    block_of_piece = begins // BLOCK
    piece_of_block = np.searchsorted(begins, np.arange(0, total, BLOCK))

    # The keys that all queries of a block see are one range, which lies within the range of each piece.
    full_start = -(-np.maximum.reduceat(first[ends], piece_of_block) // BLOCK)
    full_stop = (np.minimum.reduceat(last[begins], piece_of_block) + 1) // BLOCK
    has_full = full_stop > full_start
    if total % BLOCK:
        has_full[-1] = False
    blocks = np.flatnonzero(has_full)
    full = _runs_to_lists(blocks, full_start[blocks], full_stop[blocks], query_blocks, key_blocks)

    # What else is touched: of each piece what lies left and right of the full blocks (all, if there are none), and the
    # anchors.
    start, stop = first[begins] // BLOCK, last[ends] // BLOCK + 1
    some = has_full[block_of_piece]
    anchored = anchor[ends] >= 0
    touched_block = np.concatenate([block_of_piece, block_of_piece[some], block_of_piece[anchored]])
    touched_start = np.concatenate([start, full_stop[block_of_piece][some], anchor[ends][anchored] // BLOCK])
    touched_stop = np.concatenate(
        [np.where(some, full_start[block_of_piece], stop), stop[some], anchor[ends][anchored] // BLOCK + 1]
    )
    block, start, stop = _union(touched_block, touched_start, touched_stop, key_blocks)
    partial = _runs_to_lists(block, start, stop, query_blocks, key_blocks)

    partial_queries = _runs_to_lists(*_transpose_any(block, start, stop), key_blocks, query_blocks)
    by_key = _transpose_single(blocks, full_start[blocks], full_stop[blocks], key_blocks)
    full_queries = _runs_to_lists(*by_key, key_blocks, query_blocks)
    first, last, anchor = (x.astype(np.int32) for x in (first, last, anchor))
    rows = torch.from_numpy(first), torch.from_numpy(last), torch.from_numpy(anchor)
    return BlockRanges(*rows, segments.num_keys, partial, full, partial_queries, full_queries)


def block_mask(ranges: BlockRanges) -> BlockMask:
    """The BlockMask on the tensors' device, equal to that of create_block_mask."""
    return assemble(ranges.first, ranges.last, ranges.anchor, ranges.num_keys, expand_tables(ranges))


def expand_tables(ranges: BlockRanges) -> list[torch.Tensor]:
    """Eight int32 tables on the tensors' device: counts and indices of the partial and of the full key blocks, then the
    same of query blocks.

    Counts are [1, 1, R] and indices [1, 1, R, C], for R query blocks and C key blocks or the other way around. No value
    is read from the device.
    """
    tables = []
    for lists in (ranges.partial, ranges.full, ranges.partial_queries, ranges.full_queries):
        tables += [lists.counts[None, None], lists.expand()[None, None]]
    return tables


def assemble(
    first: torch.Tensor, last: torch.Tensor, anchor: torch.Tensor, num_keys: int, tables: Sequence[torch.Tensor]
) -> BlockMask:
    """A BlockMask of int32[T] ranges, a number of keys and the tables of expand_tables; also in compiled functions."""
    return BlockMask(
        (first.shape[0], num_keys),
        kv_num_blocks=tables[0],
        kv_indices=tables[1],
        full_kv_num_blocks=tables[2],
        full_kv_indices=tables[3],
        q_num_blocks=tables[4],
        q_indices=tables[5],
        full_q_num_blocks=tables[6],
        full_q_indices=tables[7],
        BLOCK_SIZE=(BLOCK, BLOCK),
        mask_mod=mask_of_ranges(first, last, anchor),
    )


def mask_of_ranges(
    first: torch.Tensor, last: torch.Tensor, anchor: torch.Tensor
) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]:
    """FlexAttention's mask_mod(batch, head, query, key) of int32[T] tensors; evaluated in partial blocks only."""

    def mask_mod(b: torch.Tensor, h: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return ((key >= first[query]) & (key <= last[query])) | (key == anchor[query])

    return mask_mod


def _union(
    row: np.ndarray, start: np.ndarray, stop: np.ndarray, columns: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The runs of columns [start, stop) of each row, in any order and overlapping, as ordered and separate runs."""
    keep = stop > start
    row, start, stop = row[keep], start[keep], stop[keep]
    stride = columns + 1  # all rows on one line, with a gap between them that no run bridges
    order = np.argsort(row * stride + start, kind="stable")
    start, stop = (row * stride + start)[order], (row * stride + stop)[order]
    reach = np.maximum.accumulate(stop)
    opens = np.append(True, start[1:] > reach[:-1])[: len(start)]
    closes = np.append(opens[1:], True)[: len(start)]
    row = start[opens] // stride
    return row, start[opens] - row * stride, reach[closes] - row * stride


def _transpose_any(row: np.ndarray, start: np.ndarray, stop: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ordered runs of columns by row as runs of rows by column, one row each: for the few partial blocks."""
    lengths = stop - start
    rows = np.repeat(row, lengths)
    columns = np.arange(len(rows)) + np.repeat(start - (np.cumsum(lengths) - lengths), lengths)
    order = np.argsort(columns, kind="stable")
    return columns[order], rows[order], rows[order] + 1


def _transpose_single(
    row: np.ndarray, start: np.ndarray, stop: np.ndarray, columns: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One run of columns per row, for some ordered rows, as runs of rows by column.

    Its time grows with the number of runs, not of the blocks in them: a long document's full blocks are a triangle.
    """
    if len(row) == 0:
        return row, row, row
    # As long as rows follow each other and neither end falls, the rows that hold a column are consecutive: from the row
    # whose `stop` passes it to the last before `start` passes it. These groups are put on one line to be searched.
    breaks = (np.diff(row) != 1) | (np.diff(start) < 0) | (np.diff(stop) < 0)
    group = np.append(0, np.cumsum(breaks))
    begins = np.append(0, np.flatnonzero(breaks) + 1)
    ends = np.append(begins[1:], len(row)) - 1
    widths = stop[ends] - start[begins]
    column = np.arange(widths.sum()) + np.repeat(start[begins] - (np.cumsum(widths) - widths), widths)
    shift = np.repeat(np.arange(len(begins)), widths) * (columns + 1)
    low = np.searchsorted(stop + group * (columns + 1), column + shift, side="right")
    high = np.searchsorted(start + group * (columns + 1), column + shift, side="right")
    held = np.flatnonzero(high > low)
    order = held[np.argsort(column[held], kind="stable")]
    return column[order], row[low[order]], row[high[order] - 1] + 1


def _runs_to_lists(row: np.ndarray, start: np.ndarray, stop: np.ndarray, rows: int, columns: int) -> BlockLists:
    """Runs of columns [start, stop), ordered by row and then column, as lists of columns."""
    lengths = stop - start
    before = np.cumsum(lengths) - lengths
    counts = np.bincount(row, weights=lengths, minlength=rows).astype(np.int64)
    width = max(1, int(counts.max()))
    opens = np.append(True, row[1:] != row[:-1])[: len(row)]
    offset = before - (np.cumsum(counts) - counts)[row]
    # A row's first difference counts from 0, that of a later run from the last column of the previous run.
    difference = start - np.where(opens, 0, np.append(0, stop[:-1])[: len(row)] - 1)
    return BlockLists(
        torch.from_numpy(counts.astype(np.int32)),
        torch.from_numpy(np.stack([row * width + offset, difference]).astype(np.int64)),
        width,
        columns,
    )
