"""Asking whether a stage has ended, as a launcher does: exit codes, and no PyTorch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from torchtitan.chain import main
from torchtitan.tools.errors import GATE_NOT_HELD, NOT_ENDED

ROOT = Path(__file__).parents[2]


def checkpoint(dump: Path, step: int, content: str | None = None) -> None:
    folder = dump / "checkpoint" / f"step-{step}"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(content or json.dumps({"format": 1, "step": step}))


def ask(dump: Path, *more: str) -> int:
    (dump / "stage.toml").write_text(
        '[[data.sources]]\nname = "a"\npath = "a.jsonl"\n[[stage.gates]]\nmetric = "loss"\nat_most = 3.0\nover = 1\n'
    )
    arguments = ["--job.config_file", str(dump / "stage.toml"), "--job.dump_folder", str(dump), "--training.steps", "4"]
    return main(["--has-ended", *arguments, *more])


def test_has_ended(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "metrics.jsonl").write_text('{"step": 4, "loss": 2.5}\n')
    assert ask(tmp_path) == NOT_ENDED
    checkpoint(tmp_path, 2)
    (tmp_path / "checkpoint" / "step-4.partial").mkdir()
    assert ask(tmp_path) == NOT_ENDED
    checkpoint(tmp_path, 4)
    assert ask(tmp_path) == 0
    assert ask(tmp_path, "--training.steps", "5") == NOT_ENDED
    # the export is part of the stage
    assert ask(tmp_path, "--checkpoint.last_save_in_hf", "true") == NOT_ENDED
    (tmp_path / "export" / "step-4").mkdir(parents=True)
    assert ask(tmp_path, "--checkpoint.last_save_in_hf", "true") == 0
    # a gate that does not hold, and a mistake, are neither
    (tmp_path / "metrics.jsonl").write_text('{"step": 4, "loss": 3.5}\n')
    assert ask(tmp_path) == GATE_NOT_HELD and "loss is 3.5" in capsys.readouterr().err
    assert ask(tmp_path, "--checkpoint.enable", "false") == 1
    assert ask(tmp_path, "--no.such.key", "1") == 1


def test_a_damaged_last_manifest_means_that_the_step_before_counts(tmp_path: Path):
    checkpoint(tmp_path, 2)
    checkpoint(tmp_path, 4, content="{")
    assert ask(tmp_path) == NOT_ENDED


def test_pytorch_is_not_imported():
    code = "import torchtitan.chain, sys; print(sorted(m for m in sys.modules if m.split('.')[0] == 'torch'))"
    assert subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True).strip() == "[]"
