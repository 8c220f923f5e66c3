"""Documents with a loss on some tokens only, which someone else tokenized, are not cut unless a source says so."""

from __future__ import annotations

import logging
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from torchtitan.config.data_schema import Data, Point, Source
from torchtitan.datasets.corpus import Corpus
from torchtitan.datasets.masked_documents import check_masked
from torchtitan.datasets.tokenizer import Tokenizer
from torchtitan.extensions.ingest.resolve import resolve_source
from torchtitan.tools.errors import UserError

LENGTHS = (5, 30, 12, 31, 8)


@pytest.fixture(params=["labels", "loss_mask", "roles"])
def corpus(request: pytest.FixtureRequest, tokenizer: Tokenizer, tmp_path: Path) -> Corpus:
    column = {
        "labels": [[-100] * (n - 2) + [7, 7] for n in LENGTHS],
        "loss_mask": [[0] * (n - 2) + [1, 1] for n in LENGTHS],
        "roles": [[1] * (n - 2) + [4, 4] for n in LENGTHS],
    }[request.param]
    pq.write_table(pa.table({"input_ids": [[7] * n for n in LENGTHS], request.param: column}), tmp_path / "a.parquet")
    source = Source("rows", str(tmp_path / "a.parquet"))
    return resolve_source(source, tokenizer, Data(cache_folder=str(tmp_path / "cache")))


def check(corpus: Corpus, seq_len: int = 16, packing: str = "best_fit", **keys: object) -> None:
    data = Data(sources=(Source("rows", "a", **keys),), packing=packing)  # type: ignore[arg-type]
    check_masked(data, [corpus], seq_len)


def test_what_would_be_cut_is_refused(corpus: Corpus) -> None:
    """How many documents are longer than the limit, counted by hand."""
    for keys, count, limit in (
        ({}, 2, 16),
        ({"seq_len": 30}, 1, 30),
        ({"chunk_length": 8}, 3, 8),
        ({"packing": "single"}, 2, 16),
        ({"max_length": 30}, 1, 16),
        ({"max_documents": 3}, 1, 16),
        ({"weight": 0.0, "schedule": (Point(0, 0.0), Point(5, 1.0))}, 2, 16),
    ):
        words = f"'rows' has labels, a mask or roles.* and {count} of its 5 documents are longer than {limit} tokens"
        with pytest.raises(UserError, match=f'{words}.*"drop".*"truncate".*long_document = "split"'):
            check(corpus, **keys)  # type: ignore[arg-type]
    for long_document in (None, "drop", "truncate"):
        with pytest.raises(UserError, match='packing = "concat" would cut.*"best_fit"'):
            check(corpus, seq_len=99, packing="concat", long_document=long_document)


def test_what_is_not_cut_is_taken(corpus: Corpus, caplog: pytest.LogCaptureFixture) -> None:
    check(corpus, seq_len=31)
    check(corpus, max_length=16)
    check(corpus, max_documents=1)
    for long_document in ("drop", "truncate"):
        check(corpus, long_document=long_document)
    data = Data(sources=(Source("rows", "a", weight=0.0), Source("other", "b", long_document="drop")))
    check_masked(data, [corpus, corpus], 16)  # nothing is read of the first
    check(corpus, seq_len=31, long_document="split")
    assert not caplog.records


def test_to_cut_can_be_meant(corpus: Corpus, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        check(corpus, long_document="split")
        check(corpus, packing="concat", long_document="split")
    first, second = caplog.messages
    assert "every 16 tokens: 2 of 5 are longer" in first and "where rows end" in second
