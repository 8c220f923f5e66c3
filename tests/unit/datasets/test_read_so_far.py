"""What a chain has read, by plans of random stages, against a ledger that counts every token."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from torchtitan.config.data_schema import Data, Source
from torchtitan.datasets.corpus import Corpus
from torchtitan.datasets.plan import Plan
from torchtitan.datasets.read_so_far import ReadSoFar, from_file, read_until, to_bytes
from torchtitan.extensions.planner.overlap import chain_numbers
from torchtitan.tools.errors import UserError


def corpus_of(name: str, lengths: np.ndarray) -> Corpus:
    ends = np.concatenate([[0], np.cumsum(lengths)])
    return Corpus(name, [(ends, np.ones(ends[-1], np.int32))], name, None)


def plan_of(data: Data, corpora: list[Corpus], before: ReadSoFar, **options: Any) -> Plan:
    return Plan(data, corpora, read=[before.now(corpus) for corpus in corpora], **options)


class Ledger:
    """How often each token was read: an array per document, filled part by part."""

    def __init__(self, corpora: list[Corpus]) -> None:
        self.counts = {c.fingerprint: [np.zeros(n, np.int64) for n in c.lengths] for c in corpora}

    def add(self, plan: Plan) -> list[tuple[int, int, int, int]]:
        """Per source: its tokens in rows (and those that are no separator, in rows left out too), those that the ledger
        had when the plan began, those of documents of which it had any."""
        had = {key: [count.copy() for count in counts] for key, counts in self.counts.items()}
        numbers = [[0, 0, 0, 0] for _ in plan.corpora]
        for step in range(plan.first_step, plan.steps):
            for slot in range(plan.rows_per_step):
                row = plan.row(step, slot)
                for source, document, start, length in zip(row.sources, row.documents, row.starts, row.lengths):
                    key = plan.corpora[source].fingerprint
                    place = slice(start, start + length)
                    self.counts[key][document][place] += 1
                    before = had[key][document]
                    new = (length, len(before[place]), (before[place] > 0).sum(), length * before.any())
                    numbers[source] = [int(a + b) for a, b in zip(numbers[source], new)]
        for _, _, stream, document, _, start, length in plan.table.unlabelled:  # they count as read
            source = plan.streams[stream].source
            count = self.counts[plan.corpora[source].fingerprint][document]
            count[start : start + length] += 1
            numbers[source][1] += len(count[start : start + length])
        return [tuple(n) for n in numbers]  # type: ignore[misc]


def random_stage(random: np.random.Generator, names: list[str]) -> tuple[Data, dict[str, Any]]:
    chosen = random.permutation(len(names))[: random.integers(1, len(names) + 1)]
    packing = str(random.choice(["best_fit", "concat", "single"]))
    data = Data(
        sources=tuple(Source(names[i], "p", float(random.uniform(0.1, 1))) for i in chosen),
        packing=packing,  # type: ignore[arg-type]
    )
    options = {
        "seq_len": int(random.choice([64, 128, 256])),
        "rows_per_step": int(random.integers(1, 6)),
        "steps": int(random.integers(3, 30)),
        "seed": int(random.integers(3)),
    }
    return data, options


@pytest.mark.parametrize("trial", range(24))
def test_every_token_once_an_epoch_over_stages_of_other_weights_lengths_and_packing(trial: int, tmp_path: Path) -> None:
    random = np.random.default_rng(trial)
    names = ["a", "b", "c"]
    every = {name: corpus_of(name, random.integers(1, 400, random.integers(20, 80))) for name in names}
    ledger, before = Ledger(list(every.values())), ReadSoFar()
    separated = trial % 3 == 0
    for _ in range(4):
        data, options = random_stage(random, names)
        corpora = [every[source.name] for source in data.sources]
        if separated:
            options["separators"] = [(7, 7)] * len(corpora)
        plan = plan_of(data, corpora, before, **options)
        counted = ledger.add(plan)
        after = read_until(before, plan, plan.steps)
        for source, (tokens, text, again, begun) in enumerate(counted):
            numbers = chain_numbers(plan, source, before, after)
            assert numbers["overlap"] == pytest.approx(again / max(1, tokens))
            assert numbers["overlap_documents"] == pytest.approx(begun / max(1, tokens))
            corpus = corpora[source]
            counts = np.concatenate(ledger.counts[corpus.fingerprint])
            assert numbers["epochs_after"] == pytest.approx(counts.sum() / corpus.tokens)
            assert numbers["epochs_after"] - numbers["epochs_before"] == pytest.approx(text / corpus.tokens)
            assert counts.max() - counts.min() <= 1, (trial, corpus.fingerprint)
            assert again == 0 or counts.sum() > corpus.tokens, "nothing twice before all was read"
        for name, known in after.corpora.items():
            counts_of = ledger.counts[name]
            ever = [int((count > 0).sum()) for count in counts_of]
            assert after.ever(every[name]).tolist() == ever
            epoch = min(int(count.min()) for count in counts_of)
            now = known.now.of(every[name].lengths)
            full = bool((now == every[name].lengths).all())
            assert full or now.tolist() == [int((count > epoch).sum()) for count in counts_of]
        before = from_file_of(tmp_path, after)
        same(before, after)


def same(one: ReadSoFar, other: ReadSoFar) -> None:
    assert list(one.corpora) == list(other.corpora)
    for a, b in zip(one.corpora.values(), other.corpora.values()):
        assert (a.name, a.tokens, a.tokens_read) == (b.name, b.tokens, b.tokens_read)
        for of_a, of_b in ((a.now, b.now), (a.ever, b.ever)):
            assert all(np.array_equal(getattr(of_a, f), getattr(of_b, f)) for f in ("whole", "documents", "tokens"))


def test_in_the_middle_of_a_stage_too() -> None:
    """The state at any step is that of a plan of so many steps."""
    corpora = [corpus_of("a", np.arange(1, 90)), corpus_of("b", np.arange(1, 60))]
    data = Data(sources=(Source("a", "a", 0.7), Source("b", "b", 0.3)))
    options: dict[str, Any] = {"seq_len": 64, "rows_per_step": 4, "seed": 1}
    plan = plan_of(data, corpora, ReadSoFar(), steps=40, **options)
    for step in (0, 1, 7, 39):
        ledger = Ledger(corpora)
        if step:
            ledger.add(plan_of(data, corpora, ReadSoFar(), steps=step, **options))
        state = read_until(ReadSoFar(), plan, step)
        for corpus in corpora:
            assert state.ever(corpus).tolist() == [
                int((count > 0).sum()) for count in ledger.counts[corpus.fingerprint]
            ]
            assert state.epochs(corpus) == sum(map(np.sum, ledger.counts[corpus.fingerprint])) / corpus.tokens


def test_two_sources_over_one_corpus_share_its_state() -> None:
    """As short and long documents; the next stage reads them as one source."""
    corpus = corpus_of("a", np.arange(1, 130))
    short, long = Source("short", "a", 0.5, max_length=60), Source("long", "a", 0.5, min_length=61)
    options: dict[str, Any] = {"seq_len": 128, "rows_per_step": 2, "seed": 0}
    plan = plan_of(Data(sources=(short, long)), [corpus, corpus], ReadSoFar(), steps=20, **options)
    ledger = Ledger([corpus])
    ledger.add(plan)
    state = read_until(ReadSoFar(), plan, 20)
    assert list(state.corpora) == ["a"]
    counts = ledger.counts["a"]
    assert state.ever(corpus).tolist() == [int((count > 0).sum()) for count in counts]
    assert max(int(count.max()) for count in counts[:60]) == 2, "the short ones are in their second epoch"
    now = state.now(corpus)
    assert now is not None
    assert now.tolist() == [int((count > (len(count) <= 60)).sum()) for count in counts]
    # all is read that is left, before anything is read again
    rest = int(sum((count == 0).sum() for count in counts))
    plan = plan_of(
        Data(sources=(Source("all", "a"),)), [corpus], state, steps=1, **options | {"rows_per_step": rest // 128}
    )
    ledger.add(plan)
    assert max(int(count.max()) for count in counts[60:]) == 1


def test_the_order_can_begin_anew() -> None:
    """What was read is still known."""
    corpus = corpus_of("a", np.arange(1, 90))
    plan = plan_of(
        Data(sources=(Source("a", "a"),)), [corpus], ReadSoFar(), seq_len=64, rows_per_step=4, steps=9, seed=1
    )
    state = read_until(ReadSoFar(), plan, 9)
    anew = state.in_new_epochs()
    assert state.now(corpus) is not None and anew.now(corpus) is None
    assert anew.epochs(corpus) == state.epochs(corpus) and (anew.ever(corpus) == state.ever(corpus)).all()


def test_files_of_other_versions_and_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "data_read.npz"
    about = json.dumps({"format": 2, "corpora": []}).encode()
    np.savez(path, about=np.frombuffer(about, np.uint8))
    for content in (path.read_bytes(), b"", b"PK\x03\x04", to_bytes(ReadSoFar())[:-9]):
        path.write_bytes(content)
        with pytest.raises(UserError, match="data_read.npz"):
            from_file(path)
    assert from_file_of(tmp_path, ReadSoFar()).corpora == {}


def from_file_of(folder: Path, read: ReadSoFar) -> ReadSoFar:
    (folder / "read.npz").write_bytes(to_bytes(read))
    return from_file(folder / "read.npz")
