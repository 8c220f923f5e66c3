"""Arrow files and folders of save_to_disk as text, written by their own writers; what can be wrong in them."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest

from torchtitan.config.data_schema import Data, Source
from torchtitan.datasets.corpus import open_corpus
from torchtitan.datasets.tokenizer import Tokenizer
from torchtitan.extensions.ingest import text, units
from torchtitan.extensions.ingest.resolve import resolve_source
from torchtitan.extensions.ingest.tables import spans_of_table
from torchtitan.extensions.ingest.tokenize import tokenize_source
from torchtitan.tools.errors import UserError

ROWS: list[dict[str, Any]] = [
    {"text": f"row {i} é" * (1 + i * 7 % 50), "meta": {"set": "AB"[i % 2]}, "n": i} for i in range(300)
]
TEXTS = [row["text"] for row in ROWS]


@pytest.fixture
def read(tokenizer: Tokenizer, data: Data, tmp_path: Path) -> Callable[..., list[str]]:
    """The texts of the documents of a source under tmp_path, as resolve_source finds it."""

    def read(path: str, num_proc: int = 1, **keys: Any) -> list[str]:
        source = Source("t", str(tmp_path / path), **keys)
        if num_proc > 1:
            tokenize_source(source, tokenizer, data, num_proc)
        corpus = resolve_source(source, tokenizer, data)
        return [bytes(corpus.document(i)[1:-1].astype("uint8")).decode() for i in range(len(corpus))]

    return read


def refused(read: Callable[..., list[str]], path: str, *words: str, **keys: Any) -> None:
    with pytest.raises(UserError) as caught:
        read(path, **keys)
    for word in (path.split("/")[0], *words):
        assert word in str(caught.value), (word, str(caught.value))


@pytest.fixture(autouse=True)
def quiet() -> None:
    datasets.disable_progress_bars()


def write_arrow(folder: Path) -> list[str]:
    """ROWS in Arrow files of every kind; their names."""
    table = pa.Table.from_pylist(ROWS)
    batches = table.to_batches(max_chunksize=37)
    for name, options in {
        "stream": None,
        "zstd": pa.ipc.IpcWriteOptions(compression="zstd"),
        "whole": None,
    }.items():
        with pa.ipc.new_stream(folder / f"{name}.arrow", table.schema, options=options) as stream:
            for batch in batches if name != "whole" else table.to_batches():
                stream.write_batch(batch)
    with pa.ipc.new_file(folder / "file.arrow", table.schema) as file:
        for batch in batches:
            file.write_batch(batch)
    pyarrow.feather.write_feather(table, folder / "feather.arrow", compression="lz4")
    named = table.set_column(0, "text", table["text"].dictionary_encode())
    with pa.ipc.new_stream(folder / "dictionary.arrow", named.schema) as stream:
        stream.write_table(named)
    wide = table.set_column(0, "text", table["text"].cast(pa.large_string()))
    with datasets.arrow_writer.ArrowWriter(path=str(folder / "datasets.arrow"), writer_batch_size=50) as writer:
        for row in wide.to_pylist():
            writer.write(row)
        writer.finalize()
    return sorted(path.name for path in folder.glob("*.arrow"))


def test_arrow_files_of_every_writer(
    read: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(units, "UNIT_BYTES", 3000)
    names = write_arrow(tmp_path)
    assert len(names) == 7
    for name in names:
        assert read(name) == TEXTS, name
        assert read(name, text_field="meta.set", where="n >= 5 and n < 9") == ["B", "A", "B", "A"], name
    assert read("stream.arrow", num_proc=2, where="n > 7") == TEXTS[8:]
    cut = list(spans_of_table(str(tmp_path / "stream.arrow"), 3000))
    assert len(cut) > 10 and [a.stop for a in cut[:-1]] == [b.start for b in cut[1:]] and cut[-1].stop == len(ROWS)
    assert len(list(spans_of_table(str(tmp_path / "zstd.arrow"), 100))) == 1  # its rows cannot be had one by one
    (tmp_path / "folder").mkdir()
    (tmp_path / "file.arrow").rename(tmp_path / "folder" / "data.arrow")
    (tmp_path / "folder" / "README.md").write_text("about")
    assert read("folder") == TEXTS
    (tmp_path / "a.ndjson").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "b.ndjson.gz").write_bytes(gzip.compress((tmp_path / "a.ndjson").read_bytes()))
    assert read("a.ndjson") == read("b.ndjson.gz") == TEXTS


def test_folders_of_save_to_disk(read: Callable[..., list[str]], tmp_path: Path, tokenizer: Tokenizer) -> None:
    saved = datasets.Dataset.from_list(ROWS)
    saved.save_to_disk(tmp_path / "saved", num_shards=3)
    assert read("saved") == TEXTS
    assert read("saved", where="meta.set == 'A'") == TEXTS[::2]
    # what the library computes from it lies beside it, and is not its content
    datasets.load_from_disk(tmp_path / "saved").map(lambda row: {"text": row["text"].upper()})
    assert list((tmp_path / "saved").glob("cache-*.arrow"))
    (tmp_path / "above").mkdir()
    (tmp_path / "saved").rename(tmp_path / "above" / "saved")
    assert read("above/saved") == read("above") == TEXTS
    saved.select(range(9, 3, -1)).save_to_disk(tmp_path / "chosen")
    assert read("chosen") == TEXTS[9:3:-1]
    both = saved.add_column("input_ids", [[1, 2, 3]] * len(ROWS))  # type: ignore[call-arg]
    both.save_to_disk(tmp_path / "both")
    assert read("both")[0] == "\1\2\3"  # its tokens ...
    assert read("both", format="text") == TEXTS  # ... unless the text is asked for
    refused(read, "above/saved", "no column 'body'", "text_field", text_field="body")
    datasets.DatasetDict(train=saved, test=saved).save_to_disk(tmp_path / "dict")
    refused(read, "dict", "train, test", str(tmp_path / "dict" / "train"))
    assert read("dict/test") == TEXTS
    (tmp_path / "chosen" / "data-00000-of-00001.arrow").unlink()
    refused(read, "chosen", "data-00000-of-00001.arrow", "is missing")


def test_conversations_and_columns_that_hold_no_text(read: Callable[..., list[str]], tmp_path: Path) -> None:
    columns = {
        "ids": pa.array([[1, 2], [3]]),
        "few": pa.array([[1, 2]] * 2, pa.list_(pa.uint16(), 2)),
        "bytes": pa.array([b"a", b"b"]),
        "nulls": pa.nulls(2),
        "number": pa.array([1, 2]),
        "text": pa.array(["a", "b"]),
    }
    table = pa.table(columns)
    pq.write_table(table, tmp_path / "t.parquet")
    with pa.ipc.new_file(tmp_path / "t.arrow", table.schema) as file:
        file.write_table(table)
    for name in ("t.parquet", "t.arrow"):
        assert read(name) == ["a", "b"]
        refused(read, name, "lists of integers", 'ids_field = "ids"', text_field="ids")
        refused(read, name, "lists of integers", 'ids_field = "few"', text_field="few")
        refused(read, name, "'ids' holds lists of integers", "ids_field", text_field="body")
        refused(read, name, "holds bytes (binary)", "cast('string')", text_field="bytes")
        refused(read, name, "row 1", "int, not text", text_field="number")
        refused(read, name, "no document", text_field="nulls")
    content = bytearray((tmp_path / "t.arrow").read_bytes())
    (tmp_path / "cut.arrow").write_bytes(content[:-20])
    refused(read, "cut.arrow", "damaged")
    (tmp_path / "text.arrow").write_text("no Arrow file")
    refused(read, "text.arrow", "damaged")
    (tmp_path / "named.jsonl").write_bytes(content)
    refused(read, "named.jsonl", "Arrow file", "*.arrow")
    with pa.ipc.new_stream(tmp_path / "stream.txt", table.schema) as stream:
        stream.write_table(table)
    refused(read, "stream.txt", "Arrow file", "*.arrow")
    offsets, latin = pa.py_buffer(np.array([0, 3, 6], np.int32)), pa.py_buffer(b"abcd\xe9f")
    wrong = pa.table({"text": pa.StringArray.from_buffers(2, offsets, latin)})
    pq.write_table(wrong, tmp_path / "latin.parquet")
    refused(read, "latin.parquet", "row 2", "not UTF-8")


BAD: dict[str, tuple[bytes, ...]] = {
    "number": (b'{"text": "a", "n": 1%s}' % (b"0" * 5000), b"more than", b"digits"),
    "nan": (b'{"text": NaN}', b"float, not text"),
    "deep": (b'{"text": "a", "n": %s%s}' % (b"[" * 100_000, b"]" * 100_000), b"nested too deeply"),
    "twice": (b'{"text": "a", "text": "b"}', b"'text' stands twice"),
    "surrogate": (b'{"text": "a\\ud800b"}', b"half of a surrogate pair"),
    "raw": (b'{"text": "a\0b"}', b"broken JSON"),
    "bom": (b'\xef\xbb\xbf{"text": "a"}', b"broken JSON"),
    "list": (b'{"text": [1, 2, 3]}', b"list, not text"),
    "bytes": (b'{"text": "\xff\xfe"}', b"not UTF-8"),
}


def test_what_json_can_hold_wrong(
    read: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In lines, in arrays, compressed or not: a sentence with the file and the line."""
    good = b'{"text": "good"}'
    for name, (record, *words) in BAD.items():
        lines, array = good + b"\n" + record + b"\n", b"[" + good + b",\n" + record + b"]"
        for suffix, content in ((".jsonl", lines), (".json", lines), (".ndjson", lines), (".json", array)):
            for packed in ("", ".gz"):
                file = f"{name}{suffix}{packed}"
                (tmp_path / file).write_bytes(gzip.compress(content) if packed else content)
                line = " " if name == "bytes" and content == array else " line 2"
                refused(read, file, f"{file}{line}", *(word.decode() for word in words))
    (tmp_path / "tail.jsonl").write_bytes(good + b"\n" + bytes(4000))
    refused(read, "tail.jsonl", "line 2", "NUL bytes", "not written to its end")
    (tmp_path / "joined.jsonl").write_bytes(b"\xef\xbb\xbf" + good + b"\n\xef\xbb\xbf" + good)
    refused(read, "joined.jsonl", "line 2", "byte order mark")
    (tmp_path / "tail.txt").write_bytes(b"some text" + bytes(40))
    refused(read, "tail.txt", "NUL byte at byte 9")
    (tmp_path / "fine.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "a\\u0000b\\ufeff", "m": {"a": 1, "a": 2, "n": NaN}}')
    assert read("fine.jsonl") == ["a\0b\ufeff"]  # what is not read does not matter
    monkeypatch.setattr(text, "MOST_BYTES", 1000)
    (tmp_path / "long.jsonl").write_bytes(good + b"\n" + b'{"text": "%s"}' % (b"a" * 1000))
    refused(read, "long.jsonl", "line 2", "longer than")
    (tmp_path / "ok.jsonl").write_bytes(good + b"\n" + b'{"text": "%s"}' % (b"a" * 900) + b"\n" + good)
    assert list(map(len, read("ok.jsonl"))) == [4, 900, 4]
    (tmp_path / "long.json").write_bytes(b"[" + good + b',\n{"text": "%s' % (b"a" * 400_000))
    refused(read, "long.json", "line 2", "longer than")


def test_parts_of_a_corpus_do_not_depend_on_the_writer(
    tokenizer: Tokenizer, data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same rows as Parquet and as Arrow, on one core and on two, are the same documents."""
    monkeypatch.setattr(units, "UNIT_BYTES", 2000)
    write_arrow(tmp_path)
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "p.parquet", row_group_size=40)
    corpora = [
        open_corpus(tokenize_source(Source("t", str(tmp_path / name)), tokenizer, data, num_proc))
        for name, num_proc in (("p.parquet", 1), ("stream.arrow", 2), ("file.arrow", 2))
    ]
    for index in range(len(ROWS)):
        first, *others = (corpus.document(index) for corpus in corpora)
        assert all(np.array_equal(first, other) for other in others)


def test_where_over_a_long_text(read: Callable[..., list[str]], tmp_path: Path) -> None:
    """A long text in a column is not held as a str, but it is compared as one."""
    long = "lorem ipsum " * 100_000
    pq.write_table(pa.table({"text": [long, "short"], "other": ["a", long]}), tmp_path / "a.parquet")
    assert read("a.parquet", where="'lorem' in text") == [long]
    assert read("a.parquet", where="text != 'short'") == [long]
    assert read("a.parquet", where="other == 'a'") == [long]


def test_no_file_is_read_twice_or_lost_by_its_name(read: Callable[..., list[str]], tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b.jsonl").write_text('{"text": "one"}\n')
    (tmp_path / "a" / "a.jsonl").symlink_to("b.jsonl")
    (tmp_path / "a" / "latest.jsonl").symlink_to(tmp_path / "a" / "b.jsonl")
    assert read("a") == read("a/*.jsonl") == read("a/latest.jsonl") == ["one"]
    (tmp_path / "a" / "c.JSONL").write_text('{"text": "two"}\n')
    refused(read, "a", "c.JSONL", "rename it")


def test_a_damaged_first_file_is_left_out(read: Callable[..., list[str]], tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    pq.write_table(pa.table({"text": ["one", "two"]}), tmp_path / "a" / "b.parquet")
    (tmp_path / "a" / "a.parquet").write_bytes(b"PAR1 cut")
    refused(read, "a", "a.parquet is damaged")
    assert read("a", on_bad_record="skip", max_bad_share=0.9) == ["one", "two"]
