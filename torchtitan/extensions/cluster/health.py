"""What watches a run while it trains: bad losses, slow ranks, a sign of life, and who is gone when a wait times out.

All of it is cheap: a matrix product and a few clock readings a step, three numbers a rank every log line.
"""

from __future__ import annotations

import faulthandler
import json
import math
import os
import statistics
import threading
import time
from collections import deque
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from torchtitan.config.schema import Training
from torchtitan.tools.logging import logger


class BadLossError(Exception):
    """A step whose loss or gradient norm is not finite, or whose loss is a spike, ends the run; nothing of it stays."""


class LossWatch:
    """Judges every step's loss alike on all ranks: what it is given must be the same there to the bit."""

    def __init__(self, config: Training):
        self.config = config
        self.losses: list[float] = []
        self.skipped: list[dict[str, Any]] = []

    def state(self) -> dict[str, Any]:
        """JSON for the manifest, so that a resumed run judges as the unbroken one would."""
        return {"losses": self.losses, "skipped": self.skipped}

    def load(self, state: dict[str, Any]) -> None:
        """Undo state(); what an older manifest has not is empty."""
        self.losses = list(state.get("losses", []))
        self.skipped = list(state.get("skipped", []))

    def judge(self, step: int, loss: float, norm: float) -> str | None:
        """Why the step is to be skipped, or None and it is remembered; BadLossError where the run is to end."""
        c = self.config
        why = self._what_is_wrong(loss, norm)
        if why is None:
            if c.loss_spike_factor is not None:  # else nobody asks for them
                self.losses = [*self.losses, loss][-c.loss_spike_window :]
            return None
        if c.on_bad_loss == "stop":
            raise BadLossError(f"step {step}: {why}")
        if len(self.skipped) >= c.max_skipped_steps:
            steps = ", ".join(str(skipped["step"]) for skipped in self.skipped)
            raise BadLossError(
                f"step {step}: {why}; training.max_skipped_steps = {c.max_skipped_steps} have been skipped"
                f"{f' ({steps})' if steps else ''}"
            )
        finite = [value if math.isfinite(value) else str(value) for value in (loss, norm)]
        self.skipped = [*self.skipped, {"step": step, "loss": finite[0], "grad_norm": finite[1], "why": why}]
        return why

    def _what_is_wrong(self, loss: float, norm: float) -> str | None:
        if not (math.isfinite(loss) and math.isfinite(norm)):
            return f"loss {loss}, gradient norm {norm}"
        factor, window = self.config.loss_spike_factor, self.config.loss_spike_window
        if factor is None or len(self.losses) < window:
            return None
        median = statistics.median(self.losses[-window:])
        if loss > factor * median:
            return (
                f"loss {loss:.4f} is {loss / median:.2f} times the median {median:.4f} of the last {window}, more than "
                f"training.loss_spike_factor = {factor:g}"
            )
        return None


FEWEST_PROBES = 4


class Pace:
    """What this rank does by itself, since the last log line: seconds a step outside all collectives.

    Ranks that share parameters wait for each other in every layer, so all take the same time for a step, and none of
    them looks slow. What tells them apart: a matrix product of one size, timed every step while nobody is waited for,
    and how late a rank comes to the first collective of a step.
    """

    def __init__(self, device: torch.device):
        cuda = device.type == "cuda"
        n = 4096 if cuda else 256  # 0.2 ms on an H100, about 1 ms on a core
        self.matrix = torch.ones(n, n, device=device, dtype=torch.bfloat16 if cuda else torch.float32)
        self.device = device
        self.released_at: float | None = None
        self.before = 0.0
        self.probes = deque[float](maxlen=10)
        self.probe()  # the first call sets up libraries
        self.probes.clear()

    def arrive(self) -> None:
        """Just before the first collective of a step."""
        if self.released_at is not None:
            self.before += time.perf_counter() - self.released_at

    def release(self) -> None:
        """Just after the last collective of a step."""
        self.released_at = time.perf_counter()

    def rest(self) -> None:
        """What was done since release() was no part of a step."""
        self.released_at = None

    def probe(self) -> None:
        """Time the product; the device has nothing else to do."""
        began = time.perf_counter()
        self.matrix @ self.matrix
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.probes.append(time.perf_counter() - began)

    def gather(self, steps: int, waited: float, group: dist.ProcessGroup) -> list[list[float]]:
        """Collective. [probe, before, waited for data] of every rank, in seconds a step; and a new window begins.

        The probe is the median of the last ten steps', or 0 while there are too few.
        """
        # of the last steps, also where every step is logged: one measurement alone says nothing on a busy machine
        probe = statistics.median(self.probes) if len(self.probes) >= FEWEST_PROBES else 0.0
        mine = [probe, self.before / steps, waited / steps]
        self.before = 0.0
        every = torch.zeros(dist.get_world_size(group), 3, dtype=torch.float64)
        every[dist.get_rank(group)] = torch.tensor(mine, dtype=torch.float64)
        dist.all_reduce(every, group=group)
        return every.tolist()


def stragglers(
    times: list[list[float]], step_seconds: float, factor: float, hosts: list[str]
) -> tuple[dict[str, float], list[str]]:
    """The slowest ranks as numbers for metrics.jsonl, and a sentence for each beyond `factor`.

    times: as gathered by Pace; step_seconds: that a step took; hosts: of each rank.
    """
    if len(times) < 2:
        return {}, []
    columns = list(zip(*times))
    slowest = [max(range(len(column)), key=column.__getitem__) for column in columns]
    probe, before, _ = (statistics.median_low(column) for column in columns)
    compute, late = slowest[0], slowest[1]
    ratio = columns[0][compute] / probe if probe > 0 else 1.0
    lateness = columns[1][late] - before
    waits = columns[2][slowest[2]]
    numbers = {
        "compute": ratio,
        "compute_rank": compute,
        "late_seconds": lateness,
        "late_rank": late,
        "data_wait": waits / step_seconds,
        "data_wait_rank": slowest[2],
    }
    found = []
    if ratio > factor:
        found.append(f"rank {compute} on {hosts[compute]} computes {ratio:.1f} times slower than the median rank")
    if step_seconds > factor * (step_seconds - lateness):
        found.append(
            f"rank {late} on {hosts[late]} comes {lateness:.2f} s late to every step of {step_seconds:.2f} s "
            f"({columns[2][late]:.2f} s of it, or of what all need, waiting for data)"
        )
    return numbers, found


class Heartbeat:
    """Rank 0's sign of life: heartbeat.json, replaced as a whole; not synced, for it is of no use after a crash."""

    def __init__(self, folder: Path, seconds: float, hosts: list[str], steps: int, writes: bool):
        self.path, self.seconds, self.writes = folder / "heartbeat.json", seconds, writes
        self.about = {
            "steps": steps,
            "ranks": len(hosts),
            "hosts": list(dict.fromkeys(hosts)),
            "pid": os.getpid(),
            "started": time.time(),
        }
        self.written = -math.inf
        self.failed = False

    def beat(self, step: int, state: str) -> None:
        """state: training, saving, evaluating, ended or stopped; while training not more often than every `seconds`."""
        if not self.writes or state == "training" and time.monotonic() - self.written < self.seconds:
            return
        content = {"step": step, "time": time.time(), "state": state, **self.about}
        aside = self.path.with_name("heartbeat.partial")
        try:
            aside.write_text(json.dumps(content, indent=1) + "\n")
            aside.replace(self.path)
            self.failed = False
        except OSError as e:  # a run does not end for want of this
            if not self.failed:
                logger.warning(f"{self.path} cannot be written: {e}")
            self.failed = True
        self.written = time.monotonic()


class StackDump:
    """Writes where every thread of this rank is when a step takes so long that a collective is about to time out.

    The flight recorder's counterpart for gloo, and for a rank that is stuck outside any collective.
    """

    def __init__(self, path: Path, seconds: float):
        self.path, self.seconds = path, seconds
        self.since = math.inf
        self.ended = threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()

    def step_begins(self) -> None:
        """The clock starts anew."""
        self.since = time.monotonic()

    def rest(self) -> None:
        """No step is under way: a save may take its time."""
        self.since = math.inf

    def close(self) -> None:
        """Stop watching."""
        self.ended.set()

    def _watch(self) -> None:
        while not self.ended.wait(min(1.0, self.seconds / 10)):
            if time.monotonic() - self.since < self.seconds:
                continue
            self.since = math.inf  # once a step
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with self.path.open("w") as f:
                    f.write(f"{time.ctime()}: a step has taken {self.seconds:g} s; every thread's last call first\n")
                    faulthandler.dump_traceback(f, all_threads=True)
            except OSError as e:
                logger.warning(f"{self.path} cannot be written: {e}")


ROLL_CALL_SECONDS = 5.0


def roll_call(store: dist.Store, rank: int, hosts: list[str], seconds: float = ROLL_CALL_SECONDS) -> str:
    """Who does not answer, in a sentence, after a collective has failed here. Takes `seconds` at most.

    Every rank that is alive fails soon after the first, for it waited for the same, and says so in the store. That may
    itself be kept by the machine that is gone: then no answer comes at all.
    """
    present: set[int] = set()
    asked = threading.Event()

    def call() -> None:
        store.set(f"roll-call/{rank}", "1")
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and len(present) < len(hosts):
            for other in set(range(len(hosts))) - present:
                if store.check([f"roll-call/{other}"]):
                    present.add(other)
            asked.set()
            time.sleep(0.1)

    thread = threading.Thread(target=_quietly, args=(call,), daemon=True)
    thread.start()
    thread.join(seconds + 1)
    if not asked.is_set():
        return f"no answer from rank 0's machine, {hosts[0]}, or the one that keeps the ranks' store"
    missing = [other for other in range(len(hosts)) if other not in present]
    if not missing:
        return "all ranks answer: one was slower than the others would wait"
    named = ", ".join(f"rank {other} on {hosts[other]}" for other in missing[:8])
    return f"no answer from {named}" + (f" and {len(missing) - 8} more" if len(missing) > 8 else "")


def _quietly(function: Any) -> None:
    try:
        function()
    except Exception as e:
        logger.debug(f"roll call: {e}")
