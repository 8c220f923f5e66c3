"""checkpoint.load_step of a requeued job, without ranks."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from torchtitan.config.schema import Checkpoint, Job, JobConfig
from torchtitan.extensions.cluster.requeue import WentBack, with_load_step
from torchtitan.extensions.evaluation.hook import EvaluationHook
from torchtitan.extensions.wiring import hooks_of


def test_a_requeued_job_goes_back_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Its command line has load_step at every start; another job, or the same job in its first start, goes back."""
    (tmp_path / "checkpoint").mkdir()

    def config(step: int) -> JobConfig:
        return JobConfig(job=Job(dump_folder=str(tmp_path)), checkpoint=Checkpoint(enable=True, load_step=step))

    def start(step: int, rank: int = 0) -> None:
        WentBack().started(SimpleNamespace(config=config(step), rank=rank))

    def load_step(step: int) -> int:
        return with_load_step(config(step)).checkpoint.load_step

    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    start(500)
    assert load_step(500) == 500  # without Slurm nothing is written down
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    start(400, rank=1)  # only rank 0 writes
    start(500)
    start(-1)  # does not go back
    assert load_step(500) == 500
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert [load_step(step) for step in (500, 400, -1)] == [-1, 400, -1]
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    assert load_step(500) == 500


def test_the_way_back_is_written_down_before_the_run_evaluates():
    kinds = [type(hook) for hook in hooks_of(JobConfig())]
    assert kinds.index(WentBack) < kinds.index(EvaluationHook)
