"""Numbers in files that are mapped when they are read, of which a process holds a bounded number.

Linux gives a process 65,530 maps, and 32 sources of 2,048 shards have more files than that. So a corpus keeps where its
numbers lie, not the maps; the files that were read last stay mapped. A map keeps no file open, and a process that is
forked has those of its parent. An Arrow file is opened, asked where its columns lie, and closed.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from torchtitan.tools.errors import UserError

COMMON_LIMIT = 65_530  # of Linux, if it does not say


def most_maps() -> int:
    """How many files a process keeps mapped: half of what Linux gives it, for the libraries need some too."""
    with contextlib.suppress(OSError, ValueError):
        return max(1, int(Path("/proc/sys/vm/max_map_count").read_text()) // 2)
    return COMMON_LIMIT // 2


class FileState(NamedTuple):
    """A file as it was when it was opened. size: bytes. mtime_ns: time of its last change."""

    path: str
    size: int
    mtime_ns: int

    @classmethod
    def of(cls, path: str | os.PathLike[str]) -> FileState:
        """The present state of a file; OSError if it is missing."""
        stat = os.stat(path)
        return cls(str(path), stat.st_size, stat.st_mtime_ns)


@dataclass(frozen=True, eq=False, slots=True)
class MappedNumbers:
    """dtype[count] in a file, from byte `begin` on. Slices are read-only views into its map."""

    file: FileState
    dtype: np.dtype[Any]
    begin: int
    count: int

    def __len__(self) -> int:
        """Numbers in all."""
        return self.count

    @property
    def itemsize(self) -> int:
        """Bytes of a number."""
        return self.dtype.itemsize

    def __getitem__(self, numbers: slice) -> np.ndarray:
        """The numbers [start, stop); UserError if the file cannot be mapped or has another size by now."""
        start, stop, _ = numbers.indices(self.count)
        width = self.dtype.itemsize
        return _mapped(self.file)[self.begin + start * width : self.begin + max(start, stop) * width].view(self.dtype)


@lru_cache(maxsize=most_maps())
def _mapped(file: FileState) -> np.ndarray:
    """uint8[size], a map of the file; of no process alone, so that forked ones inherit it."""
    for again in (True, False):
        try:
            if (size := os.stat(file.path).st_size) != file.size:
                raise UserError(
                    f"{file.path} has {size} bytes, and had {file.size} when this run opened it: it was changed. Start "
                    "again when it is complete."
                )
            return np.frombuffer(map_file(file.path), np.uint8)
        except OSError as error:
            if again and is_limit(error):  # let go of the files that were read before
                _mapped.cache_clear()
                continue
            raise cannot_read(file.path, error) from error
    raise AssertionError  # the second round returns or raises


def map_file(path: str | os.PathLike[str]) -> Any:
    """A pyarrow buffer over a whole file, which need not stay open. OSError if it cannot be mapped."""
    import pyarrow as pa

    with pa.memory_map(str(path)) as file:
        return file.read_buffer()


def is_limit(error: BaseException) -> bool:
    """Whether the system refused another map, open file or byte of memory: the file itself may be whole."""
    limits = (errno.ENOMEM, errno.EMFILE, errno.ENFILE)
    # pyarrow keeps the number of some errors to itself
    return isinstance(error, MemoryError) or getattr(error, "errno", None) in limits or "Cannot allocate" in str(error)


def cannot_read(path: str | os.PathLike[str], error: BaseException) -> UserError:
    """What to say of a file that cannot be opened or mapped, though nothing in it was found wrong."""
    if not is_limit(error):
        return UserError(f"{path} cannot be read: {error}. Was it deleted or its disk unmounted after the run began?")
    if getattr(error, "errno", None) in (errno.EMFILE, errno.ENFILE):
        limit = "more open files than it may have: raise `ulimit -n`"
    else:
        limit = (
            "more memory maps or address space than it may have: raise the sysctl vm.max_map_count "
            f"(it is {2 * most_maps()}) or `ulimit -v`"
        )
    return UserError(f"{path} cannot be mapped ({error}): the process asked for {limit}. The file is not damaged.")


class ArrowFile:
    """An Arrow file, stream or file format, while it is open. batches: its record batches, views into the map."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Open it; pyarrow's errors and OSError if it is damaged or cannot be mapped."""
        import pyarrow as pa

        self.state = FileState.of(path)
        self._map = map_file(path)
        source = pa.BufferReader(self._map)
        if self._map[:6].to_pybytes() == b"ARROW1":
            reader = pa.ipc.open_file(source)
            self.schema = reader.schema
            self._batches: Any = (reader.get_batch(i) for i in range(reader.num_record_batches))
        else:
            self._batches = pa.ipc.open_stream(source)
            self.schema = self._batches.schema

    @property
    def batches(self) -> Iterator[Any]:
        """Its record batches, once."""
        return iter(self._batches)

    def numbers(self, values: Any) -> MappedNumbers | None:
        """Where an array of integers lies in the file; None if it lies elsewhere, because the file is compressed."""
        data = values.buffers()[1]
        dtype = np.dtype(values.type.to_pandas_dtype())
        begin = (data.address - self._map.address if data is not None else 0) + values.offset * dtype.itemsize
        if len(values) and not 0 <= begin <= self._map.size - len(values) * dtype.itemsize:
            return None
        return MappedNumbers(self.state, dtype, begin if len(values) else 0, len(values))
