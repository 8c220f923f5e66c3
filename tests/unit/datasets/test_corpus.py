"""Corpus: lengths and documents, folders made by others, and each way a corpus can be unfit."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from torchtitan.config.data_schema import Data, Source
from torchtitan.datasets.corpus import Corpus, open_corpus
from torchtitan.datasets.tokenizer import Tokenizer
from torchtitan.extensions.ingest import units
from torchtitan.extensions.ingest.resolve import resolve_source
from torchtitan.extensions.ingest.tokenize import tokenize_source
from torchtitan.tools.errors import UserError

MakeSource = Callable[..., Source]
TEXTS = ["text " * (i % 9 + 1) for i in range(60)]


@pytest.fixture
def folder(tokenizer: Tokenizer, data: Data, make_source: MakeSource, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(units, "UNIT_BYTES", 500)
    return tokenize_source(make_source(TEXTS), tokenizer, data, 1)


def test_lengths_and_documents(folder: Path) -> None:
    corpus = open_corpus(folder)
    assert len(list(folder.glob("*.arrow"))) > 3
    assert corpus.lengths.dtype == np.int64
    assert corpus.lengths.tolist() == [len(text) + 2 for text in TEXTS]
    assert corpus.tokens == sum(corpus.lengths)
    for index in (0, 1, 29, 59):
        document = corpus.document(index)
        assert document.dtype == np.int32
        assert document.tolist() == [256, *TEXTS[index].encode(), 257]
        assert not document.flags.owndata and not document.flags.writeable  # a view into the file
    for index in (-1, 60):
        with pytest.raises(IndexError):
            corpus.document(index)


@pytest.mark.parametrize("dtype", ["int32", "int64", "uint16"])
def test_a_folder_made_by_datasets(tmp_path: Path, dtype: str) -> None:
    import datasets

    documents = [[1, 2, 3], [], [4], [5, 6]]
    features = datasets.Features({"n": datasets.Value("int8"), "input_ids": [datasets.Value(dtype)]})
    made = datasets.Dataset.from_dict({"input_ids": documents, "n": [0, 1, 2, 3]}, features=features)
    made.save_to_disk(str(tmp_path / "foreign"), num_shards=2)
    corpus = open_corpus(tmp_path / "foreign", "any tokenizer")
    assert [corpus.document(i).tolist() for i in range(4)] == documents
    assert corpus.document(0).dtype == np.int32
    assert corpus.lengths.tolist() == [3, 0, 1, 2]
    assert corpus.max_token_id is None
    made.select(range(3)).save_to_disk(str(tmp_path / "other"))
    assert open_corpus(tmp_path / "other").fingerprint != corpus.fingerprint
    assert open_corpus(tmp_path / "foreign").fingerprint == corpus.fingerprint


def test_resolve_source(tokenizer: Tokenizer, data: Data, make_source: MakeSource, folder: Path) -> None:
    source = make_source(TEXTS)
    from_text = resolve_source(source, tokenizer, data)
    from_folder = resolve_source(replace(source, path=str(folder)), tokenizer, data)
    assert from_text.fingerprint == from_folder.fingerprint
    assert from_text.max_token_id == 257
    with pytest.raises(UserError, match="data.add_eos = false"):
        resolve_source(replace(source, path=str(folder)), tokenizer, replace(data, add_eos=False))


def test_the_fingerprint_follows_the_content_not_the_processes(
    tokenizer: Tokenizer, data: Data, make_source: MakeSource, tmp_path: Path
) -> None:
    def fingerprint(texts: list[str], cache: str, num_proc: int) -> str:
        there = replace(data, cache_folder=str(tmp_path / cache))
        return open_corpus(tokenize_source(make_source(texts), tokenizer, there, num_proc)).fingerprint

    assert fingerprint(TEXTS, "a", 1) == fingerprint(TEXTS, "b", 2)
    assert fingerprint(TEXTS[::-1], "a", 1) != fingerprint(TEXTS, "a", 1)


def test_text_that_changed(tokenizer: Tokenizer, data: Data, make_source: MakeSource, folder: Path) -> None:
    source = make_source(TEXTS)
    os.utime(source.path)
    open_corpus(folder)  # touched only
    for changed in (["TEXT " + t[5:] for t in TEXTS], TEXTS[:-1]):  # of the same size, and shorter
        make_source(changed)
        with pytest.raises(UserError, match="has changed since it was tokenized"):
            open_corpus(folder)
        assert resolve_source(source, tokenizer, data).folder != str(folder)  # naming the text makes it anew
    os.unlink(source.path)
    open_corpus(folder)  # a corpus outlives its text


def damage(folder: Path, how: str) -> None:
    shard = sorted(folder.glob("*.arrow"))[1]
    metadata = json.loads((folder / "corpus.json").read_text())
    if how == "missing":
        shard.unlink()
    elif how == "short":
        os.truncate(shard, shard.stat().st_size - 8)
    elif how == "garbage":
        shard.write_bytes(b"\x07" * shard.stat().st_size)
    elif how == "no shards":
        state = json.loads((folder / "state.json").read_text()) | {"_data_files": []}
        (folder / "state.json").write_text(json.dumps(state))
    elif how == "fewer documents":
        state = json.loads((folder / "state.json").read_text())
        state["_data_files"].pop()
        (folder / "state.json").write_text(json.dumps(state))
    elif how == "format":
        (folder / "corpus.json").write_text(json.dumps(metadata | {"format": 0}))
    elif how == "broken json":
        (folder / "corpus.json").write_text("{")


@pytest.mark.parametrize(
    "how, words",
    [
        ("missing", ["data-00001", "missing"]),
        ("short", ["data-00001", "bytes"]),
        ("garbage", ["data-00001", "damaged Arrow file"]),
        ("no shards", ["empty"]),
        ("fewer documents", ["60", "was changed"]),
        ("format", ["format 0"]),
        ("broken json", ["corpus.json", "is not JSON"]),
    ],
)
def test_damage(folder: Path, how: str, words: list[str]) -> None:
    damage(folder, how)
    with pytest.raises(UserError) as error:
        open_corpus(folder)
    for word in [str(folder), *words]:
        assert word in str(error.value)


@pytest.mark.parametrize("how", ["short", "garbage"])
def test_damage_without_corpus_json(make_corpus: Callable[..., Corpus], how: str) -> None:
    folder = Path(make_corpus([50] * 10).folder)
    shard = next(folder.glob("*.arrow"))
    if how == "short":
        os.truncate(shard, shard.stat().st_size // 2)
    else:
        shard.write_bytes(b"\x07" * 5000)
    with pytest.raises(UserError, match="damaged Arrow file"):
        open_corpus(folder)


def test_another_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    open_corpus(folder, tokenizer.fingerprint)
    with pytest.raises(UserError) as error:
        open_corpus(folder, "0123456789abcdef")
    for word in (tokenizer.fingerprint[:12], tokenizer.folder, "0123456789ab"):
        assert word in str(error.value)


def test_folders_that_are_no_corpus(tmp_path: Path) -> None:
    import datasets

    with pytest.raises(UserError, match=r"state\.json"):
        open_corpus(tmp_path)
    whole = datasets.Dataset.from_dict({"input_ids": [[1]], "text": ["x"]})
    cases = {
        "splits": (datasets.DatasetDict({"train": whole}), "train"),
        "no_ids": (whole.remove_columns("input_ids"), "no column input_ids"),
        "floats": (datasets.Dataset.from_dict({"input_ids": [[1.5]]}), "integers"),
        "flat": (datasets.Dataset.from_dict({"input_ids": [1, 2]}), "not a list"),
        "nulls": (datasets.Dataset.from_dict({"input_ids": [[1], None]}), "nulls"),
        "empty": (whole.select([]), "empty"),
    }
    for name, (dataset, words) in cases.items():
        dataset.save_to_disk(str(tmp_path / name))
        with pytest.raises(UserError, match=words) as error:
            open_corpus(tmp_path / name)
        assert str(tmp_path / name) in str(error.value)


def test_the_fingerprint_of_a_foreign_folder_follows_lengths_and_tokens(make_corpus: Callable[..., Corpus]) -> None:
    """Same names, sizes and number of rows: a plan made for the one would read beyond the other's documents."""
    assert make_corpus([100, 300], "a").fingerprint != make_corpus([300, 100], "b").fingerprint
    assert make_corpus([100, 300], "c").fingerprint == make_corpus([100, 300], "d").fingerprint
    assert make_corpus([100, 300], "e", first=7).fingerprint != make_corpus([100, 300], "f").fingerprint
