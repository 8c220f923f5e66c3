"""What is found out once about a file of token ids: where its documents lie, its smallest and largest id, its hash.

That takes a look at every id, at the speed of the disk. The result is kept in data.cache_folder/token_index, a file per
file of ids, for as long as the size and the time of that file, and of the file beside it, stay the same: a file that is
mended, added or removed costs only itself. Nothing is written beside the ids.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import zipfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from torchtitan.extensions.ingest.source_files import file_state
from torchtitan.extensions.ingest.token_layouts import TokenFile
from torchtitan.tools.errors import UserError
from torchtitan.tools.folders import is_writable, lock, written

logger = logging.getLogger(__name__)

INDEX_FORMAT = 1
CHUNK = 1 << 22  # ids that are looked at together
MOST_BYTES = 256 << 30
"""Of a source: if it is larger, and its documents need no search, a sample of its ids is looked at."""
SAMPLES = 256  # chunks of a file, then, each of ...
SAMPLE = 1 << 14  # ... ids


@dataclass(frozen=True)
class Cut:
    """The id that ends documents, or begins them; None: no id does, and each file is one document."""

    token: int | None
    begins: bool = False


@dataclass(frozen=True)
class TokenIndex:
    """offsets: int64[documents + 1], the tokens at which documents begin, and the end. Documents without a token are
    left out. first, last: each document's first and last id. lowest, highest: of all ids that were looked at, or
    of a sample if `sampled`. found: how often the id that cuts documents occurs. digest: hex, of the ids."""

    offsets: np.ndarray
    first: np.ndarray
    last: np.ndarray
    lowest: int
    highest: int
    found: int
    empty: int
    sampled: bool
    digest: str


def index_files(files: Sequence[TokenFile], cut: Cut, cache: Path) -> list[TokenIndex]:
    """The index of each file, from the cache if it has it. UserError for bounds that do not fit the ids."""
    total = sum(file.path.stat().st_size for file in files)
    sampled = total > MOST_BYTES and all(file.beside is not None or cut.token is None for file in files)
    keys = [_key(file, cut, sampled) for file in files]
    kept = [_read(cache, *key) for key in keys]
    if all(index is not None for index in kept):  # a thousand ranks need not wait for each other
        return [index for index in kept if index is not None]
    writable = is_writable(cache / "token_index")
    if not writable:
        logger.info("the ids of %d files are looked at, at every start: %s cannot be written to", len(files), cache)
    with lock(cache, "token-index-" + hashlib.sha256("".join(name for name, _ in keys).encode()).hexdigest()[:16]):
        if total >= 1 << 30:
            how = "a sample of its ids is" if sampled else "its ids are"
            logger.info("%.1f GB of tokens in %d files: %s looked at, once", total / 1e9, len(files), how)

        def made(file: TokenFile, name: str, state: list[Any]) -> TokenIndex:
            index = _read(cache, name, state)
            if index is None:
                index = _index(file, cut, sampled)
                if _key(file, cut, sampled) != (name, state):
                    raise UserError(f"{file.path} was changed while it was read; start again when it is complete.")
                if writable:
                    _write(cache, name, state, index)
            return index

        with ThreadPoolExecutor(8) as pool:  # NumPy and hashlib release the interpreter lock
            return list(pool.map(made, files, *zip(*keys)))


def _key(file: TokenFile, cut: Cut, sampled: bool) -> tuple[str, list[Any]]:
    """The name of a file's index, and the state of the files that it holds for."""
    paths = [path.absolute() for path in (file.path, file.beside) if path is not None]
    searched = None if file.beside is not None else [cut.token, cut.begins]
    what = [INDEX_FORMAT, *map(str, paths), file.layout, file.dtype, file.begin, searched, sampled]
    stats = [path.stat() for path in paths]
    name = hashlib.sha256(json.dumps(what).encode()).hexdigest()[:24]
    return name, [file_state(stat) for stat in stats]


def _read(cache: Path, name: str, state: list[Any]) -> TokenIndex | None:
    kept = read_kept(cache, name, state)
    return None if kept is None else TokenIndex(**kept)


def _write(cache: Path, name: str, state: list[Any], index: TokenIndex) -> None:
    names = ("lowest", "highest", "found", "empty", "sampled", "digest")
    about = {name: getattr(index, name) for name in names}
    write_kept(cache, name, state, about, offsets=index.offsets, first=index.first, last=index.last)


def read_kept(cache: Path, name: str, state: list[Any]) -> dict[str, Any] | None:
    """What write_kept was given, by name; None if it is missing or of another state of the file."""
    missing_or_cut_short = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile)
    path = cache / "token_index" / f"{name}.npz"
    with contextlib.suppress(*missing_or_cut_short), np.load(path, allow_pickle=False) as kept:
        about = json.loads(str(kept["about"]))
        if about.pop("state") == state:
            return about | {key: kept[key] for key in kept.files if key != "about"}
    return None


def write_kept(cache: Path, name: str, state: list[Any], about: dict[str, Any], **arrays: np.ndarray) -> None:
    """Keep what is known of files whose sizes and times are `state`. about: JSON."""
    text = json.dumps({"state": state} | about)
    with written(cache / "token_index" / f"{name}.npz", durable=True, unique=True) as path, open(path, "wb") as file:
        np.savez(file, about=np.array(text), **arrays)  # type: ignore[arg-type]


def _index(file: TokenFile, cut: Cut, sampled: bool) -> TokenIndex:
    values = file.map()[:]
    offsets = file.bounds()
    token = cut.token if offsets is None else None
    if sampled:
        starts = np.linspace(0, max(0, file.tokens - SAMPLE), SAMPLES).astype(np.int64)
        chunks = [(int(at), min(file.tokens, int(at) + SAMPLE)) for at in np.unique(starts)]
    else:
        chunks = [(at, min(file.tokens, at + CHUNK)) for at in range(0, file.tokens, CHUNK)]
    lowest: list[int] = []
    highest: list[int] = []
    hits: list[np.ndarray] = []
    digest = hashlib.sha256(f"{file.dtype} {file.tokens}".encode())
    for start, stop in chunks:
        part = values[start:stop]
        lowest.append(int(part.min()))
        highest.append(int(part.max()))
        digest.update(part.data)
        if token is not None:
            hits.append(np.flatnonzero(part == token) + start)
    found = np.concatenate([np.empty(0, np.int64), *hits])
    if offsets is None:
        offsets = np.concatenate([[0], found if cut.begins else found + 1, [file.tokens]])
    kept = np.unique(offsets).astype(np.int64)
    # What the search finds at the ends of the file is no empty document.
    empty = len(offsets) - len(kept) if file.beside is not None else 0
    first, last = values[kept[:-1]], values[kept[1:] - 1]
    digest.update(kept.tobytes())
    ends = np.concatenate([first, last])  # in a sample, they may be what was not looked at
    least, most = min([*lowest, int(ends.min())]), max([*highest, int(ends.max())])
    return TokenIndex(kept, first, last, least, most, len(found), empty, sampled, digest.hexdigest())
