"""Asking whether a stage has ended, as a launcher does: exit codes, and no PyTorch."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from torchtitan.components.manifest import digest, read_manifest
from torchtitan.extensions.cluster.chain import main
from torchtitan.tools.errors import GATE_NOT_HELD, NOT_ENDED

ROOT = Path(__file__).parents[4]


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
    assert ask(tmp_path, "--checkpoint.load_step", "2") == NOT_ENDED  # it goes back
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


def test_a_stage_that_is_another_now_has_not_simply_ended(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "metrics.jsonl").write_text('{"step": 4, "loss": 2.5}\n')
    trained = {"training": {"seq_len": 2048}, "rope": {"theta": 5e5}}
    checkpoint(tmp_path, 4, json.dumps({"format": 1, "step": 4, "config": trained}))
    assert ask(tmp_path, "--training.seq_len", "4096", "--rope.theta", "5e5") == 1
    assert "has ended, but with another configuration" in (said := capsys.readouterr().err)
    assert "training.seq_len 2048 -> 4096" in said and "rope.theta" not in said


@pytest.mark.parametrize("flavor", ["auto", "debugmodel"])
def test_a_stage_of_other_assets_or_another_seed_has_not_simply_ended(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flavor: str
):
    """The seed decides every row; the folder of the assets is the only name of the model under "auto"."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 4, "loss": 2.5}\n')
    model = {"flavor": flavor, "hf_assets_path": str(tmp_path / "assets")}
    trained = {"model": model, "training": {"seed": 5, "steps": 4}, "data": {"sources": [{"name": "a"}]}}
    trained["data"]["sources"][0]["path"] = "a.jsonl"  # type: ignore[index]
    checkpoint(tmp_path, 4, json.dumps({"format": 1, "step": 4, "config": trained}))
    same = ["--model.flavor", flavor, "--model.hf_assets_path", f"{tmp_path}/x/../assets", "--training.seed", "5"]
    assert ask(tmp_path, *same) == 0
    for key, value in (("training.seed", "7"), ("model.hf_assets_path", str(tmp_path / "other"))):
        assert ask(tmp_path, *same, f"--{key}", value) == 1
        assert f"{key} {5 if key == 'training.seed' else tmp_path / 'assets'} -> {value}" in capsys.readouterr().err
    for key, value in (("metrics.log_freq", "3"), ("data.num_workers", "0"), ("model.attention_backend", "dense")):
        assert ask(tmp_path, *same, f"--{key}", value) == 0, key


def test_the_stage_before_is_the_one_that_was_gone_on_from(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "metrics.jsonl").write_text('{"step": 4, "loss": 2.5}\n')
    before = tmp_path / "before"
    checkpoint(before, 7, json.dumps({"format": 1, "step": 7, "files": {"a": [1, 2]}}))
    was = {"stage": "before", "step": 7, "digest": digest(read_manifest(before / "checkpoint" / "step-7"))}
    checkpoint(tmp_path, 4, json.dumps({"format": 1, "step": 4, "stages_before": [was]}))
    (tmp_path / "before.toml").write_text(f'[job]\ndump_folder = "{before}"\n')
    after = ["--stage.after", str(tmp_path / "before.toml")]
    assert ask(tmp_path, *after) == 0
    (before / "checkpoint/step-7/manifest.json").write_text('{"format": 1, "step": 7, "files": {"a": [1, 3]}}')
    assert ask(tmp_path, *after) == 1
    assert "which has been trained anew or for longer since" in capsys.readouterr().err
    shutil.rmtree(before)  # it need not be kept
    assert ask(tmp_path, *after) == 0
    (tmp_path / "before.toml").write_text(f'[job]\ndump_folder = "{tmp_path}/./"\n')
    assert ask(tmp_path, *after) == 1
    assert "have one job.dump_folder" in capsys.readouterr().err


SAME = [
    "--job.hooks my:Hook",
    "--metrics.log_freq 3",
    "--checkpoint.interval 77",
    "--optimizer.lr 1e-5",
    "--comm.node_check",
]
ANOTHER = [
    "--data.sources.0.path x",
    "--data.sources.0.weight 9",
    "--training.seed 7",
    "--training.seq_len 64",
    "--training.global_batch_size 8",
    "--rope.theta 2e4",
    "--model.hf_assets_path elsewhere",
    "--data.packing concat",
]


@pytest.mark.parametrize("change", ["", *SAME, *ANOTHER])
def test_a_stage_that_ended_long_ago(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str):
    """A checkpoint that the code wrote before its modules moved; tests/unit/components/test_changes.py has all keys."""
    folder = shutil.copytree(ROOT / "tests/before_the_move", tmp_path / "copy")
    monkeypatch.chdir(folder)
    ended = main(["--has-ended", "--job.config_file", "first.toml", *change.split()]) == 0
    assert ended == (change not in ANOTHER)


def test_pytorch_is_not_imported():
    code = "import torchtitan.extensions.cluster.chain, sys; "
    code += "print(sorted(m for m in sys.modules if m.split('.')[0] == 'torch'))"
    assert subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True).strip() == "[]"
