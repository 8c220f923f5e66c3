"""Attention over segments, in several ways that must agree.

A backend has two functions: prepare(segments) makes, on the host and once per micro-batch, what it wants to know of the
mask; attend(q, k, v, prepared) -> output is called in every layer, with q [T, H, D], k and v [K, Hkv, D], H a multiple
of Hkv (query head h reads KV head h // (H / Hkv)), output [T, H, D] in q's dtype; logits are scaled by 1/sqrt(D).

flex: FlexAttention with a BlockMask made from offsets, for CUDA. varlen: torch.nn.attention.varlen, for CUDA. sdpa: one
call per segment, anywhere. dense: an explicit mask, the oracle of the tests.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from torchtitan.attention import flex, sdpa, varlen
from torchtitan.attention.segments import Segments
from torchtitan.tools.errors import UserError
from torchtitan.tools.movable import Movable


@dataclass(frozen=True)
class Backend:
    """How a mask is prepared and how attention is computed under it."""

    prepare: Callable[[Segments], Movable]
    """Gives flex.FlexMask, varlen.VarlenMask or the Segments themselves."""

    attend: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Any], torch.Tensor]
    """Its last argument is what this backend's prepare has returned."""


def dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: Segments) -> torch.Tensor:
    """Softmax over an explicit [T, K] mask, in float32 (or float64 for float64 input): the oracle of the tests."""
    repeat = q.shape[1] // k.shape[1]
    dtype = torch.promote_types(q.dtype, torch.float32)
    qh, kh, vh = (x.to(dtype).transpose(0, 1) for x in (q, k, v))
    kh, vh = (x.repeat_interleave(repeat, dim=0) for x in (kh, vh))
    scores = qh @ kh.transpose(1, 2) / q.shape[-1] ** 0.5
    scores = scores.masked_fill(~segments.dense_mask(q.device), float("-inf"))
    return (scores.softmax(-1) @ vh).transpose(0, 1).to(q.dtype)


BACKENDS: dict[str, Backend] = {
    "flex": Backend(flex.prepare, flex.attend),
    "varlen": Backend(varlen.prepare, varlen.attend),
    "sdpa": Backend(lambda segments: segments, sdpa.attend),
    "dense": Backend(lambda segments: segments, dense),
}


def choose_backend(name: str, device_type: str) -> str:
    """The backend that model.attention_backend names: `auto` is flex on CUDA and sdpa elsewhere.

    UserError for a backend that cannot train on the device.
    """
    if name == "auto":
        return "flex" if device_type == "cuda" else "sdpa"
    if device_type != "cuda" and name == "flex":
        raise UserError(
            'model.attention_backend = "flex" cannot train on a CPU: PyTorch\'s FlexAttention has no backward for it. '
            'Use "sdpa", or "auto", which is flex on CUDA and sdpa on the CPU.'
        )
    if device_type != "cuda" and name == "varlen":
        raise UserError(
            'model.attention_backend = "varlen" needs a CUDA device: PyTorch has no such kernel for the CPU. Use '
            '"sdpa", or "auto", which is flex on CUDA and sdpa on the CPU.'
        )
    return name


@dataclass(eq=False)
class Mask(Movable):
    """What the queries of a micro-batch see on this rank, in a layer of one kind.

    Not frozen: PyTorch 2.11 looks into a frozen dataclass when a compiled block hands it on, and would compile the
    block anew for other numbers of documents.
    """

    segments: Segments
    """Queries against the keys of a buffer: this rank's own, unless the mask has an exchange that fetches others
    (distributed/context_parallel/exchange.py)."""

    prepared: Movable
    """What the backend's prepare has made of the segments."""


Masks = dict[str, Mask]
"""By kind of layer, "full_attention" and "sliding_attention", for the kinds that the model has."""


class AttentionCore(Protocol):
    """What the attention layer calls between its projections."""

    backend: Backend

    def start(self, k: torch.Tensor, v: torch.Tensor, mask: Mask) -> Any: ...
    def finish(self, q: torch.Tensor, started: Any, mask: Mask) -> torch.Tensor: ...


class LocalAttention:
    """Attention if all keys are this rank's own. start() is called as soon as k and v exist, finish() when q does: a
    core that must fetch keys from other ranks (distributed/context_parallel) does so in between."""

    def __init__(self, backend: Backend):
        self.backend = backend

    def start(self, k: torch.Tensor, v: torch.Tensor, mask: Mask) -> Any:
        """k and v [T, Hkv, D] -> what finish takes as `started`."""
        return k, v

    # a Python loop over ragged segments, or compiled by itself: it must not be compiled anew for every length
    @torch.compiler.disable
    def finish(self, q: torch.Tensor, started: Any, mask: Mask) -> torch.Tensor:
        """q [T, H, D] -> [T, H, D]."""
        k, v = started
        return self.backend.attend(q, k, v, mask.prepared)
