"""group_by: the records of a source that have the same value in a field become one document, wherever they stand.

Done on disk, so that a source may be larger than memory. First each span is read, and its records are written into
buckets, by a hash of the field: Arrow files with one record batch for each bucket, beside the unfinished corpus. Then
each bucket is read from all of these files and its groups are tokenized, one after the other; a bucket is a unit of
work. What is in memory is a run of RUN_BYTES while buckets are filled, and later the names of a bucket's groups and one
document's tokens. Both steps go on where they were stopped. The buckets are deleted with the unfinished corpus.
"""

from __future__ import annotations

import json
import logging
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from torchtitan.config.data_schema import Source
from torchtitan.datasets.long_text import LONG, LongText
from torchtitan.extensions.ingest.bad_records import BadRecordError, RecordError
from torchtitan.extensions.ingest.open_text import compression, kind_of, whole_suffix
from torchtitan.extensions.ingest.parts import in_order
from torchtitan.extensions.ingest.records import Span
from torchtitan.extensions.ingest.source_files import Material, SourceFile, check_file_unchanged, hash_files
from torchtitan.extensions.ingest.text import read_records, spans_of
from torchtitan.extensions.ingest.units import MOST_UNITS, Counts, folder_name
from torchtitan.extensions.ingest.workers import Progress, run_units
from torchtitan.tools.errors import UserError
from torchtitan.tools.folders import lock, read_json, written

logger = logging.getLogger(__name__)

RUN_BYTES = 32 << 20
"""Of text, before it is written into buckets; about as much is a bucket."""
MOST_RUNS = 4096
MOST_BUCKETS = MOST_UNITS // 2
UNPACKED = 4
"""How much larger text is taken to be than its compressed file."""


@dataclass(frozen=True)
class Bucket:
    """The groups whose hash is `index`; path: the folder of the buckets. size: bytes of text."""

    path: str
    index: int
    size: int


def grouped_material(source: Source, cache: Path, encoder: Any, paths: Sequence[Path], num_proc: int) -> Material:
    """What tokenize.py needs of a source with group_by, whose files are `paths`."""
    files = {file.path: file for file in hash_files(list(paths), cache)}
    content = [(whole_suffix(file.path), file.sha256) for file in files.values()]
    key = encoder.key
    name = folder_name(source.name, [key, content])
    total = sum(file.size * (UNPACKED if _packed(file.path) else 1) for file in files.values())
    buckets = max(1, min(MOST_BUCKETS, -(-total // RUN_BYTES)))
    folder = cache / f".unfinished-{name}.groups"  # deleted with the rest that is unfinished
    metadata = encoder.metadata | {
        "path": source.path,
        "fingerprint": name.rpartition("-")[2],
        "files": [file.metadata for file in files.values()],
    }
    counted: list[Counts] = []  # of the first step, for the unit that is at work

    def units() -> list[list[Bucket]]:
        with lock(cache, f"{name}.groups"):
            for other in cache.glob(f".unfinished-{name.rpartition('-')[0]}-*.groups"):
                if other != folder:
                    logger.info("%s was left by a run over other text or settings: delete it (rm -r)", other)
            folder.mkdir(exist_ok=True)
            run_bytes = max(RUN_BYTES, total // MOST_RUNS)
            _fill(folder, source, encoder, files, buckets, run_bytes, num_proc)
        sizes = [0] * buckets
        for counts in _counts(folder):
            sizes = [size + more for size, more in zip(sizes, counts["sizes"], strict=True)]
        return [[Bucket(str(folder), index, size)] for index, size in enumerate(sizes) if size or index == 0]

    def documents(bucket: Bucket) -> Iterator[np.ndarray]:
        if bucket.index == 0:
            counted.append(_in_all(_counts(folder)))
        yield from _documents(bucket, encoder)

    def closing() -> Counts:
        return encoder.closing() | (counted.pop() if counted else {})

    def made_of(bucket: Bucket) -> list[Any]:
        return [key, content, bucket.index, buckets]

    what = f"{len(files)} files of text, grouped by {source.group_by}"
    return Material(name, made_of, metadata, what, units, documents, closing)


def _packed(path: str) -> bool:
    return bool(compression(path)) or kind_of(path) == ".parquet"


def _fill(
    folder: Path,
    source: Source,
    encoder: Any,
    files: dict[str, SourceFile],
    buckets: int,
    run_bytes: int,
    num_proc: int,
) -> None:
    """Write the buckets; of what a killed run has done nothing is made again."""
    spans = [span for path in files for span in spans_of(path, run_bytes)]
    left = [index for index in range(len(spans)) if not _counts_file(folder, index).is_file()]

    def work(index: int) -> Counts:
        counts = _fill_from(folder, index, spans[index], source, encoder, buckets, run_bytes)
        check_file_unchanged(files[spans[index].path])
        with written(_counts_file(folder, index), durable=True, unique=True) as path:
            path.write_text(json.dumps(counts))
        return {"tokens": 0}

    size, size_left = sum(span.size for span in spans), sum(spans[index].size for index in left)
    progress = Progress(f"grouping {source.name}", len(spans), size, len(spans) - len(left), size - size_left)
    for index, _ in run_units(work, left, min(num_proc, len(left))):
        progress.advance(spans[index].size, 0)


def _counts_file(folder: Path, index: int) -> Path:
    return folder / f"span-{index:06d}.json"


def _counts(folder: Path) -> Iterator[Counts]:
    return (read_json(path) for path in sorted(folder.glob("span-*.json")))


def _in_all(counts: Iterator[Counts]) -> Counts:
    """What `where` has counted in all spans, as Where.counts gives it."""
    all_of_them = [one["where"] for one in counts if one["where"]]
    if not all_of_them:
        return {}
    added: dict[str, Counter[str]] = {"left_out": Counter(), "lacking": Counter()}
    for one in all_of_them:
        for name in added:
            added[name].update(one[name])
    return {"records": sum(one["records"] for one in all_of_them)} | {name: dict(sums) for name, sums in added.items()}


def _fill_from(
    folder: Path, index: int, span: Span, source: Source, encoder: Any, buckets: int, run_bytes: int
) -> Counts:
    """Write the records of a span; how many bytes of text each bucket has got, the number of runs, and what `where`
    has counted."""
    sizes = [0] * buckets
    held: list[list[tuple[str, str, bytes]]] = [[] for _ in range(buckets)]
    runs = size = 0
    for name, rank, text in read_records(span, encoder.fields, _reader(encoder)):
        if not text:
            continue
        bucket = zlib.crc32(name.encode()) % buckets
        held[bucket].append((name, rank, text))
        sizes[bucket] += len(text)
        size += len(text)
        if size >= run_bytes:
            _write_run(folder / f"span-{index:06d}-{runs:05d}.arrow", held)
            held = [[] for _ in range(buckets)]
            runs, size = runs + 1, 0
    if size:
        _write_run(folder / f"span-{index:06d}-{runs:05d}.arrow", held)
        runs += 1
    return {"sizes": sizes, "runs": runs, "where": encoder.closing() if encoder.fields.where else {}}


def _reader(encoder: Any) -> Callable[[dict[str, Any]], tuple[str, str, bytes]]:
    """A record -> (its group and its rank, as JSON, and its text behind the header, b"" for a blank one)."""

    def read(record: dict[str, Any]) -> tuple[str, str, bytes]:
        group = encoder.parts.group(record)
        rank = encoder.parts.rank(record)
        text = encoder.read(record)
        content = b"".join(part.encode() for part in text) if isinstance(text, LongText) else (text or "").encode()
        head = encoder.parts.head(record).encode() if content else b""
        return json.dumps(group), json.dumps(rank), head + content

    return read


def _write_run(path: Path, held: Sequence[Sequence[tuple[str, str, bytes]]]) -> None:
    import pyarrow as pa

    schema = pa.schema([("group", pa.large_string()), ("rank", pa.large_string()), ("text", pa.large_binary())])
    with written(path, durable=True, unique=True) as aside, pa.ipc.new_file(str(aside), schema) as file:
        for rows in held:
            columns = list(zip(*rows)) or [(), (), ()]
            arrays = [pa.array(column, field.type) for column, field in zip(columns, schema)]
            file.write_batch(pa.record_batch(arrays, schema=schema))


def _documents(bucket: Bucket, encoder: Any) -> Iterator[np.ndarray]:
    """The groups of a bucket as documents, in the order in which they are met first."""
    import pyarrow as pa

    folder = Path(bucket.path)
    runs: list[Any] = []  # of each, the column of texts
    groups: dict[str, list[tuple[int, int]]] = {}
    ranks: dict[str, list[Any]] = {}
    for index, counts in enumerate(_counts(folder)):
        for number in range(counts["runs"]):
            with pa.memory_map(str(folder / f"span-{index:06d}-{number:05d}.arrow")) as mapped:
                batch = pa.ipc.open_file(mapped).get_batch(bucket.index)
            for row, (group, rank) in enumerate(zip(batch["group"].to_pylist(), batch["rank"].to_pylist())):
                groups.setdefault(group, []).append((len(runs), row))
                ranks.setdefault(group, []).append(json.loads(rank))
            runs.append(batch["text"])
    for group, places in groups.items():
        try:
            places = in_order(places, ranks.pop(group), json.loads(group))
        except RecordError as error:
            raise BadRecordError(f"The group {group}: {error}") from error
        size = sum(len(runs[run][row].as_buffer()) for run, row in places)
        texts = (text for run, row in places for text in _ended(runs[run][row].as_buffer()))
        if size > LONG:
            yield encoder.tokenizer.encode_long(texts, encoder.bos, encoder.eos)
        else:
            yield encoder.encode("".join(texts))


def _ended(content: Any) -> Iterator[str]:
    """A part in pieces, with a line break at its end."""
    last = ""
    for last in LongText(content):
        yield last
    if not last.endswith("\n"):
        yield "\n"


def refuse_group_by(source: Source, what: str) -> None:
    """UserError if group_by is given for a source that has no fields, or is not read from files here."""
    if source.group_by:
        raise UserError(
            f"Data source {source.name!r} has group_by = {source.group_by!r}, but {what}: leave it out, or name files "
            "of records (.jsonl, .json, .parquet, .arrow)."
        )
