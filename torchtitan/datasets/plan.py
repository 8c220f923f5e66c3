"""The plan of a stage's data: (seed, step, slot) -> row, before anything is trained.

A pure function of its inputs: it knows nothing of ranks, workers or restarts, so all of them see the same rows at the
same step. Steps and slots count from 0: step k is the one after k finished steps, slot i is row i of its global batch.
The plan also says in a report what the stage will read, and in `inputs` what a resumed run must have left unchanged.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from torchtitan.datasets.corpus import Corpus
from torchtitan.datasets.mixture import index_in_source, source_of_rows
from torchtitan.datasets.packing import EpochOrder, Pieces, cut_row, order_epoch
from torchtitan.tools.errors import UserError

FORMAT = 1
"""Version of the function (seed, step, slot) -> row; raised whenever the same inputs give other rows."""

UNIGRAM_SAMPLE = 4_000_000
"""Tokens that the unigram model is counted on."""

ORDERS_KEPT = 2  # epochs of a source whose order is kept: rows of a step may lie on both sides of an epoch's end


@dataclass(frozen=True)
class Row:
    """One row: where it comes from and its pieces. `epoch` counts from 0."""

    source: int
    epoch: int
    pieces: Pieces


class Plan:
    """Rows of a stage. source_of_row: int16[steps * rows_per_step]."""

    def __init__(
        self,
        corpora: Sequence[Corpus],
        names: Sequence[str],
        weights: Sequence[float],
        seq_len: int,
        rows_per_step: int,
        steps: int,
        seed: int,
    ) -> None:
        _check(corpora, names, weights, seq_len)
        self.corpora = list(corpora)
        self.names = list(names)
        self.shares = [weight / sum(weights) for weight in weights]
        self.seq_len = seq_len
        self.rows_per_step = rows_per_step
        self.steps = steps
        self.seed = seed
        self.source_of_row = source_of_rows(weights, steps * rows_per_step)
        self._index_in_source = index_in_source(self.source_of_row)
        self._orders: dict[tuple[int, int], EpochOrder] = {}

    @property
    def inputs(self) -> dict[str, Any]:
        """All that decides the rows of a step, as JSON values. Not the number of steps: a run can be made longer."""
        return {
            "format": FORMAT,
            "packing": "concat",
            "seed": self.seed,
            "seq_len": self.seq_len,
            "rows_per_step": self.rows_per_step,
            "sources": [
                {"name": name, "share": share, "corpus": corpus.fingerprint}
                for name, share, corpus in zip(self.names, self.shares, self.corpora)
            ],
        }

    @property
    def fingerprint(self) -> str:
        """Hex digest of `inputs`."""
        return hashlib.sha256(json.dumps(self.inputs, sort_keys=True).encode()).hexdigest()[:16]

    def rows_per_epoch(self, source: int) -> int:
        """Whole rows in one pass over a source."""
        return self.corpora[source].tokens // self.seq_len

    def row(self, step: int, slot: int) -> Row:
        """The row in a slot of a step; reads no tokens."""
        if not (0 <= step < self.steps and 0 <= slot < self.rows_per_step):
            raise IndexError(f"step {step}, slot {slot} of {self.steps} steps of {self.rows_per_step} rows")
        index = step * self.rows_per_step + slot
        source = int(self.source_of_row[index])
        epoch, row = divmod(int(self._index_in_source[index]), self.rows_per_epoch(source))
        return Row(source, epoch, cut_row(self._order(source, epoch), row, self.seq_len))

    def tokens(self, row: Row) -> np.ndarray:
        """int64[seq_len], read from the corpus."""
        corpus, pieces = self.corpora[row.source], row.pieces
        parts = zip(pieces.documents, pieces.starts, pieces.stops)
        return np.concatenate([corpus.document(int(d))[start:stop] for d, start, stop in parts], dtype=np.int64)

    def describe(self, step: int, slot: int) -> str:
        """One line for error messages: source, epoch, documents and the tokens of each."""
        row = self.row(step, slot)
        pieces = row.pieces
        parts = [f"{d}[{a}:{b}]" for d, a, b in zip(pieces.documents[:8], pieces.starts, pieces.stops)]
        more = f" and {len(pieces.documents) - 8} more" if len(pieces.documents) > 8 else ""
        return f"source {self.names[row.source]}, epoch {row.epoch}, documents {' '.join(parts)}{more}"

    def _order(self, source: int, epoch: int) -> EpochOrder:
        order = self._orders.pop((source, epoch), None)
        if order is None:
            kept = [key for key in self._orders if key[0] == source]
            if len(kept) >= ORDERS_KEPT:
                del self._orders[kept[0]]  # the one not used for longest
            order = order_epoch(self.corpora[source].lengths, self.seq_len, self.seed, source, epoch)
        self._orders[(source, epoch)] = order
        return order

    def report(self) -> dict[str, Any]:
        """What the stage reads, as JSON values (plan.json)."""
        rows = len(self.source_of_row)
        counts = np.bincount(self.source_of_row, minlength=len(self.corpora))
        return {
            "fingerprint": self.fingerprint,
            "inputs": self.inputs,
            "steps": self.steps,
            "rows": rows,
            "tokens": rows * self.seq_len,
            "padding_tokens": 0,
            "unigram_nats": self._unigram_nats(counts),
            "sources": [self._source_report(source, int(counts[source]), rows) for source in range(len(counts))],
        }

    def _source_report(self, source: int, rows: int, all_rows: int) -> dict[str, Any]:
        corpus = self.corpora[source]
        exponents = np.frexp(np.maximum(corpus.lengths, 1))[1] - 1
        histogram = {
            str(1 << int(e)): {
                "documents": int((exponents == e).sum()),
                "tokens": int(corpus.lengths[exponents == e].sum()),
            }
            for e in np.unique(exponents)
        }
        return {
            "name": self.names[source],
            "folder": corpus.folder,
            "documents": len(corpus),
            "tokens": corpus.tokens,
            "longest_document": int(corpus.lengths.max()),
            "share_asked": self.shares[source],
            "share": rows / all_rows if all_rows else 0.0,
            "rows": rows,
            "epochs": rows / self.rows_per_epoch(source) if rows else 0.0,
            "left_out_tokens_per_epoch": corpus.tokens % self.seq_len,
            "documents_by_length_from": histogram,
        }

    def _unigram_nats(self, counts: np.ndarray) -> float:
        """Cross-entropy in nats of the unigram model of the planned data: what a model that ignores context reaches.

        The entropy of the tokens' frequencies in rows spread over the plan, sources weighted by their rows.
        """
        mixed = np.zeros(0)
        for source, rows in enumerate(counts):
            if not rows:
                continue
            budget = max(1, int(UNIGRAM_SAMPLE * rows / counts.sum()))
            wanted = min(int(rows), math.ceil(budget / self.seq_len))
            mine = np.flatnonzero(self.source_of_row == source)
            picked = mine[np.linspace(0, rows - 1, wanted).astype(np.int64)]
            found = np.zeros(0, dtype=np.int64)
            for index in picked:
                tokens = self.tokens(self.row(*divmod(int(index), self.rows_per_step)))[:budget]
                found = _add(found, np.bincount(tokens))
            mixed = _add(mixed, found / found.sum() * (rows / counts.sum()))
        used = mixed[mixed > 0]
        return float(-(used * np.log(used)).sum())


def _add(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    size = max(len(a), len(b))
    return np.pad(a, (0, size - len(a))) + np.pad(b, (0, size - len(b)))


def _check(corpora: Sequence[Corpus], names: Sequence[str], weights: Sequence[float], seq_len: int) -> None:
    if not corpora:
        raise UserError("data.sources is empty: give at least one [[data.sources]] table with a path.")
    if len(set(names)) < len(names):
        raise UserError(f"data.sources has the names {', '.join(names)}: give each source its own.")
    for name, weight in zip(names, weights):
        if not (math.isfinite(weight) and weight >= 0):
            raise UserError(f"data source {name!r} has weight = {weight}: a weight is a number from 0 up.")
    if sum(weights) <= 0:
        raise UserError(f"The weights of the data sources {', '.join(names)} are all 0: at least one must be above.")
    for name, weight, corpus in zip(names, weights, corpora):
        if weight > 0 and corpus.tokens < seq_len:
            raise UserError(
                f"training.seq_len = {seq_len}, but data source {name!r} has {corpus.tokens} tokens in {len(corpus)} "
                f"document{'' if len(corpus) == 1 else 's'}, {seq_len - corpus.tokens} too few for one row: set "
                f"training.seq_len to at most {corpus.tokens}, give the source more text, or take it out."
            )


def changed_inputs(saved: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """The differences of two Plan.inputs, e.g. 'seq_len 1024 -> 2048', 'source code: share 0.5 -> 0.6'."""
    keys = [key for key in {**saved, **now} if key != "sources"]
    changes = [f"{key} {saved.get(key)} -> {now.get(key)}" for key in keys if saved.get(key) != now.get(key)]
    if saved.get("rows_per_step") != now.get("rows_per_step"):
        changes.append(f"(training.global_batch_size = {saved.get('rows_per_step')} keeps the rows of a step)")
    before, after = saved.get("sources", []), now.get("sources", [])
    names_before, names_after = [s["name"] for s in before], [s["name"] for s in after]
    if names_before != names_after:
        return [*changes, f"sources [{', '.join(names_before)}] -> [{', '.join(names_after)}]"]
    for old, new in zip(before, after):
        for key in ("share", "corpus"):
            if old[key] != new[key]:
                shown = [f"{v:.4g}" if isinstance(v, float) else v for v in (old[key], new[key])]
                what = "its documents (corpus {} -> {})" if key == "corpus" else "share {} -> {}"
                changes.append(f"source {new['name']}: {what.format(*shown)}")
    return changes


def format_report(report: dict[str, Any]) -> str:
    """The report as a short table for the log."""
    inputs = report["inputs"]
    lines = [
        f"data plan {report['fingerprint']}: {report['steps']} steps of {inputs['rows_per_step']} rows of "
        f"{inputs['seq_len']} tokens, {report['tokens']:,} in all, {report['padding_tokens']} padding; unigram "
        f"cross-entropy {report['unigram_nats']:.3f} nats",
        f"{'source':<16} {'documents':>12} {'tokens':>16} {'longest':>10} {'asked':>7} {'share':>7} {'epochs':>8}",
    ]
    for s in report["sources"]:
        lines.append(
            f"{s['name']:<16} {s['documents']:>12,} {s['tokens']:>16,} {s['longest_document']:>10,} "
            f"{s['share_asked']:>7.1%} {s['share']:>7.1%} {s['epochs']:>8.2f}"
        )
    return "\n".join(lines)
