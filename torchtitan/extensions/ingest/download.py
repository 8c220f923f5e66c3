"""Fetches files of a server into a folder: several at once, each complete or absent, from where it was interrupted."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from torchtitan.extensions.ingest.file_systems import RemoteFile, identity_now, refusal, what_failed
from torchtitan.tools.errors import UserError
from torchtitan.tools.folders import sync
from torchtitan.tools.urls import is_http, without_secrets

logger = logging.getLogger(__name__)

AT_ONCE = 8
"""Files that are fetched at the same time."""

CHUNK = 16 << 20
"""Bytes of a request, held in memory."""

WAITS = (1.0, 4.0, 15.0, 60.0)
"""Seconds before a file is tried again after an error, while no byte arrives."""

LOG_SECONDS = 10.0
"""Between two lines in the log about the progress."""


class Progress:
    """Counts the bytes that have arrived, for all files together, and logs a line every LOG_SECONDS."""

    def __init__(self, url: str, files: int, size: int, before: int) -> None:
        self._url, self._files, self._size, self._before = url, files, size, before
        self._done = self._bytes = 0
        self._lock, self._start, self._logged = threading.Lock(), time.monotonic(), time.monotonic()
        kept = f", {before / 1e6:,.1f} MB of them there already" if before else ""
        logger.info("fetching %s: %d files, %s MB%s", url, files, f"{size / 1e6:,.1f}", kept)

    def advance(self, size: int, files: int = 0) -> None:
        """`size` more bytes are on the disk, and so many `files` are whole."""
        with self._lock:
            self._bytes += size
            self._done += files
            now = time.monotonic()
            if now - self._logged < LOG_SECONDS:
                return
            self._logged, speed = now, self._bytes / max(now - self._start, 1e-9)
        left = max(0, self._size - self._before - self._bytes) / speed / 60 if speed else 0.0
        text = "fetching %s: %d of %d files, %.1f MB/s, about %.1f minutes left"
        logger.info(text, self._url, self._done, self._files, speed / 1e6, left)


def download(fs: Any, url: str, files: Sequence[RemoteFile], folder: Path) -> None:
    """Fetch the files of `url` that `folder` lacks, each to its identity. UserError for what cannot be fetched.

    A file that is being fetched is IDENTITY.partial; a later call goes on at its end. The caller holds a lock.
    """
    missing = [file for file in files if not is_fetched(file, folder)]
    if not missing:
        return
    before = sum(_size(_partial(file, folder)) for file in missing)
    size = sum(file.size or 0 for file in missing)
    free = shutil.disk_usage(folder).free
    if size - before > free:
        raise UserError(
            f"{url} needs {(size - before) / 1e9:.2f} GB more in {folder}, where {free / 1e9:.2f} GB are free. Name a "
            "data.cache_folder on a larger disk, or make room; or make several sources of it, each a glob."
        )
    progress = Progress(url, len(missing), size, before)
    shared = _Shared()
    with ThreadPoolExecutor(AT_ONCE) as pool:
        tasks = [pool.submit(_fetch, fs, url, file, folder, progress, shared) for file in missing]
        try:
            for task in wait(tasks, return_when=FIRST_EXCEPTION).done:
                task.result()
        finally:
            shared.stop.set()  # all are done, or one has failed
            pool.shutdown(wait=True, cancel_futures=True)
    sync(folder)


def is_fetched(file: RemoteFile, folder: Path) -> bool:
    """Whether the folder has the whole file."""
    path = folder / file.identity
    return path.is_file() and (file.size is None or path.stat().st_size == file.size)


class _Shared:
    """What threads share. md5: whether the ETags of the store are MD5 sums. stop: set if another file has failed."""

    def __init__(self) -> None:
        self.md5 = True
        self.stop = threading.Event()


def _fetch(fs: Any, url: str, file: RemoteFile, folder: Path, progress: Progress, shared: _Shared) -> None:
    partial, wrong = _partial(file, folder), ""
    with contextlib.suppress(FileNotFoundError):
        if file.size is None or _size(partial) > file.size:
            partial.unlink()  # without a size nobody knows what is missing
    while True:
        _receive(fs, file, partial, progress, shared)
        found = "" if file.digest is None or (file.digest[0] == "s3" and not shared.md5) else _digest(file, partial)
        if not found or (file.digest is not None and found == file.digest[1]):
            break
        if wrong and file.digest is not None:
            if file.digest[0] == "s3" and found == wrong:  # twice the same bytes: the ETag is something else
                shared.md5 = False
                logger.info("%s: its ETags are no MD5 sums of the files: only sizes are compared", url)
                break
            raise UserError(
                f"{file.path} of {url} arrived damaged twice: its checksum is {found}, the server says "
                f"{file.digest[1]}. Put the file there again, or try another network."
            )
        wrong = found
        progress.advance(-_size(partial))
        partial.unlink()
    if file.digest is None:
        try:
            now = identity_now(fs, file)
        except Exception as error:
            raise refusal(file.path, error, "could not be looked at again after it was fetched") from error
        if now != file.identity:
            partial.unlink()
            raise UserError(f"{file.path} was changed on the server while it was fetched: start again.")
    sync(partial)
    partial.replace(folder / file.identity)
    progress.advance(0, 1)


def _receive(fs: Any, file: RemoteFile, partial: Path, progress: Progress, shared: _Shared) -> None:
    """Append to `partial` until it has the size of the file; tries again, and more patiently while nothing arrives."""
    failures = 0
    while True:
        begin = _size(partial)
        if begin == file.size and (begin or partial.exists()):
            return
        try:
            with open(partial, "ab") as out:
                for block in _blocks(fs, file, begin, out):
                    out.write(block)
                    progress.advance(len(block))
                    if shared.stop.is_set():
                        raise UserError(f"{file.path}: the download was stopped.")
            have = _size(partial)
            if file.size is None or have == file.size:
                return
            if have > file.size:
                partial.unlink()
                raise UserError(f"{file.path} has more bytes than the {file.size} that its server says: start again.")
            error: Exception = EOFError(f"the server ended it after {have} of {file.size} bytes")
        except UserError:
            raise
        except Exception as raised:  # what the libraries raise is of many kinds
            if getattr(raised, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
                raise UserError(
                    f"{partial.parent} is full ({raised}): make room, or name a data.cache_folder on a larger disk. "
                    "What was fetched is kept."
                ) from raised
            error = raised
        have = _size(partial)
        failures = 0 if have > begin else failures + 1
        if file.size is None:
            partial.unlink(missing_ok=True)
        if what_failed(error) != "unreachable" or failures > len(WAITS):
            kept = f" after {have} of {file.size} bytes, which are kept: start again to go on" if have else ""
            raise refusal(file.path, error, f"could not be fetched{kept}") from error
        seconds = WAITS[max(0, failures - 1)]
        text = f"{type(error).__name__}: {error}"
        logger.warning(
            f"{file.path}: {without_secrets(' '.join(text.split()))[:300]}; going on at byte {have} in {seconds:g} s"
        )
        if shared.stop.wait(seconds):
            raise UserError(f"{file.path}: the download was stopped.")


def _blocks(fs: Any, file: RemoteFile, begin: int, out: Any) -> Iterator[bytes]:
    """The bytes of a file from `begin`; if its server cannot begin there, `out` is emptied and they are all."""
    from fsspec.asyn import AsyncFileSystem

    if is_http(file.path):
        headers = dict(fs.kwargs.get("headers", {}))
        if begin:
            headers["Range"] = f"bytes={begin}-"
        with fs.open(file.path, block_size=0, size=file.size or 1, headers=headers) as stream:
            start = stream.r.headers.get("Content-Range", "").removeprefix("bytes ").partition("-")[0]
            if begin and (stream.r.status != 206 or start != str(begin)):
                out.truncate(0)
            if file.size is None and not {"Content-Length", "Transfer-Encoding"} & set(stream.r.headers):
                raise UserError(
                    f"The server does not say how many bytes {file.path} has: nobody would notice a file that is cut "
                    "short. Download it, and name the local file."
                )
            while block := stream.read(1 << 20):
                yield block
    elif file.size is None:
        raise UserError(
            f"The server does not say how many bytes {file.path} has. Download it, and name the local file."
        )
    elif isinstance(fs, AsyncFileSystem):
        for at in range(begin, file.size, CHUNK):
            end = min(at + CHUNK, file.size)
            block = fs.cat_file(file.path, start=at, end=end)
            if len(block) > end - at:
                raise UserError(f"The server of {file.path} does not send parts of files: download it in another way.")
            yield block
            if len(block) < end - at:
                raise EOFError(f"the server sent {len(block)} bytes for the {end - at} from {at}")
    else:
        with fs.open(file.path, "rb", cache_type="none") as stream:
            stream.seek(begin)
            while block := stream.read(CHUNK):
                yield block


def _digest(file: RemoteFile, path: Path) -> str:
    """The checksum of the kind that the server gives, hex."""
    assert file.digest is not None
    kind = file.digest[0]
    digest = hashlib.new({"sha256": "sha256", "git": "sha1"}.get(kind, "md5"))
    if kind == "git":
        digest.update(b"blob %d\0" % os.path.getsize(path))
    with open(path, "rb") as content:
        while block := content.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _partial(file: RemoteFile, folder: Path) -> Path:
    return folder / f"{file.identity}.partial"


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
