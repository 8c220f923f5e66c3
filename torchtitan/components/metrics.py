"""Writes the numbers of a step: a line for people, metrics.jsonl, TensorBoard, Weights & Biases."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from torchtitan.config.schema import Metrics
from torchtitan.tools.errors import UserError
from torchtitan.tools.folders import write_text
from torchtitan.tools.logging import logger


class MetricsLogger:
    """The open files and writers of rank 0; the other ranks have none."""

    def __init__(
        self,
        config: Metrics,
        dump_folder: Path,
        run_name: str,
        job_config: dict[str, Any],
        from_step: int,
        keep_going: bool = False,
    ):
        """from_step: the step that the run resumes from; lines of metrics.jsonl for later steps are moved aside.

        keep_going: if a line cannot be written (a full disk), keep it for the next attempt instead of an OSError.
        """
        self.keep_going, self.unwritten = keep_going, b""
        dump_folder.mkdir(parents=True, exist_ok=True)
        path = dump_folder / "metrics.jsonl"
        _drop_lines_after(path, from_step)
        self.file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        self.tensorboard: Any = None
        self.wandb: Any = None
        if config.enable_tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.tensorboard = SummaryWriter(str(dump_folder / config.save_tb_folder), purge_step=from_step + 1)
        if config.enable_wandb:
            self.wandb = import_wandb().init(name=run_name, dir=str(dump_folder), config=job_config, resume="allow")

    def log(self, numbers: dict[str, Any]) -> None:
        """numbers: flat, except for dictionaries such as loss_by_source; `step` is required."""
        numbers = finite(numbers)
        self._write(json.dumps(numbers) + "\n")
        scalars: dict[str, float] = {}
        for key, value in numbers.items():
            if isinstance(value, dict):
                scalars |= {f"{key}/{k}": v for k, v in value.items() if v is not None}
            elif value is not None and key != "step":
                scalars[key] = value
        if self.tensorboard:
            for key, value in scalars.items():
                self.tensorboard.add_scalar(key, value, numbers["step"])
        if self.wandb:
            self.wandb.log(scalars, step=numbers["step"])

    def _write(self, line: str) -> None:
        waiting = bool(self.unwritten)
        self.unwritten += line.encode()
        try:
            while self.unwritten:  # a disk that fills up accepts only a part
                self.unwritten = self.unwritten[os.write(self.file, self.unwritten) :]
        except OSError as e:
            if not self.keep_going:
                raise
            if not waiting:
                logger.warning(f"metrics.jsonl cannot be written; its lines are kept until it can be: {e}")

    def close(self) -> None:
        if self.unwritten:
            self._write("")
        os.close(self.file)
        if self.tensorboard:
            self.tensorboard.close()
        if self.wandb:
            self.wandb.finish()


def finite(value: Any) -> Any:
    """The value, with None in place of NaN and infinity, which are not JSON."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def import_wandb() -> Any:
    """The module; UserError if it is not installed."""
    try:
        import wandb
    except ImportError:
        raise UserError(
            "metrics.enable_wandb = true needs the package wandb: pip install -e '.[wandb]' in the repository."
        ) from None
    return wandb


def _drop_lines_after(path: Path, step: int) -> None:
    """Move the lines after `step`, which the run will write again, to metrics.replaced.jsonl."""
    if not path.exists():
        return
    kept: list[str] = []
    replaced: list[str] = []
    for line in path.read_text().splitlines(keepends=True):
        try:
            (replaced if json.loads(line)["step"] > step else kept).append(line)
        except (json.JSONDecodeError, KeyError, TypeError):
            continue  # the last line of a killed run may be incomplete
    with path.with_name("metrics.replaced.jsonl").open("a") as f:
        f.writelines(replaced)
    write_text(path, "".join(kept))


def log_step(numbers: dict[str, Any], steps: int) -> None:
    """Log the line for people. steps: of the stage."""
    left = (steps - numbers["step"]) * numbers["seconds_per_step"]
    mfu = f"  mfu {numbers['mfu']:.1%}" if numbers["mfu"] is not None else ""
    logger.info(
        f"step {numbers['step']:>{len(str(steps))}}/{steps}  loss {numbers['loss']:.4f}  "
        f"grad_norm {numbers['grad_norm']:.3f}  lr {numbers['lr']:.2e}  "
        f"{numbers['tokens_per_second']:,.0f} tok/s{mfu}  {numbers['memory_gib']:.2f} GiB  {duration(left)} left"
    )


def duration(seconds: float) -> str:
    """90 -> 1:30, 7200 -> 2:00:00, 180000 -> 2 d 02:00:00."""
    seconds = int(seconds)
    days, rest = divmod(seconds, 86400)
    hours, rest = divmod(rest, 3600)
    minutes, rest = divmod(rest, 60)
    if days:
        return f"{days} d {hours:02}:{minutes:02}:{rest:02}"
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
