"""MDS folders: what the real MDSWriter wrote is read back, and each way a folder can be damaged is named."""

from __future__ import annotations

import gzip
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from torchtitan.config.data_schema import Data, Source
from torchtitan.datasets.corpus import ASSISTANT, open_corpus
from torchtitan.datasets.tokenizer import Tokenizer
from torchtitan.extensions.ingest import tokenize, units
from torchtitan.extensions.ingest.convert_tables import TokenReader
from torchtitan.extensions.ingest.mds import MdsShard, find_mds, read_index
from torchtitan.extensions.ingest.mds_rows import read_tokens
from torchtitan.extensions.ingest.resolve import resolve_source
from torchtitan.extensions.ingest.token_columns import Columns
from torchtitan.extensions.ingest.tokenize import tokenize_source
from torchtitan.tools.errors import UserError

FIXTURES = Path(__file__).parent / "data"  # make_mds.py in there wrote them


@pytest.fixture
def tokenizer(tokenizer: Tokenizer) -> Tokenizer:
    """With ids up to 999, which the folders of make_mds.py hold."""
    return replace(tokenizer, vocab_size=1000)


def unpacked(bos: bool, eos: bool) -> list[list[int]]:
    """What make_mds.py put into mds_unpacked and mds_zstd, with the ends that it left out."""
    documents = [[10 * n + i for i in range(n)] for n in (3, 20, 5, 62, 1, 17, 40, 8)]
    documents[1] = [256, *documents[1][1:-1], 257]
    documents[2][0] = 256
    return [[256] * (bos and d[0] != 256) + d + [257] * (eos and d[-1] != 257) for d in documents]


def read_shard(shard: MdsShard) -> Iterator[np.ndarray]:
    """Its documents as they are."""
    any_id = Tokenizer("all", 1 << 31, None, None, "f" * 64, lambda texts: [], lambda ids: "")
    return read_tokens(shard, TokenReader(Columns("input_ids", (), (), False), any_id, [], []))


def packed() -> list[list[int]]:
    cuts = ([0, 64], [0, 10, 64], [0, 1, 2, 40, 64], [0, 32, 64])
    return [list(range(100 * n + a, 100 * n + b)) for n, at in enumerate(cuts) for a, b in zip(at, at[1:])]


def read(path: Path, tokenizer: Tokenizer, data: Data) -> list[list[int]]:
    corpus = resolve_source(Source(name="mds", path=str(path)), tokenizer, data)
    return [corpus.document(i).tolist() for i in range(len(corpus))]


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("eos", [True, False])
@pytest.mark.parametrize("name", ["mds_unpacked", "mds_zstd"])
def test_unpacked_rows_are_documents_with_the_ends_that_they_lack(
    tokenizer: Tokenizer, data: Data, name: str, bos: bool, eos: bool
) -> None:
    assert read(FIXTURES / name, tokenizer, replace(data, add_bos=bos, add_eos=eos)) == unpacked(bos, eos)


def test_packed_rows_are_cut_into_their_documents(tokenizer: Tokenizer, data: Data) -> None:
    assert read(FIXTURES / "mds_packed", tokenizer, data) == packed()
    assert read(FIXTURES / "mds_packed" / "part-1", tokenizer, data) == packed()[-2:]


def test_it_is_a_corpus_like_any_other(tokenizer: Tokenizer, data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Source(name="mds", path=str(FIXTURES / "mds_packed"))
    folder = tokenize_source(source, tokenizer, data, 1)
    metadata = json.loads((folder / "corpus.json").read_text())
    assert metadata["max_token_id"] == 363 and metadata["documents"] == len(packed())
    assert [Path(f["path"]).relative_to(FIXTURES).as_posix() for f in metadata["files"]] == [
        "mds_packed/part-0/index.json",
        "mds_packed/part-1/index.json",
        "mds_packed/part-0/shard.00000.mds",
        "mds_packed/part-1/shard.00000.mds",
    ]
    monkeypatch.setattr(tokenize, "write_unit", None)
    assert tokenize_source(source, tokenizer, data, 1) == folder  # from the cache
    assert resolve_source(replace(source, path=str(folder)), tokenizer, data).tokens == metadata["tokens"]


def test_each_shard_can_be_a_unit(tokenizer: Tokenizer, data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(units, "UNIT_BYTES", 1)
    folder = tokenize_source(Source(name="mds", path=str(FIXTURES / "mds_unpacked")), tokenizer, data, 2)
    assert len(list(folder.glob("*.arrow"))) == 2
    corpus = open_corpus(folder)
    assert [corpus.document(i).tolist() for i in range(len(corpus))] == unpacked(True, True)


def test_an_index_speaks_for_what_is_below_it(tmp_path: Path, tokenizer: Tokenizer, data: Data) -> None:
    """As the library's merge_index leaves it: one index above folders that have their own."""
    shutil.copytree(FIXTURES / "mds_packed", tmp_path / "merged")
    shards = []
    for part in ("part-0", "part-1"):
        for shard in json.loads((tmp_path / "merged" / part / "index.json").read_text())["shards"]:
            shard["raw_data"]["basename"] = f"{part}/{shard['raw_data']['basename']}"
            shards.append(shard)
    (tmp_path / "merged" / "index.json").write_text(json.dumps({"version": 2, "shards": shards}))
    assert find_mds(tmp_path) == [tmp_path / "merged" / "index.json"]
    assert read(tmp_path, tokenizer, data) == packed()


def test_text_beside_some_other_index_json_stays_text(tmp_path: Path, tokenizer: Tokenizer, data: Data) -> None:
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "index.json").write_text('{"pages": []}')
    assert find_mds(tmp_path) == []
    assert read(tmp_path, tokenizer, data) == [[256, *b"text", 257]]


def test_gz_and_a_raw_shard_beside_its_compressed_one(tmp_path: Path) -> None:
    shutil.copytree(FIXTURES / "mds_unpacked", tmp_path / "m")
    (index,) = find_mds(tmp_path)
    metadata = json.loads(index.read_text())
    for number, shard in enumerate(metadata["shards"]):
        raw = index.parent / shard["raw_data"]["basename"]
        content = gzip.compress(raw.read_bytes())
        (index.parent / f"{raw.name}.gz").write_bytes(content)
        shard |= {"compression": "gz", "zip_data": {"basename": f"{raw.name}.gz", "bytes": len(content), "hashes": {}}}
        if number == 0:
            raw.unlink()
    index.write_text(json.dumps(metadata))
    shards = read_index(index)
    assert [shard.compression for shard in shards] == ["gz", ""]
    assert [ids.tolist() for shard in shards for ids in read_shard(shard)] == unpacked(False, False)


def write_masked(folder: Path, ids: list[int], indices: list[list[int]] | None, mask: list[int]) -> None:
    """A folder of one row, by hand: as MDSWriter writes arrays whose encoding names neither type nor shape."""

    def array(values: Any, dtype: str, code: int) -> bytes:
        made = np.array(values, dtype)
        shape = np.array(made.shape, "<u4").tobytes()
        return bytes([code, made.ndim << 2 | 2]) + shape + made.tobytes()

    columns = {"input_ids": array(ids, "<i4", 33), "mask": array(mask, "<u1", 8)}
    if indices is not None:
        columns["indices"] = array(indices, "<u4", 32)
    names = sorted(columns)
    sample = np.array([len(columns[n]) for n in names], "<u4").tobytes() + b"".join(columns[n] for n in names)
    content = np.array([1, 12, 12 + len(sample)], "<u4").tobytes() + sample
    folder.mkdir()
    (folder / "shard.00000.mds").write_bytes(content)
    shard = {"column_names": names, "column_encodings": ["ndarray"] * len(names), "column_sizes": [None] * len(names)}
    shard |= {"format": "mds", "version": 2, "samples": 1, "compression": None, "zip_data": None}
    shard |= {"raw_data": {"basename": "shard.00000.mds", "bytes": len(content), "hashes": {}}}
    (folder / "index.json").write_text(json.dumps({"version": 2, "shards": [shard]}))


def test_a_loss_mask_becomes_roles(tmp_path: Path, tokenizer: Tokenizer, data: Data) -> None:
    """As ProLong's instruction data have it: packed conversations, 1 where the loss is; no ends are added to them."""
    ids, mask = list(range(10, 19)), [0, 0, 1, 1, 0, 0, 1, 0, 1]
    write_masked(tmp_path / "packed", ids, [[0, 4], [4, 9]], mask)
    write_masked(tmp_path / "whole", ids, None, mask)
    for name, spans in (("packed", [(0, 4), (4, 9)]), ("whole", [(0, 9)])):
        corpus = resolve_source(Source(name=name, path=str(tmp_path / name)), tokenizer, data)
        assert corpus.has_roles
        for index, (start, stop) in enumerate(spans):
            assert corpus.document(index).tolist() == ids[start:stop]
            assert (corpus.roles(index) == ASSISTANT).astype(int).tolist() == mask[start:stop]
    write_masked(tmp_path / "short", ids, None, mask[1:])
    with pytest.raises(UserError, match=r"shard.00000.mds row 0: mask has 8 values for 9 ids"):
        resolve_source(Source(name="short", path=str(tmp_path / "short")), tokenizer, data)
    with pytest.raises(UserError, match=r"'packed' has messages_field = 'messages', but .* MDS shards"):
        source = Source(name="packed", path=str(tmp_path / "packed"), messages_field="messages")
        resolve_source(source, replace(tokenizer, folder=str(chat_assets(tmp_path / "assets"))), data)


def chat_assets(folder: Path) -> Path:
    folder.mkdir()
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    return folder


def test_ids_in_bytes_and_under_other_names(
    tokenizer: Tokenizer, data: Data, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    """As llm-foundry writes them: chunks of a stream as bytes, whose type is found out; a uint16 array and its mask."""
    chunks = [[10 * i + n for i in range(16)] for n in range(20)]
    with caplog.at_level(logging.INFO):
        assert read(FIXTURES / "mds_bytes", tokenizer, data) == [[256, *c, 257] for c in chunks]
    assert (
        "ids from the column 'tokens' (found out)" in caplog.text and "bytes, found out to be of int64" in caplog.text
    )
    source = Source(name="mds", path=str(FIXTURES / "mds_bytes"), document_end=-1)
    corpus = resolve_source(source, tokenizer, data)
    assert [corpus.document(i).tolist() for i in range(20)] == chunks
    for dtype in (np.uint32, np.int32, np.uint16):  # the same ids in other bytes
        folder = tmp_path / np.dtype(dtype).name
        shutil.copytree(FIXTURES / "mds_bytes", folder)
        write_bytes(folder, [np.array(c, dtype).tobytes() for c in chunks])
        assert read(folder, tokenizer, data) == [[256, *c, 257] for c in chunks]
    with pytest.raises(UserError, match=r"the bytes of tokens are not ids of the tokenizer"):
        read(FIXTURES / "mds_bytes", replace(tokenizer, vocab_size=100), data)
    rows = [list(range(n, 2 * n + 4)) for n in range(5)]
    for keys in ({}, {"ids_field": "tokens", "mask_field": "loss_mask"}):
        corpus = resolve_source(Source(name="mask", path=str(FIXTURES / "mds_mask"), **keys), tokenizer, data)
        assert [corpus.document(i).tolist() for i in range(len(corpus))] == rows
        assert [(corpus.roles(i) == ASSISTANT).tolist() for i in range(5)] == [[t % 3 == 0 for t in r] for r in rows]
    source = Source(name="mask", path=str(FIXTURES / "mds_mask"), ignore_fields=("loss_mask",))
    assert not resolve_source(source, tokenizer, data).has_roles
    with pytest.raises(UserError, match=r"no column 'gold' \(mask_field\); it has loss_mask, source, tokens"):
        resolve_source(replace(source, ignore_fields=(), mask_field="gold"), tokenizer, data)


def write_bytes(folder: Path, rows: list[bytes]) -> None:
    """One shard of one column without a fixed size, by hand."""
    samples = [np.array([len(row)], "<u4").tobytes() + row for row in rows]
    begin = 4 * (len(rows) + 2)
    offsets = begin + np.cumsum([0, *map(len, samples)])
    content = np.array([len(rows), *offsets], "<u4").tobytes() + b"".join(samples)
    (folder / "shard.00000.mds").write_bytes(content)
    index = json.loads((folder / "index.json").read_text())
    del index["shards"][1:]
    index["shards"][0]["samples"] = len(rows)
    index["shards"][0]["raw_data"]["bytes"] = len(content)
    (folder / "index.json").write_text(json.dumps(index))


def test_text(tokenizer: Tokenizer, data: Data, tmp_path: Path) -> None:
    def texts(**keys: Any) -> list[str]:
        corpus = resolve_source(Source(name="text", path=str(FIXTURES / "mds_text"), **keys), tokenizer, data)
        return [bytes(corpus.document(i)[1:-1].astype("uint8")).decode() for i in range(len(corpus))]

    assert texts() == ["one", "zwei ä", "three\nlines", "five"]
    assert texts(where="meta.lang == 'de' or (score > 0.5 and n < 4)") == ["zwei ä", "three\nlines"]
    assert texts(text_field="meta.lang") == ["en", "de", "en", "en", "en"]
    for keys, words in (
        ({"text_field": "body"}, r"no column 'body' \(text_field\).*it has meta, n, score, text, turns"),
        ({"text_field": "n"}, r"row 0: the field 'n' is a int, not text"),
        ({"where": "nothing == 1"}, "nothing"),
        ({"ids_field": "text"}, "the column 'text' is str; token ids are"),
        ({"mask_field": "n"}, "mask_field = 'n', which is read for tokenized"),
        ({"document_end": 3}, "document_end, which is read for token ids, but its MDS shards hold text"),
    ):
        with pytest.raises(UserError, match=words):
            texts(**keys)
    assets = chat_assets(tmp_path / "assets")
    template = "{% for m in messages %}{{ '<' + m.role + '>' + m.content + '|' }}{% endfor %}"
    (assets / "chat_template.jinja").write_text(template)
    source = Source(name="chat", path=str(FIXTURES / "mds_text"), messages_field="turns", long_document="drop")
    with pytest.raises(UserError, match=r"row 0: the chat template .* ends a response with '<user>a\|<assistant>b\|'"):
        resolve_source(source, replace(tokenizer, folder=str(assets)), data)


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the description of the first shard in an index.json."""
    metadata = json.loads(path.read_text())
    change(metadata["shards"][0])
    path.write_text(json.dumps(metadata))


def put(file: Path, at: int, *values: int) -> None:
    """Overwrite uint32 values."""
    content = bytearray(file.read_bytes())
    content[at : at + 4 * len(values)] = np.array(values, np.uint32).tobytes()
    file.write_bytes(content)


def first_sample(folder: Path) -> int:
    return int(np.frombuffer((folder / "shard.00000.mds").read_bytes()[4:8], "<u4")[0])


def sizes(folder: Path, *values: int) -> None:
    put(folder / "shard.00000.mds", first_sample(folder), *values)


def set_indices(folder: Path, *values: int) -> None:
    """Of the first packed row: uint32 sizes of the three varying columns, `domain`, 3 bytes of shape, the span."""
    put(folder / "shard.00000.mds", first_sample(folder) + 12 + len("books") + 3, *values)


def grow(folder: Path) -> None:
    """The index agrees with a file whose last sample has no end."""
    with (folder / "shard.00000.mds").open("ab") as file:
        file.write(b"more")
    edit(folder / "index.json", lambda s: s["raw_data"].update(bytes=s["raw_data"]["bytes"] + 4))


def encoding(name: str, value: str) -> Callable[[Path], None]:
    def change(shard: dict[str, Any]) -> None:
        shard["column_encodings"][shard["column_names"].index(name)] = value

    return lambda folder: edit(folder / "index.json", change)


DAMAGE: dict[str, tuple[str, Callable[[Path], Any], list[str]]] = {
    "cut short": (
        "mds_unpacked",
        lambda f: os.truncate(f / "shard.00000.mds", 700),
        ["shard.00000.mds", "700 bytes", "says 796"],
    ),
    "a compressed shard is cut": (
        "mds_zstd",
        lambda f: (
            os.truncate(f / "shard.00001.mds.zstd", 300),
            edit(f / "index.json", lambda s: None),
        ),
        ["shard.00001.mds.zstd", "300 bytes"],
    ),
    "compressed garbage": (
        "mds_zstd",
        lambda f: (f / "shard.00000.mds.zstd").write_bytes(b"\7" * 484),
        ["shard.00000.mds.zstd", "cannot be decompressed"],
    ),
    "a missing shard": (
        "mds_unpacked",
        lambda f: (f / "shard.00001.mds").unlink(),
        ["shard.00001.mds", "missing", "index.json"],
    ),
    "another number of samples": (
        "mds_unpacked",
        lambda f: put(f / "shard.00000.mds", 0, 7),
        ["shard.00000.mds", "7 samples", "says 6"],
    ),
    "offsets out of order": (
        "mds_unpacked",
        lambda f: put(f / "shard.00000.mds", 8, 40, 4000),
        ["shard.00000.mds", "offsets"],
    ),
    "an offset into the header": ("mds_unpacked", lambda f: put(f / "shard.00000.mds", 4, 8), ["offsets", "from 32"]),
    "offsets that end early": ("mds_unpacked", grow, ["shard.00000.mds", "offsets"]),
    "columns that are larger than their row": (
        "mds_unpacked",
        lambda f: sizes(f, 4, 4000),
        ["shard.00000.mds row 0", "4000"],
    ),
    "an array that is no array": ("mds_unpacked", lambda f: sizes(f, 3, 15), ["row 0", "input_ids"]),
    "an unknown encoding": (
        "mds_unpacked",
        encoding("input_ids", "pkl"),
        ["shard.00000.mds", "input_ids", "'pkl'", "ndarray:TYPE"],
    ),
    "floats": ("mds_unpacked", encoding("input_ids", "ndarray:float32"), ["'ndarray:float32'", "int32"]),
    "negative ids": (
        "mds_unpacked",
        lambda f: put(f / "shard.00000.mds", first_sample(f) + 8 + 4 + 2, 1 << 31),
        ["row 0", "-2147483648"],
    ),
    "no input_ids": (
        "mds_unpacked",
        lambda f: edit(f / "index.json", lambda s: s.update(column_names=["domain", "numbers", "length"])),
        ["no column 'text' (text_field)", "input_ids, tokens, token_ids", "domain, numbers, length", "ids_field"],
    ),
    "an unknown compression": (
        "mds_zstd",
        lambda f: edit(f / "index.json", lambda s: s.update(compression="snappy")),
        ["shard.00000.mds.zstd", "'snappy'", "bz2, gz, zstd", "shard.00000.mds beside it"],
    ),
    "another version": (
        "mds_unpacked",
        lambda f: (f / "index.json").write_text('{"version": 3, "shards": []}'),
        ["index.json", "version 3", "version 2"],
    ),
    "another format": (
        "mds_unpacked",
        lambda f: edit(f / "index.json", lambda s: s.update(format="csv")),
        ["index.json", "csv"],
    ),
    "an index cut short": ("mds_unpacked", lambda f: os.truncate(f / "index.json", 99), ["index.json", "damaged"]),
    "an index without sizes": (
        "mds_unpacked",
        lambda f: edit(f / "index.json", lambda s: s.pop("raw_data")),
        ["index.json", "raw_data"],
    ),
    "spans beyond the row": ("mds_packed/part-0", lambda f: set_indices(f, 0, 65), ["row 0", "64 tokens", "[ 0 65]"]),
    "spans out of order": ("mds_packed/part-0", lambda f: set_indices(f, 9, 3), ["row 0", "rising", "[9 3]"]),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_named(tokenizer: Tokenizer, data: Data, tmp_path: Path, case: str) -> None:
    name, spoil, words = DAMAGE[case]
    folder = tmp_path / "mds"
    shutil.copytree(FIXTURES / name, folder)
    read(folder, tokenizer, replace(data, cache_folder=str(tmp_path / "good")))
    spoil(folder)
    with pytest.raises(UserError) as error:
        read(folder, tokenizer, data)
    for word in [str(folder), *words]:
        assert word in str(error.value)
    assert "\n" not in str(error.value)
    assert not [p for p in Path(data.cache_folder).glob("*") if p.is_dir()]


def test_no_damage_of_a_shard_gets_out_of_hand(tmp_path: Path) -> None:
    """A byte turned anywhere in a shard is read as other ids or refused, and never anything else."""
    shutil.copytree(FIXTURES / "mds_packed" / "part-1", tmp_path / "m")
    (shard,) = read_index(tmp_path / "m" / "index.json")
    good = Path(shard.path).read_bytes()
    rng = np.random.default_rng(0)
    refused = 0
    for at in range(len(good)):
        bad = bytearray(good)
        bad[at] ^= int(rng.integers(1, 256))
        Path(shard.path).write_bytes(bad)
        try:
            for ids in read_shard(shard):
                assert ids.dtype == np.int32 and len(ids) <= 64
        except UserError:
            refused += 1
    assert 30 < refused < len(good)
