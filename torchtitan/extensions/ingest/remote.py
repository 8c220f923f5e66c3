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
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torchtitan.config.data_schema import Data, Source
from torchtitan.extensions.ingest.download import download, is_fetched
from torchtitan.extensions.ingest.file_systems import RemoteFile, list_files, open_file_system, refusal, what_failed
from torchtitan.tools.errors import UserError
from torchtitan.tools.folders import lock, make_writable, read_json, write_text, written
from torchtitan.tools.urls import check_url, join_url, without_secrets

logger = logging.getLogger(__name__)

ANSWER_SECONDS = 60.0
"""How long a list of files holds for all processes with the same cache folder, so that a job's ranks ask once."""


def local_source(source: Source, data: Data) -> Source:
    """The source with the path of its local copy, which is fetched first; the source itself if its path is no URL."""
    url = join_url(data.folder, source.path)
    if not url:
        return source
    check_url(url, f"data source {source.name!r}")
    return replace(source, path=local_path(url, Path(data.cache_folder).expanduser().absolute()))


def local_path(url: str, cache: Path) -> str:
    """The local file, folder or glob that holds what a URL names, after fetching what `cache` lacks of it.

    One of the processes with the same cache asks and fetches, the others wait. Without a network, or without the right
    to read, the last state of the files is taken if all are there, with a warning. UserError if one cannot be fetched.
    """
    folder = cache / "remote"
    make_writable("data.cache_folder", folder)
    (folder / "files").mkdir(exist_ok=True)
    name = _folder_name(url, url)
    answer_file = folder / f".{name}.json"
    if (answer := _kept(answer_file)) is None or not _is_recent(answer) or not _is_whole(answer, folder):
        with lock(folder, name):
            answer = _kept(answer_file)
            if answer is None or not _is_recent(answer) or not _is_whole(answer, folder):
                answer = _ask(url, folder, answer)
                write_text(answer_file, json.dumps(answer | {"time": time.time()}))
    place = folder / answer["folder"]
    rest = answer["rest"]
    return os.path.join(glob.escape(str(place)) if glob.has_magic(rest) else str(place), rest).rstrip("/")


def _ask(url: str, folder: Path, before: dict[str, Any] | None) -> dict[str, Any]:
    """What _kept reads, of the files as they are on the server now, which are fetched; or `before`, with a warning."""
    try:
        fs = open_file_system(url)
        files, rest = list_files(fs, url)
    except UserError:
        raise
    except Exception as error:  # what the libraries raise is of many kinds
        if what_failed(error) != "missing" and before is not None and _is_whole(before, folder):
            why = without_secrets(" ".join(f"{type(error).__name__}: {error}".split()))[:300]
            logger.warning(
                f"{url} cannot be listed ({why}); going on with the {len(before['files'])} files that were fetched "
                f"before, in {folder / before['folder']}"
            )
            return before
        raise refusal(url, error) from error
    if not all(file.dated for file in files):
        logger.warning(
            f"{url}: its server gives neither checksums nor times. A change of the same size is not noticed."
        )
    _log_changes(url, before, files)
    whole = [file for file in files if file.identity]
    host = re.sub(r"[^\w.-]", "_", "://".join(url.split("/")[0:3:2]))
    with lock(folder, f"download-{host}"):  # two sources may have files in common
        download(fs, url, whole, folder / "files")
    key = json.dumps([[file.name, file.identity] for file in files])
    answer: dict[str, Any] = {
        "url": url,
        "folder": _folder_name(url, key),
        "rest": rest,
        "files": [asdict(file) for file in files],
    }
    _make_links(folder / answer["folder"], files)
    if not _is_whole(answer, folder):
        raise UserError(f"Files of {url} were deleted from {folder} while they were fetched: start again.")
    logger.info("%s: %d files, read from %s", url, len(whole), folder / answer["folder"])
    return answer


def _kept(file: Path) -> dict[str, Any] | None:
    with contextlib.suppress(FileNotFoundError, UserError):  # missing, or cut short by a loss of power
        return read_json(file)
    return None


def _is_recent(answer: dict[str, Any]) -> bool:
    return 0 <= time.time() - float(answer["time"]) < ANSWER_SECONDS


def _is_whole(answer: dict[str, Any], folder: Path) -> bool:
    """Whether all files of an earlier answer are still there."""
    files = [RemoteFile(**file) for file in answer["files"]]
    place = folder / answer["folder"]
    return all(os.path.lexists(place / f.name) and (not f.identity or is_fetched(f, folder / "files")) for f in files)


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
