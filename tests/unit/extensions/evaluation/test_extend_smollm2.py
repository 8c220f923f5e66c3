"""scripts/studies/extend_smollm2.py without its model and training: the stage, the questions, what is run and when."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.scripts import load_script
from torchtitan.config import load_config
from torchtitan.extensions.cluster.check_config import check_tables
from torchtitan.extensions.evaluation.checks import check_evaluation
from torchtitan.tools.errors import UserError


@pytest.mark.parametrize("rows, pose", [(2048, True), (16384, False)])
def test_a_stage_and_one_set_of_questions_for_three_models(
    rows: int, pose: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sys, "path", list(sys.path))
    script = load_script("studies/extend_smollm2")
    commands: list[list[str]] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        if "build_demo_corpus" in str(command[1]):
            (tmp_path / "python").mkdir()
            (tmp_path / "python/docs.jsonl").write_text(json.dumps({"text": "help"}) + "\n")
            return subprocess.CompletedProcess(command, 0)
        commands.append([str(part) for part in command])
        return subprocess.CompletedProcess(command, 0, stdout="a table\n", stderr="")

    monkeypatch.setattr(script.subprocess, "run", run)
    monkeypatch.setattr(script.context, "fetch_model", lambda folder: folder)
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for kind, size in (("books", 200_000), ("manuals", 150_000)):
        lines = [json.dumps({"text": f"{kind} {n} " + "a" * size}) for n in range(7)]
        (corpus / f"{kind}.jsonl").write_text("\n".join([*lines, json.dumps({"text": "short"})]) + "\n")
    arguments = ["--length", "16384", "--rows", str(rows), "--batch", "32768", "--steps", "7", "--processes", "2"]
    arguments += ["--corpus", str(corpus), "--megabytes", "0.35", "--items", "2"]
    assert script.main([str(tmp_path), *arguments]) == 0
    config = load_config(["--job.config_file", str(tmp_path / "stage.toml")])
    check_tables(config, 2)
    check_evaluation(config)
    assert [source.name for source in config.data.sources] == ["books", "manuals", "docs"]
    assert sum(source.weight for source in config.data.sources) == pytest.approx(1)
    trained = set((tmp_path / "text/books.jsonl").read_text().splitlines())
    held_out = set((tmp_path / "text/held_out/books.jsonl").read_text().splitlines())
    assert len(trained) == 2 and len(held_out) == 4 and not trained & held_out
    assert not any('"short"' in line for line in trained | held_out)
    assert (config.data.positions == "pose") == pose == (config.data.target_seq_len == 16384)
    questions = load_config(["--job.config_file", str(tmp_path / "questions.toml")])
    check_evaluation(questions)
    assert questions.evaluation.length == questions.evaluation.needle_lengths[-1] == 16384
    assert questions.evaluation.texts == ("books.jsonl", "manuals.jsonl") and questions.evaluation.generate
    assert questions.evaluation.task_lengths == (4096, 8192, 16384) and len(questions.evaluation.tasks) == 4
    assert questions.evaluation.windows == (8192,) and not questions.data.add_bos
    training, *evaluations, compared = commands
    assert "torchtitan.extensions.cluster.launch" in training
    labels = [command[command.index("--label") + 1] for command in evaluations]
    assert labels == [
        "SmolLM2-135M as it came",
        "theta raised for 16,384, not trained",
        "after 7 steps of 32,768 tokens",
    ]
    assert ["--rope.theta" in command for command in evaluations] == [False, True, False]
    assert compared[2:5] == [str(tmp_path / f"{name}.json") for name in ("before", "rescaled", "after")]
    assert (tmp_path / "table.txt").read_text() == "a table\n"


def test_a_corpus_of_short_text_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    script = load_script("studies/extend_smollm2")
    (tmp_path / "python").mkdir()
    (tmp_path / "python/docs.jsonl").write_text("")
    (tmp_path / "books.jsonl").write_text(json.dumps({"text": "short"}) + "\n")
    monkeypatch.setattr(script.subprocess, "run", lambda *_, **__: None)
    with pytest.raises(UserError, match="too little long text"):
        script.write_texts(tmp_path, tmp_path, 1000, 16384)
    assert not (tmp_path / "text/held_out").exists()


def test_a_length_that_extends_nothing_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(SystemExit):
        load_script("studies/extend_smollm2").main([str(tmp_path / "work"), "--length", "8192"])
    assert "must be above the 8192" in capsys.readouterr().err and not (tmp_path / "work").exists()
