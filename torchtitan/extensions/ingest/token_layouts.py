"""The layouts in which others publish token ids: what a file holds, where, and where its documents end.

megatron    NAME.bin, the ids, and NAME.idx, as Megatron-LM and NeMo write them. The .idx is, little-endian: "MMIDIDX"
            and two zero bytes, uint64 version 1, uint8 type, uint64 sequences, uint64 bounds, int32 length of each
            sequence, int64 byte at which each begins, int64 bounds of the documents, counted in sequences.
npy         NumPy's own .npy, one-dimensional.
llm.c       256 int32 (magic, version, number of tokens, zeros), then uint16 (20240520) or uint32 (20240801).
raw_uint16  ids without any header: nanoGPT's .bin, and what Dolma (Olmo) calls .npy. NAME.csv.gz beside NAME.npy, which
raw_uint32  Dolma writes, has a line per document that begins with its first token and the token behind its last.

Nothing is copied: ids are views into a file's memory map.
"""

from __future__ import annotations

import csv
import gzip
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from torchtitan.datasets.mapped import FileState, MappedNumbers
from torchtitan.tools.errors import UserError

MEGATRON_MAGIC = b"MMIDIDX\0\0"
MEGATRON_HEADER = 34  # bytes
MEGATRON_TYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}  # 6 and 7 are floating-point
LLM_C_MAGIC = {20240520: "<u2", 20240801: "<u4"}
LLM_C_HEADER = 1024  # bytes
NPY_MAGIC = b"\x93NUMPY"
RAW = {"raw_uint16": "<u2", "raw_uint32": "<u4"}
AGAIN = "Copy or make it again."


@dataclass(frozen=True)
class TokenFile:
    """A file of token ids. dtype: of an id. begin: the byte at which they begin. tokens: how many there are.

    beside: the file that says where the documents end, if there is one.
    """

    path: Path
    layout: str
    dtype: str
    begin: int
    tokens: int
    beside: Path | None

    def map(self) -> MappedNumbers:
        """The ids, dtype[tokens], which are mapped when they are read."""
        return MappedNumbers(FileState.of(self.path), np.dtype(self.dtype), self.begin, self.tokens)

    def bounds(self) -> np.ndarray | None:
        """The tokens at which documents begin, and the end of the last: int64[documents + 1]; None if no file says."""
        if self.beside is None:
            return None
        return (_megatron_bounds if self.layout == "megatron" else _csv_bounds)(self)


def layout_of(path: Path) -> str:
    """The layout that a file's header or the file beside it shows; "raw" if none does. Not for an .idx."""
    if path.suffix == ".bin" and path.with_suffix(".idx").is_file():
        return "megatron"
    head = read_head(path, LLM_C_HEADER)
    if head.startswith(NPY_MAGIC):
        return "npy"
    # Ids could begin with the magic number by chance, but not go on with zeros.
    if len(head) == LLM_C_HEADER:
        header = np.frombuffer(head, "<i4")
        if int(header[0]) in LLM_C_MAGIC and not header[3:].any():
            return "llm.c"
    return "raw"


def read_head(path: Path, size: int) -> bytes:
    """The first `size` bytes of a file, or all it has."""
    with open(path, "rb") as file:
        return file.read(size)


def open_tokens(path: Path, layout: str) -> TokenFile:
    """A file in a layout; UserError if its size or header does not agree with it."""
    size = path.stat().st_size
    if size == 0:
        raise UserError(f"{path} is empty: {AGAIN} Or name the other files by a glob.")
    if layout == "megatron":
        return _open_megatron(path, size)
    found = layout_of(path)
    if found != ("raw" if layout in RAW else layout):
        has = {"raw": "no header of that kind", "megatron": "an .idx beside it"}.get(found, f"the header of {found}")
        raise UserError(
            f'{path} is to be read with format = "{layout}", but it has {has}. Correct or leave out format.'
        )
    if layout == "npy":
        return _open_npy(path)
    dtype, begin = RAW.get(layout, ""), 0
    if layout == "llm.c":
        header = np.frombuffer(read_head(path, LLM_C_HEADER), "<i4")
        dtype, begin = LLM_C_MAGIC[int(header[0])], LLM_C_HEADER
        expected = begin + int(header[2]) * np.dtype(dtype).itemsize
        if size != expected:
            raise UserError(
                f"{path} has {size} bytes, but its header speaks of {header[2]} tokens, which take {expected}: it is "
                f"cut short or damaged. {AGAIN}"
            )
    tokens, rest = divmod(size - begin, np.dtype(dtype).itemsize)
    if rest or not tokens:
        raise UserError(
            f"{path} has {size} bytes, which is no whole number of {np.dtype(dtype).name} ids "
            f'(format = "{layout}"): it is cut short, or in another format.'
        )
    return TokenFile(path, layout, dtype, begin, tokens, _metadata_of(path))


def _metadata_of(path: Path) -> Path | None:
    beside = path.with_suffix(".csv.gz")
    return beside if path.suffix == ".npy" and beside.is_file() else None


def _open_npy(path: Path) -> TokenFile:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        begin = int(array.offset)  # type: ignore[union-attr]
    except (ValueError, EOFError, OSError, SyntaxError, AttributeError) as error:
        raise UserError(f"{path} is cut short, or not an array of numbers ({error}). {AGAIN}") from error
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise UserError(
            f"{path} is an array of {array.dtype} with the shape {array.shape}: token ids must be integers in one "
            "dimension, document after document."
        )
    if not len(array):
        raise UserError(f"{path} holds no token. Name the other files by a glob.")
    return TokenFile(path, "npy", array.dtype.str, begin, len(array), _metadata_of(path))


def _open_megatron(path: Path, size: int) -> TokenFile:
    index = path.with_suffix(".idx")
    if not index.is_file():
        raise UserError(f'{path} is to be read with format = "megatron", but {index.name} is missing beside it.')
    head = read_head(index, MEGATRON_HEADER)
    if not head.startswith(MEGATRON_MAGIC):
        raise UserError(
            f"{index} begins with {head[:9]!r}, not with {MEGATRON_MAGIC!r} as the index of a Megatron dataset does. "
            f"If it belongs to something else, move it away from {path.name}; indexes of older kinds are not read."
        )
    if len(head) < MEGATRON_HEADER:
        raise UserError(f"{index} is cut short: it has {len(head)} bytes. {AGAIN}")
    version, code = int.from_bytes(head[9:17], "little"), head[17]
    if version != 1:
        raise UserError(f"{index} is of version {version}; version 1 is known. {AGAIN}")
    if code not in MEGATRON_TYPES:
        what = "floating-point numbers, which are not token ids" if code in (6, 7) else "of no known type"
        raise UserError(f"{index} says that {path.name} holds numbers of type {code}: {what}.")
    dtype = MEGATRON_TYPES[code]
    tokens, rest = divmod(size, np.dtype(dtype).itemsize)
    if rest:
        raise UserError(
            f"{path} has {size} bytes, which is no whole number of {np.dtype(dtype).name} ids, and {index.name} says "
            f"that it holds them: it is cut short. {AGAIN}"
        )
    return TokenFile(path, "megatron", dtype, 0, tokens, index)


def _megatron_bounds(file: TokenFile) -> np.ndarray:
    index = file.path.with_suffix(".idx")
    content = np.fromfile(index, np.uint8)
    sequences, bounds = (int(n) for n in content[18:MEGATRON_HEADER].view("<u8"))
    expected = MEGATRON_HEADER + 12 * sequences + 8 * bounds
    if len(content) == expected + sequences and sequences:
        raise UserError(f"{index} gives each sequence a mode: datasets of text and images are not read.")
    if len(content) != expected:
        raise UserError(
            f"{index} has {len(content)} bytes, but {sequences} sequences and {bounds} bounds of documents take "
            f"{expected}: it is cut short or damaged. {AGAIN}"
        )
    at = MEGATRON_HEADER + 4 * sequences
    lengths = content[MEGATRON_HEADER:at].view("<i4").astype(np.int64)
    begins = content[at : at + 8 * sequences].view("<i8")
    documents = content[at + 8 * sequences :].view("<i8")
    width = np.dtype(file.dtype).itemsize
    ends = np.concatenate([[0], np.cumsum(lengths)])
    if (lengths < 0).any() or not np.array_equal(begins, ends[:-1] * width):
        raise UserError(f"{index}: its sequences do not lie one behind the other. {AGAIN}")
    if ends[-1] != file.tokens:
        raise UserError(
            f"{index} speaks of {ends[-1]} tokens, but {file.path.name} holds {file.tokens} of {width} bytes: they do "
            f"not belong together, or one is cut short. Copy or make both again."
        )
    rises = len(documents) > 1 and documents[0] == 0 and (np.diff(documents) >= 0).all()
    if not (rises and documents[-1] == sequences):
        raise UserError(
            f"{index}: the bounds of its documents must rise from 0 to its {sequences} sequences; they are "
            f"{np.array2string(documents, threshold=8)}. {AGAIN}"
        )
    return ends[documents]


def _csv_bounds(file: TokenFile) -> np.ndarray:
    assert file.beside is not None
    spans = []
    try:
        with gzip.open(file.beside, "rt", encoding="utf-8", newline="") as lines:
            for row in csv.reader(lines):
                spans.append((int(row[0]), int(row[1])))
        begins, ends = np.array(spans, np.int64).reshape(-1, 2).T
    except (OSError, EOFError, zlib.error, ValueError, OverflowError, IndexError, csv.Error) as error:
        raise UserError(
            f"{file.beside} is damaged, or not Dolma's list of documents: line {len(spans) + 1}: {error}. Copy it "
            f"again, or move it away to have {file.path.name} cut at the tokenizer's EOS."
        ) from error
    bounds = np.concatenate([[0], ends])
    if not np.array_equal(begins, bounds[:-1]) or (ends < begins).any() or bounds[-1] != file.tokens:
        raise UserError(
            f"{file.beside} does not fit {file.path.name}: its {len(begins)} documents must lie one behind the other, "
            f"from token 0 to the file's {file.tokens}; they reach to {bounds[-1]}. Copy both again, or move the "
            f".csv.gz away to have the tokens cut at the tokenizer's EOS."
        )
    return bounds
