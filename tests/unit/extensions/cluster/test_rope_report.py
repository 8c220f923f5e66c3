"""The RoPE of stages before they are trained, and the commands that print it: nothing is trained or downloaded here."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tests.scripts import load_script
from torchtitan.config import load_config
from torchtitan.extensions.cluster import rope_report as module
from torchtitan.extensions.cluster.rope_report import main, rope_report
from torchtitan.models.architecture import as_json
from torchtitan.models.registry import FLAVORS

REPO = Path(__file__).parents[4]
LLAMA = ["--job.config_file", str(REPO / "train_configs/llama3_8b/128k.toml")]
TWO_STAGES = {
    "first": '[model]\nflavor = "llama3_8b"\n[checkpoint]\ninitial_load_in_hf = true\n[rope]\ntheta = 8e6\n'
    "[training]\nseq_len = 65536\n",
    "second": '[model]\nflavor = "llama3_8b"\n[stage]\nafter = "first.toml"\n[training]\nseq_len = 131072\n[rope]\n',
}


@pytest.fixture
def stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of two stages, each with a dump folder of its own, without a checkpoint."""
    for name, text in TWO_STAGES.items():
        (tmp_path / f"{name}.toml").write_text(f'[job]\ndump_folder = "out/{name}"\n{text}')
    monkeypatch.chdir(tmp_path)
    return tmp_path


def lines(folder: Path, rope: str, *overrides: str) -> list[str]:
    """Of the second stage with these keys of [rope]."""
    path = folder / "second.toml"
    path.write_text(path.read_text().split("[rope]")[0] + f"[rope]\n{rope}\n")
    return rope_report(load_config(["--job.config_file", str(path), *overrides]))


def test_a_stage_without_a_previous_checkpoint_is_judged_by_the_previous_file(stages: Path):
    line, refused = lines(stages, "theta = 8e6")
    assert "the weights have theta 8e+06, trained to 65,536" in line and "first.toml, which has no finished" in line
    assert (
        refused.startswith("WOULD BE REFUSED: ")
        and "trained to 65,536 tokens, and rows reach position 131,072" in refused
    )
    assert len(lines(stages, "theta = 1.7e7")) == 1
    line, allowed = lines(stages, 'theta = 8e6\nallow = ["beyond_trained"]')
    assert allowed.startswith("allowed: The weights were trained to 65,536")
    # issue 21: YaRN on the flavor's base, after a raised one
    line, refused = lines(stages, 'type = "yarn"\nfactor = 64\noriginal_max_position_embeddings = 8192')
    assert "pairs would turn faster" in refused and "theta 8e+06 -> theta 500000, yarn" in refused
    both = lines(stages, 'theta = 8e6\ntype = "yarn"\nfactor = 16\noriginal_max_position_embeddings = 8192')
    assert len(both) == 2 and both[1].startswith("WARNING: Two rescalings multiply")


def test_a_stage_that_is_resumed_is_warned_as_training_warns(stages: Path, monkeypatch: pytest.MonkeyPatch):
    assert lines(stages, "theta = 8e6")[-1].startswith("WOULD BE REFUSED")
    config = load_config(["--job.config_file", "second.toml"])
    rope = as_json(replace(FLAVORS["llama3_8b"].rope, theta=8e6, max_position_embeddings=65536))
    manifest = {"architecture": as_json(FLAVORS["llama3_8b"]), "rope_before": rope}
    monkeypatch.setattr(module, "_resumed", lambda _: manifest)
    line, warning = rope_report(config)
    assert "trained to 65,536" in line and warning.startswith("WARNING: The weights were trained to 65,536")


def test_every_stage_of_a_chain_with_its_overrides(stages: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["--job.config_file", "second.toml", "--training.seq_len", "32768", "--rope.theta", "4e6"]) == 0
    first, second, data = capsys.readouterr().out.splitlines()
    assert first.startswith("stage first: RoPE: theta 4e+06; positions reach 32,768; the weights have theta 500000")
    assert second.startswith("stage second: RoPE: theta 4e+06; positions reach 32,768; the weights have theta 4e+06")
    assert data.startswith("stage second: data: every source goes on where ") and "first.toml will stop" in data
    assert main(["--job.config_file", "second.toml"]) == 2, "the second is refused"
    capsys.readouterr()
    assert main(["--job.config_file", "missing.toml"]) == 1
    assert "missing.toml" in capsys.readouterr().err


def test_weights_that_are_not_there_yet(stages: Path):
    path = ["--checkpoint.initial_load_path", "nowhere", "--stage.after", ""]
    line, refused = lines(stages, "", *path)
    assert "no weights in nowhere yet: as the flavor has them" in line and "trained to 8,192" in refused
    adapter = stages / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    (line,) = lines(stages, "", "--checkpoint.initial_load_path", str(adapter), "--stage.after", "")
    assert line.startswith("RoPE: not computed: ") and "belongs to an adapter" in line
    line, warning = lines(stages, "", "--stage.after", "")
    assert "the weights" not in line and warning.startswith("WARNING: The weights are random")


def test_weights_of_another_architecture_are_not_compared(stages: Path):
    (line,) = lines(stages, "", "--model.flavor", "llama3.2_1b")
    assert line.startswith("RoPE: not computed: the weights (by ") and "another architecture" in line


def test_without_pytorch_it_says_so(stages: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    (line,) = lines(stages, "")
    assert "PyTorch is not installed" in line
    # and neither the module nor this answer imports it
    asked = """
import importlib.util, sys
from torchtitan.config import load_config
from torchtitan.extensions.cluster.rope_report import rope_report
importlib.util.find_spec = lambda name: None
print(rope_report(load_config(["--job.config_file", "second.toml"])), "torch" in sys.modules)
"""
    answer = subprocess.run(
        [sys.executable, "-c", asked], capture_output=True, text=True, env={"PYTHONPATH": str(REPO)}
    )
    assert "not installed" in answer.stdout and answer.stdout.endswith("False\n"), answer
    assert module.__doc__ and "login node" in module.__doc__


def test_the_dry_run_of_submit(stages: Path):
    lines(stages, "theta = 8e6")
    command = [str(REPO / "multinode/submit.sh"), "--dry-run", "--job.config_file", "second.toml"]
    found = subprocess.run(command, capture_output=True, text=True)
    assert found.returncode == 2 and len(found.stdout.splitlines()) == 2, found
    assert "stage first: RoPE: theta 8e+06" in found.stderr and "stage second: WOULD BE REFUSED" in found.stderr


def test_plan_estimate_and_rehearsal_print_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    beyond = ["--training.seq_len", "1048576"]
    estimate, plan, rehearsal = (load_script(name) for name in ("estimate", "plan", "try_recipe"))
    assert estimate.main([*LLAMA, *beyond, "--world-size", "8", "--gpu", "cpu"]) == 2
    assert "WOULD BE REFUSED: The weights were trained to 8,192" in capsys.readouterr().out
    assert estimate.main([*LLAMA, "--world-size", "8", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rope"][0].startswith("RoPE: theta 2e+07; positions reach 131,072")

    monkeypatch.setattr(rehearsal.subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 0))
    monkeypatch.setattr(rehearsal, "write_small", lambda *_: tmp_path / "small.toml")
    assert rehearsal.main([LLAMA[1], *beyond]) == 2
    printed = capsys.readouterr().out
    assert "128k.toml: WOULD BE REFUSED: The weights were trained to 8,192" in printed
    assert printed.splitlines()[-1].endswith("; but the recipe itself WOULD BE REFUSED for its RoPE, as said above")
    assert rehearsal.main([LLAMA[1], "--rope.theta", "auto"]) == 0
    assert "128k.toml: rehearsed with the base of debugmodel" in capsys.readouterr().out
    monkeypatch.setattr(rehearsal.subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 1))
    assert rehearsal.main([LLAMA[1], *beyond]) == 1, "training's own code comes first"
    capsys.readouterr()

    (tmp_path / "text.jsonl").write_text('{"text": "a few words"}\n' * 100)
    (tmp_path / "stage.toml").write_text(
        f'[model]\nflavor = "smollm2_135m"\nhf_assets_path = "{REPO}/assets/tokenizer"\n'
        "[training]\nseq_len = 16384\nsteps = 1\n[lr_scheduler]\nwarmup_steps = 0\n"
        "[checkpoint]\ninitial_load_in_hf = true\n"
        '[[data.sources]]\nname = "text"\npath = "text.jsonl"\n[data]\ncache_folder = "cache"\n'
    )
    assert plan.main(["--job.config_file", "stage.toml", "--world-size", "1", "--out", "plan.json"]) == 2
    assert (tmp_path / "plan.json").is_file()
    printed = capsys.readouterr()
    assert "WOULD BE REFUSED: The weights were trained to 8,192 tokens, and rows reach position 16,384" in printed.out
