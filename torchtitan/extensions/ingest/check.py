"""Reads and checks a source as tokenizing would, on all cores, but tokenizes and writes nothing."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from torchtitan.config.data_schema import Data, Source
from torchtitan.datasets.corpus import CONVERSATIONS_LEFT_OUT
from torchtitan.datasets.tokenizer import Tokenizer
from torchtitan.extensions.ingest.bad_records import DAMAGED, DamagedError, bad_in_all, by_part, check_share
from torchtitan.extensions.ingest.open_text import whole_suffix
from torchtitan.extensions.ingest.source_files import Material
from torchtitan.extensions.ingest.tokenize import material_of
from torchtitan.extensions.ingest.units import Counts, into_units
from torchtitan.extensions.ingest.workers import Progress, WorkerKilledError, cores, run_units
from torchtitan.tools.errors import UserError

ALIKE = "f" * 64
"""In place of the hash of a file: its units are not kept."""


class _NotEncoding:
    """An encoder that makes one token of each document, and leaves out bad records, to see them all."""

    def __init__(self, encoder: Any) -> None:
        self._encoder = encoder
        encoder.fields.bad.skip = True

    def __getattr__(self, name: str) -> Any:
        return getattr(self._encoder, name)

    def encode(self, document: Any) -> np.ndarray:
        """int32[1], or int32[0] for a document that is left out."""
        return np.zeros(int(document is not None), np.int32)


def check_source(
    source: Source, tokenizer: Tokenizer, data: Data, num_proc: int | None = None
) -> tuple[list[str], str]:
    """What is in a source of text, in lines for people; and why tokenizing it would end with an error, "" if it would
    not. UserError for what is wrong with the source as a whole. A hub dataset is downloaded."""
    cache = Path(data.cache_folder).expanduser().absolute()
    if source.kind == "synthetic":
        if not source.path:
            return ["its documents are made, and no text is read"], ""
        source = replace(source, kind="data")  # its text
    try:
        material = material_of(source, tokenizer, data, cache, _unhashed, _NotEncoding)
        if isinstance(material, Path):
            return [f"there is no text to check: {material} was made of it"], ""
        units = material.units()
        done = _read(material, units, source.name, num_proc or cores())
    except WorkerKilledError as error:
        raise UserError(f"{error} Perhaps memory ran out: take a smaller --num-proc.") from error
    except OSError as error:
        raise UserError(f"Data source {source.name!r} cannot be read: {error}.") from error
    bad = bad_in_all((done[i], [part.path for part in unit]) for i, unit in enumerate(units))
    totals: Counter[str] = Counter()
    for counts in done.values():
        totals.update({key: counts.get(key, 0) for key in ("documents", "empty", "records")})
    left_out = sum((Counter(counts.get("left_out", {})) for counts in done.values()), Counter[str]())
    lacking = sum((Counter(counts.get("lacking", {})) for counts in done.values()), Counter[str]())
    of_records = sum(n for reason, n in left_out.items() if reason != "where")
    lines = [
        f"{material.what}",
        f"{totals['documents']:,} documents, {totals['empty'] - of_records:,} blank records",
        *(
            f"{count:,} records {CONVERSATIONS_LEFT_OUT[reason]}: left out"
            for reason, count in left_out.items()
            if count
        ),
    ]
    for reason, count in sorted(bad.get("reasons", {}).items()):
        lines.append(f"{count:,} {'files or parts of files' if reason == DAMAGED else 'bad records'}: {reason}")
        lines += [f"    {place}: {why}" for place, of, why in bad["examples"] if of == reason]
    size = sum(part.size for unit in units for part in unit)
    return lines, _wrong(source, bad, totals, lacking, size)


def _wrong(source: Source, bad: dict[str, Any], totals: Counter[str], lacking: Counter[str], size: int) -> str:
    if never := [field for field, count in lacking.items() if count == totals["records"]]:
        return f"where names the field {never[0]!r}, which none of the {totals['records']:,} records has"
    if bad and source.on_bad_record == "stop":
        return f"{bad['in_words']}, and on_bad_record is stop"
    try:
        check_share(source.name, bad, size, source.max_bad_share)
    except UserError as error:
        return str(error)
    return "" if totals["documents"] else "there is no document with text"


def _read(material: Material, units: Sequence[Sequence[Any]], name: str, num_proc: int) -> dict[int, Counts]:
    """The counts of all units."""

    def work(unit: int) -> Counts:
        counts = {"documents": 0, "empty": 0}
        for part in units[unit]:
            for document in material.documents(part):
                counts["documents" if document.size else "empty"] += 1
        return counts | by_part(material.closing(), [part.path for part in units[unit]])

    sizes = [sum(part.size for part in unit) for unit in units]
    progress = Progress(f"checking {name}", len(units), sum(sizes), 0, 0, "documents")
    done = {}
    for unit, counts in run_units(work, range(len(units)), min(num_proc, len(units))):
        done[unit] = counts
        progress.advance(sizes[unit], counts["documents"])
    return done


def _unhashed(
    source: Source,
    cache: Path,
    encoder: Any,
    paths: list[Path],
    kind: str,
    what: str,
    parts: Callable[[int], Sequence[tuple[str, Sequence[Any]]]],
    read: Callable[[Any, Any], Iterator[np.ndarray]],
) -> Material:
    """As tokenize._of_files, without reading the files for their hashes."""
    total = sum(os.path.getsize(path) for path in paths)
    suffixes = Counter(map(whole_suffix, map(str, paths)))
    formats = ", ".join(f"{count:,} {suffix or 'without a suffix'}" for suffix, count in sorted(suffixes.items()))

    def units() -> list[list[Any]]:
        return into_units(lambda target: [(ALIKE, cut) for _, cut in parts(target)], total)

    def documents(part: Any) -> Iterator[np.ndarray]:
        try:
            yield from read(part, encoder)
        except DamagedError as error:
            encoder.fields.bad.add_rest(part.path, part.size, error)

    return Material("", list, {}, f"{what} ({formats}), {total:,} bytes", units, documents, encoder.closing)
