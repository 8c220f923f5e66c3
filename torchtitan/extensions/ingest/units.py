"""A corpus folder in the making: units of work that outlive a killed run, and the finished folder made of them.

While the corpus NAME-KEY is made, a folder .unfinished-NAME-KEY.CUT stands beside it. A finished unit is two files in
there: its documents (unit-00012.arrow) and what was counted in them (unit-00012.json). Each is written under another
name, synced and renamed, the .json last, so that a unit is there whole or not at all, whoever is killed when; a run
that finds units does the rest. KEY stands for the content, the tokenizer and the BOS/EOS policy, CUT for how the work
is cut into units: units of other work have another folder, and doing one twice only writes the same bytes again.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import logging
import os
import re
import shutil
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from torchtitan.datasets.corpus import CORPUS_FILE, ROLES
from torchtitan.tools.errors import UserError
from torchtitan.tools.folders import lock, sync

logger = logging.getLogger(__name__)


RECORD_BATCH_TOKENS = 4 << 20  # held by a worker at a time

Counts = dict[str, Any]
"""Of a unit: documents, tokens, empty, max_token_id, bytes (of its .arrow file), tokens_by_role where they have roles,
and what its writer adds."""


@dataclass(frozen=True)
class Place:
    """Where a corpus is made. name: the finished folder's, key included. cut: hex, of the partition into units."""

    cache: Path
    name: str
    cut: str

    @property
    def source(self) -> str:
        """The source's name, as it is in `name`."""
        return self.name.rpartition("-")[0]

    @property
    def folder(self) -> Path:
        """The finished corpus."""
        return self.cache / self.name

    @property
    def aside(self) -> Path:
        """The unfinished one."""
        return self.cache / f".unfinished-{self.name}.{self.cut}"


def folder_name(source_name: str, key: list[Any]) -> str:
    """NAME-KEY of a source's corpus; the key is 16 hex digits over `key`, which must be JSON."""
    safe = re.sub(r"[^\w.-]", "_", source_name) or "text"
    return f"{safe}-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]}"


def cut_of(*parts: Any) -> str:
    """8 hex digits over how the work is cut into units and the units into record batches."""
    return hashlib.sha256(json.dumps([RECORD_BATCH_TOKENS, *parts]).encode()).hexdigest()[:8]


def is_made(cache: Path, name: str) -> bool:
    """Whether the finished folder is there; what a killed run may have left beside it is deleted then."""
    if not (cache / name).is_dir():
        return False
    for left in cache.glob(f".unfinished-{glob.escape(name)}.*"):
        shutil.rmtree(left, ignore_errors=True)
    return True


def begin(place: Place) -> dict[int, Counts] | None:
    """Make the unfinished folder where it is not there and return the units that are done; None: all is finished."""
    with lock(place.cache, place.name):  # not while another process finishes it
        if is_made(place.cache, place.name):
            return None
        place.aside.mkdir(exist_ok=True)
        done = finished_units(place)
    if done:
        logger.info("%s: %d units were found done, in %s", place.source, len(done), place.aside)
    others = re.compile(rf"\.unfinished-{re.escape(place.source)}-[0-9a-f]{{16}}\.[0-9a-f]{{8}}")
    for other in sorted(place.cache.glob(".unfinished-*")):
        if other != place.aside and others.fullmatch(other.name):
            logger.info("%s was left by a run over other text or settings: delete it if none is at work there", other)
    return done


def write_unit(
    place: Place, index: int, documents: Iterable[np.ndarray], closing: Callable[[], Counts] = dict
) -> Counts:
    """Write unit `index` of the documents' tokens and return its counts.

    A document is int32[n], or int32[2, n] with the tokens' roles in its second row; all of a corpus are alike. Empty
    ones are only counted. closing is called when the documents are at an end; what it returns is kept with the counts.
    """
    import pyarrow as pa

    counts: Counts = {"documents": 0, "tokens": 0, "empty": 0, "max_token_id": -1}
    by_role = np.zeros(len(ROLES), np.int64)
    lengths: list[int] = []
    parts: list[np.ndarray] = []  # int32[1 or 2, n] each
    writer = None

    def flush() -> None:
        nonlocal writer
        if not lengths:
            return
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        tokens, *roles = np.concatenate(parts, axis=1)
        values = [pa.array(tokens), *(pa.array(row.astype(np.int8)) for row in roles)]
        schema = features(with_roles=bool(roles)).arrow_schema
        if writer is None:
            writer = pa.ipc.new_stream(sink, schema)
        columns = [pa.ListArray.from_arrays(offsets, column) for column in values]
        writer.write_batch(pa.record_batch(columns, schema=schema))
        lengths.clear()
        parts.clear()

    with _written_aside(unit_file(place, index)) as path:
        with pa.OSFile(str(path), "wb") as sink:
            held = 0
            for document in map(np.atleast_2d, documents):
                length = document.shape[1]
                if not length:
                    counts["empty"] += 1
                    continue
                if held + length > RECORD_BATCH_TOKENS:
                    flush()
                    held = 0
                held += length
                lengths.append(length)
                parts.append(document)
                counts["documents"] += 1
                counts["tokens"] += length
                counts["max_token_id"] = max(counts["max_token_id"], int(document[0].max()))
                if len(document) > 1:
                    by_role += np.bincount(document[1], minlength=len(ROLES))
            flush()
            if writer is not None:
                writer.close()
        counts["bytes"] = os.path.getsize(path)
    if by_role.any():
        counts["tokens_by_role"] = by_role.tolist()
    counts |= closing()
    with _written_aside(unit_file(place, index).with_suffix(".json")) as path:
        path.write_text(json.dumps(counts))
    return counts


def finished_units(place: Place) -> dict[int, Counts]:
    """Counts of the units that are whole, by index."""
    indices = (int(path.stem.removeprefix("unit-")) for path in sorted(place.aside.glob("unit-*.json")))
    return {index: counts for index in indices if (counts := unit_counts(place, index)) is not None}


def unit_counts(place: Place, index: int) -> Counts | None:
    """What write_unit returned for the unit if it is whole, else None."""
    with contextlib.suppress(OSError, ValueError):  # not there, or not written out before the power went
        counts: Counts = json.loads(unit_file(place, index).with_suffix(".json").read_bytes())
        # Once finish() has begun, which found all of them whole, they are moved.
        moved = (place.aside / CORPUS_FILE).is_file()
        if moved or unit_file(place, index).stat().st_size == counts["bytes"]:
            return counts
    return None


def unit_file(place: Place, index: int) -> Path:
    """The documents of a unit, while the corpus is unfinished."""
    return place.aside / f"unit-{index:05d}.arrow"


def finish(place: Place, units: int, about: dict[str, Any]) -> list[int]:
    """Turn units 0..units-1 into the finished folder if all are done; the units that are not (none: it is there).

    about: what corpus.json says beside the counts. Units become shards by renaming: no token is written twice. A run
    that is killed in here is taken up again: the corpus.json beside the units says that they were all there.
    """
    with lock(place.cache, place.name):
        if is_made(place.cache, place.name):
            return []
        done = finished_units(place)
        if missing := [index for index in range(units) if index not in done]:
            return missing
        kept = [index for index in range(units) if done[index]["documents"]]
        left_out: Counter[str] = sum((Counter(done[i].get("left_out", {})) for i in range(units)), Counter())
        if not kept:
            shutil.rmtree(place.aside, ignore_errors=True)
            why = ", ".join(f"{reason} {count}" for reason, count in left_out.items()) or "empty or blank"
            raise UserError(
                f"Data source {place.source!r} holds no document with text: all that its path {about['path']!r} names "
                f"is left out ({why})."
            )
        names = [f"data-{number:05d}-of-{len(kept):05d}.arrow" for number in range(len(kept))]
        about = about | {
            "documents": sum(done[i]["documents"] for i in kept),
            "tokens": sum(done[i]["tokens"] for i in kept),
            "empty_documents": sum(done[i]["empty"] for i in range(units)),
            "max_token_id": max(done[i]["max_token_id"] for i in kept),
            "shards": [{"name": name, "size": done[i]["bytes"]} for name, i in zip(names, kept)],
        }
        by_role = np.array([done[i].get("tokens_by_role", [0] * len(ROLES)) for i in kept]).sum(axis=0)
        with_roles = bool(by_role.any())
        if with_roles:
            about |= {"tokens_by_role": dict(zip(ROLES, by_role.tolist())), "left_out": dict(left_out)}
        with _written_aside(place.aside / CORPUS_FILE) as path:
            path.write_text(json.dumps(about, indent=1))
        whole = place.aside / "whole"  # a folder of its own: nothing that a late worker writes gets into the corpus
        whole.mkdir(exist_ok=True)
        for name, index in zip(names, kept):
            if unit_file(place, index).exists():  # else a run before this one has moved it
                os.replace(unit_file(place, index), whole / name)
        _write_dataset_files(place.aside, whole, names, with_roles)
        shutil.copyfile(place.aside / CORPUS_FILE, whole / CORPUS_FILE)
        for path in [*whole.iterdir(), whole]:
            sync(path)
        os.rename(whole, place.folder)
        is_made(place.cache, place.name)  # deletes the rest
    logger.info("%s: %d documents, %d tokens in %s", place.source, about["documents"], about["tokens"], place.folder)
    return []


def _write_dataset_files(aside: Path, whole: Path, shards: list[str], with_roles: bool) -> None:
    """dataset_info.json and state.json as the datasets library writes them, with our shards in place of its own."""
    import datasets

    empty = aside / "empty"
    quiet = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    columns = features(with_roles)
    datasets.Dataset.from_dict({name: [] for name in columns}, features=columns).save_to_disk(str(empty))
    if not quiet:
        datasets.enable_progress_bars()
    state = json.loads((empty / "state.json").read_text())
    state["_data_files"] = [{"filename": shard} for shard in shards]
    (whole / "state.json").write_text(json.dumps(state, indent=2))
    shutil.copyfile(empty / "dataset_info.json", whole / "dataset_info.json")


def features(with_roles: bool = False) -> Any:
    """The columns of a corpus, for the datasets library."""
    import pyarrow as pa
    from datasets import Features

    columns = [("input_ids", pa.list_(pa.int32())), ("roles", pa.list_(pa.int8()))]
    return Features.from_arrow_schema(pa.schema(columns[: 1 + with_roles]))


@contextlib.contextmanager
def _written_aside(target: Path) -> Iterator[Path]:
    """A name to write to, of this process alone; what was written there becomes `target`, whole, or is deleted."""
    path = target.with_name(f"{target.name}.{uuid.uuid4().hex}.tmp")
    try:
        yield path
        sync(path)  # a disk that is full may say so only now
        os.replace(path, target)
        sync(target.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(path)
        raise
