"""The files of a source: where its path leads, and what they held when they were read.

A corpus is named by the content of the files that it was made of: their SHA-256, kept in the cache folder with their
size and time, so that they are read once for it and again only when one of these has changed.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import logging
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchtitan.config.schema import Data, Source
from torchtitan.tools.errors import UserError
from torchtitan.tools.folders import hash_file, lock

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SourceFile:
    """A file as it was when it was read."""

    path: str
    size: int
    mtime_ns: int
    sha256: str


class ChangedError(UserError):
    """A file is not what it was when it was hashed."""


def source_path(source: Source, data: Data) -> Path:
    """source.path, from data.folder where it is relative; ~ is expanded in both. It may be a glob."""
    if not source.path:
        raise UserError(
            f"Data source {source.name!r} has no path: give a tokenized folder, text files, a folder of MDS shards or "
            "hub:OWNER/NAME."
        )
    return Path(data.folder).expanduser() / Path(source.path).expanduser()


def matching_files(source: Source, data: Data) -> list[Path]:
    """The files that source.path names as a file or a glob."""
    path = source_path(source, data)
    if path.is_file():
        return [path]
    if os.path.isabs(os.path.expanduser(source.path)):
        pattern = str(path)
    else:  # what data.folder is called is no pattern
        pattern = os.path.join(glob.escape(os.path.expanduser(data.folder)), source.path)
    return [Path(p) for p in glob.glob(pattern, recursive=True) if os.path.isfile(p)]


def files_below(folder: Path) -> list[Path]:
    """All files in a folder and the folders in it, hidden ones left out; sorted."""
    found = (p for p in folder.rglob("*") if not any(part.startswith(".") for part in p.relative_to(folder).parts))
    return sorted(p for p in found if p.is_file())


def hash_files(paths: list[Path], cache: Path) -> list[SourceFile]:
    """Hash the files, but those that have the size and mtime of last time are not read again."""
    name = "hashes-" + hashlib.sha256("\n".join(map(str, paths)).encode()).hexdigest()[:16]
    known_path = cache / f".{name}.json"
    stats = [path.stat() for path in paths]

    def look() -> tuple[dict[str, list[Any]], list[bool]]:
        known: dict[str, list[Any]] = {}
        with contextlib.suppress(FileNotFoundError, ValueError):  # not there yet, or cut short by a loss of power
            known = json.loads(known_path.read_text())
        return known, [known.get(str(p), [])[:2] != [s.st_size, s.st_mtime_ns] for p, s in zip(paths, stats)]

    known, fresh = look()
    if not any(fresh):  # a thousand ranks need not wait for one another
        return [SourceFile(str(p), s.st_size, s.st_mtime_ns, known[str(p)][2]) for p, s in zip(paths, stats)]
    with lock(cache, name):
        known, fresh = look()
        size = sum(stat.st_size for stat, new in zip(stats, fresh) if new)
        if size >= 1 << 30:
            logger.info("hashing %.1f GB in %d files, once", size / 1e9, sum(fresh))

        def one(path: Path, stat: os.stat_result, new: bool) -> SourceFile:
            return SourceFile(
                str(path), stat.st_size, stat.st_mtime_ns, hash_file(path) if new else known[str(path)][2]
            )

        with ThreadPoolExecutor(8) as pool:  # hashlib leaves the interpreter lock alone
            files = list(pool.map(one, paths, stats, fresh))
        now = {f.path: [f.size, f.mtime_ns, f.sha256] for f in files}
        if now != known:
            aside = known_path.with_suffix(".tmp")
            aside.write_text(json.dumps(now))
            os.replace(aside, known_path)
    return files


def check_unchanged(file: SourceFile) -> None:
    """ChangedError if the file is not what it was when it was hashed."""
    stat = os.stat(file.path)
    if (stat.st_size, stat.st_mtime_ns) != (file.size, file.mtime_ns):
        raise ChangedError(f"{file.path} was changed while it was being tokenized; start again when it is complete.")
