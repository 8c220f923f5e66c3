"""PackedBatch against a slow oracle, and the same rows at the same step for every layout, worker count and restart."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import torch

from torchtitan.attention.segments import Segments
from torchtitan.config.data_schema import Data, Source
from torchtitan.datasets.batch import PADDING_SOURCE, PackedBatch
from torchtitan.datasets.corpus import Corpus
from torchtitan.datasets.loader import MicroBatches, build_loader, micro_batch
from torchtitan.datasets.plan import Plan
from torchtitan.datasets.row_table import PADDING_SEGMENT
from torchtitan.tools.constants import IGNORED_LABEL

SEQ_LEN = 24
ROWS = 8
FIELDS = [f.name for f in fields(PackedBatch) if f.name not in ("long", "anchor")]  # those have tests of their own


def make_plan(
    seq_len: int = SEQ_LEN,
    sentence_end_ids: tuple[int, ...] = (),
    steps: int = 6,
    short_window: int | None = None,
    **options: Any,
) -> Plan:
    """Long and short documents; no token occurs twice and none is 0."""
    random = np.random.default_rng(0)
    corpora, first = [], 1
    for name, lengths in (("long", random.integers(20, 200, 30)), ("short", random.integers(1, 12, 90))):
        ends = np.concatenate([[0], np.cumsum(lengths)])
        corpora.append(Corpus(name, [(ends, np.arange(first, first + ends[-1], dtype=np.int32))], name, None))
        first += int(ends[-1])
    data = Data(sources=(Source("long", "l", 0.6), Source("short", "s", 0.4)), **options)
    return Plan(data, corpora, seq_len, ROWS, steps, 5, sentence_end_ids=sentence_end_ids, short_window=short_window)


@pytest.fixture
def plan() -> Plan:
    return make_plan()


def oracle(plan: Plan, step: int, slots: list[int]) -> dict[str, list[int]]:
    """A batch token by token from the documents themselves."""
    made: dict[str, list[int]] = {name: [] for name in FIELDS}
    made["cu_documents"], made["cu_seqlens"] = [0], [0]
    cross = plan.data.cross_document_attention
    for slot in slots:
        row = plan.row(step, slot)
        begin = len(made["tokens"])
        for source, d, start, n in zip(row.sources, row.documents, row.starts, row.lengths):
            document = plan.corpora[source].document(int(d)).tolist()
            for t in range(start, start + n):
                made["labels"].append(document[t + 1] if t + 1 < start + n else IGNORED_LABEL)
                made["positions"].append(
                    len(made["tokens"]) - begin if plan.data.positions == "continue" else t - start
                )
                made["tokens"].append(document[t])
            made["cu_documents"].append(len(made["tokens"]))
            made["source"].append(source)
            if not cross:
                made["cu_seqlens"].append(len(made["tokens"]))
        if cross:
            made["cu_seqlens"].append(len(made["tokens"]))
        while len(made["tokens"]) < begin + plan.seq_len:
            run = min(PADDING_SEGMENT, begin + plan.seq_len - len(made["tokens"]))
            made["tokens"] += [0] * run
            made["labels"] += [IGNORED_LABEL] * run
            made["positions"] += range(run)
            made["cu_documents"].append(len(made["tokens"]))
            made["cu_seqlens"].append(len(made["tokens"]))
            made["source"].append(PADDING_SOURCE)
    return made


OPTIONS: dict[str, dict[str, Any]] = {
    "best_fit": {},
    "concat": {"packing": "concat"},
    "single": {"packing": "single", "seq_len": 2500},
    "cross": {"cross_document_attention": True},
    "continue": {"positions": "continue"},
    "cross, continue, concat": {"cross_document_attention": True, "positions": "continue", "packing": "concat"},
    "cross, single": {"cross_document_attention": True, "packing": "single"},
}


@pytest.mark.parametrize("slots", [[0], [3, 4], list(range(ROWS))])
@pytest.mark.parametrize("name", OPTIONS)
def test_batch_is_the_oracles(name: str, slots: list[int]) -> None:
    plan = make_plan(**OPTIONS[name])
    types = dict.fromkeys(FIELDS, torch.int32) | dict.fromkeys(("tokens", "labels", "positions"), torch.int64)
    types["source"] = torch.int16
    for step in range(plan.steps):
        batch = micro_batch(plan, step, slots)
        expected = oracle(plan, step, slots)
        for field, values in expected.items():
            assert getattr(batch, field).dtype == types[field], field
            assert getattr(batch, field).tolist() == values, field
        assert len(batch.tokens) == len(slots) * plan.seq_len
        assert set(range(0, len(batch.tokens) + 1, plan.seq_len)) <= set(batch.cu_seqlens.tolist())
        assert batch.num_padding == expected["tokens"].count(0) == (batch.token_sources == PADDING_SOURCE).sum()
        assert batch.num_valid == sum(label >= 0 for label in expected["labels"])


@pytest.mark.parametrize("name", ["best_fit", "concat", "single"])
def test_anchors_are_the_rows_first_tokens(name: str) -> None:
    """Padding has none, nothing else changes, and the plan knows the work."""
    options = {"positions": "continue", **OPTIONS[name]}
    plain, anchored = make_plan(**options), make_plan(**options, anchor_attention=True)
    assert plain.fingerprint != anchored.fingerprint
    for step, slots in ((0, [2]), (1, [0, 1, 2]), (2, list(range(ROWS)))):
        batch = micro_batch(anchored, step, slots)
        for field in FIELDS:
            assert torch.equal(getattr(batch, field), getattr(micro_batch(plain, step, slots), field))
        assert batch.anchor is not None and batch.anchor.dtype == torch.int32
        starts = batch.cu_seqlens[:-1]
        row = starts // anchored.seq_len * anchored.seq_len
        assert torch.equal(batch.anchor, torch.where(batch.source == PADDING_SOURCE, -1, row))
        moved = batch.to("meta").anchor
        assert moved is not None and moved.device.type == "meta"
        segments = Segments.whole(batch.cu_seqlens, anchor=batch.anchor.numpy().astype(np.int64))
        assert anchored.work(step)[slots].sum() == segments.attended_pairs
        assert (name == "single") == bool((plain.work(step) == anchored.work(step)).all())


def test_padding_is_there_where_it_is_tested() -> None:
    """single pads by more than one segment of padding, best_fit hardly."""
    batches = [micro_batch(make_plan(**OPTIONS[name]), 0, list(range(ROWS))) for name in ("single", "best_fit")]
    assert batches[0].num_padding > 8 * PADDING_SEGMENT
    assert batches[1].num_padding < SEQ_LEN


@pytest.mark.parametrize("method", ["pose", "longrecipe", "cream", "random"])
def test_train_short_positions_change_nothing_but_positions(method: str) -> None:
    plain = make_plan(seq_len=64)
    drawn = make_plan(64, tuple(range(0, 10_000, 7)), positions=method, target_seq_len=1000)
    seen = set()
    for step in range(3):
        for slot in range(ROWS):
            a, b = micro_batch(plain, step, [slot]), micro_batch(drawn, step, [slot])
            for field in FIELDS:
                assert field == "positions" or torch.equal(getattr(a, field), getattr(b, field))
            again = micro_batch(drawn, step, [slot])
            assert torch.equal(b.positions, again.positions)
            for start, stop in zip(b.cu_seqlens, b.cu_seqlens[1:]):
                inside = b.positions[start:stop]
                assert inside.min() >= 0 and inside.max() < 1000 and (inside.diff() > 0).all()
            seen.add(tuple(b.positions.tolist()))
    assert len(seen) > 20 and max(map(max, seen)) > 900  # every row draws anew, and they reach far


Rows = list[tuple[int, ...]]


def rows_by_step(plan: Plan, dp: int, local: int, num_workers: int, start_step: int = 0) -> dict[int, Rows]:
    """The sorted rows of each global batch, over all ranks and accumulation."""
    accumulation = ROWS // (dp * local)
    steps: dict[int, Rows] = {}
    for rank in range(dp):
        loader = build_loader(plan, rank, dp, local, start_step, num_workers)
        assert len(loader) == (plan.steps - start_step) * accumulation
        for item, batch in enumerate(loader):
            assert isinstance(batch, PackedBatch)
            rows = batch.tokens.reshape(local, SEQ_LEN).tolist()
            steps.setdefault(start_step + item // accumulation, []).extend(map(tuple, rows))
    return {step: sorted(rows) for step, rows in steps.items()}


@pytest.mark.parametrize("num_workers", [0, 4])
@pytest.mark.parametrize("dp, local", [(1, 8), (1, 2), (2, 1), (2, 4), (4, 1), (8, 1)])
def test_step_k_has_the_same_rows_in_every_layout(plan: Plan, dp: int, local: int, num_workers: int) -> None:
    expected = {
        step: sorted(tuple(micro_batch(plan, step, [slot]).tokens.tolist()) for slot in range(ROWS))
        for step in range(plan.steps)
    }
    assert rows_by_step(plan, dp, local, num_workers) == expected
    resumed = rows_by_step(plan, dp, local, num_workers, start_step=4)
    assert resumed == {step: expected[step] for step in (4, 5)}


@pytest.mark.parametrize("num_workers", [0, 4])
def test_a_resumed_rank_continues_its_batches(plan: Plan, num_workers: int) -> None:
    whole = list(build_loader(plan, 1, 2, 2, 0, num_workers))
    resumed = list(build_loader(plan, 1, 2, 2, 3, num_workers))
    assert len(resumed) == len(whole) - 3 * 2
    for a, b in zip(whole[3 * 2 :], resumed):
        for name in FIELDS:
            assert torch.equal(getattr(a, name), getattr(b, name))


@pytest.mark.parametrize("dp, local", [(1, 8), (1, 1), (2, 2), (4, 1), (8, 1)])
def test_slots_are_a_partition_with_the_heavy_rows_apart(plan: Plan, dp: int, local: int) -> None:
    ranks = [MicroBatches(plan, rank, dp, local) for rank in range(dp)]
    for step in range(plan.steps):
        items = range(step * ranks[0].accumulation, (step + 1) * ranks[0].accumulation)
        slots = [[slot for item in items for slot in rank.slots(item)] for rank in ranks]
        assert sorted(slot for mine in slots for slot in mine) == list(range(ROWS))
        if dp > 1:  # the heaviest rows go to different ranks
            heaviest = np.argsort(-plan.work(step), kind="stable")[:dp]
            assert all(len(set(mine) & set(heaviest)) == 1 for mine in slots)


def test_the_loader_leaves_the_generator_alone(plan: Plan) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    for num_workers in (0, 1):
        assert len(list(build_loader(plan, 0, 1, 8, 0, num_workers))) == plan.steps
    assert torch.equal(torch.get_rng_state(), before)


def test_to_keeps_every_field(plan: Plan) -> None:
    batch = micro_batch(plan, 0, [0, 1])
    moved = batch.to("meta")
    for name in FIELDS:
        assert getattr(moved, name).shape == getattr(batch, name).shape
        assert getattr(moved, name).dtype == getattr(batch, name).dtype
        assert getattr(moved, name).device.type == "meta"


def test_a_step_that_does_not_divide_yields_no_rows(plan: Plan) -> None:
    """config/checks.py refuses it with the arithmetic; a caller that did not ask there gets no batch at all."""
    with pytest.raises(ValueError):
        next(iter(build_loader(plan, 0, 3, 1, num_workers=0)))


def test_short_and_long_documents_have_rows_of_their_own() -> None:
    """rope.mixed_window: short rows are masked by document and start anew, long ones are one segment."""
    plan = make_plan(short_window=8, cross_document_attention=True, positions="continue")
    kinds = set()
    for step in range(plan.steps):
        for slot in range(ROWS):
            row, batch = plan.row(step, slot), micro_batch(plan, step, [slot])
            short = bool((row.lengths <= 8).all())
            assert short or bool((row.lengths > 8).all())
            kinds.add(short)
            assert batch.long is not None and bool((batch.long == (not short)).all())
            read = int(row.lengths.sum())
            ends = np.cumsum(row.lengths).tolist() if short else [read]
            assert batch.cu_seqlens.tolist()[1 : len(ends) + 1] == ends
            expected = np.concatenate([np.arange(n) for n in (row.lengths if short else [read])])
            assert batch.positions[:read].tolist() == expected.tolist()
            inside = row.lengths if short else np.array([read])
            padding = SEQ_LEN - read
            assert plan.work(step)[slot] == (inside * (inside + 1) // 2).sum() + padding * (padding + 1) // 2
    assert kinds == {True, False}
    assert plan.inputs["short_window"] == 8 and "short_window" not in make_plan().inputs
