"""FlexAttention over segments: compiled once, for all masks.

The mask is data: the compiled function takes the block tables and three numbers per query as tensors and makes the
BlockMask itself, so that neither another mask nor another number of keys is a reason to compile again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn.attention.flex_attention import flex_attention

from torchtitan.attention.block_mask import BlockRanges, assemble, block_ranges, expand_tables
from torchtitan.attention.segments import Segments
from torchtitan.tools.movable import Movable
from torchtitan.tools.torch_compat import mark_dynamic, visible_regions


@dataclass(frozen=True, eq=False)
class FlexMask(Movable):
    """A mask for FlexAttention; the first layer expands its tables, for all layers."""

    ranges: BlockRanges

    keys_vary: bool
    """See Segments."""

    @functools.cached_property
    def tables(self) -> list[torch.Tensor]:
        """Those that block_mask.assemble takes, on the device of the ranges."""
        return expand_tables(self.ranges)


def prepare(segments: Segments) -> FlexMask:
    """The mask's blocks, on the host; see block_mask.py."""
    return FlexMask(block_ranges(segments), segments.keys_vary or segments.num_keys != segments.total)


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, prepared: FlexMask, visible: bool = False
) -> torch.Tensor:
    """q [T, H, D], k and v [K, Hkv, D] on the mask's device; returns [T, H, D] in q's dtype.

    visible: selective recomputation sees the compiled kernels as one operator, whose results it can keep.

    With gradients on the CPU FlexAttention raises NotImplementedError. Tests that remove PyTorch's check get the
    uncompiled function on the CPU, which holds all T x K scores.
    """
    ranges, tables = prepared.ranges, prepared.tables
    q, k, v = (_addressable(x) for x in (q, k, v))
    # FlexAttention's shapes are [B, H, T, D]. The views are made here: inside, the template for CPUs loses them.
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    if prepared.keys_vary:
        # On a context-parallel rank, also if by chance K is T. Elsewhere K is T, a constant, and kernels for a length
        # that is known to be a multiple of the block are faster.
        key_blocks = [(tables[1], 3), (tables[3], 3), (tables[4], 2), (tables[5], 2), (tables[6], 2), (tables[7], 2)]
        mark_dynamic([(k, 2), (v, 2), *key_blocks])
    grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    attention = _attend if q.device.type == "cpu" and grad else compiled_attend(visible)
    return attention(q, k, v, ranges.first, ranges.last, ranges.anchor, *tables)[0].transpose(0, 1)


def _addressable(x: torch.Tensor) -> torch.Tensor:
    """x [T, H, D], copied if a head's first and last token are further apart in memory than FlexAttention's kernels
    count in 32 bits (PyTorch 2.11 to 2.13): so are keys and values in one buffer with 8 heads of 128 and 1M tokens."""
    if x.shape[0] * x.stride(0) < 2**31:
        return x
    return x.transpose(0, 1).contiguous().transpose(0, 1)


@functools.cache
def compiled_attend(visible: bool = False) -> Callable[..., torch.Tensor]:
    """The compiled function, made when it is first needed: a process without FlexAttention pays nothing."""
    return torch.compile(_attend, fullgraph=True, options=visible_regions() if visible else None)


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    first: torch.Tensor,
    last: torch.Tensor,
    anchor: torch.Tensor,
    *tables: torch.Tensor,
) -> torch.Tensor:
    """The function that is compiled: q [1, H, T, D], k, v [1, Hkv, K, D] and the mask as tensors -> [1, H, T, D]."""
    mask = assemble(first, last, anchor, k.shape[2], tables)
    out = flex_attention(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1])
    assert isinstance(out, torch.Tensor)  # a tuple only if log-sum-exps are asked for
    return out
