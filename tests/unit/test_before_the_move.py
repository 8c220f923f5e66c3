"""Files that the code wrote before its modules moved are still read, and give what they gave then.

tests/before_the_move holds them: a model's folder, a tokenized corpus, texts, two checkpoints of one stage, and what
was recorded of runs on them (make.py there says how). Here each test copies the folder and uses commands alone, so
nothing of it depends on where a module lies. Numbers are compared to the last bit on a machine like the record's,
else to 1e-5 (record.py).
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.before_the_move.make import amounts, tensor_digests
from tests.before_the_move.record import FOLDER, MACHINE, REPOSITORY, differences, machine, metrics, run, train


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return shutil.copytree(FOLDER, tmp_path / "copy", ignore=shutil.ignore_patterns("*.py", "__pycache__"))


@pytest.fixture(scope="module")
def bits() -> bool:
    return machine() == json.loads(MACHINE.read_text())


def recorded(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (FOLDER / f"recorded/{name}.jsonl").read_text().splitlines()]


def documents(name: str) -> list[dict[str, Any]]:
    return json.loads((FOLDER / f"recorded/{name}.plan.json").read_text())


def digests() -> dict[str, str]:
    return json.loads((FOLDER / "recorded/export.json").read_text())


def test_a_run_with_the_old_order_of_rows_is_refused(folder: Path) -> None:
    """And nothing of it is touched: its checkpoints stand for rows that this code does not lay out."""
    before = sorted(path for path in (folder / "runs").rglob("*"))
    with pytest.raises(AssertionError) as error:
        train(folder, "first.toml")
    assert "format 2 -> 3 of the data plan" in str(error.value) and "end the stage with the version" in str(error.value)
    assert sorted(path for path in (folder / "runs").rglob("*") if path.suffix != ".log") == before


def test_the_next_stage_starts_from_an_old_checkpoint(folder: Path, bits: bool) -> None:
    train(folder, "second.toml")
    assert differences(recorded("second"), metrics(folder / "runs/second/metrics.jsonl"), bits) == []
    assert amounts(folder / "runs/second/plan.json") == documents("second")


def test_conversations_give_the_old_losses(folder: Path, bits: bool) -> None:
    train(folder, "chat.toml", "--checkpoint.enable", "False")
    assert differences(recorded("chat"), metrics(folder / "runs/chat/metrics.jsonl"), bits) == []
    assert amounts(folder / "runs/chat/plan.json") == documents("chat")


def test_an_old_checkpoint_is_exported_to_the_same_bytes(folder: Path) -> None:
    """Anywhere: nothing is computed."""
    convert = REPOSITORY / "scripts/convert.py"
    run(folder, convert, "runs/first/checkpoint/step-6", "export", "--to", "huggingface", "--assets", "model")
    assert tensor_digests(folder / "export") == digests()
    assert json.loads((folder / "export/config.json").read_text())["model_type"] == "llama"


def test_text_is_tokenized_to_the_old_corpus(folder: Path) -> None:
    """The same fingerprint, which is of the tokens and where documents end, and the same bytes of them."""
    given = ("--path", "texts/notes.jsonl", "--out-name", "again", "--assets", "model", "--cache-folder", "again")
    run(folder, REPOSITORY / "scripts/tokenize_corpus.py", *given, "--num-proc", "1")
    (made,) = (folder / "again").glob("again-*/corpus.json")
    old = json.loads((folder / "corpus/notes/corpus.json").read_text())
    new = json.loads(made.read_text())
    assert [file.pop("sha256") for file in new.pop("files")] == [file.pop("sha256") for file in old.pop("files")]
    assert new == old
    (data,) = made.parent.glob("*.arrow")
    assert data.read_bytes() == (folder / "corpus/notes" / data.name).read_bytes()
