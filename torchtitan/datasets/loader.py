"""Rows -> PackedBatch, in loader processes ahead of the training step.

A micro-batch is local_batch_size rows laid end to end as one stream. The order is a range of numbers, so it does not
depend on the workers, and a resumed run is the same loader with another start_step.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset
from torchdata.stateful_dataloader import StatefulDataLoader

from torchtitan.datasets.batch import PADDING_SOURCE, PackedBatch
from torchtitan.datasets.dealing import deal
from torchtitan.datasets.plan import Plan
from torchtitan.datasets.positions import reset_positions, row_positions, sentence_ends
from torchtitan.datasets.row_table import cut_padding, is_short
from torchtitan.tools.constants import IGNORED_LABEL, STOP_SIGNALS


class MicroBatches(Dataset[Any]):
    """Item j: micro-batch j of a rank, counted from the stage's beginning: step j // A, accumulation index j % A.

    An item is a PackedBatch, or what `finish` makes of it: context parallelism takes a rank's part there. A step's rows
    must be a multiple of dp_degree * local_batch_size (config/checks.py says so to the user).
    """

    def __init__(
        self,
        plan: Plan,
        dp_rank: int,
        dp_degree: int,
        local_batch_size: int,
        finish: Callable[[PackedBatch], Any] | None = None,
    ) -> None:
        self.plan = plan
        self.dp_rank = dp_rank
        self.dp_degree = dp_degree
        self.local_batch_size = local_batch_size
        self.finish = finish
        self.accumulation = plan.rows_per_step // (dp_degree * local_batch_size)

    def __len__(self) -> int:
        return self.plan.steps * self.accumulation

    def __getitem__(self, item: int) -> Any:
        batch = micro_batch(self.plan, item // self.accumulation, self.slots(item))
        return self.finish(batch) if self.finish else batch

    def slots(self, item: int) -> list[int]:
        """The step's slots that make this item; over ranks and a step's items every slot occurs once."""
        step, index = divmod(item, self.accumulation)
        dealt = deal(self.plan.work(step), self.dp_degree, self.local_batch_size)
        return list(map(int, dealt[self.dp_rank, index]))


def micro_batch(plan: Plan, step: int, slots: list[int]) -> PackedBatch:
    """The rows of the slots laid end to end, each padded to seq_len."""
    total = len(slots) * plan.seq_len
    tokens = np.zeros(total, np.int64)
    trained = np.zeros(total, bool)  # padding is not
    positions = np.empty(total, np.int64)
    long = np.ones(total, bool)
    documents, segments, sources, anchors = [], [], [], []
    for begin, slot in zip(range(0, total, plan.seq_len), slots):
        row = plan.row(step, slot)
        read = plan.tokens(row)
        tokens[begin : begin + len(read)] = read
        trained[begin : begin + len(read)] = plan.trained(row)
        padding = cut_padding(plan.seq_len - len(read))
        documents += [row.lengths, padding]
        sources += [row.sources, np.full(len(padding), PADDING_SOURCE, np.int16)]
        short = is_short(row.lengths, plan.short_window)
        long[begin : begin + plan.seq_len] = not short
        inside = np.array([len(read)]) if plan.data.cross_document_attention and not short else row.lengths
        segments += [inside, padding]
        anchors += [np.full(len(inside), begin, np.int32), np.full(len(padding), -1, np.int32)]
        method = "reset" if short else plan.data.positions
        positions[begin : begin + len(read)] = _positions(plan, method, read, row.lengths, inside, step, slot)
        positions[begin + len(read) : begin + plan.seq_len] = reset_positions(padding)
    cu_documents = np.cumsum(np.concatenate([np.zeros(1, np.int64), *documents]))
    cu_seqlens = np.cumsum(np.concatenate([np.zeros(1, np.int64), *segments]))
    source = np.concatenate(sources)
    labels = np.append(np.where(trained, tokens, IGNORED_LABEL)[1:], IGNORED_LABEL)
    labels[cu_documents[1:] - 1] = IGNORED_LABEL
    return PackedBatch(
        tokens=torch.from_numpy(tokens),
        labels=torch.from_numpy(labels),
        positions=torch.from_numpy(positions),
        cu_seqlens=torch.from_numpy(cu_seqlens.astype(np.int32)),
        cu_documents=torch.from_numpy(cu_documents.astype(np.int32)),
        source=torch.from_numpy(source),
        long=None if plan.short_window is None else torch.from_numpy(long),
        anchor=torch.from_numpy(np.concatenate(anchors)) if plan.data.anchor_attention else None,
    )


def _positions(
    plan: Plan, method: str, tokens: np.ndarray, documents: np.ndarray, segments: np.ndarray, step: int, slot: int
) -> np.ndarray:
    placed = documents if method == "reset" else segments
    ends = sentence_ends(tokens, plan.sentence_end_ids) if method == "longrecipe" else None
    return row_positions(method, placed, plan.data.target_seq_len, (plan.seed, step, slot), ends)


def leave_signals(worker: int) -> None:
    """In a loader process: Slurm signals every process of a job step, but only the trainer decides to stop."""
    for stop_signal in STOP_SIGNALS:
        signal.signal(stop_signal, signal.SIG_IGN)


def build_loader(
    plan: Plan,
    dp_rank: int,
    dp_degree: int,
    local_batch_size: int,
    start_step: int = 0,
    num_workers: int = 1,
    pin_memory: bool = False,
    finish: Callable[[PackedBatch], Any] | None = None,
) -> StatefulDataLoader:
    """Iterates over a rank's micro-batches from start_step (finished steps) to the end of the plan.

    An item is a PackedBatch, or what `finish` makes of it in the loader process.
    """
    dataset = MicroBatches(plan, dp_rank, dp_degree, local_batch_size, finish)
    return StatefulDataLoader(
        dataset,
        batch_size=None,  # an item is a micro-batch already
        sampler=range(start_step * dataset.accumulation, len(dataset)),
        num_workers=num_workers,
        # Forked: the maps of the corpus are shared and nothing is imported again. Workers run numpy only.
        multiprocessing_context="fork" if num_workers else None,
        worker_init_fn=leave_signals,
        generator=torch.Generator(),  # the loader draws a seed for its workers; not from the training's generator
        pin_memory=pin_memory,
    )
