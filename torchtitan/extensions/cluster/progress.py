"""A progress bar over the steps, with the loss. Only rank 0 shows it, and only on a terminal."""

from __future__ import annotations

from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from torchtitan.components.hooks import Hook
from torchtitan.tools.logging import console


class ProgressBar(Hook):
    """Log lines appear above the bar, since both are written through the same console."""

    def __init__(self) -> None:
        self.bar: Progress | None = None

    def started(self, trainer: Any) -> None:
        if trainer.rank > 0 or not console.is_terminal:
            return
        columns = (TextColumn("step"), BarColumn(bar_width=None), MofNCompleteColumn())
        loss_and_rest = (TextColumn("{task.description}"), TimeRemainingColumn())
        self.bar = Progress(*columns, *loss_and_rest, console=console, transient=True)
        self.task = self.bar.add_task("", total=trainer.config.training.steps, completed=trainer.step)
        self.bar.start()

    def after_step(self, trainer: Any, numbers: dict[str, Any]) -> None:
        if self.bar:
            self.bar.update(self.task, completed=trainer.step, description=f"loss {numbers['loss']:.3f}")

    def ended(self, trainer: Any) -> None:
        if self.bar:
            self.bar.stop()

    def closed(self, trainer: Any) -> None:
        self.ended(trainer)
