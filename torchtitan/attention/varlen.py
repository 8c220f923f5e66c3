"""Attention over segments with FlashAttention's kernel for documents of unequal length, torch.nn.attention.varlen.

CUDA only, bfloat16 or float16. The kernel's segments are ours, causal from the bottom right, but its keys must lie one
segment after the other. If ours lie otherwise, as on a context-parallel rank, they are gathered first.
"""

from __future__ import annotations

import functools
import inspect
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn.attention.varlen import varlen_attn

from torchtitan.attention.segments import Segments
from torchtitan.tools.errors import UserError
from torchtitan.tools.movable import Movable


@dataclass(frozen=True, eq=False)
class VarlenMask(Movable):
    """Segments in the form of the kernel's arguments."""

    cu_queries: torch.Tensor
    """int32[S + 1]"""

    cu_keys: torch.Tensor
    """int32[S + 1]: ends of the segments' keys, packed."""

    max_queries: int
    """Queries of the longest segment."""

    max_keys: int
    """Keys of the segment that has most."""

    window: int | None
    """How many keys a query sees at most, its own included; None: all."""

    index: torch.Tensor | None
    """int64: where in the buffer the packed keys are; None if the buffer is already packed."""


def prepare(segments: Segments) -> VarlenMask:
    """The mask for the kernel. ValueError for an anchor, which config/checks.py refuses."""
    if segments.anchor is not None:
        raise ValueError("flash attention over ragged segments has no anchors")
    lengths, start, end = np.diff(segments.cu_seqlens), segments.k_start, segments.k_end
    if segments.window is not None:  # keys before the first query's window need not be gathered
        start = np.maximum(start, end - lengths - segments.window + 1)
    widths = end - start
    cu_keys = np.append(0, np.cumsum(widths))
    index = None
    if not (np.array_equal(start, cu_keys[:-1]) and cu_keys[-1] == segments.num_keys):
        index = torch.from_numpy(np.arange(cu_keys[-1]) + np.repeat(start - cu_keys[:-1], widths))
    return VarlenMask(
        torch.from_numpy(segments.cu_seqlens.astype(np.int32)),
        torch.from_numpy(cu_keys.astype(np.int32)),
        int(lengths.max()),
        int(widths.max()),
        segments.window,
        index,
    )


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, prepared: VarlenMask) -> torch.Tensor:
    """q [T, H, D], k and v [K, Hkv, D] in bfloat16 or float16 on the mask's device; returns [T, H, D].

    UserError for other dtypes, and if the installed PyTorch's kernel has no sliding window and the mask has one.
    """
    if q.dtype not in (torch.bfloat16, torch.float16):
        raise UserError(
            f'model.attention_backend = "varlen" computes in bfloat16 or float16 and was given {q.dtype}. Use '
            'training.mixed_precision_param = "bfloat16", or "flex" or "sdpa", which take float32 too.'
        )
    repeat = q.shape[1] // k.shape[1]
    options, expand = _options(prepared.window, repeat > 1)
    if prepared.index is not None:
        k, v = (x.index_select(0, prepared.index) for x in (k, v))
    if expand:
        k, v = (x.repeat_interleave(repeat, dim=1) for x in (k, v))
    ends = (prepared.cu_queries, prepared.cu_keys, prepared.max_queries, prepared.max_keys)
    out = varlen_attn(q, k, v, *ends, **options)
    assert isinstance(out, torch.Tensor)  # a tuple only with return_aux
    return out


def check_window(window: int) -> None:
    """UserError if the installed PyTorch's kernel has no sliding window."""
    _options(window, grouped=False)


@functools.cache
def _options(window: int | None, grouped: bool) -> tuple[dict[str, Any], bool]:
    """Keyword arguments for a causal mask and grouped KV heads, and whether we must repeat the KV heads.

    PyTorch's function has changed: 2.10 knew is_causal only, then window_size came, and later enable_gqa.
    """
    known = inspect.signature(varlen_attn).parameters
    options: dict[str, Any] = {}
    if "window_size" in known:
        options["window_size"] = (-1 if window is None else window - 1, 0)  # keys to the left of a query's own
    elif window is None:
        options["is_causal"] = True
    else:
        raise UserError(
            f"A sliding window of {window} keys needs a newer PyTorch than {torch.__version__}, whose varlen_attn has "
            'no window_size, or model.attention_backend = "flex" or "sdpa".'
        )
    if grouped and "enable_gqa" in known:
        options["enable_gqa"] = True
    return options, grouped and "enable_gqa" not in known
