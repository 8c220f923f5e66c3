"""tokenize_source: what is written, that it does not depend on processes, the cache, and each bad input."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from torchtitan.config.data_schema import Data, Source
from torchtitan.datasets.corpus import open_corpus
from torchtitan.datasets.tokenizer import Tokenizer
from torchtitan.extensions.ingest import source_files, units
from torchtitan.extensions.ingest.resolve import resolve_source
from torchtitan.extensions.ingest.tokenize import tokenize_source
from torchtitan.tools.errors import UserError

MakeSource = Callable[..., Source]
TEXTS = [f"document {i} " + "xyz é\n" * (i * 7 % 50) for i in range(200)]


def documents(folder: Path) -> list[list[int]]:
    corpus = open_corpus(folder)
    return [corpus.document(i).tolist() for i in range(len(corpus))]


def expected(texts: list[str], bos: bool = True, eos: bool = True) -> list[list[int]]:
    return [[256] * bos + list(t.encode()) + [257] * eos for t in texts if t.strip()]


def folders_in(data: Data) -> list[Path]:
    return [path for path in Path(data.cache_folder).glob("*") if path.is_dir()]


@pytest.mark.parametrize("num_proc", [1, 2, 3])
@pytest.mark.parametrize("unit", [50, 1000, 1 << 20])
def test_documents_do_not_depend_on_processes_or_units(
    tokenizer: Tokenizer, data: Data, make_source: MakeSource, monkeypatch: pytest.MonkeyPatch, num_proc: int, unit: int
) -> None:
    monkeypatch.setattr(units, "UNIT_BYTES", unit)
    monkeypatch.setattr(units, "RECORD_BATCH_TOKENS", 500)
    folder = tokenize_source(make_source(TEXTS), tokenizer, data, num_proc)
    assert documents(folder) == expected(TEXTS)


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("eos", [True, False])
def test_ends_follow_the_policy(
    tokenizer: Tokenizer, data: Data, make_source: MakeSource, bos: bool, eos: bool
) -> None:
    folder = tokenize_source(make_source(TEXTS), tokenizer, replace(data, add_bos=bos, add_eos=eos), 1)
    assert documents(folder) == expected(TEXTS, bos, eos)


def test_kinds_of_text_in_sorted_order(tokenizer: Tokenizer, data: Data, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = tmp_path / "text"
    (folder / "sub").mkdir(parents=True)
    (folder / ".hidden").mkdir()
    (folder / "b.txt").write_text("two\nlines")
    (folder / "bom.txt").write_bytes(b"\xef\xbb\xbfmark")
    (folder / "a.jsonl").write_text('{"text": "j1"}\n\n{"text": "", "x": 1}\n{"text": null}\n{"text": "j\\u00e9"}')
    pq.write_table(
        pa.table({"text": ["p1", " \n", None, "p2"], "n": [1, 2, 3, 4]}), folder / "c.parquet", row_group_size=3
    )
    (folder / "sub" / "a.txt").write_text("last")
    (folder / "README.md").write_text("passed over")
    (folder / ".hidden" / "x.txt").write_text("passed over")
    made = tokenize_source(Source(name="all", path=str(folder)), tokenizer, data, 2)
    assert documents(made) == expected(["j1", "jé", "two\nlines", "mark", "p1", "p2", "last"])
    assert json.loads((made / "corpus.json").read_text())["empty_documents"] == 4
    made = tokenize_source(Source(name="glob", path=str(folder / "**" / "*.txt")), tokenizer, data, 2)
    assert documents(made) == expected(["two\nlines", "mark", "last"])


def test_relative_paths_start_at_data_folder(
    tokenizer: Tokenizer, data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = tmp_path / "all [of] it"  # no pattern, though it looks like one
    (start / "books").mkdir(parents=True)
    (start / "books" / "a.txt").write_text("one")
    (start / "books" / "b.txt").write_text("two")
    there = replace(data, folder=str(start))
    for path, texts in (
        ("books", ["one", "two"]),
        ("books/b.txt", ["two"]),
        ("books/*.txt", ["one", "two"]),
        (str(start / "books" / "a.txt"), ["one"]),
    ):
        assert documents(tokenize_source(Source(name="s", path=path), tokenizer, there, 1)) == expected(texts)
    made = tokenize_source(Source(name="s", path="books"), tokenizer, there, 1)
    made.rename(start / "made")
    assert resolve_source(Source(name="s", path="made"), tokenizer, there).folder == str(start / "made")
    with pytest.raises(UserError, match=r"No file matches.*all \[of\] it/books/c.txt"):
        tokenize_source(Source(name="s", path="books/c.txt"), tokenizer, there, 1)
    monkeypatch.setenv("HOME", str(tmp_path))
    for folder, path in (("~/all [of] it", "books"), ("elsewhere", "~/all [of] it/books")):
        assert (
            len(documents(tokenize_source(Source(name="h", path=path), tokenizer, replace(data, folder=folder)))) == 2
        )


def test_the_folder_is_a_hugging_face_dataset(tokenizer: Tokenizer, data: Data, make_source: MakeSource) -> None:
    import datasets

    folder = tokenize_source(make_source(TEXTS), tokenizer, data, 1)
    loaded = datasets.load_from_disk(str(folder))
    assert loaded["input_ids"][:] == expected(TEXTS)
    assert loaded.features["input_ids"].feature.dtype == "int32"


def test_corpus_json(tokenizer: Tokenizer, data: Data, make_source: MakeSource) -> None:
    metadata = json.loads((tokenize_source(make_source(TEXTS), tokenizer, data, 1) / "corpus.json").read_text())
    tokens = expected(TEXTS)
    assert (metadata["documents"], metadata["tokens"]) == (len(tokens), sum(map(len, tokens)))
    assert metadata["max_token_id"] == 257
    assert metadata["tokenizer"] == tokenizer.fingerprint


class CountingTokenizer:
    """Makes a tokenizer that counts the documents it is given."""

    def __init__(self, base: Tokenizer) -> None:
        self.count = 0

        def encode_batch(texts: list[str]) -> list[list[int]]:
            self.count += len(texts)
            return base.encode_batch(texts)

        self.tokenizer = replace(base, _encode_batch=encode_batch)


def test_the_cache_is_used_until_an_input_changes(
    tokenizer: Tokenizer, data: Data, make_source: MakeSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    counting = CountingTokenizer(tokenizer)
    source = make_source(TEXTS[:10])
    first = tokenize_source(source, counting.tokenizer, data, 1)
    os.utime(source.path)  # touched, not changed
    assert tokenize_source(source, counting.tokenizer, data, 1) == first
    assert counting.count == 10

    read_again: list[str] = []
    monkeypatch.setattr(source_files, "hash_file", lambda path: read_again.append(path) or "0")
    assert tokenize_source(source, counting.tokenizer, data, 1) == first
    assert read_again == []  # size and mtime are as they were: not even read
    monkeypatch.undo()

    folders = {
        first,
        tokenize_source(source, replace(counting.tokenizer, fingerprint="e" * 64), data, 1),
        tokenize_source(source, counting.tokenizer, replace(data, add_bos=False), 1),
        tokenize_source(source, counting.tokenizer, replace(data, add_eos=False), 1),
        tokenize_source(make_source(["other", *TEXTS[1:10]]), counting.tokenizer, data, 1),
    }
    assert len(folders) == 5
    assert counting.count == 50


def test_corpora_of_older_versions_are_found_again(
    tokenizer: Tokenizer, data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names as commit 89cc635 wrote them for this input; how it is cut into shards is no part of them."""
    monkeypatch.setattr(units, "UNIT_BYTES", 200)
    (tmp_path / "text").mkdir()
    texts = ["line é\n" * i for i in range(20)]
    (tmp_path / "text" / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (tmp_path / "text" / "b.txt").write_text("two\nlines")
    source = Source(name="old text", path=str(tmp_path / "text"))
    for eos, name in ((True, "old_text-16ddb0b571bff3d5"), (False, "old_text-e145c562b7741f31")):
        folder = tokenize_source(source, tokenizer, replace(data, add_eos=eos), 1)
        assert folder.name == name and documents(folder) == expected([*texts, "two\nlines"], eos=eos)
    mds = Path(__file__).parent / "data"
    for name in ("mds_packed-a8d41dc9e67a840c", "mds_zstd-91cd2d2d56e00b97"):
        source = Source(name=name.partition("-")[0], path=str(mds / name.partition("-")[0]))
        assert tokenize_source(source, replace(tokenizer, vocab_size=1000), data, 1).name == name


def test_text_needs_no_other_format(tmp_path: Path) -> None:
    """What reads MDS, the hub and conversations is imported when a source needs it."""
    (tmp_path / "a.txt").write_text("text")
    program = f"""
import sys
from torchtitan.config.data_schema import Data, Source
from torchtitan.datasets.tokenizer import Tokenizer
from torchtitan.extensions.ingest.resolve import resolve_source
tokenizer = Tokenizer("bytes", 258, 256, 257, "f" * 64, lambda texts: [list(text.encode()) for text in texts], None)
data = Data(cache_folder={str(tmp_path / "cache")!r})
assert resolve_source(Source(name="a", path={str(tmp_path / "a.txt")!r}), tokenizer, data).tokens == 6
ingest = "torchtitan.extensions.ingest."
print([name for name in ("mds", "hub", "chat", "chat_template") if ingest + name in sys.modules])
"""
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "[]"


def test_text_of_the_same_size_is_noticed(tokenizer: Tokenizer, data: Data, make_source: MakeSource) -> None:
    first = tokenize_source(make_source(["aaaa"]), tokenizer, data, 1)
    assert documents(first) == expected(["aaaa"])
    source = make_source(["bbbb"])
    os.utime(source.path, ns=(1, 1))
    second = tokenize_source(source, tokenizer, data, 1)
    assert second != first
    assert documents(second) == expected(["bbbb"])


def test_text_that_changes_meanwhile(tokenizer: Tokenizer, data: Data, make_source: MakeSource) -> None:
    source = make_source(TEXTS[:5])

    def changing(texts: list[str]) -> list[list[int]]:
        with open(source.path, "a") as file:
            file.write("\n")
        return tokenizer.encode_batch(texts)

    with pytest.raises(UserError, match="changed while it was being tokenized"):
        tokenize_source(source, replace(tokenizer, _encode_batch=changing), data, 1)
    assert not list(Path(data.cache_folder).glob("*/unit-*.json")), "its unit is not done"
    assert all(folder.name.startswith(".unfinished-") for folder in folders_in(data))


GOOD = b'{"text": "good"}\n'
BAD_TEXT: dict[str, tuple[str, bytes, list[str]]] = {
    "latin-1 txt": ("a.txt", b"caf\xe9", ["a.txt", "UTF-8", "byte 3"]),
    "latin-1 jsonl": ("a.jsonl", GOOD * 40 + b'{"text": "caf\xe9"}\n', ["a.jsonl line 41", "UTF-8"]),
    "half a surrogate pair": ("a.jsonl", GOOD + b'{"text": "\\ud83d"}\n', ["a.jsonl line 2", "UTF-8"]),
    "broken JSON": ("a.jsonl", GOOD * 40 + b'{"text": "cut\n' + GOOD, ["a.jsonl line 41", "broken JSON"]),
    "not an object": ("a.jsonl", GOOD + b"[1]\n", ["a.jsonl line 2", "list"]),
    "missing field": ("a.jsonl", GOOD * 40 + b'{"body": "x", "id": 1}\n', ["line 41", "'text'", "'body', 'id'"]),
    "number": ("a.jsonl", b'{"text": 3}\n', ["line 1", "int"]),
    "no documents": ("a.jsonl", b'{"text": " "}\n\n', ["no document"]),
    "empty file": ("a.jsonl", b"", ["no document"]),
    "unknown extension": ("a.csv", b"text\nx\n", ["a.csv", "'.csv'", ".jsonl, .parquet, .txt"]),
    "not parquet": ("a.parquet", b"PAR1 not really", ["a.parquet", "Parquet"]),
}


@pytest.mark.parametrize("num_proc", [1, 2])
@pytest.mark.parametrize("name", BAD_TEXT)
def test_bad_text(
    tokenizer: Tokenizer, data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, num_proc: int
) -> None:
    monkeypatch.setattr(units, "UNIT_BYTES", 100)  # the bad line is in another unit than the first
    file, content, words = BAD_TEXT[name]
    (tmp_path / file).write_bytes(content)
    with pytest.raises(UserError) as error:
        tokenize_source(Source(name="bad", path=str(tmp_path / file)), tokenizer, data, num_proc)
    for word in words:
        assert word in str(error.value)
    assert "\n" not in str(error.value)
    assert all(folder.name.startswith(".unfinished-bad-") for folder in folders_in(data))


def test_bad_parquet_columns(tokenizer: Tokenizer, data: Data, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "a.parquet"
    for table, words in (
        (pa.table({"body": ["x"], "n": [1]}), ["'text'", "'body', 'n'"]),
        (pa.table({"text": [1, 2]}), ["row 1", "int"]),
    ):
        pq.write_table(table, path)
        with pytest.raises(UserError) as error:
            tokenize_source(Source(name="bad", path=str(path)), tokenizer, data, 1)
        assert all(word in str(error.value) for word in [str(path), *words])


@pytest.mark.parametrize("path", ["nothing", "nothing/*.jsonl", "empty", "only_csv"])
def test_no_file_matches(tokenizer: Tokenizer, data: Data, tmp_path: Path, path: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "only_csv").mkdir()
    (tmp_path / "only_csv" / "a.csv").write_text("x")
    source = Source(name="lost", path=str(tmp_path / path))
    with pytest.raises(UserError, match="lost"):
        tokenize_source(source, tokenizer, data, 1)


@pytest.mark.parametrize("which", ["bos", "eos"])
def test_a_token_that_the_tokenizer_lacks(
    tokenizer: Tokenizer, data: Data, make_source: MakeSource, which: str
) -> None:
    lacking = replace(tokenizer, **{f"{which}_id": None})
    with pytest.raises(UserError, match=f"data.add_{which} = false"):
        tokenize_source(make_source(TEXTS), lacking, data, 1)
    without = replace(data, **{f"add_{which}": False})
    assert documents(tokenize_source(make_source(TEXTS), lacking, without, 1)) == expected(
        TEXTS, bos=which != "bos", eos=which != "eos"
    )
