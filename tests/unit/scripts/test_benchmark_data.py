"""scripts/benchmarks/{data,tokenizing}.py at tiny sizes: they run and print every figure; what is compared is right."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).parents[3]
SCRIPT = REPOSITORY / "scripts" / "benchmarks" / "data.py"
TINY = (
    "--documents=2000 --stage-tokens=3e6 --short-documents=4e5 --short-rows=1 --steps=1 --packing-documents=100 "
    "--tokens=100_000 --plain-tokens=50_000 --row=4096 --turns=1"
)
NUMBER = r"\d[\d,]*(\.\d+)?"
ROWS = {
    "seconds": 1,
    "peak memory of the process": 1,
    "rows of 65,536": 1,
    "parts of documents in them": 1,
    "padding": 1,
    "1 rows of 4M, 400,000 documents of 12 tokens: seconds": 1,
    "their peak memory": 1,
    "attention alone, over the step": 3,
    "attention alone, in lock-step micro-batches": 3,
    "attention and linear layers, over the step": 3,
    "attention and linear layers, in lock-step micro-batches": 3,
    "best_fit": 3,
    "concat": 3,
    "one loader worker": 3,
    "in the training process": 3,
}
"""Rows of the tables, and how many figures each has (beside targets)."""


def test_it_prints_every_figure(tmp_path: Path) -> None:
    # A process of its own, as it is used: it forks, pins itself to a core and sets torch's threads.
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *TINY.split(), f"--scratch={tmp_path}"],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    assert re.match(r"\d{4}-\d\d-\d\d, \d+ cores .*Python 3.*torch \d.*numpy \d.*datasets \d", done.stdout)
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in done.stdout.splitlines() if "|" in line]
    printed = {row[0]: row[1:] for row in cells}
    for name, figures in ROWS.items():
        assert all(re.match(NUMBER, cell) for cell in printed[name][:figures]), (name, printed[name])
    assert list(tmp_path.iterdir()) == []  # the corpus is gone


def test_tokenizing_is_compared_with_datasets_token_by_token(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT.with_name("tokenizing.py")), "--megabytes=1", "--turns=1", f"--scratch={tmp_path}"],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr  # it compares the ids of both sides itself
    for name in ("tokenize_source", "load_dataset, map, save_to_disk", "its map alone"):
        assert re.search(rf"\| {name} +\| +{NUMBER}", done.stdout), done.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("seq_len", [4, 7, 100])
def test_the_plain_rows_are_rows_like_ours(seq_len: int) -> None:
    spec = importlib.util.spec_from_file_location("scripts_benchmark_data", SCRIPT)
    assert spec and spec.loader
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    lengths = [3, 1, 25, 4, 80, 7, 90]
    ids = iter(range(sum(lengths)))
    documents = [{"input_ids": [next(ids) for _ in range(n)]} for n in lengths]
    rows = list(script.plain_rows(documents, seq_len))
    assert len(rows) == sum(lengths) // seq_len
    assert torch.cat([row[0] for row in rows]).tolist() == list(range(len(rows) * seq_len))
    beginnings = [document["input_ids"][0] for document in documents]
    for tokens, labels, positions, ends in rows:
        assert ends[0] == 0 and ends[-1] == seq_len
        cuts = {0, *(i for i, token in enumerate(tokens.tolist()) if token in beginnings)}
        assert ends.tolist() == sorted(cuts | {seq_len})
        for begin, end in zip(ends.tolist(), ends[1:].tolist()):
            assert labels[begin:end].tolist() == [*tokens[begin + 1 : end].tolist(), -100]
            assert positions[begin:end].tolist() == list(range(end - begin))
