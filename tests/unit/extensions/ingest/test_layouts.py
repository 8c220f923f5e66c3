"""Layouts in which text is published, written by their own writers; which files of a folder are read; `where`."""

from __future__ import annotations

import base64
import bz2
import glob
import gzip
import json
import logging
import lzma
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from torchtitan.config.data_schema import Data, Source
from torchtitan.datasets.corpus import open_corpus
from torchtitan.datasets.tokenizer import Tokenizer
from torchtitan.extensions.ingest import open_text, text, units
from torchtitan.extensions.ingest.resolve import resolve_source
from torchtitan.extensions.ingest.source_files import matching_files
from torchtitan.extensions.ingest.tokenize import tokenize_source
from torchtitan.tools.errors import UserError

RECORDS: list[dict[str, Any]] = [
    {"text": f"document {i}" if i % 5 else f'"[{{é\\ {i}' * 9000, "meta": {"set": "AB"[i % 2]}, "score": i / 20}
    for i in range(20)
]
TEXTS = [record["text"] for record in RECORDS]
LINES = "".join(json.dumps(record) + "\n" for record in RECORDS).encode()
BY_ZSTANDARD = {
    # By zstandard 0.25.0: six lines like those above, in two frames with checksums (the first ends amid line 4), and in
    # one frame that does not say its size. A skippable frame and an empty one are laid around, as pzstd does.
    "two": "KLUv/SSR9QEAxAJ7InRleHQiOiAiZG9jdW1lbnQgMCIsICJtZXRhIjogeyJzZUEifX0KMUIyQQYAQBZAH6gZoAVUqRcu9QS/WNC/"
    "KLUv/SR9/QEABANkb2N1bWVudCAzIiwgIm1ldGEiOiB7InNldCI6ICJCIn19CnsidGV4NEE1QiJ9fQoFAIAWUB+gDJVaSDvLFB4cJg==",
    "one": "KLUv/QRYjQIAZAN7InRleHQiOiAiZG9jdW1lbnQgMCIsICJtZXRhIjogeyJzZUEifX0KMUIyQTNCNEE1QiJ9fQoLAIAWUB+gGagF"
    "0AdqBmgB9QGaQZVv4VJkvk+WMw==",
}
SKIPPED = b"\x50\x2a\x4d\x18\x04\x00\x00\x00abcd"
EMPTY_FRAME = b"\x28\xb5\x2f\xfd\x20\x00\x01\x00\x00"


@pytest.fixture
def read(tokenizer: Tokenizer, data: Data, tmp_path: Path) -> Callable[..., list[str]]:
    """The texts of the documents of a source under tmp_path."""

    def read(path: str, num_proc: int = 1, **keys: Any) -> list[str]:
        source = Source("t", str(tmp_path / path), **keys)
        corpus = open_corpus(tokenize_source(source, tokenizer, data, num_proc))
        return [bytes(corpus.document(i)[1:-1].astype("uint8")).decode() for i in range(len(corpus))]

    return read


def refused(read: Callable[..., list[str]], *words: str, **keys: Any) -> None:
    path, *words = words
    with pytest.raises(UserError) as caught:
        read(path, **keys)
    for word in words:
        assert word in str(caught.value), (word, str(caught.value))


def test_every_layout_is_read_as_published(
    read: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(units, "UNIT_BYTES", 3000)
    bom = b"\xef\xbb\xbf"
    files = {
        "a.jsonl": LINES,
        "lines.json": LINES,
        "array.json": json.dumps(RECORDS).encode(),
        "pretty.json": bom + b"\n " + json.dumps(RECORDS, indent=2, ensure_ascii=False).encode() + b"\r\n",
        "b.jsonl.gz": gzip.compress(LINES[:999]) + gzip.compress(LINES[999:]),
        "c.jsonl.bz2": bz2.compress(LINES[:999]) + bz2.compress(LINES[999:]),
        "d.jsonl.xz": lzma.compress(LINES[:999]) + bytes(8) + lzma.compress(LINES[999:]),
        "e.json.gz": gzip.compress(LINES),
        "f.json.bz2": bz2.compress(json.dumps(RECORDS, indent=1).encode()),
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    pq.write_table(pa.Table.from_pylist(RECORDS), tmp_path / "g.parquet", row_group_size=3)
    for name in [*files, "g.parquet"]:
        assert read(name) == TEXTS, name
        assert read(name, text_field="meta.set") == ["A", "B"] * 10, name
    for name, content in BY_ZSTANDARD.items():
        content = SKIPPED + base64.b64decode(content)
        middle = content.index(b"\x28\xb5\x2f\xfd", 20) if name == "two" else len(content)
        (tmp_path / f"{name}.jsonl.zst").write_bytes(content[:middle] + EMPTY_FRAME + content[middle:])
        assert read(f"{name}.jsonl.zst") == [f"document {i}" for i in range(6)]
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "b.py").write_text("print(1)\n")
    (tmp_path / "code" / "a.rs.xz").write_bytes(lzma.compress(b"fn main() {}"))
    assert read("code") == ["fn main() {}", "print(1)\n"]
    (tmp_path / "empty.json").write_text("[]")
    refused(read, "empty.json", "no document")


BAD = {
    "cut.jsonl.gz": (gzip.compress(LINES)[:-9], "cut.jsonl.gz cannot be decompressed"),
    "sum.jsonl.gz": (gzip.compress(LINES)[:-8] + bytes(8), "sum.jsonl.gz cannot be decompressed"),
    "cut.jsonl.bz2": (bz2.compress(LINES)[:-9], "ends before its end mark"),
    "second.jsonl.bz2": (bz2.compress(LINES) + b"x" + bz2.compress(LINES)[1:], "second.jsonl.bz2 cannot be"),
    "cut.jsonl.xz": (lzma.compress(LINES)[:-9], "ends before its end mark"),
    "second.jsonl.xz": (lzma.compress(LINES) + b"x" + lzma.compress(LINES)[1:], "second.jsonl.xz cannot be"),
    "cut.jsonl.zst": (base64.b64decode(BY_ZSTANDARD["two"])[:-3], "Truncated"),
    "junk.jsonl.zst": (base64.b64decode(BY_ZSTANDARD["two"]) + b"junk", "junk.jsonl.zst cannot be decompressed"),
    "none.jsonl.gz": (b"", "none.jsonl.gz is empty"),
    "plain.jsonl.gz": (LINES, "not as .gz files do"),
    "twice.jsonl.gz": (gzip.compress(gzip.compress(LINES)), "compressed twice"),
    "packed.jsonl": (gzip.compress(LINES), "packed.jsonl.gz"),
    "packed.txt": (bz2.compress(LINES), "packed.txt.bz2"),
    "table.jsonl": (b"PAR1\x15\x04", "is a Parquet file, not .jsonl"),
    "archive.jsonl": (b"PK\x03\x04", "is a zip archive"),
    "a.txt": ("wide".encode("utf-16"), "UTF-16", "iconv -f utf-16"),
    "a.jsonl": (LINES.decode().encode("utf-16-le"), "UTF-16", "iconv"),
    "a.tar.gz": (gzip.compress(b"x"), "a.tar.gz", "'.gz'", ".jsonl, .parquet, .txt"),
    "a.parquet.gz": (gzip.compress(b"x"), "a.parquet.gz"),
    "line.jsonl.gz": (gzip.compress(LINES + b'{"text": 3}\n'), "line.jsonl.gz line 21", "int"),
    "deep.jsonl": (b'{"text": "a"}\n' + b"[" * 100_000, "deep.jsonl line 2", "nested too deeply"),
    "deep.json": (b"[\n" + b"[" * 100_000, "deep.json line 2", "nested too deeply"),
    "object.json": (b'{\n"data": []}', "object.json line 1", "over several lines", "one array of objects"),
    "open.json": (b'[{"text": "a"},\n {"text": "b"}', "open.json line 2", "']'"),
    "comma.json": (b'[{"text": "a"},\n]', "comma.json line 2", "broken JSON"),
    "broken.json": (b'[{"text": "a"},\n\n{"text": "b" "c"}]' + b" " * 99, "broken.json line 3", "delimiter"),
    "more.json": (b'[{"text": "a"}]\n[{"text": "b"}]', "more.json line 2", "follows"),
    "number.json": (b'[{"text": "a"},\n7]', "number.json line 2 (record 2 of", "int"),
    "one line.json": (b'[{"text": "a"}, {"text": "b"}, {"text": 3}]', "line 1 (record 3 of the array)", "int"),
    "sharegpt.jsonl": (b'{"conversations": [], "id": 1}', 'messages_field = "conversations"'),
    "alpaca.jsonl": (b'{"instruction": "a", "output": "b"}', 'messages_field = "instruction"'),
    "latin.json": (b'[{"text": "caf\xe9"}]', "latin.json", "UTF-8"),
}


def test_what_is_not_whole_or_not_what_its_name_says(read: Callable[..., list[str]], tmp_path: Path) -> None:
    for name, (content, *words) in BAD.items():
        (tmp_path / name).write_bytes(content)
        refused(read, name, *words)
    pq.write_table(pa.table({"input_ids": [[1, 2], [3]]}), tmp_path / "tokens.parquet")
    refused(read, "tokens.parquet", "'input_ids' holds lists of integers", 'ids_field = "input_ids"', format="text")
    refused(read, "a.jsonl", "UTF-16", num_proc=2)


def test_a_long_array_is_not_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A 30 MB array costs less than a tenth of it."""
    import tracemalloc

    (tmp_path / "a.json").write_text(json.dumps([{"text": "x" * 1000} for _ in range(30_000)]))
    (span,) = text.spans_of(str(tmp_path / "a.json"), 1 << 20)
    tracemalloc.start()
    assert sum(len(one) for one in text.read_documents(span, "text")) == 30_000_000
    assert tracemalloc.get_traced_memory()[1] < 3e6
    tracemalloc.stop()


def test_a_compressed_file_reports_while_it_is_read(
    read: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(logging.getLogger("torchtitan"), "propagate", True)
    caplog.set_level(logging.INFO, "torchtitan")
    monkeypatch.setattr(open_text, "PROGRESS_SECONDS", 0.0)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(LINES))
    read("a.jsonl.gz")
    assert "a.jsonl.gz: 0.00 of 0.00 GB, compressed" in caplog.text


def test_which_files_of_a_folder_are_read(
    read: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(logging.getLogger("torchtitan"), "propagate", True)
    caplog.set_level(logging.INFO, "torchtitan")

    def put(name: str, content: str) -> None:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress(content.encode()) if name.endswith(".gz") else content.encode())

    put("web/a.jsonl", '{"text": "a"}\n')
    put("web/deep/b.jsonl.gz", '{"text": "b"}\n')
    for name in ("README.md", "README.txt", "LICENSE", "LICENSE-MIT.txt", ".gitattributes", "load.py", "index.json"):
        put(f"web/{name}", "about")
    assert read("web") == ["a", "b"]
    said = next(record for record in caplog.records if "passed over" in record.getMessage())
    assert said.levelname == "WARNING" and all(
        word in said.getMessage() for word in ("README.md", "README.txt", "LICENSE-MIT.txt", "1 .py", "1 .json")
    )
    assert read("web/*.txt") == ["about", "about"]  # who names them gets them
    refused(read, "web/*", "different kinds", "a.jsonl", "index.json")
    put("web/deep/b.jsonl", '{"text": "b"}\n')
    refused(read, "web", "b.jsonl and b.jsonl.gz", "twice")
    (tmp_path / "web/deep/b.jsonl").rename(tmp_path / "web/deep/b.jsonl.zst")
    refused(read, "web", "b.jsonl.gz and b.jsonl.zst", "twice")

    for names in (
        ("train/a.jsonl", "test/a.jsonl"),
        ("train-00000-of-00002.jsonl", "validation-00000-of-00001.jsonl"),
        ("wiki.train.jsonl.gz", "wiki.valid.jsonl.gz"),
        ("c4-train.00000-of-01024.json.gz", "c4-validation.00000-of-00008.json.gz"),
        ("eval_v2.jsonl", "web_train_v2.jsonl"),
        ("chunk1/train_0.jsonl", "chunk2/dev_0.jsonl"),
    ):
        folder = f"splits-{names[0].replace('/', '-')}"
        for name in names:
            put(f"{folder}/{name}", json.dumps({"text": name}))
        refused(read, folder, "several splits", names[0], names[1], "train (")
        assert read(f"{folder}/**/*") == sorted(names)
    for name in ("train/train_0.jsonl", "train/contest_1.jsonl", "train/the_test_case.jsonl"):
        put(f"one/{name}", json.dumps({"text": name}))
    assert len(read("one")) == 3


def test_links(read: Callable[..., list[str]], tmp_path: Path) -> None:
    web, elsewhere = tmp_path / "web", tmp_path / "elsewhere"
    for folder, name in ((web, "a"), (elsewhere / "deep", "b")):
        folder.mkdir(parents=True)
        (folder / f"{name}.jsonl").write_text(json.dumps({"text": name}))
    for pattern in ("web/**/*.jsonl", "**/b.jsonl", "**/*/b.*", "w?b/**", "**", "**/**/.h/*", "[e]*/**/[!a].jsonl"):
        for hidden in (tmp_path / "web" / ".h" / "c.jsonl", elsewhere / ".d.jsonl"):
            hidden.parent.mkdir(exist_ok=True)
            hidden.touch()
        by_glob = {Path(p) for p in glob.glob(f"{tmp_path}/{pattern}", recursive=True) if Path(p).is_file()}
        assert matching_files(Source("t", f"{tmp_path}/{pattern}"), Data()) == sorted(by_glob) != [], pattern
    (web / "linked").symlink_to(elsewhere)
    (web / "again").symlink_to(elsewhere / "deep")
    (elsewhere / "loop").symlink_to(web)
    (elsewhere / "self").symlink_to(elsewhere)
    assert read("web") == ["a", "b"] or read("web") == ["b", "a"]
    for pattern in ("web/**/*.jsonl", "web/**", "**/[ab].jsonl", "*/**/**/?.jsonl"):
        assert sorted(read(pattern)) == ["a", "b"], pattern
    assert read("**/deep/*.jsonl") == read("web/*/deep/*.jsonl") == ["b"] and read("web/**/a*") == ["a"]
    (web / "gone.jsonl").symlink_to(tmp_path / "unplugged" / "c.jsonl")
    refused(read, "web", "gone.jsonl", "unplugged", "does not exist")
    refused(read, "web/*.jsonl", "gone.jsonl", "does not exist")
    (web / "gone.jsonl").unlink()
    (web / "gone").symlink_to(tmp_path / "unplugged")
    refused(read, "web", "gone", "unplugged")


# ---- where -----------------------------------------------------------------------------------------------------------

EXPRESSIONS = {
    # expression: the same by Arrow
    "meta.set == 'A'": pc.field("meta", "set") == "A",
    'meta["set"] != "A" and score >= 0.65': (pc.field("meta", "set") != "A") & (pc.field("score") >= 0.65),
    "0.2 < score <= 0.5 or not (score < 0.9)": ((pc.field("score") > 0.2) & (pc.field("score") <= 0.5))
    | (pc.field("score") >= 0.9),
    "meta.set in ['A', 'C'] and score > -1": pc.field("meta", "set") == "A",
    "meta.set not in ('A', 'C')": pc.field("meta", "set") != "A",
    "score > 0.2 and\n  score <= 0.5": (pc.field("score") > 0.2) & (pc.field("score") <= 0.5),
    "maybe == null": pc.field("maybe").is_null(),
    "maybe != null and maybe < 12": pc.field("maybe") < 12,
    "flag == true": pc.field("flag") == True,  # noqa: E712
    "not flag and '7' in text": (pc.field("flag") == False) & pc.match_substring(pc.field("text"), "7"),  # noqa: E712
}


def test_where_keeps_what_arrow_keeps(
    read: Callable[..., list[str]], tmp_path: Path, tokenizer: Tokenizer, data: Data
) -> None:
    records = [r | {"flag": i % 3 == 0, "maybe": i if i % 2 else None} for i, r in enumerate(RECORDS)]
    table = pa.Table.from_pylist(records)
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=4)
    for record in records:
        if record["maybe"] is None:
            del record["maybe"]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (tmp_path / "a.json").write_text(json.dumps(records))
    for number, (where, by_arrow) in enumerate(EXPRESSIONS.items()):
        kept = table.filter(by_arrow)["text"].to_pylist()
        assert 0 < len(kept) < 20
        for name in ("a.parquet", "a.jsonl", "a.json")[: 3 if number < 2 else 2]:
            assert read(name, where=where) == kept, (name, where)
    source = Source("t", str(tmp_path / "a.jsonl"), where="score >= 0.5")
    folder = tokenize_source(source, tokenizer, data, 2)
    assert json.loads((folder / "corpus.json").read_text())["left_out"] == {"where": 10}
    assert resolve_source(source, tokenizer, data).left_out == {"where": 10}
    others = [replace(source, where=where) for where in ("", "score >= 0.6", "score >= 0.50")]
    assert len({folder, *(tokenize_source(one, tokenizer, data, 1) for one in others)}) == 4
    named = replace(source, path=str(folder))
    assert resolve_source(named, tokenizer, data).left_out == {"where": 10}
    with pytest.raises(UserError, match="is tokenized, and its documents have no fields"):
        resolve_source(replace(named, where="score > 1"), tokenizer, data)
    np.save(tmp_path / "ids.npy", np.arange(200, dtype=np.uint16))
    with pytest.raises(UserError, match="ids.npy is tokenized, and its documents have no fields"):
        resolve_source(Source("t", str(tmp_path / "ids.npy"), where="score > 1"), tokenizer, data)


@pytest.mark.parametrize("most", [None, 3])
def test_where_of_a_hub_dataset(
    tokenizer: Tokenizer, data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int | None
) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "home")
    (tmp_path / "web").mkdir()
    (tmp_path / "web" / "train.jsonl").write_bytes(b'{"text": null, "meta": {"set": "B"}, "score": 1}\n' + LINES)
    source = Source("t", f"hub:{tmp_path / 'web'}", where="meta.set == 'B'", max_documents=most)
    corpus = resolve_source(source, tokenizer, data)
    assert [corpus.document(i)[1:-1].tolist() for i in range(len(corpus))] == [list(t.encode()) for t in TEXTS[1::2]][
        :most
    ]
    assert corpus.left_out == {"where": 10 if most is None else 3}
    nested = resolve_source(replace(source, where="", text_field="meta.set"), tokenizer, data)
    assert [nested.document(i)[1] for i in range(3)] == [ord(c) for c in "BAB"]
    with pytest.raises(UserError, match="no column 'lang' .*where"):
        resolve_source(replace(source, where="lang == 'en'"), tokenizer, data)


REFUSED = {
    # where: words of the message; the file is line 1 {"text": "a", "n": 1, ...}, line 2 {"text": "b", "n": "2", ...}
    "n > 0": ["a.jsonl line 2", "n is text and 0 is a number", "cannot compare"],
    "n == 1": ["a.jsonl line 2", "n is text and 1 is a number"],
    "n in [1, 2]": ["a.jsonl line 2", "n is text"],
    "gone > 0.5": ["a.jsonl line 1", "gone is null", "gone != null and"],
    "late > 0.5": ["a.jsonl line 2", "late is null", "late != null and"],
    "late": ["a.jsonl line 1", "late is a number, not true or false"],
    "flag < true": ["a.jsonl line 1", "true or false"],
    "'x' in gone": ["a.jsonl line 1", "gone is null"],
    "gone == null": ["names the field 'gone'", "none of the 2 records"],
    "meta.nope != 'x'": ["names the field 'meta.nope'"],
    "flag == false and text != 'b'": ["no document", "2 for which where does not hold"],
}
UNREADABLE = [
    "n ==",
    "f(n)",
    "n.__class__(1)",
    "n + 1 > 2",
    "lambda: n",
    "[n for n in text]",
    "n is null",
    "1 == 1",
    "\0",
]


def test_where_that_cannot_be_answered(read: Callable[..., list[str]], tmp_path: Path) -> None:
    lines = [{"text": "a", "n": 1, "late": 0.7, "flag": True, "meta": {}}, {"text": "b", "n": "2", "flag": True}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for where, words in REFUSED.items():
        refused(read, "a.jsonl", *words, where=where)
    for where in [*UNREADABLE, "(" * 5000 + "n" + ")" * 5000, "not " * 5000 + "n"]:
        refused(read, "a.jsonl", "is not an expression", where=where)
    (tmp_path / "a.txt").write_text("no fields")
    refused(read, "a.txt", "a.txt", "without fields", where="n == 1")
    pq.write_table(pa.table({"text": ["a"], "m": [1]}), tmp_path / "a.parquet")
    refused(read, "a.parquet", "no column 'n'", "'text', 'm'", where="n == 1")
