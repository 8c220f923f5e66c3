"""Every command that checks a stage reports a mistake in [evaluation], and imports nothing heavy for it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.scripts import load_script
from torchtitan.config import load_config
from torchtitan.config.checks import check_config
from torchtitan.extensions.cluster import check_config as whole_check
from torchtitan.extensions.cluster import slurm
from torchtitan.tools.errors import UserError


@pytest.fixture
def stage(tmp_path: Path) -> list[str]:
    """Wrong in [evaluation] alone."""
    file = tmp_path / "stage.toml"
    file.write_text('[evaluation]\nwindows = [8]\n[[data.sources]]\nname = "x"\npath = "p"\n')
    check_config(load_config(["--job.config_file", str(file)]), 1)
    return ["--job.config_file", str(file)]


@pytest.mark.parametrize("door", ["run_train.sh", "plan", "estimate", "slurm"])
def test_it_is_reported_at_every_door(door: str, stage: list[str], capsys: pytest.CaptureFixture[str]):
    says = "evaluation.freq or windows is set, but there is nothing to evaluate"
    if door == "slurm":
        with pytest.raises(UserError, match=says):
            slurm.start(1, 1, stage)
        return
    if door == "run_train.sh":
        code = whole_check.main(["1", *stage])
    else:
        code = load_script(door).main([*stage, "--world-size", "1"])
    assert code == 1 and says in capsys.readouterr().err


def test_what_is_imported():
    code = """
import sys, torchtitan.extensions.evaluation.checks, torchtitan.extensions.evaluation.command_line
assert 'torch' not in sys.modules
import torchtitan.extensions.evaluation.hook
assert not {'matplotlib', 'datasets', 'transformers', 'lm_eval'} & set(sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
