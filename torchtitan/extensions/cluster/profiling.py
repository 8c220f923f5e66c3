"""PyTorch profiler traces and CUDA memory snapshots, every profiling.profile_freq steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from torchtitan.components.hooks import Hook
from torchtitan.tools.logging import logger
from torchtitan.tools.torch_compat import record_memory_history, write_memory_snapshot

StepEnded = Callable[[int], None]


class Profiler(Hook):
    """Records what [profiling] asks for, from the first step of a run to its end."""

    def __init__(self) -> None:
        self.stack = ExitStack()
        self.step_ended: list[StepEnded] = []

    def started(self, trainer: Any) -> None:
        config, folder, rank = trainer.config.profiling, trainer.dump_folder, trainer.rank
        if config.enable_profiling:
            traces = _traces(folder / config.save_traces_folder, config.profile_freq, rank)
            self.step_ended.append(self.stack.enter_context(traces))
        if config.enable_memory_snapshot and torch.cuda.is_available():
            snapshots = _memory_snapshots(folder / config.save_memory_snapshot_folder, config.profile_freq, rank)
            self.step_ended.append(self.stack.enter_context(snapshots))
        elif config.enable_memory_snapshot:
            logger.warning("profiling.enable_memory_snapshot has no effect without CUDA.")

    def after_step(self, trainer: Any, numbers: dict[str, Any]) -> None:
        for step_ended in self.step_ended:
            step_ended(trainer.step)

    def ended(self, trainer: Any) -> None:
        self.stack.close()

    def closed(self, trainer: Any) -> None:
        self.stack.close()


@contextmanager
def _traces(folder: Path, freq: int, rank: int) -> Iterator[StepEnded]:
    """The traces can be opened in Perfetto or chrome://tracing."""
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
