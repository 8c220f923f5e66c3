"""The plan on 10,000 documents of 100 to 500,000 tokens: ledger, shares in every window, splits and padding, resume."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.unit.conftest import DOMAINS, domain_data, expected_tokens
from torchtitan.components.changes import changed_inputs
from torchtitan.config.data_schema import Data, Source
from torchtitan.config.keys import keys_of
from torchtitan.datasets import table_files
from torchtitan.datasets.corpus import Corpus
from torchtitan.datasets.plan import Plan
from torchtitan.datasets.row_table import PADDING_SEGMENT
from torchtitan.tools.errors import UserError

SEQ_LEN = 32768
ROWS_PER_STEP = 16
Domains = dict[str, Corpus]


def make_plan(domains: Domains, data: Data | None = None, **changes: Any) -> Plan:
    arguments = {"seq_len": SEQ_LEN, "rows_per_step": ROWS_PER_STEP, "steps": 50, "seed": 5} | changes
    return Plan(data or domain_data(), list(domains.values()), **arguments)


def fill(plan: Plan) -> np.ndarray:
    """int64[R], tokens of each row."""
    return np.add.reduceat(plan.table.length, plan.table.offsets[:-1], dtype=np.int64)


def splits_of_documents_that_fit(plan: Plan) -> int:
    """Parts of documents shorter than a row that do not reach the document's end."""
    t = plan.table
    whole = np.concatenate([c.lengths for c in plan.corpora])
    first = np.cumsum([0] + [len(c) for c in plan.corpora])
    length = whole[first[t.source] + t.document]
    return int(((length <= plan.seq_len) & (t.start + t.length < length)).sum())


@pytest.mark.parametrize("packing", ["best_fit", "concat", "single"])
def test_ledger_each_token_of_a_finished_epoch_once_and_in_order(domains: Domains, packing: str) -> None:
    """Over every epoch of every source that the stage finishes; what is read is what the corpus holds."""
    steps = 300 if packing != "single" else 1000
    plan = make_plan(domains, domain_data(packing=packing), steps=steps)
    t = plan.table
    finished = 0
    for source, corpus in enumerate(plan.corpora):
        mine = t.source == source
        for epoch in range(t.epoch[mine].max() + 1):
            now = mine & (t.epoch == epoch)
            # parts of a document follow each other from its beginning, in the order in which they are read
            order = np.argsort(t.document[now], kind="stable")
            document, start, length = (c[now][order] for c in (t.document, t.start, t.length))
            is_first = np.append(True, document[1:] != document[:-1])
            assert (start[is_first] == 0).all()
            assert (start[1:][~is_first[1:]] == (start + length)[:-1][~is_first[1:]]).all()
            read = np.bincount(document, length, len(corpus))
            assert (read <= corpus.lengths).all()
            if (t.epoch[mine] > epoch + 1).any():  # an epoch on, none of this one still waits
                assert (read == corpus.lengths).all()
                finished += 1
    assert finished >= (4 if packing != "single" else 1)


@pytest.mark.parametrize("packing", ["best_fit", "concat"])
def test_tokens_read_are_the_documents(domains: Domains, packing: str) -> None:
    plan = make_plan(domains, domain_data(packing=packing))
    for step in range(plan.steps):
        for slot in range(ROWS_PER_STEP):
            row = plan.row(step, slot)
            tokens = plan.tokens(row)
            assert tokens.dtype == np.int32 and len(tokens) == row.lengths.sum() <= SEQ_LEN
            document = np.repeat(row.documents, row.lengths)
            place = np.concatenate([np.arange(a, a + n) for a, n in zip(row.starts, row.lengths)])
            assert (tokens == expected_tokens(document, place)).all()


STRATEGIES: dict[str, dict[str, Any]] = {
    "original": {},
    "cut_4k": {"strategy": "cut_4k"},
    "per source": {"strategy": "per_source_upsampling", "long_share": 0.9},
    "global": {"strategy": "global_upsampling", "long_share": 0.9},
    "domain": {"strategy": "domain_upsampling", "upsampled_sources": ("books", "wiki")},
    "concat": {"packing": "concat"},
    "single": {"packing": "single"},
    "chunks": {"books__chunk_length": 8192, "web__upsample": 4.0, "wiki__min_length": 500},
    "truncate": {f"{name}__long_document": "truncate" for name in DOMAINS},
}


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("seq_len, rows_per_step", [(SEQ_LEN, 16), (8192, 8), (131072, 32)])
def test_shares_hold_within_half_a_percent_in_every_window_of_100_steps(
    domains: Domains, name: str, seq_len: int, rows_per_step: int
) -> None:
    """Shares of the tokens in rows, by source and by long and short documents, in every window and not just in all."""
    plan = make_plan(domains, domain_data(**STRATEGIES[name]), seq_len=seq_len, rows_per_step=rows_per_step, steps=350)
    t = plan.table
    step = np.repeat(np.arange(len(t)) // rows_per_step, np.diff(t.offsets))
    is_long = np.concatenate([c.lengths > 4096 for c in plan.corpora])
    first = np.cumsum([0] + [len(c) for c in plan.corpora])
    long = is_long[first[t.source] + t.document]
    worst = 0.0
    for source in range(4):
        streams = [s for s in plan.streams if s.source == source]
        for kind in ("all", "long", "short"):
            asked = sum(s.share for s in streams) if kind == "all" else sum(s.share for s in streams if s.kind == kind)
            if kind != "all" and len(streams) == 1:
                continue
            mine = (t.source == source) & (True if kind == "all" else long == (kind == "long"))
            tokens = np.bincount(step, t.length * mine, plan.steps)
            every = np.bincount(step, t.length, plan.steps)
            window = np.ones(100)
            got = np.convolve(tokens, window, "valid") / np.convolve(every, window, "valid")
            tokens_in_window = np.convolve(every, window, "valid").min()
            worst = max(worst, float(np.abs(got - asked).max()))
    # What is no small part of a hundred steps' tokens cannot be in the right place: with one piece a row, a piece of a
    # whole row; with concat, the longest documents, which are not cut before they are laid out.
    grain = {"single": seq_len, "concat": 500_000}.get(name, 0)
    assert worst <= 0.005 + 0.6 * grain / tokens_in_window
    if name == "cut_4k":
        assert t.length.max() == 4096
    if name == "chunks":
        assert t.length[t.source == 0].max() == 8192


def test_best_fit_splits_less_than_concat_and_pads_little(domains: Domains) -> None:
    best, concat = (make_plan(domains, domain_data(packing=how), steps=200) for how in ("best_fit", "concat"))
    assert splits_of_documents_that_fit(concat) > 1000
    assert splits_of_documents_that_fit(best) <= 0.1 * splits_of_documents_that_fit(concat)
    assert 1 - fill(best).mean() / SEQ_LEN < 0.01
    assert (fill(concat) == SEQ_LEN).all()


def test_a_longer_plan_begins_the_same_and_has_the_same_fingerprint(domains: Domains) -> None:
    for packing in ("best_fit", "concat", "single"):
        data = domain_data(packing=packing, strategy="per_source_upsampling")
        short, long = make_plan(domains, data, steps=10), make_plan(domains, data, steps=60)
        assert short.fingerprint == long.fingerprint
        parts = short.table.offsets[-1]
        assert (short.table.offsets == long.table.offsets[: 10 * ROWS_PER_STEP + 1]).all()
        for column in ("source", "document", "epoch", "start", "length"):
            assert (getattr(short.table, column) == getattr(long.table, column)[:parts]).all()
        with pytest.raises(IndexError):
            short.row(10, 0)
        with pytest.raises(IndexError):
            short.row(0, ROWS_PER_STEP)


@pytest.mark.parametrize("packing", ["best_fit", "single"])
def test_a_longer_plan_begins_the_same_where_no_row_is_full(packing: str) -> None:
    """Neither may a fuller row far ahead change the order of the first ones."""
    for seed in range(20):
        random = np.random.default_rng(seed)
        lengths = [random.integers(600, 1000, 300), np.append(random.integers(500, 700, 2000), [1000])]
        corpora = [
            Corpus(str(i), [(np.concatenate([[0], np.cumsum(n)]), np.zeros(0, np.int32))], str(i), None)
            for i, n in enumerate(lengths)
        ]
        data = Data(sources=(Source("a", "a", 1.0), Source("b", "b", 2.0)), packing=packing)  # type: ignore[arg-type]
        short, long = (Plan(data, corpora, 1024, 4, steps, seed) for steps in (20, 400))
        assert (short.table.offsets == long.table.offsets[:81]).all()
        assert (short.table.document == long.table.document[: short.table.offsets[-1]]).all()


def test_rows_do_not_depend_on_how_many_make_a_step(domains: Domains) -> None:
    one, other = make_plan(domains), make_plan(domains, rows_per_step=8, steps=100)
    for index in range(0, 800, 37):
        a, b = one.row(*divmod(index, 16)), other.row(*divmod(index, 8))
        assert (one.tokens(a) == other.tokens(b)).all()


def test_long_documents_are_spread_over_the_epoch(domains: Domains) -> None:
    """Otherwise a model would read one document for many steps on end."""
    plan = make_plan(domains, steps=250)
    t = plan.table
    row = np.repeat(np.arange(len(t)), np.diff(t.offsets))
    longest = int(np.argmax(plan.corpora[0].lengths))
    rows = row[(t.source == 0) & (t.document == longest) & (t.epoch == 0)]
    assert len(rows) >= 4
    assert np.median(np.diff(rows)) > 30


@pytest.mark.parametrize("cross", [False, True])
def test_work_counts_the_pairs_that_the_mask_allows(domains: Domains, cross: bool) -> None:
    plan = make_plan(domains, domain_data(packing="single", cross_document_attention=cross), steps=3)
    for step in range(3):
        for slot in range(ROWS_PER_STEP):
            tokens = int(plan.row(step, slot).lengths.sum())
            padding = SEQ_LEN - tokens
            segments = [tokens] + [PADDING_SEGMENT] * (padding // PADDING_SEGMENT) + [padding % PADDING_SEGMENT]
            assert plan.work(step)[slot] == sum(n * (n + 1) // 2 for n in segments)
    plan = make_plan(domains, domain_data(cross_document_attention=cross), steps=2)
    row = plan.row(1, 3)
    parts = [int(row.lengths.sum())] if cross else row.lengths.tolist()
    parts.append(SEQ_LEN - int(row.lengths.sum()))
    assert parts[-1] < PADDING_SEGMENT
    assert plan.work(1)[3] == sum(n * (n + 1) // 2 for n in parts)


def test_a_separator_follows_every_document(domains: Domains) -> None:
    separators = [(7, 8, 9), (), (11,), ()]
    for packing in ("best_fit", "concat"):
        plan = make_plan(domains, domain_data(packing=packing), separators=separators, steps=100)
        seen: Counter[int] = Counter()
        for slot in range(100 * ROWS_PER_STEP):
            row = plan.row(*divmod(slot, ROWS_PER_STEP))
            tokens = np.split(plan.tokens(row), np.cumsum(row.lengths)[:-1])
            for source, document, start, part in zip(row.sources, row.documents, row.starts, tokens):
                length = plan.corpora[source].lengths[document]
                place = np.arange(start, start + len(part))
                inside = place < length
                assert (part[inside] == expected_tokens(document, place[inside])).all()
                assert tuple(part[~inside]) == tuple(separators[source][i - length] for i in place[~inside])
                seen[int(source)] += int((~inside).sum())
        assert seen[0] and seen[2] and not seen[1] and not seen[3]


def test_the_table_is_kept_and_found_again(domains: Domains, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make_plan(domains, cache=tmp_path)
    monkeypatch.setattr("torchtitan.datasets.plan.write_table", None)  # may not be called again
    found = make_plan(domains, cache=tmp_path)
    memory = make_plan_without_cache(domains, monkeypatch)
    for column in ("offsets", "source", "document", "epoch", "start", "length", "work"):
        assert (getattr(made.table, column) == getattr(found.table, column)).all()
        assert (getattr(made.table, column) == getattr(memory.table, column)).all()
    assert [p.name for p in (tmp_path / "plans").iterdir() if not p.name.startswith(".")] == [
        f"{made.fingerprint}-{50 * ROWS_PER_STEP}"
    ]
    column = next((tmp_path / "plans").glob("*/length.npy"))
    column.write_bytes(column.read_bytes()[:100])
    with pytest.raises(UserError, match=f"{made.fingerprint}.*damaged.*delete"):
        make_plan(domains, cache=tmp_path)


def make_plan_without_cache(domains: Domains, monkeypatch: pytest.MonkeyPatch) -> Plan:
    monkeypatch.undo()
    return make_plan(domains)


def test_a_full_disk_leaves_no_half_plan(domains: Domains, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    append, calls = table_files._Column.append, []

    def fails(column: Any, values: Any) -> None:
        calls.append(column.path)
        if len(calls) == 30:
            raise OSError(28, "No space left on device")
        append(column, values)

    monkeypatch.setattr(table_files._Column, "append", fails)
    with pytest.raises(UserError, match="No space left"):
        make_plan(domains, cache=tmp_path)
    assert not [p for p in (tmp_path / "plans").iterdir() if p.is_dir()]
    monkeypatch.undo()
    calls[0].parent.mkdir()  # as a run leaves it that is killed
    (calls[0].parent / "old.npy").touch()
    make_plan(domains, cache=tmp_path)
    (folder,) = [p for p in (tmp_path / "plans").iterdir() if p.is_dir()]
    assert not folder.name.endswith(".partial") and not (folder / "old.npy").exists()


CHANGES: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "a threshold that is read": (
        {},
        {"strategy": "per_source_upsampling", "long_threshold": 5000},
        "data.long_threshold None -> 5000",
    ),
    "seed": ({"seed": 6}, {}, "training.seed 5 -> 6"),
    "seq_len": ({"seq_len": 4096}, {}, "training.seq_len 32768 -> 4096"),
    "rows": ({"rows_per_step": 4}, {}, "rows_per_step 16 -> 4"),
    "weights": ({}, {"weights": (0.3, 0.3, 0.25, 0.15)}, "source books: share 0.35 -> 0.3"),
    "packing": ({}, {"packing": "concat"}, "data.packing best_fit -> concat"),
    "strategy": ({}, {"strategy": "cut_4k"}, "data.strategy original -> cut_4k"),
    "positions": ({}, {"positions": "continue"}, "data.positions reset -> continue"),
    "attention": ({}, {"cross_document_attention": True}, "data.cross_document_attention False -> True"),
    "an option": ({}, {"wiki__min_length": 200}, "source wiki: min_length None -> 200"),
    "separators": ({"separators": [(1,), (), (), ()]}, {}, "source books: separator None -> [1]"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_resume_names_what_changed(domains: Domains, name: str) -> None:
    arguments, options, words = CHANGES[name]
    saved = json.loads(json.dumps(make_plan(domains).inputs))  # as a checkpoint keeps it
    assert changed_inputs(saved, make_plan(domains, steps=100).inputs) == []
    changed = make_plan(domains, domain_data(**options), **arguments)
    assert changed.fingerprint != make_plan(domains).fingerprint
    assert words in changed_inputs(saved, changed.inputs)


def test_a_checkpoint_from_before_a_key_is_resumed(domains: Domains) -> None:
    """A key of [data] that an older version did not have stood at its default."""
    inputs = make_plan(domains).inputs
    keys = [key for key in inputs if key in keys_of(Data)]
    assert len(keys) > 3
    for key in keys:
        older = {name: value for name, value in inputs.items() if name != key}
        default = getattr(Data(), key)
        assert (changed_inputs(older, inputs) == []) == (inputs[key] == default), key


def test_resume_names_changed_documents_and_sources(domains: Domains) -> None:
    saved = make_plan(domains).inputs
    other = domains | {"web": domains["wiki"]}
    assert changed_inputs(saved, make_plan(other).inputs) == ["source web: its documents (corpus web -> wiki)"]
    fewer = dict(list(domains.items())[:3])
    data = domain_data()
    plan = make_plan(fewer, Data(sources=data.sources[:3]))
    assert any(
        "[books, code, web, wiki] -> [books, code, web]" in change for change in changed_inputs(saved, plan.inputs)
    )
    old = {key: value for key, value in saved.items() if key not in ("strategy", "random_numbers")} | {"format": 1}
    assert changed_inputs(old, make_plan(domains).inputs)[0].startswith("format 1 -> 3 of the data plan (this version")


def test_what_does_not_change_the_batches_does_not_change_the_fingerprint(domains: Domains) -> None:
    data = domain_data(
        weights=(7, 5, 5, 3), num_workers=7, cache_folder="elsewhere", folder="/data", books__max_epochs=99.0
    )
    assert make_plan(domains, data).fingerprint == make_plan(domains).fingerprint
    data = domain_data(weights=(0.7, 0.5, 0.5, 0.3), long_threshold=1, long_share=0.1, upsampled_weight=0.1)
    assert make_plan(domains, data).fingerprint == make_plan(domains).fingerprint


def test_describe_names_the_documents(domains: Domains) -> None:
    plan = make_plan(domains)
    for slot in range(8):
        row, text = plan.row(7, slot), plan.describe(7, slot)
        first = f"{plan.names[row.sources[0]]} {row.documents[0]}[{row.starts[0]}:{row.starts[0] + row.lengths[0]}]"
        assert first in text and f"(epoch {row.epochs[0]})" in text


def test_a_source_of_weight_0_is_never_read(domains: Domains) -> None:
    plan = make_plan(domains, domain_data(weights=(1, 0, 1, 0)))
    assert set(np.unique(plan.table.source)) == {0, 2}


def test_a_source_smaller_than_a_row_is_repeated(domains: Domains) -> None:
    tiny = Corpus("tiny", [(np.array([0, 5, 12]), np.arange(12, dtype=np.int32))], "tiny", None)
    plan = make_plan(domains | {"wiki": tiny}, steps=4)
    assert plan.table.epoch[plan.table.source == 3].max() > 100


def test_too_many_epochs(domains: Domains) -> None:
    with pytest.raises(UserError, match="'wiki'.*max_epochs = 0.1"):
        make_plan(domains, domain_data(wiki__max_epochs=0.1))
    # rows that are mostly padding read little
    plan = make_plan(domains, domain_data(packing="single", web__max_epochs=0.3), steps=20)
    assert 0.02 < plan.tokens_of(plan.streams[2]) / domains["web"].tokens < 0.3
