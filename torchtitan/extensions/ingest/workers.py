"""Worker processes that make units, and the report of their progress."""

from __future__ import annotations

import logging
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool

from torchtitan.extensions.ingest.units import Counts

logger = logging.getLogger(__name__)

LOG_SECONDS = 10.0
"""Between two lines in the log about the progress."""


class WorkerKilledError(Exception):
    """A worker process was killed."""


def cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


_work: Callable[[int], Counts] | None = None  # what run_units was given; workers inherit it by fork


def run_units(work: Callable[[int], Counts], indices: Sequence[int], num_proc: int) -> Iterator[tuple[int, Counts]]:
    """(index, work(index)) of every index as it is done, by num_proc processes (1: this process).

    An error of `work` is raised here once the units that were begun have ended; WorkerKilledError if a process was
    killed.
    """
    global _work
    if num_proc <= 1:
        for index in indices:
            yield index, work(index)
        return
    _work = work
    fork = multiprocessing.get_context("fork")
    # An executor notices a worker that was killed; a Pool would wait for ever.
    with ProcessPoolExecutor(num_proc, mp_context=fork, initializer=_start_worker, initargs=(os.getpid(),)) as pool:
        futures = {pool.submit(_run_one, index): index for index in indices}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BrokenProcessPool as error:
            raise WorkerKilledError(str(error)) from error
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
        finally:
            _work = None


def _start_worker(parent: int) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    """End a worker whose parent was killed: it would wait for work for ever, perhaps holding the parent's lock."""
    while os.getppid() == parent:
        time.sleep(0.3)
    os._exit(1)


def _run_one(index: int) -> Counts:
    assert _work is not None
    return _work(index)


class Progress:
    """Logs a line about the work at its beginning, and then with a unit that is done every LOG_SECONDS.

    units, size: of all the work; size in bytes of the source. done, size_done: what of it was done before. counted:
    what the units are rated by.
    """

    def __init__(self, title: str, units: int, size: int, done: int, size_done: int, counted: str = "tokens") -> None:
        self.counted = counted
        self.title, self.units, self.size = title, units, size
        self.done, self.size_done, self._size_before = done, size_done, size_done
        self.count = 0
        self._start = time.monotonic()
        self._log()

    def advance(self, size: int, count: int) -> None:
        """One more unit is done."""
        self.done += 1
        self.size_done += size
        self.count += count
        if time.monotonic() - self._logged >= LOG_SECONDS:
            self._log()

    def _log(self) -> None:
        self._logged = time.monotonic()
        seconds = max(self._logged - self._start, 1e-9)
        text = f"{self.title}: {self.done} of {self.units} units, {self.count / seconds:,.0f} {self.counted}/s"
        speed = (self.size_done - self._size_before) / seconds
        left = f", about {(self.size - self.size_done) / speed / 60:.1f} minutes left" if speed > 0 else ""
        logger.info(text + left)
