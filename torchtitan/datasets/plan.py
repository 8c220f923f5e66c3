"""The plan of a stage's data: (seed, step, slot) -> row, before anything is trained.

A pure function of its inputs: it knows nothing of ranks, workers or restarts, so all of them see the same rows at the
same step. Steps and slots count from 0: step k comes after k finished steps, slot i is row i of its global batch.

The words of this room, from the text to the step:
    document  what an author wrote, or one conversation; a corpus is a list of documents.
    piece     a document, or a cut of it that is packed as a whole: at most a row, or chunk_length (mixture.py).
    stream    the pieces of one source, or of its documents of some lengths, with a share of the tokens (mixture.py).
    group     the rows that are packed together, at most some 128 (packing.py).
    part      the tokens of one piece in one row: the whole piece, unless concat cuts it.
    row       seq_len tokens: parts, then padding.
    slot      the place of a row in its step's global batch.
    segment   a run of tokens that may attend to each other: a part, or all parts of a row (batch.py).
(A unit is not data but work: what one process tokenizes at a time, in extensions/ingest/units.py.)

`inputs` says what a resumed run must not have changed; extensions/planner/data_report.py says what a stage will read.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from torchtitan.config.data_schema import Data
from torchtitan.datasets.build_rows import Stage, check_epochs, check_needed, make_chunks
from torchtitan.datasets.corpus import ASSISTANT, Corpus
from torchtitan.datasets.mixture import Stream, build_streams
from torchtitan.datasets.reading_state import digest, first_epochs, piece_bounds, state_after
from torchtitan.datasets.row_table import RowTable
from torchtitan.datasets.same_data import data_keys, shares, source_options
from torchtitan.datasets.table_files import join, load_table, write_table
from torchtitan.tools.folders import lock, make_writable

logger = logging.getLogger(__name__)

PLAN_FORMAT = 3
"""Version of the function (seed, step, slot) -> row; raised whenever the same inputs give other rows."""


@dataclass(frozen=True)
class Row:
    """One row as its parts: tokens [starts, starts + lengths) of documents of sources; int64[P] each."""

    sources: np.ndarray
    documents: np.ndarray
    epochs: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray


class Plan:
    """Rows of a stage.

    corpora: one per source of data.sources. separators: per source, the tokens put after its documents.
    sentence_end_ids: tokens that end a sentence, for data.positions = "longrecipe". short_window: documents of at most
    this many tokens have rows of their own, in which they do not see each other (rope.mixed_window). cache: folder that
    keeps the table of rows for all ranks and restarts; None builds it in memory.
    UserError for a source that has nothing to read, cannot be raised as asked, or is read too often.
    """

    def __init__(
        self,
        data: Data,
        corpora: Sequence[Corpus],
        seq_len: int,
        rows_per_step: int,
        steps: int,
        seed: int,
        separators: Sequence[Sequence[int]] = (),
        sentence_end_ids: Sequence[int] = (),
        cache: Path | None = None,
        short_window: int | None = None,
        read: Sequence[np.ndarray | None] = (),
        first_step: int = 0,
    ) -> None:
        self.data = data
        self.corpora = list(corpora)
        self.names = [source.name for source in data.sources]
        self.seq_len = seq_len
        self.rows_per_step = rows_per_step
        self.steps = steps
        self.first_step = first_step
        self.seed = seed
        self.separators = [np.array(ids, np.int32) for ids in separators or [()] * len(self.names)]
        self.sentence_end_ids = tuple(sentence_end_ids)
        self.short_window = short_window
        self.read = list(read) or [None] * len(self.corpora)
        for name, corpus, tokens in zip(self.names, self.corpora, self.read, strict=True):
            if tokens is not None and tokens.shape != corpus.lengths.shape:
                raise ValueError(f"read: {len(tokens)} documents of source {name}, which has {len(corpus)}")
        self.read_before = digest(self.read)
        lengths = [corpus.lengths for corpus in self.corpora]
        counts = [len(ids) for ids in self.separators]
        excluded, hashes = [c.excluded for c in self.corpora], [c.hashes for c in self.corpora]
        self.streams, self.left_out = build_streams(data, lengths, counts, seq_len, self.planned, excluded, hashes)
        stage = self._stage()
        self.start = stage.read
        check_needed(stage)
        self.table = join(make_chunks(stage)) if cache is None else self._kept_table(cache, stage)
        check_epochs(data, self.streams, [self.tokens_of(stream) for stream in self.streams])

    def _stage(self) -> Stage:
        with_roles = [i for i, corpus in enumerate(self.corpora) if corpus.has_roles]
        bounds = [piece_bounds(source, self.data, self.seq_len) for source in self.data.sources]
        separators = [len(ids) for ids in self.separators]
        first, start = first_epochs(
            self.streams, self.read, [c.lengths for c in self.corpora], separators, bounds, with_roles
        )
        return Stage(
            streams=self.streams,
            data=self.data,
            seq_len=self.seq_len,
            rows=len(self.planned) * self.rows_per_step,
            seed=self.seed,
            short_window=self.short_window,
            rows_per_step=self.rows_per_step,
            first_row=self.first_step * self.rows_per_step,
            first=first,
            read=start,
            salt=[self.first_step, int(self.read_before, 16)]
            if self.read_before
            else [self.first_step] * bool(self.first_step),
            has_label=self._has_label if with_roles else None,
            with_roles=with_roles,
        )

    def _has_label(self, source: int, document: int, start: int, length: int) -> bool:
        roles = self.corpora[source].roles(document)[start + 1 : start + length]
        return bool((roles == ASSISTANT).any())

    def _kept_table(self, cache: Path, stage: Stage) -> RowTable:
        folder = cache / "plans" / f"{self.fingerprint}-{stage.rows}"
        if not folder.is_dir():
            what = f"It does not hold the plan of this stage, {folder.name}, which scripts/plan.py can make before."
            make_writable("data.cache_folder", folder.parent, what)
            with lock(folder.parent, folder.name):  # of several ranks one builds it and the others wait
                if not folder.is_dir():
                    pieces = sum(len(stream.lengths) for stream in self.streams)
                    logger.info("planning %d rows from %d pieces of documents", stage.rows, pieces)
                    write_table(make_chunks(stage), folder)
        return load_table(folder)

    def read_until(self, step: int) -> list[np.ndarray]:
        """int64[n] per source: how many tokens of each document are read, from its beginning, in the epoch that is
        under way after `step` steps; all of a document if that is its length. With it as `read` a plan goes on."""
        if not self.first_step <= step <= self.steps:
            raise IndexError(f"after step {step} of a plan of steps {self.first_step} to {self.steps}")
        lengths = [corpus.lengths for corpus in self.corpora]
        rows = (step - self.first_step) * self.rows_per_step
        return state_after(self.table, rows, self.streams, self.start, lengths, self.read)

    @property
    def planned(self) -> range:
        """The steps whose rows are in the table."""
        return range(self.first_step, self.steps)

    @property
    def rows_without_labels(self) -> int:
        """Rows that are left out because nothing in them is trained on."""
        return len(np.unique(self.table.unlabelled[:, 0]))

    @property
    def tokens_without_labels(self) -> int:
        """Tokens of these rows."""
        return int(self.table.unlabelled[:, 6].sum())

    @property
    def inputs(self) -> dict[str, Any]:
        """All that decides the batch of a step, as JSON values. Not the number of steps: a run can be made longer."""
        sources = zip(self.data.sources, shares(self.data), self.corpora, self.separators)
        # What a seed gives may change from one version of NumPy to another; a resumed run must not ignore that.
        random = np.random.default_rng([self.seed, 1])
        canary = [random.permutation(1000)]
        if self.data.positions not in ("reset", "continue"):
            canary += [random.integers(10**6, size=100), random.choice(10**6, 100, replace=False, shuffle=False)]
            canary += [np.rint(1e6 * random.normal(size=100))]
        return {
            "format": PLAN_FORMAT,
            "random_numbers": hashlib.sha256(np.concatenate(canary).astype(np.int64).tobytes()).hexdigest()[:8],
            "seed": self.seed,
            "seq_len": self.seq_len,
            "rows_per_step": self.rows_per_step,
            **data_keys(self.data),
            **({} if self.short_window is None else {"short_window": self.short_window}),
            **({} if self.read_before is None else {"read_before": self.read_before}),
            **({"first_step": self.first_step} if self.first_step else {}),
            "sources": [
                {"name": s.name, "share": share, "corpus": corpus.fingerprint}
                | {key: value for key, value in source_options(s, "rows").items() if key != "separator"}
                | ({"separator": separator.tolist()} if len(separator) else {})
                | ({} if corpus.excluded is None else {"excluded": _digest_of(corpus.excluded)})
                for s, share, corpus, separator in sources
            ],
        }

    @property
    def fingerprint(self) -> str:
        """Hex digest of `inputs`."""
        return hashlib.sha256(json.dumps(self.inputs, sort_keys=True).encode()).hexdigest()[:16]

    def parts_of(self, stream: Stream) -> np.ndarray:
        """int64[P]: the numbers of a stream's parts in the table."""
        mine = np.flatnonzero(self.table.source == stream.source)
        lengths = self.corpora[stream.source].lengths[self.table.document[mine]]
        return np.asarray(mine[(lengths > stream.over) & (lengths <= stream.up_to)])

    def tokens_of(self, stream: Stream) -> int:
        """Tokens of a stream that are read: in all rows, and in those that are left out."""
        number, out = next(i for i, s in enumerate(self.streams) if s is stream), self.table.unlabelled
        return int(self.table.tokens[number]) + int(out[out[:, 2] == number, 6].sum())

    def _index(self, step: int, slot: int) -> int:
        """Of a row in the table."""
        if 0 <= step < self.first_step:
            raise IndexError(f"step {step} is before step {self.first_step}, where this plan begins")
        if not (0 <= step < self.steps and 0 <= slot < self.rows_per_step):
            raise IndexError(f"step {step}, slot {slot} of {self.steps} steps of {self.rows_per_step} rows")
        return (step - self.first_step) * self.rows_per_step + slot

    def row(self, step: int, slot: int) -> Row:
        """The row in a slot of a step; reads no tokens."""
        index, t = self._index(step, slot), self.table
        parts = slice(*t.offsets[index : index + 2])
        return Row(t.source[parts], t.document[parts], t.epoch[parts], t.start[parts], t.length[parts])

    def work(self, step: int) -> np.ndarray:
        """int64[rows_per_step]: (query, key) pairs of each row of a step."""
        begin = self._index(step, 0)
        return np.asarray(self.table.work[begin : begin + self.rows_per_step])

    def tokens_in_step(self, step: int) -> int:
        """Tokens of a step's rows, padding not counted."""
        begin = self._index(step, 0)
        parts = slice(*self.table.offsets[[begin, begin + self.rows_per_step]])
        return int(self.table.length[parts].sum(dtype=np.int64))

    def tokens(self, row: Row) -> np.ndarray:
        """int32[sum of the row's lengths], read from the corpora; no padding."""
        tokens = np.empty(int(row.lengths.sum()), np.int32)  # filled part by part: no view keeps a file mapped
        ends = np.cumsum(row.lengths)
        for end, source, document, start, length in zip(ends, row.sources, row.documents, row.starts, row.lengths):
            stop = int(start) + int(length)
            part = self.corpora[source].document(int(document), int(start), stop)
            tokens[end - length : end - length + len(part)] = part
            if len(part) < length:  # into the separator, or wholly within it
                beyond = stop - int(self.corpora[source].lengths[document])
                tokens[end - length + len(part) : end] = self.separators[source][beyond - length + len(part) : beyond]
        return tokens

    def trained(self, row: Row) -> np.ndarray:
        """bool[sum of the row's lengths]: the tokens that the loss may be on; of conversations the assistant's."""
        trained = np.ones(int(row.lengths.sum()), bool)
        for stop, source, document, start, length in zip(
            np.cumsum(row.lengths), row.sources, row.documents, row.starts, row.lengths
        ):
            if self.corpora[source].has_roles:
                roles = self.corpora[source].roles(int(document))[start : start + length]
                trained[stop - length : stop] = False  # a separator has no role
                trained[stop - length : stop - length + len(roles)] = roles == ASSISTANT
        return trained

    def describe_step(self, step: int) -> str:
        """describe() of every row of a step, a line per row, for the log."""
        return "\n".join(f"  row {slot}: {self.describe(step, slot)}" for slot in range(self.rows_per_step))

    def describe(self, step: int, slot: int) -> str:
        """One line for error messages: sources, documents and the tokens of each."""
        row = self.row(step, slot)
        parts = zip(row.sources[:8], row.documents, row.starts, row.lengths, row.epochs)
        texts = [f"{self.names[s]} {d}[{a}:{a + n}] (epoch {e})" for s, d, a, n, e in parts]
        more = f" and {len(row.documents) - 8} more" if len(row.documents) > 8 else ""
        return f"documents {', '.join(texts)}{more}"


def _digest_of(mask: np.ndarray) -> str:
    return hashlib.sha256(np.packbits(mask).tobytes()).hexdigest()[:16]
