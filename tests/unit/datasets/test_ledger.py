"""Random chains of stages, read as training reads them and counted in a dictionary of tokens.

Each token of a corpus is a number of its own, so that a batch says which places of which documents it holds. What may
be read, and how often, follows from docs/data.md; nothing here looks at how rows are made.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

from torchtitan.config.data_schema import Data, Point, Source
from torchtitan.datasets.batch import PADDING_SOURCE, PackedBatch
from torchtitan.datasets.corpus import ASSISTANT, Corpus
from torchtitan.datasets.loader import build_loader
from torchtitan.datasets.plan import Plan
from torchtitan.tools.constants import IGNORED_LABEL
from torchtitan.tools.errors import UserError

SEPARATORS = 1 << 30
"""Ids from here on are separators: 8 for each source."""

CASES = int(os.environ.get("LEDGER_CASES", "48"))
FIRST = int(os.environ.get("LEDGER_FIRST", "0"))


@dataclass(frozen=True)
class Text:
    """A corpus whose tokens are base, base + 1, ... in all its documents, one behind the other."""

    corpus: Corpus
    base: int
    bounds: np.ndarray  # int64[documents + 1], relative to base
    document: np.ndarray  # int64[tokens]
    is_trained: np.ndarray  # bool[tokens]

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.bounds)


def make_text(name: str, lengths: np.ndarray, base: int, trained: np.ndarray | None = None) -> Text:
    bounds = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    ids = np.arange(base, base + bounds[-1], dtype=np.int32)
    roles = None if trained is None else [np.where(trained, ASSISTANT, 0).astype(np.int8)]
    corpus = Corpus(name, [(bounds, ids)], name, None, roles)
    is_trained = np.ones(len(ids), bool) if trained is None else trained
    return Text(corpus, base, bounds, np.repeat(np.arange(len(lengths)), lengths), is_trained)


@dataclass
class Stream:
    source: int
    tokens: np.ndarray
    """bool[tokens of the corpus]: an epoch."""

    documents: np.ndarray
    """bool[documents]"""

    part: int
    """Of length_shares, or 0."""


def streams_of(data: Data, texts: Sequence[Text], seq_len: int) -> list[Stream]:
    """What each source may read, by its options: an own reading of docs/data.md."""
    found = []
    for i, (source, text) in enumerate(zip(data.sources, texts)):
        if not any(p.weight for p in source.schedule) and not (source.weight and not has_weights(source)):
            continue
        lengths = text.lengths
        bound = min(source.chunk_length or seq_len, seq_len)
        may = (lengths > 0) & (lengths >= source.min_length)
        if source.max_length is not None:
            may &= lengths <= source.max_length
        if source.max_documents is not None:
            may[source.max_documents :] = False
        if source.long_document == "drop":
            may &= lengths <= bound
        place = np.arange(len(text.document)) - text.bounds[text.document]
        limit = bound if source.long_document == "truncate" else int(lengths.max())
        edges = [-1, *source.length_bins, 1 << 60]
        for part, (over, up_to) in enumerate(zip(edges, edges[1:])):
            if source.length_bins and not any(s[part] for s in all_length_shares(source)):
                continue
            documents = may & (lengths > over) & (lengths <= up_to)
            tokens = documents[text.document] & (place < limit)
            found.append(Stream(i, tokens, documents, part))
    return found


def has_weights(source: Source) -> bool:
    return any(p.weight is not None for p in source.schedule)


def all_length_shares(source: Source) -> list[tuple[float, ...]]:
    return [p.length_shares for p in source.schedule if p.length_shares] or [source.length_shares]


def share_at(data: Data, stream: Stream, step: float) -> float:
    def between(points: list[tuple[int, float]], otherwise: float) -> float:
        return float(np.interp(step, *zip(*sorted(points)))) if points else otherwise

    weights = [
        between([(p.step, p.weight) for p in s.schedule if p.weight is not None], s.weight) for s in data.sources
    ]
    source = data.sources[stream.source]
    share = weights[stream.source] / sum(weights)
    if source.length_bins:
        points = [(p.step, p.length_shares[stream.part]) for p in source.schedule if p.length_shares]
        share *= between(points, source.length_shares[stream.part] if source.length_shares else 0.0)
    return share


Part = tuple[int, int, int, int]
"""Source, document, first place, tokens of the document (separators not counted)."""


class Ledger:
    """Counts what a chain reads. read: of each source bool[tokens], what the epoch under way has read."""

    def __init__(self, texts: Sequence[Text]) -> None:
        self.texts = texts
        self.read = [np.zeros(len(text.document), bool) for text in texts]
        self.twice = self.epochs = 0
        self.furthest = 0.0

    def begin(self, data: Data, seq_len: int, separators: Sequence[Sequence[int]], first_step: int) -> None:
        """A plan."""
        self.data, self.seq_len, self.separators, self.step = data, seq_len, separators, first_step
        self.streams = streams_of(data, self.texts, seq_len)
        self.passed = [self._begun(s) for s in self.streams]

    def _begun(self, stream: Stream) -> np.ndarray:
        """bool[tokens]: of an epoch's conversations, those begun before, which are never read on in their middle."""
        text, read = self.texts[stream.source], self.read[stream.source]
        begun = np.bincount(text.document[read], minlength=len(stream.documents)) > 0
        return stream.tokens & begun[text.document] & text.corpus.has_roles

    def parts(self, row: np.ndarray, labels: np.ndarray, ends: np.ndarray, sources: np.ndarray) -> list[Part]:
        """Of a row; asserts that it is whole pieces of text with the right labels."""
        found, in_padding = [], False
        for begin, end, source in zip(np.append(0, ends), ends, sources):
            ids, begin_labels = row[begin:end], labels[begin:end]
            assert len(ids)
            if source == PADDING_SOURCE:
                in_padding = True
                assert not ids.any() and (begin_labels == IGNORED_LABEL).all()
                continue
            assert not in_padding
            text = self.texts[source]
            words = int((ids < SEPARATORS).sum())
            places = ids[:words] - text.base
            tail = ids[words:] - SEPARATORS - 8 * source
            assert (tail == (tail[0] if len(tail) else 0) + np.arange(len(tail))).all()
            assert not len(tail) or tail[-1] < len(self.separators[source])
            trained = np.ones(len(ids), bool)
            if words:
                document = int(text.document[places[0]])
                assert (places == places[0] + np.arange(words)).all(), places
                assert places[-1] < text.bounds[document + 1]
                if len(tail):
                    assert places[-1] == text.bounds[document + 1] - 1 and tail[0] == 0
                trained[:words] = text.is_trained[places]
                found.append((int(source), document, int(places[0] - text.bounds[document]), words))
            trained[words:] = not text.corpus.has_roles
            expected = np.append(np.where(trained, ids, IGNORED_LABEL)[1:], IGNORED_LABEL)
            assert (begin_labels == expected).all()
        return found

    def add_step(self, rows: list[list[Part]], left_out: list[Part]) -> None:
        """A step's rows, in any order; left_out: parts that were left out before or in it."""
        counts = [np.zeros(len(text.document), np.int64) for text in self.texts]
        for row in rows:
            self._check_copies(row)
        for source, document, start, length in [part for row in [*rows, left_out] for part in row]:
            begin = self.texts[source].bounds[document] + start
            counts[source][begin : begin + length] += 1
        known = [np.zeros(len(text.document), bool) for text in self.texts]
        for s, stream in enumerate(self.streams):
            known[stream.source] |= stream.tokens
            self._add(s, stream, counts[stream.source])
        for count, may in zip(counts, known):
            assert not count[~may].any(), "read what is left out"
        self.step += 1

    def _add(self, s: int, stream: Stream, counts: np.ndarray) -> None:
        counts, read = counts * stream.tokens, self.read[stream.source]
        mine = stream.documents[self.texts[stream.source].document]
        if (counts * (read | self.passed[s]) > 0).any() or counts.max(initial=0) > 1:  # a new epoch
            counts = counts - (stream.tokens & ~read & ~self.passed[s])
            assert counts.min() >= 0, f"stream {s}: an epoch began before the last was read"
            self.passed[s] = np.zeros(len(mine), bool)
            whole = int(counts[stream.tokens].min())
            self.epochs += 1 + whole
            counts = counts - whole * stream.tokens
            assert counts.max() <= 1, f"stream {s}: a token was read twice in an epoch"
            read[mine] = False
            if not counts.any():
                read[mine] = stream.tokens[mine]
        read |= counts > 0
        text = self.texts[stream.source]
        begins = text.bounds[:-1][text.lengths > 0]
        runs = np.add.reduceat(read.astype(np.int64), begins)
        place = np.arange(len(read)) - text.bounds[text.document]
        length = np.zeros(len(text.lengths), np.int64)
        length[text.lengths > 0] = runs
        assert (read == (place < length[text.document])).all(), "what was read is not a beginning"

    def _check_copies(self, row: list[Part]) -> None:
        ends: dict[tuple[int, int], int] = {}
        for source, document, start, length in row:
            if ends.get((source, document), start) != start:
                stream = next(s for s in self.streams if s.source == source and s.documents[document])
                at = [self.step - 130, self.step, self.step + 1, self.step + 130, *[p.step for p in self.all_points()]]
                assert max(share_at(self.data, stream, x) for x in at) * self.seq_len > stream.tokens.sum(), row
                self.twice += 1
            ends[source, document] = start + length

    def all_points(self) -> list[Point]:
        return [p for source in self.data.sources for p in source.schedule]


def rows_in(batch: PackedBatch, seq_len: int) -> list[tuple[np.ndarray, ...]]:
    """(tokens, labels, ends, sources) of each row of a micro-batch."""
    tokens, labels = batch.tokens.numpy(), batch.labels.numpy()
    ends, sources = batch.cu_documents.numpy()[1:], batch.source.numpy()
    assert set(range(seq_len, len(tokens) + 1, seq_len)) <= set(ends.tolist())
    rows = []
    for begin in range(0, len(tokens), seq_len):
        which = (ends > begin) & (ends <= begin + seq_len)
        span = slice(begin, begin + seq_len)
        rows.append((tokens[span], labels[span], ends[which] - begin, sources[which]))
    return rows


def read_steps(plan: Plan, random: np.random.Generator, begin: int, end: int) -> list[list[tuple[np.ndarray, ...]]]:
    """The rows of steps begin to end - 1, from the loaders of all ranks, which are begun anew here and there."""
    steps: list[list[tuple[np.ndarray, ...]]] = []
    while begin < end:
        stop = end if random.random() < 0.5 else int(random.integers(begin, end)) + 1
        dp, batch = random.choice(divisors(plan.rows_per_step)), 1
        batch = int(random.choice(divisors(plan.rows_per_step // int(dp))))
        made: list[list[tuple[np.ndarray, ...]]] = [[] for _ in range(stop - begin)]
        for rank in range(int(dp)):
            loader = iter(build_loader(plan, rank, int(dp), batch, start_step=begin, num_workers=0))
            for step in range(stop - begin):
                for _ in range(plan.rows_per_step // (int(dp) * batch)):
                    made[step] += rows_in(next(loader), plan.seq_len)
            if stop == plan.steps:
                assert next(loader, None) is None
        steps += made
        begin = stop
    return steps


def divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def random_lengths(random: np.random.Generator, seq_len: int, tokens: float) -> np.ndarray:
    n = 2000
    kind = random.integers(0, 11)
    lengths = [
        lambda: np.array([random.integers(1, 6 * seq_len)]),
        lambda: np.ones(n),
        lambda: np.full(n, seq_len),
        lambda: random.integers(1, 13, n),
        lambda: np.exp(random.uniform(0, np.log(seq_len), n)),
        lambda: np.exp(random.uniform(np.log(2), np.log(seq_len * 5), n)),
        lambda: random.integers(seq_len - 2, seq_len + 3, n),
        lambda: random.integers(seq_len // 2 + 1, seq_len * 2 // 3 + 2, n),
        lambda: np.append([3 * seq_len], random.integers(1, 5, n)),
        lambda: random.integers(0, 3, n),
        lambda: np.exp(random.normal(np.log(seq_len / 10), 1, n)),
    ][kind]().astype(np.int64)
    stop = int(np.searchsorted(np.cumsum(lengths), tokens)) + 1
    lengths = lengths[:stop]
    if not lengths.any():
        lengths[-1] = 1
    return np.minimum(lengths, 12 * seq_len)


def random_texts(random: np.random.Generator) -> list[Text]:
    texts, base = [], 1
    for i in range(int(random.integers(1, 5))):
        if texts and random.random() < 0.12:
            texts.append(texts[-1])
            continue
        lengths = random_lengths(random, int(random.choice([16, 64, 128])), float(np.exp(random.uniform(1, 8.5))))
        trained = None
        if random.random() < 0.2:
            trained = np.repeat(random.random(len(lengths)) < 0.7, lengths) & (random.random(lengths.sum()) < 0.5)
        texts.append(make_text(str(i), lengths, base, trained))
        base += int(lengths.sum())
    return texts


def random_data(random: np.random.Generator, texts: Sequence[Text], seq_len: int, steps: int) -> Data:
    sources = []
    for i, text in enumerate(texts):
        options: dict[str, Any] = {}
        have = text.lengths[text.lengths > 0]
        if random.random() < 0.15:
            options["chunk_length"] = int(random.integers(max(1, seq_len // 8), seq_len + 1))
        if random.random() < 0.25:
            options["long_document"] = str(random.choice(["truncate", "drop"]))
        if random.random() < 0.1:
            options["min_length"] = int(random.choice(have))
        if random.random() < 0.1:
            options["max_length"] = int(random.choice(have))
        if random.random() < 0.1:
            options["max_documents"] = int(random.integers(1, len(text.lengths) + 1))
        weight = float(random.choice([0, 1e-6, 1, 1, 1, 2, 5]) * random.uniform(0.5, 1))
        bins = random.random() < 0.2 and len(set(have.tolist())) > 1
        if bins:
            edge = int(random.choice(np.unique(have)[:-1]))
            options["length_bins"] = (edge,)
            options["length_shares"] = ((0.3, 0.7), (0.0, 1.0), (1.0, 0.0), (0.999, 0.001))[int(random.integers(4))]
        if random.random() < 0.25:
            at = sorted(random.choice(steps + 20, size=int(random.integers(2, 4)), replace=False).tolist())
            weights = [float(random.choice([0, 0, 0.2, 1, 4])) for _ in at]
            weights[int(random.integers(len(at)))] = 1.0
            options["schedule"] = tuple(Point(step, w) for step, w in zip(at, weights))
            if bins and random.random() < 0.5:
                mix = [float(random.choice([0.0, 0.2, 0.5, 1.0])) for _ in at]
                points = zip(options["schedule"], mix)
                options["schedule"] = tuple(replace(p, length_shares=(m, 1 - m)) for p, m in points)
                del options["length_shares"]
        sources.append(Source(str(i), str(i), weight, **options))
    if not any(s.weight and not s.schedule for s in sources):
        sources[0] = replace(sources[0], weight=1.0, schedule=())
        if sources[0].length_bins and not sources[0].length_shares:
            sources[0] = replace(sources[0], length_shares=(0.5, 0.5))
    packing = str(random.choice(["best_fit", "best_fit", "concat", "single"]))
    return Data(sources=tuple(sources), packing=packing)  # type: ignore[arg-type]


def left_out_before(plan: Plan, end: int) -> list[tuple[int, Part]]:
    """(step, part) of all that the plan says to have left out before the end of step `end` - 1: rows without labels."""
    found = []
    for _, row, stream, document, _, start, length in plan.table.unlabelled.tolist():
        source = plan.streams[stream].source
        words = min(length, max(0, int(plan.corpora[source].lengths[document]) - start))
        if row < (end - plan.first_step) * plan.rows_per_step:
            found.append((plan.first_step + row // plan.rows_per_step, (source, document, start, words)))
    return found


def can_be_refused(error: UserError, ledger: Ledger) -> bool:
    """Whether a mixture truly has nothing to read."""
    text = str(error)
    if "has no document left to read" in text or "length_shares asks for documents" in text:
        return any(not stream.documents.any() for stream in ledger.streams) or any(
            not any(x.documents.any() for x in ledger.streams if x.source == s.source) for s in ledger.streams
        )
    if "trained on" in text:
        return any(not ledger.texts[s.source].is_trained[s.tokens].all() for s in ledger.streams) or any(
            ledger.texts[s.source].lengths[s.documents].max() <= 1
            or ledger.data.sources[s.source].chunk_length in (1, 2)
            for s in ledger.streams
        )
    return False


def run_chain(seed: int) -> dict[str, float]:
    """A chain of up to 3 stages, each perhaps with a change of the mixture in its middle."""
    random = np.random.default_rng([seed, 77])
    texts = random_texts(random)
    ledger = Ledger(texts)
    state: list[np.ndarray] | None = None
    plans = refused = 0
    furthest = 0.0
    for _ in range(int(random.integers(1, 4))):
        seq_len = int(random.choice([4, 16, 64, 128, 256]))
        rows = int(random.choice([1, 2, 4, 6, 8]))
        steps = 1 + int(random.integers(0, 30) * min(1, 4000 / (30 * rows * seq_len)))
        separators = [tuple(SEPARATORS + 8 * i + np.arange(random.choice([0, 0, 1, 3]))) for i in range(len(texts))]
        changes = [0, *([int(random.integers(0, steps))] if random.random() < 0.3 else []), steps]
        for begin, end in zip(changes, changes[1:]):
            data = random_data(random, texts, seq_len, steps)
            ledger.begin(data, seq_len, separators, begin)
            arguments: dict[str, Any] = {"separators": separators, "first_step": begin}
            corpora = [text.corpus for text in texts]
            arguments |= {} if state is None else {"read": state}
            try:
                plan = Plan(data, corpora, seq_len, rows, steps, seed, **arguments)
            except UserError as error:
                assert can_be_refused(error, ledger), error
                refused += 1
                continue
            plans += 1
            stop = end if random.random() < 0.7 else int(random.integers(begin, end + 1))
            read = read_steps(plan, random, begin, stop)
            left_out = left_out_before(plan, stop)
            of_streams = np.zeros((len(ledger.streams), 2))  # tokens read, tokens due
            ledger.furthest = 0.0
            for number, step_rows in enumerate(read):
                assert len(step_rows) == rows
                now = [part for at, part in left_out if at == begin + number]
                parts = [ledger.parts(*row) for row in step_rows]
                for _, labels, *_ in step_rows:
                    assert (labels != IGNORED_LABEL).any(), "a row without a label"
                ledger.add_step(parts, now)
                add_shares(ledger, of_streams, step_rows, begin + number, bool(left_out))
            for source, document, start, length in (part for _, part in left_out):
                begin_at = texts[source].bounds[document] + start
                is_label = texts[source].is_trained[begin_at + 1 : begin_at + length]
                assert not is_label.any(), "a row with labels was left out"
            longest = max(int(t.lengths.max()) for t in texts) if data.packing == "concat" else 0
            assert ledger.furthest <= 2 + 2 * longest / seq_len, "shares"
            furthest = max(furthest, ledger.furthest)
            state = plan.read_until(stop)
            for i, text in enumerate(texts):
                expected = np.bincount(text.document[ledger.read[i]], minlength=len(text.lengths))
                assert (state[i] == expected).all(), (i, state[i], expected)
            try:
                longer = Plan(
                    data, corpora, seq_len, rows, steps + int(random.integers(1, 3 + steps)), seed, **arguments
                )
            except UserError as error:
                assert can_be_refused(error, ledger), error
                continue
            once = read_steps(longer, random, begin, stop)
            for a, b in zip(read, once):
                assert sorted(r[0].tobytes() for r in a) == sorted(r[0].tobytes() for r in b), "longer, other rows"
    return {"plans": plans, "refused": refused, "epochs": ledger.epochs, "twice": ledger.twice, "off": furthest}


def add_shares(ledger: Ledger, sums: np.ndarray, rows: list[tuple[np.ndarray, ...]], step: int, left_out: bool) -> None:
    """Adds a step's tokens and what was due of them to the streams' sums, and remembers how far they are apart."""
    total = 0
    for row, _, ends, sources in rows:
        lengths = np.diff(np.append(0, ends))
        total += int(lengths[sources != PADDING_SOURCE].sum())
        for begin, end, source in zip(np.append(0, ends), ends, sources):
            if source != PADDING_SOURCE:
                text = ledger.texts[source]
                streams = [i for i, s in enumerate(ledger.streams) if s.source == source]
                if len(streams) > 1:
                    if row[begin] >= SEPARATORS:
                        continue
                    document = text.document[row[begin] - text.base]
                    streams = [i for i in streams if ledger.streams[i].documents[document]]
                sums[streams[0], 0] += end - begin
    for i, stream in enumerate(ledger.streams):
        at = [share_at(ledger.data, stream, step + (k + 0.5) / len(rows)) for k in range(len(rows))]
        sums[i, 1] += total * float(np.mean(at))
    if not left_out:  # what has no label counts as read, but is in no row
        ledger.furthest = max(ledger.furthest, float(np.abs(sums[:, 0] - sums[:, 1]).max()) / ledger.seq_len)


@pytest.mark.parametrize("seeds", np.array_split(np.arange(FIRST, FIRST + CASES), 4), ids=str)
def test_every_token_is_read_once_an_epoch(seeds: np.ndarray) -> None:
    for seed in seeds.tolist():
        try:
            run_chain(seed)
        except Exception as error:
            error.add_note(f"case {seed}")
            raise


def read_of(plan: Plan, step: int) -> list[list[int]]:
    return [tokens.tolist() for tokens in plan.read_until(step)]


def test_a_full_epoch_of_a_stream_is_kept_by_a_stage_that_does_not_read_it() -> None:
    """Its documents are a part of the next stage's stream, whose epoch is not full."""
    corpus = make_text("0", np.array([4, 4, 12, 12]), 1).corpus
    read = [np.array([4, 4, 5, 0])]
    sources = (Source("0", "0", length_bins=(8,), length_shares=(1e-6, 1 - 1e-6)),)
    bins = Plan(Data(sources=sources), [corpus], 4, 1, 3, 0, read=read)
    assert read_of(bins, 0) == [[4, 4, 5, 0]]
    assert [tokens[:2] for tokens in read_of(bins, 3)] == [[4, 4]]
    whole = Plan(Data(sources=(Source("0", "0"),)), [corpus], 4, 1, 2, 0, read=bins.read_until(3))
    assert not np.isin(whole.table.document, [0, 1]).any()
