"""Rows -> PackedBatch, in loader processes ahead of the training step.

A micro-batch is local_batch_size rows laid end to end as one stream. The order is a range of numbers, so it does not
depend on the workers, and a resumed run is the same loader with another start_step.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import Dataset
from torchdata.stateful_dataloader import StatefulDataLoader

from torchtitan.datasets.plan import Plan
from torchtitan.tools.errors import UserError

IGNORED_LABEL = -100
"""Label of a token that is not trained on; PyTorch's cross_entropy skips it."""


@dataclass(frozen=True)
class PackedBatch:
    """One micro-batch of T tokens in S segments."""

    tokens: torch.Tensor
    """int64[T]"""

    labels: torch.Tensor
    """int64[T]: the next token of the same segment; -100 at a segment's end, also where a row's end cuts a document
    (its next token is trained on nowhere: the piece that begins there has nothing before it)."""

    positions: torch.Tensor
    """int64[T]: from 0 in each segment."""

    cu_seqlens: torch.Tensor
    """int32[S + 1]: 0, then the end of each segment, the last one T. Segments do not cross rows."""

    source: torch.Tensor
    """int16[S]: the source of each segment."""

    def to(self, device: torch.device | str) -> PackedBatch:
        """On a device; asynchronous from pinned memory."""
        return PackedBatch(*(t.to(device, non_blocking=True) for t in self._tensors()))

    def pin_memory(self, device: torch.device | str | None = None) -> PackedBatch:
        """In pinned memory; called by the DataLoader, which passes a device in some versions."""
        return PackedBatch(*(t.pin_memory() for t in self._tensors()))

    @property
    def num_valid(self) -> int:
        """Labels that are trained on."""
        return int((self.labels != IGNORED_LABEL).sum())

    def _tensors(self) -> Iterator[torch.Tensor]:
        yield from (self.tokens, self.labels, self.positions, self.cu_seqlens, self.source)


class MicroBatches(Dataset[PackedBatch]):
    """Item j: micro-batch j of a rank, counted from the stage's beginning: step j // A, accumulation index j % A."""

    def __init__(self, plan: Plan, dp_rank: int, dp_degree: int, local_batch_size: int) -> None:
        rows = dp_degree * local_batch_size
        if plan.rows_per_step % rows:
            raise UserError(
                f"A step has {plan.rows_per_step} rows (training.global_batch_size, or global_batch_tokens / seq_len), "
                f"which training.local_batch_size * data-parallel degree = {local_batch_size} * {dp_degree} = {rows} "
                f"does not divide: the nearest that works are {plan.rows_per_step // rows * rows or rows} and "
                f"{(plan.rows_per_step // rows + 1) * rows}."
            )
        self.plan = plan
        self.dp_rank = dp_rank
        self.dp_degree = dp_degree
        self.local_batch_size = local_batch_size
        self.accumulation = plan.rows_per_step // rows

    def __len__(self) -> int:
        return self.plan.steps * self.accumulation

    def __getitem__(self, item: int) -> PackedBatch:
        step, index = divmod(item, self.accumulation)
        return pack(self.plan, step, self.slots(index))

    def slots(self, accumulation_index: int) -> list[int]:
        """Slots of this rank's micro-batch; over ranks and accumulation every slot of the step occurs once."""
        first = (accumulation_index * self.dp_degree + self.dp_rank) * self.local_batch_size
        return list(range(first, first + self.local_batch_size))


def pack(plan: Plan, step: int, slots: list[int]) -> PackedBatch:
    """The rows of the slots laid end to end."""
    rows = [plan.row(step, slot) for slot in slots]
    tokens = np.concatenate([plan.tokens(row) for row in rows])
    lengths = np.concatenate([row.pieces.stops - row.pieces.starts for row in rows])
    ends = np.cumsum(lengths)
    labels = np.append(tokens[1:], IGNORED_LABEL)
    labels[ends - 1] = IGNORED_LABEL
    positions = np.arange(len(tokens)) - np.repeat(ends - lengths, lengths)
    source = np.repeat(np.array([row.source for row in rows], np.int16), [len(row.pieces.starts) for row in rows])
    cu_seqlens = np.concatenate([[0], ends]).astype(np.int32)
    return PackedBatch(*(torch.from_numpy(a) for a in (tokens, labels, positions, cu_seqlens, source)))


def build_loader(
    plan: Plan,
    dp_rank: int,
    dp_degree: int,
    local_batch_size: int,
    start_step: int = 0,
    num_workers: int = 1,
    pin_memory: bool = False,
) -> StatefulDataLoader:
    """Iterates over a rank's micro-batches (PackedBatch) from start_step (finished steps) to the end of the plan."""
    dataset = MicroBatches(plan, dp_rank, dp_degree, local_batch_size)
    return StatefulDataLoader(
        dataset,
        batch_size=None,  # an item is a micro-batch already
        sampler=range(start_step * dataset.accumulation, len(dataset)),
        num_workers=num_workers,
        # Forked: the maps of the corpus are shared and nothing is imported again. Workers run numpy only.
        multiprocessing_context="fork" if num_workers else None,
        generator=torch.Generator(),  # the loader draws a seed for its workers; not from the training's generator
        pin_memory=pin_memory,
    )
