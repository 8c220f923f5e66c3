"""An independent ledger of a plan: a dictionary that is walked row by row, and random mixes to try it on."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from torchtitan.config.data_schema import Data, Source
from torchtitan.datasets.corpus import Corpus
from torchtitan.datasets.plan import Plan


def lengths_only(lengths: np.ndarray, name: str = "a") -> Corpus:
    """A corpus that can be planned but not read."""
    return Corpus(name, [(np.concatenate([[0], np.cumsum(lengths)]), np.zeros(0, np.int32))], name, None)


def make_plan(
    corpora: Sequence[np.ndarray | Corpus],
    seq_len: int,
    steps: int,
    weights: Sequence[float] = (),
    packing: str = "best_fit",
    rows_per_step: int = 1,
    seed: int = 0,
    **arguments: Any,
) -> Plan:
    names = [chr(ord("a") + i) for i in range(len(corpora))]
    made = [c if isinstance(c, Corpus) else lengths_only(c, name) for c, name in zip(corpora, names)]
    sources = tuple(Source(name, name, weight) for name, weight in zip(names, weights or [1.0] * len(names)))
    data = Data(sources=sources, packing=packing)  # type: ignore[arg-type]
    return Plan(data, made, seq_len, rows_per_step, steps, seed, **arguments)


def rows_of(plan: Plan) -> list[list[tuple[int, ...]]]:
    """(source, document, epoch, start, length) of the parts of every row."""
    t = plan.table
    parts = list(zip(*(c.tolist() for c in (t.source, t.document, t.epoch, t.start, t.length))))
    return [parts[a:b] for a, b in zip(t.offsets, t.offsets[1:])]


class Ledger:
    """Walks a plan and asserts that of each stream an epoch is read wholly, each token once and in order, before the
    next begins; and that a row holds a document in two epochs only if a stream's share of it is more than its epoch.

    state: int64[n] per source, where the walk begins. states: after each step. ends: epochs that ended, by stream.
    behind: float64[R, S], tokens of each stream beyond its share, after each row.
    """

    def __init__(self, plan: Plan, state: Sequence[np.ndarray] | None = None) -> None:
        self.plan = plan
        self.lengths = [corpus.lengths for corpus in plan.corpora]
        self.stream_of = {(t.source, d): s for s, t in enumerate(plan.streams) for d in t.documents.tolist()}
        self.used: list[dict[int, int]] = [defaultdict(int) for _ in plan.streams]
        for s, stream in enumerate(plan.streams):
            for document, tokens in zip(stream.documents.tolist(), stream.lengths.tolist()):
                self.used[s][document] += tokens
        self.state = [
            np.zeros(len(n), np.int64) if state is None else state[i].copy() for i, n in enumerate(self.lengths)
        ]
        self.epoch = [0] * len(plan.streams)
        self.full = [self.finished(s) for s in range(len(plan.streams))]
        self.ends = [0] * len(plan.streams)
        self.behind = np.zeros((len(plan.table), len(plan.streams)))
        self.states = [[read.copy() for read in self.state]]
        self.walk()

    def finished(self, stream: int) -> bool:
        source = self.plan.streams[stream].source
        read, lengths = self.state[source], self.lengths[source]
        whole = self.plan.corpora[source].has_roles  # a conversation is never begun in its middle
        return all(
            read[d] >= min(n, lengths[d]) or (whole and read[d] > 0 and self.epoch[stream] == 0)
            for d, n in self.used[stream].items()
        )

    def begin(self, stream: int) -> None:
        for document in self.used[stream]:
            self.state[self.plan.streams[stream].source][document] = 0

    def read(self, where: Any, source: int, document: int, epoch: int, start: int, length: int) -> int:
        s = self.stream_of[source, document]
        if self.full[s]:  # an epoch that is full ends where the next one begins
            self.begin(s)
            self.full[s] = False
        if epoch != self.epoch[s]:
            assert epoch == self.epoch[s] + 1 and self.finished(s), (where, s, self.epoch[s], epoch)
            self.begin(s)
            self.epoch[s] = epoch
            self.ends[s] += 1
        assert start == self.state[source][document], (where, s, document, start, self.state[source][document])
        self.state[source][document] += length
        assert start + length <= self.lengths[source][document] + len(self.plan.separators[source])
        return s

    def walk(self) -> None:
        t = self.plan.table
        left_out = t.unlabelled.tolist()
        sums, goal = np.zeros(len(self.plan.streams)), np.zeros(len(self.plan.streams))
        twice = set(t.twice.tolist())
        for number, parts in enumerate(rows_of(self.plan)):
            while left_out and left_out[0][1] <= number:
                _, _, s, *part = left_out.pop(0)
                self.read("left out", self.plan.streams[s].source, *part)
            seen = defaultdict(set)
            row = np.zeros(len(sums))
            for part in parts:
                s = self.read(number, *part)
                row[s] += part[4]
                seen[part[:2]].add(part[2])
            assert parts and min(part[4] for part in parts) > 0 and row.sum() <= self.plan.seq_len
            step = (self.plan.first_step * self.plan.rows_per_step + number + 0.5) / self.plan.rows_per_step
            share = [t.share if t.curve is None else np.interp(step, *t.curve.T) for t in self.plan.streams]
            repeated = {self.stream_of[place] for place, epochs in seen.items() if len(epochs) > 1}
            assert bool(repeated) == (number in twice), number
            assert all(share[s] * self.plan.seq_len > self.plan.streams[s].tokens for s in repeated), number
            sums, goal = sums + row, goal + np.array(share) * row.sum()
            self.behind[number] = sums - goal
            if (number + 1) % self.plan.rows_per_step == 0:
                self.states.append([np.minimum(read, n) for read, n in zip(self.state, self.lengths)])


def random_lengths(random: np.random.Generator, seq_len: int, tokens: float) -> np.ndarray:
    """Of one of several kinds; about so many tokens, at least one document."""
    count = 20_000
    made = {
        "short": lambda: random.integers(1, 13, count),
        "to a row": lambda: np.exp(random.uniform(np.log(12), np.log(seq_len), count)),
        "long": lambda: np.exp(random.uniform(np.log(seq_len / 4), np.log(seq_len * 6), count)),
        "rows": lambda: np.full(count, seq_len),
        "no two in a row": lambda: random.integers(seq_len // 2 + 1, seq_len * 2 // 3, count),
        "ragged": lambda: np.exp(random.normal(np.log(seq_len / 20), 1.2, count)),
    }
    lengths = made[str(random.choice(list(made)))]().astype(np.int64).clip(1, 6 * seq_len)
    return lengths[: max(1, int(np.searchsorted(np.cumsum(lengths), tokens)))]


def random_plan(seed: int) -> tuple[Data, list[Corpus], dict[str, Any]]:
    """[data], corpora and the other arguments of a plan: 1 to 4 sources of 0.3 to 20 epochs."""
    random = np.random.default_rng(seed)
    count, seq_len, rows = (
        int(random.integers(1, 5)),
        int(random.choice([64, 128, 256, 1024])),
        int(random.integers(20, 500)),
    )
    packing = str(random.choice(["best_fit", "concat", "single"]))
    sources, corpora = [], []
    for i in range(count):
        epochs = np.exp(random.uniform(np.log(0.3), np.log(20)))
        corpora.append(lengths_only(random_lengths(random, seq_len, rows * seq_len / count / epochs), str(i)))
        options: dict[str, Any] = {}
        if random.random() < 0.15:
            options["chunk_length"] = int(random.integers(seq_len // 8 + 1, seq_len))
        if random.random() < 0.1:
            options["long_document"] = "truncate"
        sources.append(Source(str(i), str(i), float(random.uniform(0.1, 1)), **options))
    short = seq_len // 4 if packing == "best_fit" and random.random() < 0.2 else None
    separators = [(7,) * int(random.integers(0, 4)) if random.random() < 0.3 else () for _ in range(count)]
    arguments = {"seq_len": seq_len, "rows_per_step": 2, "steps": rows // 2, "seed": seed}
    data = Data(sources=tuple(sources), packing=packing)  # type: ignore[arg-type]
    return data, corpora, arguments | {"short_window": short, "separators": separators}
