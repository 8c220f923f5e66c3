"""What PyTorch is told by environment variables, which it reads when the process group is made."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from torchtitan.tools.device import host_name, record_collectives


def test_the_flight_recorder_is_switched_on_and_what_is_set_already_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for name in ("TRACE_BUFFER_SIZE", "DEBUG_INFO_TEMP_FILE", "DUMP_ON_TIMEOUT"):
        monkeypatch.setenv(f"TORCH_NCCL_{name}", "")  # so that it is taken back afterwards
        monkeypatch.delenv(f"TORCH_NCCL_{name}")
    monkeypatch.setenv("TORCH_NCCL_DUMP_ON_TIMEOUT", "0")
    record_collectives(tmp_path / "traces", 2000)
    assert (tmp_path / "traces").is_dir()
    assert os.environ["TORCH_NCCL_TRACE_BUFFER_SIZE"] == "2000"
    assert os.environ["TORCH_NCCL_DEBUG_INFO_TEMP_FILE"] == f"{tmp_path}/traces/rank_"
    assert os.environ["TORCH_NCCL_DUMP_ON_TIMEOUT"] == "0"


def test_a_host_is_called_what_slurm_calls_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SLURMD_NODENAME", "node17")
    assert host_name() == "node17"
    monkeypatch.delenv("SLURMD_NODENAME")
    assert host_name() == os.uname().nodename
