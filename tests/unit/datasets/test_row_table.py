"""Rows against an independent ledger: epochs that never overlap, shares at every row, states, curves, rows left out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.unit.datasets.ledger import Ledger, lengths_only, make_plan, random_plan, rows_of
from torchtitan.config.data_schema import Data, Source
from torchtitan.datasets.build_rows import Stage, make_chunks
from torchtitan.datasets.corpus import ASSISTANT, Corpus
from torchtitan.datasets.plan import Plan
from torchtitan.datasets.read_so_far import ReadSoFar, read_until
from torchtitan.datasets.table_files import join
from torchtitan.extensions.planner.data_report import make_report
from torchtitan.tools.errors import UserError


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


LENGTHS = {  # shortest, longest as a share of a row, and what no stream is off its share by after any row, in rows
    "12 tokens to a quarter": (12, 1 / 4, 0.5),
    "3,000 tokens to a twentieth": (3000, 1 / 20, 0.3),
    "12 tokens to a row": (12, 1, 0.75),
    "12 tokens to six rows": (12, 6, 0.75),
    "whole rows": (4 << 20, 1, 0.75),
}
"""docs/data.md states these bounds."""


@pytest.mark.parametrize("packing", ["best_fit", "concat"])
@pytest.mark.parametrize("name", LENGTHS)
def test_shares_at_two_rows_of_4m_a_step(packing: str, name: str) -> None:
    """After every row of 150 steps: a window of 100 steps is 200 rows, so half a row at both ends is half a point."""
    shortest, longest, bound = LENGTHS[name]
    seq_len = 4 << 20
    for seed, weights in enumerate([(0.5, 0.3, 0.2), (0.9, 0.06, 0.04)]):
        random = np.random.default_rng(seed)
        corpora = []
        for _ in weights:
            lengths = np.exp(random.uniform(np.log(shortest), np.log(seq_len * longest), 20_000)).astype(np.int64)
            corpora.append(lengths[: int(np.searchsorted(np.cumsum(lengths), 40 * seq_len)) + 1])
        plan = make_plan(corpora, seq_len, 150, weights, packing, rows_per_step=2)
        ledger = Ledger(plan)
        if packing == "concat" and longest > 1:
            bound = longest / 2 + 0.5
        assert np.abs(ledger.behind).max() <= bound * seq_len


def test_248_rows_of_4m_over_several_epochs() -> None:
    """Formerly 4.3% of the documents were never read, 4.7% twice as often, and 29% of the rows held two copies."""
    random = np.random.default_rng(0)
    seq_len = 4 << 20
    lengths = np.exp(random.normal(9.5, 1.6, 12_000)).astype(np.int64).clip(16)
    lengths = lengths[: int(np.searchsorted(np.cumsum(lengths), 62 * seq_len))]
    plan = make_plan([lengths], seq_len, 248)
    assert Ledger(plan).ends[0] >= 3 and not len(plan.table.twice)
    assert plan.table.length.sum(dtype=np.int64) / (248 * seq_len) > 0.999


CURVES = {
    "a ramp": ([[0, 0.9], [100, 0.1]], [[0, 0.1], [100, 0.9]]),
    "nothing at first": ([[0, 1.0], [50, 1.0], [80, 0.5]], [[0, 0.0], [50, 0.0], [80, 0.5]]),
    "nothing between": ([[20, 0.5], [40, 1.0], [60, 1.0], [61, 0.5]], [[20, 0.5], [40, 0.0], [60, 0.0], [61, 0.5]]),
}


@pytest.mark.parametrize("packing", ["best_fit", "concat", "single"])
@pytest.mark.parametrize("name", CURVES)
def test_shares_follow_their_curves(name: str, packing: str) -> None:
    """At every row, by the integral; with awkward documents too, whose padding does not make the schedule late."""
    random = np.random.default_rng(0)
    ragged = np.exp(random.uniform(np.log(12), np.log(1024), 4000)).astype(np.int64)
    for other in (np.exp(random.normal(5, 1, 900)).astype(np.int64).clip(1, 1024), np.full(3000, 600)):
        plan = make_plan([ragged, other], 1024, 3, packing=packing)
        streams = [replace(stream, curve=np.array(c)) for stream, c in zip(plan.streams, CURVES[name])]
        plan.streams, plan.steps, plan.rows_per_step = streams, 120, 8
        plan.table = join(make_chunks(Stage(streams, plan.data, 1024, 960, 0, rows_per_step=8)))
        ledger = Ledger(plan)
        assert np.abs(ledger.behind).max() <= 1024
        step = np.repeat(np.arange(960) // 8, np.diff(plan.table.offsets))
        for s, curve in enumerate(CURVES[name]):
            if 0 in np.array(curve)[:, 1]:
                nothing = np.interp(step + 0.5, *np.array(curve).T) == 0
                first, last = step[nothing].min(), step[nothing].max()
                inside = (step >= first) & (step <= last) & (plan.table.source == s)
                assert inside.sum() <= 1  # what was half due


def test_rows_without_labels_are_left_out(tmp_path: Path) -> None:
    """Of conversations with prompts that fill a row, and of documents of one token; what is left out counts as read."""
    random = np.random.default_rng(0)
    prompts = np.where(np.arange(40) % 4 == 3, 64, 10)
    lengths = prompts + 5
    roles = np.concatenate([np.repeat([0, ASSISTANT], [p, 5]) for p in prompts]).astype(np.int8)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    chat = Corpus("a", [(offsets, np.zeros(len(roles), np.int32))], "a", None, [roles])
    for packing in ("single", "best_fit", "concat"):
        for others in ([], [np.ones(300, np.int64)], [random.integers(1, 9, 50), np.ones(9, np.int64)]):
            plan = make_plan([chat, *others], 32, 100, packing=packing, cache=tmp_path / packing / str(len(others)))
            for step in range(100):
                row = plan.row(step, 0)
                trained = plan.trained(row)
                trained[np.cumsum(row.lengths) - row.lengths] = False
                assert trained.any()
            Ledger(plan)
            left_out = {tuple(part) for part in plan.table.unlabelled[:, 2:4].tolist()}
            if packing == "single":
                assert plan.rows_without_labels > 0 and plan.tokens_without_labels > 0
                assert {d for s, d in left_out if s == 0} <= set(range(3, 40, 4))
                longer = make_plan([chat, *others], 32, 150, packing=packing)
                assert rows_of(longer)[:100] == rows_of(plan)
    with pytest.raises(
        UserError, match="No row in the stage has a token that is trained on: those of 'a' hold prompts"
    ):
        make_plan([np.ones(50, np.int64)], 32, 5, packing="single")
    make_plan([np.ones(50, np.int64), np.full(9, 9)], 32, 20, (0.9, 0.1), packing="single")


@pytest.mark.parametrize("others", [0, 1])
def test_rows_without_labels_count_in_epochs_and_max_epochs(others: int, tmp_path: Path) -> None:
    """Of documents whose first row is a prompt. Each end that is read stands for all that comes before it."""
    roles = np.concatenate([np.repeat([0, ASSISTANT], [3000, 20]) for _ in range(20)]).astype(np.int8)
    offsets = np.arange(21) * 3020
    chat = Corpus("a", [(offsets, np.zeros(len(roles), np.int32))], "a", None, [roles])
    other = Corpus("b", [(np.arange(301) * 500, np.zeros(150_000, np.int32))], "b", None)
    corpora = [chat, *[other] * others]

    def plan_of(most: float | None, cache: Path | None = None) -> Plan:
        sources = [Source("a", "a", max_epochs=most), Source("b", "b")][: len(corpora)]
        return Plan(Data(sources=tuple(sources)), corpora, 2048, 4, 50, 0, cache=cache)

    plan = plan_of(None, tmp_path)
    ends = [d for row in rows_of(plan) for s, d, _, start, length in row if s == 0 and start + length == 3020]
    in_rows = sum(part[4] for row in rows_of(plan) for part in row if part[0] == 0)
    count = in_rows + int(plan.table.unlabelled[:, 6].sum())
    assert 3020 * len(ends) <= count <= 3020 * len(ends) + 20 * 2048 and count > 1.5 * in_rows
    assert plan.tokens_of(plan.streams[0]) == count
    after = read_until(ReadSoFar(), plan, plan.steps)
    assert after.epochs(chat) == pytest.approx(count / 60_400)
    entry = make_report(plan, 1, 1, 1.0, 1.0)["sources"][0]
    assert entry["epochs_after"] == entry["epochs"][0]["epochs"] == entry["epochs_used"] == count / 60_400
    assert entry["tokens_read"] + entry["tokens_without_labels"] == count
    assert int(plan.table.epoch[plan.table.source == 0].max()) <= count / 60_400
    for cache in (None, tmp_path, tmp_path / "another"):
        plan_of(count / 60_400 + 0.01, cache)
        with pytest.raises(UserError, match=rf"60,400 tokens.* {count:,}.* {count / 60_400:.2f} times"):
            plan_of(count / 60_400 - 0.01, cache)


def test_max_epochs_is_checked_before_the_table() -> None:
    """A thousand documents a million times, in no time; and as exactly as the rows are filled."""
    corpus = lengths_only(np.full(1000, 64))
    for packing in ("best_fit", "concat", "single"):
        for epochs, allowed, fits in ((1e6, 4.0, False), (3.9, 4.0, True), (4.1, 4.0, False)):
            data = Data(sources=(Source("a", "a", max_epochs=allowed),), packing=packing)  # type: ignore[arg-type]
            steps = int(epochs * 1000 * (64 / 256 if packing != "single" else 1))
            if fits:
                Plan(data, [corpus], 256, 1, steps, 0)
                continue
            with pytest.raises(UserError) as error:
                Plan(data, [corpus], 256, 1, steps, 0)
            for words in ("'a'", "64,000 tokens", f"{64 * 1000 * epochs:,.0f}"[:4], "max_epochs = 4"):
                assert words in str(error.value)
    awkward = [np.full(1000, 35)]  # rows of 64 are half empty
    data = Data(sources=(Source("a", "a", max_epochs=1.0),))
    Plan(data, [lengths_only(awkward[0])], 64, 1, 1000, 0)
    with pytest.raises(UserError, match=r"35,000 tokens.*35,070.*1\.00 times"):
        Plan(data, [lengths_only(awkward[0])], 64, 1, 1002, 0)
