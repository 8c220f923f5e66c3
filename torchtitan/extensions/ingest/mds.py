"""Importer of MDS folders, the format that mosaicml-streaming writes and in which ProLong's data is published.

A folder has index.json, which lists shard files and their columns. A shard holds, little-endian: uint32 n, uint32
offsets[n + 1] from the file's beginning, then anything up to the first offset, then n samples. A sample is the uint32
sizes of the columns without a fixed size, followed by the bytes of all columns. Three columns are read: `input_ids`;
`indices` [k, 2], which says that a row is packed and where its documents begin and end; and `mask`, which is 1 for the
tokens of a conversation that are trained on.
The library itself is not used: it pins old versions of what we need and cannot be imported beside PyTorch for CPUs.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from torchtitan.datasets.corpus import ASSISTANT
from torchtitan.extensions.ingest.encoder import Encoder
from torchtitan.tools.errors import UserError
from torchtitan.tools.folders import read_json

INDEX_FILE = "index.json"
COMPRESSIONS = {"bz2": "bz2", "gz": "gzip", "zstd": "zstd"}  # the names here -> pyarrow's
COLUMNS = ("input_ids", "indices", "mask")
_INTEGERS = {8: "uint8", 9: "int8", 16: "uint16", 17: "int16", 32: "uint32", 33: "int32", 64: "uint64", 65: "int64"}
"""Types that an array without a type in its encoding names by a byte, and that token ids may have."""


@dataclass(frozen=True)
class MdsShard:
    """A shard as its index.json describes it. path: the file that exists, compressed if compression is not empty.

    size: bytes of the uncompressed file. columns: name, encoding, size in bytes (None if it varies), in order.
    """

    path: str
    compression: str
    size: int
    samples: int
    columns: tuple[tuple[str, str, int | None], ...]

    @property
    def has_mask(self) -> bool:
        """Whether it says which tokens are trained on."""
        return any(name == "mask" for name, _, _ in self.columns)


def find_mds(path: Path) -> list[Path]:
    """The index.json files of a folder and its subfolders, sorted by path; [] if it is not a folder of MDS shards.

    An index.json speaks for what is below its folder too, as the library's own merged index does.
    """
    indexes = []
    for folder, below, names in os.walk(path):
        below[:] = [] if INDEX_FILE in names else sorted(name for name in below if not name.startswith("."))
        if INDEX_FILE in names and _is_index(Path(folder) / INDEX_FILE, names):
            indexes.append(Path(folder) / INDEX_FILE)
    return sorted(indexes)


def _is_index(path: Path, beside: list[str]) -> bool:
    try:
        return "shards" in read_json(path)
    except UserError:  # damaged, if it was one
        return any(".mds" in name for name in beside)


def read_index(path: Path) -> list[MdsShard]:
    """The shards that an index.json lists; UserError if one is missing, of another size, or unreadable for us."""
    index = read_json(path, "The index is damaged: download it again.")
    try:
        if index["version"] != 2:
            raise UserError(f"{path} is of MDS version {index['version']}; version 2 is known.")
        return [_shard(path, shard) for shard in index["shards"]]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"{path} is damaged, or not the index of MDS shards: {type(error).__name__} {error}. Download it again."
        ) from error


def _shard(index: Path, entry: dict[str, Any]) -> MdsShard:
    raw, packed = entry["raw_data"], entry.get("zip_data")
    file = raw if packed is None or (index.parent / raw["basename"]).is_file() else packed
    path = index.parent / file["basename"]
    compression = "" if file is raw else str(entry["compression"]).partition(":")[0]  # zstd:7 is zstd
    columns = tuple(zip(entry["column_names"], entry["column_encodings"], entry["column_sizes"], strict=True))
    if entry["format"] != "mds" or entry["version"] != 2:
        raise UserError(f"{path}: {index} says format {entry['format']} {entry['version']}; mds 2 is known.")
    if not path.is_file():
        raise UserError(f"{path} is missing: {index} lists it. Download it again.")
    if compression and compression not in COMPRESSIONS:
        raise UserError(
            f"{path} is compressed with {entry['compression']!r}; known are {', '.join(COMPRESSIONS)}. Decompress it "
            f"to {raw['basename']} beside it, which is then read instead."
        )
    if path.stat().st_size != file["bytes"]:
        raise UserError(
            f"{path} has {path.stat().st_size} bytes, {index} says {file['bytes']}: it is cut short or damaged. "
            "Download it again."
        )
    encodings = {name: encoding for name, encoding, _ in columns}
    if "input_ids" not in encodings:
        raise UserError(
            f"{path} has no column input_ids (it has {', '.join(encodings) or 'none'}): MDS folders are read if they "
            "hold token ids."
        )
    for name in COLUMNS:
        if name in encodings:
            _parse_encoding(path, name, encodings[name])
    return MdsShard(str(path), compression, raw["bytes"], entry["samples"], columns)


def _parse_encoding(path: str | Path, name: str, encoding: str) -> tuple[str, tuple[int, ...]]:
    """Type and shape in the name of an ndarray encoding; "" and () if each array says its own."""
    kind, _, rest = encoding.partition(":")
    dtype, _, shape = rest.partition(":")
    if kind != "ndarray" or (dtype and dtype not in _INTEGERS.values()):
        raise UserError(
            f"{path}: the column {name} has the encoding {encoding!r}; known are ndarray, ndarray:TYPE and "
            f"ndarray:TYPE:SHAPE with a TYPE of {', '.join(_INTEGERS.values())}."
        )
    return dtype, tuple(map(int, shape.split(","))) if shape else ()


def read_shard(shard: MdsShard) -> Iterator[tuple[np.ndarray, bool]]:
    """The documents of a shard in order, int32[n] each, and whether each is whole: taken from a packed row as it is.

    If there are masks, a document is int32[2, n], with the tokens' roles in its second row: assistant or other.
    UserError that names the file, and if it can the row, for whatever does not fit.
    """
    data = _read(shard)
    header = 4 * (shard.samples + 2)
    if len(data) < header or data[:4].view("<u4")[0] != shard.samples:
        count = data[:4].view("<u4")[0] if len(data) >= 4 else "no"
        raise UserError(f"{shard.path} begins with {count} samples, its index says {shard.samples}: it is damaged.")
    offsets = data[4:header].view("<u4").astype(np.int64)
    if offsets[0] < header or (np.diff(offsets) < 0).any() or offsets[-1] != len(data):
        raise UserError(
            f"{shard.path} is damaged: the offsets of its {shard.samples} samples must rise from {header} or more to "
            f"its {len(data)} bytes, and go from {offsets[0]} to {offsets[-1]}."
        )
    for row in range(shard.samples):
        where = f"{shard.path} row {row}"
        columns = _columns(shard, data[offsets[row] : offsets[row + 1]], where)
        ids = columns["input_ids"]
        if ids.ndim != 1:
            raise UserError(f"{where}: input_ids has the shape {ids.shape}; it must have one dimension.")
        if len(ids) and (int(ids.min()) < 0 or int(ids.max()) >= 1 << 31):
            raise UserError(f"{where}: input_ids holds {ids.min()} to {ids.max()}, which are not token ids.")
        document = ids.astype(np.int32)
        if "mask" in columns:
            mask = columns["mask"]
            if mask.shape != ids.shape or not np.isin(mask, (0, 1)).all():
                raise UserError(
                    f"{where}: mask must be 0 or 1 for each of its {len(ids)} tokens; it has the shape {mask.shape} "
                    f"and holds {np.array2string(mask.ravel(), threshold=8)}."
                )
            document = np.stack([document, np.where(mask, np.int32(ASSISTANT), np.int32(0))])
        if "indices" not in columns:
            yield document, False
            continue
        for start, stop in _spans(columns["indices"], len(ids), where):
            yield document[..., start:stop], True


def mds_documents(shard: MdsShard, encoder: Encoder) -> Iterator[np.ndarray]:
    """The documents of a shard, with the ends that rows which are not packed lack."""
    for document, whole in read_shard(shard):
        yield document if whole or not document.size else encoder.add_ends(document)


def _read(shard: MdsShard) -> np.ndarray:
    """Bytes of the uncompressed shard, uint8."""
    if not shard.compression:
        data = np.memmap(shard.path, np.uint8, "r") if shard.size else np.empty(0, np.uint8)
    else:
        import pyarrow as pa

        try:
            with pa.input_stream(shard.path, compression=COMPRESSIONS[shard.compression]) as stream:
                data = np.frombuffer(stream.read(), np.uint8)
        except (OSError, ValueError) as error:  # pyarrow's errors are these too
            raise UserError(
                f"{shard.path} cannot be decompressed ({shard.compression}): {error}. Download it again."
            ) from error
    if len(data) != shard.size:
        raise UserError(f"{shard.path} holds {len(data)} bytes, its index says {shard.size}: it is damaged.")
    return data


def _columns(shard: MdsShard, sample: np.ndarray, where: str) -> dict[str, np.ndarray]:
    """The columns that are read, of one sample uint8[n]."""
    varying = 4 * sum(not size for _, _, size in shard.columns)
    if len(sample) < varying:
        raise UserError(f"{where} is damaged: {len(sample)} bytes, and the sizes of its columns alone take {varying}.")
    varying_sizes = iter(sample[:varying].view("<u4").tolist())
    sizes = [size or next(varying_sizes) for _, _, size in shard.columns]
    if varying + sum(sizes) != len(sample):
        raise UserError(
            f"{where} is damaged: its columns take {varying} + {' + '.join(map(str, sizes))} = "
            f"{varying + sum(sizes)} bytes, but it has {len(sample)}."
        )
    result = {}
    at = varying
    for (name, encoding, _), size in zip(shard.columns, sizes):
        if name in COLUMNS:
            try:
                result[name] = _array(sample[at : at + size].tobytes(), *_parse_encoding(shard.path, name, encoding))
            except (ValueError, IndexError, KeyError) as error:
                raise UserError(
                    f"{where} is damaged: column {name} is not an array of integers ({type(error).__name__} {error})."
                ) from error
        at += size
    return result


def _array(content: bytes, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    """An array as ndarray encodings write it: [a byte for the type] [a byte for dimensions, the dimensions] values."""
    at = 0
    if not dtype:
        dtype = _INTEGERS[content[0]]
        at = 1
    if not shape:
        dimensions, width = content[at] >> 2, 1 << (content[at] & 3)
        shape = tuple(np.frombuffer(content, f"<u{width}", dimensions, at + 1).tolist())
        at += 1 + dimensions * width
    return np.frombuffer(content, np.dtype(dtype).newbyteorder("<"), -1, at).reshape(shape)


def _spans(indices: np.ndarray, length: int, where: str) -> list[tuple[int, int]]:
    """The documents [start, stop) of a packed row."""
    good = indices.ndim == 2 and indices.shape[1] == 2
    if good:
        ends = indices.astype(np.int64).ravel()
        good = bool((np.diff(ends) >= 0).all()) and ends[0] >= 0 and ends[-1] <= length
    if not good:
        raise UserError(
            f"{where}: indices must be the [start, stop) of its documents, rising and within its {length} tokens; it "
            f"has the shape {indices.shape} and holds {np.array2string(indices.ravel(), threshold=8)}."
        )
    return [(int(start), int(stop)) for start, stop in indices]
