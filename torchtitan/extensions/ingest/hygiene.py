"""Documents that a stage should not train on for what they hold: copies of others, and texts of the evaluation.

A copy has the same tokens as a document before it, BOS and EOS aside. A document of the evaluation shares a run of
data.decontaminate_tokens tokens with a text that is asked about. Here they are found, a corpus at a time, and kept
beside it in data.cache_folder; datasets/mixture.py leaves them out, and the report counts them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from torchtitan.config.data_schema import Data, Source
from torchtitan.config.schema import Evaluation
from torchtitan.datasets.corpus import Corpus, is_tokenized, open_corpus
from torchtitan.datasets.tokenizer import Tokenizer
from torchtitan.extensions.ingest.find_text import find_text_files
from torchtitan.extensions.ingest.open_text import kind_of, open_text
from torchtitan.extensions.ingest.resolve import resolve_source
from torchtitan.extensions.ingest.source_files import hash_files, source_path
from torchtitan.extensions.ingest.workers import Progress, cores
from torchtitan.tools.errors import UserError
from torchtitan.tools.folders import is_writable, lock, written

logger = logging.getLogger(__name__)

EVALUATION = "evaluation"
"""In data.decontaminate: evaluation.texts and evaluation.qa_files of this stage."""

CHUNK = 4 << 20
"""Tokens that are looked at at once."""

_BASE = 0x9E3779B97F4A7C15
"""Of the polynomial, modulo 2^64, that is a run's hash; odd, and in no relation to any vocabulary."""


def cleaning(evaluation: Evaluation) -> Callable[[Source, Tokenizer, Data], Corpus]:
    """resolve_source, which also finds the copies and the texts of the evaluation among a corpus's documents."""
    runs: list[np.ndarray] = []  # of the evaluation's texts

    def open_source(source: Source, tokenizer: Tokenizer, data: Data) -> Corpus:
        corpus = resolve_source(source, tokenizer, data)
        cache = Path(data.cache_folder).expanduser().absolute()
        made_here = cache in Path(corpus.folder).absolute().parents
        # Beside tokenizing, which is slower by far, it costs nothing.
        if data.drop_duplicates or (made_here and is_writable(cache)):
            corpus.hashes = document_hashes(corpus, tokenizer, cache)
        if data.decontaminate:
            if not runs:
                runs.append(runs_of_evaluation(evaluation, tokenizer, data))
            corpus.excluded = documents_with_runs(corpus, runs[0], data.decontaminate_tokens, cache)
        return corpus

    return open_source


def document_hashes(corpus: Corpus, tokenizer: Tokenizer, cache: Path) -> np.ndarray:
    """uint64[n], of the tokens of each document without BOS and EOS at its ends: 64 bits of BLAKE2b."""
    ends = [tokenizer.bos_id, tokenizer.eos_id]

    def make() -> np.ndarray:
        progress = Progress(f"comparing the documents of {corpus.folder}", len(corpus), corpus.tokens, 0, 0)
        result = np.zeros(len(corpus), np.uint64)
        for index in range(len(corpus)):
            ids = corpus.document(index)
            ids = ids[int(len(ids) > 0 and ids[0] == ends[0]) :]
            ids = ids[: len(ids) - int(len(ids) > 0 and ids[-1] == ends[1])]
            digest = hashlib.blake2b(ids.tobytes(), digest_size=8).digest()
            result[index] = int.from_bytes(digest, "little")
            progress.advance(len(ids), len(ids))
        return result

    return _kept(cache, f"hashes-{corpus.fingerprint}-{ends[0]}-{ends[1]}", make)


def documents_with_runs(corpus: Corpus, runs: np.ndarray, length: int, cache: Path) -> np.ndarray:
    """bool[n]: the documents that share a run of `length` tokens with a text; runs uint64[k], sorted: of the texts."""
    bits = max(16, min(27, 4 + len(runs).bit_length()))

    def look(likely: np.ndarray, first: int, tokens: np.ndarray, stops: np.ndarray) -> np.ndarray:
        hashes = run_hashes(tokens, length)
        hits = np.flatnonzero(likely[hashes >> np.uint64(64 - bits)])
        place = np.searchsorted(runs, hashes[hits])
        hits = hits[runs[np.minimum(place, len(runs) - 1)] == hashes[hits]]
        document = np.searchsorted(stops, hits, side="right")
        return first + document[hits + length <= stops[document]]

    def make() -> np.ndarray:
        found = np.zeros(len(corpus), bool)
        likely = np.zeros(1 << bits, bool)
        likely[runs >> np.uint64(64 - bits)] = True
        spans = _spans(corpus.lengths, length)
        title = f"looking for texts of the evaluation in {corpus.folder}"
        progress = Progress(title, len(spans), corpus.tokens, 0, 0)
        waiting: list[tuple[int, Future[np.ndarray]]] = []
        with ThreadPoolExecutor(cores()) as pool:
            for span in spans:
                tokens, stops = _read(corpus, span)
                waiting.append((len(tokens), pool.submit(look, likely, span[0], tokens, stops)))
                if len(waiting) > 2 * cores():
                    size, done = waiting.pop(0)
                    found[done.result()] = True
                    progress.advance(size, size)
            for _, done in waiting:
                found[done.result()] = True
        return found

    if not len(runs):
        return np.zeros(len(corpus), bool)
    digest = hashlib.sha256(runs.tobytes() + f"{length}".encode()).hexdigest()[:16]
    return _kept(cache, f"evaluation-{corpus.fingerprint}-{digest}", make)


Span = tuple[int, int, int, int | None]
"""Documents [first, end), and of a long one its tokens [start, stop)."""


def _spans(lengths: np.ndarray, length: int) -> list[Span]:
    """All documents, in spans of about CHUNK tokens; a longer document is several, which overlap by all but one token
    of a run."""
    spans: list[Span] = []
    first = held = 0
    for index, size in enumerate(lengths.tolist()):
        if held and held + size > CHUNK:
            spans.append((first, index, 0, None))
            held = 0
        if size > CHUNK:
            starts = range(0, size - length + 1, CHUNK)
            spans += [(index, index + 1, start, min(size, start + CHUNK + length - 1)) for start in starts]
            continue
        if not held:
            first = index
        held += size
    return [*spans, (first, len(lengths), 0, None)] if held else spans


def _read(corpus: Corpus, span: Span) -> tuple[np.ndarray, np.ndarray]:
    """The tokens of a span, and where each document ends in them."""
    first, end, start, stop = span
    parts = [corpus.document(index, start, stop) for index in range(first, end)]
    return np.concatenate(parts), np.cumsum([len(part) for part in parts])


def run_hashes(tokens: np.ndarray, length: int) -> np.ndarray:
    """uint64[n - length + 1]: the hash of each run of `length` of the tokens int[n]; [] if there are fewer."""
    if len(tokens) < length:
        return np.zeros(0, np.uint64)
    power = (tokens.astype(np.uint64) + np.uint64(1)) * np.uint64(0xD6E8FEB86659FD93)  # of runs of `size`
    result, done, size = np.zeros(0, np.uint64), 0, 1
    while True:
        if length & size:
            result = _joined(result, power[done:], size) if done else power
            done += size
        if done == length:
            return result
        power = _joined(power, power[size:], size)
        size *= 2


def _joined(first: np.ndarray, then: np.ndarray, size: int) -> np.ndarray:
    """The hashes of runs that are a run of `first` and one of `then`, which has `size` tokens."""
    count = min(len(first), len(then))
    return first[:count] * np.uint64(pow(_BASE, size, 1 << 64)) + then[:count]


def runs_of_evaluation(evaluation: Evaluation, tokenizer: Tokenizer, data: Data) -> np.ndarray:
    """uint64[k], sorted: the hashes of all runs of data.decontaminate_tokens tokens in the texts of data.decontaminate.

    UserError if one of them cannot be read, or if all are shorter than that.
    """
    length, cache = data.decontaminate_tokens, Path(data.cache_folder).expanduser().absolute()
    paths: list[str] = []
    for path in data.decontaminate:
        paths += [*evaluation.texts, *evaluation.qa_files] if path == EVALUATION else [path]
    if not paths:
        raise UserError(
            f'data.decontaminate = ["{EVALUATION}"] stands for evaluation.texts and evaluation.qa_files, but this '
            "stage has neither: name the files, or leave it out."
        )
    held = [_held_out(path, tokenizer, data) for path in paths]
    content = [
        item.fingerprint if isinstance(item, Corpus) else [[file.path, file.sha256] for file in hash_files(item, cache)]
        for item in held
    ]

    def make() -> np.ndarray:
        texts = short = 0
        found = [np.zeros(0, np.uint64)]
        for item in held:
            for ids in _token_lists(item, tokenizer):
                texts += 1
                short += len(ids) < length
                found.append(run_hashes(ids, length))
        return np.concatenate([np.array([texts, short], np.uint64), np.unique(np.concatenate(found))])

    what = json.dumps([tokenizer.fingerprint, length, content])
    kept = _kept(cache, f"runs-{hashlib.sha256(what.encode()).hexdigest()[:16]}", make)
    texts, short, runs = int(kept[0]), int(kept[1]), kept[2:]
    if not len(runs):
        raise UserError(
            f"data.decontaminate_tokens = {length}, but none of the {texts} texts in {', '.join(paths)} is as long: "
            "nothing could be found. Lower it, or name other files."
        )
    if short:
        logger.warning(
            "data.decontaminate: %d of %d texts have fewer than data.decontaminate_tokens = %d tokens: they are not "
            "looked for", short, texts, length,
        )  # fmt: skip
    return runs


def _held_out(path: str, tokenizer: Tokenizer, data: Data) -> Corpus | list[Path]:
    """What a path of data.decontaminate names: a tokenized folder, or files of text."""
    source = Source(name="data.decontaminate", path=path)
    if is_tokenized(source_path(source, data)):
        return open_corpus(source_path(source, data), tokenizer.fingerprint)
    return find_text_files(source, data)


def _token_lists(held: Corpus | list[Path], tokenizer: Tokenizer) -> Iterator[np.ndarray]:
    """The tokens of each text: of a tokenized folder its documents, of records every text in them."""
    if isinstance(held, Corpus):
        yield from (held.document(index) for index in range(len(held)))
        return
    for file in held:
        for text in _texts(file):
            yield np.array(tokenizer.encode(text), np.int32)


def _texts(file: Path) -> Iterator[str]:
    kind, where = kind_of(file), str(file)
    try:
        if kind == ".parquet":
            import pyarrow.parquet as pq

            for batch in pq.ParquetFile(file).iter_batches():
                yield from _strings(batch.to_pylist())
            return
        with open_text(str(file)) as opened:
            content = opened.read().decode("utf-8-sig")
        if kind == ".json":
            with contextlib.suppress(json.JSONDecodeError):  # else it holds lines
                yield from _strings(json.loads(content))
                return
        if kind in (".jsonl", ".ndjson", ".json"):
            for number, record in enumerate(content.split("\n"), 1):
                where = f"{file} line {number}"
                yield from _strings(json.loads(record)) if record.strip() else ()
        else:
            yield content
    except (ValueError, OSError, RecursionError) as error:
        raise UserError(
            f"data.decontaminate: {where} cannot be read: {error}. Mend it, or name other files."
        ) from error


def _strings(value: Any) -> Iterator[str]:
    """All texts in a JSON value, at any depth."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _strings(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _strings(inner)


def _kept(cache: Path, name: str, make: Callable[[], np.ndarray]) -> np.ndarray:
    """What `make` returns, kept in the cache folder: of several ranks one makes it and the others wait."""
    file = cache / "documents" / f"{name}.npy"
    if not file.is_file():
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with lock(file.parent, name):
                if not file.is_file():
                    result = make()
                    with written(file, unique=True) as path, path.open("wb") as opened:
                        np.save(opened, result)
        except OSError as error:
            logger.warning("%s cannot be written (%s): it is made again at every start", file, error)
            return make()
    try:
        return np.asarray(np.load(file, mmap_mode="r"))
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{file} is damaged ({error}): delete it.") from error
