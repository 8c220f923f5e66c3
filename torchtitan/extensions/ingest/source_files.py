"""The files of a source: where its path leads, and what they held when they were read.

A corpus is named by the content of its files: their SHA-256. The cache folder keeps each hash with the file's size and
times, so that a file is hashed once, and again only if one of them has changed. One is the time of the last change of
the file or its name, which the system alone sets: an edit that puts the other time back is noticed too.
"""

from __future__ import annotations

import contextlib
import fnmatch
import glob
import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from torchtitan.config.data_schema import Data, Source
from torchtitan.tools.errors import UserError
from torchtitan.tools.folders import hash_file, is_writable, lock, read_json, write_text
from torchtitan.tools.urls import join_url

logger = logging.getLogger(__name__)

HUB = "hub:"
CLOCK_NS = 20_000_000  # by how much the times of files may lag behind; Linux sets them every 1 to 10 ms


@dataclass(frozen=True)
class Material:
    """What tokenize.py needs to know of a source, whatever its format."""

    name: str
    """NAME-KEY of its corpus (units.folder_name)."""

    made_of: Callable[[Any], Any]
    """JSON of all that the tokens of a part depend on: its content, tokenizer, options (units.unit_keys)."""

    metadata: dict[str, Any]
    """What corpus.json says of the corpus beside the counts."""

    what: str
    """For the log: "3 files of text, 1.2 MB"."""

    units: Callable[[], list[list[Any]]]
    """Units of work in document order, each a list of parts with a `size`. May download."""

    documents: Callable[[Any], Iterator[np.ndarray]]
    """The documents of a part, int32[n] each, or int32[2, n] with the tokens' roles."""

    closing: Callable[[], dict[str, Any]]
    """What the encoder adds to the counts of a unit; called after the unit's last document."""


@dataclass(frozen=True)
class SourceFile:
    """A file as it was when it was hashed. size: bytes. mtime_ns, ctime_ns: times of the last change, of its content
    and of anything about it. sha256: hex."""

    path: str
    size: int
    mtime_ns: int
    sha256: str
    ctime_ns: int

    @property
    def metadata(self) -> dict[str, Any]:
        """What corpus.json says of it."""
        return {name: value for name, value in asdict(self).items() if name != "ctime_ns"}


class ChangedError(UserError):
    """A file has changed since it was hashed."""


def is_hub(source: Source) -> bool:
    """Whether source.path names a dataset of the hub, or a local copy of one."""
    return source.path.startswith(HUB)


def source_path(source: Source, data: Data) -> Path:
    """source.path, below data.folder if it is relative; ~ is expanded in both. It may be a glob.

    UserError for a URL, which remote.local_source makes a local path.
    """
    if url := join_url(data.folder, source.path):
        raise UserError(f"{url} of data source {source.name!r} cannot be read here: fetch it, and name a local path.")
    return Path(data.folder).expanduser() / Path(source.path).expanduser()


def matching_files(source: Source, data: Data) -> list[Path]:
    """The files that source.path names as a file or a glob."""
    path = source_path(source, data)
    if path.is_file():
        return [path]
    if os.path.isabs(os.path.expanduser(source.path)):
        pattern = str(path)
    else:  # the name of data.folder is not a pattern
        pattern = os.path.join(glob.escape(os.path.expanduser(data.folder)), source.path)
    parts = pattern.split("/")
    if "**" not in parts:
        return _files([Path(p) for p in glob.glob(pattern)])
    # Not by glob's own "**", which goes round in circles of links for ever.
    above, below = "/".join(parts[: parts.index("**")]), parts[parts.index("**") :]
    hidden = any(part.startswith(".") for part in below)
    roots = [Path(p) for p in glob.glob(above or "/") if os.path.isdir(p)]
    return _files([p for root in roots for p in _walk(root, hidden) if matches(p.relative_to(root).parts, below)])


def matches(names: Sequence[str], parts: Sequence[str]) -> bool:
    """Whether the parts of a glob take a path, as glob does: "**" is any folders; hidden names must be asked for."""
    if not parts or not names:
        return not names and all(part == "**" for part in parts)
    shown = parts[0].startswith(".") or not names[0].startswith(".")
    if parts[0] == "**":
        return matches(names, parts[1:]) or (shown and matches(names[1:], parts))
    return shown and fnmatch.fnmatchcase(names[0], parts[0]) and matches(names[1:], parts[1:])


def files_below(folder: Path) -> list[Path]:
    """All files in a folder and its subfolders, also linked ones, without hidden ones; sorted. UserError for a link
    that leads nowhere."""
    return sorted(_files(list(_walk(folder))))


def _walk(folder: Path, hidden: bool = False, above: tuple[str, ...] = ()) -> Iterator[Path]:
    """What is in a folder and its subfolders, hidden or not; links are followed, but not to where it comes from."""
    above = (*above, os.path.realpath(folder))
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(f"The folder {folder} cannot be listed: {error}. Make it readable, or move it away.") from error
    for entry in entries:
        if entry.name.startswith(".") and not hidden:
            continue
        if not entry.is_dir():
            yield folder / entry.name
        elif not entry.is_symlink() or os.path.realpath(entry.path) not in above:
            yield from _walk(folder / entry.name, hidden, above)


def _files(paths: list[Path]) -> list[Path]:
    """The files among the paths; of those in a folder that several links lead to, each once, and no link to another of
    them. UserError for a link that leads nowhere."""
    real: dict[Path, str] = {}
    files: dict[tuple[str, str], Path] = {}
    for path in sorted(paths):
        if path.is_symlink() and not path.exists():
            raise UserError(
                f"{path} is a link to {os.readlink(path)}, which does not exist: is a disk or a download missing? Mend "
                "the link or take it out."
            )
        if path.is_file():
            if path.parent not in real:
                real[path.parent] = os.path.realpath(path.parent)
            files.setdefault((real[path.parent], path.name), path)
    return [p for p in files.values() if not p.is_symlink() or os.path.split(os.path.realpath(p)) not in files]


def hash_files(paths: list[Path], cache: Path) -> list[SourceFile]:
    """The files with their hashes; only files whose size or times have changed since the last call are read."""
    name = "hashes-" + hashlib.sha256("\n".join(map(str, paths)).encode()).hexdigest()[:16]
    kept = cache / f".{name}.json"  # path -> [size, mtime_ns, sha256]
    stats = [path.stat() for path in paths]
    if max((stat.st_ctime_ns for stat in stats), default=0) > time.time_ns() - CLOCK_NS:
        time.sleep(CLOCK_NS / 1e9)  # a change after the hash must give another time
        stats = [path.stat() for path in paths]

    def read_kept() -> tuple[dict[str, Any], list[bool]]:
        known: dict[str, Any] = {}
        with contextlib.suppress(FileNotFoundError, UserError):  # missing, or cut short by a loss of power
            known = read_json(kept)
        return known, [known.get(str(p), [])[:3] != file_state(s) for p, s in zip(paths, stats)]

    def hashed(path: Path, stat: os.stat_result, new: bool) -> SourceFile:
        size, mtime_ns, ctime_ns = file_state(stat)
        file = SourceFile(str(path), size, mtime_ns, hash_file(path) if new else known[str(path)][3], ctime_ns)
        if new and file_state(path.stat()) != file_state(stat):
            raise ChangedError(f"{path} was changed while it was being read; start again when it is complete.")
        return file

    known, fresh = read_kept()
    if not any(fresh):  # a thousand ranks need not wait for each other
        return list(map(hashed, paths, stats, fresh))
    writable = is_writable(cache)
    with lock(cache, name) if writable else contextlib.nullcontext():
        known, fresh = read_kept()
        size = sum(stat.st_size for stat, new in zip(stats, fresh) if new)
        if size >= 1 << 30:
            logger.info("hashing %.1f GB in %d files, once", size / 1e9, sum(fresh))
        with ThreadPoolExecutor(8) as pool:  # hashlib releases the interpreter lock
            files = list(pool.map(hashed, paths, stats, fresh))
        if any(fresh) and writable:
            write_text(kept, json.dumps({f.path: [f.size, f.mtime_ns, f.ctime_ns, f.sha256] for f in files}))
    return files


def file_state(stat: os.stat_result) -> list[int]:
    """What shows that a file was changed: its size, and both its times."""
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]


def check_file_unchanged(file: SourceFile) -> None:
    """ChangedError if the file has another size or time than when it was hashed. If only something about it is new
    (rights, links), it is read again."""
    size, mtime_ns, ctime_ns = file_state(os.stat(file.path))
    same = (size, mtime_ns) == (file.size, file.mtime_ns)
    if not same or (ctime_ns != file.ctime_ns and hash_file(file.path) != file.sha256):
        raise ChangedError(f"{file.path} was changed while it was being tokenized; start again when it is complete.")
