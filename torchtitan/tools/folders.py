"""Folders that a run writes to, tried before it needs them, and how what is written reaches the disk.

A full or foreign disk should not end a run after an hour.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from pathlib import Path

from torchtitan.tools.errors import UserError


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
