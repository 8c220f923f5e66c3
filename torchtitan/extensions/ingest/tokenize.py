"""A source -> a tokenized corpus on disk, once: the cache that every rank, job and stage shares.

The result is a Hugging Face dataset folder (load_from_disk reads it) with a column `input_ids`, a document a row, for
conversations another one, `roles`, and corpus.json beside it that says what it was made of. Its name carries a key over
the content, the tokenizer and the BOS/EOS policy or chat template, so another input is another folder. Here the work on
files is laid out and done: text is encoded, token ids in MDS shards are taken over. units.py says how it gets to the
disk; datasets of the hub are in hub.py.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from torchtitan.config.schema import Data, Source
from torchtitan.datasets.tokenizer import Tokenizer
from torchtitan.extensions.ingest.chat import ChatEncoder
from torchtitan.extensions.ingest.documents import Encoder, make_encoder, policy_about, policy_key
from torchtitan.extensions.ingest.hub import is_hub, stream_source
from torchtitan.extensions.ingest.mds import MdsShard, find_mds, read_index, read_shard
from torchtitan.extensions.ingest.source_files import ChangedError, check_unchanged, hash_files, source_path
from torchtitan.extensions.ingest.text import Span, find_text_files, read_records, spans_of
from torchtitan.extensions.ingest.units import (
    Counts,
    Place,
    begin,
    cut_of,
    finish,
    folder_name,
    is_made,
    unit_counts,
    write_unit,
)
from torchtitan.extensions.ingest.workers import Progress, WorkerKilledError, cores, run_units
from torchtitan.tools.errors import UserError
from torchtitan.tools.folders import lock, make_writable

logger = logging.getLogger(__name__)

UNIT_BYTES = 4 << 20  # a unit of work and a shard: small enough that the cores end together and a kill costs little ...
MOST_UNITS = 2048  # ... but their number stays bounded: each is a map of every process, and Linux gives it 65,530
"""How a source is cut; another cut is other units, so neither may depend on the machine or the processes."""


def tokenize_source(source: Source, tokenizer: Tokenizer, data: Data, num_proc: int | None = None) -> Path:
    """Tokenize a source unless it is in the cache; the folder.

    source.path is text (a file, folder or glob of .jsonl, .parquet, .txt), a folder of MDS shards, or hub:NAME.
    Documents keep the order of the sorted files and of the documents in them, whatever num_proc (default: the cores
    this process may use). Empty documents are left out and counted. A run that was killed is continued, and of
    several processes that ask for the same one works and the others wait. UserError for what cannot be read.
    """
    folder = tokenize_shard(source, tokenizer, data, 0, 1, num_proc)
    if folder is None:
        raise UserError(f"Part of the unfinished corpus of {source.name!r} was deleted while it was made: start again.")
    return folder


def tokenize_shard(
    source: Source, tokenizer: Tokenizer, data: Data, index: int, count: int, num_proc: int | None = None
) -> Path | None:
    """Shard `index` of `count` of tokenize_source's work: units index, index + count, ... of the same folder.

    Shards may run on several machines with one file system, at once or not, in any order and more than once; the one
    that finds all units done finishes the folder. Returns it, or None while units of other shards are missing. A hub
    dataset is one stream, and all of it is shard 0.
    """
    if not 0 <= index < count:
        raise UserError(f"--shard-index {index} with --num-shards {count}: the index counts from 0 to {count - 1}.")
    cache = Path(data.cache_folder).expanduser().absolute()
    make_writable("data.cache_folder", cache)
    try:
        if is_hub(source):
            if index > 0:
                logger.info("%s: a hub dataset is one stream, which shard 0 tokenizes", source.name)
                return None
            return stream_source(source, tokenizer, data, cache, num_proc or cores())
        return _tokenize_files(cache, source, tokenizer, data, index, count, num_proc or cores())
    except OSError as error:
        raise UserError(
            f"Tokenizing data source {source.name!r} into data.cache_folder = {cache} failed: {error}. Are its files "
            f"readable, and is there room ({shutil.disk_usage(cache).free / 2**30:.2f} GiB are free)? What is done is "
            "kept: start again to continue."
        ) from error


def _tokenize_files(
    cache: Path, source: Source, tokenizer: Tokenizer, data: Data, index: int, count: int, num_proc: int
) -> Path | None:
    encoder = make_encoder(source, tokenizer, data)
    indexes = find_mds(source_path(source, data).absolute())
    if indexes and isinstance(encoder, ChatEncoder):
        raise UserError(
            f"Data source {source.name!r} has messages_field = {source.messages_field!r}, but its path {source.path!r} "
            "is a folder of MDS shards, which hold tokens: leave messages_field out. Their column mask is used."
        )
    mds_shards = [shard for path in indexes for shard in read_index(path)]
    paths = [*indexes, *(Path(shard.path) for shard in mds_shards)] if indexes else find_text_files(source, data)
    files = hash_files(paths, cache)
    what = "mds" if indexes else encoder.fields.name
    if mds_shards and any(shard.has_mask for shard in mds_shards):
        what = "mds with masks"
    content = [(Path(file.path).suffix, file.sha256) for file in files]
    name = folder_name(source.name, [[*policy_key(source, tokenizer, data), what], content])
    if is_made(cache, name):
        return cache / name

    target = max(UNIT_BYTES, sum(file.size for file in files) // MOST_UNITS)
    parts = mds_shards if indexes else [span for file in files for span in spans_of(file.path, target)]
    units = into_units(parts, target)
    sizes = [sum(part.size for part in unit) for unit in units]
    place = Place(cache, name, cut_of([[part.size for part in unit] for unit in units]))
    about = policy_about(source, tokenizer, data) | {
        "path": source.path,
        "fingerprint": name.rpartition("-")[2],
        "files": [asdict(file) for file in files],
    }
    known = {file.path: file for file in files}

    def documents(unit: list[Any]) -> Iterator[np.ndarray]:
        for part in unit:
            yield from _documents_of(part, encoder)
            check_unchanged(known[part.path])  # before the unit counts as done: the key stands for this content

    # A shard's lock is held while its units are made, so that of two processes with the same shard, like the ranks of
    # a job (shard 0 of 1), one works and the others wait. Different shards work side by side; only the last renaming
    # needs all their units, and finish() has a lock of its own for that. The units themselves are right without any
    # lock: where locks do not reach (some network file systems) they are made twice, with the same bytes.
    with lock(cache, f"{name}.shard-{index}-of-{count}"):
        done = begin(place)
        if done is None:
            return place.folder
        what = f"{len(mds_shards)} MDS shards" if indexes else f"{len(files)} files of text"
        logger.info("%s: tokenizing %s, %.1f MB", source.name, what, sum(file.size for file in files) / 1e6)
        try:
            mine = range(index, len(units), count)
            _make_units(place, mine, sizes, done, lambda i: documents(units[i]), encoder.closing, num_proc)
        except ChangedError:
            raise  # what is done is of the content that was hashed, and good if only the file's time has changed
        except UserError:
            if count == 1:  # the same content would always end so, and other content gets another folder
                shutil.rmtree(place.aside, ignore_errors=True)
            raise
        except WorkerKilledError as error:
            raise UserError(
                f"Tokenizing data source {source.name!r} failed: {error} Perhaps the system killed it for want of "
                "memory; a machine with more, or scripts/tokenize_corpus.py with a smaller --num-proc, would do. What "
                "is done is kept."
            ) from error
        except OSError:
            if is_made(cache, name):  # others did the same units, were first, and have put them away
                return place.folder
            raise
        missing = finish(place, len(units), about)
    if not missing:
        return place.folder
    shards = ", ".join(map(str, sorted({unit % count for unit in missing})))
    done_now = len(units) - len(missing)
    logger.info("%s: units %d of %d done; shards %s are still to come", source.name, done_now, len(units), shards)
    return None


def _make_units(
    place: Place,
    mine: Sequence[int],
    sizes: Sequence[int],
    done: dict[int, Counts],
    documents: Callable[[int], Iterator[np.ndarray]],
    closing: Callable[[], Counts],
    num_proc: int,
) -> None:
    """Make those of the units `mine` that are not done. sizes: of all units, for the progress."""

    def work(unit: int) -> Counts:
        return unit_counts(place, unit) or write_unit(place, unit, documents(unit), closing)  # perhaps done by now

    todo = [unit for unit in mine if unit not in done]
    total, left = sum(sizes[unit] for unit in mine), sum(sizes[unit] for unit in todo)
    progress = Progress(f"tokenizing {place.source}", len(mine), total, len(mine) - len(todo), total - left)
    for unit, counts in run_units(work, todo, min(num_proc, len(todo)), progress):
        progress.advance(1, sizes[unit], counts["tokens"])


def _documents_of(part: Span | MdsShard, encoder: Encoder | ChatEncoder) -> Iterator[np.ndarray]:
    """The documents of a part of a file, int32[n] each, or int32[2, n] with the tokens' roles."""
    if isinstance(part, MdsShard):
        assert isinstance(encoder, Encoder)
        for document, whole in read_shard(part):
            yield document if whole or not document.size else encoder.add_ends(document)
    else:
        read: Callable[[dict[str, Any]], Any] = encoder.read
        for one in read_records(part, encoder.fields, read):
            yield encoder.encode_batch([one])[0]


def into_units(parts: Sequence[Any], target: int) -> list[list[Any]]:
    """Units of work in document order: parts, which have a size, put together up to about `target`."""
    units: list[list[Any]] = []
    held = 0
    for part in parts:
        if not units or held + part.size > target:
            units.append([])
            held = 0
        units[-1].append(part)
        held += part.size
    return units
