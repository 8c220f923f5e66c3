"""A source whose path is a URL (s3://, gs://, hf://, https://): its files are fetched into the cache, and read there.

Under data.cache_folder/remote, `files` has the contents, each named by its identity (its address and what the server
says of its content), and a folder PLACE-KEY of links gives them the names that they have on the server. The folder is
made for one state of the files there: a source reads what was there when it began, whatever happens there later. What
was asked for and found is kept in .PLACE-KEY.json, to go on without a network.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import logging
import os
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torchtitan.config.data_schema import Data, Source
from torchtitan.datasets.corpus import CORPUS_FILE, MAKE_AGAIN
from torchtitan.datasets.same_data import keys_that_decide
from torchtitan.datasets.tokenizer import Tokenizer
from torchtitan.extensions.ingest.download import download, is_fetched
from torchtitan.extensions.ingest.encoder import make_encoder
from torchtitan.extensions.ingest.file_systems import RemoteFile, list_files, open_file_system, refusal, what_failed
from torchtitan.extensions.ingest.units import folder_name
from torchtitan.tools.errors import UserError
from torchtitan.tools.folders import is_writable, lock, make_writable, read_json, write_text, written
from torchtitan.tools.urls import check_url, join_url, without_secrets

logger = logging.getLogger(__name__)

ANSWER_SECONDS = 60.0
"""How long a list of files holds for all processes with the same cache folder, so that a job's ranks ask once."""


def local_source(source: Source, tokenizer: Tokenizer, data: Data) -> Source | Path:
    """The source with the path of its local copy, which is fetched first; the source itself if its path is no URL.

    A Path: the finished corpus of these very files, if the cache does not have them (any more). UserError for what
    cannot be fetched.
    """
    url = join_url(data.folder, source.path)
    if not url or not source.path:  # a synthetic source may have none
        return source
    check_url(url, f"data source {source.name!r}")
    cache = Path(data.cache_folder).expanduser().absolute()
    policy = _policy(source, tokenizer, data)
    local = local_path(url, cache, lambda state: _finished(source, cache, [state, policy]))
    return local if isinstance(local, Path) else replace(source, path=local)


def remote_metadata(source: Source, local: Source, tokenizer: Tokenizer, data: Data) -> dict[str, Any]:
    """What corpus.json says of a source at a URL beside what it says of its local copy."""
    if local is source:
        return {}
    folder = str(Path(data.cache_folder).expanduser().absolute() / "remote")
    state = local.path.removeprefix(folder).removeprefix(glob.escape(folder)).lstrip("/")
    return {"path": join_url(data.folder, source.path), "remote": [state, _policy(source, tokenizer, data)]}


def _policy(source: Source, tokenizer: Tokenizer, data: Data) -> str:
    """Hex, of all that documents depend on beside the files."""
    keys = {k: v for k, v in keys_that_decide(source, "documents").items() if k != "path" and not k.startswith("hub_")}
    key = [make_encoder(source, tokenizer, data).key, keys]
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]


def _finished(source: Source, cache: Path, remote: list[str]) -> Path | None:
    prefix = folder_name(source.name, []).rpartition("-")[0]
    for corpus in sorted(cache.glob(f"{glob.escape(prefix)}-*/{CORPUS_FILE}")):
        if read_json(corpus, MAKE_AGAIN).get("remote") == remote:
            return corpus.parent
    return None


def local_path(url: str, cache: Path, made: Callable[[str], Path | None] = lambda state: None) -> str | Path:
    """The local file, folder or glob that holds what a URL names, after fetching what `cache` lacks of it.

    made: the corpus that was made of a state of the files. If there is one, it is the answer instead of fetching.
    One of the processes with the same cache asks and fetches, the others wait. Without a network, or without the right
    to read, the last state of the files is taken if all are there, with a warning. UserError if one cannot be fetched.
    """
    folder = cache / "remote"
    name = _folder_name(url, url)
    answer_file = folder / f".{name}.json"
    if not is_writable(folder):
        if (before := _kept(answer_file)) and (local := _local(before, folder, made)):
            logger.info("%s: %s cannot be written to, so the server is not asked: going on with %s", url, folder, local)
            return local
        make_writable("data.cache_folder", folder)
    (folder / "files").mkdir(exist_ok=True)

    def known() -> str | Path | None:
        answer = _kept(answer_file)
        return _local(answer, folder, made) if answer and 0 <= time.time() - answer["time"] < ANSWER_SECONDS else None

    if (local := known()) is None:
        with lock(folder, name):
            if (local := known()) is None:
                answer, local = _ask(url, folder, _kept(answer_file), made)
                write_text(answer_file, json.dumps(answer | {"time": time.time()}))
    return local


def _local(answer: dict[str, Any], folder: Path, made: Callable[[str], Path | None]) -> str | Path | None:
    """The local path of a state of the files; else the corpus that was made of it; else None."""
    place, rest = folder / answer["folder"], answer["rest"]
    if not all(os.path.lexists(place / f["name"]) for f in answer["files"]) or not all(
        is_fetched(RemoteFile(**f), folder / "files") for f in answer["files"] if f["identity"]
    ):
        return made(f"{place.name}/{rest}".rstrip("/"))
    return os.path.join(glob.escape(str(place)) if glob.has_magic(rest) else str(place), rest).rstrip("/")


def _ask(
    url: str, folder: Path, before: dict[str, Any] | None, made: Callable[[str], Path | None]
) -> tuple[dict[str, Any], str | Path]:
    """What _kept reads, of the files as they are on the server now, and where they are, after fetching what is missing;
    or of the files as they were `before`, with a warning."""
    try:
        fs = open_file_system(url)
        files, rest = list_files(fs, url)
    except UserError:
        raise
    except Exception as error:  # what the libraries raise is of many kinds
        if what_failed(error) != "missing" and before is not None and (local := _local(before, folder, made)):
            why = without_secrets(" ".join(f"{type(error).__name__}: {error}".split()))[:300]
            logger.warning(
                f"{url} cannot be listed ({why}); going on with the {len(before['files'])} files that were fetched "
                f"before, or the corpus that was made of them: {local}"
            )
            return before, local
        raise refusal(url, error) from error
    if not all(file.dated for file in files):
        logger.warning(f"{url}: its server gives no checksum and no time: a change of the same size is not noticed.")
    _log_changes(url, before, files)
    key = json.dumps([[file.name, file.identity] for file in files])
    answer: dict[str, Any] = {"url": url, "folder": _folder_name(url, key), "rest": rest}
    answer["files"] = [asdict(file) for file in files]
    if isinstance(corpus := _local(answer, folder, made), Path):
        logger.info("%s: nothing is fetched, %s was made of the files that are there now", url, corpus)
        return answer, corpus
    host = re.sub(r"[^\w.-]", "_", "://".join(url.split("/")[0:3:2]))
    with lock(folder, f"download-{host}"):  # two sources may have files in common
        download(fs, url, [file for file in files if file.identity], folder / "files")
    _make_links(folder / answer["folder"], files)
    if (local := _local(answer, folder, made)) is None:
        raise UserError(f"Files of {url} were deleted from {folder} while they were fetched: start again.")
    logger.info("%s: %d files, read from %s", url, len(files), folder / answer["folder"])
    return answer, local


def _kept(file: Path) -> dict[str, Any] | None:
    with contextlib.suppress(FileNotFoundError, UserError):  # missing, or cut short by a loss of power
        return read_json(file)
    return None


def _make_links(place: Path, files: Sequence[RemoteFile]) -> None:
    """The folder that gives the files their names; a file of which only the name is of interest leads nowhere."""
    if all(os.path.lexists(place / file.name) for file in files):
        return
    if place.exists():
        raise UserError(f"{place} lacks files that it had: delete that folder, and start again.")
    with written(place, unique=True) as aside:
        for file in files:
            link = aside / file.name
            try:
                link.parent.mkdir(parents=True, exist_ok=True)
                up = "../" * (file.name.count("/") + 1)
                link.symlink_to(f"{up}files/{file.identity or 'not-fetched'}")
            except OSError as error:
                raise UserError(
                    f"{file.path} cannot be a file of a local folder ({error.strerror}): perhaps its name is too long, "
                    "or the name of a folder too. Leave it out by a glob."
                ) from error


def _log_changes(url: str, before: dict[str, Any] | None, files: Sequence[RemoteFile]) -> None:
    if before is None:
        return
    old, new = {f["name"]: f["identity"] for f in before["files"]}, {f.name: f.identity for f in files}
    changed = [name for name in new if name in old and new[name] != old[name]]
    added, gone = [name for name in new if name not in old], [name for name in old if name not in new]
    said = [
        f"{len(names)} {what} (such as {names[0]})"
        for names, what in ((changed, "changed"), (added, "new"), (gone, "gone"))
        if names
    ]
    if said:
        logger.warning(f"{url}: files have changed on the server since they were fetched: {', '.join(said)}")


def _folder_name(url: str, key: str) -> str:
    """A name that tells the place, and 16 hex digits of `key`."""
    place = re.sub(r"[^\w.-]+", "-", url.partition("?")[0])[-100:].strip("-.")
    return f"{place}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
