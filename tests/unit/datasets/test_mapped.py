"""Many shards: few maps, no open files, in forked processes too; and a limit of the system is not called damage."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from torchtitan.datasets import mapped
from torchtitan.datasets.corpus import Corpus, _shards_of, open_corpus
from torchtitan.datasets.mapped import ArrowFile, FileState, MappedNumbers
from torchtitan.tools.errors import UserError

SHARDS = 60


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """SHARDS shards of two documents: token k of document d of shard s is 100 s + 10 d + k."""
    import datasets

    documents = [[100 * s + 10 * d + k for k in range(3 + d)] for s in range(SHARDS) for d in range(2)]
    datasets.disable_progress_bars()
    datasets.Dataset.from_dict({"input_ids": documents}).save_to_disk(str(tmp_path / "shards"), num_shards=SHARDS)
    return tmp_path / "shards"


def check(corpus: Corpus) -> None:
    for index in np.random.default_rng(0).permutation(len(corpus)).tolist():
        s, d = divmod(index, 2)
        assert corpus.document(index).tolist() == [100 * s + 10 * d + k for k in range(3 + d)]


def maps_of(folder: Path) -> int:
    return Path("/proc/self/maps").read_text().count(str(folder))


def in_fork(function: Callable[[], Any]) -> str:
    """What the function returned, or its UserError, in a forked process."""
    read, write = os.pipe()
    if (child := os.fork()) == 0:
        try:
            answer = f"{function()}"
        except UserError as error:
            answer = f"UserError: {error}"
        except BaseException as error:  # noqa: BLE001
            answer = f"{type(error).__name__}: {error}"
        os.write(write, answer.encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        answer = pipe.read()
    os.waitpid(child, 0)
    return answer


def test_a_bounded_number_of_files_is_mapped(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mapped, "_mapped", lru_cache(7)(mapped._mapped.__wrapped__))
    corpus = open_corpus(folder)
    assert maps_of(folder) <= 8 and len(corpus) == 2 * SHARDS  # the fingerprint has looked at all
    check(corpus)
    assert maps_of(folder) <= 8
    assert in_fork(lambda: (check(corpus), maps_of(folder) <= 8)[1]) == "True"
    held = [corpus.document(2 * s) for s in range(SHARDS)]  # who holds a view holds its map
    assert [d[0] for d in held] == [100 * s for s in range(SHARDS)] and maps_of(folder) >= SHARDS
    del held
    assert maps_of(folder) <= 8


def test_no_file_stays_open(folder: Path) -> None:
    def few_files() -> bool:
        most = len(os.listdir("/proc/self/fd")) + 8
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        check(open_corpus(folder))
        return True

    assert in_fork(few_files) == "True"


def test_a_limit_of_the_system_is_not_called_damage(folder: Path, tmp_path: Path) -> None:
    corpus = open_corpus(folder)

    def no_more_files(read: Callable[[], Any]) -> Callable[[], Any]:
        def limited() -> Any:
            mapped._mapped.cache_clear()
            most = max(map(int, os.listdir("/proc/self/fd")))
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
            held = []
            try:
                while True:
                    held.append(os.dup(0))
            except OSError:
                return read()

        return limited

    def no_more_memory() -> Any:
        size = 1 << 30
        with open(tmp_path / "large.bin", "wb") as file:
            file.truncate(size)
        numbers = MappedNumbers(FileState.of(tmp_path / "large.bin"), np.dtype(np.int32), 0, size // 4)
        now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + size // 4, now + size // 4))
        return numbers[:3]

    shard = sorted(folder.glob("*.arrow"))[0]
    for function in (no_more_files(lambda: _shards_of(shard)), no_more_files(lambda: corpus.document(3))):
        answer = in_fork(function)
        assert answer.startswith(f"UserError: {folder}/data-000") and "ulimit -n" in answer
        assert "elete the" not in answer and "is not damaged" in answer
    answer = in_fork(no_more_memory)
    assert answer.startswith(f"UserError: {tmp_path}/large.bin cannot be mapped")
    assert "vm.max_map_count" in answer and "ulimit -v" in answer and "is not damaged" in answer


def test_a_refused_map_is_tried_again_without_the_others(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = open_corpus(folder)
    map_file, refused = mapped.map_file, []

    def refuse(path: Any) -> Any:
        if maps_of(folder) > 5:
            refused.append(path)
            raise OSError("Memory mapping file failed: Cannot allocate memory")  # pyarrow's, without errno
        return map_file(path)

    mapped._mapped.cache_clear()
    monkeypatch.setattr(mapped, "map_file", refuse)
    check(corpus)
    assert refused


def test_a_file_that_is_changed_or_gone(folder: Path, tmp_path: Path) -> None:
    corpus = open_corpus(folder)
    mapped._mapped.cache_clear()
    shards = sorted(folder.glob("*.arrow"))
    os.truncate(shards[0], shards[0].stat().st_size - 8)
    shards[1].unlink()
    with pytest.raises(UserError, match=r"data-00000.* bytes, and had .* changed"):
        corpus.document(0)
    with pytest.raises(UserError, match=r"data-00001.*cannot be read.* Was it deleted"):
        corpus.document(2)
    assert corpus.document(4).tolist() == [200, 201, 202]
    path = tmp_path / "ids.bin"
    for first in (1, 5):  # written anew in this process: not the map of the old file
        np.arange(first, first + 4, dtype=np.uint16).tofile(path)
        os.utime(path, ns=(first, first))
        assert MappedNumbers(FileState.of(path), np.dtype("<u2"), 2, 3)[:].tolist() == [first + 1, first + 2, first + 3]


@pytest.mark.parametrize("new", [pa.ipc.new_stream, pa.ipc.new_file])
@pytest.mark.parametrize("compression", [None, "zstd", "lz4"])
def test_where_the_numbers_of_an_arrow_file_lie(tmp_path: Path, new: Any, compression: str | None) -> None:
    table = pa.table({"a": pa.array([[1, 2], [], [3]], pa.list_(pa.int64())), "b": pa.array([7, 8, 9], pa.uint16())})
    with new(str(tmp_path / "x.arrow"), table.schema, options=pa.ipc.IpcWriteOptions(compression=compression)) as out:
        out.write_table(table)
        out.write_table(table.slice(1))
    arrow = ArrowFile(tmp_path / "x.arrow")
    found = [(arrow.numbers(b.column("a").values), arrow.numbers(b.column("b"))) for b in arrow.batches]
    del arrow
    expected = [([1, 2, 3], [7, 8, 9]), ([3], [8, 9])]
    if compression:
        assert all(n is None for pair in found for n in pair)
    else:
        assert [tuple(n[:].tolist() for n in pair if n is not None) for pair in found] == expected
        assert found[1][1][1:].tolist() == [9] and found[1][1].itemsize == 2 and len(found[1][1][5:2]) == 0
