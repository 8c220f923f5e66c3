"""Documents of several parts: the files of a record, and the records of a group, beside a dictionary of lists."""

from __future__ import annotations

import gzip
import json
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from torchtitan.config.data_schema import Data, Source
from torchtitan.config.schema import JobConfig
from torchtitan.datasets import long_text
from torchtitan.datasets.corpus import open_corpus
from torchtitan.datasets.data_checks import check_data
from torchtitan.datasets.tokenizer import Tokenizer
from torchtitan.extensions.ingest import grouping, units
from torchtitan.extensions.ingest.tokenize import tokenize_source
from torchtitan.tools.errors import UserError

Read = Callable[..., list[str]]


@pytest.fixture
def read(tokenizer: Tokenizer, data: Data, tmp_path: Path) -> Read:
    """The texts of the documents of a source under tmp_path."""

    def read(path: str, num_proc: int = 1, **keys: Any) -> list[str]:
        corpus = open_corpus(tokenize_source(Source("t", str(tmp_path / path), **keys), tokenizer, data, num_proc))
        return [bytes(corpus.document(i)[1:-1].astype("uint8")).decode() for i in range(len(corpus))]

    return read


def refused(read: Read, path: str, *words: str, **keys: Any) -> None:
    with pytest.raises(UserError) as caught:
        read(path, **keys)
    for word in words:
        assert word in str(caught.value), (word, str(caught.value))


def records_of(seed: int, count: int) -> list[dict[str, Any]]:
    """Files of repositories of very different sizes, in no order; some are blank, some end without a line break."""
    draw = random.Random(seed)
    records: list[dict[str, Any]] = []
    for number in range(count):
        repo: Any = draw.choice(["big", "big", f"r{draw.randrange(30)}", "zwei wörter", 7, "7"])
        text = draw.choice(["", " \n", f"x = {number}\n", f"é {number}", "line\n" * draw.randrange(90)])
        path = f"{draw.choice('abc')}/{draw.randrange(20)}.py"
        records.append({"repo": repo if isinstance(repo, str) else str(repo), "path": path, "stars": number % 5})
        records[-1] |= {"file": {"text": text}, "n": draw.randrange(1000)}
    return records


def by_hand(records: list[dict[str, Any]], order: str, header: str) -> list[str]:
    """The documents, by a dictionary of lists."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        groups.setdefault(record["repo"], []).append(record)
    documents = []
    for members in groups.values():
        if order:
            members = sorted(members, key=lambda record: record[order])
        texts = [header.format(**m) + m["file"]["text"] for m in members if m["file"]["text"].strip()]
        documents.append("".join(text if text.endswith("\n") else f"{text}\n" for text in texts))
    return [document for document in documents if document]


def test_groups_are_those_of_a_dictionary(read: Read, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grouping, "RUN_BYTES", 700)  # many spans, runs and buckets; groups larger than a run
    monkeypatch.setattr(long_text, "PIECE", 100)
    monkeypatch.setattr(grouping, "LONG", 2000)
    records = records_of(1, 400)
    (tmp_path / "s").mkdir()
    lines = ["".join(json.dumps(record) + "\n" for record in records[part::3]) for part in range(3)]
    (tmp_path / "s" / "a.jsonl").write_text(lines[0])
    (tmp_path / "s" / "b.jsonl.gz").write_bytes(gzip.compress(lines[1].encode()))
    pq.write_table(pa.Table.from_pylist(records[2::3]), tmp_path / "s" / "c.parquet", row_group_size=20)
    as_read = records[0::3] + records[1::3] + records[2::3]
    keys = {"group_by": "repo", "text_field": "file.text"}
    for order, header in (("path", ""), ("n", "<file_sep>{path} {stars}\n"), ("", "# {repo}\n")):
        expected = by_hand(as_read, order, header)
        assert len(max(expected, key=len)) > 2000
        one = read("s", part_order=order, part_header=header, **keys)
        assert sorted(one) == sorted(expected), (order, header)
        for left in (tmp_path / "cache").glob("t-*"):
            shutil.rmtree(left)
        assert read("s", 2, part_order=order, part_header=header, **keys) == one
        assert not list((tmp_path / "cache").glob(".unfinished*"))
    kept = [record for record in as_read if record["stars"] > 2]
    assert sorted(read("s", where="stars > 2", **keys)) == sorted(by_hand(kept, "path", ""))
    refused(
        read, "s/*.jsonl", "names the field 'points', which none of the 134 records", where="points == null", **keys
    )
    assert sorted(read("s", group_by="stars", text_field="file.text", part_order="")) != one  # whole numbers too


def test_a_stopped_grouping_goes_on(read: Read, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grouping, "RUN_BYTES", 700)
    records = records_of(2, 200)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    keys = {"group_by": "repo", "text_field": "file.text"}
    fill, filled = grouping._fill_from, []

    def stop(folder: Path, index: int, *rest: Any) -> Any:
        if index == 9:
            raise OSError("the disk is full")
        filled.append(index)
        return fill(folder, index, *rest)

    monkeypatch.setattr(grouping, "_fill_from", stop)
    refused(read, "a.jsonl", "the disk is full", "start again", **keys)
    assert filled == list(range(9))
    monkeypatch.setattr(grouping, "_fill_from", lambda f, i, *rest: filled.append(i) or fill(f, i, *rest))
    documents, found = grouping._documents, []

    def stop_later(bucket: Any, encoder: Any) -> Any:
        if len(found) == 2:
            raise OSError("the disk is full")
        found.append(bucket.index)
        return documents(bucket, encoder)

    monkeypatch.setattr(grouping, "_documents", stop_later)
    refused(read, "a.jsonl", "the disk is full", **keys)
    assert sorted(filled) == list(range(len(filled))) and len(filled) > 12
    monkeypatch.setattr(grouping, "_documents", lambda b, e: found.append(b.index) or documents(b, e))
    assert sorted(read("a.jsonl", **keys)) == sorted(by_hand(records, "path", ""))
    assert len(found) == len(set(found)) and sorted(filled) == list(range(len(filled)))  # nothing was made twice


def test_files_of_one_record(read: Read, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in The Stack v2's train-smol, with the content that its script adds."""
    monkeypatch.setattr(units, "UNIT_BYTES", 500)
    draw = random.Random(3)
    records = []
    for number in range(40):
        files: list[dict[str, Any]] = [
            {"path": f"/{draw.choice('abc')}{i}.py", "content": draw.choice([f"a{number}", "b\n", "", None]), "n": -i}
            for i in range(draw.randint(0, 6))
        ]
        draw.shuffle(files)
        records.append({"repo_name": f"r{number}", "files": files or None})
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "a.parquet", row_group_size=7)
    for order, header in (("path", ""), ("n", "// {path}\n"), ("", "")):
        expected = []
        for record in records:
            files = record["files"] or []
            files = sorted(files, key=lambda file: file[order]) if order else files
            texts = [header.format(**file) + file["content"] for file in files if file["content"]]
            expected.append("".join(text if text.endswith("\n") else f"{text}\n" for text in texts))
        for name in ("a.jsonl", "a.parquet"):
            keys = {"text_field": "files[].content", "part_order": order, "part_header": header}
            assert read(name, **keys) == [text for text in expected if text], (name, order)


WRONG: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"text": "a", "path": "p"}, {"group_by": "repo"}, "line 2: the field 'repo' (group_by) is null"),
    ({"text": "a", "path": "p", "repo": 0.5}, {"group_by": "repo"}, "line 2: the field 'repo' (group_by) is 0.5"),
    ({"text": "a", "repo": "r"}, {"group_by": "repo"}, "line 2: the field 'path' (part_order) is null"),
    ({"text": "a", "repo": "r"}, {"group_by": "repo", "part_order": "", "part_header": "{x}"}, "line 2: no field 'x'"),
    ({"text": "a", "repo": "r", "path": 3}, {"group_by": "repo"}, "group \"r\": some parts of 'r' are ordered by text"),
    ({"text": "a", "repo": "r", "path": "p"}, {"group_by": "repo", "text_field": "body"}, "line 1: no field 'body'"),
    ({"files": "a"}, {"text_field": "files[].text"}, "line 2: the field 'files' is no list of objects"),
    ({"files": [{"path": "a"}]}, {"text_field": "files[].text"}, "line 2: a file of 'files' has no field 'text'"),
    ({"files": [{"text": 3, "path": "a"}]}, {"text_field": "files[].text"}, "'files[].text' is a int, not text"),
    ({"files": [{"text": "a"}]}, {"text_field": "files[].text"}, "line 2: the field 'path' (part_order) is null"),
]


def test_parts_that_cannot_be_put_together(read: Read, tmp_path: Path) -> None:
    good = {"text": "a", "path": "p", "repo": "r", "x": "y", "files": [{"text": "a", "path": "p"}]}
    for record, keys, says in WRONG:
        (tmp_path / "w.jsonl").write_text(json.dumps(good) + "\n" + json.dumps(record) + "\n")
        refused(read, "w.jsonl", says, **keys)
    (tmp_path / "a.txt").write_text("text")
    refused(read, "a.txt", "group_by = 'repo'", "a.txt is a text without fields", group_by="repo")
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "w.parquet")
    refused(read, "w.parquet", "no column 'repo' (the source's group_by)", group_by="repo")


CONTRADICT: list[tuple[dict[str, Any], str]] = [
    ({"part_order": "n"}, "part_order = 'n' is read with group_by"),
    ({"part_header": "n"}, "part_header = 'n' is read with group_by"),
    ({"text_field": "[].a"}, "write the list, [] and one field"),
    ({"text_field": "a[]"}, "write the list, [] and one field"),
    ({"text_field": "a[].b[].c"}, "write the list, [] and one field"),
    ({"group_by": "r", "text_field": "a[].b"}, "cannot be used with text_field"),
    ({"group_by": "r", "messages_field": "m", "long_document": "drop"}, "cannot be used with messages_field"),
    ({"group_by": "r", "on_bad_record": "skip"}, "cannot be used with on_bad_record"),
    ({"group_by": "r", "path": "hub:a/b"}, "cannot be used with a path of the hub"),
    ({"messages_format": "alpaca"}, "is read with messages_field, which is not set"),
]


def test_keys_that_contradict_each_other() -> None:
    for keys, says in CONTRADICT:
        source = replace(Source("s", "a.jsonl"), **keys)
        with pytest.raises(UserError) as caught:
            check_data(JobConfig(data=Data(sources=(source,))))
        assert says in str(caught.value), (keys, str(caught.value))
