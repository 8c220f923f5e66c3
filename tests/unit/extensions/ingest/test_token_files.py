"""Files of token ids, read in place: what their own writers wrote is read to the token, and what does not fit is named.

megatron-core's builder wrote data/megatron_* (data/make_megatron.py). The other layouts are written here as their
projects write them: numpy.save, tofile of uint16 (nanoGPT), a memmap (Dolma), a header of 256 int32 (llm.c).
"""

from __future__ import annotations

import gzip
import logging
import os
import shutil
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

from torchtitan.config.data_schema import Data, Source
from torchtitan.datasets.corpus import Corpus
from torchtitan.datasets.loader import micro_batch
from torchtitan.datasets.plan import Plan
from torchtitan.datasets.tokenizer import Tokenizer
from torchtitan.extensions.ingest import token_index
from torchtitan.extensions.ingest.resolve import resolve_source
from torchtitan.tools.errors import UserError

FIXTURES = Path(__file__).parent / "data"
MEGATRON = [
    [65, 66, 67, 68, 257],
    [256, 97, 98],
    [1, 2, 3, 4, 257],
    [256, 7, 7, 257],
]  # make_megatron.py, without empty
ENDED = [[10, 11, 257], [257], [*range(200), 257], [5, 6, 7, 8, 257]]
BEGUN = [[256, 10, 11], [256], [256, *range(200)], [256, 5, 6, 7, 8]]


def flat(documents: list[list[int]]) -> list[int]:
    return [token for document in documents for token in document]


def with_ends(documents: list[list[int]], bos: bool = True, eos: bool = True) -> list[list[int]]:
    return [[256] * (bos and d[0] != 256) + d + [257] * (eos and d[-1] != 257) for d in documents]


def resolve(path: Path, tokenizer: Tokenizer, data: Data, **keys: Any) -> Corpus:
    return resolve_source(Source(name="ids", path=str(path), **keys), tokenizer, data)


def read(path: Path, tokenizer: Tokenizer, data: Data, **keys: Any) -> list[list[int]]:
    corpus = resolve(path, tokenizer, data, **keys)
    documents = [corpus.document(i).tolist() for i in range(len(corpus))]
    assert corpus.lengths.tolist() == [len(document) for document in documents]
    assert corpus.tokens == sum(corpus.lengths) and all(
        corpus.document(i).dtype == np.int32 for i in range(len(corpus))
    )
    return documents


@pytest.fixture
def bare(data: Data) -> Data:
    """Documents as they are found."""
    return replace(data, add_bos=False, add_eos=False)


def write_llm_c(path: Path, ids: list[int], magic: int = 20240520, version: int = 1) -> None:
    header = np.zeros(256, np.int32)
    header[:3] = magic, version, len(ids)
    path.write_bytes(header.tobytes() + np.array(ids, np.uint16 if magic == 20240520 else np.uint32).tobytes())


def write_raw(path: Path, ids: list[int], dtype: type = np.uint16) -> None:
    np.array(ids, dtype).tofile(path)


def write_list(path: Path, documents: list[list[int]]) -> None:
    """The .csv.gz that Dolma writes: start, end, id, source, line."""
    ends = np.cumsum([0] + [len(document) for document in documents])
    lines = [f'{a},{b},id-{i},"s3://a,b/{i}.gz",{i}\n' for i, (a, b) in enumerate(zip(ends, ends[1:]))]
    path.write_bytes(gzip.compress("".join(lines).encode()))


def write_megatron(prefix: Path, sequences: list[list[int]], bounds: list[int], code: int, dtype: str) -> None:
    """By struct, as the format is described; the builder is the other witness."""
    width = np.dtype(dtype).itemsize
    prefix.with_suffix(".bin").write_bytes(np.array(flat(sequences), dtype).tobytes())
    index = struct.pack("<9sQBQQ", b"MMIDIDX", 1, code, len(sequences), len(bounds))
    index += struct.pack(f"<{len(sequences)}i", *map(len, sequences))
    index += struct.pack(f"<{len(sequences)}q", *(width * len(flat(sequences[:i])) for i in range(len(sequences))))
    prefix.with_suffix(".idx").write_bytes(index + struct.pack(f"<{len(bounds)}q", *bounds))


@pytest.mark.parametrize("name", ["megatron_uint16", "megatron_int32"])
@pytest.mark.parametrize("suffix", ["", ".bin", ".idx", ".[bi][id]*"])
def test_what_megatrons_builder_wrote(tokenizer: Tokenizer, bare: Data, name: str, suffix: str) -> None:
    assert read(FIXTURES / f"{name}{suffix}", tokenizer, bare) == MEGATRON
    merged = [*MEGATRON, [9, 8, 7, 257]]
    assert read(FIXTURES / "megatron_merged", tokenizer, bare, format="megatron") == merged


@pytest.mark.parametrize(("code", "dtype"), [(1, "<u1"), (2, "<i1"), (3, "<i2"), (4, "<i4"), (5, "<i8"), (8, "<u2")])
def test_every_type_of_megatrons_index(tmp_path: Path, tokenizer: Tokenizer, bare: Data, code: int, dtype: str) -> None:
    write_megatron(tmp_path / "a_text_document", [[1, 2], [], [3], [100, 5]], [0, 2, 3, 4], code, dtype)
    assert read(tmp_path, tokenizer, bare) == [[1, 2], [3], [100, 5]]


def test_the_writer_of_this_test_is_megatrons(tmp_path: Path) -> None:
    sequences = [[65, 66, 67], [68, 257], [256, 97, 98], [], [1], [], [2, 3, 4, 257], [256, 7, 7, 257]]
    write_megatron(tmp_path / "x", sequences, [0, 2, 3, 4, 7, 8], 8, "<u2")
    for suffix in ("bin", "idx"):
        assert (tmp_path / f"x.{suffix}").read_bytes() == (FIXTURES / f"megatron_uint16.{suffix}").read_bytes()


def test_raw_ids_as_nanogpt_and_dolma_write_them(tmp_path: Path, tokenizer: Tokenizer, bare: Data) -> None:
    write_raw(tmp_path / "train.bin", flat(ENDED))
    assert read(tmp_path / "train.bin", tokenizer, bare) == ENDED
    (tmp_path / "olmo").mkdir()
    for name, documents in (("part-00", ENDED[:3]), ("part-01", ENDED[3:] * 30)):
        mapped = np.memmap(tmp_path / "olmo" / f"{name}.npy", np.uint32, "w+", shape=len(flat(documents)))
        mapped[:] = flat(documents)
        mapped.flush()
    assert read(tmp_path / "olmo", tokenizer, bare) == ENDED + ENDED[3:] * 29
    big = replace(tokenizer, vocab_size=100278, eos_id=100257)  # Olmo 3's
    documents = [[70000, 1, 100257], [*range(99000, 99100), 100257], [9, 100257]]
    write_raw(tmp_path / "olmo3.npy", flat(documents), np.uint32)
    assert read(tmp_path / "olmo3.npy", big, bare) == documents


def test_documents_as_dolmas_list_says(tmp_path: Path, tokenizer: Tokenizer, bare: Data) -> None:
    """The list wins over an EOS within a document."""
    documents = [[1, 257, 2], [257], [3, 4] * 40]
    write_raw(tmp_path / "part-0.npy", flat(documents))
    write_list(tmp_path / "part-0.csv.gz", documents)
    assert read(tmp_path, tokenizer, bare) == documents
    np.save(tmp_path / "part-0.npy", np.array(flat(documents), np.int64))
    assert read(tmp_path, tokenizer, bare) == documents


@pytest.mark.parametrize("dtype", ["<u2", ">u2", "<i4", "<u4", "<i8", "<u8"])
def test_numpys_own_file(tmp_path: Path, tokenizer: Tokenizer, bare: Data, dtype: str) -> None:
    np.save(tmp_path / "a.npy", np.array(flat(ENDED), dtype))
    assert read(tmp_path / "a.npy", tokenizer, bare) == ENDED


@pytest.mark.parametrize(("magic", "version"), [(20240520, 1), (20240801, 7)])
def test_llm_c_puts_the_id_before_a_document(
    tmp_path: Path, tokenizer: Tokenizer, bare: Data, magic: int, version: int
) -> None:
    """Shards are cut anywhere: the piece at the beginning of the second is a document of its own."""
    write_llm_c(tmp_path / "fineweb_train_000001.bin", flat(BEGUN), magic, version)
    write_llm_c(tmp_path / "fineweb_train_000002.bin", [20, 21, *flat(BEGUN)], magic, version)
    assert read(tmp_path, tokenizer, bare) == [*BEGUN, [20, 21], *BEGUN]
    only_eos = replace(tokenizer, bos_id=None)  # GPT-2 calls it EOS
    ended = [[9], [257, 1, 2], [257, 3]]
    write_llm_c(tmp_path / "gpt2.bin", flat(ended), magic, version)
    assert read(tmp_path / "gpt2.bin", only_eos, bare) == ended


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("eos", [True, False])
def test_documents_get_the_ends_that_they_lack_and_no_second(
    tmp_path: Path, tokenizer: Tokenizer, data: Data, bos: bool, eos: bool
) -> None:
    data = replace(data, add_bos=bos, add_eos=eos)
    expected = with_ends(MEGATRON, bos, eos)
    corpus = resolve(FIXTURES / "megatron_uint16", tokenizer, data)
    for i, document in enumerate(expected):
        assert corpus.document(i).tolist() == document
        for start in range(len(document) + 1):
            for stop in range(start, len(document) + 3):
                assert corpus.document(i, start, stop).tolist() == document[start:stop], (i, start, stop)


def test_rows_and_labels(tokenizer: Tokenizer, data: Data) -> None:
    source = Source(name="ids", path=str(FIXTURES / "megatron_int32"))
    corpus = resolve_source(source, tokenizer, data)
    data = replace(data, sources=(source,))
    plan = Plan(data, [corpus], seq_len=17, rows_per_step=4, steps=2, seed=0, separators=[np.empty(0, np.int32)])
    seen = set()
    for step in range(2):
        batch = micro_batch(plan, step, list(range(4)))
        for slot in range(4):
            row = [with_ends(MEGATRON)[i] for i in plan.row(step, slot).documents]
            seen |= set(map(tuple, row))
            padding, place = 17 - len(flat(row)), slice(17 * slot, 17 * slot + 17)
            assert batch.tokens[place].tolist() == flat(row) + [0] * padding
            assert batch.labels[place].tolist() == flat([[*d[1:], -100] for d in row]) + [-100] * padding
    assert seen == set(map(tuple, with_ends(MEGATRON)))


def test_a_cut_can_be_named(tmp_path: Path, tokenizer: Tokenizer, bare: Data) -> None:
    path = tmp_path / "a.bin"
    write_raw(path, [1, 9, 2, 3, 9, 4] * 10)
    assert read(path, tokenizer, bare, document_end=9)[:3] == [[1, 9], [2, 3, 9], [4, 1, 9]]
    assert read(path, tokenizer, bare, document_start=9)[:3] == [[1], [9, 2, 3], [9, 4, 1]]
    assert read(path, tokenizer, bare, document_end=-1) == [[1, 9, 2, 3, 9, 4] * 10]


def test_the_index_is_kept_and_a_changed_file_costs_itself(
    tmp_path: Path, tokenizer: Tokenizer, bare: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mount").mkdir()
    for name in "abc":
        write_raw(tmp_path / "mount" / f"{name}.npy", flat(ENDED) + [ord(name), 257])
    before = sorted((tmp_path / "mount").iterdir())
    made: list[str] = []
    index = token_index._index
    monkeypatch.setattr(token_index, "_index", lambda f, *rest: made.append(f.path.name) or index(f, *rest))
    first = resolve(tmp_path / "mount", tokenizer, bare)
    assert sorted(made) == ["a.npy", "b.npy", "c.npy"] and sorted((tmp_path / "mount").iterdir()) == before
    assert resolve(tmp_path / "mount", tokenizer, bare).fingerprint == first.fingerprint and len(made) == 3
    write_raw(tmp_path / "mount" / "b.npy", [2, 257, *flat(ENDED)])  # as many as before
    os.utime(tmp_path / "mount" / "b.npy", ns=(1, 1))
    changed = resolve(tmp_path / "mount", tokenizer, bare)
    assert made[3:] == ["b.npy"] and changed.fingerprint != first.fingerprint
    assert [changed.document(i).tolist() for i in range(len(ENDED) + 1, len(ENDED) + 3)] == [[2, 257], ENDED[0]]
    for kept in (Path(bare.cache_folder) / "token_index").iterdir():
        kept.write_bytes(kept.read_bytes()[:100])  # a loss of power
    assert resolve(tmp_path / "mount", tokenizer, bare).fingerprint == changed.fingerprint and len(made) == 7


def test_one_other_id_is_another_corpus(tmp_path: Path, tokenizer: Tokenizer, bare: Data) -> None:
    ids = np.array(flat(ENDED) * 2000, np.uint16)
    made = []
    for name, token in (("a", 10), ("b", 12)):
        ids[200_000 // len(flat(ENDED)) * len(flat(ENDED))] = token
        ids.tofile(tmp_path / f"{name}.bin")
        made.append(resolve(tmp_path / f"{name}.bin", tokenizer, bare).fingerprint)
    assert made[0] != made[1]
    shutil.copy(tmp_path / "a.bin", tmp_path / "c.bin")
    assert resolve(tmp_path / "c.bin", tokenizer, bare).fingerprint == made[0]
    assert resolve(tmp_path / "c.bin", tokenizer, replace(bare, add_bos=True)).fingerprint != made[0]


def test_a_huge_source_is_sampled_and_every_id_checked_when_it_is_read(
    tmp_path: Path, tokenizer: Tokenizer, bare: Data, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    for name, value in (("MOST_BYTES", 64), ("SAMPLE", 2), ("SAMPLES", 3)):
        monkeypatch.setattr(token_index, name, value)
    write_megatron(tmp_path / "x", [[1] * 30, [2] * 5 + [2**32 + 7] + [2] * 30], [0, 1, 2], 5, "<i8")
    corpus = resolve(tmp_path / "x", tokenizer, bare)
    assert "of a sample the ids are 1 to 2" in caplog.text
    assert corpus.document(1, 6).tolist() == [2] * 30
    with pytest.raises(UserError, match=r"Document 1 of .* holds ids from 2 to 4294967303, but the tokenizer has"):
        corpus.document(1)


def test_what_was_found_out_is_said(
    tmp_path: Path, tokenizer: Tokenizer, data: Data, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    write_raw(tmp_path / "a.bin", flat(ENDED))
    resolve(tmp_path / "a.bin", tokenizer, data)
    for words in (
        'format = "raw_uint16" (found out), files: 1; documents end with the id 257; documents: 4, left out because '
        "empty: 0; tokens: 214; documents that lacked BOS and get it: 4, EOS: 0; the ids are 0 to 257.",
        "do not say which tokenizer made them",
    ):
        assert words in caplog.text


def test_many_files_hold_no_file_open(tmp_path: Path, tokenizer: Tokenizer, bare: Data) -> None:
    for number in range(40):
        write_raw(tmp_path / f"{number:02d}.npy", flat(ENDED))
    before = len(os.listdir("/proc/self/fd"))
    corpus = resolve(tmp_path, tokenizer, bare)
    assert len(corpus) == 160 and len(os.listdir("/proc/self/fd")) < before + 10


def fixture(folder: Path) -> Path:
    for suffix in ("bin", "idx"):
        shutil.copy(FIXTURES / f"megatron_uint16.{suffix}", folder / f"x.{suffix}")
    return folder / "x.idx"


def put(path: Path, at: int, content: bytes) -> None:
    before = path.read_bytes()
    path.write_bytes(before[:at] + content + before[at + len(content) :])


WRONG: dict[str, tuple[Callable[[Path], Any], dict[str, Any], str]] = {
    "idx of fairseq": (lambda f: put(fixture(f), 0, b"TNTIDX\0\0\0"), {}, r"x\.idx begins with b'TNTIDX.*Megatron"),
    "idx version": (lambda f: put(fixture(f), 9, b"\2"), {}, r"x\.idx is of version 2; version 1 is known"),
    "idx of floats": (lambda f: put(fixture(f), 17, b"\7"), {}, r"numbers of type 7: floating-point"),
    "idx of an unknown type": (lambda f: put(fixture(f), 17, b"\x63"), {}, r"numbers of type 99: of no known type"),
    "idx of another type": (lambda f: put(fixture(f), 17, b"\4"), {}, r"x\.bin has 34 bytes, .* int32 ids"),
    "idx of narrower ids": (lambda f: put(fixture(f), 17, b"\1"), {}, r"x\.idx: its sequences do not lie"),
    "idx cut short": (lambda f: os.truncate(fixture(f), 150), {}, r"x\.idx has 150 bytes, .* take 178: it is cut"),
    "idx cut in its header": (lambda f: os.truncate(fixture(f), 20), {}, r"x\.idx is cut short: it has 20 bytes"),
    "idx of a huge count": (lambda f: put(fixture(f), 18, b"\xff" * 8), {}, r"x\.idx has 178 bytes, but 18446744073"),
    "idx with modes": (
        lambda f: put(fixture(f), 178, b"\0" * 8),
        {},
        r"x\.idx gives each sequence a mode: datasets of text and images",
    ),
    "idx with a negative length": (lambda f: put(fixture(f), 34, b"\xff" * 4), {}, r"sequences do not lie one behind"),
    "idx without the last document": (
        lambda f: (put(fixture(f), 26, b"\5"), os.truncate(f / "x.idx", 170)),
        {},
        r"bounds of its documents must rise from 0 to its 8 sequences; they are \[0 2 3 4 7\]",
    ),
    "bin cut short": (lambda f: (fixture(f), os.truncate(f / "x.bin", 30)), {}, r"17 tokens, but x\.bin holds 15 of 2"),
    "bin cut in an id": (lambda f: (fixture(f), os.truncate(f / "x.bin", 33)), {}, r"x\.bin has 33 bytes, .* uint16"),
    "bin missing": (lambda f: (fixture(f), (f / "x.bin").unlink()), {}, r"x\.idx is the index .*x\.bin is missing"),
    "idx missing": (
        lambda f: write_raw(f / "x.bin", flat(ENDED)),
        {"format": "megatron"},
        r"x\.bin is to be read with format = \"megatron\", but x\.idx is missing",
    ),
    "raw beside an idx": (
        lambda f: fixture(f),
        {"format": "raw_uint16"},
        r"x\.bin is .* but it has an \.idx beside it",
    ),
    "an odd size": (lambda f: (f / "a.bin").write_bytes(b"\1\0\2"), {}, r"neither as uint16 nor as uint32"),
    "an odd size, said": (
        lambda f: (f / "a.bin").write_bytes(b"\1\0\2"),
        {"format": "raw_uint16"},
        r"a\.bin has 3 bytes, which is no whole number of uint16 ids",
    ),
    "an empty file": (lambda f: (f / "a.npy").touch(), {"format": "raw_uint32"}, r"a\.npy is empty"),
    "two readings": (lambda f: write_raw(f / "a.bin", [1, 0, 2, 0]), {}, r'more than one width: set format = "raw_u'),
    "raw ids of 64 bits": (
        lambda f: write_raw(f / "a.bin", flat(ENDED), np.uint64),
        {},
        r"more than one width: .*Ids of 64 bits are read from NumPy's own \.npy",
    ),
    "ids of another tokenizer": (
        lambda f: write_raw(f / "a.bin", [1, 300, 257]),
        {},
        r"neither as uint16 nor as uint32",
    ),
    "ids of another tokenizer, said": (
        lambda f: write_raw(f / "a.bin", [1, 300, 257]),
        {"format": "raw_uint16"},
        r"a\.bin holds ids from 1 to 300, but the tokenizer in assets/bytes has those from 0 to 257",
    ),
    "ids that int32 would wrap": (
        lambda f: np.save(f / "a.npy", np.array([1, 2**32 + 5, 257], np.uint64)),
        {},
        r"a\.npy holds ids from 1 to 4294967301",
    ),
    "negative ids": (
        lambda f: np.save(f / "a.npy", np.array([1, -100, 257])),
        {},
        r"a\.npy holds ids from -100 to 257",
    ),
    "no end of text": (
        lambda f: write_raw(f / "a.bin", [1, 2, 3] * 50),
        {},
        r"The id 257, at which documents are cut, does not occur .*Set document_end",
    ),
    "the id begins documents": (
        lambda f: write_raw(f / "a.bin", [257, 1, 2, 257, 3] * 20),
        {},
        r"Files of .* begin with the id 257, .* set document_start = 257",
    ),
    "the id begins documents of shards": (
        lambda f: [np.save(f / f"{n}.npy", np.array([257] * (n == 0) + [1, 257, 3] * 20, np.uint16)) for n in range(3)],
        {},
        r"Files of .* begin with the id 257, .* set document_start = 257",
    ),
    "the id ends documents of llm.c": (
        lambda f: write_llm_c(f / "a.bin", [1, 2, 256, 3, 256]),
        {},
        r"Files of .* end with the id 256, .* set document_end = 256",
    ),
    "two cuts": (
        lambda f: write_raw(f / "a.bin", flat(ENDED)),
        {"document_end": 1, "document_start": 1},
        r"document_end and document_start: give one",
    ),
    "a cut for what has bounds": (
        lambda f: fixture(f),
        {"document_end": 257},
        r"x\.idx says where .* leave document_end",
    ),
    "llm.c cut short": (
        lambda f: (write_llm_c(f / "a.bin", flat(BEGUN)), os.truncate(f / "a.bin", 1100)),
        {},
        r"a\.bin has 1100 bytes, but its header speaks of 210 tokens, which take 1444",
    ),
    "llm.c read as raw": (
        lambda f: write_llm_c(f / "a.bin", flat(BEGUN)),
        {"format": "raw_uint16"},
        r"a\.bin is to be read with format = \"raw_uint16\", but it has the header of llm\.c",
    ),
    "raw read as llm.c": (
        lambda f: write_raw(f / "a.bin", flat(ENDED)),
        {"format": "llm.c"},
        r"a\.bin is .* but it has no header of that kind",
    ),
    "npy read as raw": (
        lambda f: np.save(f / "a.npy", np.array(flat(ENDED), np.uint16)),
        {"format": "raw_uint16"},
        r"a\.npy is .* but it has the header of npy",
    ),
    "npy cut short": (
        lambda f: (np.save(f / "a.npy", np.array(flat(ENDED), np.uint16)), os.truncate(f / "a.npy", 300)),
        {},
        r"a\.npy is cut short, or not an array of numbers",
    ),
    "npy of objects": (
        lambda f: np.save(f / "a.npy", np.array([[1], [2, 3]], object), allow_pickle=True),
        {},
        r"a\.npy is cut short, or not an array of numbers",
    ),
    "npy of floats": (
        lambda f: np.save(f / "a.npy", np.ones(9)),
        {},
        r"a\.npy is an array of float64 with the shape \(9,",
    ),
    "npy of rows": (lambda f: np.save(f / "a.npy", np.ones((3, 4), int)), {}, r"with the shape \(3, 4\)"),
    "two layouts": (
        lambda f: (write_llm_c(f / "a.bin", flat(BEGUN)), write_raw(f / "b.bin", flat(ENDED))),
        {},
        r"several layouts, such as .*b\.bin \(raw\) and .*a\.bin \(llm\.c\)",
    ),
    "text beside ids": (
        lambda f: (write_raw(f / "a.bin", flat(ENDED)), (f / "a.jsonl").write_text('{"text": "a"}\n')),
        {},
        r'holds a\.bin and a\.jsonl: set format to "text"',
    ),
    "two splits": (
        lambda f: (write_raw(f / "train.bin", flat(ENDED)), write_raw(f / "val.bin", flat(ENDED))),
        {},
        r"holds val\.bin, which looks held out, and train\.bin",
    ),
    "two splits in folders": (
        lambda f: [(f / n).mkdir() or write_raw(f / n / "0.bin", flat(ENDED)) for n in ("train", "validation")],
        {},
        r"holds validation/0\.bin, which looks held out, and train/0\.bin",
    ),
    "a mask of the loss": (
        lambda f: (
            write_raw(f / "token_ids_part_0000.npy", flat(ENDED)),
            np.ones(len(flat(ENDED)), bool).tofile(f / "labels_mask_part_0000.npy"),
        ),
        {},
        r"labels_mask_part_0000\.npy beside the token ids .* is not read: all would",
    ),
    "a list that does not fit": (
        lambda f: (write_raw(f / "a.npy", flat(ENDED)), write_list(f / "a.csv.gz", ENDED[:-1])),
        {},
        r"a\.csv\.gz does not fit a\.npy: .* to the file's 210; they reach to 205",
    ),
    "a list that is cut short": (
        lambda f: (
            write_raw(f / "a.npy", flat(ENDED)),
            write_list(f / "a.csv.gz", ENDED),
            os.truncate(f / "a.csv.gz", 60),
        ),
        {},
        r"a\.csv\.gz is damaged, or not Dolma's list of documents",
    ),
    "a list of something else": (
        lambda f: (write_raw(f / "a.npy", flat(ENDED)), (f / "a.csv.gz").write_bytes(gzip.compress(b"name\n"))),
        {},
        r"a\.csv\.gz is damaged, or not Dolma's list of documents: line 1",
    ),
    "a list without its ids": (
        lambda f: (write_raw(f / "a.npy", flat(ENDED)), write_list(f / "b.csv.gz", ENDED)),
        {},
        r"b\.csv\.gz lists the documents of b\.npy, which is missing",
    ),
    "conversations": (
        lambda f: write_raw(f / "a.bin", flat(ENDED)),
        {"messages_field": "messages"},
        r"messages_field = 'messages', but .*a\.bin holds token ids",
    ),
    "a format and nothing of it": (
        lambda f: (f / "a.txt").write_text("text"),
        {"format": "megatron"},
        r'format = "megatron", but there is no such file in .* \(it has a\.txt\)',
    ),
    "a cut for text": (
        lambda f: (f / "a.txt").write_text("text"),
        {"document_end": 1},
        r"document_end = 1, which is read for token ids of others",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_is_named(tmp_path: Path, tokenizer: Tokenizer, data: Data, name: str) -> None:
    write, keys, message = WRONG[name]
    folder = tmp_path / "in"
    folder.mkdir()
    write(folder)
    with pytest.raises(UserError, match=message):
        resolve(folder, tokenizer, data, **keys)


@pytest.mark.parametrize("token", [2**32 + 5, -100, 300])
def test_ids_of_a_folder_of_datasets_are_compared_with_the_tokenizer(
    tmp_path: Path, tokenizer: Tokenizer, data: Data, token: int
) -> None:
    """int32 would wrap the first to 5. Sources of which a sample is looked at are in test_token_tables.py."""
    rows = [[1, 2, 257]] * 40_000
    for name, row in (("good", [1, 9]), ("bad", [token, 9])):
        datasets.Dataset.from_dict({"input_ids": [*rows, row]}).save_to_disk(str(tmp_path / name))
    assert resolve(tmp_path / "good", tokenizer, data).max_token_id == 257
    with pytest.raises(UserError, match=rf"bad/data-0.* holds ids from .*{token}.* but the tokenizer in"):
        resolve(tmp_path / "bad", tokenizer, data)


def test_text_stays_text(tmp_path: Path, tokenizer: Tokenizer, data: Data) -> None:
    (tmp_path / "a.txt").write_text("text")
    write_raw(tmp_path / "model.bin", [1, 2, 3])
    assert read(tmp_path, tokenizer, data, format="text") == [[256, *b"text", 257]]
    with pytest.raises(UserError, match=r'format = "npy", but .* is a tokenized folder of Arrow'):
        folder = Path(resolve(tmp_path, tokenizer, data, format="text").folder)
        resolve(folder, tokenizer, data, format="npy")
