"""The table of docs/sources.md: every layout, as its own writer publishes it, is read right to the token.

What is expected is computed here from texts and ids alone: a byte is a token, 256 begins and 257 ends a document. The
MDS and Megatron files were written by MDSWriter and IndexedDatasetBuilder (data/make_*.py); the rest is written here.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import lzma
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from tests.unit.extensions.ingest.test_chat_templates import CHATML, assets
from torchtitan.config.data_schema import Data, Source
from torchtitan.datasets.corpus import ASSISTANT, Corpus
from torchtitan.datasets.loader import micro_batch
from torchtitan.datasets.plan import Plan
from torchtitan.datasets.tokenizer import Tokenizer, load_tokenizer
from torchtitan.extensions.ingest.resolve import resolve_source

PAGE = Path(__file__).parents[4] / "docs" / "sources.md"
FIXTURES = Path(__file__).parent / "data"
TEXTS = ["one", "zwei ä\nlines", "3 " * 40, "vier\t{}", "fünf"]
IDS = [[10, 11, 12], [256, 5, 6, 257], [7] * 30, [20, 21]]
LINES = "".join(json.dumps({"text": text, "n": n}) + "\n" for n, text in enumerate(TEXTS)).encode()
CHATS = [
    [("system", "Be brief."), ("user", "1 + 1?"), ("assistant", "2"), ("user", "And 2 + 2?"), ("assistant", "4")],
    [("user", "Say ä."), ("assistant", "ä\nä")],
]

Documents = list[tuple[list[int], list[bool] | None]]
"""Ids, and which of them are trained; None: all."""


def of_texts(texts: list[str] = TEXTS) -> Documents:
    return [([256, *text.encode(), 257], None) for text in texts]


def of_ids(ids: list[list[int]] = IDS) -> Documents:
    """With the ends that they lack."""
    return [([256] * (d[0] != 256) + d + [257] * (d[-1] != 257), None) for d in ids]


def lines(folder: Path) -> dict[str, Any]:
    (folder / "a.jsonl").write_bytes(LINES)
    return {"path": "a.jsonl"}


def json_lines(folder: Path) -> dict[str, Any]:
    (folder / "a.json").write_bytes(LINES)
    return {"path": "a.json"}


def json_array(folder: Path) -> dict[str, Any]:
    (folder / "a.json").write_text(json.dumps([{"text": text} for text in TEXTS], indent=2))
    return {"path": "a.json"}


def packed(suffix: str, compress: Callable[[bytes], bytes]) -> Callable[[Path], dict[str, Any]]:
    def write(folder: Path) -> dict[str, Any]:
        (folder / f"a.jsonl{suffix}").write_bytes(compress(LINES))
        return {"path": f"a.jsonl{suffix}"}

    return write


def parquet(folder: Path) -> dict[str, Any]:
    for part, texts in (("train-00000-of-00002", TEXTS[:3]), ("train-00001-of-00002", TEXTS[3:])):
        datasets.Dataset.from_dict({"text": texts}).to_parquet(str(folder / f"{part}.parquet"))
    return {"path": "*.parquet"}


def nested(folder: Path) -> dict[str, Any]:
    pq.write_table(pa.table({"record": [{"body": text, "n": 1} for text in TEXTS]}), folder / "a.parquet")
    return {"path": "a.parquet", "text_field": "record.body"}


def saved_text(folder: Path) -> dict[str, Any]:
    datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(str(folder / "saved"))
    return {"path": "saved"}


def arrow_text(folder: Path) -> dict[str, Any]:
    table = pa.table({"text": TEXTS})
    with pa.ipc.new_file(str(folder / "a.arrow"), table.schema) as writer:
        writer.write_table(table)
    return {"path": "a.arrow"}


def files_of(suffix: str) -> Callable[[Path], dict[str, Any]]:
    def write(folder: Path) -> dict[str, Any]:
        (folder / "README.md").write_text("about")
        (folder / "LICENSE").write_text("mine")
        for number, text in enumerate(TEXTS):
            (folder / f"deep/{number}").mkdir(parents=True)
            (folder / f"deep/{number}/file{suffix}").write_text(text)
        return {"path": "."}

    return write


def slimpajama(folder: Path) -> dict[str, Any]:
    sets = ["RedPajamaBook" if n % 2 else "RedPajamaC4" for n in range(10)]
    texts = [text for text in TEXTS for _ in range(2)]
    records = [{"text": text, "meta": {"redpajama_set_name": name}} for text, name in zip(texts, sets)]
    (folder / "train/chunk1").mkdir(parents=True)
    content = "".join(json.dumps(record) + "\n" for record in records).encode()
    (folder / "train/chunk1/example_train_0.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(content))
    return {"path": "train", "where": "meta.redpajama_set_name == 'RedPajamaBook'"}


def stack_v2(folder: Path) -> dict[str, Any]:
    rows = [{"repo_name": str(n), "files": [{"path": "b", "content": text[2:]}, {"path": "a", "content": text[:2]}]}
            for n, text in enumerate(TEXTS)]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows), folder / "a.parquet")
    return {"path": "a.parquet", "text_field": "files[].content"}


def repositories(folder: Path) -> dict[str, Any]:
    rows = [{"repo": "r", "path": path, "content": content} for path, content in (("b.py", "2"), ("a.py", "1\n"))]
    pq.write_table(pa.Table.from_pylist(rows), folder / "a.parquet")
    keys = {"text_field": "content", "group_by": "repo", "part_header": "# {path}\n"}
    return {"path": "a.parquet", "part_order": "path"} | keys


def hub_copy(folder: Path) -> dict[str, Any]:
    (folder / "copy").mkdir()
    (folder / "copy/train.jsonl").write_bytes(LINES)
    return {"path": f"hub:{folder}/copy"}


def fixture(name: str, **keys: Any) -> Callable[[Path], dict[str, Any]]:
    return lambda folder: {"path": str(FIXTURES / name), **keys}


def dolma(folder: Path) -> dict[str, Any]:
    np.concatenate(IDS).astype(np.uint16).tofile(folder / "part-0.npy")
    ends = np.cumsum([0, *map(len, IDS)]).tolist()
    with gzip.open(folder / "part-0.csv.gz", "wt", newline="") as file:
        csv.writer(file).writerows([start, stop, f"id-{start}", "src", 0] for start, stop in zip(ends, ends[1:]))
    return {"path": "part-0.npy", "format": "raw_uint16"}


ENDED = [[10, 11, 257], [*range(200), 257], [5, 257]]


def numpy_saved(folder: Path) -> dict[str, Any]:
    np.save(folder / "a.npy", np.concatenate(ENDED).astype(np.uint32))
    return {"path": "a.npy"}


def nanogpt(folder: Path) -> dict[str, Any]:
    np.concatenate(ENDED).astype(np.uint16).tofile(folder / "train.bin")
    return {"path": "train.bin", "format": "raw_uint16"}


def llm_c(folder: Path) -> dict[str, Any]:
    ids = np.concatenate([[256, 10, 11], [256, *range(200)], [256, 5]])
    header = np.zeros(256, np.int32)
    header[:3] = 20240520, 1, len(ids)
    (folder / "a.bin").write_bytes(header.tobytes() + ids.astype(np.uint16).tobytes())
    return {"path": "a.bin"}


def saved_ids(folder: Path) -> dict[str, Any]:
    datasets.Dataset.from_dict({"input_ids": IDS}).save_to_disk(str(folder / "ids"))
    return {"path": "ids"}


def parquet_ids(folder: Path) -> dict[str, Any]:
    pq.write_table(pa.table({"llama_ids": pa.array(IDS, pa.large_list(pa.int64()))}), folder / "a.parquet")
    return {"path": "a.parquet", "ids_field": "llama_ids"}


PROMPT, ANSWER, PAD = [5] * 9, [9, 8, 257], [0] * 4
ROW, TRAINED = [256, *PROMPT, *ANSWER], [False] * 10 + [True] * 3


def rows_with(name: str, values: list[int], padded: bool = False, **keys: Any) -> Callable[[Path], dict[str, Any]]:
    def write(folder: Path) -> dict[str, Any]:
        pad = PAD if padded else []
        columns = {
            "input_ids": [ROW + pad] * 3,
            name: [values + (PAD if padded and name != "attention_mask" else [])] * 3,
        }
        if padded:
            columns["attention_mask"] = [[1] * len(ROW) + [0] * len(PAD)] * 3
        datasets.Dataset.from_dict(columns).save_to_disk(str(folder / "ids"))
        return {"path": "ids", **keys}

    return write


MASKED = [(ROW, TRAINED)] * 3


def mds_documents() -> Documents:
    ids = [[10 * n + i for i in range(n)] for n in (3, 20, 5, 62, 1, 17, 40, 8)]
    ids[1], ids[2][0] = [256, *ids[1][1:-1], 257], 256
    return of_ids(ids)


def mds_packed() -> Documents:
    cuts = ([0, 64], [0, 10, 64], [0, 1, 2, 40, 64], [0, 32, 64])
    return [(list(range(100 * n + a, 100 * n + b)), None) for n, at in enumerate(cuts) for a, b in zip(at, at[1:])]


def mds_masked() -> Documents:
    rows = [list(range(n, 2 * n + 4)) for n in range(5)]
    return [(row, [token % 3 == 0 for token in row]) for row in rows]


MEGATRON = [[65, 66, 67, 68, 257], [256, 97, 98], [1, 2, 3, 4, 257], [256, 7, 7, 257]]
BEGUN = [[256, 10, 11, 257], [256, *range(200), 257], [256, 5, 257]]

LAYOUTS: dict[str, tuple[Callable[[Path], dict[str, Any]], Documents]] = {
    "JSON lines": (lines, of_texts()),
    "JSON lines named .json": (json_lines, of_texts()),
    "one JSON array": (json_array, of_texts()),
    "gzip": (packed(".gz", gzip.compress), of_texts()),
    "zstandard": (packed(".zst", zstandard.ZstdCompressor().compress), of_texts()),
    "bzip2": (packed(".bz2", bz2.compress), of_texts()),
    "xz": (packed(".xz", lzma.compress), of_texts()),
    "Parquet": (parquet, of_texts()),
    "a nested field": (nested, of_texts()),
    "Arrow of text": (arrow_text, of_texts()),
    "`save_to_disk` of text": (saved_text, of_texts()),
    "text files": (files_of(".txt"), of_texts()),
    "source code": (files_of(".py"), of_texts()),
    "SlimPajama": (slimpajama, of_texts()),
    "The Stack v2": (stack_v2, of_texts([f"{text[:2]}\n{text[2:]}\n" for text in TEXTS])),  # parts end their lines
    "code by repository": (repositories, of_texts(["# a.py\n1\n# b.py\n2\n"])),
    "a dataset of the hub": (hub_copy, of_texts()),
    "MDS of text": (fixture("mds_text"), of_texts(["one", "zwei ä", "three\nlines", "five"])),
    "MDS of tokens": (fixture("mds_zstd"), mds_documents()),
    "MDS, packed": (fixture("mds_packed"), mds_packed()),
    "MDS with a mask": (fixture("mds_mask"), mds_masked()),
    "Megatron, NeMo": (fixture("megatron_uint16"), of_ids(MEGATRON)),
    "Dolma, Olmo 3": (dolma, of_ids()),
    "`numpy.save`": (numpy_saved, of_ids(ENDED)),
    "nanoGPT": (nanogpt, of_ids(ENDED)),
    "llm.c": (llm_c, of_ids(BEGUN)),
    "`save_to_disk` of tokens": (saved_ids, of_ids()),
    "Parquet of tokens": (parquet_ids, of_ids()),
    "tokens with labels": (rows_with("labels", [-100] * 10 + ANSWER), MASKED),
    "tokens with a loss mask": (rows_with("loss_mask", [0] * 10 + [1] * 3), MASKED),
    "padded tokens": (rows_with("loss_mask", [0] * 10 + [1] * 3, padded=True), MASKED),
}


def check(corpus: Corpus, expected: Documents, data: Data) -> None:
    """Ids and what is trained of all documents; then the labels of the batches, document by document."""
    found = [corpus.document(i).tolist() for i in range(len(corpus))]
    kept = [(ids, trained) for ids, trained in expected if trained is None or any(trained)]
    assert found == [ids for ids, _ in kept]
    trained_of = {tuple(ids): trained or [True] * len(ids) for ids, trained in kept}
    if corpus.has_roles:
        for i in range(len(corpus)):
            assert (corpus.roles(i) == ASSISTANT).tolist() == trained_of[tuple(found[i])]
    plan = Plan(replace(data, sources=(Source("s", "s"),)), [corpus], 512, 1, 8, seed=0)
    compared = set()
    for step in range(plan.steps):
        batch = micro_batch(plan, step, [0])
        ends = batch.cu_documents.tolist()
        for start, stop in zip(ends, ends[1:]):
            ids = batch.tokens[start:stop].tolist()
            if tuple(ids) in trained_of:
                wanted = [b if t else -100 for b, t in zip(ids[1:], trained_of[tuple(ids)][1:])]
                assert batch.labels[start:stop].tolist() == [*wanted, -100]
                compared.add(tuple(ids))
    assert compared == trained_of.keys()


@pytest.mark.parametrize("name", LAYOUTS)
def test_as_published(name: str, tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets.disable_progress_bars()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    write, expected = LAYOUTS[name]
    (tmp_path / "data").mkdir()
    keys = write(tmp_path / "data")
    many = replace(tokenizer, vocab_size=1000) if "MDS" in name else tokenizer
    data = Data(folder=str(tmp_path / "data"), cache_folder=str(tmp_path / "cache"))
    check(resolve_source(Source(name="s", **keys), many, data), expected, data)


ROLES = {"system": "system", "user": "human", "assistant": "gpt"}
OPENAI = [{"messages": [{"role": role, "content": text} for role, text in chat]} for chat in CHATS]
SHAREGPT = [{"conversations": [{"from": ROLES[role], "value": text} for role, text in chat]} for chat in CHATS]
ALPACA = [{"instruction": "Say ä.", "input": "", "output": "ä\nä"}]
CHAT_LAYOUTS: dict[str, tuple[list[dict[str, Any]], str, list[list[tuple[str, str]]]]] = {
    "conversations as messages": (OPENAI, "messages", CHATS),
    "ShareGPT": (SHAREGPT, "conversations", CHATS),
    "Alpaca": (ALPACA, "instruction", [[("user", "Say ä."), ("assistant", "ä\nä")]]),
}


@pytest.mark.parametrize("name", CHAT_LAYOUTS)
def test_conversations_as_published(name: str, tmp_path: Path) -> None:
    """The template's text, written here by hand; trained is each answer with the token that ends it."""
    tokenizer = load_tokenizer(assets(tmp_path / "assets", CHATML, ["<|im_start|>", "<|im_end|>"]))
    records, field, chats = CHAT_LAYOUTS[name]
    (tmp_path / "a.json").write_text(json.dumps(records))
    source = Source("s", str(tmp_path / "a.json"), messages_field=field)
    corpus = resolve_source(source, tokenizer, Data(cache_folder=str(tmp_path / "cache")))
    assert len(corpus) == len(chats)
    for i, chat in enumerate(chats):
        ids = corpus.document(i)
        text = "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in chat)
        assert tokenizer.decode(ids.tolist()).rstrip("\n") == text.rstrip("\n")
        trained = tokenizer.decode(ids[corpus.roles(i) == ASSISTANT].tolist())
        assert trained == "".join(f"{content}<|im_end|>" for role, content in chat if role == "assistant")


def test_the_page_lists_these_layouts() -> None:
    table = PAGE.read_text().split("## Layouts as they are published\n")[1].split("\n## ")[0]
    rows = [row for row in re.findall(r"^\| (.+?) \|", table, re.M) if row != "layout" and not row.startswith("-")]
    assert rows == [*LAYOUTS, *CHAT_LAYOUTS]
    assert len(rows) >= 26
