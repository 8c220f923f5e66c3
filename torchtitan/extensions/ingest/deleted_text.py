"""Text that was deleted after it was tokenized: its corpus is found again in the cache; part of it is another source.

A corpus is named by the content of its files, which cannot be read any more. So corpus.json is asked: it has the path
of the source, the files and the options.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torchtitan.config.data_schema import Data, Source
from torchtitan.datasets.corpus import CORPUS_FILE
from torchtitan.extensions.ingest.source_files import source_path
from torchtitan.tools.errors import UserError
from torchtitan.tools.folders import read_json

logger = logging.getLogger(__name__)

NAMED = 5
"""Files that a message names."""


def corpus_of_deleted_text(source: Source, data: Data, cache: Path, wanted: dict[str, Any]) -> Path | None:
    """The finished corpus of the text that source.path named, now that nothing is there; it is said. None: the cache
    has none. wanted: the options, as corpus.json says them.

    UserError if the cache has several, or only such as were made with other options.
    """
    path = source_path(source, data).absolute()
    before_pattern, *pattern = re.split(r"[*?[]", str(path), maxsplit=1)
    above = os.path.dirname(before_pattern) if pattern else before_pattern
    fitting: dict[str, tuple[Path, str]] = {}
    others = []
    for folder, made in _corpora(cache, source.path):
        paths = [file["path"] for file in made["files"]]
        if not paths or not all(p == above or p.startswith(f"{above.rstrip('/')}/") for p in paths):
            continue  # of another data.folder
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime((folder / CORPUS_FILE).stat().st_mtime))
        if differences := _differences(source, made, wanted):
            others.append(f"{folder} ({when}; {', '.join(differences)})")
        elif made["fingerprint"] not in fitting or folder.name.rpartition("-")[0] == source.name:
            fitting[made["fingerprint"]] = folder, when
    gone = f"There is no text any more at the path {source.path!r} of data source {source.name!r} ({path})"
    if len(fitting) > 1:
        names = ", ".join(sorted(f"{folder} ({when})" for folder, when in fitting.values()))
        raise UserError(
            f"{gone}, and data.cache_folder holds several corpora that were made of it: {names}. Set path to the one "
            "that is meant."
        )
    for fingerprint, (folder, when) in fitting.items():
        logger.warning(
            f"{gone[:1].lower()}{gone[1:]}: going on with {folder}, which was made of it (fingerprint {fingerprint}, "
            f"{when})"
        )
        return folder
    if others:
        raise UserError(
            f"{gone}, and data.cache_folder holds only corpora of it that were made with other options: "
            f"{'; '.join(sorted(others))}. Set these back, or put the text back."
        )
    return None


def check_none_deleted(source: Source, cache: Path, metadata: dict[str, Any]) -> None:
    """UserError if the files of a source (metadata, as corpus.json has it) are those of a finished corpus of the same
    path and options, except some that are gone: a run would go on with less text in silence."""
    present = {(file["path"], file["sha256"]) for file in metadata["files"]}
    for folder, made in _corpora(cache, source.path):
        before = {(file["path"], file["sha256"]) for file in made["files"]}
        gone = sorted(path for path, _ in before - present if not os.path.exists(path))
        if present < before and len(gone) == len(before - present) and not _differences(source, made, metadata):
            raise UserError(
                f"{len(gone)} of the {len(before)} files that {folder} was made of are gone "
                f"({', '.join(gone[:NAMED])}{', ...' if len(gone) > NAMED else ''}), and what is left of data source "
                f'{source.name!r} is another source. Put them back; or set path = "{folder}" to go on with that '
                "corpus; or, if they were taken out on purpose, tokenize what is left with scripts/tokenize_corpus.py."
            )


def _corpora(cache: Path, path: str) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The finished corpora in a cache folder that were made of files under the path of a source."""
    for file in sorted(cache.glob(f"*/{CORPUS_FILE}")):
        with contextlib.suppress(OSError, UserError, KeyError, TypeError):
            made = read_json(file)
            if made["path"] == path and "hub" not in made and made["fingerprint"]:
                yield file.parent, made


def _differences(source: Source, made: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """What a corpus was made with that the options of a source do not say, or otherwise."""
    options = {"tokenizer", "chat_template", "where", "messages_field", "text_field", "add_bos", "add_eos", "format"}
    options |= {"synthetic", "group_by", "part_order", "part_header", "messages_format"}
    options |= wanted.keys() - {"tokenizer_folder", "vocab_size", "path", "fingerprint", "files"}
    different = [f"{k} = {made.get(k)!r}" for k in sorted(options) if made.get(k) != wanted.get(k)]
    if made.get("bad_records") and source.on_bad_record == "stop":
        different.append("on_bad_record = 'skip'")
    return different
