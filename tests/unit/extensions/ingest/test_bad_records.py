"""Dirty text: what is left out and counted, what ends the run, and what is kept then.

The witness is the list of what was written: good texts, and bad records each with its place and its kind.
"""

from __future__ import annotations

import gzip
import json
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.unit.extensions.ingest.test_chat import TEMPLATES, assets
from torchtitan.config.data_schema import Data, Source
from torchtitan.config.schema import JobConfig
from torchtitan.datasets.corpus import open_corpus
from torchtitan.datasets.data_checks import check_data
from torchtitan.datasets.plan import Plan
from torchtitan.datasets.tokenizer import Tokenizer, load_tokenizer
from torchtitan.extensions.ingest import units
from torchtitan.extensions.ingest.resolve import resolve_source
from torchtitan.extensions.ingest.tokenize import tokenize_shard, tokenize_source
from torchtitan.extensions.planner.data_report import format_report, make_report
from torchtitan.tools.errors import UserError

BAD = {
    "broken JSON": b'{"text": "cut',
    "not UTF-8": b'{"text": "caf\xe9"}',
    "missing field": b'{"body": "no text", "score": 1}',
    "wrong type": b'{"text": ["a", "b"], "score": 1}',
    "not an object": b"[1, 2]",
    "where cannot compare": b'{"text": "scored by a word", "score": "high"}',
    "nested too deeply": b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
}
IN_AN_ARRAY = ("missing field", "wrong type", "not an object", "where cannot compare")


def documents(folder: Path) -> list[list[int]]:
    corpus = open_corpus(folder)
    return [corpus.document(i).tolist() for i in range(len(corpus))]


def expected(texts: list[str]) -> list[list[int]]:
    return [[256, *text.encode(), 257] for text in texts]


def metadata(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "corpus.json").read_text())


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(autouse=True)
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(units, "UNIT_BYTES", 600)


@pytest.fixture
def source(tmp_path: Path) -> Source:
    (tmp_path / "text").mkdir()
    return Source(name="dirty", path=str(tmp_path / "text"), on_bad_record="skip", max_bad_share=0.9)


def write_dirty(folder: Path, rng: random.Random) -> tuple[list[str], Counter[str], dict[str, str]]:
    """Files of random good and bad records: the good texts in order, bad ones by kind, and the kind of each place."""
    good: list[str] = []
    kinds: Counter[str] = Counter()
    places: dict[str, str] = {}

    def record(kind_choice: tuple[str, ...], place: str) -> bytes:
        if rng.random() < 0.25:
            kind = rng.choice(kind_choice)
            kinds[kind] += 1
            places[place] = kind
            return BAD[kind]
        good.append(f"good {len(good)} " + "é" * rng.randint(0, 60))
        return json.dumps({"text": good[-1], "score": len(good)}).encode()

    everything = tuple(BAD)
    for number in range(6):
        how = rng.choice(["jsonl", "jsonl", "gz"])
        path = folder / f"{number}.jsonl{'.gz' if how == 'gz' else ''}"
        lines = [record(everything, f"{path} line {i + 1}") for i in range(rng.randint(1, 30))]
        content = b"\n".join(lines) + b"\n"
        path.write_bytes(gzip.compress(content) if how == "gz" else content)
    return good, kinds, places


@pytest.mark.parametrize("seed", range(4))
def test_good_records_are_read_and_bad_ones_counted(
    tokenizer: Tokenizer, data: Data, source: Source, tmp_path: Path, seed: int
) -> None:
    good, kinds, places = write_dirty(Path(source.path), random.Random(seed))
    asked = replace(source, where="score >= 0")
    made = tokenize_source(asked, tokenizer, data, 1 + seed % 2)
    assert documents(made) == expected(good)
    bad = metadata(made)["bad_records"]
    assert (bad["reasons"], bad["records"]) == (dict(kinds), kinds.total())
    assert bad["of"] == kinds.total() + len(good)
    shown = Counter(reason for _, reason, _ in bad["examples"])
    assert shown == Counter({kind: min(3, count) for kind, count in kinds.items()})
    assert all(places[place] == reason for place, reason, _ in bad["examples"])
    # and by shards, with a run in between that stops at bad records: the same bytes
    there = replace(data, cache_folder=str(tmp_path / "there"))
    assert tokenize_shard(asked, tokenizer, there, 1, 2, 1) is None
    with pytest.raises(UserError, match='on_bad_record = "skip"'):
        tokenize_source(replace(asked, on_bad_record="stop"), tokenizer, there, 1)
    assert contents(tokenize_source(asked, tokenizer, there, 1)) == contents(made)
    # and the corpus is never taken for one of all records
    with pytest.raises(UserError, match='on_bad_record = "skip"'):
        tokenize_source(replace(asked, on_bad_record="stop"), tokenizer, there, 1)


def test_arrays_and_texts(tokenizer: Tokenizer, data: Data, source: Source) -> None:
    folder = Path(source.path)
    records = [b'{"text": "one", "score": 1}', *(BAD[kind] for kind in IN_AN_ARRAY), b'{"text": "two", "score": 2}']
    (folder / "a.json").write_bytes(b"[" + b",\n".join(records) + b"]")
    (folder / "b.json").write_bytes(b'[{"text": "three", "score": 3},\n{"text": "four", "score": 4},\n{"text": "cut')
    made = tokenize_source(replace(source, where="score >= 0"), tokenizer, data, 1)
    assert documents(made) == expected(["one", "two", "three", "four"])
    bad = metadata(made)["bad_records"]
    assert bad["reasons"] == dict.fromkeys(IN_AN_ARRAY, 1) | {"damaged from here on": 1}
    assert (bad["records"], bad["of"], bad["bytes"]) == (4, 8, (folder / "b.json").stat().st_size)
    assert [f"{folder / 'b.json'}", "damaged from here on", "line 3: broken JSON: Unterminated string starting"] == [
        *bad["examples"][-1][:2],
        bad["examples"][-1][2].partition(". Mend")[0],
    ]
    for file in folder.iterdir():
        file.unlink()
    (folder / "a.txt").write_bytes(b"caf\xe9")
    (folder / "b.txt").write_text("good")
    made = tokenize_source(source, tokenizer, data, 1)
    assert documents(made) == expected(["good"])
    assert metadata(made)["bad_records"]["examples"][0][:2] == [str(folder / "a.txt"), "not UTF-8"]


def test_parquet(tokenizer: Tokenizer, data: Data, source: Source) -> None:
    """A row that is not UTF-8, one of four row groups that is damaged, and a file without its end."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    texts = [f"row {i} " + random.Random(i).randbytes(30).hex() for i in range(40)]
    path = Path(source.path) / "a.parquet"
    column = pa.array([b"caf\xe9" if i == 7 else text.encode() for i, text in enumerate(texts)]).cast(pa.binary())
    table = pa.table({"text": pa.Array.from_buffers(pa.string(), 40, column.buffers())})
    pq.write_table(table, path, row_group_size=10, compression="snappy", use_dictionary=False, write_statistics=False)
    group = pq.ParquetFile(path).metadata.row_group(2)
    content = bytearray(path.read_bytes())
    middle = group.column(0).data_page_offset + group.column(0).total_compressed_size // 2
    content[middle - 40 : middle + 40] = bytes(80)
    path.write_bytes(content)
    (Path(source.path) / "b.parquet").write_bytes(bytes(content[:500]))
    made = tokenize_source(source, tokenizer, data, 1)
    damaged = metadata(made)["bad_records"]
    kept = [text for i, text in enumerate(texts) if i != 7 and not 20 <= i < 30]
    assert documents(made) == expected(kept)
    assert damaged["reasons"] == {"not UTF-8": 1, "damaged from here on": 2}
    assert damaged["bytes"] == group.total_byte_size + 500
    assert [f"{path} row 8", "not UTF-8"] == damaged["examples"][0][:2]


@pytest.mark.parametrize("keep", [0, 3, 2_000_000, -9])
def test_an_archive_that_is_cut(tokenizer: Tokenizer, data: Data, source: Source, keep: int) -> None:
    rng = random.Random(0)
    lines = [json.dumps({"text": rng.randbytes(20_000).hex()}) + "\n" for _ in range(100)]
    packed = gzip.compress("".join(lines).encode())
    (Path(source.path) / "a.jsonl.gz").write_bytes(packed[:keep])
    (Path(source.path) / "b.jsonl").write_text('{"text": "good"}\n')
    made = tokenize_source(replace(source, max_bad_share=0.999), tokenizer, data, 1)
    bad = metadata(made)["bad_records"]
    assert bad["reasons"]["damaged from here on"] == 1 and 0 <= bad["bytes"] <= len(packed[:keep])
    texts = [json.loads(line)["text"] for line in lines] + ["good"]
    assert documents(made)[-1] == expected(["good"])[0]
    assert documents(made)[:-1] == expected(texts)[: len(documents(made)) - 1]
    lost = 100 if keep in (0, 3) else 30 if keep == -9 else 100 - 20  # of 40 kB; up to 1 MB is lost before the damage
    assert len(documents(made)) - 1 >= 100 - lost
    with pytest.raises(UserError, match=r"a.jsonl.gz (cannot be decompressed|is empty|begins with)"):
        tokenize_source(replace(source, on_bad_record="stop", name="other"), tokenizer, data, 1)


def test_conversations_that_the_template_refuses(data: Data, source: Source, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(assets(tmp_path / "assets", TEMPLATES["trimmed"]))
    good = {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]}
    strange = {"messages": [{"from": "robot", "value": "?"}]}
    lines = [json.dumps(record) for record in (good, strange, {"messages": "text"}, good)]
    (Path(source.path) / "a.jsonl").write_text("\n".join(lines))
    made = tokenize_source(replace(source, messages_field="messages"), tokenizer, data, 1)
    bad = metadata(made)["bad_records"]
    assert (metadata(made)["documents"], bad["reasons"], bad["of"]) == (2, {"refused": 1, "unknown speaker": 1}, 4)
    assert "a.jsonl line 2" in bad["examples"][0][0] and "'robot'" in bad["examples"][0][2]


def test_clean_text_gives_the_same_corpus_either_way(
    tokenizer: Tokenizer, data: Data, source: Source, tmp_path: Path
) -> None:
    (Path(source.path) / "a.jsonl").write_text('{"text": "good"}\n\n{"text": " "}\n' * 50)
    other = replace(data, cache_folder=str(tmp_path / "other"))
    skip = tokenize_source(source, tokenizer, data, 1)
    stop = tokenize_source(replace(source, on_bad_record="stop"), tokenizer, other, 1)
    assert skip.name == stop.name and contents(skip) == contents(stop)
    assert tokenize_source(replace(source, on_bad_record="stop"), tokenizer, data, 1) == skip


def test_too_many(tokenizer: Tokenizer, data: Data, source: Source) -> None:
    """The share is of records; what was done is kept, so that a higher limit costs nothing."""
    lines = [b'{"text": "good"}'] * 99 + [BAD["broken JSON"]]
    (Path(source.path) / "a.jsonl").write_bytes(b"\n".join(lines))
    with pytest.raises(
        UserError, match=r"1 of 100 records \(1.000%\) are bad \(1 broken JSON\).*max_bad_share = 0.009"
    ):
        tokenize_source(replace(source, max_bad_share=0.009), tokenizer, data, 1)

    def refuse(texts: list[str]) -> list[list[int]]:
        raise AssertionError("it was tokenized before")

    made = tokenize_source(replace(source, max_bad_share=0.01), replace(tokenizer, _encode_batch=refuse), data, 1)
    with pytest.raises(UserError, match="max_bad_share = 0.009"):  # of a finished corpus too
        tokenize_source(replace(source, max_bad_share=0.009), tokenizer, data, 1)
    assert documents(made) == expected(["good"] * 99)


def test_a_wrong_field_is_no_empty_corpus_and_found_early(tokenizer: Tokenizer, data: Data, source: Source) -> None:
    for number in range(100):
        (Path(source.path) / f"{number:02d}.jsonl").write_text('{"text": "good text of some length"}\n' * 30)
    with pytest.raises(UserError, match="no field 'content'; the record has 'text'") as error:
        tokenize_source(replace(source, text_field="content", max_bad_share=0.1), tokenizer, data, 1)
    of = int(str(error.value).split(" of ")[1].split(" records")[0].replace(",", ""))
    assert of < 1600, "after half of the source at most: ten times as many good ones are too few then"
    with pytest.raises(UserError, match="3,000 of 3,000 records"):
        tokenize_source(replace(source, text_field="content", max_bad_share=0.99), tokenizer, data, 1)


def test_a_renamed_file_is_named_by_its_new_name(
    tokenizer: Tokenizer, data: Data, source: Source, tmp_path: Path
) -> None:
    for name in "ab":
        (Path(source.path) / f"{name}.jsonl").write_bytes(b'{"text": "good"}\n' * 60 + BAD["broken JSON"])
    tokenize_source(source, tokenizer, data, 1)
    (Path(source.path) / "a.jsonl").rename(Path(source.path) / "c.jsonl")
    (Path(source.path) / "b.jsonl").write_text('{"text": "mended"}')
    made = tokenize_source(source, tokenizer, data, 1)
    places = [place for place, _, _ in metadata(made)["bad_records"]["examples"]]
    assert places == [f"{source.path}/c.jsonl line 61"]
    other = replace(data, cache_folder=str(tmp_path / "other"))
    assert contents(tokenize_source(source, tokenizer, other, 1)) == contents(made)


def test_skip_is_about_text(tokenizer: Tokenizer, data: Data, source: Source) -> None:
    (Path(source.path) / "a.jsonl").write_text('{"text": "good"}\n')
    made = tokenize_source(source, tokenizer, data, 1)
    mds = Path(__file__).parent / "data" / "mds_packed"
    for path in (made, mds):
        with pytest.raises(UserError, match='on_bad_record = "skip", which is about records of text.*leave it out'):
            resolve_source(replace(source, path=str(path)), tokenizer, data)


def test_the_report_shows_them(tokenizer: Tokenizer, data: Data, source: Source) -> None:
    (Path(source.path) / "a.jsonl").write_bytes(b'{"text": "good"}\n' * 9 + BAD["broken JSON"])
    plan = Plan(replace(data, sources=(source,)), [resolve_source(source, tokenizer, data)], 16, 1, 2, 0)
    report = json.loads(json.dumps(make_report(plan, 1, 1, 1.0, 1.0)))
    assert report["sources"][0]["bad_records"]["reasons"] == {"broken JSON": 1}
    lines = format_report(report).splitlines()
    said = "warning: left out of dirty: 1 of 10 records (10.000%) are bad (1 broken JSON)"
    assert f"    {source.path}/a.jsonl line 10: broken JSON: Unterminated" in lines[lines.index(said) + 1]


def test_a_limit_without_skip_is_refused() -> None:
    source = Source(name="a", path="a.jsonl", max_bad_share=0.5)
    check_data(JobConfig(data=Data(sources=(replace(source, on_bad_record="skip"),))))
    with pytest.raises(UserError, match='max_bad_share = 0.5 is read with on_bad_record = "skip" only'):
        check_data(JobConfig(data=Data(sources=(source,))))
