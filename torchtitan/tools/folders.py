"""Files and folders: checked before a run needs them, written completely or not at all, read with errors that name
them."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torchtitan.tools.errors import UserError

logger = logging.getLogger(__name__)


def sync(path: Path) -> None:
    """Make a file's bytes, or a folder's entries (a rename in it), survive a power loss. OSError on a full disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_writable(key: str, folder: Path, lacks: str = "") -> None:
    """Make the folder if it is missing; UserError that names the TOML `key` if it cannot be made or written to.

    lacks: a sentence on what has to be written there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        why = f"{nearest} is a file, not a folder" if nearest.is_file() else str(error.strerror)
        raise UserError(
            f"{key} = {folder} cannot be written to: {why}. Name a folder that this user may make and write to."
            f"{f' {lacks}' if lacks else ''}"
        ) from None


def is_writable(folder: Path) -> bool:
    """Whether files can be made in a folder; of one that is missing, whether it can be made (then it is)."""
    try:
        make_writable("", folder)
    except UserError:
        return False
    return True


def check_can_be_written(file: Path, option: str = "") -> None:
    """UserError that names the file and its command-line option if it cannot be written; makes it if it is missing.

    For commands that take minutes before they write.
    """
    try:
        with open(file, "a"):
            pass
    except OSError as error:
        raise UserError(f"{option} {file} cannot be written: {error.strerror}.".lstrip()) from None


def put_aside(folder: Path, after: int) -> Path | None:
    """Move what an earlier run has left in `folder` for steps later than `after` (step-N, step-N.json, ...) to
    folder-1 (or -2, ...), and log it. The new folder; None if there is nothing to move."""
    names = [(re.match(r"step-(\d+)", path.name), path) for path in folder.glob("step-*")]
    later = [path for match, path in names if match and int(match[1]) > after]
    if not later:
        return None
    number = 1
    while (aside := folder.with_name(f"{folder.name}-{number}")).exists():
        number += 1
    aside.mkdir()
    for path in later:
        path.rename(aside / path.name)
    logger.info("what an earlier run left in %s is now in %s", folder, aside)
    return aside


@contextlib.contextmanager
def written(path: Path, durable: bool = False, unique: bool = False) -> Iterator[Path]:
    """Yields the path to which to write a file or folder, so that `path` is complete or absent at any moment.

    That path is `path`.partial; it is renamed to `path` when the block ends, and deleted if the block raises. Whatever
    was at `path` stays until then. The parent folder must exist. A killed process leaves `path`.partial behind, and the
    next writer overwrites it. durable: the bytes and the name survive a power loss (fsync). unique: use a name of this
    process alone, for files that several processes may write at once. A folder must not exist at `path`.
    """
    aside = path.with_name(f"{path.name}{f'.{uuid.uuid4().hex}' if unique else ''}.partial")
    try:
        yield aside
        if durable:
            sync(aside)
        aside.replace(path)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)
        raise
    if durable:
        sync(path.parent)


def write_text(path: Path, text: str, durable: bool = False) -> None:
    """Write `text` to `path` as UTF-8, completely or not at all: see written."""
    with written(path, durable) as aside:
        aside.write_text(text, encoding="utf-8")


def lfs_pointer(content: bytes) -> str:
    """A sentence on a file that is what Git LFS leaves in place of one that it has not fetched; "" for any other."""
    return "It is the pointer of Git LFS: run `git lfs pull`." if content.startswith(b"version https:") else ""


def read_json(path: Path, mend: str = "") -> dict[str, Any]:
    """The JSON object in a file. UserError that names the file, followed by `mend`, if it holds anything else.

    OSError if the file cannot be read.
    """
    content = path.read_bytes()
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {error}. {lfs_pointer(content) or mend}".rstrip()) from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a {type(value).__name__}, but a JSON object is expected. {mend}".rstrip())
    return value


def partial_of(out: Path) -> Path:
    """The path at which a folder is written before it is renamed to `out`, so that `out` is complete or absent."""
    return out.with_name(out.name + ".partial")


def new_folder(out: Path) -> Path:
    """`out`, after making its parents and deleting what a killed run has left of it; UserError if it exists."""
    if out.exists():
        raise UserError(f"{out} exists and is not overwritten: choose another folder, or delete that one.")
    out.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(partial_of(out), ignore_errors=True)
    return out


@contextlib.contextmanager
def lock(cache: Path, name: str) -> Iterator[None]:
    """Hold the file lock cache/.NAME.lock; logs every 30 s that it waits. The system frees it when its owner dies.

    In a folder that cannot be written to nothing is held: nothing can be made there twice.
    """
    import filelock

    held = filelock.FileLock(cache / f".{name}.lock")
    started = time.monotonic()
    while not held.is_locked:
        waited = time.monotonic() - started
        try:
            held.acquire(timeout=2 if waited < 1 else 30)
        except filelock.Timeout:
            what = "a rank of this run, or another run, works on %s: waiting for it (%.0f s so far)"
            logger.info(what, cache / name, time.monotonic() - started)
        except OSError as error:
            if error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM):
                raise
            break
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
