"""A source with kind = "synthetic" -> the documents of its corpus, made in units as text is tokenized (tokenize.py).

Everything is drawn from the source's seed: first the length and task of each document, then, for document n, what it
holds. The text of a unit begins at the unit's share of the files, so that all of them are used about equally often.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from torchtitan.config.data_schema import Data, Source
from torchtitan.datasets.corpus import ASSISTANT
from torchtitan.datasets.synthetic_checks import OF_ONE_TEXT, check_synthetic
from torchtitan.datasets.tokenizer import Tokenizer
from torchtitan.extensions.ingest.deleted_text import corpus_of_deleted_text
from torchtitan.extensions.ingest.encoder import Encoder, make_encoder
from torchtitan.extensions.ingest.find_text import NoTextError, find_text_files
from torchtitan.extensions.ingest.open_text import whole_suffix
from torchtitan.extensions.ingest.records import Span
from torchtitan.extensions.ingest.source_files import Material, check_file_unchanged, hash_files
from torchtitan.extensions.ingest.synthetic import facts, infill, lists, sections
from torchtitan.extensions.ingest.synthetic.hay import Encode, Hay, Piece, grammar, size, texts_from
from torchtitan.extensions.ingest.text import spans_of
from torchtitan.extensions.ingest.units import MOST_UNITS, folder_name
from torchtitan.tools.errors import UserError

VERSION = 1
"""Of what a seed gives; part of the corpus's key. Raise it with any change that gives other documents."""

UNIT_TOKENS = 1 << 20
SPAN_BYTES = 4 << 20
TRIES = 50
"""Draws of a document that may fail: a name stands in the text already, no sentence occurs once."""

Make = Callable[[np.random.Generator, Hay, Encode, int], "list[Piece] | None"]
"""(random numbers, text, encode, room in tokens) -> the document without BOS and EOS; None: draw again."""

TASKS: dict[str, Make] = {
    "needle": partial(facts.needles, 1, 1, 1),
    "needle_keys": partial(facts.needles, 4, 1, 1),
    "needle_values": partial(facts.needles, 1, 4, 1),
    "needle_queries": partial(facts.needles, 4, 1, 3),
    "variables": facts.variables,
    "key_value": lists.key_value,
    "common_words": lists.common_words,
    "documents": sections.documents,
    "quotes": sections.quotes,
    "occurrences": sections.occurrences,
}
"""The tasks that fill a length. Those of OF_ONE_TEXT are in _make."""


@dataclass(frozen=True)
class Batch:
    """Documents [first, stop) of the source: the part that is a unit. path: the source's. share: of all tokens, those
    before it. size: about how many bytes of text they are."""

    path: str
    first: int
    stop: int
    share: float
    size: int


def synthetic_material(source: Source, tokenizer: Tokenizer, data: Data, cache_folder: Path) -> Material | Path:
    """What tokenize.py makes the corpus of; or, if the text is gone, the corpus that was made with it.

    UserError for keys that contradict each other, and for a task that cannot be made of these texts at the shortest
    length.
    """
    check_synthetic(source, f"data source {source.name!r}")
    encoder = make_encoder(source, tokenizer, data)
    marked = infill.markers(tokenizer, source.fim_markers, source.name) if "fill_middle" in source.tasks else []
    shares = source.task_shares or (1.0,) * len(source.tasks)
    made_of = {
        "version": VERSION,
        "tasks": dict(zip(source.tasks, shares)),
        "tokens": source.make_tokens,
        "lengths": list(source.lengths),
        "seed": source.seed,
        "train_on": source.train_on,
    }
    if marked:
        made_of |= {"fim_rate": source.fim_rate, "fim_spm_rate": source.fim_spm_rate, "fim": [m.text for m in marked]}
    try:
        paths = find_text_files(source, data) if source.path else []
    except NoTextError:
        wanted = encoder.metadata | {"synthetic": made_of}
        if corpus := corpus_of_deleted_text(source, data, cache_folder, wanted):
            return corpus
        raise
    files = {file.path: file for file in hash_files(paths, cache_folder)} if paths else {}
    content = [(whole_suffix(file.path), file.sha256) for file in files.values()]
    key = [[*encoder.key, "synthetic", source.text_field], made_of, content]
    name = folder_name(source.name, key)
    metadata = encoder.metadata | {
        "path": source.path,
        "fingerprint": name.rpartition("-")[2],
        "synthetic": made_of,
        "files": [file.metadata for file in files.values()],
    }

    @cache  # once, and not if the corpus is there
    def work() -> tuple[list[Span], np.ndarray, np.ndarray]:
        return [span for path in paths for span in spans_of(str(path), SPAN_BYTES)], *lay_out(source)

    def units() -> list[list[Batch]]:
        spans, _, lengths = work()
        for number, task in enumerate(source.tasks):  # before any work, what cannot be made
            hay, rng = _hay(source, encoder, spans, 0.0), np.random.default_rng([source.seed, 2, number])
            list(_documents(source, encoder, marked, task, min(source.lengths), rng, hay))
        return [[batch] for batch in _batches(source.path, lengths)]

    def documents(batch: Batch) -> Iterator[np.ndarray]:
        spans, tasks, lengths = work()
        hay = _hay(source, encoder, spans, batch.share)
        for n in range(batch.first, batch.stop):
            rng = np.random.default_rng([source.seed, 1, n])
            yield from _documents(source, encoder, marked, source.tasks[tasks[n]], int(lengths[n]), rng, hay)
        for file in files.values():
            check_file_unchanged(file)

    def closing() -> dict[str, Any]:
        """Whether the fields of `where` exist. Not what it left out: texts are read as often as needed."""
        return {key: value for key, value in encoder.closing().items() if key in ("records", "lacking")}

    text = f" from {sum(file.size for file in files.values()) / 1e6:.1f} MB of text" if files else ""
    what = f"{source.make_tokens:,} tokens of synthetic documents{text}"

    def key_of(batch: Batch) -> list[Any]:
        return [*key, batch.first, batch.stop, batch.share]

    return Material(name, key_of, metadata, what, units, documents, closing)


def lay_out(source: Source) -> tuple[np.ndarray, np.ndarray]:
    """(task int[n], tokens int64[n]) of each document: log-uniform lengths that sum to make_tokens, or to less than a
    document more; each document is of the task that lacks most tokens."""
    rng = np.random.default_rng([source.seed, 0])
    assert source.make_tokens is not None
    low, high = min(source.lengths), max(source.lengths)
    lengths = np.zeros(0, np.int64)
    while lengths.sum() < source.make_tokens:
        drawn = np.exp(rng.uniform(np.log(low), np.log(high + 1), 10_000))
        lengths = np.append(lengths, np.clip(drawn.astype(np.int64), low, high))
    lengths = lengths[: int(np.searchsorted(np.cumsum(lengths), source.make_tokens)) + 1]
    shares = np.array(source.task_shares or (1.0,) * len(source.tasks))
    shares, lacking, tasks = (shares / shares.sum()).tolist(), [0.0] * len(shares), []
    for length in lengths.tolist():
        lacking = [before + share * length for before, share in zip(lacking, shares)]
        task = lacking.index(max(lacking))
        lacking[task] -= length
        tasks.append(task)
    return np.array(tasks), lengths


def _batches(path: str, lengths: np.ndarray) -> list[Batch]:
    ends = np.cumsum(lengths)
    total = int(ends[-1])
    unit = (ends - lengths) // max(UNIT_TOKENS, total // MOST_UNITS)
    first = np.flatnonzero(np.diff(unit, prepend=-1)).tolist()
    return [
        Batch(path, start, stop, float(ends[start] - lengths[start]) / total, 4 * int(lengths[start:stop].sum()))
        for start, stop in zip(first, [*first[1:], len(lengths)])
    ]


def _hay(source: Source, encoder: Encoder, spans: list[Span], share: float) -> Hay:
    encode = Encode(encoder.tokenizer)
    if not source.path:
        return Hay(grammar(np.random.default_rng([source.seed, 3, int(share * 2**53)])), encode)
    return Hay(texts_from(spans, encoder.fields, share), encode)


def _documents(
    source: Source,
    encoder: Encoder,
    marked: list[Piece],
    task: str,
    length: int,
    rng: np.random.Generator,
    hay: Hay,
) -> Iterator[np.ndarray]:
    """The document of a task, at most `length` tokens and nearly as many. Of the tasks OF_ONE_TEXT as many documents
    as fill that length, none of them shorter than the shortest length, or so: they are as long as texts are."""
    encode, ends = Encode(encoder.tokenizer), len(encoder.bos) + len(encoder.eos)
    least, left = min(source.lengths), length
    while left >= least:
        try:
            pieces = _make(source, task, marked, rng, hay, encode, left - ends, least - ends)
        except UserError as error:
            raise UserError(f"Data source {source.name!r}, task {task}: {error}") from error
        document = np.concatenate([encoder.bos, *(piece.ids for piece in pieces), encoder.eos]).astype(np.int32)
        if source.train_on == "answer":
            trained = [np.full(len(piece.ids), ASSISTANT if piece.answer else 0) for piece in pieces]
            roles = [np.zeros(len(encoder.bos)), *trained, np.full(len(encoder.eos), ASSISTANT)]
            document = np.stack([document, np.concatenate(roles).astype(np.int32)])
        yield document
        left -= document.shape[-1]
        if task not in OF_ONE_TEXT:
            return


def _make(
    source: Source,
    task: str,
    marked: list[Piece],
    rng: np.random.Generator,
    hay: Hay,
    encode: Encode,
    room: int,
    least: int,
) -> list[Piece]:
    for _ in range(TRIES):
        if task == "fill_middle":
            pieces = infill.fill_middle(source.fim_rate, source.fim_spm_rate, marked, rng, hay, encode, room, least)
        elif task == "chunk_order":
            pieces = sections.chunk_order(rng, hay, encode, room, least)
        elif task == "paragraph_order":
            pieces = sections.paragraph_order(rng, hay, encode, room, least)
        else:
            pieces = TASKS[task](rng, hay, encode, room)
        if pieces and size(pieces) <= room:
            return pieces
    raise UserError(
        f"no document of {room:,} tokens could be made in {TRIES} tries: make the shortest of lengths longer, or give "
        "more text without repetitions, in sentences."
    )
