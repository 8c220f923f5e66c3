"""Tokenized Parquet and Arrow, written by datasets and pyarrow: documents and labels to the token, whatever the file;
and each column that says something about the loss is read or refused by name.

The oracle, plain_documents, goes through the rows token by token.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from torchtitan.config.data_schema import Data, Source
from torchtitan.datasets.corpus import ASSISTANT, Corpus
from torchtitan.datasets.loader import build_loader, micro_batch
from torchtitan.datasets.plan import Plan
from torchtitan.datasets.tokenizer import Tokenizer
from torchtitan.extensions.ingest import convert_tables, mapped_tables, token_tables
from torchtitan.extensions.ingest.resolve import resolve_source
from torchtitan.tools.errors import UserError

datasets.disable_progress_bars()
Rows = dict[str, list[Any]]
BOS, EOS = 256, 257


def save_to_disk(path: Path, table: pa.Table) -> Path:
    datasets.Dataset(table).save_to_disk(str(path), num_shards=2 if len(table) > 3 else 1)
    return path


def arrow(new: Any, compression: str | None, batches: int = 2) -> Callable[[Path, pa.Table], Path]:
    def write(path: Path, table: pa.Table) -> Path:
        path.mkdir()
        options = pa.ipc.IpcWriteOptions(compression=compression)
        with new(str(path / "rows.arrow"), table.schema, options=options) as out:
            out.write_table(table, max_chunksize=max(1, -(-len(table) // batches)))
        return path / "rows.arrow"

    return write


def parquet(path: Path, table: pa.Table) -> Path:
    path.mkdir()
    pq.write_table(table, path / "rows.parquet", row_group_size=2)
    return path


def parquet_and_arrow(path: Path, table: pa.Table) -> Path:
    path.mkdir()
    pq.write_table(table.slice(0, 2), path / "part-0.parquet")
    with pa.ipc.new_stream(str(path / "part-1.arrow"), table.schema) as out:
        out.write_table(table.slice(2))
    return path


WRITERS: dict[str, Callable[[Path, pa.Table], Path]] = {
    "save_to_disk": save_to_disk,
    "stream": arrow(pa.ipc.new_stream, None),
    "file": arrow(pa.ipc.new_file, None),
    "zstd": arrow(pa.ipc.new_file, "zstd"),
    "parquet": parquet,
    "parquet_and_arrow": parquet_and_arrow,
}
IN_PLACE = ("save_to_disk", "stream", "file")


def table_of(rows: Rows, types: dict[str, pa.DataType] | None = None) -> pa.Table:
    arrays = {name: pa.array(column) for name, column in rows.items()}
    return pa.table({name: a.cast((types or {}).get(name, a.type)) for name, a in arrays.items()})


def resolve(path: Path, tokenizer: Tokenizer, data: Data, **keys: Any) -> Corpus:
    return resolve_source(Source(name="rows", path=str(path), **keys), tokenizer, data)


def found(corpus: Corpus) -> list[tuple[list[int], list[int] | None]]:
    """Each document, and where the loss may be in it."""
    n = range(len(corpus))
    ids = [corpus.document(i) for i in n]
    assert corpus.lengths.tolist() == list(map(len, ids)) and all(d.dtype == np.int32 for d in ids)
    roles = [corpus.roles(i) if corpus.has_roles else None for i in n]
    assert all(r is None or (len(r) == len(d) and r.dtype == np.int8) for r, d in zip(roles, ids))
    return [(d.tolist(), None if r is None else (r == ASSISTANT).astype(int).tolist()) for d, r in zip(ids, roles)]


def plain_documents(rows: Rows, ids: str = "input_ids", ends: bool = True) -> list[tuple[list[int], list[int] | None]]:
    """What the rows mean, token by token."""
    documents = []
    for r in range(len(rows[ids])):
        row = {name: column[r] for name, column in rows.items()}
        cut_after = set()
        if "seq_lengths" in row:
            cut_after = set(np.cumsum(row["seq_lengths"]) - 1)
        if "cu_seqlens" in row:
            cut_after = {end - 1 for end in row["cu_seqlens"]}
        document: list[tuple[int, int]] = []
        for k, token in enumerate(row[ids]):
            if "attention_mask" in row and not row["attention_mask"][k]:
                continue
            begins = "position_ids" in row and row["position_ids"][k] == 0
            begins |= "document_ids" in row and k > 0 and row["document_ids"][k] != row["document_ids"][k - 1]
            if begins and document:
                documents.append(document)
                document = []
            trained = 1
            if "labels" in row:
                trained = int(row["labels"][k] != -100)
            if "loss_mask" in row:
                trained = int(row["loss_mask"][k])
            if "roles" in row:
                trained = int(row["roles"][k] == 4)
            document.append((token, trained))
            if k in cut_after:
                documents.append(document)
                document = []
        documents.append(document)
    has_loss = bool({"labels", "loss_mask", "roles"} & set(rows))
    made: list[tuple[list[int], list[int] | None]] = []
    for document in documents:
        tokens, trained_ = [t for t, _ in document], [m for _, m in document]
        if not tokens or (has_loss and not any(trained_[1:])):
            continue
        if ends and not has_loss:
            tokens = [BOS] * (tokens[0] != BOS) + tokens + [EOS] * (tokens[-1] != EOS)
        made.append((tokens, trained_ if has_loss else None))
    return made


def random_rows(seed: int, *columns: str) -> Rows:
    """Rows of 0 to 30 ids: some begin with BOS or end with EOS; padded at either end, packed, with labels or masks."""
    random = np.random.default_rng(seed)
    rows: Rows = {name: [] for name in ("input_ids", *columns)}
    for r in range(9):
        n = 0 if r == 4 else int(random.integers(1, 31))
        ids = random.integers(0, 256, n)
        if n and r % 3 == 0:
            ids[0] = BOS
        if n and r % 3 == 1:
            ids[-1] = EOS
        left, right = (int(x) for x in random.integers(0, 4, 2)) if "attention_mask" in columns else (0, 0)
        if r == 7 and "attention_mask" in columns:
            ids, n = ids[:0], 0  # padding alone
        cuts = np.sort(random.integers(0, n + 1, 3))
        lengths = np.diff([0, *cuts, n])
        trained = random.integers(0, 2, n) if r != 2 else np.zeros(n, int)
        made: dict[str, Any] = {
            "labels": np.where(trained, ids, -100),
            "loss_mask": trained,
            "roles": np.where(trained, 4, random.integers(0, 4, n)),
            "attention_mask": np.ones(n, int),
            "position_ids": np.concatenate([np.arange(length) for length in lengths]) if n else ids,
            "document_ids": np.repeat([3, 1, 2, 8], lengths),
            "special_tokens_mask": (ids >= 256).astype(int),
            "token_type_ids": np.zeros(n, int),
        }
        padding = {"input_ids": 7, "labels": 7, "position_ids": 1, "token_type_ids": 0}  # its labels do not matter
        rows["input_ids"].append([7] * left + ids.tolist() + [7] * right)
        for name in columns:
            if name == "seq_lengths":
                rows[name].append(lengths.tolist())
            elif name == "cu_seqlens":
                rows[name].append([0, *np.cumsum(lengths).tolist()])
            else:
                pad = padding.get(name, 0)
                rows[name].append([pad] * left + np.asarray(made[name]).tolist() + [pad] * right)
    return rows


CASES = {
    "ids alone": (),
    "labels": ("labels",),
    "loss_mask": ("loss_mask",),
    "roles": ("roles",),
    "labels and padding": ("labels", "attention_mask"),
    "padding alone": ("attention_mask", "special_tokens_mask", "token_type_ids"),
    "TRL, packed": ("seq_lengths",),
    "Axolotl, packed": ("labels", "attention_mask", "position_ids"),
    "cu_seqlens": ("loss_mask", "cu_seqlens"),
    "document_ids": ("document_ids",),
    "all that agree": ("labels", "loss_mask", "roles", "document_ids"),
}
TYPES: list[dict[str, pa.DataType]] = [
    {},
    {"input_ids": pa.list_(pa.uint16()), "labels": pa.list_(pa.int32()), "loss_mask": pa.list_(pa.bool_())},
    {"input_ids": pa.large_list(pa.int32()), "loss_mask": pa.list_(pa.float32()), "roles": pa.list_(pa.int8())},
]


@pytest.mark.parametrize("case", CASES)
def test_documents_and_labels_to_the_token(case: str, tmp_path: Path, tokenizer: Tokenizer, data: Data) -> None:
    for seed, types in enumerate(TYPES):
        rows = random_rows(seed, *CASES[case])
        expected = plain_documents(rows)
        prints = set()
        for name, write in WRITERS.items():
            path = write(tmp_path / f"{seed}-{name}", table_of(rows, types))
            corpus = resolve(path, tokenizer, data)
            assert found(corpus) == expected, (name, seed)
            assert corpus.max_token_id == max(max(ids) for ids, _ in expected if ids) or not corpus.has_roles
            again = resolve(path, tokenizer, data)  # from what is kept
            assert found(again) == expected and again.fingerprint == corpus.fingerprint
            bits = types.get("loss_mask") == pa.list_(pa.bool_()) and "loss_mask" in rows and "labels" not in rows
            copied = (Path(corpus.folder) / "corpus.json").is_file()
            assert copied == (name not in IN_PLACE or bits), name
            prints.add(corpus.fingerprint)
        assert len(prints) > 1  # copied files have the fingerprint of their bytes


def test_pieces_of_large_batches(
    tmp_path: Path, tokenizer: Tokenizer, data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (token_tables, mapped_tables, convert_tables):
        monkeypatch.setattr(module, "PIECE", 20)
    rows = random_rows(3, "labels", "attention_mask", "position_ids")
    for name, write in WRITERS.items():
        assert found(resolve(write(tmp_path / name, table_of(rows)), tokenizer, data)) == plain_documents(rows), name
    broken = {**rows, "labels": [*rows["labels"][:-1], [5] * len(rows["labels"][-1])]}
    for name in ("file", "parquet"):
        with pytest.raises(UserError, match=r"rows\.\w+ row 8: labels holds 5"):
            resolve(WRITERS[name](tmp_path / f"broken-{name}", table_of(broken)), tokenizer, data)


def test_labels_of_the_batches(tmp_path: Path, tokenizer: Tokenizer, data: Data) -> None:
    """Through Plan and loader: the answer's 30 tokens of a padded row of 100, in a row by itself and in a mixture."""
    prompt, answer, pad = [5] * 40, [9, 8, 7] * 10, [2] * 30
    for more in (
        {"labels": [-100] * 40 + answer + [-100] * 30, "attention_mask": [1] * 70 + [0] * 30},
        {"loss_mask": [0] * 40 + [1] * 30 + [0] * 30},
        {"assistant_masks": [0] * 40 + [1] * 30 + [0] * 30, "special_tokens_mask": [0] * 70 + [1] * 30},
        {"completion_mask": [0] * 40 + [1] * 30 + [0] * 30, "completion": "text"},
    ):
        shutil.rmtree(tmp_path / "rows", ignore_errors=True)
        rows = {"input_ids": [prompt + answer + pad] * 8} | {name: [column] * 8 for name, column in more.items()}
        datasets.Dataset.from_dict(rows).save_to_disk(str(tmp_path / "rows"))
        source = Source(name="rows", path=str(tmp_path / "rows"))
        single = replace(data, sources=(source,), packing="single")
        corpus = resolve_source(source, tokenizer, single)
        plan = Plan(single, [corpus], seq_len=128, rows_per_step=2, steps=3, seed=0)
        batch = micro_batch(plan, 0, [0])
        assert batch.num_valid == 30
        assert batch.labels.tolist() == [-100] * 39 + answer + [-100] * 59
        assert batch.tokens[: len(corpus.document(0))].tolist() == (prompt + answer + pad)[: corpus.lengths[0]]
    loader = build_loader(plan, 0, 1, 2, num_workers=1)  # a forked process maps for itself
    assert [int(b.num_valid) for b in loader] == [60, 60, 60]


def test_other_names(tmp_path: Path, tokenizer: Tokenizer, data: Data) -> None:
    plain = random_rows(0, "labels", "loss_mask")
    rows = {"ids": plain["input_ids"], "where_loss": plain["loss_mask"], "gold": plain["labels"]}
    for name in ("file", "parquet"):
        path = WRITERS[name](tmp_path / name, table_of(rows))
        expected = plain_documents(plain)
        for keys in ({"mask_field": "where_loss"}, {"labels_field": "gold"}):
            other = "gold" if "mask_field" in keys else "where_loss"
            if other == "where_loss":
                with pytest.raises(UserError, match="the column 'where_loss' .* seems to say something about the loss"):
                    resolve(path, tokenizer, data, ids_field="ids", **keys)
                keys = keys | {"ignore_fields": ("where_loss",)}
            assert found(resolve(path, tokenizer, data, ids_field="ids", **keys)) == expected
        every = resolve(path, tokenizer, data, ids_field="ids", ignore_fields=("where_loss",))
        assert found(every) == plain_documents({"input_ids": rows["ids"]})
        assert not every.has_roles
    path = WRITERS["parquet"](tmp_path / "dotted", table_of({"a.ids": rows["ids"], "a": ["x"] * 9}))
    assert found(resolve(path, tokenizer, data, ids_field="a.ids")) == plain_documents({"input_ids": rows["ids"]})
    for guessed in ("tokens", "token_ids"):
        path = WRITERS["file"](tmp_path / guessed, table_of({guessed: rows["ids"], "name": ["x"] * 9}))
        assert found(resolve(path, tokenizer, data)) == plain_documents({"input_ids": rows["ids"]})


def test_rows_of_fixed_size_and_cut_by_an_id(
    tmp_path: Path, tokenizer: Tokenizer, data: Data, caplog: pytest.LogCaptureFixture
) -> None:
    """As grouped texts are saved: chunks of a stream, of one length, with EOS within."""
    stream = np.random.default_rng(0).integers(0, 256, 10 * 32)
    stream[::23] = EOS
    chunks = stream.reshape(10, 32)
    table = pa.table({"input_ids": pa.FixedSizeListArray.from_arrays(pa.array(chunks.ravel(), pa.int32()), 32)})
    for name in ("stream", "parquet"):
        path = WRITERS[name](tmp_path / name, table)
        with caplog.at_level(logging.WARNING):
            caplog.clear()
            assert found(resolve(path, tokenizer, data)) == plain_documents({"input_ids": chunks.tolist()})
        assert "all rows have 34 tokens" in caplog.text and "document_end" in caplog.text or name == "parquet"
        as_they_are = found(resolve(path, tokenizer, data, document_end=-1))
        assert as_they_are == [(chunk.tolist(), None) for chunk in chunks]
        cut = found(resolve(path, tokenizer, data, document_end=EOS))
        expected = [p for chunk in chunks for p in np.split(chunk, np.flatnonzero(chunk == EOS) + 1) if len(p)]
        assert cut == [(piece.tolist(), None) for piece in expected]
        begun = found(resolve(path, tokenizer, data, document_start=EOS))
        expected = [p for chunk in chunks for p in np.split(chunk, np.flatnonzero(chunk == EOS)) if len(p)]
        assert begun == [(piece.tolist(), None) for piece in expected]


IDS = [[1, 2, 3], [4, 5], [6, 7, 8]]


@pytest.mark.parametrize(
    "more, words",
    [
        ({"labels": [[2, 3, -100], [5, -100], [7, 8, -100]]}, r"row 0: labels holds 2 at token 0.* They are shifted"),
        ({"labels": [[1, 2, 3], [4, 9], [6, 7, 8]]}, r"row 1: labels holds 9 at token 1, whose id is 5"),
        ({"labels": [[1, 2, 3], [4, -1], [6, 7, 8]]}, r"row 1: labels holds -1 at token 1"),
        ({"labels": [[1, 2, 3], [4], [6, 7, 8]]}, r"row 1: labels has 1 values for 2 ids"),
        ({"loss_mask": [[1, 0, 2], [0, 1], [1, 1, 1]]}, r"row 0: loss_mask holds 2; .* weights are not"),
        ({"loss_weights": [[1.0, 0.5, 0], [0, 1], [1, 1, 1]]}, r"row 0: loss_weights holds 0.5"),
        ({"loss_mask": [[1, 0, 1], None, [1, 1, 1]]}, r"row 1: loss_mask is null"),
        ({"loss_mask": [[1, 0, 1], [1, None], [1, 1, 1]]}, r"row 1: loss_mask holds a null"),
        ({"attention_mask": [[1, 0, 1], [1, 1], [1, 1, 1]]}, r"row 0: attention_mask is 0 between.*mask_field"),
        ({"attention_mask": [[1, 1, 1], [1, 1], [1, 2, 2]]}, r"row 2: attention_mask holds 2"),
        ({"attention_mask": [[[1]], [[1]], [[1]]]}, r"attention_mask' is list<.*not a list of a number per token"),
        ({"labels": IDS, "loss_mask": [[1, 1, 1], [1, 0], [1, 1, 1]]}, r"row 1: labels and loss_mask disagree"),
        ({"roles": [[0, 4, 4], [0, 5], [4, 4, 4]]}, r"row 1: roles holds 5"),
        ({"position_ids": [[0, 1, 2], [0, 1], [4, 5, 6]]}, r"row 2: position_ids goes on with 4"),
        ({"position_ids": [[0, 1, 2], [0, 3], [0, 1, 2]]}, r"row 1: position_ids goes on with 3"),
        ({"seq_lengths": [[1, 2], [1], [3]]}, r"row 1: seq_lengths is \[1\]"),
        ({"cu_seqlens": [[0, 3], [0, 1, 2], [1, 3]]}, r"row 2: cu_seqlens is \[1 3\]"),
        ({"token_type_ids": [[0, 0, 1], [0, 0], [0, 0, 0]]}, r"row 0: token_type_ids holds 0 and 1"),
        ({"special_tokens_mask": [[0, 0, 0], [1, 0], [0, 0, 0]]}, ""),
        ({"prompt_length": [1, 1, 1]}, r"the column 'prompt_length' .* seems to say something about the loss"),
        ({"answer_start_idx": [1, 1, 1]}, r"'answer_start_idx' .* it is of where a row's answer begins"),
        ({"loss_mask": IDS, "seq_start_id": [[0]] * 3}, r"'seq_start_id'.* NeMo's packed rows"),
        ({"trainable": [True, False, True]}, r"'trainable' \(bool\) seems"),
        ({"my_mask": IDS}, r"'my_mask' .* seems to say something about the loss"),
        ({"weight": [1.0, 2.0, 1.0]}, r"'weight' \(double\) seems"),
        ({"target_ids": IDS}, r"'target_ids' .* seems"),
        ({"tokens": IDS}, r"has the columns input_ids and tokens, .* ids_field"),
        ({"length": [3, 2, 3], "label": [0, 1, 0], "role": ["a"] * 3, "document_id": [1, 2, 3], "n": IDS}, ""),
    ],
)
def test_columns_that_are_refused(
    more: dict[str, Any], words: str, tmp_path: Path, tokenizer: Tokenizer, data: Data
) -> None:
    for name in ("save_to_disk", "parquet"):
        path = WRITERS[name](tmp_path / name, table_of({"input_ids": IDS, **more}))
        if not words:
            assert found(resolve(path, tokenizer, data)) == plain_documents({"input_ids": IDS})
            continue
        with pytest.raises(UserError, match=words) as error:
            resolve(path, tokenizer, data)
        assert str(tmp_path / name) in str(error.value)
        ignored = tuple(more)
        assert found(resolve(path, tokenizer, data, ignore_fields=ignored)) == plain_documents({"input_ids": IDS})


def test_types_that_are_no_lists(tmp_path: Path, tokenizer: Tokenizer, data: Data) -> None:
    views = pa.array(IDS, pa.list_view(pa.int64()))
    for number, (columns, words) in enumerate(
        (
            ({"input_ids": pa.array(IDS), "labels": views}, r"'labels' is list_view<.*not a list of a number"),
            ({"input_ids": views}, r"'input_ids' is list_view<.*; token ids are a list of integers per row"),
            ({"input_ids": pa.array(IDS), "labels": [b"a", b"b", b"c"]}, r"'labels' \(binary\) seems to say something"),
        )
    ):
        for name in ("file", "parquet"):
            path = WRITERS[name](tmp_path / f"{number}-{name}", pa.table(columns))
            with pytest.raises(UserError, match=words):
                resolve(path, tokenizer, data)


def test_padding_that_no_column_names(tmp_path: Path, tokenizer: Tokenizer, data: Data) -> None:
    rows = {"input_ids": [[1, 5, 5], [5, 1, 5]], "special_tokens_mask": [[0, 1, 1], [1, 0, 1]]}
    with pytest.raises(UserError, match=r"row 0: special_tokens_mask .* looks like padding"):
        resolve(WRITERS["file"](tmp_path / "a", table_of(rows)), tokenizer, data)
    rows["attention_mask"] = [[1, 0, 0], [1, 1, 1]]
    assert found(resolve(WRITERS["file"](tmp_path / "b", table_of(rows)), tokenizer, data)) == plain_documents(rows)


@pytest.mark.parametrize(
    "name, said, padded",
    [
        ("segment_ids", [1, 1, 2, 0, 0], True),
        ("segment_ids", [1, 1, 2, 2, 0], True),
        ("segment_ids", [0, 0, 1, 1, 1], False),  # documents are numbered from 0 on
        ("document_ids", [0, 0, 1, -1, -1], True),
        ("document_ids", [3, 3, 1, -7, -7], False),  # by a hash
        ("position_ids", [0, 1, 2, 0, 0], True),
        ("position_ids", [0, 1, 2, 0, 1], False),
        ("position_ids", [0, 0, 0, 1, 2], False),
    ],
)
def test_padding_of_packed_rows(
    name: str, said: list[int], padded: bool, tmp_path: Path, tokenizer: Tokenizer, data: Data
) -> None:
    rows = {"input_ids": [[1, 2, 3, 4, 5], [1, 2, 3, 9, 9]], name: [said, said]}
    ends = {"add_bos": False, "add_eos": False}
    for write in ("file", "parquet"):
        path = WRITERS[write](tmp_path / write, table_of(rows))
        if padded:
            with pytest.raises(UserError, match=f"row [01]: {name} holds .* looks like padding.*attention_mask"):
                resolve(path, tokenizer, replace(data, **ends))
        else:
            cuts = [
                0,
                *(k for k in range(1, 5) if (said[k] == 0 if name == "position_ids" else said[k] != said[k - 1])),
                5,
            ]
            expected = [row[a:b] for row in rows["input_ids"] for a, b in zip(cuts, cuts[1:])]
            assert [ids for ids, _ in found(resolve(path, tokenizer, replace(data, **ends)))] == expected
        labels = {"labels": [[-100, 2, 3, 4, 5], [-100, 2, 3, -100, -100]]}
        labelled = resolve(WRITERS[write](tmp_path / f"{write}-labels", table_of(rows | labels)), tokenizer, data)
        assert all(9 not in ids for ids, _ in found(labelled))


@pytest.mark.parametrize("column", ["labels", "loss_mask", "my_mask"])
def test_files_of_which_only_some_say_what_is_trained(
    column: str, tmp_path: Path, tokenizer: Tokenizer, data: Data
) -> None:
    for write in ("file", "zstd", "parquet"):
        first = WRITERS[write](tmp_path / write, table_of({"input_ids": IDS}))
        more = WRITERS[write](tmp_path / f"{write}-more", table_of({"input_ids": IDS, column: IDS}))
        more.rename(first.with_name(f"second{more.suffix}"))
        with pytest.raises(UserError, match=f"second.* has the column '{column}', .*lacks it.*by a glob"):
            resolve(first.parent, tokenizer, data)


def test_a_misspelt_text_field_reads_no_tokens(tmp_path: Path, tokenizer: Tokenizer, data: Data) -> None:
    path = WRITERS["file"](tmp_path / "rows", table_of({"input_ids": IDS, "content": ["a", "b", "c"]}))
    with pytest.raises(UserError, match="no column 'contents' .text_field.*leave text_field out.*content"):
        resolve(path, tokenizer, data, text_field="contents")


def test_ids_that_are_none(tmp_path: Path, tokenizer: Tokenizer, data: Data) -> None:
    for number, (rows, words) in enumerate(
        [
            ({"input_ids": [[1, 2], [3, 258]]}, "holds ids from .* to 258, but the tokenizer"),
            ({"input_ids": [[1, 2], [3, -1]]}, "holds ids from -1 to"),
            ({"input_ids": [[1, 2], [3, 2**32 + 1]]}, f"to {2**32 + 1}, but"),  # 1, if it were wrapped
            ({"input_ids": [[1, 2], None]}, "row 1: input_ids is null"),
            ({"input_ids": [[1, 2], [3, None]]}, "row 1: input_ids holds a null"),
            ({"input_ids": [[1.0, 2.0]]}, "is list<.*: double>.*; token ids are a list of integers"),
            ({"input_ids": [[[1, 2], [3]]]}, "is list<.*list<.*; token ids are a list of integers"),
            ({"input_ids": [[], []]}, "holds no document|is empty"),
            ({"input_ids": [[1, 2], [3]], "loss_mask": [[0, 0], [1]]}, "holds no document|is empty"),
        ]
    ):
        for name in ("file", "save_to_disk", "parquet"):
            types = {"input_ids": pa.list_(pa.int64())} if rows["input_ids"] == [[], []] else {}
            path = WRITERS[name](tmp_path / f"{number}-{name}", table_of(rows, types))
            with pytest.raises(UserError, match=words):
                resolve(path, tokenizer, data)
    # An id that is none in padding does not matter.
    rows = {"input_ids": [[1, 2, -1], [3, 2**40, 2**40]], "attention_mask": [[1, 1, 0], [1, 0, 0]]}
    for name in ("file", "parquet"):
        assert found(resolve(WRITERS[name](tmp_path / f"p-{name}", table_of(rows)), tokenizer, data)) == [
            ([BOS, 1, 2, EOS], None),
            ([BOS, 3, EOS], None),
        ]


def test_documents_of_which_none_is_trained_are_counted(tmp_path: Path, tokenizer: Tokenizer, data: Data) -> None:
    rows = {"input_ids": IDS, "loss_mask": [[1, 0, 0], [0, 1], [0, 0, 0]]}  # the first token is nobody's label
    for name in ("file", "parquet"):
        corpus = resolve(WRITERS[name](tmp_path / name, table_of(rows)), tokenizer, data)
        assert found(corpus) == [([4, 5], [0, 1])] and corpus.left_out == {"no_label": 2}


def test_what_is_something_else(tmp_path: Path, tokenizer: Tokenizer, data: Data) -> None:
    both = parquet(tmp_path / "both", table_of({"text": ["a", "b", "c"], "input_ids": IDS}))
    with pytest.raises(UserError, match='set ids_field = "input_ids" .* or format = "text"'):
        resolve(both, tokenizer, data)
    assert found(resolve(both, tokenizer, data, ids_field="input_ids")) == plain_documents({"input_ids": IDS})
    assert found(resolve(both, tokenizer, data, format="text"))[0] == ([BOS, ord("a"), EOS], None)
    text = parquet(tmp_path / "text", table_of({"text": ["a", "b", "c"], "n": [1, 2, 3]}))
    assert found(resolve(text, tokenizer, data))[2] == ([BOS, ord("c"), EOS], None)
    for keys in ({"ids_field": "input_ids"}, {"mask_field": "m"}, {"ignore_fields": ("labels",)}):
        with pytest.raises(UserError, match=f"{next(iter(keys))}"):
            resolve(text, tokenizer, data, **keys)
    (tmp_path / "lines.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(UserError, match=r"mask_field = 'm', which is read for tokenized Parquet"):
        resolve(tmp_path / "lines.jsonl", tokenizer, data, mask_field="m")
    rows = WRITERS["file"](tmp_path / "rows", table_of({"input_ids": IDS}))
    with pytest.raises(UserError, match="where = 'a > 1'"):
        resolve(rows, tokenizer, data, where="a > 1")
    with pytest.raises(UserError, match="messages_field = 'messages', but .* was tokenized as text"):
        resolve(rows, tokenizer, data, messages_field="messages")
    with pytest.raises(UserError, match="no column 'gold' .labels_field.; it has input_ids"):
        resolve(rows, tokenizer, data, labels_field="gold")


def test_folders_of_several_kinds(tmp_path: Path, tokenizer: Tokenizer, data: Data) -> None:
    folder = tmp_path / "rows"
    pq_file = parquet(folder, table_of({"input_ids": IDS})) / "rows.parquet"
    shutil.copy(pq_file, folder / "more.jsonl")
    with pytest.raises(UserError, match=r"holds tokens \(rows.parquet\) and text \(more.jsonl\)"):
        resolve(folder, tokenizer, data)
    assert len(resolve(folder / "*.parquet", tokenizer, data)) == 3
    (folder / "more.jsonl").unlink()
    (folder / "train").mkdir()
    (folder / "test").mkdir()
    shutil.copy(pq_file, folder / "train" / "a.parquet")
    pq_file.rename(folder / "test" / "a.parquet")
    with pytest.raises(UserError, match="holds several splits"):
        resolve(folder, tokenizer, data)
    assert len(resolve(folder / "train", tokenizer, data)) == 3
    with pa.ipc.new_file(str(folder / "train" / "a.arrow"), table_of({"input_ids": IDS}).schema) as out:
        out.write_table(table_of({"input_ids": IDS}))
    with pytest.raises(UserError, match=r"a\.arrow and a\.parquet, which would be read twice"):
        resolve(folder / "train", tokenizer, data)
    pq.write_table(table_of({"tokens": IDS}), folder / "train" / "a.parquet")
    (folder / "train" / "a.arrow").rename(folder / "train" / "b.arrow")
    with pytest.raises(UserError, match="no column '(tokens|input_ids)', which other files of its source have"):
        resolve(folder / "train", tokenizer, data)


def test_damage(tmp_path: Path, tokenizer: Tokenizer, data: Data) -> None:
    for name, file in (("file", "rows.arrow"), ("stream", "rows.arrow"), ("parquet", "rows.parquet")):
        path = WRITERS[name](tmp_path / name, table_of(random_rows(0)))
        content = (tmp_path / name / file).read_bytes()
        for broken in (content[:-200], content[:100], b"", b"\x07" * 5000):
            (tmp_path / name / file).write_bytes(broken)
            with pytest.raises(UserError, match=f"{file} is damaged"):
                resolve(path, tokenizer, data)


def test_a_changed_file_is_looked_at_again(tmp_path: Path, tokenizer: Tokenizer, data: Data) -> None:
    path = WRITERS["file"](tmp_path / "rows", table_of({"input_ids": IDS}))
    first = resolve(path, tokenizer, data)
    shutil.rmtree(tmp_path / "rows")
    other = [[9, 2, 3], *IDS[1:]]
    WRITERS["file"](tmp_path / "rows", table_of({"input_ids": other}))
    second = resolve(path, tokenizer, data)
    assert found(second) == plain_documents({"input_ids": other}) and first.fingerprint != second.fingerprint
    times = path.stat()
    moved = [[9, 2], [4, 5, 3], IDS[2]]
    path.write_bytes(WRITERS["file"](tmp_path / "moved", table_of({"input_ids": moved})).read_bytes())
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # as an editor or rsync may set it back
    assert path.stat().st_size == times.st_size
    assert found(resolve(path, tokenizer, data)) == plain_documents({"input_ids": moved})
    shutil.rmtree(tmp_path / "rows")
    WRITERS["file"](tmp_path / "rows", table_of({"input_ids": other}))
    bare = resolve(path, tokenizer, replace(data, add_bos=False, add_eos=False))
    assert found(bare) == plain_documents({"input_ids": other}, ends=False)
    assert bare.fingerprint != second.fingerprint


def test_a_huge_source_is_sampled_and_that_is_said(
    tmp_path: Path, tokenizer: Tokenizer, data: Data, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(mapped_tables, "MOST_BYTES", 1)
    monkeypatch.setattr(mapped_tables, "SAMPLES", 1)
    for module in (token_tables, mapped_tables):
        monkeypatch.setattr(module, "PIECE", 8)
    rows = {"input_ids": [[n % 250, 3, 4, 5, 6, 7, 8, 9] for n in range(100)]}
    path = WRITERS["file"](tmp_path / "rows", table_of(rows))
    with caplog.at_level(logging.INFO):
        assert found(resolve(path, tokenizer, data)) == plain_documents(rows)
    assert "of a sample the ids are" in caplog.text
    rows["input_ids"][50][4] = 300  # not in the sample: found when it is read
    corpus = resolve(WRITERS["file"](tmp_path / "more", table_of(rows)), tokenizer, data)
    with pytest.raises(UserError, match="Document 50 of .* holds ids from .* to 300"):
        corpus.document(50)
