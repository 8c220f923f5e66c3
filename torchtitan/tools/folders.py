"""Files and folders: tried before a run needs them, written whole or not at all, read with an error that names them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torchtitan.tools.errors import UserError

logger = logging.getLogger(__name__)


def sync(path: Path) -> None:
    """Have a file's bytes, or a folder's names (a rename in it), survive a power loss. OSError on a full disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_writable(key: str, folder: Path) -> None:
    """Make the folder where it is not there; UserError naming the TOML `key` if it cannot be made or written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        why = f"{there} is a file, not a folder" if there.is_file() else str(error.strerror)
        raise UserError(
            f"{key} = {folder} cannot be written to: {why}. Name a folder that this user may make and write to."
        ) from None


def check_can_be_written(file: Path, option: str = "") -> None:
    """UserError that names the file, and the option that asked for it, unless it can be written; makes it if missing.
    For commands that take minutes before they write."""
    try:
        with open(file, "a"):
            pass
    except OSError as error:
        raise UserError(f"{option} {file} cannot be written: {error.strerror}.".lstrip()) from None


def put_aside(folder: Path, after: int) -> Path | None:
    """Move what an earlier run left in folder for later steps than `after` (step-N, step-N.json, ...) to folder-1, or
    -2, ...: where that is, None where there is nothing."""
    names = [(re.match(r"step-(\d+)", path.name), path) for path in folder.glob("step-*")]
    found = [path for match, path in names if match and int(match[1]) > after]
    if not found:
        return None
    number = 1
    while (aside := folder.with_name(f"{folder.name}-{number}")).exists():
        number += 1
    aside.mkdir()
    for path in found:
        path.rename(aside / path.name)
    return aside


@contextlib.contextmanager
def written(path: Path, durable: bool = False, unique: bool = False) -> Iterator[Path]:
    """Yields where to write a file that shall be at `path`: it is there complete or not at all.

    The name beside it is path.partial; it becomes `path` when the block ends, and is deleted if the block raises.
    Whatever was at `path` stays until then. durable: the bytes and the name survive a power loss (fsync). The parent
    folder must exist. A process that is killed leaves path.partial, which the next writer overwrites. unique: a name of
    this process alone, for files that several processes may write at once.
    """
    aside = path.with_name(f"{path.name}{f'.{uuid.uuid4().hex}' if unique else ''}.partial")
    try:
        yield aside
        if durable:
            sync(aside)
        aside.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)
        raise
    if durable:
        sync(path.parent)


def write_text(path: Path, text: str, durable: bool = False) -> None:
    """`text` as UTF-8 at `path`, whole or not at all: see written."""
    with written(path, durable) as aside:
        aside.write_text(text, encoding="utf-8")


def read_json(path: Path, mend: str = "") -> dict[str, Any]:
    """The JSON object in a file; UserError that names the file, and then says `mend`, if it holds anything else.

    OSError if the file cannot be read.
    """
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}. {mend}".rstrip()) from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds {type(value).__name__}, but a JSON object is expected. {mend}".rstrip())
    return value


def partial_of(out: Path) -> Path:
    """Where a folder is written before it is renamed to `out`, so that it is complete or absent."""
    return out.with_name(out.name + ".partial")


def new_folder(out: Path) -> Path:
    """`out`, with its parents there and what a killed run left of it removed; UserError if it exists."""
    if out.exists():
        raise UserError(f"{out} exists and is not overwritten: choose another folder, or delete that one.")
    out.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(partial_of(out), ignore_errors=True)
    return out


@contextlib.contextmanager
def lock(cache: Path, name: str) -> Iterator[None]:
    """Hold the file lock cache/.NAME.lock; says so where it has to wait. The system frees it when its owner dies."""
    import filelock

    held = filelock.FileLock(cache / f".{name}.lock")
    try:
        held.acquire(timeout=2)
    except filelock.Timeout:
        logger.info("waiting for another process that works on %s", cache / name)
        held.acquire()
    try:
        yield
    finally:
        held.release()


def hash_file(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
