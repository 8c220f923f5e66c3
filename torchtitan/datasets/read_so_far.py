"""How much of each corpus a chain of stages has read, so that the next stage goes on where the last one stopped.

Corpora are known by their fingerprint, so that a source may have another name, weight or row length in each stage. What
has been read of a document in an epoch is always its beginning, of some length: parts take its tokens in order. A
checkpoint keeps this as of its step and as of the beginning of its stage's plan (components/data_start.py).
"""

from __future__ import annotations

import io
import json
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from torchtitan.datasets.corpus import Corpus
from torchtitan.datasets.plan import Plan
from torchtitan.tools.errors import UserError

FORMAT = 1
"""Version of the files."""


@dataclass(frozen=True)
class Beginnings:
    """How many tokens of each document are read, from its beginning: two bits and a few numbers, for n documents."""

    whole: np.ndarray
    """bool[n], whether all are."""

    documents: np.ndarray
    """int64[k], ascending: the documents of which some are, but not all."""

    tokens: np.ndarray
    """int64[k], how many of each of these."""

    def of(self, lengths: np.ndarray) -> np.ndarray:
        """int64[n], tokens read of each document; lengths: int64[n], those that it has."""
        read = np.where(self.whole, lengths, 0)
        read[self.documents] = self.tokens
        return read


def beginnings(read: np.ndarray, lengths: np.ndarray) -> Beginnings:
    """The inverse of Beginnings.of; more tokens than a document has (a separator was read too) count as all."""
    whole = read >= lengths
    some = np.flatnonzero(~whole & (read > 0))
    return Beginnings(whole, some, read[some].astype(np.int64))


@dataclass(frozen=True)
class CorpusRead:
    """What the stages of a chain have read of one corpus."""

    name: str
    """Of the source that read it last."""

    tokens: int
    """That it has."""

    tokens_read: int
    """In all epochs, separators not counted; with those in rows that were left out."""

    now: Beginnings
    """In the epoch under way."""

    ever: Beginnings
    """In any epoch: of each document the longest beginning."""

    @property
    def epochs(self) -> float:
        """Epochs so far: the tokens that the chain has read of the corpus, divided by those that it has."""
        return self.tokens_read / max(1, self.tokens)


@dataclass(frozen=True)
class ReadSoFar:
    """What a chain has read, by the fingerprint of the corpus."""

    corpora: Mapping[str, CorpusRead] = field(default_factory=dict)

    def now(self, corpus: Corpus) -> np.ndarray | None:
        """int64[n], tokens read of each document in the epoch under way; None if none are."""
        known = self.corpora.get(corpus.fingerprint)
        read = None if known is None else known.now.of(corpus.lengths)
        return None if read is None or not read.any() else read

    def ever(self, corpus: Corpus) -> np.ndarray:
        """int64[n], tokens read of each document in any epoch."""
        known = self.corpora.get(corpus.fingerprint)
        return np.zeros(len(corpus), np.int64) if known is None else known.ever.of(corpus.lengths)

    def epochs(self, corpus: Corpus) -> float:
        """Epochs so far of a corpus."""
        known = self.corpora.get(corpus.fingerprint)
        return 0.0 if known is None else known.epochs

    def in_new_epochs(self) -> ReadSoFar:
        """The same, but the epochs that are under way end here: the order of every source begins anew."""
        return ReadSoFar({key: replace(known, now=_nothing(known.now)) for key, known in self.corpora.items()})


def _nothing(of: Beginnings) -> Beginnings:
    return Beginnings(np.zeros_like(of.whole), of.documents[:0], of.tokens[:0])


def read_until(before: ReadSoFar, plan: Plan, step: int) -> ReadSoFar:
    """What has been read after `step` steps of a stage whose plan began from `before`.

    Corpora that the stage does not read stay as they are. Of two sources over one corpus the larger beginning counts,
    for each document that both read.
    """
    corpora = dict(before.corpora)
    of_source = plan.read_until(step)
    source, *columns = _parts_read(plan, (step - plan.first_step) * plan.rows_per_step)
    eligible = [np.zeros(len(corpus), bool) for corpus in plan.corpora]
    for stream in plan.streams:
        eligible[stream.source][stream.documents] = True
    for key in {corpus.fingerprint: None for corpus in plan.corpora}:
        sources = [i for i, corpus in enumerate(plan.corpora) if corpus.fingerprint == key]
        corpus, known = plan.corpora[sources[0]], corpora.get(key)
        lengths = corpus.lengths
        now = np.zeros(len(corpus), np.int64) if known is None else known.now.of(lengths)
        now[np.logical_or.reduce([eligible[i] for i in sources])] = 0
        ever, read = before.ever(corpus), 0 if known is None else known.tokens_read
        for i in sources:
            np.maximum(now, of_source[i], out=now, where=eligible[i])
            mine = source == i
            document, start, length = (column[mine] for column in columns)
            whole = lengths[document]
            ends = np.minimum(start + length, whole)
            np.maximum.at(ever, document, ends)
            read += int((ends - np.minimum(start, whole)).sum())
        name = plan.names[sources[0]] if read or known is None else known.name
        corpora[key] = CorpusRead(name, corpus.tokens, read, beginnings(now, lengths), beginnings(ever, lengths))
    return ReadSoFar(corpora)


def _parts_read(plan: Plan, rows: int) -> list[np.ndarray]:
    """Source, document, start and length, [N] each, of the parts of the first rows of a plan, and of what was left out
    before them."""
    t, parts, out = plan.table, int(plan.table.offsets[rows]), plan.table.unlabelled
    out = out[out[:, 1] < rows]
    source = np.array([stream.source for stream in plan.streams], t.source.dtype)[out[:, 2]]
    left_out = source, *(out[:, column].astype(np.int32) for column in (3, 5, 6))
    in_rows = t.source, t.document, t.start, t.length
    return [np.concatenate([c[:parts], o]) if len(o) else c[:parts] for c, o in zip(in_rows, left_out, strict=True)]


def to_bytes(read: ReadSoFar) -> bytes:
    """A compressed .npz: of each corpus two bits per document, and the documents that are read in part."""
    entries = []
    arrays: dict[str, Any] = {}
    for i, (fingerprint, corpus) in enumerate(read.corpora.items()):
        entries.append(
            {
                "fingerprint": fingerprint,
                "name": corpus.name,
                "documents": len(corpus.now.whole),
                "tokens": corpus.tokens,
                "tokens_read": corpus.tokens_read,
            }
        )
        # mostly the same in the first epoch: what differs compresses to nothing
        arrays[f"{i}.now"] = np.packbits(corpus.now.whole)
        arrays[f"{i}.ever"] = np.packbits(corpus.ever.whole ^ corpus.now.whole)
        for which, some in (("now", corpus.now), ("ever", corpus.ever)):
            arrays[f"{i}.{which}_in_part"] = np.stack([some.documents, some.tokens])
    about = json.dumps({"format": FORMAT, "corpora": entries}).encode()
    file = io.BytesIO()
    np.savez_compressed(file, about=np.frombuffer(about, np.uint8), **arrays)
    return file.getvalue()


def from_file(path: Path) -> ReadSoFar:
    """The inverse of to_bytes; UserError that names the file if it cannot be read."""
    mend = "Restore it, or delete that step's folder."
    try:
        with np.load(path, allow_pickle=False) as arrays:
            about = json.loads(arrays["about"].tobytes())
            if about["format"] != FORMAT:
                raise UserError(f"{path} has format {about['format']}, but this version reads {FORMAT}. {mend}")
            corpora = {}
            for i, entry in enumerate(about["corpora"]):
                n = entry["documents"]
                now = np.unpackbits(arrays[f"{i}.now"], count=n).view(bool)
                ever = np.unpackbits(arrays[f"{i}.ever"], count=n).view(bool) ^ now
                corpora[entry["fingerprint"]] = CorpusRead(
                    entry["name"],
                    entry["tokens"],
                    entry["tokens_read"],
                    Beginnings(now, *arrays[f"{i}.now_in_part"]),
                    Beginnings(ever, *arrays[f"{i}.ever_in_part"]),
                )
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{path}, which says what has been read, is damaged ({error}). {mend}") from error
    return ReadSoFar(corpora)
