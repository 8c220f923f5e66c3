"""A corpus folder while it is made: units of work that outlive a killed run, and the finished folder made of them.

While the corpus NAME-KEY is made, a folder .unfinished-NAME-KEY.CUT stands beside it. A finished unit is two files in
there: its documents (unit-00012-ITS_KEY.arrow) and what was counted in them (the same, .json). Each is written under
another name, synced and renamed, the .json last, so that a unit is whole or absent, whenever a process is killed; the
next run makes the missing units. A unit's key stands for what it is made of (unit_keys), KEY for the whole content, the
tokenizer and the BOS/EOS policy, CUT for the units: making a unit twice only writes the same bytes again, and a unit of
another corpus of the source can be taken over if it has the same key (reused_units.py).
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import itertools
import json
import logging
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from torchtitan.datasets.corpus import CONVERSATIONS_LEFT_OUT, CORPUS_FILE, STATE_FILE
from torchtitan.extensions.ingest.bad_records import bad_in_all, check_share
from torchtitan.extensions.ingest.reused_units import UNITS_FILE, left_folders, take_over
from torchtitan.tools.errors import UserError
from torchtitan.tools.folders import lock, read_json, sync, written

logger = logging.getLogger(__name__)

UNIT_BYTES = 4 << 20  # a unit of work and a shard: small enough that the cores end together and a kill costs little ...
MOST_UNITS = 2048  # ... but their number stays bounded: each is a file to open at every start
"""How a source is cut into units. Neither may depend on the machine or on how many processes work."""

RECORD_BATCH_TOKENS = 4 << 20  # what a worker holds in memory

UNIT_FORMAT = 1
"""Version of how a unit is written and counted; part of its key."""

Counts = dict[str, Any]
"""Of one unit: documents, tokens, empty, max_token_id, bytes (of its .arrow file), and what its encoder adds."""


@dataclass(frozen=True)
class CorpusInProgress:
    """Where a corpus is made. name: that of the finished folder, NAME-KEY, if no record is left out as bad. keys:
    unit_keys() of its units. paths: of the parts of each. skips: units from which bad records are left out are good."""

    cache: Path
    name: str
    keys: tuple[str, ...]
    paths: tuple[list[str], ...]
    skips: bool

    @property
    def source(self) -> str:
        """The source's name: `name` without the key."""
        return self.name.rpartition("-")[0]

    @property
    def aside(self) -> Path:
        """The unfinished folder."""
        cut = hashlib.sha256("".join(self.keys).encode()).hexdigest()[:8]
        return self.cache / f".unfinished-{self.name}.{cut}"


def folder_name(source_name: str, key: list[Any]) -> str:
    """NAME-KEY of a source's corpus; the key is 16 hex digits over `key`, which must be JSON."""
    safe = re.sub(r"[^\w.-]", "_", source_name) or "text"
    return f"{safe}-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]}"


def unit_bytes(total: int) -> int:
    """About how many bytes of a source of `total` bytes are a unit: UNIT_BYTES, twice, four times, ... as many, so that
    a source that grows a little is cut as before."""
    target = UNIT_BYTES
    while total > target * MOST_UNITS:
        target *= 2
    return target


def into_units(parts_of: Callable[[int], Sequence[tuple[str, Sequence[Any]]]], total: int) -> list[list[Any]]:
    """At most MOST_UNITS units of work, in document order, over files of `total` bytes in all.

    parts_of(bytes of a unit): of each file the SHA-256 of its content, in hex, and its parts, which have a size.
    """
    target = unit_bytes(total)
    while len(units := _cut(parts_of(target), target)) > MOST_UNITS:
        target *= 2
    return units


def _cut(files: Sequence[tuple[str, Sequence[Any]]], target: int) -> list[list[Any]]:
    """A file of `target` bytes or more has units of its own, of about so many. Smaller files share units, up to twice
    as large, that end behind files which their content picks: where a file is mended, added or taken out, the units
    before and after are what they were."""
    units: list[list[Any]] = []
    shared, held = False, 0  # whether the last unit may go on with the next file, and its size
    for digest, parts in files:
        size = sum(part.size for part in parts)
        small = size < target
        most = 2 * target if small else target
        if not (small and shared and held + size <= most):
            shared, held = False, 0
        for part in parts:
            if not shared or (not small and held + part.size > most):
                units.append([])
                shared, held = True, 0
            units[-1].append(part)
            held += part.size
        # of the files of a unit's size all end it, of those of half that size a half, ...
        shared = shared and small and int(digest[:16], 16) * target >= size << 64
    return units


def unit_keys(made_of: Sequence[Any]) -> tuple[str, ...]:
    """The keys of units, 32 hex digits each. made_of: JSON of each, of all that its bytes depend on: the content of its
    files, where its parts lie in them, tokenizer and options. Units of the same content are told apart by a count."""
    seen: Counter[str] = Counter()
    keys = []
    for one in made_of:
        text = json.dumps([UNIT_FORMAT, RECORD_BATCH_TOKENS, one])
        keys.append(hashlib.sha256(f"{text} {seen[text]}".encode()).hexdigest()[:32])
        seen[text] += 1
    return tuple(keys)


def made_folder(cache: Path, name: str, skips: bool) -> Path | None:
    """The finished folder, if it exists; what a killed run may have left beside it is deleted then. skips: it may also
    be one from which bad records were left out."""
    for one in (name, _skipped(name))[: 1 + skips]:
        if (cache / one).is_dir():
            _delete_unfinished(cache, name)
            return cache / one
    return None


def _skipped(name: str) -> str:
    """The name of the corpus that is `name` without its bad records: another content, with another key."""
    source, _, key = name.rpartition("-")
    return f"{source}-{hashlib.sha256(f'{key} without bad records'.encode()).hexdigest()[:16]}"


def _delete_unfinished(cache: Path, name: str) -> None:
    for left in cache.glob(f".unfinished-{glob.escape(name)}.*"):
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:  # what hub.py has downloaded
            with contextlib.suppress(OSError):
                left.unlink()


def begin(corpus: CorpusInProgress) -> dict[int, Counts] | None:
    """Make the unfinished folder if it is missing. The counts of the units that are done; None if the corpus is."""
    with lock(corpus.cache, corpus.name):  # not while another process finishes it
        if made_folder(corpus.cache, corpus.name, corpus.skips):
            return None
        corpus.aside.mkdir(exist_ok=True)
        done = finished_units(corpus)
        if done:
            logger.info("%s: %d units are done already, in %s", corpus.source, len(done), corpus.aside)
        left = [folder for folder in left_folders(corpus.cache, corpus.source) if folder != corpus.aside]
        missing = {key: unit_file(corpus, index) for index, key in enumerate(corpus.keys) if index not in done}
        if take_over(corpus.cache, corpus.source, left, missing, corpus.skips):
            done = finished_units(corpus)
    for folder in left:
        logger.info(
            "%s was left by a run over other text or settings; what can be used of it is: delete it (rm -r) if no run "
            "is at work in it and that text is not coming back",
            folder,
        )
    return done


def write_unit(
    corpus: CorpusInProgress, index: int, documents: Iterable[np.ndarray], closing: Callable[[], Counts] = dict
) -> Counts:
    """Write unit `index` of the documents' tokens and return its counts.

    A document is int32[n], or int32[2, n] with the tokens' roles in its second row; all documents of a corpus have the
    same form. Empty ones are only counted. closing is called after the last document; its result joins the counts.
    """
    import pyarrow as pa

    counts: Counts = {"documents": 0, "tokens": 0, "empty": 0, "max_token_id": -1}
    batches = _record_batches(documents, counts)
    with written(unit_file(corpus, index), durable=True, unique=True) as path:
        with pa.OSFile(str(path), "wb") as sink:
            if (first := next(batches, None)) is not None:
                with pa.ipc.new_stream(sink, first.schema) as writer:
                    for batch in itertools.chain([first], batches):
                        writer.write_batch(batch)
        counts["bytes"] = os.path.getsize(path)
    counts |= closing()
    with written(unit_file(corpus, index).with_suffix(".json"), durable=True, unique=True) as path:
        path.write_text(json.dumps(counts))
    return counts


def _record_batches(documents: Iterable[np.ndarray], counts: Counts) -> Iterator[Any]:
    """Arrow record batches of about RECORD_BATCH_TOKENS tokens; adds the documents to `counts`."""
    held: list[np.ndarray] = []  # int32[1 or 2, n] each
    tokens = 0
    for document in map(np.atleast_2d, documents):
        length = document.shape[1]
        if not length:
            counts["empty"] += 1
            continue
        if held and tokens + length > RECORD_BATCH_TOKENS:
            yield _record_batch(held)
            held, tokens = [], 0
        held.append(document)
        tokens += length
        counts["documents"] += 1
        counts["tokens"] += length
        counts["max_token_id"] = max(counts["max_token_id"], int(document[0].max()))
    if held:
        yield _record_batch(held)


def _record_batch(documents: list[np.ndarray]) -> Any:
    import pyarrow as pa
    from datasets import Features

    offsets = np.cumsum([0, *(document.shape[1] for document in documents)]).astype(np.int32)
    tokens, *roles = documents[0] if len(documents) == 1 else np.concatenate(documents, axis=1)
    values = [pa.array(tokens), *(pa.array(row.astype(np.int8)) for row in roles)]
    schema = pa.schema([(name, pa.list_(column.type)) for name, column in zip(("input_ids", "roles"), values)])
    columns = [pa.ListArray.from_arrays(offsets, column) for column in values]
    return pa.record_batch(columns, schema=Features.from_arrow_schema(schema).arrow_schema)


def finished_units(corpus: CorpusInProgress) -> dict[int, Counts]:
    """Counts of the units that are whole, by index."""
    indices = range(len(corpus.keys))
    return {index: counts for index in indices if (counts := unit_counts(corpus, index)) is not None}


def unit_counts(corpus: CorpusInProgress, index: int) -> Counts | None:
    """What write_unit returned for the unit; None unless the unit is whole, and bad records are left out of it only if
    they may be."""
    with contextlib.suppress(OSError, UserError):  # missing, or not written out before the power went
        counts = read_json(unit_file(corpus, index).with_suffix(".json"))
        if counts.get("bad") and not corpus.skips:
            return None
        # Once finish() has begun, it has found all units whole and moves their files.
        moved = (corpus.aside / CORPUS_FILE).is_file()
        if moved or unit_file(corpus, index).stat().st_size == counts["bytes"]:
            return counts
    return None


def unit_file(corpus: CorpusInProgress, index: int) -> Path:
    """The documents of a unit, while the corpus is unfinished."""
    return corpus.aside / f"unit-{index:05d}-{corpus.keys[index]}.arrow"


def finish(corpus: CorpusInProgress, metadata: dict[str, Any], max_bad_share: float) -> list[int]:
    """Make the finished folder if all units are done. The missing units; []: the folder is finished.

    metadata: what corpus.json says beside the counts. Units become shards by renaming: no token is written twice. If a
    run is killed in here, the next run continues: the corpus.json beside the units says that none was missing.
    UserError, which costs no unit, if nothing is left, or if more than max_bad_share of the records are bad.
    """
    with lock(corpus.cache, corpus.name):
        if made_folder(corpus.cache, corpus.name, corpus.skips):
            return []
        done = finished_units(corpus)
        units = range(len(corpus.keys))
        if missing := [index for index in units if index not in done]:
            return missing
        bad = bad_in_all((done[i], corpus.paths[i]) for i in units)
        check_share(corpus.source, bad, sum(file["size"] for file in metadata["files"]), max_bad_share)
        kept = [index for index in units if done[index]["documents"]]
        left_out: Counter[str] = sum((Counter(done[i].get("left_out", {})) for i in units), Counter())
        records = sum(done[i].get("records", 0) for i in units)
        lacking: Counter[str] = sum((Counter(done[i].get("lacking", {})) for i in units), Counter())
        if never := [field for field, count in lacking.items() if count == records]:
            raise UserError(
                f"Data source {corpus.source!r}: where = {metadata['where']!r} names the field {never[0]!r}, which "
                f"none of the {records} records of {metadata['path']!r} has. Mend its name."
            )
        if not kept:
            why = "; ".join(f"{count} {CONVERSATIONS_LEFT_OUT[reason]}" for reason, count in left_out.items() if count)
            raise UserError(
                f"Data source {corpus.source!r} holds no document with text: everything that its path "
                f"{metadata['path']!r} names is left out ({why or 'empty or blank'})."
            )
        names = [f"data-{number:05d}-of-{len(kept):05d}.arrow" for number in range(len(kept))]
        shards: dict[int, str] = dict(zip(kept, names))
        metadata = metadata | {
            "documents": sum(done[i]["documents"] for i in kept),
            "tokens": sum(done[i]["tokens"] for i in kept),
            "empty_documents": sum(done[i]["empty"] for i in units),
            "max_token_id": max(done[i]["max_token_id"] for i in kept),
            "shards": [{"name": name, "size": done[i]["bytes"]} for name, i in zip(names, kept)],
        }
        folder = corpus.cache / (_skipped(corpus.name) if bad else corpus.name)
        if bad:
            metadata |= {"bad_records": bad, "fingerprint": folder.name.rpartition("-")[2]}
        if "left_out" in done[0]:
            not_written: Counter[str] = sum((Counter(done[i].get("not_written", {})) for i in units), Counter())
            metadata |= {"left_out": dict(left_out), "not_written": dict(not_written)}
            formats: Counter[str] = sum((Counter(done[i].get("formats", {})) for i in units), Counter())
            if set(formats) - {"openai"}:
                logger.info("%s: conversations were read as %s", corpus.source, dict(formats))
            metadata["message_formats"] = dict(formats)
            metadata["message_weights"] = all(done[i].get("message_weights") for i in units)
            if any(done[i].get("changed") for i in units):
                metadata["fingerprint"] += "-2"  # an older version made other tokens or roles of the same files
        with written(corpus.aside / CORPUS_FILE, durable=True, unique=True) as path:
            path.write_text(json.dumps(metadata, indent=1))
        whole = corpus.aside / "whole"  # a folder of its own: nothing that a late worker writes gets into the corpus
        whole.mkdir(exist_ok=True)
        for name, index in zip(names, kept):
            if unit_file(corpus, index).exists():  # else a killed run has moved it
                os.replace(unit_file(corpus, index), whole / name)
        _write_dataset_files(corpus.aside, whole, names)
        made_of = [done[i] | {"key": corpus.keys[i], "shard": shards.get(i)} for i in units]
        (whole / UNITS_FILE).write_text(json.dumps({"units": made_of}))
        shutil.copyfile(corpus.aside / CORPUS_FILE, whole / CORPUS_FILE)
        for path in [*whole.iterdir(), whole]:
            sync(path)
        os.rename(whole, folder)
        _delete_unfinished(corpus.cache, corpus.name)
    logger.info("%s: %d documents, %d tokens in %s", corpus.source, metadata["documents"], metadata["tokens"], folder)
    if bad:
        logger.warning(
            "%s: %s: they are left out; %s has examples", corpus.source, bad["in_words"], folder / CORPUS_FILE
        )
    return []


def _write_dataset_files(aside: Path, whole: Path, shards: list[str]) -> None:
    """dataset_info.json and state.json as the datasets library writes them, with our shards in place of its own."""
    import datasets
    import pyarrow as pa

    with pa.ipc.open_stream(pa.memory_map(str(whole / shards[0]))) as reader:
        features = datasets.Features.from_arrow_schema(reader.schema)
    empty = aside / "empty"
    quiet = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    datasets.Dataset.from_dict({name: [] for name in features}, features=features).save_to_disk(str(empty))
    if not quiet:
        datasets.enable_progress_bars()
    state = read_json(empty / STATE_FILE) | {"_data_files": [{"filename": shard} for shard in shards]}
    (whole / STATE_FILE).write_text(json.dumps(state, indent=2))
    shutil.copyfile(empty / "dataset_info.json", whole / "dataset_info.json")
