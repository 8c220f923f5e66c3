"""scripts/check_export_servers.py: transformers, and a server of our own that answers as it is told."""

from __future__ import annotations

import json
import math
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from tests.scripts import load_script
from tests.unit.extensions.convert.models import ARCHITECTURES, SCALINGS, export, random_weights, save, with_rope
from torchtitan.extensions.convert import ask_server
from torchtitan.extensions.convert.export import write_hugging_face
from torchtitan.models.rope_scaling import YarnScaling

# Stands for another server's Python: without options its answers are uniform; with them they are transformers'.
SERVER = f"""#!{sys.executable}
import json, pathlib, subprocess, sys
from array import array
_, script, name, work = sys.argv
work = pathlib.Path(work)
models = json.loads((work / "request.json").read_text())["models"]
if name == "mlx-lm" and "betas" in models[0]["folder"]:
    sys.exit("Killed for want of memory\\nbye")
if all(model["options"] for model in models):
    subprocess.run([{sys.executable!r}, script, "transformers", work], check=True)
else:
    for i, model in enumerate(models):
        numbers = len(model["prompts"]) * model["vocab_size"]
        (work / f"{{i}}.f32").write_bytes(array("f", [-4.85]  * numbers).tobytes())
    report = {{"versions": {{name: "1.0"}}, "models": [{{"remarks": []}} for model in models]}}
    (work / "report.json").write_text(json.dumps(report))
"""


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("check_export_servers")


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """yarn/, betas/, windows/, each with its checkpoint beside it; 64 tokens originally, trained for 256."""
    folder = tmp_path_factory.mktemp("exports")
    models = {
        "yarn": with_rope(SCALINGS["yarn"]),
        "betas": with_rope(YarnScaling(4.0, 64, 8.0, 2.0)),
        "windows": with_rope(None, ARCHITECTURES["mistral, windows"]),  # of 50 tokens
    }
    for name, args in models.items():
        export(save(args, folder / f"{name} checkpoint"), folder / name, None)
    return folder


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("server") / "python"
    path.write_text(SERVER)
    path.chmod(0o755)
    return path


def run(script: ModuleType, *arguments: Any) -> int:
    return script.main([str(a) for a in arguments])


def test_transformers_agrees_and_others_are_named(
    script: ModuleType, exports: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    checkpoint = exports / "yarn checkpoint" / "step-0"
    assert run(script, exports / "yarn", "--checkpoint", checkpoint, "--out", tmp_path / "out.json") == 0
    said = capsys.readouterr().out
    assert "prompts of 16, 32, 63, 65, 160, 255 tokens; original length 64" in said
    content = json.loads((tmp_path / "out.json").read_text())
    moved = content["moved"][str(exports / "yarn")]
    assert min(moved["below"], moved["beyond"]) > 0.1, "one prompt may be enough, of each side"
    assert "With another RoPE our own answers differ by" in said
    first, *others = content["rows"]
    assert (first["server"], first["verdict"]) == ("transformers", "agrees")
    for mean, largest in (first["below"], first["beyond"]):
        assert 0 < mean < largest < 1e-4
    assert [row["server"] for row in others] == ["vllm", "mlx-lm", "llama.cpp"]
    for row in others:  # none of them is among what this project installs
        assert row["verdict"] == "not installed" and f"{row['server']}: {row['remarks'][0]}" in said


def test_a_config_that_is_not_what_was_trained_is_found(
    script: ModuleType, exports: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    """Against the checkpoint: the folder alone cannot know. transformers reads what it says."""
    wrong = {
        "theta": {"rope_theta": 10000.0},
        "factor": {"factor": 8.0, "max_position_embeddings": 512},
        "attention_factor": {"attention_factor": 1.0},
        "right": {},
    }
    for name, change in wrong.items():
        (tmp_path / name).mkdir()
        config = json.loads((exports / "yarn" / "config.json").read_text())
        for part in (config, config["rope_parameters"], config["rope_scaling"]):
            part |= {key: value for key, value in change.items() if key in part}
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        (tmp_path / name / "model.safetensors").symlink_to(exports / "yarn" / "model.safetensors")
    folders = [tmp_path / name for name in wrong]
    checkpoint = exports / "yarn checkpoint" / "step-0"
    options = ("--checkpoint", checkpoint, "--lengths", 40, 64, 200, "--servers", "transformers")
    assert run(script, *folders, *options, "--out", tmp_path / "out.json") == 1
    *rows, right = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert right["verdict"] == "agrees" and max(right["below"] + right["beyond"]) < 1e-4
    for row in rows:
        assert row["verdict"] == "off" and not row["explained"] and row["beyond"][1] > 0.1, row
    assert capsys.readouterr().out.count("off") == 3


def test_a_note_accounts_for_a_server_that_agrees_with_the_options_it_names(
    script: ModuleType, exports: Path, server: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    own = ("--python-of", f"llama.cpp={server}", "--servers", "llama.cpp", "--out", tmp_path / "out.json")
    assert run(script, exports / "betas", *own) == 0
    plain, noted = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert (plain["verdict"], plain["options"]) == ("off", {}) and plain["explained"]
    assert (noted["verdict"], noted["options"]) == ("agrees", {"--yarn-beta-fast": "8", "--yarn-beta-slow": "2"})
    said = capsys.readouterr().out
    assert "llama.cpp does not read YaRN's betas from the model: serve with --yarn-beta-fast 8" in said
    # a note that names the texts which are read otherwise does not account for others
    assert run(script, exports / "windows", *own, "--lengths", 40, 200) == 1
    assert run(script, exports / "windows", *own, "--lengths", 60, 200) == 0
    assert "of up to 50 tokens only" in capsys.readouterr().out
    # the same answers where nothing is noted
    assert run(script, exports / "yarn", *own) == 1
    [row] = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert row["verdict"] == "off" and not row["notes"]


def test_a_model_that_does_not_look_at_positions_cannot_tell(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture
):
    """Without queries every token sees all before it alike, whatever the RoPE: transformers, which computes another
    one by the wrong config.json, gives our answers."""
    args = with_rope(SCALINGS["yarn"])
    weights = random_weights(args)

    def read(name: str) -> torch.Tensor:
        return weights.read(name) * (0.0 if ".wq." in name else 1.0)

    write_hugging_face(replace(weights, read=read), tmp_path / "right", None)
    shutil.copytree(tmp_path / "right", tmp_path / "wrong")
    config = json.loads((tmp_path / "wrong" / "config.json").read_text())
    config |= {"rope_theta": 5e5, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}, "rope_scaling": None}
    (tmp_path / "wrong" / "config.json").write_text(json.dumps(config))
    options = ("--checkpoint", tmp_path / "right", "--lengths", 30, 200, "--servers", "transformers")
    assert run(script, tmp_path / "wrong", *options, "--original-length", 64, "--out", tmp_path / "out.json") == 3
    content = json.loads((tmp_path / "out.json").read_text())
    assert content["rows"][0]["verdict"] == "cannot tell"
    assert content["moved"][str(tmp_path / "wrong")] == pytest.approx({"below": 0, "beyond": 0}, abs=1e-5)
    assert "cannot tell" in capsys.readouterr().out


def test_a_server_that_dies_is_a_fault_and_the_other_models_are_asked(
    script: ModuleType, exports: Path, server: Path, tmp_path: Path
):
    own = ("--python-of", f"mlx-lm={server}", "--servers", "mlx-lm", "--out", tmp_path / "out.json")
    assert run(script, exports / "betas", exports / "yarn", *own) == 1
    dead, next_one = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert (dead["verdict"], next_one["verdict"]) == ("fails", "off")
    assert dead["remarks"] == ["its process ended with code 1: Killed for want of memory"]


def test_bad_input_is_one_line(script: ModuleType, exports: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    yarn = exports / "yarn"
    for arguments, says in (
        ((tmp_path / "no",), "not a folder"),
        ((yarn, "--python-of", "sglang=python"), "the servers are transformers, vllm, mlx-lm, llama.cpp"),
        ((yarn, "--python-of", "vllm"), "is no file"),
        ((yarn, "--gguf-converter", tmp_path), "convert_hf_to_gguf.py does not exist"),
        ((yarn, "--lengths", "0"), "at least one token"),
    ):
        assert run(script, *arguments) == 1
        said = capsys.readouterr()
        assert says in said.err and said.err.count("\n") == 1 and not said.out


def test_options_that_contradict_each_other_need_two_servers(script: ModuleType):
    long, short, other = {"--max-model-len": "256"}, {"--max-model-len": "64"}, {"--yarn-beta-fast": "8"}
    assert script.together([long, other, short]) == [long | other, short]
    both = [{"--override-kv": "a=int:1"}, {"--override-kv": "b=int:2"}]
    assert script.together([*both, other]) == [{"--override-kv": "a=int:1,b=int:2"} | other]


def test_what_a_server_answered_before_it_refused_a_prompt_counts(script: ModuleType, tmp_path: Path):
    ours = torch.full((3, 4), -1.0)
    model = script.Model(tmp_path, 20, [[0] * n for n in (10, 20, 30)], ours)
    row = script.Row("model", "vllm", {}, {}, "")
    answers = tmp_path / "0.f32"
    answers.write_bytes(torch.tensor([[-1.0] * 4, [-1.0, -1.5, -1.0, -1.0]]).numpy().tobytes())
    judged = script.judge(row, model, {"remarks": [], "error": "too long"}, answers, 0.01)
    assert (judged.verdict, judged.agrees_at, judged.remarks) == ("fails", [10], ["too long"])
    assert judged.below == pytest.approx([0.5 / 8, 0.5]) and judged.beyond is None
    answers.write_bytes(torch.tensor([[-1.0] * 4, [-1.0] * 4, [-1.0, math.nan, -1.0, -1.0]]).numpy().tobytes())
    judged = script.judge(row, model, {"remarks": []}, answers, 0.01)
    assert (judged.verdict, judged.agrees_at, judged.beyond[1]) == ("off", [10, 20], math.inf)
    answers.write_bytes(b"1234" * 11)  # a vocabulary of another size
    assert script.judge(row, model, {"remarks": []}, answers, 0.01).verdict == "fails"


def test_a_note_is_about_the_prompts_that_it_names(script: ModuleType):
    beyond, below, all_texts = (
        "serve texts of up to 64 tokens only.",
        "serve texts of more than 64 tokens only.",
        "do not serve the model with it.",
    )
    told = [[script.is_about(note, length) for length in (64, 65)] for note in (beyond, below, all_texts)]
    assert told == [[False, True], [True, False], [True, True]]


def test_numbers_for_each_id():
    assert list(ask_server.by_id({2: -1.0, 0: -2.0}, 4)) == [-2.0, float("-inf"), -1.0, float("-inf")]
