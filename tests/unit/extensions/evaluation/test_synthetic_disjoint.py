"""Synthetic training data and the evaluation's questions have no item in common: no word, key, value or sentence."""

from __future__ import annotations

import re
import uuid

import pytest
import torch

from tests.distributed.harness import ASSETS
from torchtitan.config.data_schema import Data, Source
from torchtitan.datasets.corpus import open_corpus
from torchtitan.datasets.tokenizer import load_tokenizer
from torchtitan.extensions.evaluation import needle, recall, ruler, words
from torchtitan.extensions.ingest.synthetic.source import TASKS
from torchtitan.extensions.ingest.synthetic.words import ADJECTIVES, NOUNS
from torchtitan.extensions.ingest.tokenize import tokenize_source

TOKENIZER = load_tokenizer(ASSETS)
SEEDS = range(8)
TEXT = " ".join(f"The river {i} is near the stone. A bird sees it.\n" for i in range(900))
SHARED = 6
"""Consecutive words that count as a shared sentence."""


def runs(text: str) -> set[tuple[str, ...]]:
    said = re.findall(r"\w+", text.lower())
    return {tuple(said[i : i + SHARED]) for i in range(len(said) - SHARED + 1)}


@pytest.fixture(scope="module")
def synthetic_texts(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Documents of all tasks that need no file, over all seeds."""
    cache = str(tmp_path_factory.mktemp("cache"))
    texts = []
    for seed in SEEDS:
        source = Source(name="s", kind="synthetic", tasks=tuple(TASKS), make_tokens=18_000, lengths=(1500,), seed=seed)  # type: ignore[arg-type]
        corpus = open_corpus(tokenize_source(source, TOKENIZER, Data(cache_folder=cache), 1))
        texts += [TOKENIZER.decode(corpus.document(i).tolist()) for i in range(len(corpus))]
    return texts


def test_no_item_is_shared(synthetic_texts: list[str]) -> None:
    made = "\n".join(synthetic_texts)
    trained = set(re.findall(r"[\w-]+", made))
    sentences = set().union(*map(runs, synthetic_texts))
    ids = TOKENIZER.encode(TEXT)
    for seed in SEEDS:
        items = [
            item
            for task in (*ruler.TASKS.values(), *recall.TASKS.values())
            for item in task.make(TOKENIZER, TEXT, 2048, 2, seed, None)
        ]
        items += needle.NeedleTask((0.0, 0.5, 1.0)).make(TOKENIZER, torch.tensor(ids), 1024, 2, seed, None)
        for item in items:
            text = TOKENIZER.decode([*item.prompt.tolist(), *item.target.tolist()])
            assert not runs(text) & sentences, (item.task, runs(text) & sentences)
            assert not {*item.answers} & trained, item.task
            asked = re.findall(r"\b\d{5}\b|\b\d{7}\b|[0-9a-f]{8}-[0-9a-f-]{27}|\b[A-Z]{5}\b|[a-z]+-[a-z]+", text)
            assert not {*asked} & trained, item.task


def test_by_its_form_no_item_can_be_shared(synthetic_texts: list[str]) -> None:
    """What the evaluation draws is of a form that no synthetic document has, whatever the seeds."""
    there = {word.lower() for word in (*words.ADJECTIVES, *words.NOUNS, *needle.COLOURS, *needle.THINGS)}
    assert not there & {*ADJECTIVES, *NOUNS} and not {*ADJECTIVES} & {*NOUNS}
    assert len({*ADJECTIVES}) == len(ADJECTIVES) > 200 and len({*NOUNS}) == len(NOUNS) > 300
    assert not [word for word in (*ADJECTIVES, *NOUNS) if len(word) == ruler.CODE_LETTERS or not word.islower()]
    made = "\n".join(synthetic_texts)
    assert not re.findall(r"\b(?:\d{5}|\d{7}|[A-Z]{3}|[A-Z]{5})\b", re.sub(r"[0-9a-f]{8}-[0-9a-f-]{27}", "", made))
    versions = {uuid.UUID(text).version for text in re.findall(r"[0-9a-f]{8}-[0-9a-f-]{27}", made)}
    assert versions == {5}  # the evaluation's are of version 4
    assert not re.findall(r"\b[a-z]+-[a-z]+\b", re.sub(r"[0-9a-f]{8}-[0-9a-f-]{27}", "", made))
