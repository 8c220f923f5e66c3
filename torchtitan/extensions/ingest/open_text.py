"""A file of text, compressed or not -> its bytes; what is no text, or not whole, is refused by name.

gzip, bzip2 and xz are read by the standard library, Zstandard by Arrow, which every installation has for its datasets.
"""

from __future__ import annotations

import bz2
import gzip
import io
import logging
import lzma
import os
import re
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from torchtitan.extensions.ingest.bad_records import DamagedError
from torchtitan.tools.errors import UserError

logger = logging.getLogger(__name__)

CHUNK = 1 << 20
PROGRESS_SECONDS = 60.0

BEGINNINGS = {
    ".gz": re.compile(rb"\x1f\x8b"),
    ".zst": re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18"),  # a frame, or a skippable one
    ".bz2": re.compile(rb"BZh[1-9](1AY&SY|\x17\x72\x45\x38\x50\x90)"),
    ".xz": re.compile(rb"\xfd7zXZ\x00"),
}
"""How a compressed file begins, by its suffix."""

OTHERS = {
    "a Parquet file": (re.compile(rb"PAR1[\x00-\x08\x0e-\x1f\x80-\xff]"), ".parquet"),
    "a zip archive": (re.compile(rb"PK\x03\x04"), ""),
    "an Arrow file": (re.compile(rb"ARROW1\x00|\xff\xff\xff\xff[^\x00]...\x10\x00\x00\x00", re.S), ".arrow"),
}
UTF16 = re.compile(rb"\xff\xfe|\xfe\xff|(\x00[^\x00]){4}|([^\x00]\x00){4}", re.S)


def compression(path: str | Path) -> str:
    """The suffix that says how a file is compressed, "" for none."""
    suffix = os.path.splitext(path)[1]
    return suffix if suffix in BEGINNINGS else ""


def kind_of(path: str | Path) -> str:
    """The suffix of the content: ".jsonl" of a.jsonl and of a.jsonl.gz."""
    packed = compression(path)
    return os.path.splitext(str(path).removesuffix(packed))[1]


def whole_suffix(path: str | Path) -> str:
    """ ".jsonl.gz" of a.jsonl.gz, else the last suffix."""
    return (kind_of(path) if compression(path) else "") + os.path.splitext(path)[1]


def open_text(path: str) -> BinaryIO:
    """The bytes of a file, decompressed. Reading raises UserError if the archive is damaged or not whole."""
    if not compression(path):
        return open(path, "rb")
    return io.BufferedReader(_Chunks(path), CHUNK)


def beginning(path: str) -> bytes:
    """The first bytes of a file's text, without a byte order mark; UserError if it is not what its name says."""
    packed = compression(path)
    with open(path, "rb") as raw:
        head = raw.read(16)
    if packed and not BEGINNINGS[packed].match(head):
        what = "is empty" if not head else f"begins with {head[:6]!r}, not as {packed} files do"
        kind = UserError if head else DamagedError
        raise kind(f"{path} {what}: fetch it again, or name it after what it is.")
    with open_text(path) as file:
        head = file.read(1 << 12)
    for suffix, pattern in BEGINNINGS.items():
        if pattern.match(head):
            if packed:
                raise UserError(f"{path} was compressed twice: decompress it once, so that its text can be read.")
            raise UserError(f"{path} is compressed, though its name does not say so: rename it to {path}{suffix}.")
    for what, (pattern, suffix) in OTHERS.items():
        if pattern.match(head):
            mend = f"rename it to *{suffix}" if suffix else "unpack or convert it to .jsonl, .parquet or .txt"
            raise UserError(f"{path} is {what}, not {kind_of(path)}: {mend}.")
    if UTF16.match(head):
        raise UserError(f"{path} is UTF-16, and text is read as UTF-8: convert it (iconv -f utf-16 -t utf-8).")
    return head.removeprefix(b"\xef\xbb\xbf")


class _Chunks(io.RawIOBase):
    """A raw stream over _decompressed."""

    def __init__(self, path: str) -> None:
        self._chunks, self._rest = _decompressed(path), memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._rest:
            if (chunk := next(self._chunks, None)) is None:
                return 0
            self._rest = memoryview(chunk)
        count = min(len(buffer), len(self._rest))
        buffer[:count], self._rest = self._rest[:count], self._rest[count:]
        return count

    def close(self) -> None:
        self._chunks.close()
        super().close()


def _decompressed(path: str) -> Any:
    """A generator of a compressed file's bytes, with a line in the log now and then. DamagedError if it is damaged."""
    import pyarrow as pa

    size, said, at = os.path.getsize(path), time.monotonic(), 0
    try:
        with open(path, "rb") as raw:
            for chunk in _readers(pa)[compression(path)](raw):
                yield chunk
                at = raw.tell()
                if time.monotonic() - said >= PROGRESS_SECONDS:
                    said = time.monotonic()
                    logger.info("reading %s: %.2f of %.2f GB, compressed", path, at / 1e9, size / 1e9)
    except (EOFError, OSError, zlib.error, lzma.LZMAError, pa.ArrowException) as error:
        if "too much memory" in str(error):
            raise UserError(
                f"{path} was compressed with a window of more than 128 MiB (zstd --long): write it again without that "
                "option (zstd -d --long=31, then zstd)."
            ) from error
        damaged = DamagedError(
            f"{path} cannot be decompressed to its end: {' '.join(str(error).split()).rstrip('.')}. It is damaged or "
            "not whole: fetch it again, or take it out of the source."
        )
        damaged.rest = size - max(0, at - CHUNK)  # what was read ahead may be lost too
        raise damaged from error


def _readers(pa: Any) -> dict[str, Callable[[BinaryIO], Iterator[bytes]]]:
    def whole(file: Any) -> Iterator[bytes]:
        return iter(lambda: file.read(CHUNK), b"")

    return {
        ".gz": lambda raw: whole(gzip.GzipFile(fileobj=raw)),
        ".zst": lambda raw: whole(pa.CompressedInputStream(pa.PythonFile(raw, "r"), "zstd")),
        ".bz2": lambda raw: _streams(raw, bz2.BZ2Decompressor, b""),
        ".xz": lambda raw: _streams(raw, lzma.LZMADecompressor, b"\0"),
    }


def _streams(raw: BinaryIO, new: Callable[[], Any], padding: bytes) -> Iterator[bytes]:
    """The bytes of all streams of a file. The library's readers pass over what follows the first, if damaged."""
    data = raw.read(CHUNK)
    while data := data.lstrip(padding) or raw.read(CHUNK):
        decoder = new()
        while not decoder.eof:
            if decoder.needs_input and not data and not (data := raw.read(CHUNK)):
                raise EOFError("it ends before its end mark")
            piece, data = decoder.decompress(data, CHUNK), b""
            if piece:
                yield piece
        data = decoder.unused_data
