"""Small tokenizers and corpora for the tests of the data room, one of 10,000 documents in four domains; and a process
group of one process."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from torchtitan.config.data_schema import Data, Source
from torchtitan.datasets.corpus import Corpus, open_corpus
from torchtitan.datasets.tokenizer import Tokenizer


def encode_bytes(texts: list[str]) -> list[list[int]]:
    return [list(text.encode()) for text in texts]


@pytest.fixture(scope="module")
def one_process() -> Iterator[None]:
    """What is collective works in this process alone."""
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


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


DOMAINS = {"books": (11.3, 0.8, 1000), "code": (9.0, 1.3, 2000), "web": (6.6, 1.1, 5000), "wiki": (6.0, 1.4, 2000)}
"""Mean and deviation of the logarithm of the lengths, and documents."""


@pytest.fixture(scope="session")
def domains() -> dict[str, Corpus]:
    """10,000 documents of 100 to 500,000 tokens in four domains, each token told apart by expected_tokens."""
    random = np.random.default_rng(0)
    made = {}
    for name, (mean, deviation, documents) in DOMAINS.items():
        lengths = np.exp(random.normal(mean, deviation, documents)).clip(100, 500_000).astype(np.int64)
        lengths[:2] = 100, 500_000
        ends = np.cumsum(lengths)
        begins = (ends - lengths).astype(np.uint32)
        numbers = np.repeat(np.arange(documents, dtype=np.uint32), lengths)
        values = expected_tokens(numbers, np.arange(ends[-1], dtype=np.uint32) - np.repeat(begins, lengths))
        made[name] = Corpus(name, [(np.concatenate([[0], ends]), values)], name, None)
    assert sum(len(corpus) for corpus in made.values()) == 10_000
    return made


def expected_tokens(document: np.ndarray, place: np.ndarray) -> np.ndarray:
    """int32 of the domains' corpora: (document * 1,000,003 + place) mod 2^31, of which uint32 keeps the lower bits."""
    wrapped = document.astype(np.uint32) * np.uint32(1_000_003) + place.astype(np.uint32)
    return (wrapped & np.uint32(2**31 - 1)).astype(np.int32)


def domain_data(weights: Sequence[float] = (0.35, 0.25, 0.25, 0.15), **options: Any) -> Data:
    """[data] over the four domains; options of a source as books__chunk_length=..."""
    sources = [Source(name=name, path=name, weight=weight) for name, weight in zip(DOMAINS, weights)]
    for key in [key for key in options if "__" in key]:
        name, _, option = key.partition("__")
        index = list(DOMAINS).index(name)
        sources[index] = replace(sources[index], **{option: options.pop(key)})
    return Data(sources=tuple(sources), **options)
