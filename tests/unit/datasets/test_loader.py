"""PackedBatch against a slow oracle, and the same rows at the same step for every layout, worker count and restart."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from torchtitan.datasets.corpus import Corpus
from torchtitan.datasets.loader import MicroBatches, PackedBatch, build_loader, pack
from torchtitan.datasets.plan import Plan
from torchtitan.tools.errors import UserError

SEQ_LEN = 24
ROWS = 8


@pytest.fixture
def plan(make_corpus: Callable[..., Corpus]) -> Plan:
    random = np.random.default_rng(0)
    long, short = random.integers(20, 200, 30).tolist(), random.integers(1, 12, 90).tolist()
    corpora = [make_corpus(long, "long"), make_corpus(short, "short", first=100_000)]
    return Plan(corpora, ["long", "short"], [0.6, 0.4], SEQ_LEN, ROWS, steps=6, seed=5)


def oracle(plan: Plan, step: int, slots: list[int]) -> dict[str, list[int]]:
    """A batch token by token from the documents themselves."""
    made: dict[str, list[int]] = {"tokens": [], "labels": [], "positions": [], "cu_seqlens": [0], "source": []}
    for slot in slots:
        row = plan.row(step, slot)
        for d, start, stop in zip(row.pieces.documents, row.pieces.starts, row.pieces.stops):
            document = plan.corpora[row.source].document(int(d)).tolist()
            for t in range(start, stop):
                made["tokens"].append(document[t])
                made["labels"].append(document[t + 1] if t + 1 < stop else -100)
                made["positions"].append(t - start)
            made["cu_seqlens"].append(len(made["tokens"]))
            made["source"].append(row.source)
    return made


@pytest.mark.parametrize("slots", [[0], [3, 4], list(range(ROWS))])
def test_batch_is_the_oracles(plan: Plan, slots: list[int]) -> None:
    types = {"tokens": torch.int64, "labels": torch.int64, "positions": torch.int64}
    types |= {"cu_seqlens": torch.int32, "source": torch.int16}
    for step in range(plan.steps):
        batch = pack(plan, step, slots)
        for name, values in oracle(plan, step, slots).items():
            tensor = getattr(batch, name)
            assert tensor.dtype == types[name]
            assert tensor.tolist() == values
        assert len(batch.tokens) == len(slots) * SEQ_LEN
        assert set(range(0, len(batch.tokens) + 1, SEQ_LEN)) <= set(batch.cu_seqlens.tolist())
        assert batch.num_valid == len(batch.tokens) - len(batch.source)


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


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("dp, local", [(1, 8), (1, 2), (2, 1), (2, 4), (4, 1), (4, 2)])
def test_step_k_has_the_same_rows_in_every_layout(plan: Plan, dp: int, local: int, num_workers: int) -> None:
    expected = {
        step: sorted(tuple(plan.tokens(plan.row(step, slot)).tolist()) for slot in range(ROWS))
        for step in range(plan.steps)
    }
    assert rows_by_step(plan, dp, local, num_workers) == expected
    resumed = rows_by_step(plan, dp, local, num_workers, start_step=4)
    assert resumed == {step: expected[step] for step in (4, 5)}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_resumed_rank_continues_its_batches(plan: Plan, num_workers: int) -> None:
    whole = list(build_loader(plan, 1, 2, 2, 0, num_workers))
    resumed = list(build_loader(plan, 1, 2, 2, 3, num_workers))
    assert len(resumed) == len(whole) - 3 * 2
    for a, b in zip(whole[3 * 2 :], resumed):
        for name in ("tokens", "labels", "positions", "cu_seqlens", "source"):
            assert torch.equal(getattr(a, name), getattr(b, name))


def test_slots_are_a_partition(plan: Plan) -> None:
    for dp, local in [(1, 8), (1, 1), (2, 2), (4, 1), (8, 1)]:
        ranks = [MicroBatches(plan, rank, dp, local) for rank in range(dp)]
        slots = [slot for a in range(ranks[0].accumulation) for rank in ranks for slot in rank.slots(a)]
        assert slots == list(range(ROWS))


def test_the_loader_leaves_the_generator_alone(plan: Plan) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    for num_workers in (0, 1):
        assert len(list(build_loader(plan, 0, 1, 8, 0, num_workers))) == plan.steps
    assert torch.equal(torch.get_rng_state(), before)


def test_to_keeps_every_field(plan: Plan) -> None:
    batch = pack(plan, 0, [0, 1])
    moved = batch.to("meta")
    for name in ("tokens", "labels", "positions", "cu_seqlens", "source"):
        assert getattr(moved, name).shape == getattr(batch, name).shape
        assert getattr(moved, name).dtype == getattr(batch, name).dtype
        assert getattr(moved, name).device.type == "meta"


def test_a_batch_that_does_not_divide(plan: Plan) -> None:
    with pytest.raises(UserError) as error:
        build_loader(plan, 0, 3, 1)
    for word in ("8 rows", "1 * 3 = 3", "6 and 9"):
        assert word in str(error.value)
