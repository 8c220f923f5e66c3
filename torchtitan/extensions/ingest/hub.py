"""A dataset of the Hugging Face hub as a source: downloaded once by its own libraries, then tokenized like files.

`hub:OWNER/NAME` is resolved to a commit, which the corpus's key carries. The libraries download it into their cache
(HF_HOME), go on with a broken download, and keep an Arrow file of each split, whose rows are cut into units of work.
`hub:./folder` (or ../, /, ~) reads a local copy in the same way. With max_documents the dataset is streamed instead,
into a .jsonl file beside the unfinished corpus, and no more of it is downloaded than that takes.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from torchtitan.config.schema import Data, Source
from torchtitan.datasets.corpus import CORPUS_FILE
from torchtitan.extensions.ingest.source_files import (
    HUB,
    Material,
    SourceFile,
    check_unchanged,
    files_below,
    hash_files,
)
from torchtitan.extensions.ingest.text import Fields, encoded_documents, spans_of, without_nulls
from torchtitan.extensions.ingest.units import folder_name, into_units, is_made, unit_bytes
from torchtitan.tools.errors import UserError
from torchtitan.tools.folders import lock, read_json, written

logger = logging.getLogger(__name__)

Request = dict[str, str]
"""name (OWNER/NAME, or a local folder), subset, split, revision: what is asked for, kept in corpus.json under `hub`."""


class UnreachableError(Exception):
    """The hub did not answer."""


@dataclass(frozen=True)
class Rows:
    """Rows [start, stop) of a downloaded dataset of about `size` bytes."""

    dataset: Any
    start: int
    stop: int
    size: int


def hub_material(source: Source, data: Data, cache: Path, encoder: Any) -> Material | Path:
    """What a hub source has to be tokenized; a Path: the newest finished corpus of it, if the hub cannot be reached.

    UserError if the dataset or revision does not exist or is not allowed, or if the hub cannot be reached and the cache
    holds no corpus. What is wrong with subset, split or field is found when the units are asked for.
    """
    if source.max_documents is not None and source.max_documents < 1:
        raise UserError(f"data.sources.max_documents = {source.max_documents} of {source.name!r} must be 1 or more.")
    request, files = _parse(source, data, cache)
    metadata: dict[str, Any] = encoder.metadata | {"max_documents": source.max_documents, "path": source.path}
    try:
        commit = "" if files else _commit(request)
    except UnreachableError as error:
        return _made_before(source, cache, request, metadata, str(error))
    content: list[Any] = [(os.path.relpath(file.path, request["name"]), file.sha256) for file in files]
    key = [*encoder.key, "hub", content or [request["name"], commit], request["subset"], request["split"]]
    name = folder_name(source.name, [*key, encoder.fields.name, source.max_documents])
    if not files and not is_made(cache, name):
        for folder, before in _finished(source, cache, request, metadata)[:1]:
            logger.warning(
                f"data source {source.name}: {folder} was made of {request['name']} at commit {before}, but its "
                f"{request['revision']} is {commit} now: it is downloaded again. To keep the other, set hub_revision "
                "to it."
            )
    metadata |= {
        "fingerprint": name.rpartition("-")[2],
        "hub": request | {"commit": commit},
        "files": [asdict(file) for file in files],
    }

    def units() -> list[list[Any]]:
        if source.max_documents is not None:
            path = _first_documents(request, commit, encoder, source.max_documents, cache, name)
            target = unit_bytes(path.stat().st_size)
            return into_units(list(spans_of(str(path), target)), target)
        dataset = _open(request, commit, encoder.fields, streaming=False)
        for file in files:  # the key stands for what was hashed
            check_unchanged(file)
        rows, size = len(dataset), dataset.data.nbytes
        each = max(1, rows * unit_bytes(size) // max(1, size))
        cuts = [*range(0, rows, each), rows]
        return [[Rows(dataset, a, b, size * (b - a) // rows)] for a, b in zip(cuts, cuts[1:])]

    def documents(part: Any) -> Iterator[np.ndarray]:
        if source.max_documents is not None:
            return encoded_documents(part, encoder)
        records = part.dataset.select(range(part.start, part.stop))
        return (encoder.encode(one) for _, one in _read(records, part.start, encoder, request["name"]))

    what = request["name"] + (f" at commit {commit}" if commit else "")
    return Material(name, metadata, what, units, documents, encoder.closing)


def _parse(source: Source, data: Data, cache: Path) -> tuple[Request, list[SourceFile]]:
    """What is asked for, and the files of a local copy; UserError if the path names neither."""
    name, files = source.path.removeprefix(HUB), []
    if name.startswith((".", "/", "~")):
        folder = (Path(data.folder).expanduser() / Path(name).expanduser()).absolute()
        paths = files_below(folder) if folder.is_dir() else []
        if not paths:
            raise UserError(f"The path {source.path!r} of data source {source.name!r}: {folder} is no folder of files.")
        name, files = str(folder), hash_files(paths, cache)
    elif not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise UserError(
            f"The path {source.path!r} of data source {source.name!r} names no dataset: write hub:OWNER/NAME, or "
            "hub:./folder for a local copy. Subset, split and revision are the keys hub_subset, hub_split and "
            "hub_revision."
        )
    rest = {"subset": source.hub_subset, "split": source.hub_split, "revision": source.hub_revision}
    return {"name": name} | rest, files


# ---- which commit, and what to do without an answer ------------------------------------------------------------------


def _commit(request: Request) -> str:
    """The commit that the revision is; UnreachableError if the hub does not answer."""
    return request["revision"] if re.fullmatch("[0-9a-f]{40}", request["revision"]) else _ask_for_commit(request)


def _ask_for_commit(request: Request) -> str:
    import huggingface_hub
    from huggingface_hub.utils import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

    name = request["name"]
    try:
        return str(huggingface_hub.HfApi().dataset_info(name, revision=request["revision"], timeout=20).sha)
    except GatedRepoError as error:
        raise UserError(_gated_message(name)) from error
    except RepositoryNotFoundError as error:
        raise UserError(
            f"The hub has no dataset {name!r}, or it is private and this user is not logged in with a token "
            "that may read it (hf auth login, or the variable HF_TOKEN)."
        ) from error
    except RevisionNotFoundError as error:
        raise UserError(
            f"hub_revision = {request['revision']!r}: the dataset {name} has no such branch, tag or commit."
        ) from error
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        if status is not None and status < 500 and status != 429:
            raise UserError(f"The hub refuses to say what {name} is: {_one_line(error)}") from error
        raise UnreachableError(_one_line(error)) from error
    except Exception as error:  # whatever the HTTP library of the day raises; offline mode too
        raise UnreachableError(_one_line(error)) from error


def _finished(source: Source, cache: Path, request: Request, metadata: dict[str, Any]) -> list[tuple[Path, str]]:
    """Finished corpora of the same request and policy, with the commit each was made of; the newest first."""
    prefix = folder_name(source.name, []).rpartition("-")[0]
    corpora = (p for p in cache.glob(f"*/{CORPUS_FILE}") if p.parent.name.rpartition("-")[0] == prefix)
    asked = request | {k: v for k, v in metadata.items() if k not in ("path", "tokenizer_folder")}
    finished = []
    for corpus in sorted(corpora, key=lambda path: path.stat().st_mtime, reverse=True):
        made = read_json(corpus)
        hub = made.get("hub", {})
        if all((made | hub).get(key) == value for key, value in asked.items()):
            finished.append((corpus.parent, str(hub["commit"])))
    return finished


def _made_before(source: Source, cache: Path, request: Request, metadata: dict[str, Any], why: str) -> Path:
    for folder, commit in _finished(source, cache, request, metadata):
        logger.warning(
            f"data source {source.name}: the hub cannot be reached ({why}); going on with {folder}, which was made of "
            f"{request['name']} at commit {commit}"
        )
        return folder
    raise UserError(
        f"The hub cannot be reached for {source.path} of data source {source.name!r} ({why}), and data.cache_folder = "
        f"{cache} holds no finished corpus of it for this tokenizer. Tokenize it where there is a network, into the "
        f"same data.cache_folder (scripts/tokenize_corpus.py), or name a local copy: hub:./folder."
    )


# ---- the download ----------------------------------------------------------------------------------------------------


def _open(request: Request, commit: str, fields: Fields, streaming: bool) -> Any:
    """The datasets library's Dataset or IterableDataset of the wanted fields alone; UserError if it cannot be had."""
    import datasets

    name, revision = request["name"], commit or None
    try:
        dataset = datasets.load_dataset(
            name, request["subset"] or None, split=request["split"], revision=revision, streaming=streaming
        )
        columns = dataset.column_names or list(next(iter(dataset), {fields.name: None}))  # some files do not say
    except Exception as error:  # the library raises ValueError, OSError, RuntimeError and its own
        raise _refusal(
            error,
            name,
            f"The dataset {name} with hub_subset = {request['subset']!r}, hub_split = {request['split']!r} and "
            f"hub_revision = {request['revision']!r} cannot be opened: ",
            " What was downloaded is kept: start again to continue." if isinstance(error, OSError) else "",
        ) from error
    paths = [] if streaming else [Path(entry["filename"]) for entry in dataset.cache_files]
    if commit and not all(commit in path.parts for path in paths):  # without a network: the newest that it has
        raise UserError(f"The hub cannot be reached, and {paths[0].parent} is {name} at another commit than {commit}.")
    if fields.name not in columns:
        raise UserError(
            f"The dataset {name} has no column {fields.name!r} (the source's {fields.key}); it has "
            f"{', '.join(map(repr, columns)) or 'none'}. {fields.hint(columns)}"
        )
    return dataset.select_columns([fields.name, *(beside for beside in fields.beside if beside in columns)])


def _first_documents(request: Request, commit: str, encoder: Any, most: int, cache: Path, corpus: str) -> Path:
    """A .jsonl file of the records up to the `most`-th that is a document; streamed unless it is there."""
    folder = cache / f".unfinished-{corpus}.download"  # deleted with what else is unfinished once the corpus is made
    path = folder / "records.jsonl"
    with lock(cache, f"{corpus}.download"):
        if path.is_file():
            return path
        dataset = _open(request, commit, encoder.fields, streaming=True)
        folder.mkdir(exist_ok=True)
        try:
            with written(path, durable=True) as aside, aside.open("w") as file:
                kept = 0
                for record, one in _read(dataset, 0, encoder, request["name"]):
                    file.write(json.dumps(record, default=str) + "\n")
                    kept += one is not None
                    if kept == most:
                        break
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        finally:
            encoder.closing()  # they are counted when they are tokenized
    return path


def _read(records: Any, first: int, encoder: Any, name: str) -> Iterator[tuple[dict[str, Any], Any]]:
    """Each record and what the encoder reads of it; first: the number of records before them, for messages."""
    iterator = iter(records)
    number = first
    while True:
        try:
            if (record := next(iterator, None)) is None:
                return
        except Exception as error:  # from the network, or from files that are not what they seem
            before = f"The download of {name} broke after {number} records: "
            raise _refusal(error, name, before, " Start again.") from error
        number += 1
        record = {field: without_nulls(value) for field, value in record.items()}
        try:
            one = encoder.read(record)
        except ValueError as error:
            raise UserError(f"{name}, record {number}: {error}") from error
        yield record, one


def _refusal(error: BaseException, name: str, before: str, behind: str) -> UserError:
    """The UserError for what a library raised; a gated dataset is told by what the error came from."""
    from huggingface_hub.utils import GatedRepoError

    chain: list[BaseException] = [error]
    while below := chain[-1].__cause__ or chain[-1].__context__:
        chain.append(below)
    if any(isinstance(one, GatedRepoError) or "gated dataset" in str(one) for one in chain):
        return UserError(_gated_message(name))
    hidden = type(error).__name__ == "DatasetGenerationError" and error.__cause__  # it says only that there was one
    return UserError(before + _one_line(hidden or error).rstrip(".") + "." + behind)


def _gated_message(name: str) -> str:
    return (
        f"The dataset {name} is gated: accept its terms at https://huggingface.co/datasets/{name} and log in with a "
        "token of that account (hf auth login, or the variable HF_TOKEN)."
    )


def _one_line(error: BaseException) -> str:
    """An error of a library as part of a sentence."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:500]
