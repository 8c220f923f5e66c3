"""checkpoint.load_step of a job that Slurm requeues: its command line stays the same, but it must go back only once.

Otherwise each start would discard what the job has trained since its first. Imported without PyTorch.
"""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from torchtitan.components.hooks import Hook
from torchtitan.config.schema import JobConfig
from torchtitan.tools.folders import write_text

WENT_BACK = "went_back.json"
"""In the checkpoint folder: [job, step]."""


class WentBack(Hook):
    """Under Slurm: writes down that this job has gone back to checkpoint.load_step."""

    def started(self, trainer: Any) -> None:
        job, step = os.environ.get("SLURM_JOB_ID"), trainer.config.checkpoint.load_step
        if trainer.rank == 0 and job and step >= 0:
            write_text(_file(trainer.config), json.dumps([job, step]))


def with_load_step(config: JobConfig) -> JobConfig:
    """The configuration, with load_step = -1 if this is a requeued Slurm job that has gone back to that step before."""
    try:
        went_back = json.loads(_file(config).read_text())
    except (OSError, ValueError):
        return config
    requeued = os.environ.get("SLURM_RESTART_COUNT", "0") != "0"
    if requeued and went_back == [os.environ.get("SLURM_JOB_ID"), config.checkpoint.load_step]:
        return replace(config, checkpoint=replace(config.checkpoint, load_step=-1))
    return config


def _file(config: JobConfig) -> Path:
    return Path(config.job.dump_folder) / config.checkpoint.folder / WENT_BACK
