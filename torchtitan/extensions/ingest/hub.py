"""A dataset of the Hugging Face hub as a source: streamed, tokenized as it arrives, and kept like any other corpus.

`hub:OWNER/NAME` is downloaded once, in order, by one process whose threads tokenize: the network is what is waited
for. Its revision is resolved to a commit, which the key carries. After every unit the stream's position is kept, so
that a killed run goes on from its last whole unit. `hub:./folder` (or ../, /, ~) reads a local copy in the same way.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torchtitan.config.schema import Data, Source
from torchtitan.datasets.corpus import CORPUS_FILE
from torchtitan.datasets.tokenizer import Tokenizer
from torchtitan.extensions.ingest.chat import ChatEncoder
from torchtitan.extensions.ingest.documents import Encoder, make_encoder, policy_about, policy_key
from torchtitan.extensions.ingest.hub_stream import (
    UNIT_CHARACTERS,
    HubDataset,
    Stream,
    gated_message,
    one_line,
    open_dataset,
)
from torchtitan.extensions.ingest.source_files import check_unchanged, files_below, hash_files
from torchtitan.extensions.ingest.units import Counts, Place, begin, cut_of, finish, folder_name, is_made, write_unit
from torchtitan.extensions.ingest.workers import Progress
from torchtitan.tools.errors import UserError
from torchtitan.tools.folders import lock

logger = logging.getLogger(__name__)

PREFIX = "hub:"
ASK_AGAIN_SECONDS = 600.0
ASK_AGAIN_SECONDS_OFFLINE = 60.0
"""How long all processes with this cache folder go by one answer of the hub: ranks that start together must not see
different commits of a branch, nor wait one after the other for a hub that cannot be reached."""


class UnreachableError(Exception):
    """The hub did not answer."""


def is_hub(source: Source) -> bool:
    """Whether source.path names a dataset of the hub."""
    return source.path.startswith(PREFIX)


def stream_source(source: Source, tokenizer: Tokenizer, data: Data, cache: Path, threads: int) -> Path:
    """Tokenize a hub source into the cache folder unless it is there; the folder.

    UserError for a dataset, subset, split or field that is not there or not allowed, and for a hub that cannot be
    reached, unless the finished corpus of an earlier download is in the cache.
    """
    encoder = make_encoder(source, tokenizer, data)
    if source.max_documents is not None and source.max_documents < 1:
        raise UserError(f"data.sources.max_documents = {source.max_documents} of {source.name!r} must be 1 or more.")
    wanted = _parse(source, data, cache)
    about: dict[str, Any] = policy_about(source, tokenizer, data) | {
        "max_documents": source.max_documents,
        "path": source.path,
    }
    try:
        commit = "" if wanted.files else _commit(wanted, cache)
    except UnreachableError as error:
        return _made_before(source, cache, wanted, about, str(error))
    files = [(os.path.relpath(file.path, wanted.name), file.sha256) for file in wanted.files]
    content: list[Any] = files or [wanted.name, commit]
    key = [*policy_key(source, tokenizer, data), "hub", content, wanted.subset, wanted.split, encoder.fields.name]
    name = folder_name(source.name, [*key, source.max_documents])
    if is_made(cache, name):
        return cache / name
    for folder, before in _finished(source, cache, wanted, about)[:1]:
        logger.warning(
            f"data source {source.name}: {folder} was made of {wanted.name} at commit {before}, but its "
            f"{wanted.revision} is {commit} now: it is downloaded again. To keep the other, set hub_revision to it."
        )
    about |= {
        "fingerprint": name.rpartition("-")[2],
        "hub": wanted.request() | {"commit": commit},
        "files": [asdict(file) for file in wanted.files],
    }
    place = Place(cache, name, cut_of(UNIT_CHARACTERS))
    with lock(cache, f"{name}.shard-0-of-1"):
        done = begin(place)
        if done is not None:
            try:
                finish(place, _stream_units(place, source, wanted, commit, encoder, done, threads), about)
            except UserError:
                with contextlib.suppress(OSError):  # what is done is kept; nothing was
                    place.aside.rmdir()
                raise
    return place.folder


def _parse(source: Source, data: Data, cache: Path) -> HubDataset:
    name = source.path.removeprefix(PREFIX)
    rest = (source.hub_subset, source.hub_split, source.hub_revision)
    if name.startswith((".", "/", "~")):
        folder = (Path(data.folder).expanduser() / Path(name).expanduser()).absolute()
        files = files_below(folder) if folder.is_dir() else []
        if not files:
            raise UserError(f"The path {source.path!r} of data source {source.name!r}: {folder} is no folder of files.")
        return HubDataset(str(folder), *rest, tuple(hash_files(files, cache)))
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise UserError(
            f"The path {source.path!r} of data source {source.name!r} names no dataset: write hub:OWNER/NAME, or "
            "hub:./folder for a local copy. Subset, split and revision are the keys hub_subset, hub_split and "
            "hub_revision."
        )
    return HubDataset(name, *rest)


# ---- which commit, and what to do without an answer ------------------------------------------------------------------


def _commit(wanted: HubDataset, cache: Path) -> str:
    """The commit that the revision is; UnreachableError if the hub does not answer."""
    if re.fullmatch("[0-9a-f]{40}", wanted.revision):
        return wanted.revision
    name = "hub-" + folder_name(wanted.name, [wanted.revision])
    with lock(cache, name):
        with contextlib.suppress(OSError, ValueError):
            answer = json.loads((cache / f".{name}.json").read_bytes())
            age = time.time() - answer["time"]
            if 0 <= age < (ASK_AGAIN_SECONDS if answer["commit"] else ASK_AGAIN_SECONDS_OFFLINE):
                return _commit_in(answer)
        answer = {"commit": "", "why": "", "time": 0.0}
        try:
            answer["commit"] = _ask_for_commit(wanted)
        except UnreachableError as error:
            answer["why"] = str(error)
        answer["time"] = time.time()
        (cache / f".{name}.json").write_text(json.dumps(answer))
    return _commit_in(answer)


def _commit_in(answer: dict[str, Any]) -> str:
    if not answer["commit"]:
        raise UnreachableError(answer["why"])
    return str(answer["commit"])


def _ask_for_commit(wanted: HubDataset) -> str:
    import huggingface_hub
    from huggingface_hub.utils import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        return str(huggingface_hub.HfApi().dataset_info(wanted.name, revision=wanted.revision, timeout=20).sha)
    except GatedRepoError as error:
        raise UserError(gated_message(wanted.name)) from error
    except RepositoryNotFoundError as error:
        raise UserError(
            f"The hub has no dataset {wanted.name!r}, or it is private and this user is not logged in with a token "
            "that may read it (hf auth login, or the variable HF_TOKEN)."
        ) from error
    except RevisionNotFoundError as error:
        raise UserError(
            f"hub_revision = {wanted.revision!r}: the dataset {wanted.name} has no such branch, tag or commit."
        ) from error
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        if status is not None and status < 500 and status != 429:
            raise UserError(f"The hub refuses to say what {wanted.name} is: {one_line(error)}") from error
        raise UnreachableError(one_line(error)) from error
    except Exception as error:  # whatever the HTTP library of the day raises; offline mode too
        raise UnreachableError(one_line(error)) from error


def _finished(source: Source, cache: Path, wanted: HubDataset, about: dict[str, Any]) -> list[tuple[Path, str]]:
    """Finished corpora of the same request and policy, with the commit each was made of; the newest first."""
    if wanted.files:
        return []
    prefix = folder_name(source.name, []).rpartition("-")[0]
    corpora = (p for p in cache.glob(f"*/{CORPUS_FILE}") if p.parent.name.rpartition("-")[0] == prefix)
    ours = wanted.request() | {k: v for k, v in about.items() if k not in ("path", "tokenizer_folder")}
    found = []
    for corpus in sorted(corpora, key=lambda path: path.stat().st_mtime, reverse=True):
        there = json.loads(corpus.read_bytes())
        hub = there.get("hub", {})
        if all((there | hub).get(key) == value for key, value in ours.items()):
            found.append((corpus.parent, str(hub["commit"])))
    return found


def _made_before(source: Source, cache: Path, wanted: HubDataset, about: dict[str, Any], why: str) -> Path:
    for folder, commit in _finished(source, cache, wanted, about):
        logger.warning(
            f"data source {source.name}: the hub cannot be reached ({why}); going on with {folder}, which was made of "
            f"{wanted.name} at commit {commit}"
        )
        return folder
    raise UserError(
        f"The hub cannot be reached for {source.path} of data source {source.name!r} ({why}), and data.cache_folder = "
        f"{cache} holds no finished corpus of it for this tokenizer. Tokenize it where there is a network, into the "
        f"same data.cache_folder (scripts/tokenize_corpus.py), or name a local copy: hub:./folder."
    )


def _stream_units(
    place: Place,
    source: Source,
    wanted: HubDataset,
    commit: str,
    encoder: Encoder | ChatEncoder,
    done: dict[int, Counts],
    threads: int,
) -> int:
    """Make the units that are not done; how many there are in all."""
    index = next(i for i in range(len(done) + 1) if i not in done)
    last = done.get(index - 1)
    if last and last["ended"]:
        return index
    dataset = open_dataset(wanted, commit, encoder.fields)
    stream = Stream(dataset, wanted.name, encoder, threads, source.max_documents)
    if last:
        stream.resume(last)
    logger.info("%s: streaming %s%s", source.name, source.path, f" at commit {commit}" if commit else "")
    progress = Progress(
        f"tokenizing {place.source}", None, source.max_documents or 0, index, last["kept"] if last else 0
    )

    def closing() -> Counts:
        for file in wanted.files:
            check_unchanged(file)
        return stream.position() | encoder.closing()

    with progress:
        while not stream.ended:
            write_unit(place, index, stream.unit(progress), closing)
            progress.advance(1, 0, 0)
            index += 1
    return index
