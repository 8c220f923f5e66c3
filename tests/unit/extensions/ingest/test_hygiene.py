"""Copies and texts of the evaluation are found by a slow look at all tokens, left out by the plan, and counted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from torchtitan.config.data_schema import Data, Source
from torchtitan.config.schema import Evaluation
from torchtitan.datasets.corpus import Corpus
from torchtitan.datasets.plan import Plan
from torchtitan.datasets.tokenizer import Tokenizer
from torchtitan.extensions.ingest import hygiene
from torchtitan.extensions.planner.epochs_report import copies_kept
from torchtitan.tools.errors import UserError

WORDS = ["red", "green", "blue", "old", "new", "stone", "river", "house", "bird", "cloud"]


@pytest.fixture
def data(tmp_path: Path) -> Data:
    return Data(folder=str(tmp_path), cache_folder=str(tmp_path / "cache"))


def prose(seed: int, words: int = 60) -> str:
    return " ".join(np.random.default_rng(seed).choice(WORDS, words))


def write(path: Path, texts: list[str]) -> None:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def read(data: Data, tokenizer: Tokenizer, evaluation: Evaluation | None = None, **options: Any) -> tuple[Plan, set]:
    """The plan, and the documents that it reads in steps that hold all sources once and more."""
    opener = hygiene.cleaning(evaluation or Evaluation())
    corpora = [opener(source, tokenizer, data) for source in data.sources]
    plan = Plan(data, corpora, 512, 4, 30, seed=0, **options)
    assert plan.table is not None
    found = {
        (data.sources[source].name, int(document))
        for step in range(plan.steps)
        for slot in range(4)
        for row in [plan.row(step, slot)]
        for source, document in zip(row.sources, row.documents)
    }
    return plan, found


@pytest.mark.parametrize("length", [1, 2, 3, 8, 13, 32, 37])
def test_runs_have_one_hash_if_they_are_the_same(length: int) -> None:
    tokens = np.random.default_rng(length).integers(0, 3, 400).astype(np.int32)  # few ids: many runs occur twice
    hashes = hygiene.run_hashes(tokens, length)
    runs = [tuple(tokens[i : i + length]) for i in range(len(tokens) - length + 1)]
    assert len(hashes) == len(runs)
    by_hash = dict(zip(hashes.tolist(), runs))
    assert all(by_hash[h] == run for h, run in zip(hashes.tolist(), runs))
    assert len(by_hash) == len(set(runs))
    assert len(hygiene.run_hashes(tokens[: length - 1], length)) == 0
    assert len({hygiene.run_hashes(np.zeros(9, np.int32), n)[0] for n in range(1, 9)}) == 8  # id 0 counts


@pytest.mark.parametrize("chunk", [64, 1000, 4 << 20])
def test_documents_with_runs_against_a_slow_look(tmp_path: Path, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs at the ends of documents, over the ends of chunks, and half in one document and half in the next."""
    monkeypatch.setattr(hygiene, "CHUNK", chunk)
    length = 8
    for seed in range(6):
        random = np.random.default_rng(seed)
        secret = random.integers(0, 50, 300).astype(np.int32)
        documents = [random.integers(0, 50, n).astype(np.int32) for n in random.integers(4, 200, 60)]
        for document in documents[::4]:
            size = int(random.integers(1, length + 4))
            at, source = random.integers(0, len(document)), random.integers(0, len(secret) - size)
            document[at : at + size] = secret[source : source + size][: len(document) - at]
        documents[10][-4:], documents[11][:4] = secret[:4], secret[4:8]  # a run over the end of a document
        offsets = np.cumsum([0, *map(len, documents)])
        corpus = Corpus("x", [(offsets, np.concatenate(documents))], f"f{seed}{chunk}", None)
        wanted = {tuple(secret[i : i + length]) for i in range(len(secret) - length + 1)}
        slow = [any(tuple(d[i : i + length]) in wanted for i in range(len(d) - length + 1)) for d in documents]
        runs = np.unique(hygiene.run_hashes(secret, length))
        assert hygiene.documents_with_runs(corpus, runs, length, tmp_path).tolist() == slow
        assert any(slow) and not all(slow)


@pytest.mark.parametrize("ends", [True, False])
def test_each_text_is_read_once_and_the_copies_are_counted(
    tmp_path: Path, tokenizer: Tokenizer, data: Data, ends: bool
) -> None:
    write(tmp_path / "a.jsonl", [prose(0), prose(1), prose(0), prose(2)])
    write(tmp_path / "b.jsonl", [prose(3), prose(1), prose(4), prose(3), prose(0) + " x"])
    sources = (Source("a", "a.jsonl"), Source("b", "b.jsonl"))
    options = {"sources": sources, "add_bos": ends, "add_eos": ends}
    dirty, clean = Data(**vars(data) | options), Data(**vars(data) | options | {"drop_duplicates": True})
    plan, found = read(dirty, tokenizer)
    assert len(found) == 9 and [documents for documents, _ in copies_kept(plan)] == [1, 2]
    plan, found = read(clean, tokenizer)
    assert found == {("a", 0), ("a", 1), ("a", 3), ("b", 0), ("b", 2), ("b", 4)}
    a, b = (corpus.lengths for corpus in plan.corpora)
    assert [o.copies for o in plan.left_out] == [(1, int(a[2])), (2, int(b[1] + b[3]))]


def test_what_a_source_does_not_read_makes_nothing_a_copy(tmp_path: Path, tokenizer: Tokenizer, data: Data) -> None:
    """One file as two sources, by length; and a source without a weight."""
    write(tmp_path / "a.jsonl", [prose(0), prose(1, 200), prose(2), prose(3, 200)])
    short, long = Source("short", "a.jsonl", max_length=500), Source("long", "a.jsonl", min_length=501)
    unread = Source("unread", "a.jsonl", weight=0)
    _, found = read(Data(**vars(data) | {"sources": (unread, short, long), "drop_duplicates": True}), tokenizer)
    assert {name for name, _ in found} == {"short", "long"} and len(found) == 4
    both = (Source("a", "a.jsonl"), Source("b", "a.jsonl"))
    with pytest.raises(UserError, match=r"'b' has no document left.*4 copies of others \(data.drop_duplicates\)"):
        read(Data(**vars(data) | {"sources": both, "drop_duplicates": True}), tokenizer)


def test_texts_of_the_evaluation_are_left_out_wherever_they_stand(
    tmp_path: Path, tokenizer: Tokenizer, data: Data, caplog: pytest.LogCaptureFixture
) -> None:
    asked = [prose(100 + i, 40) for i in range(6)]
    (tmp_path / "held.txt").write_text(asked[0])
    write(tmp_path / "held.jsonl", [asked[1], "too short"])
    (tmp_path / "squad.json").write_text(json.dumps({"data": [{"paragraphs": [{"context": asked[2]}]}]}, indent=1))
    pq.write_table(pa.table({"question": [asked[3]], "number": [1]}), tmp_path / "held.parquet")
    texts = [f"{prose(i)} {asked[i % 6] if i % 2 else ''} {prose(50 + i)}" for i in range(12)]
    write(tmp_path / "a.jsonl", texts)
    evaluation = Evaluation(texts=("held.txt",), qa_files=("squad.json",))
    options: dict[str, Any] = {"sources": (Source("a", "a.jsonl"),)}
    named = Data(**vars(data) | options | {"decontaminate": ("evaluation", "held.jsonl", "held.parquet")})
    plan, found = read(named, tokenizer, evaluation)
    with_text = {i for i in range(12) if i % 2 and i % 6 in (0, 1, 2, 3)}
    assert {document for _, document in found} == set(range(12)) - with_text
    assert plan.left_out[0].evaluation == (len(with_text), int(plan.corpora[0].lengths[sorted(with_text)].sum()))
    assert "1 of 5 texts have fewer than data.decontaminate_tokens = 32 tokens" in caplog.text
    other, _ = read(Data(**vars(data) | options), tokenizer, evaluation)
    assert other.fingerprint != plan.fingerprint


def test_what_cannot_be_looked_for_is_said(tmp_path: Path, tokenizer: Tokenizer, data: Data) -> None:
    write(tmp_path / "a.jsonl", [prose(0)])
    (tmp_path / "short.txt").write_text("red bird")
    (tmp_path / "broken.jsonl").write_text('{"text": "a"}\n{"text": \n')
    options: dict[str, Any] = {"sources": (Source("a", "a.jsonl"),)}
    for path, message in (
        ("evaluation", "this stage has neither"),
        ("short.txt", "none of the 1 texts in short.txt is as long"),
        ("broken.jsonl", r"broken.jsonl line 2 cannot be read"),
        ("missing.txt", "No file matches the path 'missing.txt' of data source 'data.decontaminate'"),
        ("a.jsonl", "'a' has no document left to read: of 1, 1 with text of the evaluation"),
    ):
        with pytest.raises(UserError, match=message):
            read(Data(**vars(data) | options | {"decontaminate": (path,)}), tokenizer)
