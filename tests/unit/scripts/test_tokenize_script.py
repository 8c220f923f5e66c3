"""scripts/tokenize_corpus.py: the sources of a stage, one source, shards, and what can be asked wrongly."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from torchtitan.datasets.corpus import open_corpus
from torchtitan.datasets.tokenizer import load_tokenizer

ROOT = Path(__file__).parents[3]
SCRIPT = ROOT / "scripts" / "tokenize_corpus.py"


@pytest.fixture(autouse=True)
def logged(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """The log is looked at, whatever a test before has done to it."""
    monkeypatch.setattr(logging.getLogger("torchtitan"), "propagate", True)
    caplog.set_level(logging.INFO, "torchtitan")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """main() of the script with the given words; what it prints, or the message that it ends with."""
    spec = importlib.util.spec_from_file_location("tokenize_corpus", SCRIPT)
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "tokenize_corpus", script)
    spec.loader.exec_module(script)

    def main(*words: object) -> str:
        monkeypatch.setattr(sys, "argv", ["tokenize_corpus.py", *map(str, words)])
        try:
            script.main()
        except SystemExit as end:
            return str(end)
        return capsys.readouterr().out

    return main


@pytest.fixture
def stage(tmp_path: Path) -> Path:
    """A stage with two sources, whose paths start at data.folder, without BOS."""
    for name, texts in {"books": ["one book", "another"], "web": ["a page"]}.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    path = tmp_path / "stage.toml"
    path.write_text(
        f"""
[model]
hf_assets_path = "{ROOT / "assets" / "tokenizer"}"
[data]
folder = "{tmp_path}"
cache_folder = "{tmp_path / "cache"}"
add_bos = false
[[data.sources]]
name = "books"
path = "books.jsonl"
[[data.sources]]
name = "web"
path = "web.jsonl"
"""
    )
    return path


def made(stage: Path) -> dict[str, Path]:
    return {path.name.rpartition("-")[0]: path for path in (stage.parent / "cache").glob("[!.]*")}


def test_the_sources_of_a_stage(run: Callable[..., str], stage: Path) -> None:
    assert "web: 1 documents" in run("--config-file", stage, "--source", "web", "--num-proc", 1)
    assert list(made(stage)) == ["web"]
    printed = run("--config-file", stage, "--num-proc", 1)
    assert "books: 2 documents" in printed and "web: 1 documents" in printed
    assert json.loads((made(stage)["books"] / "corpus.json").read_text())["add_bos"] is False
    stage.write_text(stage.read_text().replace("web.jsonl", f"cache/{made(stage)['web'].name}"))
    assert "is tokenized already" in run("--config-file", stage)


def test_files_of_token_ids_are_read_in_place(run: Callable[..., str], tmp_path: Path) -> None:
    eos = load_tokenizer(str(ROOT / "assets/tokenizer")).eos_id
    np.array([5, 6, eos, 7, eos], np.uint16).tofile(tmp_path / "ids.bin")
    words = ["--assets", ROOT / "assets/tokenizer", "--cache-folder", tmp_path / "cache", "--no-bos"]
    assert "ids.bin is read in place: 2 documents" in run("--path", tmp_path / "ids.bin", *words)
    (tmp_path / "a.txt").write_text("text")
    assert 'set format to "text"' in run("--path", tmp_path, *words)
    assert "text: 1 documents" in run("--path", tmp_path, *words, "--format", "text", "--num-proc", 1)
    rows = pa.table({"ids": [[5, 6], [7], [8, 9]], "gold": [[0, 1], [1], [0, 1]]})
    with pa.ipc.new_file(str(tmp_path / "rows.arrow"), rows.schema) as out:
        out.write_table(rows)
    pq.write_table(rows, tmp_path / "rows.parquet")
    words += ["--ids-field", "ids", "--num-proc", 1]
    for kind, said in (("arrow", "rows.arrow is read in place: 3 documents"), ("parquet", "3 documents, 8 tokens in")):
        assert said in run("--path", tmp_path / f"rows.{kind}", *words)
    assert "2 documents, 4 tokens" in run("--path", tmp_path / "rows.parquet", *words, "--mask-field", "gold")


def test_shards_of_a_stage(run: Callable[..., str], stage: Path, caplog: pytest.LogCaptureFixture) -> None:
    """One unit each: shard 0 makes all, shard 1 finds nothing to do, in either order."""
    assert run("--config-file", stage, "--shard-index", 1, "--num-shards", 2) == ""
    assert "units 0 of 1 done; shards 0 are still to come" in caplog.text
    assert "books: 2 documents" in run("--config-file", stage, "--shard-index", 0, "--num-shards", 2)


def test_one_source(run: Callable[..., str], stage: Path) -> None:
    printed = run(
        *("--path", stage.parent / "*.jsonl", "--out-name", "all", "--cache-folder", stage.parent / "cache"),
        *("--assets", ROOT / "assets" / "tokenizer", "--no-bos", "--num-proc", 1),
    )
    assert "all: 3 documents" in printed
    assert open_corpus(made(stage)["all"]).tokens < 30


@pytest.mark.parametrize(
    "words, parts",
    [
        ([], ["--config-file", "--path"]),
        (["--config-file", "STAGE", "--path", "x"], ["either"]),
        (["--path", "x", "--source", "web"], ["--source", "--config-file"]),
        (["--config-file", "STAGE", "--no-bos", "--cache-folder", "x"], ["--cache-folder, --bos", "--config-file"]),
        (["--config-file", "STAGE", "--source", "wiki"], ["wiki", "books, web"]),
        (["--config-file", "nothing.toml"], ["nothing.toml"]),
        (["--config-file", "STAGE", "--shard-index", "2", "--num-shards", "2"], ["--shard-index 2", "0 to 1"]),
        (["--path", "nothing", "--cache-folder", "CACHE"], ["'nothing'"]),
        (["--path", ""], ["no path"]),
        (["--path", "hub:a/b/c"], ["'hub:a/b/c'", "hub:OWNER/NAME"]),
        (["--path", "hub:own/name", "--max-documents", "0"], ["max_documents = 0", "at least 1"]),
    ],
)
def test_what_can_be_asked_wrongly(run: Callable[..., str], stage: Path, words: list[str], parts: list[str]) -> None:
    places = {"STAGE": str(stage), "CACHE": str(stage.parent / "cache")}
    message = run(*(places.get(word, word) for word in words))
    assert message.startswith("error: ")
    assert all(part in message for part in parts), message


def test_check_reads_all_and_writes_nothing(run: Callable[..., str], stage: Path) -> None:
    """It ends with 2 where tokenizing would end with an error, and with 0 where it would not."""
    here = stage.parent
    assert run("--config-file", stage, "--check", "--num-proc", 1) == "0"
    lines = ['{"text": "one"}', '{"text": "cut', "", '{"text": " "}', '{"body": "x"}', '{"text": "two"}']
    (here / "web.jsonl").write_text("\n".join(lines))
    assert run("--config-file", stage, "--check", "--num-proc", 2) == "2"
    with_skip = stage.read_text() + 'on_bad_record = "skip"\nmax_bad_share = '
    for share, code in (("0.4", "0"), ("0.39", "2")):
        stage.write_text(with_skip + share)
        assert run("--config-file", stage, "--check", "--num-proc", 1) == code
    (here / "web.jsonl").write_bytes('{"text": "one"}'.encode("utf-16"))
    assert run("--config-file", stage, "--check", "--num-proc", 1) == "2"
    assert sorted(path.name for path in here.iterdir()) == ["books.jsonl", "stage.toml", "web.jsonl"]


@pytest.mark.parametrize("words", [[], ["--check"]])
def test_what_training_would_refuse_is_refused_first(run: Callable[..., str], stage: Path, words: list[str]) -> None:
    """If the TOML is of a whole stage; one of data alone is taken."""
    text = stage.read_text()
    for keys, of_source, part in (
        ("seq_len = 64", "chunk_length = 128", "chunk_length = 128 is more than training.seq_len = 64"),
        ("steps = 500", 'messages_field = "messages"', 'long_document = "drop"'),
        ("steps = 5\n[lr_scheduler]\nwarmup_steps = 900", "", "warmup_steps"),
    ):
        stage.write_text(f"{text}{of_source}\n[training]\n{keys}\n")
        message = run("--config-file", stage, "--num-proc", 1, *words)
        assert message.startswith("error: ") and part in message
        assert not made(stage)
    stage.write_text(text + "chunk_length = 1_000_000\n")
    assert "error" not in run("--config-file", stage, "--num-proc", 1, *words)


def test_a_typo_in_where_is_named(run: Callable[..., str], stage: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (stage.parent / "web.jsonl").write_text('{"text": "one", "score": 1}\n{"text": "two", "score": 2}\n')
    stage.write_text(stage.read_text() + 'where = "scor > 0.5"\n')
    assert run("--config-file", stage, "--check", "--num-proc", 1) == "2"
    assert "with an error: where names the field 'scor', which none of the 2 records has" in capsys.readouterr().out


def test_what_check_prints(run: Callable[..., str], stage: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (stage.parent / "web.jsonl").write_text('{"text": "one"}\n{"text": "cut\n{"text": " "}\n')
    run("--config-file", stage, "--check", "--num-proc", 1)
    printed = capsys.readouterr().out
    size = (stage.parent / "web.jsonl").stat().st_size
    for part in (
        "books: books.jsonl",
        "2 documents, 0 blank records",
        "can be read",
        f"1 files of text (1 .jsonl), {size} bytes",
        "1 documents, 1 blank records",
        "1 bad records: broken JSON",
        "web.jsonl line 2: broken JSON: Invalid control",
        "would end with an error: 1 of 3 records (33.333%) are bad (1 broken JSON), and on_bad_record is stop",
    ):
        assert part in printed, printed


def test_a_script_that_is_killed_goes_on(stage: Path, run: Callable[..., str]) -> None:
    """As a user does it: the whole program, its workers too, ended by SIGKILL, and started again."""
    texts = [f"document {i} " + "some words of it " * 3000 for i in range(400)]
    (stage.parent / "books.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    command = [sys.executable, str(SCRIPT), "--config-file", str(stage), "--source", "books", "--num-proc", "2"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    program = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    cache = stage.parent / "cache"
    while not (done := list(cache.glob(".unfinished-*/unit-*.json"))):
        assert program.poll() is None, "it ended before it could be killed"
        time.sleep(0.01)
    program.kill()
    assert program.wait() == -signal.SIGKILL
    kept = done[0].with_suffix(".arrow").stat().st_ino
    assert "books: 400 documents" in run("--config-file", stage, "--source", "books")
    assert kept in [path.stat().st_ino for path in made(stage)["books"].glob("*.arrow")], "it was not written again"
