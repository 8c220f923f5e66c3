"""The health of a run while it trains: slow ranks, a heartbeat, where a rank hangs, and which ranks are gone.

All of it is cheap: a matrix product and a few clock readings per step, three numbers per rank and log line.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import math
import os
import statistics
import threading
import time
from collections import deque
from typing import Any

import torch
import torch.distributed as dist

from torchtitan.components.hooks import Hook
from torchtitan.tools.folders import write_text
from torchtitan.tools.logging import logger

FEWEST_PROBES = 3
STACK_SHARE = 0.8
"""The share of comm.train_timeout_seconds after which stacks are dumped: a step that takes so long is likely to hang,
and there is still time to write them."""


class Stragglers(Hook):
    """Finds the slowest ranks for every line of metrics.jsonl, with a warning beyond metrics.straggler_factor.

    Ranks that share parameters wait for each other in every layer, so all take the same time for a step. Two things
    tell a slow rank from the others: a matrix product of fixed size, timed before every step while no rank waits for
    another (the probe), and how late the rank is at the first collective of a step (components/step_timing.py).
    """

    def __init__(self) -> None:
        self.probes = deque[float](maxlen=10)
        self.first_step = True

    def started(self, trainer: Any) -> None:
        """Make the matrix. The first product also sets up libraries, so it does not count."""
        self.device = trainer.device
        cuda = self.device.type == "cuda"
        n = 4096 if cuda else 256  # 0.2 ms on an H100, about 1 ms on a core
        self.matrix = torch.ones(n, n, device=self.device, dtype=torch.bfloat16 if cuda else torch.float32)
        self.probe()
        self.probes.clear()

    def before_step(self, trainer: Any) -> None:
        """Probe, except before the first step of the run, while loader processes start."""
        if not self.first_step:
            self.probe()
        self.first_step = False

    def probe(self) -> None:
        """Time the product once the device has nothing else to do."""
        self._synchronize()
        start = time.perf_counter()
        self.matrix @ self.matrix
        self._synchronize()
        self.probes.append(time.perf_counter() - start)

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def logging(self, trainer: Any, numbers: dict[str, Any]) -> None:
        """Gather [probe, alone, waited for data] of every rank, in seconds per step; rank 0 compares them.

        The probe is the median of the last ten, even if every step is logged: on a busy machine a single measurement
        says nothing. It is 0 until there are FEWEST_PROBES.
        """
        steps, group = trainer.throughput.steps, trainer.cpu_group
        probe = statistics.median(self.probes) if len(self.probes) >= FEWEST_PROBES else 0.0
        times = torch.zeros(trainer.world_size, 3, dtype=torch.float64)
        mine = [probe, trainer.timing.take() / steps, trainer.throughput.waited / steps]
        times[trainer.rank] = torch.tensor(mine, dtype=torch.float64)
        dist.all_reduce(times, group=group)
        if trainer.rank > 0:
            return
        seconds = (time.perf_counter() - trainer.throughput.start) / steps
        factor = trainer.config.metrics.straggler_factor
        numbers["stragglers"], sentences = stragglers(times.tolist(), seconds, factor, trainer.hosts)
        for sentence in sentences:
            logger.warning(f"straggler, steps up to {trainer.step}: {sentence}")


def stragglers(
    times: list[list[float]], step_seconds: float, factor: float, hosts: list[str]
) -> tuple[dict[str, float], list[str]]:
    """The slowest ranks as numbers for metrics.jsonl, and a sentence about each rank beyond `factor`.

    times: per rank [probe, alone, waited for data], in seconds per step; step_seconds: how long a step took; hosts: the
    host name of each rank.
    """
    if len(times) < 2:
        return {}, []
    columns = list(zip(*times))
    slowest = [max(range(len(column)), key=column.__getitem__) for column in columns]
    probe, alone, _ = (statistics.median_low(column) for column in columns)
    compute, late = slowest[0], slowest[1]
    ratio = columns[0][compute] / probe if probe > 0 else 1.0
    lateness = columns[1][late] - alone
    waits = columns[2][slowest[2]]
    numbers = {
        "compute": ratio,
        "compute_rank": compute,
        "late_seconds": lateness,
        "late_rank": late,
        "data_wait": waits / step_seconds,
        "data_wait_rank": slowest[2],
    }
    sentences = []
    if ratio > factor:
        sentences.append(f"rank {compute} on {hosts[compute]} computes {ratio:.1f} times slower than the median rank")
    if step_seconds > factor * (step_seconds - lateness):
        sentences.append(
            f"rank {late} on {hosts[late]} comes {lateness:.2f} s late to every step of {step_seconds:.2f} s "
            f"(and waits {columns[2][late]:.2f} s of each step for data)"
        )
    return numbers, sentences


class Heartbeat(Hook):
    """Rank 0's sign of life: heartbeat.json, complete at any moment. After a machine has crashed it may be missing."""

    def __init__(self) -> None:
        self.written = -math.inf
        self.failed = False

    def configured(self, trainer: Any) -> None:
        self.path = trainer.dump_folder / "heartbeat.json"
        self.metadata = {
            "steps": trainer.config.training.steps,
            "ranks": len(trainer.hosts),
            "hosts": list(dict.fromkeys(trainer.hosts)),
            "pid": os.getpid(),
            "started": time.time(),
        }

    def after_step(self, trainer: Any, numbers: dict[str, Any]) -> None:
        """While the run trains, the file is replaced at most once per metrics.heartbeat_seconds."""
        if time.monotonic() - self.written >= trainer.config.metrics.heartbeat_seconds:
            self.beat(trainer, "training")

    def pausing(self, trainer: Any, what: str) -> None:
        self.beat(trainer, what)

    def ended(self, trainer: Any) -> None:
        self.beat(trainer, "ended" if trainer.finished else "stopped")

    def beat(self, trainer: Any, state: str) -> None:
        """state: training, saving, evaluating, ended or stopped."""
        if trainer.rank > 0:
            return
        content = {"step": trainer.step, "time": time.time(), "state": state, **self.metadata}
        try:
            write_text(self.path, json.dumps(content, indent=1) + "\n")
            self.failed = False
        except OSError as e:  # this must not end a run
            if not self.failed:
                logger.warning(f"{self.path} cannot be written: {e}")
            self.failed = True
        self.written = time.monotonic()


class StackDumps(Hook):
    """Writes the Python stacks of this rank's threads when a step takes so long that a collective will soon time out.

    It serves where NCCL's flight recorder does not: under gloo, and for a rank that is stuck outside any collective.
    """

    def __init__(self) -> None:
        self.since = math.inf
        self.first_step = True
        self.closing = threading.Event()

    def started(self, trainer: Any) -> None:
        comm = trainer.config.comm
        self.path = trainer.dump_folder / comm.save_traces_folder / f"stack_rank_{trainer.rank}.txt"
        self.seconds = STACK_SHARE * comm.train_timeout_seconds
        threading.Thread(target=self._wait, daemon=True).start()

    def before_step(self, trainer: Any) -> None:
        """Start the clock again, except for the first step of a run, which also compiles."""
        if not self.first_step:
            self.since = time.monotonic()
        self.first_step = False

    def pausing(self, trainer: Any, what: str) -> None:
        self.since = math.inf  # a save may take its time

    def ended(self, trainer: Any) -> None:
        self.since = math.inf

    def closed(self, trainer: Any) -> None:
        self.closing.set()

    def _wait(self) -> None:
        while not self.closing.wait(min(1.0, self.seconds / 10)):
            if time.monotonic() - self.since < self.seconds:
                continue
            self.since = math.inf  # once per step
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with self.path.open("w") as f:
                    f.write(f"{time.ctime()}: a step has taken {self.seconds:g} s; every thread's last call first\n")
                    faulthandler.dump_traceback(f, all_threads=True)
            except OSError as e:
                logger.warning(f"{self.path} cannot be written: {e}")


def who_answers(store: dist.Store, rank: int, hosts: list[str], seconds: float = 5.0) -> str:
    """Which ranks do not answer, in a sentence; for a rank whose collective has failed. Takes at most `seconds` + 1.

    Every rank that is alive fails soon after the first, since all waited for the same rank, and says so in the store.
    If the machine that is gone kept the store, no answer comes at all. hosts: the host name of each rank.
    """
    present: set[int] = set()
    asked = threading.Event()

    def ask() -> None:
        deadline = time.monotonic() + seconds
        with contextlib.suppress(RuntimeError):  # the store may be gone
            store.set(f"who-answers/{rank}", "1")
            while time.monotonic() < deadline and len(present) < len(hosts):
                for other in set(range(len(hosts))) - present:
                    if store.check([f"who-answers/{other}"]):
                        present.add(other)
                asked.set()
                time.sleep(0.1)

    thread = threading.Thread(target=ask, daemon=True)  # a request to a store that is gone may never return
    thread.start()
    thread.join(seconds + 1)
    if not asked.is_set():
        return f"no answer from rank 0's machine, {hosts[0]}, or from the machine that keeps the ranks' store"
    missing = [other for other in range(len(hosts)) if other not in present]
    if not missing:
        return "all ranks answer: one of them was slower than the others could wait"
    named = ", ".join(f"rank {other} on {hosts[other]}" for other in missing[:8])
    return f"no answer from {named}" + (f" and {len(missing) - 8} more" if len(missing) > 8 else "")
