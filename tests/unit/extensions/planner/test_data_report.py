"""The report's numbers against slow counts over the rows themselves."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import numpy as np
import pytest

from tests.unit.conftest import DOMAINS, domain_data
from torchtitan.config.data_schema import Data, Source
from torchtitan.datasets.corpus import Corpus
from torchtitan.datasets.plan import Plan
from torchtitan.extensions.planner.data_report import format_report, make_report, unigram_nats

SEQ_LEN, ROWS, STEPS = 16384, 8, 40
CASES: dict[str, dict[str, Any]] = {
    "best_fit": {},
    "concat": {"packing": "concat"},
    "single": {"packing": "single"},
    "per source": {"strategy": "per_source_upsampling", "long_share": 0.9},
    "cut": {"strategy": "cut_4k"},
    "truncate and drop": {"books__long_document": "truncate", "code__long_document": "drop", "web__min_length": 300},
}


@pytest.mark.parametrize("name", CASES)
def test_numbers_are_those_of_the_rows(domains: dict[str, Corpus], name: str) -> None:
    data = domain_data(**CASES[name])
    plan = Plan(data, list(domains.values()), SEQ_LEN, ROWS, STEPS, 5)
    report = json.loads(json.dumps(make_report(plan, 4, 1, 1e3, 1.0)))
    rows = [plan.row(step, slot) for step in range(STEPS) for slot in range(ROWS)]
    assert report["rows"] == len(rows)
    tokens = sum(int(row.lengths.sum()) for row in rows)
    assert report["tokens"] == tokens and report["padding_tokens"] == len(rows) * SEQ_LEN - tokens
    parts: dict[int, list[tuple[int, int, int, int]]] = {source: [] for source in range(4)}
    for row in rows:
        for s, *part in zip(row.sources, row.documents, row.epochs, row.starts, row.lengths):
            parts[s].append(tuple(map(int, part)))  # type: ignore[arg-type]
    limit = 4096 if name == "cut" else SEQ_LEN
    for source, entry in enumerate(report["sources"]):
        lengths = list(domains.values())[source].lengths
        mine = parts[source]
        read = sum(n for *_, n in mine)
        assert entry["tokens_read"] == read and entry["parts_read"] == len(mine)
        assert entry["share"] == pytest.approx(read / tokens)
        long = sum(n for d, *_, n in mine if lengths[d] > 4096)
        assert entry["long_share"] == pytest.approx(long / read)
        pieces = Counter((d, e) for d, e, _, n in mine if n < lengths[d])
        split = [d for (d, _), count in pieces.items() if count > 1]
        assert entry["documents_split"] == sum(lengths[d] > limit for d in split)
        assert entry["documents_split_that_fit"] == sum(lengths[d] <= limit for d in split)
        assert name == "concat" or entry["documents_split_that_fit"] == 0
        truncated = sum(max(0, int(lengths[d]) - SEQ_LEN) for d, _, start, _ in mine if start == 0)
        assert entry["truncated_tokens"] == (truncated if name == "truncate and drop" and source == 0 else 0)
        by_step = np.zeros((STEPS, 4))
        for index, row in enumerate(rows):
            np.add.at(by_step, (index // ROWS, row.sources), row.lengths)
        asked = sum(s.share for s in plan.streams if s.source == source)
        assert entry["worst_window"] == pytest.approx(abs(by_step[:, source].sum() / by_step.sum() - asked))
        least = 300 if name == "truncate and drop" and source == 2 else 0
        longest = SEQ_LEN if name == "truncate and drop" and source == 1 else max(lengths)
        used = [n for n in lengths.tolist() if least <= n <= longest]
        most = SEQ_LEN if name == "truncate and drop" and source == 0 else longest
        assert (entry["documents_used"], entry["tokens_used"]) == (len(used), sum(min(n, most) for n in used))
        assert entry["epochs_used"] == pytest.approx(read / entry["tokens_used"])
        for kind in entry["epochs"]:
            kinds = {True: ("all", "long"), False: ("all", "short")}
            took = sum(n for d, *_, n in mine if kind["documents"] in kinds[bool(lengths[d] > 4096)])
            assert kind["epochs"] == pytest.approx(took / kind["tokens"])
        for key, counted in (
            ("documents_by_length_from", lengths.tolist()),
            ("parts_by_length_from", [p[3] for p in mine]),
        ):
            for begin, bucket in entry[key].items():
                inside = [n for n in counted if int(begin) <= n < 2 * int(begin)]
                assert (bucket["documents"], bucket["tokens"]) == (len(inside), sum(inside))
            assert sum(bucket["tokens"] for bucket in entry[key].values()) == sum(counted)
    work = sum(int(plan.work(step).sum()) for step in range(STEPS))
    assert report["attention_work"] == pytest.approx(work / (len(rows) * SEQ_LEN * (SEQ_LEN + 1) / 2))
    imbalance = report["imbalance"]["step"]
    assert 1 <= imbalance["all_after"] <= imbalance["attention_after"]
    assert imbalance["all_after"] <= imbalance["all_before"] + 1e-9
    text = format_report(report)
    for entry in report["sources"]:
        by_length = [f"{e['documents']} {e['epochs']:.2f}" for e in entry["epochs"]]
        said = f"{entry['name']}: epochs by length of the documents: {'; '.join(by_length)}\n"
        assert (said in f"{text}\n") == (name == "per source" and len(by_length) == 2)
    assert all(domain in text for domain in DOMAINS) and f"packing {data.packing}" in text
    assert ("dropped by long_document" in text) == (name == "truncate and drop")


def tiny_plan(documents: int) -> Plan:
    ends = np.arange(documents + 1) * 10
    corpus = Corpus("a", [(ends, np.random.default_rng(0).integers(0, 50, documents * 10).astype(np.int32))], "a", None)
    return Plan(Data(sources=(Source("a", "a"),)), [corpus], 40, 4, 20, 0)


def test_unigram_nats_is_the_entropy_of_all_rows() -> None:
    plan = tiny_plan(100)
    counts: Counter[int] = Counter()
    for step in range(20):
        for slot in range(4):
            counts.update(plan.tokens(plan.row(step, slot)).tolist())
    shares = np.array(list(counts.values())) / counts.total()
    assert unigram_nats(plan) == pytest.approx(-(shares * np.log(shares)).sum(), rel=1e-12)


def test_unigram_nats_of_a_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = tiny_plan(100)
    whole = unigram_nats(plan)
    monkeypatch.setattr("torchtitan.extensions.planner.data_report.UNIGRAM_SAMPLE", 1200)
    read: list[object] = []
    tokens = plan.tokens
    monkeypatch.setattr(plan, "tokens", lambda row: read.append(row) or tokens(row))
    assert unigram_nats(plan) == pytest.approx(whole, rel=0.02)
    assert len(read) == 30


def test_windows_off_their_shares_are_a_warning(domains: dict[str, Corpus]) -> None:
    plan = Plan(domain_data(packing="single"), list(domains.values()), 131072, 1, 300, 0)
    report = make_report(plan, 1, 1, 1.0, 1.0)
    by_step = np.add.reduceat(plan.table.length * (plan.table.source == 0), np.arange(300))
    every = np.add.reduceat(plan.table.length, np.arange(300))
    worst = max(abs(by_step[i : i + 100].sum() / every[i : i + 100].sum() - 0.35) for i in range(201))
    assert report["sources"][0]["worst_window"] == pytest.approx(worst) and worst > 0.005
    assert f"source books is up to {worst:.2%} of the tokens off its share in 100 consecutive steps" in format_report(
        report
    )


def test_a_source_read_often_is_a_warning() -> None:
    report = make_report(tiny_plan(3), 1, 1, 1.0, 1.0)
    assert "warning: source a is read 106.7 times: its 30 tokens" in format_report(report)
    assert "warning" not in format_report(make_report(tiny_plan(320), 1, 1, 1.0, 1.0))
