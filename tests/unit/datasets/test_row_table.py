"""Rows against an independent ledger: epochs that never overlap, shares at every row, states, curves, rows left out."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.unit.datasets.ledger import Ledger, lengths_only, make_plan, random_plan, rows_of
from torchtitan.datasets.corpus import ASSISTANT, Corpus
from torchtitan.datasets.plan import Plan


@pytest.mark.parametrize("seeds", [range(40), range(40, 80)])
def test_epochs_follow_each_other_and_states_go_on(seeds: range) -> None:
    """Of random mixes; then of another plan that goes on from a step of each, with other rows or in the middle of the
    same stage. The ledger asserts; states are its own."""
    ended = 0
    for seed in seeds:
        random = np.random.default_rng(1_000_000 + seed)
        data, corpora, arguments = random_plan(seed)
        plan = Plan(data, corpora, **arguments)
        ledger = Ledger(plan)
        ended += sum(ledger.ends)
        step = int(random.integers(0, plan.steps))
        state = plan.read_until(step)
        assert all((a == b).all() for a, b in zip(state, ledger.states[step])), seed
        first_step = step
        if random.random() < 0.5:
            sources = [replace(s, weight=float(random.uniform(0.1, 1)), long_document="split") for s in data.sources]
            packing = str(random.choice(["best_fit", "concat", "single"]))
            data = replace(data, packing=packing, sources=tuple(sources))  # type: ignore[arg-type]
            arguments |= {"seq_len": int(arguments["seq_len"] * random.choice([0.5, 1, 2])), "short_window": None}
            first_step = 0
        other = Plan(data, corpora, **arguments, read=state, first_step=first_step)
        assert len(other.table) == (other.steps - first_step) * 2
        ledger = Ledger(other, state)
        step = int(random.integers(first_step, other.steps))
        now = ledger.states[step - first_step]
        assert all((a == b).all() for a, b in zip(other.read_until(step), now)), seed
    assert ended > 100


def test_no_document_is_read_again_before_the_epoch_of_a_chain_ends() -> None:
    """Three stages of rows of 256, 1024 and 512 over one source, 0.9 epochs in all: each token at most once."""
    random = np.random.default_rng(0)
    corpora = [lengths_only(np.exp(random.normal(4.5, 1.2, 3000)).astype(np.int64).clip(1), "a")]
    times = [np.zeros(n, int) for n in corpora[0].lengths]
    state: list[np.ndarray] = []
    for seq_len in (256, 1024, 512):
        steps = int(0.3 * corpora[0].tokens / seq_len)
        plan = make_plan(corpora, seq_len, steps, packing="concat" if seq_len == 1024 else "best_fit", read=state)
        for _, document, _, start, length in (part for row in rows_of(plan) for part in row):
            times[document][start : start + length] += 1
        state = plan.read_until(steps)
    read = np.concatenate(times)
    assert read.max() == 1 and read.mean() == pytest.approx(0.9, abs=0.01)


def test_what_a_state_decides() -> None:
    corpora = [np.array([30, 40, 50, 100]), np.array([64] * 10)]
    plan = make_plan(corpora, 64, 3)
    nothing = [np.zeros(4, np.int64), None]
    assert make_plan(corpora, 64, 3, read=nothing).inputs == plan.inputs
    state = [np.array([0, 40, 0, 70]), None]
    other = make_plan(corpora, 64, 20, read=state)
    assert other.inputs == plan.inputs | {"read_before": other.inputs["read_before"]}
    first = [part for row in rows_of(other) for part in row if part[0] == 0 and part[2] == 0]
    assert sorted(part[1:] for part in first) == [(0, 0, 0, 30), (2, 0, 0, 50), (3, 0, 70, 30)]
    with pytest.raises(ValueError, match="3 documents of source a, which has 4"):
        make_plan(corpora, 64, 3, read=[np.zeros(3, np.int64), None])
    late = make_plan(corpora, 64, 20, first_step=5)
    assert late.inputs == plan.inputs | {"first_step": 5} and len(late.table) == 15 and len(late.row(5, 0).lengths)
    with pytest.raises(IndexError, match="step 4 is before step 5, where this plan begins"):
        late.row(4, 0)


def test_half_a_conversation_is_not_read() -> None:
    roles = np.full(200, ASSISTANT, np.int8)
    chat = Corpus("a", [(np.array([0, 50, 130, 200]), np.zeros(200, np.int32))], "a", None, [roles])
    plan = make_plan([chat], 64, 12, read=[np.array([0, 40, 70])])
    assert [part[1:4] for row in rows_of(plan) for part in row if part[2] == 0] == [(0, 0, 0)]
    Ledger(plan, [np.array([0, 40, 70])])


MIXES = {
    "ragged": (12, 4),
    "two of long": (3000, 20),
    "up to a row": (12, 1),
}


@pytest.mark.parametrize("packing", ["best_fit", "concat"])
@pytest.mark.parametrize("shortest, part", MIXES.values(), ids=list(MIXES))
def test_shares_at_two_rows_of_4m_a_step(packing: str, shortest: int, part: int) -> None:
    """Documents from `shortest` tokens to a row / part: no stream is off by more than BOUND rows after any row, so that
    no window of 100 steps, 200 rows, is off by more than BOUND points."""
    random = np.random.default_rng(0)
    seq_len = 4 << 20
    corpora = [
        np.exp(random.uniform(np.log(shortest), np.log(seq_len / part), 20_000)).astype(np.int64) for _ in range(3)
    ]
    corpora = [n[: int(np.searchsorted(np.cumsum(n), 40 * seq_len)) + 1] for n in corpora]
    plan = make_plan(corpora, seq_len, 150, (0.5, 0.3, 0.2), packing, rows_per_step=2)
    ledger = Ledger(plan)
    off = np.abs(ledger.behind).max() / seq_len
    print(packing, shortest, part, off, 1 - plan.table.length.sum(dtype=np.int64) / 300 / seq_len)
