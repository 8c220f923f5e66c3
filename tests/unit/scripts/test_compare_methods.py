"""scripts/studies/compare_methods.py without its training: documents, stages, the table and the plot."""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.scripts import load_script
from torchtitan.config import load_config
from torchtitan.datasets.tokenizer import load_tokenizer
from torchtitan.extensions.cluster.check_config import check_tables
from torchtitan.extensions.evaluation.forward import Ranks
from torchtitan.models.transformer import TransformerArgs

compare = load_script("studies/compare_methods")


def test_documents_can_be_completed_by_copying_alone(tmp_path: Path) -> None:
    """Every fact has the same values wherever it stands, and no word belongs to two facts; a needle is stated once at
    the beginning and asked for at the end. A word is a token."""
    words = compare.find_words()
    compare.write_assets(words, tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    keys, random = set(words.keys), np.random.default_rng(0)
    for length in (compare.SHORTEST, compare.SHORT, compare.LONG):
        for far, needle in ((False, False), (True, False), (True, True)):
            document = compare.make_document(words, length, random, far, needle)
            ids = tokenizer.encode(" ".join(document))
            assert len(document) == length == len(ids)
            assert [words.all[i] for i in ids] == document
            at = [i for i, word in enumerate(document) if word in keys and i + compare.IN_FACT < length]
            facts = {(document[i], *document[i + 1 : i + 1 + compare.IN_FACT]) for i in at}
            assert max(Counter(word for fact in facts for word in fact).values()) == 1
            assert len(at) >= 2 * len(facts) or needle
            twice = [key for key, count in Counter(document[i] for i in at).items() if count == 2]
            assert (len(twice) >= len(facts) // 2) == (far or len(facts) < 2)
            if needle:
                fact = document[: 1 + compare.IN_FACT]
                assert document[-1 - compare.IN_FACT :] == fact and document.count(fact[0]) == 2


def test_every_method_is_a_stage_of_the_same_budget(tmp_path: Path) -> None:
    own = argparse.Namespace(steps=20, far_steps=10, extension_steps=10, batch=8192, lr=1e-3, processes=2)
    compare.write_stages(tmp_path, own)
    tokens = set()
    for name in ("1k", *compare.METHODS):
        config = load_config(["--job.config_file", str(tmp_path / f"{name}.toml")])
        check_tables(config, own.processes)
        if name in compare.METHODS and name != "untouched":
            assert config.training.seq_len == compare.METHODS[name].length
            tokens.add(config.training.steps * (config.training.global_batch_tokens or 0))
    assert tokens == {10 * 8192}


def test_a_batch_that_rows_do_not_fill_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for wrong in (["--batch", "6000"], ["--batch", "0"], ["--processes", "3"]):
        with pytest.raises(SystemExit):
            compare.main([str(tmp_path / "work"), *wrong])
        assert "--batch must be a multiple of 4096" in capsys.readouterr().err
    assert not (tmp_path / "work").exists()


def test_recalled_are_all_the_values_of_a_fact() -> None:
    """By a stand-in whose likeliest token behind n is n + 1."""

    class Next(torch.nn.Module):
        args = TransformerArgs(16, 1, 2, 1, 8, 16, 32)

        def forward(self, tokens: torch.Tensor, *_: Any, only: torch.Tensor, **__: Any) -> torch.Tensor:
            return torch.eye(self.args.vocab_size)[tokens + 1][only]

    loaded: Any = SimpleNamespace(model=Next(), ranks=Ranks())
    assert compare.recalled(loaded, [3, 9, 10, 11, 12], 3)
    for at in (-1, -2, -3):
        tokens = [3, 9, 10, 11, 12]
        tokens[at] += 5
        assert not compare.recalled(loaded, tokens, 3)


def test_the_table_and_the_plot(tmp_path: Path) -> None:
    buckets = len(compare.EDGES) - 1
    counts = list(np.diff(compare.EDGES))
    recall = [1.0] * compare.LENGTHS.index(compare.SHORT) + [0.5] * (
        len(compare.LENGTHS) - compare.LENGTHS.index(compare.SHORT)
    )
    flat = {"recall": recall, "nll": [2.0] * buckets, "count": counts, "short": 2.0}
    worse = flat | {"nll": [2.0 if edge < compare.SHORT else 5.0 for edge in compare.EDGES[:-1]]}
    better = flat | {"short": 1.9, "nll": [1.9 if edge < compare.SHORT else 1.0 for edge in compare.EDGES[:-1]]}
    table = compare.markdown({"untouched": worse, "abf": better})
    assert "| untouched | 1,024 | 50% |" in table and "| 2.000 | 5.000 | 5.000 | 2.000 | +0.0% |" in table
    assert "| 1.900 | 1.000 | 1.000 | 1.900 | -5.0% |" in table
    compare.draw({"untouched": worse, "abf": better}, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes()[:4] == b"\x89PNG"
    assert compare.mean_loss(worse, 0, compare.LONG) == pytest.approx((2 + 3 * 5) / 4)
