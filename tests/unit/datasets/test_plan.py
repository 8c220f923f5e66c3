"""Plan: rows as a pure function of its inputs, the report's numbers, what a resume accepts, bad inputs."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest

from torchtitan.datasets.corpus import Corpus
from torchtitan.datasets.plan import Plan, Row, changed_inputs, format_report
from torchtitan.tools.errors import UserError

MakeCorpus = Callable[..., Corpus]
SEQ_LEN = 32


@pytest.fixture
def corpora(make_corpus: MakeCorpus) -> list[Corpus]:
    random = np.random.default_rng(0)
    long, short = random.integers(20, 400, 30).tolist(), random.integers(1, 20, 90).tolist()
    return [make_corpus(long, "long"), make_corpus(short, "short", first=100_000)]


def make_plan(corpora: list[Corpus], **changes: object) -> Plan:
    arguments = {"names": ["long", "short"], "weights": [0.6, 0.4], "seq_len": SEQ_LEN}
    arguments |= {"rows_per_step": 8, "steps": 60, "seed": 5}
    return Plan(corpora, **(arguments | changes))  # type: ignore[arg-type]


def all_rows(plan: Plan) -> list[Row]:
    return [plan.row(step, slot) for step in range(plan.steps) for slot in range(plan.rows_per_step)]


def test_ledger_each_token_of_an_epoch_once(corpora: list[Corpus]) -> None:
    """No token occurs twice in these corpora, so tokens count themselves."""
    plan = make_plan(corpora)
    seen: dict[tuple[int, int], Counter[int]] = {}
    for row in all_rows(plan):
        tokens = plan.tokens(row)
        assert tokens.dtype == np.int64 and tokens.shape == (SEQ_LEN,)
        seen.setdefault((row.source, row.epoch), Counter()).update(tokens.tolist())
    for (source, epoch), counts in seen.items():
        assert max(counts.values()) == 1
        if (source, epoch + 1) in seen:  # a finished epoch: everything but the tail
            left_out = plan.report()["sources"][source]["left_out_tokens_per_epoch"]
            assert len(counts) == corpora[source].tokens - left_out
            assert left_out < SEQ_LEN
    assert max(epoch for source, epoch in seen if source == 1) >= 3


def test_the_order_of_asking_does_not_matter(corpora: list[Corpus]) -> None:
    rows = [plan_row_key(make_plan(corpora), row) for row in all_rows(make_plan(corpora))]
    plan = make_plan(corpora)
    for index in np.random.default_rng(0).permutation(len(rows)):
        assert plan_row_key(plan, plan.row(*divmod(int(index), 8))) == rows[index]


def plan_row_key(plan: Plan, row: Row) -> tuple[int, int, tuple[int, ...]]:
    return row.source, row.epoch, tuple(plan.tokens(row))


def test_a_longer_plan_begins_the_same_and_has_the_same_fingerprint(corpora: list[Corpus]) -> None:
    short, long = make_plan(corpora, steps=10), make_plan(corpora, steps=60)
    assert short.fingerprint == long.fingerprint
    for step in range(10):
        for slot in range(8):
            assert plan_row_key(short, short.row(step, slot)) == plan_row_key(long, long.row(step, slot))
    with pytest.raises(IndexError):
        short.row(10, 0)
    with pytest.raises(IndexError):
        short.row(0, 8)


CHANGES: dict[str, tuple[dict[str, object], str]] = {
    "seed": ({"seed": 6}, "seed 5 -> 6"),
    "seq_len": ({"seq_len": 16}, "seq_len 32 -> 16"),
    "rows": ({"rows_per_step": 4}, "rows_per_step 8 -> 4"),
    "weights": ({"weights": [0.5, 0.5]}, "source long: share 0.6 -> 0.5"),
    "names": ({"names": ["long", "other"]}, "sources [long, short] -> [long, other]"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_resume_names_what_changed(corpora: list[Corpus], name: str) -> None:
    arguments, words = CHANGES[name]
    saved = json.loads(json.dumps(make_plan(corpora).inputs))  # as a checkpoint keeps it
    assert changed_inputs(saved, make_plan(corpora, steps=100).inputs) == []
    changed = make_plan(corpora, **arguments)
    assert changed.fingerprint != make_plan(corpora).fingerprint
    assert words in changed_inputs(saved, changed.inputs)


def test_resume_names_a_changed_corpus(corpora: list[Corpus], make_corpus: MakeCorpus) -> None:
    saved = make_plan(corpora).inputs
    other = make_corpus([50] * 9, "other")
    changes = changed_inputs(saved, make_plan([corpora[0], other]).inputs)
    assert changes == [f"source short: its documents (corpus {corpora[1].fingerprint} -> {other.fingerprint})"]


def test_report(corpora: list[Corpus]) -> None:
    plan = make_plan(corpora)
    report = json.loads(json.dumps(plan.report()))
    rows = all_rows(plan)
    assert report["rows"] == len(rows) == 480
    assert report["tokens"] == 480 * SEQ_LEN
    assert report["padding_tokens"] == 0
    for source, (entry, corpus) in enumerate(zip(report["sources"], corpora)):
        mine = [row for row in rows if row.source == source]
        assert entry["rows"] == len(mine)
        assert entry["share"] == pytest.approx(len(mine) / 480)
        assert abs(entry["share"] - entry["share_asked"]) <= 1 / 480
        assert entry["epochs"] == pytest.approx(len(mine) / (corpus.tokens // SEQ_LEN))
        assert (entry["documents"], entry["tokens"]) == (len(corpus), corpus.tokens)
        for begin, bucket in entry["documents_by_length_from"].items():
            inside = corpus.lengths[(corpus.lengths >= int(begin)) & (corpus.lengths < 2 * int(begin))]
            assert (bucket["documents"], bucket["tokens"]) == (len(inside), inside.sum())
        assert sum(bucket["tokens"] for bucket in entry["documents_by_length_from"].values()) == corpus.tokens
    text = format_report(report)
    assert len(text.splitlines()) == 4 and "long" in text and "60.0%" in text


def test_unigram_nats(corpora: list[Corpus]) -> None:
    """All tokens of all planned rows, counted the slow way; the plan is smaller than the sample."""
    plan = make_plan(corpora)
    mixed: Counter[int] = Counter()
    for row in all_rows(plan):
        mixed.update(plan.tokens(row).tolist())
    frequencies = np.array(list(mixed.values())) / mixed.total()
    assert plan.report()["unigram_nats"] == pytest.approx(-(frequencies * np.log(frequencies)).sum(), rel=1e-9)


def test_unigram_nats_of_a_sample(corpora: list[Corpus], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchtitan.datasets.plan.UNIGRAM_SAMPLE", 10 * SEQ_LEN)
    read: list[Row] = []
    plan = make_plan(corpora)
    tokens = plan.tokens
    monkeypatch.setattr(plan, "tokens", lambda row: read.append(row) or tokens(row))
    # ten rows without a common token (short is seen in several epochs, but long alone has six of them)
    assert plan.report()["unigram_nats"] == pytest.approx(np.log(10 * SEQ_LEN), rel=0.05)
    assert len(read) <= 11


def test_describe_names_the_documents(corpora: list[Corpus]) -> None:
    plan = make_plan(corpora)
    for slot in range(8):
        row, text = plan.row(7, slot), plan.describe(7, slot)
        assert f"source {plan.names[row.source]}, epoch {row.epoch}" in text
        first = row.pieces
        assert f"{first.documents[0]}[{first.starts[0]}:{first.stops[0]}]" in text


def test_a_source_of_weight_0_is_never_read(corpora: list[Corpus], make_corpus: MakeCorpus) -> None:
    tiny = make_corpus([3], "tiny")
    plan = make_plan([corpora[0], tiny], weights=[1, 0])
    assert {row.source for row in all_rows(plan)} == {0}
    assert plan.report()["sources"][1]["epochs"] == 0


def test_bad_inputs(corpora: list[Corpus]) -> None:
    tokens = corpora[1].tokens
    with pytest.raises(UserError) as error:
        make_plan(corpora, seq_len=tokens + 7)
    for word in (f"seq_len = {tokens + 7}", "'short'", f"{tokens} tokens in 90 documents", "7 too few"):
        assert word in str(error.value)
    make_plan(corpora, seq_len=tokens)
    for changes, words in (
        ({"weights": [1, -1]}, "'short' has weight = -1"),
        ({"weights": [0, 0]}, "all 0"),
        ({"names": ["same", "same"]}, "same, same"),
    ):
        with pytest.raises(UserError, match=words):
            make_plan(corpora, **changes)
    with pytest.raises(UserError, match=r"data\.sources is empty"):
        Plan([], [], [], 8, 1, 1, 0)
