"""Importer of MDS folders, the format that mosaicml-streaming writes and in which ProLong's data is published.

A folder has index.json, which lists shard files and their columns. A shard holds, little-endian: uint32 n, uint32
offsets[n + 1] from the file's beginning, then anything up to the first offset, then n samples. A sample is the uint32
sizes of the columns without a fixed size, followed by the bytes of all columns. mds_rows.py says which are read.
The library itself is not used: it pins old versions of what we need and cannot be imported beside PyTorch for CPUs.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from torchtitan.tools.errors import UserError
from torchtitan.tools.folders import read_json

INDEX_FILE = "index.json"
COMPRESSIONS = {"bz2": "bz2", "gz": "gzip", "zstd": "zstd"}  # the names here -> pyarrow's
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
    def encodings(self) -> dict[str, str]:
        """Column -> its encoding."""
        return {name: encoding for name, encoding, _ in self.columns}


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
    return MdsShard(str(path), compression, raw["bytes"], entry["samples"], columns)


def samples_of(shard: MdsShard, names: Sequence[str]) -> Iterator[tuple[str, dict[str, bytes]]]:
    """For each sample of a shard, in order, its place in words and the bytes of the columns `names`. UserError that
    names the file, and if it can the row, for what is damaged."""
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
        place = f"{shard.path} row {row}"
        yield place, _columns(shard, names, data[offsets[row] : offsets[row + 1]], place)


def array_of(content: bytes, encoding: str, place: str, name: str) -> np.ndarray:
    """The array of integers that a column `name` holds in an ndarray encoding."""
    try:
        return _array(content, *parse_encoding(place, name, encoding))
    except (ValueError, IndexError, KeyError) as error:
        raise UserError(
            f"{place} is damaged: column {name} is not an array of integers ({type(error).__name__} {error})."
        ) from error


def parse_encoding(place: str | Path, name: str, encoding: str) -> tuple[str, tuple[int, ...]]:
    """Type and shape in the name of an ndarray encoding; "" and () if each array says its own."""
    kind, _, rest = encoding.partition(":")
    dtype, _, shape = rest.partition(":")
    if kind != "ndarray" or (dtype and dtype not in _INTEGERS.values()):
        raise UserError(
            f"{place}: the column {name} has the encoding {encoding!r}; known are ndarray, ndarray:TYPE and "
            f"ndarray:TYPE:SHAPE with a TYPE of {', '.join(_INTEGERS.values())}."
        )
    return dtype, tuple(map(int, shape.split(","))) if shape else ()


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


def _columns(shard: MdsShard, names: Sequence[str], sample: np.ndarray, place: str) -> dict[str, bytes]:
    """The columns `names` of one sample uint8[n]."""
    varying = 4 * sum(not size for _, _, size in shard.columns)
    if len(sample) < varying:
        raise UserError(f"{place} is damaged: {len(sample)} bytes, and the sizes of its columns alone take {varying}.")
    varying_sizes = iter(sample[:varying].view("<u4").tolist())
    sizes = [size or next(varying_sizes) for _, _, size in shard.columns]
    if varying + sum(sizes) != len(sample):
        raise UserError(
            f"{place} is damaged: its columns take {varying} + {' + '.join(map(str, sizes))} = "
            f"{varying + sum(sizes)} bytes, but it has {len(sample)}."
        )
    result = {}
    at = varying
    for (name, _, _), size in zip(shard.columns, sizes):
        if name in names:
            result[name] = sample[at : at + size].tobytes()
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
