"""A dataset of the Hugging Face hub as a source: downloaded once by its own libraries, then tokenized like files.

`hub:OWNER/NAME` is resolved to a commit, which the corpus's key carries. The libraries download it into their cache
(HF_HOME), resume a broken download, and keep an Arrow file of each split, whose rows are cut into units of work.
`hub:./folder` (or ../, /, ~) reads a local copy in the same way. With max_documents the dataset is streamed instead,
into a .jsonl file beside the unfinished corpus, and no more of it is downloaded than that takes.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import logging
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from torchtitan.config.data_schema import Data, Source
from torchtitan.datasets.corpus import CORPUS_FILE
from torchtitan.extensions.ingest.records import Fields, Span, without_nulls
from torchtitan.extensions.ingest.source_files import (
    HUB,
    Material,
    SourceFile,
    check_file_unchanged,
    files_below,
    hash_files,
)
from torchtitan.extensions.ingest.text import encoded_documents, spans_of
from torchtitan.extensions.ingest.units import folder_name, made_folder, unit_bytes
from torchtitan.tools.errors import UserError
from torchtitan.tools.folders import lock, read_json, write_text, written

logger = logging.getLogger(__name__)

Request = dict[str, str]
"""name (OWNER/NAME, or a local folder), subset, split, revision: what is asked for, kept in corpus.json under `hub`."""

ANSWER_SECONDS = 60.0
"""How long an answer of the hub holds for all processes with the same cache folder, so that a job's ranks ask once."""


LEFT_OUT = object()


class UnreachableError(Exception):
    """The hub did not answer."""


def hub_material(source: Source, data: Data, cache: Path, encoder: Any) -> Material | Path:
    """What a hub source has to be tokenized; a Path: the newest finished corpus of it, if the hub cannot be reached.

    UserError if the dataset or revision does not exist or is not allowed, or if the hub cannot be reached and the cache
    holds no corpus. What is wrong with subset, split or field is found when the units are asked for.
    """
    most = source.max_documents
    request, files = _parse(source, data, cache)
    metadata: dict[str, Any] = encoder.metadata | {"max_documents": most, "path": source.path}
    finished = [] if files else _finished(source, cache, request, metadata)
    try:
        commit = "" if files else _commit(request, cache)
    except UnreachableError as error:
        return _newest(source, cache, request, finished, str(error))
    content: list[Any] = [(os.path.relpath(file.path, request["name"]), file.sha256) for file in files]
    key = [*encoder.key, "hub", content or [request["name"], commit], request["subset"], request["split"]]
    name = folder_name(source.name, [*key, encoder.fields.name, most])
    if finished and not made_folder(cache, name, source.on_bad_record == "skip"):
        folder, before = finished[0]
        logger.warning(
            f"data source {source.name}: {folder} was made of {request['name']} at commit {before}, but its "
            f"{request['revision']} is {commit} now: it is downloaded again. To keep the other, set hub_revision to it."
        )
    metadata |= {
        "fingerprint": name.rpartition("-")[2],
        "hub": request | {"commit": commit},
        "files": [file.metadata for file in files],
    }

    @functools.cache  # units() opens it; the processes that are forked then have it
    def dataset() -> Any:
        return _open(request, commit, encoder.fields, streaming=False)

    def units() -> list[list[Any]]:
        if most is not None:
            path = _first_documents(request, commit, encoder, most, cache, name)
            return [[span] for span in spans_of(str(path), unit_bytes(path.stat().st_size))]
        rows, size = len(dataset()), dataset().data.nbytes
        for file in files:  # the key stands for what was hashed
            check_file_unchanged(file)
        each = max(1, rows * unit_bytes(size) // max(1, size))
        cuts = [*range(0, rows, each), rows]
        return [[Span(request["name"], a, b, size * (b - a) // rows)] for a, b in zip(cuts, cuts[1:])]

    def made_of(part: Span) -> list[Any]:
        return [*key, encoder.fields.name, most, part.start, part.stop]

    def documents(part: Span) -> Iterator[np.ndarray]:
        if most is not None:
            return encoded_documents(part, encoder)
        records = dataset().select(range(part.start, part.stop))
        read = _read(records, part.start, encoder, part.path)
        return (encoder.encode(document) for _, document in read if document is not LEFT_OUT)

    what = request["name"] + (f" at commit {commit}" if commit else "")
    return Material(name, made_of, metadata, what, units, documents, encoder.closing)


def _parse(source: Source, data: Data, cache: Path) -> tuple[Request, list[SourceFile]]:
    """What is asked for, and the files of a local copy; UserError if there are none."""
    name, files = source.path.removeprefix(HUB), []
    if name.startswith((".", "/", "~")):
        folder = (Path(data.folder).expanduser() / Path(name).expanduser()).absolute()
        paths = files_below(folder) if folder.is_dir() else []
        if not paths:
            raise UserError(f"Data source {source.name!r}: path {source.path!r} is not a folder of files ({folder}).")
        name, files = str(folder), hash_files(paths, cache)
    rest = {"subset": source.hub_subset, "split": source.hub_split, "revision": source.hub_revision}
    return {"name": name} | rest, files


def _finished(source: Source, cache: Path, request: Request, metadata: dict[str, Any]) -> list[tuple[Path, str]]:
    """Finished corpora of the same request and policy, with the commit each was made of; the newest first."""
    prefix = folder_name(source.name, []).rpartition("-")[0]
    corpora = (p for p in cache.glob(f"*/{CORPUS_FILE}") if p.parent.name.rpartition("-")[0] == prefix)
    asked = {"where": None} | request | {k: v for k, v in metadata.items() if k not in ("path", "tokenizer_folder")}
    finished = []
    for corpus in sorted(corpora, key=lambda path: path.stat().st_mtime, reverse=True):
        made = read_json(corpus)
        hub = made.get("hub", {})
        if all((made | hub).get(key) == value for key, value in asked.items()):
            finished.append((corpus.parent, str(hub["commit"])))
    return finished


def _newest(source: Source, cache: Path, request: Request, finished: list[tuple[Path, str]], why: str) -> Path:
    """The corpus to go on with if the hub cannot be reached; UserError if there is none."""
    if not finished:
        raise UserError(
            f"The hub cannot be reached for {source.path} of data source {source.name!r} ({why}), and "
            f"data.cache_folder = {cache} holds no finished corpus of it for this tokenizer. Tokenize it where there "
            "is a network, into the same data.cache_folder (scripts/tokenize_corpus.py), or name a local copy: "
            "hub:./folder."
        )
    folder, commit = finished[0]
    logger.warning(
        f"data source {source.name}: the hub cannot be reached ({why}); going on with {folder}, which was made of "
        f"{request['name']} at commit {commit}"
    )
    return folder


def _commit(request: Request, cache: Path) -> str:
    """The commit that the revision is; UnreachableError if the hub does not answer. One process asks for all."""
    if re.fullmatch("[0-9a-f]{40}", request["revision"]):
        return request["revision"]
    name = "hub-" + folder_name(request["name"], [request["revision"]])
    file = cache / f".{name}.json"
    with lock(cache, name):
        answer: dict[str, Any] = {}
        with contextlib.suppress(OSError, UserError):
            answer = read_json(file)
        if not 0 <= time.time() - answer.get("time", 0.0) < ANSWER_SECONDS:
            try:
                answer = {"commit": _ask_for_commit(request)}
            except UnreachableError as error:
                answer = {"commit": "", "why": str(error)}
            with contextlib.suppress(OSError):  # read-only: each process asks for itself
                write_text(file, json.dumps(answer | {"time": time.time()}))
    if not answer["commit"]:
        raise UnreachableError(answer["why"])
    return str(answer["commit"])


def _ask_for_commit(request: Request) -> str:
    import huggingface_hub

    name, revision = request["name"], request["revision"]
    try:
        return str(huggingface_hub.HfApi().dataset_info(name, revision=revision, timeout=20).sha)
    except Exception as error:  # the hub's refusal, or whatever the HTTP library of the day raises; offline mode too
        status = getattr(getattr(error, "response", None), "status_code", 500)
        if status >= 500 or status == 429:
            raise UnreachableError(_one_line(error)) from error
        raise UserError(
            f"The hub has no dataset {name!r} with hub_revision = {revision!r} that this user may read: "
            f"{_one_line(error).rstrip('.')}. {_login(name)}"
        ) from error


def _open(request: Request, commit: str, fields: Fields, streaming: bool) -> Any:
    """The datasets library's Dataset or IterableDataset of the wanted fields alone; UserError if it cannot be had."""
    import datasets

    name = request["name"]
    try:
        dataset = datasets.load_dataset(
            name, request["subset"] or None, split=request["split"], revision=commit or None, streaming=streaming
        )
        columns = dataset.column_names or list(next(iter(dataset), {fields.name: None}))  # some files do not say
    except Exception as error:  # the library raises ValueError, OSError, RuntimeError and its own
        what = (
            f"The dataset {name} with hub_subset = {request['subset']!r}, hub_split = {request['split']!r} and "
            f"hub_revision = {request['revision']!r} cannot be opened"
        )
        mend = "What was downloaded is kept: start again to continue." if isinstance(error, OSError) else ""
        raise _refusal(name, what, error, mend) from error
    paths = [] if streaming else [Path(entry["filename"]) for entry in dataset.cache_files]
    if commit and not all(commit in path.parts for path in paths):  # without a network: the newest that it has
        raise UserError(f"The hub cannot be reached, and {paths[0].parent} is {name} at another commit than {commit}.")
    return dataset.select_columns(fields.columns(dict.fromkeys(columns), f"The dataset {name}"))


def _first_documents(request: Request, commit: str, encoder: Any, most: int, cache: Path, corpus: str) -> Path:
    """A .jsonl file of the records up to the `most`-th that is a document; streamed unless it exists."""
    path = cache / f".unfinished-{corpus}.download.jsonl"  # deleted once the corpus is finished
    with lock(cache, f"{corpus}.download"):
        if not path.is_file():
            dataset = _open(request, commit, encoder.fields, streaming=True)
            with written(path, durable=True) as aside, aside.open("w") as file:
                kept = 0
                for record, document in _read(dataset, 0, encoder, request["name"]):
                    file.write(json.dumps(record, default=str) + "\n")
                    kept += document is not None and document is not LEFT_OUT
                    if kept == most:
                        break
            encoder.closing()  # what it left out is counted when the units are made
    return path


def _read(records: Any, first: int, encoder: Any, name: str) -> Iterator[tuple[dict[str, Any], Any]]:
    """Each record, and its document before it is encoded, or LEFT_OUT by `where`; first: how many come
    before them, for messages."""
    iterator = iter(records)
    for number in itertools.count(first + 1):
        try:
            if (record := next(iterator, None)) is None:
                return
        except Exception as error:  # from the network, or from files that are not what they seem
            what = f"The download of {name} broke after {number - 1} records"
            raise _refusal(name, what, error, "Start again.") from error
        try:
            chosen = encoder.fields.of_columns(record.__getitem__, list(record))
            document = LEFT_OUT if chosen is None else encoder.read(chosen)
        except ValueError as error:
            encoder.fields.bad.add(name, lambda: f"record {number}", error)  # noqa: B023
            chosen, document = None, LEFT_OUT
        yield chosen or {field: without_nulls(value) for field, value in record.items()}, document


def _refusal(name: str, what: str, error: BaseException, mend: str) -> UserError:
    """The UserError for what a library raised."""
    chain = [error]
    while cause := chain[-1].__cause__ or chain[-1].__context__:
        chain.append(cause)
    if any("gated" in f"{type(one).__name__} {one}".lower() for one in chain):
        mend = _login(name)
    if type(error).__name__ == "DatasetGenerationError":  # which says only that there was an error
        error = error.__cause__ or error
    return UserError(f"{what}: {_one_line(error).rstrip('.')}. {mend}".rstrip())


def _login(name: str) -> str:
    return (
        f"If it is gated: accept its terms at https://huggingface.co/datasets/{name}. For a gated or private dataset, "
        "log in with a token that may read it (hf auth login, or the variable HF_TOKEN)."
    )


def _one_line(error: BaseException) -> str:
    """An error of a library as part of a sentence."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:500]
