"""The table of rows on disk: written as it is made, and memory-mapped."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import BinaryIO

import numpy as np

from torchtitan.datasets.row_table import RowTable
from torchtitan.tools.errors import UserError
from torchtitan.tools.folders import sync, written

logger = logging.getLogger(__name__)

DTYPES = {name: np.dtype("int32") for name in ("document", "epoch", "start", "length")} | {"source": np.dtype("int16")}


def join(chunks: Iterable[RowTable]) -> RowTable:
    """The table of these runs of rows, in memory."""
    columns: dict[str, list[np.ndarray]] = {c.name: [] for c in fields(RowTable)}
    for chunk in chunks:
        for name, column in columns.items():
            column.append(getattr(chunk, name))
    offsets = np.cumsum(np.concatenate([[0], *map(np.diff, columns.pop("offsets"))]))
    tokens = np.sum(columns.pop("tokens"), axis=0)
    return RowTable(offsets=offsets, tokens=tokens, **{name: np.concatenate(c) for name, c in columns.items()})


def write_table(chunks: Iterable[RowTable], folder: Path) -> None:
    """Write the columns, a file each, as they are made, so that the folder is complete or absent; UserError if that
    fails."""
    try:
        with written(folder, durable=True) as aside:
            shutil.rmtree(aside, ignore_errors=True)  # of a run that was killed
            aside.mkdir()
            columns = {c.name: _Column(aside / f"{c.name}.npy", c.name) for c in fields(RowTable)}
            try:
                _append(columns, chunks)
            finally:
                for column in columns.values():
                    column.close()
    except OSError as error:
        raise UserError(
            f"data.cache_folder: the data plan cannot be written to {folder}: {error}. Make room there, or name "
            "another data.cache_folder."
        ) from error


def _append(columns: dict[str, _Column], chunks: Iterable[RowTable]) -> None:
    rows, parts, said = 0, 0, time.monotonic()
    tokens: np.ndarray | None = None
    columns["offsets"].append(np.zeros(1, np.int64))
    for chunk in chunks:
        columns["offsets"].append(parts + chunk.offsets[1:])
        for name, column in columns.items():
            if name not in ("offsets", "tokens"):
                column.append(getattr(chunk, name))
        tokens = chunk.tokens if tokens is None else tokens + chunk.tokens
        rows, parts = rows + len(chunk), parts + len(chunk.length)
        if time.monotonic() - said > 10:
            logger.info("planned %d rows so far", rows)
            said = time.monotonic()
    if tokens is not None:
        columns["tokens"].append(tokens)


class _Column:
    """A .npy file that grows."""

    def __init__(self, path: Path, name: str) -> None:
        self.path, self.dtype = path, DTYPES.get(name, np.dtype(np.int64))
        self.shape: tuple[int, ...] = (0, 7) if name == "unlabelled" else (0,)
        self.file: BinaryIO = open(path, "wb")  # noqa: SIM115
        self.begin = self._header()

    def _header(self) -> int:
        description = {"descr": np.lib.format.dtype_to_descr(self.dtype), "fortran_order": False, "shape": self.shape}
        np.lib.format.write_array_header_1_0(self.file, description)  # leaves room for a longer shape
        return self.file.tell()

    def append(self, values: np.ndarray) -> None:
        self.shape = (self.shape[0] + len(values), *values.shape[1:])
        self.file.write(np.ascontiguousarray(values, self.dtype).data)

    def close(self) -> None:
        self.file.seek(0)
        assert self._header() == self.begin
        self.file.close()
        sync(self.path)


def load_table(folder: Path) -> RowTable:
    """The columns, memory-mapped."""
    try:
        columns = {c.name: np.load(folder / f"{c.name}.npy", mmap_mode="r") for c in fields(RowTable)}
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"The data plan in {folder} is damaged ({error}): delete the folder.") from error
    return RowTable(**{name: np.asarray(column) for name, column in columns.items()})
