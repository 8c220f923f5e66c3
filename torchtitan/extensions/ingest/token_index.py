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
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from torchtitan.extensions.ingest.source_files import file_state
from torchtitan.extensions.ingest.token_layouts import TokenFile
from torchtitan.tools.errors import UserError
from torchtitan.tools.folders import is_writable, lock, written

logger = logging.getLogger(__name__)

File = TypeVar("File")
Index = TypeVar("Index")

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
    return kept_indexes(
        [file.path for file in files],
        files,
        lambda file: _key(file, cut, sampled),
        lambda file: _index(file, cut, sampled),
        TokenIndex,
        cache,
        "a sample of its ids is" if sampled else "its ids are",
    )


def kept_indexes(
    paths: Sequence[Path],
    files: Sequence[File],
    key: Callable[[File], tuple[str, list[Any]]],
    look: Callable[[File], Index],
    kind: Callable[..., Index],
    cache: Path,
    how: str,
    before: Callable[[], None] = lambda: None,
    threads: int = 8,
) -> list[Index]:
    """The index of each file, from the cache if it has it; else what `look` finds, which is kept there.

    key: of a file, the name of its index, and the state that it holds for. kind: the dataclass of the indexes. how: for
    the log, what of the files is looked at. before: called before any file is.
    """

    def read(name: str, state: list[Any]) -> Index | None:
        known = _read(cache, name, state)
        return None if known is None else kind(**known)

    keys = list(map(key, files))
    kept = [read(*k) for k in keys]
    if all(index is not None for index in kept):  # a thousand ranks need not wait for each other
        return [index for index in kept if index is not None]
    before()
    writable = is_writable(cache / "token_index")
    if not writable:
        logger.info("%d files: %s looked at, at every start: %s cannot be written to", len(files), how, cache)
    with lock(cache, "token-index-" + hashlib.sha256("".join(name for name, _ in keys).encode()).hexdigest()[:16]):
        total = sum(path.stat().st_size for path in paths)
        if total >= 1 << 30:
            logger.info("%.1f GB of tokens in %d files: %s looked at, once", total / 1e9, len(files), how)

        def made(path: Path, file: File, name: str, state: list[Any]) -> Index:
            index = read(name, state)
            if index is None:
                index = look(file)
                if key(file) != (name, state):
                    raise UserError(f"{path} was changed while it was read; start again when it is complete.")
                if writable:
                    _write(cache, name, state, vars(index))
            return index

        with ThreadPoolExecutor(threads) as pool:  # NumPy and hashlib release the interpreter lock
            return list(pool.map(made, paths, files, *zip(*keys)))


def _key(file: TokenFile, cut: Cut, sampled: bool) -> tuple[str, list[Any]]:
    """The name of a file's index, and the state of the files that it holds for."""
    paths = [path.absolute() for path in (file.path, file.beside) if path is not None]
    searched = None if file.beside is not None else [cut.token, cut.begins]
    what = [INDEX_FORMAT, *map(str, paths), file.layout, file.dtype, file.begin, searched, sampled]
    stats = [path.stat() for path in paths]
    name = hashlib.sha256(json.dumps(what).encode()).hexdigest()[:24]
    return name, [file_state(stat) for stat in stats]


def _read(cache: Path, name: str, state: list[Any]) -> dict[str, Any] | None:
    """What _write was given, by name; None if it is missing or of another state of the file."""
    missing_or_cut_short = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile)
    path = cache / "token_index" / f"{name}.npz"
    with contextlib.suppress(*missing_or_cut_short), np.load(path, allow_pickle=False) as kept:
        about = json.loads(str(kept["about"]))
        if about.pop("state") == state:
            return about | {key: kept[key] for key in kept.files if key != "about"}
    return None


def _write(cache: Path, name: str, state: list[Any], known: dict[str, Any]) -> None:
    """Keep what is known of files whose sizes and times are `state`: arrays, and what JSON can hold."""
    arrays = {key: value for key, value in known.items() if isinstance(value, np.ndarray)}
    about = json.dumps({"state": state} | {key: value for key, value in known.items() if key not in arrays})
    with written(cache / "token_index" / f"{name}.npz", durable=True, unique=True) as path, open(path, "wb") as file:
        np.savez(file, about=np.array(about), **arrays)  # type: ignore[arg-type]


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
