"""Which fields of a batch move to a device and which stay."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from torchtitan.tools.movable import Movable


@dataclass(frozen=True)
class Mask(Movable):
    table: torch.Tensor
    window: int | None = None


@dataclass(frozen=True)
class Batch(Movable):
    stay = ("source",)

    tokens: torch.Tensor
    source: torch.Tensor
    masks: dict[str, Mask]
    mask: Mask
    long: torch.Tensor | None = None
    count: int = 0


@dataclass(frozen=True)
class OnHost(Movable):
    ends: tuple[int, ...]


def test_tensors_move_also_of_inner_dataclasses_and_all_else_stays():
    mask = Mask(torch.ones(2), window=3)
    batch = Batch(torch.zeros(4), torch.ones(4), {"full_attention": mask}, mask, count=5)
    moved = batch.to("meta")
    assert moved.tokens.is_meta and moved.mask.table.is_meta and moved.masks["full_attention"].table.is_meta
    assert moved.source is batch.source and moved.long is None
    assert (moved.count, moved.mask.window, moved.masks["full_attention"].window) == (5, 3, 3)
    assert not batch.tokens.is_meta and not batch.mask.table.is_meta, "the original is as it was"


def test_a_dataclass_without_tensors_is_itself_anywhere():
    segments = OnHost((0, 4))
    assert segments.to("meta") is segments and segments.pin_memory() is segments
