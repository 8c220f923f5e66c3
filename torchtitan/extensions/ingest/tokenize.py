"""A source -> a tokenized corpus on disk, once: the cache that every rank, job and stage shares.

The result is a Hugging Face dataset folder (load_from_disk reads it) with a column `input_ids`, one document per row,
another column `roles` for conversations, and corpus.json beside it, which says what it was made of. Its name carries a
key over the content, the tokenizer and the BOS/EOS policy or chat template, so another input is another folder. Here
the work is laid out and done, whatever the source is; units.py says how it gets to the disk.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from torchtitan.config.data_schema import Data, Source
from torchtitan.datasets.corpus import CORPUS_FILE
from torchtitan.datasets.tokenizer import Tokenizer
from torchtitan.extensions.ingest.bad_records import BadRecordError, DamagedError, bad_in_all, by_part, check_share
from torchtitan.extensions.ingest.convert_tables import TablePart, TokenReader, parts_of, read_part
from torchtitan.extensions.ingest.deleted_text import check_none_deleted, corpus_of_deleted_text
from torchtitan.extensions.ingest.encoder import make_encoder
from torchtitan.extensions.ingest.find_text import NoTextError, find_text_files
from torchtitan.extensions.ingest.grouping import grouped_material, refuse_group_by
from torchtitan.extensions.ingest.open_text import kind_of, whole_suffix
from torchtitan.extensions.ingest.records import LINES, TABLES, Span
from torchtitan.extensions.ingest.remote import local_source, remote_metadata
from torchtitan.extensions.ingest.source_files import (
    Material,
    check_file_unchanged,
    hash_files,
    is_hub,
    source_path,
)
from torchtitan.extensions.ingest.text import encoded_documents, spans_of
from torchtitan.extensions.ingest.token_tables import Tables, ends_of, find_tables, refuse_column_keys
from torchtitan.extensions.ingest.units import (
    CorpusInProgress,
    Counts,
    begin,
    finish,
    folder_name,
    into_units,
    made_folder,
    unit_counts,
    unit_keys,
    write_unit,
)
from torchtitan.extensions.ingest.workers import Progress, WorkerKilledError, cores, run_units
from torchtitan.tools.errors import UserError
from torchtitan.tools.folders import is_writable, lock, make_writable, read_json

logger = logging.getLogger(__name__)

TEN_TIMES = 10
"""A source is given up early if too many of its records are bad even if the rest has so many times as many per byte."""


def tokenize_source(
    source: Source, tokenizer: Tokenizer, data: Data, num_proc: int | None = None, may_be_less: bool = True
) -> Path:
    """The folder of a source's corpus in data.cache_folder; the source is tokenized if the folder is missing.

    source.path is text (a file, folder or glob, find_text.py), a folder of MDS shards, or hub:NAME; of a synthetic
    source, text to make documents with.
    Documents keep the order of the sorted files and of the documents in them, whatever num_proc (default: the cores
    this process may use). Empty documents are left out and counted. A run that was killed is continued. If several
    processes ask for the same corpus, one works and the others wait. UserError for what cannot be read; without
    may_be_less also if the files are those of a finished corpus except some that are gone.
    """
    folder = tokenize_shard(source, tokenizer, data, 0, 1, num_proc, may_be_less)
    if folder is None:
        raise UserError(f"Part of the unfinished corpus of {source.name!r} was deleted while it was made: start again.")
    return folder


def tokenize_shard(
    source: Source,
    tokenizer: Tokenizer,
    data: Data,
    index: int,
    count: int,
    num_proc: int | None = None,
    may_be_less: bool = True,
) -> Path | None:
    """Shard `index` of `count` of tokenize_source's work: units index, index + count, ... of the same folder.

    Shards may run on several machines with one file system, at once or not, in any order and more than once; the one
    that finds all units done finishes the folder. Returns it, or None while units of other shards are missing.
    """
    if not 0 <= index < count:
        raise UserError(f"--shard-index {index} with --num-shards {count}: the index counts from 0 to {count - 1}.")
    cache = Path(data.cache_folder).expanduser().absolute()
    is_writable(cache)  # makes it, if it can; a finished corpus is all that is needed of it
    try:
        if isinstance(local := local_source(source, tokenizer, data), Path):
            return local
        material = material_of(local, tokenizer, data, cache, num_proc=num_proc)
        if isinstance(material, Path):
            return material
        if made := made_folder(cache, material.name, source.on_bad_record == "skip"):
            _check_made(made, source)
            return made
        lacks = f"It does not hold {material.name}, the corpus of data source {source.name!r} ({material.what})."
        make_writable("data.cache_folder", cache, lacks)
        if not may_be_less:
            check_none_deleted(source, cache, material.metadata)
        where_from = remote_metadata(source, local, tokenizer, data)
        material = replace(material, metadata=material.metadata | where_from)
        return _tokenize(material, source, cache, index, count, num_proc or cores())
    except OSError as error:
        raise UserError(
            f"Tokenizing data source {source.name!r} into data.cache_folder = {cache} failed: {error}. Are its files "
            f"readable, and is there room ({_free(cache) / 2**30:.2f} GiB are free)? Finished units "
            "are kept: start again to continue."
        ) from error


def _check_made(made: Path, source: Source) -> None:
    """UserError if more bad records were left out of a finished corpus than the source allows by now."""
    if source.on_bad_record == "skip" and (about := read_json(made / CORPUS_FILE)).get("bad_records"):
        check_share(
            source.name, about["bad_records"], sum(file["size"] for file in about["files"]), source.max_bad_share
        )


def _free(folder: Path) -> int:
    """Bytes that are free in a folder, or in the first above it that exists."""
    return shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free


def material_of(
    source: Source,
    tokenizer: Tokenizer,
    data: Data,
    cache: Path,
    of_files: Callable[..., Material] | None = None,
    instead: Callable[[Any], Any] = lambda encoder: encoder,
    num_proc: int | None = None,
) -> Material | Path:
    """What must be tokenized; or, if the hub cannot be reached or the text is gone, the finished corpus of an earlier
    run. of_files, instead: in place of _of_files, and of the encoder of text."""
    grouped = bool(source.group_by) and of_files is None
    of_files = of_files or _of_files
    if source.kind == "synthetic":
        from torchtitan.extensions.ingest.synthetic.source import synthetic_material

        return synthetic_material(source, tokenizer, data, cache)
    if not is_hub(source) and (tables := find_tables(source, data)):
        refuse_group_by(source, f"{source.path} holds tokens")
        return _of_tables(source, tables, tokenizer, data, cache, of_files)
    if is_hub(source):
        from torchtitan.extensions.ingest.hub import hub_material

        return hub_material(source, data, cache, instead(make_encoder(source, tokenizer, data)))
    path = source_path(source, data).absolute()
    if any("index.json" in names for _, _, names in os.walk(path)):
        from torchtitan.extensions.ingest.mds import find_mds, read_index
        from torchtitan.extensions.ingest.mds_rows import mds_reader

        if indexes := find_mds(path):
            refuse_group_by(source, f"{source.path} is a folder of MDS shards")
            if source.on_bad_record == "skip":
                raise UserError(
                    f'Data source {source.name!r} has on_bad_record = "skip", which is about records of text, but its '
                    f"path {source.path!r} is a folder of MDS shards: leave it out."
                )
            shards = [shard for index in indexes for shard in read_index(index)]
            reader, kind, read = mds_reader(source, shards, tokenizer, data)
            paths = [*indexes, *(Path(shard.path) for shard in shards)]
            what = f"{len(shards)} MDS shards"

            def whole(target: int) -> list[tuple[str, list[Any]]]:
                return [(shard.path, [shard]) for shard in shards]

            return of_files(source, cache, reader, paths, kind, what, whole, read)
    encoder = instead(make_encoder(source, tokenizer, data))
    try:
        files = find_text_files(source, data)
    except NoTextError:
        if corpus := corpus_of_deleted_text(source, data, cache, encoder.metadata):
            return corpus
        raise
    refuse_column_keys(source, f"{files[0]} is text")
    plain = [file for file in files if kind_of(file) not in (*LINES, *TABLES)]
    if plain:
        refuse_group_by(source, f"{plain[0]} is a text without fields")
    if grouped:
        return grouped_material(source, cache, encoder, files, num_proc or cores())
    if source.where and plain:
        raise UserError(
            f"Data source {source.name!r} has where = {source.where!r}, but {plain[0]} is a text without fields: leave "
            f"where out, or name files of records ({', '.join(LINES + TABLES)})."
        )

    def spans(target: int) -> list[tuple[str, list[Span]]]:
        return [(str(file), cut(str(file), target)) for file in files]

    def cut(file: str, target: int) -> list[Span]:
        try:
            return list(spans_of(file, target))
        except DamagedError:  # at its beginning
            if not encoder.fields.bad.skip:
                raise
            size = os.path.getsize(file)
            return [Span(file, 0, size, size)]

    what = f"{len(files)} files of text"
    return of_files(source, cache, encoder, files, encoder.fields.name, what, spans, encoded_documents)


def _of_tables(
    source: Source, tables: Tables, tokenizer: Tokenizer, data: Data, cache: Path, of_files: Callable[..., Material]
) -> Material:
    reader = TokenReader(tables.columns, tokenizer, *ends_of(source, tables.columns, tokenizer, data))

    def parts(target: int) -> list[tuple[str, list[TablePart]]]:
        return [(str(file), parts_of(file)) for file in tables.files]

    what = f"{len(tables.files)} files of tokens, which cannot be mapped"
    kind = json.dumps(["tokens", tables.columns.key])
    return of_files(source, cache, reader, list(tables.files), kind, what, parts, read_part)


def _of_files(
    source: Source,
    cache: Path,
    encoder: Any,
    paths: list[Path],
    kind: str,
    what: str,
    parts: Callable[[int], Sequence[tuple[str, Sequence[Any]]]],
    read: Callable[[Any, Any], Iterator[np.ndarray]],
) -> Material:
    """The material of local files. parts(bytes of a unit): a path and what the file is cut into, for each file; a part
    has a path and a size. read(part, encoder): its documents."""
    files = {file.path: file for file in hash_files(paths, cache)}
    total = sum(file.size for file in files.values())
    content = [(whole_suffix(file.path), file.sha256) for file in files.values()]
    name = folder_name(source.name, [[*encoder.key, kind], content])
    metadata = encoder.metadata | {
        "path": source.path,
        "fingerprint": name.rpartition("-")[2],
        "files": [file.metadata for file in files.values()],
    }

    def units() -> list[list[Any]]:
        return into_units(lambda target: [(files[path].sha256, cut) for path, cut in parts(target)], total)

    def made_of(part: Any) -> list[Any]:
        where = {key: value for key, value in asdict(part).items() if key != "path"}
        return [*encoder.key, kind, whole_suffix(part.path), files[part.path].sha256, where]

    def documents(part: Any) -> Iterator[np.ndarray]:
        try:
            yield from read(part, encoder)
        except DamagedError as error:
            encoder.fields.bad.add_rest(part.path, part.size, error)
        check_file_unchanged(files[part.path])  # before the unit counts as done: the key stands for this content

    return Material(name, made_of, metadata, f"{what}, {total / 1e6:.1f} MB", units, documents, encoder.closing)


def _tokenize(material: Material, source: Source, cache: Path, index: int, count: int, num_proc: int) -> Path | None:
    name = material.name
    skips = source.on_bad_record == "skip"
    # A shard's lock is held while its units are made: of two processes with the same shard, like the ranks of a job
    # (shard 0 of 1), one works and the other waits. Different shards work at the same time; only the last renaming
    # needs all their units, and finish() has a lock of its own for that. Units are right without any lock: on network
    # file systems that have none they are made twice, with the same bytes.
    with lock(cache, f"{name}.shard-{index}-of-{count}"):
        if made := made_folder(cache, name, skips):
            return made
        units = material.units()
        keys = unit_keys([list(map(material.made_of, unit)) for unit in units])
        corpus = CorpusInProgress(cache, name, keys, tuple([part.path for part in unit] for unit in units), skips)
        done = begin(corpus)
        if done is None:
            return made_folder(cache, name, skips)
        logger.info("%s: tokenizing %s", source.name, material.what)
        try:
            mine = range(index, len(units), count)
            _make_units(corpus, material, units, mine, done, num_proc, source.max_bad_share)
        except UserError as error:
            with contextlib.suppress(OSError):  # not empty: what is done is used again once the text is mended
                corpus.aside.rmdir()
            if not isinstance(error, BadRecordError):
                raise
            skip = f', or set on_bad_record = "skip" for data source {source.name!r} to have such records left out and'
            way_out = "" if source.group_by else f"{skip} counted"
            raise UserError(f"{error} What is done is kept: start again once that is mended{way_out}.") from error
        except WorkerKilledError as error:
            raise UserError(
                f"Tokenizing data source {source.name!r} failed: {error} Perhaps the system killed it because "
                "memory ran out: use a machine with more, or scripts/tokenize_corpus.py with a smaller --num-proc. "
                "Finished units are kept."
            ) from error
        except OSError:
            if made := made_folder(cache, name, skips):  # another process made the same units, and finished the folder
                return made
            raise
        missing = finish(corpus, material.metadata, source.max_bad_share)
    if not missing:
        return made_folder(cache, name, skips)
    shards = ", ".join(map(str, sorted({unit % count for unit in missing})))
    done_now = len(units) - len(missing)
    logger.info("%s: units %d of %d done; shards %s are still to come", source.name, done_now, len(units), shards)
    return None


def _make_units(
    corpus: CorpusInProgress,
    material: Material,
    units: list[list[Any]],
    mine: Sequence[int],
    done: dict[int, Counts],
    num_proc: int,
    max_bad_share: float,
) -> None:
    """Make those of the units `mine` that are not done. UserError if more than max_bad_share of the records are bad."""

    def work(unit: int) -> Counts:
        def closing() -> Counts:
            return by_part(material.closing(), corpus.paths[unit])

        documents = (document for part in units[unit] for document in material.documents(part))
        return unit_counts(corpus, unit) or write_unit(corpus, unit, documents, closing)  # perhaps done by now

    all_sizes = [sum(part.size for part in unit) for unit in units]
    sizes = {unit: all_sizes[unit] for unit in mine}
    known = dict(done)
    left = [unit for unit in mine if unit not in done]
    total, size_left = sum(sizes.values()), sum(sizes[unit] for unit in left)
    progress = Progress(f"tokenizing {corpus.source}", len(mine), total, len(mine) - len(left), total - size_left)
    for unit, counts in run_units(work, left, min(num_proc, len(left))):
        progress.advance(sizes[unit], counts["tokens"])
        known[unit] = counts
        if counts.get("bad"):
            bad = bad_in_all((known[i], corpus.paths[i]) for i in sorted(known))
            size, all_size = sum(all_sizes[i] for i in known), sum(all_sizes)
            still = TEN_TIMES * bad["of"] * (all_size - size) / max(1, size)
            check_share(corpus.source, bad, all_size, max_bad_share, still)
