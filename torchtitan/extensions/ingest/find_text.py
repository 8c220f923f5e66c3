"""The files of text that a source's path names; what is passed over is said, and splits are not mixed in silence."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from torchtitan.config.data_schema import Data, Source
from torchtitan.datasets.corpus import CORPUS_FILE, STATE_FILE, is_tokenized
from torchtitan.extensions.ingest.open_text import compression, kind_of, whole_suffix
from torchtitan.extensions.ingest.source_files import files_below, is_hub, matching_files, source_path
from torchtitan.extensions.ingest.tables import is_text_folder, saved_files
from torchtitan.tools.errors import UserError

logger = logging.getLogger(__name__)

RECORDS = (".jsonl", ".parquet", ".txt", ".ndjson", ".arrow")
CODE = tuple(
    re.findall(
        r"\.\w+",
        ".md .rst .tex .html .css .xml .yaml .yml .toml .py .pyx .js .jsx .ts .tsx .java .kt .scala .c .h .cc .cpp .cxx"
        " .hpp .cu .cuh .cs .go .rs .rb .php .swift .m .mm .lua .pl .r .R .jl .hs .ml .ex .exs .erl .clj .lisp .el .f90"
        " .f .sh .bash .sql .proto .lean .v .vhd .zig .dart .cmake",
    )
)
TIERS = (RECORDS, (".json",), CODE)
"""Of a folder, the files of the first of these that it has: the scripts and metadata beside data are no documents."""

PACKABLE = {".jsonl", ".ndjson", ".json", ".txt", *CODE}
"""What may be compressed. Parquet and Arrow compress their columns themselves."""

ABOUT = re.compile(
    r"(README|LICEN[CS]E|COPYING|NOTICE|CITATION)([-_.][^.]*)?(\.(txt|md|rst|html))?|dataset_(infos?|dict)\.json|state\.json",
    re.I,
)
"""Files about the data, by name."""

SPLITS = {"train": "train", "training": "train", "test": "test"} | dict.fromkeys(
    ("validation", "valid", "val", "dev", "eval", "evaluation", "heldout", "holdout"), "validation"
)


def is_tokenized_source(source: Source, data: Data) -> bool:
    """Whether the source is a folder of tokens rather than text."""
    if source.kind == "synthetic" or is_hub(source):
        return False
    path = source_path(source, data)
    field = (source.messages_field or source.text_field).split(".")[0].removesuffix("[]")
    return is_tokenized(path) and not is_text_folder(path, field, source.format == "text")


class NoTextError(UserError):
    """There is no text where a source's path leads."""


def find_text_files(source: Source, data: Data) -> list[Path]:
    """The files of source.path, sorted. In a folder, hidden files and what TIERS leaves out are passed over."""
    path = source_path(source, data)
    where = f"the path {source.path!r} of data source {source.name!r}"
    if path.is_dir():
        files = _in_folder(source, path, where)
    else:
        files = matching_files(source, data)
        about = [p for p in files if ABOUT.fullmatch(p.name) and _tier(p) != 0]
        if about and len(about) < len(files):
            files = [p for p in files if p not in set(about)]
            logger.info("%s: passed over in %s: %s", source.name, source.path, ", ".join(sorted(p.name for p in about)))
        if not files:
            raise NoTextError(f"No file matches {where} (looked for {path.absolute()}; data.folder = {data.folder!r}).")
        if wrong := sorted(p for p in files if _tier(p) is None):
            raise UserError(
                f"{wrong[0].name} in {where} has the extension {wrong[0].suffix!r}; text is read from "
                f"{', '.join(RECORDS)}, .json and source code, or any of these but Parquet and Arrow with .gz, .zst, "
                ".bz2 or .xz."
            )
        kinds = sorted({_tier(p): p.name for p in files}.items())
        if len(kinds) > 1:
            names = " and ".join(name for _, name in kinds)
            raise UserError(f"T{where[1:]} names files of different kinds ({names}): name those of one.")
    by_content: dict[Path, Path] = {}
    for file in sorted(files):
        first = by_content.setdefault(file.with_suffix("") if compression(file) else file, file)
        if first != file:
            raise UserError(
                f"T{where[1:]} has {first.name} and {file.name}, which would be read twice if they are the same text, "
                "compressed or not: take one out, or name the files by a glob that leaves it out."
            )
    return sorted(p.absolute() for p in files)


def _in_folder(source: Source, path: Path, where: str) -> list[Path]:
    below = files_below(path)
    if saved := {p.parent for p in below if p.name == STATE_FILE and p.with_name("dataset_info.json") in below}:
        named = {file for folder in saved for file in saved_files(folder)}
        below = [p for p in below if p.suffix != ".arrow" or p.parent not in saved or p in named]
    corpora = {p.parent for p in below if p.name == CORPUS_FILE}
    below = [p for p in below if p.parent not in corpora]
    about = [p for p in below if ABOUT.fullmatch(p.name)]
    if loud := next(
        (p for p in below if _tier(p) is None and _tier(Path(str(p).lower())) == 0 and p not in about), None
    ):
        raise UserError(
            f"{loud} in {where} would be passed over, because of the capitals in its suffix: rename it (to "
            f"*{whole_suffix(loud).lower()}), or name the others by a glob."
        )
    data = [p for p in below if p not in set(about)]
    tiers = [_tier(p) for p in data]
    first = min((tier for tier in tiers if tier is not None), default=None)
    files = [p for p, tier in zip(data, tiers) if tier is not None and tier == first]
    others = Counter(p.suffix or p.name for p, tier in zip(data, tiers) if tier is None or tier != first)
    others.update(p.name for p in about)
    if not files:
        content = f"only {', '.join(sorted(others)[:8])}" if others else "nothing"
        raise NoTextError(
            f"There is no {', '.join(RECORDS)}, .json or source code file in {where}; the folder holds {content}."
        )
    if others:
        what = ", ".join(f"{count} {name}" for name, count in sorted(others.items())[:8])
        readable = any(tier is not None and tier != first for tier in tiers)
        logger.log(
            logging.WARNING if readable else logging.INFO,
            f"{source.name}: passed over in {source.path}: {what}{', ...' if len(others) > 8 else ''}. "
            f"{len(files)} files are read; to read others, name them by a glob.",
        )
    if first != TIERS.index(CODE):
        check_splits(files, path, where)
    return files


def _tier(path: Path) -> int | None:
    kind = kind_of(path)
    if compression(path) and kind not in PACKABLE:
        return None
    return next((number for number, kinds in enumerate(TIERS) if kind in kinds), None)


def check_splits(files: Sequence[Path], folder: Path, where: str) -> None:
    """UserError if the files are of several splits, as their folders or names say."""
    splits: dict[str, Path] = {}
    for file in files:
        names = file.relative_to(folder).parts
        found = [s for s in map(_split, names) if s]
        if found:
            splits.setdefault(found[0], file.relative_to(folder))
    if len(splits) > 1:
        listed = ", ".join(f"{split} ({file})" for split, file in sorted(splits.items()))
        raise UserError(
            f"T{where[1:]} holds several splits: {listed}. Name one of them, by its folder or a glob; "
            "if all are to be read, a glob such as **/* says so."
        )


def _split(name: str) -> str:
    """The split that a folder or file is named after, by its first or last word; "" for none."""
    words = [word for word in re.split(r"[^a-z]+", name.lower()) if len(word) > 1 and word != "of"]
    while len(words) > 1 and f".{words[-1]}" in {*RECORDS, ".json", ".gz", ".zst", ".bz", ".xz", ".csv"}:
        words.pop()
    return next((SPLITS[word] for word in (words[:1] + words[-1:]) if word in SPLITS), "")
