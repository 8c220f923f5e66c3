"""Small tokenizers and corpora for the tests of the data room."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from torchtitan.components.tokenizer import Tokenizer
from torchtitan.config.job_config import Data, Source
from torchtitan.datasets.corpus import Corpus, open_corpus


def encode_bytes(texts: list[str]) -> list[list[int]]:
    return [list(text.encode()) for text in texts]


@pytest.fixture
def tokenizer() -> Tokenizer:
    """Bytes as ids; 256 begins and 257 ends a document."""
    return Tokenizer("assets/bytes", 258, 256, 257, "f" * 64, encode_bytes, lambda ids: bytes(ids).decode())


@pytest.fixture
def data(tmp_path: Path) -> Data:
    return Data(cache_folder=str(tmp_path / "cache"))


@pytest.fixture
def make_source(tmp_path: Path) -> Callable[..., Source]:
    """Writes texts to a .jsonl file and returns it as a source."""

    def make(texts: Sequence[str], name: str = "source") -> Source:
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        return Source(name=name, path=str(path))

    return make


@pytest.fixture
def make_corpus(tmp_path: Path) -> Callable[..., Corpus]:
    """A corpus with documents of the given lengths, as a foreign save_to_disk folder. No token occurs twice in it."""
    import datasets

    def make(lengths: Sequence[int], name: str = "corpus", first: int = 0) -> Corpus:
        ends = np.cumsum(lengths)
        documents = [list(range(first + end - n, first + end)) for n, end in zip(lengths, ends)]
        datasets.disable_progress_bars()
        datasets.Dataset.from_dict({"input_ids": documents}).save_to_disk(str(tmp_path / name))
        return open_corpus(tmp_path / name)

    return make
