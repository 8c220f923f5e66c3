"""PyTorch profiler traces and CUDA memory snapshots, every n steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

from torchtitan.tools.logging import logger
from torchtitan.tools.torch_compat import record_memory_history, write_memory_snapshot

StepEnded = Callable[[int], None]


@contextmanager
def profiled(traces: Path | None, snapshots: Path | None, freq: int, rank: int) -> Iterator[StepEnded]:
    """Yields step_ended(step), to be called after every step.

    traces, snapshots: the folders to write to, None for not at all. Traces open in Perfetto or chrome://tracing.
    """
    with ExitStack() as stack:
        callbacks: list[StepEnded] = []
        if traces:
            callbacks.append(stack.enter_context(_traces(traces, freq, rank)))
        if snapshots and torch.cuda.is_available():
            callbacks.append(stack.enter_context(_memory_snapshots(snapshots, freq, rank)))
        elif snapshots:
            logger.warning("profiling.enable_memory_snapshot has no effect without CUDA.")

        def step_ended(step: int) -> None:
            for callback in callbacks:
                callback(step)

        yield step_ended


@contextmanager
def _traces(folder: Path, freq: int, rank: int) -> Iterator[StepEnded]:
    folder.mkdir(parents=True, exist_ok=True)
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    current = 0

    def write(profiler: torch.profiler.profile) -> None:
        path = folder / f"step-{current}_rank-{rank}.json.gz"
        profiler.export_chrome_trace(str(path))
        logger.info(f"profiler trace: {path}")

    # each period ends with a warm-up step and the recorded one, so it is at least two steps long
    schedule = torch.profiler.schedule(wait=max(freq - 2, 0), warmup=1, active=1)
    with torch.profiler.profile(activities=activities, schedule=schedule, on_trace_ready=write) as profiler:

        def step_ended(step: int) -> None:
            nonlocal current
            current = step
            profiler.step()

        yield step_ended


@contextmanager
def _memory_snapshots(folder: Path, freq: int, rank: int) -> Iterator[StepEnded]:
    folder.mkdir(parents=True, exist_ok=True)
    record_memory_history(True)

    def step_ended(step: int) -> None:
        if step % freq == 0:
            path = folder / f"step-{step}_rank-{rank}.pickle"
            write_memory_snapshot(path)
            logger.info(f"memory snapshot: {path}")

    try:
        yield step_ended
    finally:
        record_memory_history(False)
