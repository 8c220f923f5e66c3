"""Killed, failing, concurrent and sharded runs: whatever happens, the folder is an unbroken run's, to the byte."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import multiprocessing
import os
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from torchtitan.config.data_schema import Data, Source
from torchtitan.datasets.tokenizer import Tokenizer
from torchtitan.extensions.ingest import source_files, tokenize, units, workers
from torchtitan.extensions.ingest.tokenize import tokenize_shard, tokenize_source
from torchtitan.tools.errors import UserError

FORK = multiprocessing.get_context("fork")
TEXTS = ["first", "second " * 40, " \n", "fourth\n" * 9, "fifth"]


@pytest.fixture(autouse=True)
def one_document_a_unit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(units, "UNIT_BYTES", 1)


@pytest.fixture(autouse=True)
def nothing_waits_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a process has written stays when it is killed; a sync matters to a loss of power, which is not tried here.
    It would be most of the time: some 2,000 of them."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture(autouse=True)
def logged(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """The log is looked at, whatever a test before has done to it."""
    monkeypatch.setattr(logging.getLogger("torchtitan"), "propagate", True)
    caplog.set_level(logging.INFO, "torchtitan")


@pytest.fixture
def source(tmp_path: Path) -> Source:
    """Five files, so five units; one of them is blank and is no shard."""
    (tmp_path / "text").mkdir()
    for index, text in enumerate(TEXTS):
        (tmp_path / "text" / f"{index}.txt").write_text(text)
    return Source(name="source", path=str(tmp_path / "text"))


class Noting:
    """A tokenizer that notes every document it encodes in a file, whatever the process."""

    def __init__(self, base: Tokenizer, notes: Path, before: Callable[[str], Any] = lambda text: None) -> None:
        self.notes = notes
        notes.touch()

        def encode_batch(texts: list[str]) -> list[list[int]]:
            before(texts[0])
            with notes.open("a") as file:
                file.write(texts[0][0])
            return base.encode_batch(texts)

        self.tokenizer = replace(base, _encode_batch=encode_batch)

    def take(self) -> str:
        """Initials of the documents encoded since the last call, sorted."""
        noted = "".join(sorted(self.notes.read_text()))
        self.notes.write_text("")
        return noted


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def done_units(data: Data) -> list[int]:
    found = Path(data.cache_folder).glob(".unfinished-*/unit-*.json")
    return sorted(int(path.stem.split("-")[1]) for path in found)


def only_the_folder_is_left(data: Data, folder: Path) -> bool:
    return [path for path in Path(data.cache_folder).iterdir() if path.is_dir()] == [folder]


@pytest.fixture
def unbroken(source: Source, tokenizer: Tokenizer, data: Data, tmp_path: Path) -> dict[str, bytes]:
    """Files of the folder that an undisturbed run makes."""
    return contents(tokenize_source(source, tokenizer, replace(data, cache_folder=str(tmp_path / "unbroken")), 1))


def in_a_process(work: Callable[[], Any]) -> int:
    job = FORK.Process(target=work)
    job.start()
    job.join(60)
    assert job.exitcode is not None
    return job.exitcode


def killed_at(event: int, folder: str) -> None:
    """SIGKILL this process just before its `event`-th opening, renaming, making or deleting of a file below folder."""
    seen = 0

    def hook(name: str, args: tuple[Any, ...]) -> None:
        nonlocal seen
        if name not in ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.copyfile"):
            return
        if folder in str(args[0]) and not str(args[0]).endswith(".lock"):
            seen += 1
            if seen == event:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def test_a_kill_at_any_moment(
    source: Source, tokenizer: Tokenizer, data: Data, unbroken: dict[str, bytes], tmp_path: Path
) -> None:
    """Each event at which the file system changes is tried: the run ends there, another one does the rest."""
    noting = Noting(tokenizer, tmp_path / "notes")
    seen = set()
    for event in range(1, 1000):
        there = replace(data, cache_folder=str(tmp_path / f"cache{event}"))

        def run(event: int = event, there: Data = there) -> None:
            killed_at(event, there.cache_folder)
            tokenize_source(source, tokenizer, there, 1)

        code = in_a_process(run)
        done = done_units(there)
        seen.add(len(done))
        finishing = list(Path(there.cache_folder).glob(".unfinished-*/corpus.json"))
        finished = list(Path(there.cache_folder).glob("source-*"))
        folder = tokenize_source(source, noting.tokenizer, there, 1)
        assert contents(folder) == unbroken, f"killed at event {event}"
        assert only_the_folder_is_left(there, folder), f"killed at event {event}"
        left = "" if finishing or finished else "".join(TEXTS[i][0] for i in (0, 1, 3, 4) if i not in done)
        assert noting.take() == "".join(sorted(left)), f"killed at event {event}, {done} were done"
        shutil.rmtree(there.cache_folder)
        if code == 0:
            break
        assert code == -signal.SIGKILL
    assert event > 50 and seen == {0, 1, 2, 3, 4, 5}


def test_a_kill_of_a_run_with_worker_processes(
    source: Source, tokenizer: Tokenizer, data: Data, unbroken: dict[str, bytes], tmp_path: Path
) -> None:
    def stuck_in_the_last(text: str) -> None:
        if text.startswith("fifth"):
            (tmp_path / f"worker-{os.getpid()}").touch()
            time.sleep(60)

    stuck = Noting(tokenizer, tmp_path / "notes", stuck_in_the_last)
    job = FORK.Process(target=tokenize_source, args=(source, stuck.tokenizer, data, 2))
    job.start()
    while len(done_units(data)) < 4 or not list(tmp_path.glob("worker-*")):
        assert job.is_alive()
        time.sleep(0.02)
    os.kill(job.pid, signal.SIGKILL)
    job.join()
    start = time.monotonic()
    folder = tokenize_source(source, tokenizer, data, 2)
    assert contents(folder) == unbroken
    assert time.monotonic() - start < 20, "the worker must not hold the lock that it inherited"
    worker = int(next(tmp_path.glob("worker-*")).name.removeprefix("worker-"))
    while psutil.pid_exists(worker) and psutil.Process(worker).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() - start < 20, "the worker outlives its parent"
        time.sleep(0.05)


def test_a_killed_worker_ends_the_run_and_what_is_done_is_kept(
    source: Source, tokenizer: Tokenizer, data: Data, unbroken: dict[str, bytes], tmp_path: Path
) -> None:
    parent = os.getpid()

    def dies(text: str) -> None:
        if text.startswith("fifth"):
            assert os.getpid() != parent
            while len(done_units(data)) < 4:
                time.sleep(0.02)
            os.kill(os.getpid(), signal.SIGKILL)

    dying = Noting(tokenizer, tmp_path / "notes", dies)
    with pytest.raises(UserError, match="terminated abruptly.*--num-proc"):
        tokenize_source(source, dying.tokenizer, data, 2)
    noting = Noting(tokenizer, tmp_path / "others")
    assert contents(tokenize_source(source, noting.tokenizer, data, 2)) == unbroken
    assert noting.take() == "f"


def test_the_log_says_what_was_found_done(
    source: Source, tokenizer: Tokenizer, data: Data, caplog: pytest.LogCaptureFixture
) -> None:
    assert tokenize_shard(source, tokenizer, data, 1, 2, 1) is None
    assert "units 2 of 5 done; shards 0 are still to come" in caplog.text
    tokenize_source(source, tokenizer, data, 1)
    assert "2 units are done already" in caplog.text


# ---- a disk that is full ---------------------------------------------------------------------------------------------


def test_a_disk_that_fills_up_at_any_moment(
    source: Source,
    tokenizer: Tokenizer,
    data: Data,
    unbroken: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The disk says so at the sync of a file; every sync of a run is tried."""
    noting = Noting(tokenizer, tmp_path / "notes")
    for fails in range(1, 1000):
        there = replace(data, cache_folder=str(tmp_path / f"cache{fails}"))
        calls = 0

        def full(descriptor: int, fails: int = fails) -> None:
            nonlocal calls
            calls += 1
            if calls == fails:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            try:
                folder = tokenize_source(source, tokenizer, there, 1)
                break
            except UserError as error:
                assert "data.cache_folder" in str(error) and "No space left" in str(error) and "GiB" in str(error)
        assert not list(Path(there.cache_folder).glob("source-*"))
        assert not list(Path(there.cache_folder).glob("*/*.tmp"))
        done = done_units(there)
        finishing = list(Path(there.cache_folder).glob(".unfinished-*/corpus.json"))
        assert contents(tokenize_source(source, noting.tokenizer, there, 1)) == unbroken
        assert len(noting.take()) == (0 if finishing else len({0, 1, 3, 4} - set(done)))
    assert fails > 20
    assert contents(folder) == unbroken


def test_a_file_that_cannot_grow(
    source: Source, tokenizer: Tokenizer, data: Data, unbroken: dict[str, bytes], tmp_path: Path
) -> None:
    """The system itself refuses to write on, in the middle of a file."""
    (tmp_path / "text" / "2.txt").write_text("the third is large " * 5000)
    unbroken = contents(tokenize_source(source, tokenizer, replace(data, cache_folder=str(tmp_path / "other")), 1))

    def run() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
        try:
            tokenize_source(source, tokenizer, data, 1)
        except UserError as error:
            os._exit(7 if "File too large" in str(error) else 1)

    assert in_a_process(run) == 7
    assert done_units(data) == [0, 1]
    noting = Noting(tokenizer, tmp_path / "notes")
    assert contents(tokenize_source(source, noting.tokenizer, data, 1)) == unbroken
    assert noting.take() == "fft"


@pytest.mark.parametrize("how", ["cut", "gone", "half a json", "no json"])
def test_a_unit_that_the_disk_lost_is_done_again(
    source: Source, tokenizer: Tokenizer, data: Data, unbroken: dict[str, bytes], tmp_path: Path, how: str
) -> None:
    """After a loss of power a file system may forget what was in a file that it has renamed."""
    tokenize_shard(source, tokenizer, data, 1, 2, 1)
    (arrow,) = Path(data.cache_folder).glob(".unfinished-*/unit-00001-*.arrow")
    if how == "cut":
        os.truncate(arrow, 100)
    elif how == "gone":
        arrow.unlink()
    elif how == "half a json":
        arrow.with_suffix(".json").write_text('{"docum')
    else:
        arrow.with_suffix(".json").unlink()
    noting = Noting(tokenizer, tmp_path / "notes")
    assert contents(tokenize_source(source, noting.tokenizer, data, 1)) == unbroken
    assert noting.take() == "ffs"  # unit 3 was kept


# ---- several processes -----------------------------------------------------------------------------------------------


def test_shards_side_by_side(
    source: Source, tokenizer: Tokenizer, data: Data, unbroken: dict[str, bytes], tmp_path: Path
) -> None:
    def pause(text: str) -> None:
        time.sleep(0.1)

    noting = Noting(tokenizer, tmp_path / "notes", pause)
    jobs = [FORK.Process(target=tokenize_shard, args=(source, noting.tokenizer, data, i, 3, 1)) for i in range(3)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join(60)
    assert [job.exitcode for job in jobs] == [0, 0, 0]
    (folder,) = Path(data.cache_folder).glob("source-*")
    assert contents(folder) == unbroken
    assert only_the_folder_is_left(data, folder)
    assert noting.take() == "fffs"


@pytest.mark.parametrize("order", [[2, 0, 1], [1, 1, 0, 2], [0, 1, 2, 0]])
def test_shards_in_any_order_and_more_than_once(
    source: Source, tokenizer: Tokenizer, data: Data, unbroken: dict[str, bytes], order: list[int]
) -> None:
    for number, index in enumerate(order):
        folder = tokenize_shard(source, tokenizer, data, index, 3, 1)
        assert (folder is None) == (set(order[: number + 1]) != {0, 1, 2})
    assert folder is not None and contents(folder) == unbroken


def test_more_shards_than_units(source: Source, tokenizer: Tokenizer, data: Data, unbroken: dict[str, bytes]) -> None:
    folders = [tokenize_shard(source, tokenizer, data, index, 7, 1) for index in (6, 5, 4, 3, 2, 1, 0)]
    assert folders[:-1] == [None] * 6
    assert folders[-1] is not None and contents(folders[-1]) == unbroken


@pytest.mark.parametrize("index, count", [(-1, 2), (2, 2), (0, 0)])
def test_a_shard_that_there_is_not(source: Source, tokenizer: Tokenizer, data: Data, index: int, count: int) -> None:
    with pytest.raises(UserError, match=f"--shard-index {index} with --num-shards {count}"):
        tokenize_shard(source, tokenizer, data, index, count, 1)


@pytest.mark.parametrize("locks", [True, False])
def test_several_processes_with_the_same_work(
    source: Source,
    tokenizer: Tokenizer,
    data: Data,
    unbroken: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    locks: bool,
) -> None:
    """One works and the others wait; where the locks of shards do not work, several do the same without harm."""
    if not locks:
        monkeypatch.setattr(tokenize, "lock", lambda cache, name: contextlib.nullcontext())
    noting = Noting(tokenizer, tmp_path / "notes", lambda text: time.sleep(0.05))
    jobs = [FORK.Process(target=tokenize_source, args=(source, noting.tokenizer, data, 1)) for _ in range(3)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join(60)
    assert [job.exitcode for job in jobs] == [0, 0, 0]
    (folder,) = Path(data.cache_folder).glob("source-*")
    assert contents(folder) == unbroken
    if locks:
        assert noting.take() == "fffs"
        assert only_the_folder_is_left(data, folder)


def test_others_finish_while_a_unit_is_being_made(
    source: Source, tokenizer: Tokenizer, data: Data, unbroken: dict[str, bytes], tmp_path: Path
) -> None:
    def meanwhile(text: str) -> None:
        if text.startswith("second"):
            for index in range(2):
                tokenize_shard(source, tokenizer, data, index, 2, 1)

    slow = Noting(tokenizer, tmp_path / "notes", meanwhile)
    folder = tokenize_source(source, slow.tokenizer, data, 1)
    assert contents(folder) == unbroken
    assert only_the_folder_is_left(data, folder)


def test_what_others_did_meanwhile_is_not_done_again(
    source: Source, tokenizer: Tokenizer, data: Data, unbroken: dict[str, bytes], tmp_path: Path
) -> None:
    def meanwhile(text: str) -> None:
        if text.startswith("first"):
            tokenize_shard(source, tokenizer, data, 1, 2, 1)

    slow = Noting(tokenizer, tmp_path / "notes", meanwhile)
    assert contents(tokenize_source(source, slow.tokenizer, data, 1)) == unbroken
    assert slow.take() == "ff"  # the first and the fifth


def test_another_cut_is_another_unfinished_folder(
    source: Source,
    tokenizer: Tokenizer,
    data: Data,
    unbroken: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Units of two partitions must not be mixed: documents would be lost or doubled."""
    with monkeypatch.context() as patch:
        patch.setattr(units, "UNIT_BYTES", 100)
        tokenize_shard(source, tokenizer, data, 1, 2, 1)
    assert done_units(data) != []
    (left,) = Path(data.cache_folder).glob(".unfinished-*")
    assert tokenize_shard(source, tokenizer, data, 0, 2, 1) is None
    assert f"{left} was left by a run" in caplog.text
    assert contents(tokenize_source(source, tokenizer, data, 1)) == unbroken


@pytest.mark.parametrize("shard, kept", [((1, 2), [1]), ((0, 1), [0, 1, 2])])
def test_text_that_changes_meanwhile_is_in_no_unit(
    source: Source,
    tokenizer: Tokenizer,
    data: Data,
    unbroken: dict[str, bytes],
    tmp_path: Path,
    shard: tuple[int, int],
    kept: list[int],
) -> None:
    """Finished units are kept, since only the file's time may have changed; the changed file's unit is not finished."""
    fourth = tmp_path / "text" / "3.txt"
    was = fourth.stat()

    def change(text: str) -> None:
        if text.startswith("second"):
            fourth.write_text("FOURTH\n" * 9)

    changing = Noting(tokenizer, tmp_path / "notes", change)
    with pytest.raises(UserError, match="3.txt was changed while"):
        tokenize_shard(source, changing.tokenizer, data, *shard, 1)
    assert done_units(data) == kept
    fourth.write_text(TEXTS[3])
    os.utime(fourth, ns=(was.st_atime_ns, was.st_mtime_ns))
    assert contents(tokenize_source(source, tokenizer, data, 1)) == unbroken


# ---- what is said meanwhile ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_proc", [1, 2])
def test_progress(
    source: Source,
    tokenizer: Tokenizer,
    data: Data,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    num_proc: int,
) -> None:
    """A line at the beginning, then at most one every LOG_SECONDS."""
    rare = replace(data, cache_folder=str(tmp_path / "rare"))
    tokenize_source(source, tokenizer, rare, num_proc)
    assert sum("tokens/s" in record.getMessage() for record in caplog.records) == 1
    caplog.clear()
    monkeypatch.setattr(workers, "LOG_SECONDS", 0.0)
    tokenize_source(source, tokenizer, data, num_proc)
    lines = [record.getMessage() for record in caplog.records if "tokens/s" in record.getMessage()]
    assert [line.split(",")[0] for line in lines] == [f"tokenizing source: {n} of 5 units" for n in range(6)]
    assert all("minutes left" in line for line in lines[1:])


def test_waiting_is_said(data: Data, caplog: pytest.LogCaptureFixture) -> None:
    cache = Path(data.cache_folder)
    cache.mkdir()

    def hold() -> None:
        with units.lock(cache, "x"):
            (cache / "held").touch()
            time.sleep(3)

    job = FORK.Process(target=hold)
    job.start()
    while not (cache / "held").exists():
        time.sleep(0.01)
    with units.lock(cache, "x"):
        pass
    job.join()
    assert "a rank of this run, or another run, works on" in caplog.text


def test_hashes_that_were_cut_short_are_made_again(source: Source, tokenizer: Tokenizer, data: Data) -> None:
    folder = tokenize_source(source, tokenizer, data, 1)
    (known,) = Path(data.cache_folder).glob(".hashes-*.json")
    known.write_text(known.read_text()[:50])
    assert tokenize_source(source, tokenizer, data, 1) == folder
    assert len(json.loads(known.read_text())) == len(source_files.files_below(Path(source.path)))
