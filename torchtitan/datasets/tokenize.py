"""Text -> a tokenized corpus on disk, once: the cache that every rank, job and stage shares.

The result is a Hugging Face dataset folder (load_from_disk reads it) with one column `input_ids`, a document a row,
and corpus.json beside it that says what it was made of. Its name carries a key over the text's content, the tokenizer
and the BOS/EOS policy, so another input is another folder. It is written aside and renamed whole, under a file lock:
of several ranks or jobs one writes and the others wait.
"""

from __future__ import annotations

import glob
import hashlib
import json
import logging
import multiprocessing
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from torchtitan.config.job_config import Data, Source
from torchtitan.datasets.text import EXTENSIONS, Span, read_documents, split_into_spans
from torchtitan.tools.errors import UserError
from torchtitan.tools.folders import make_writable

if TYPE_CHECKING:  # components stand above datasets
    from torchtitan.components.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

CORPUS_FILE = "corpus.json"
FORMAT = 1
"""Version of corpus.json and of the way text becomes tokens; part of the key."""

SHARD_TEXT_BYTES = 4 << 20  # a unit of work and a shard: small enough that the cores end together ...
MOST_SHARDS = 512  # ... but the number of shards stays bounded, since each is mapped into memory
RECORD_BATCH_TOKENS = 4 << 20  # held by a worker at a time


@dataclass(frozen=True)
class TextFile:
    """A text file as it was when it was read."""

    path: str
    size: int
    mtime_ns: int
    sha256: str


def tokenize_source(source: Source, tokenizer: Tokenizer, data: Data, num_proc: int | None = None) -> Path:
    """Tokenize source.path (a file, folder or glob of .jsonl, .parquet, .txt) unless it is in the cache; the folder.

    Documents keep the order of the sorted files and of the documents in them, whatever num_proc (default: the cores
    this process may use). Empty documents are left out and counted. UserError for text that cannot be read.
    """
    paths = find_text_files(source)
    cache = Path(data.cache_folder).expanduser().absolute()
    make_writable("data.cache_folder", cache)
    try:
        return _tokenize_into(cache, source, tokenizer, data, paths, num_proc or cores())
    except OSError as error:
        raise UserError(
            f"Tokenizing data source {source.name!r} into data.cache_folder = {cache} failed: {error}. Are its files "
            f"readable, and is there room ({shutil.disk_usage(cache).free / 2**30:.2f} GiB are free)?"
        ) from error


def _tokenize_into(
    cache: Path, source: Source, tokenizer: Tokenizer, data: Data, paths: list[Path], num_proc: int
) -> Path:
    bos, eos = document_ends(tokenizer, data)
    files = _stat_and_hash(paths, cache)
    name = re.sub(r"[^\w.-]", "_", source.name) or "text"
    folder = cache / f"{name}-{_key(files, tokenizer, data, source.text_field)}"
    if folder.is_dir():
        return folder
    with _lock(cache, folder.name):
        if not folder.is_dir():  # another rank may have made it while this one waited
            aside = cache / f".unfinished-{folder.name}"
            shutil.rmtree(aside, ignore_errors=True)  # left by a killed run
            aside.mkdir()
            about = {
                "format": FORMAT,
                "tokenizer": tokenizer.fingerprint,
                "tokenizer_folder": tokenizer.folder,
                "vocab_size": tokenizer.vocab_size,
                "add_bos": data.add_bos,
                "add_eos": data.add_eos,
                "text_field": source.text_field,
                "path": source.path,
                "fingerprint": folder.name.rpartition("-")[2],
                "files": [asdict(file) for file in files],
            }
            try:
                _write(aside, source, [f.path for f in files], tokenizer, bos, eos, num_proc, about)
                _check_unchanged(files)
            except BaseException:
                shutil.rmtree(aside, ignore_errors=True)
                raise
            os.rename(aside, folder)
    return folder


def document_ends(tokenizer: Tokenizer, data: Data) -> tuple[list[int], list[int]]:
    """The ids put before and after every document; UserError if the policy asks for one that is not there."""
    for wanted, token, name in ((data.add_bos, tokenizer.bos_id, "bos"), (data.add_eos, tokenizer.eos_id, "eos")):
        if wanted and token is None:
            raise UserError(
                f"data.add_{name} = true, but the tokenizer in {tokenizer.folder} names no {name.upper()} token in "
                f"tokenizer_config.json, special_tokens_map.json, generation_config.json or config.json: set "
                f"data.add_{name} = false, or name the token in one of these files."
            )
    bos = [tokenizer.bos_id] if data.add_bos and tokenizer.bos_id is not None else []
    eos = [tokenizer.eos_id] if data.add_eos and tokenizer.eos_id is not None else []
    return bos, eos


def cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def find_text_files(source: Source) -> list[Path]:
    """The files of source.path, sorted. In a folder, hidden files and other extensions are passed over."""
    where = f"the path {source.path!r} of data source {source.name!r}"
    pattern = os.path.expanduser(source.path)
    path = Path(pattern)
    if not source.path:
        raise UserError(f"Data source {source.name!r} has no path: give a tokenized folder or text files.")
    if path.is_dir():
        found = [p for p in path.rglob("*") if p.is_file() and not _hidden(p.relative_to(path))]
        files = [p for p in found if p.suffix in EXTENSIONS]
        others = sorted({p.suffix or p.name for p in found} - set(EXTENSIONS))
        if not files:
            there = f"only {', '.join(others[:8])}" if others else "nothing"
            raise UserError(f"There is no {', '.join(EXTENSIONS)} file in {where}; the folder holds {there}.")
        if others:
            logger.info("%s: passing over %s in %s", source.name, ", ".join(others[:8]), source.path)
    else:
        files = [path] if path.is_file() else [Path(p) for p in glob.glob(pattern, recursive=True) if os.path.isfile(p)]
        if not files:
            raise UserError(f"No file matches {where} (looked from {os.getcwd()}).")
        wrong = sorted(p.name for p in files if p.suffix not in EXTENSIONS)
        if wrong:
            raise UserError(
                f"{wrong[0]} in {where} has the extension {Path(wrong[0]).suffix!r}; text is read from "
                f"{', '.join(EXTENSIONS)} (uncompressed)."
            )
    return sorted(p.absolute() for p in files)


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def hash_file(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _stat_and_hash(paths: list[Path], cache: Path) -> list[TextFile]:
    """Hash the files, but those that have the size and mtime of last time are not read again."""
    name = "hashes-" + hashlib.sha256("\n".join(map(str, paths)).encode()).hexdigest()[:16]
    known_path = cache / f".{name}.json"
    with _lock(cache, name):
        known: dict[str, list[Any]] = {}
        if known_path.is_file():
            known = json.loads(known_path.read_text())

        def one(path: Path) -> TextFile:
            stat = path.stat()
            before = known.get(str(path))
            if before and before[:2] == [stat.st_size, stat.st_mtime_ns]:
                return TextFile(str(path), stat.st_size, stat.st_mtime_ns, before[2])
            return TextFile(str(path), stat.st_size, stat.st_mtime_ns, hash_file(path))

        with ThreadPoolExecutor(min(8, cores())) as pool:  # hashlib leaves the interpreter lock alone
            files = list(pool.map(one, paths))
        now = {f.path: [f.size, f.mtime_ns, f.sha256] for f in files}
        if now != known:
            aside = known_path.with_suffix(".tmp")
            aside.write_text(json.dumps(now))
            os.replace(aside, known_path)
    return files


def _check_unchanged(files: list[TextFile]) -> None:
    for file in files:
        stat = os.stat(file.path)
        if (stat.st_size, stat.st_mtime_ns) != (file.size, file.mtime_ns):
            raise UserError(f"{file.path} was changed while it was being tokenized; start again when it is complete.")


def _key(files: list[TextFile], tokenizer: Tokenizer, data: Data, text_field: str) -> str:
    parts = [FORMAT, tokenizer.fingerprint, data.add_bos, data.add_eos, text_field]
    content = [(Path(f.path).suffix, f.sha256) for f in files]
    return hashlib.sha256(json.dumps([parts, content]).encode()).hexdigest()[:16]


def _lock(cache: Path, name: str) -> Any:
    import filelock

    return filelock.FileLock(cache / f".{name}.lock")


def _write(
    folder: Path,
    source: Source,
    paths: list[str],
    tokenizer: Tokenizer,
    bos: list[int],
    eos: list[int],
    num_proc: int,
    about: dict[str, Any],
) -> None:
    """Fill the folder: one Arrow shard a unit of text, then the files that make it a dataset and a corpus."""
    total = sum(os.path.getsize(path) for path in paths)
    units = split_into_spans(paths, max(SHARD_TEXT_BYTES, total // MOST_SHARDS))
    work = _Work(folder, units, source.text_field, tokenizer, bos, eos, _features().arrow_schema)
    name = source.name or "text"
    logger.info("%s: tokenizing %d files, %.1f MB of text", name, len(paths), total / 1e6)
    results = list(_with_progress(_run(work, min(num_proc, len(units))), units, f"tokenizing {name}"))
    results = [r for r in results if r["documents"]]
    documents = sum(r["documents"] for r in results)
    if not documents:
        raise UserError(
            f"Data source {source.name!r} holds no document with text: all that its path {source.path!r} names "
            f"({len(paths)} file{'' if len(paths) == 1 else 's'}) is empty or blank."
        )
    for index, result in enumerate(results):
        shard = f"data-{index:05d}-of-{len(results):05d}.arrow"
        os.rename(folder / result.pop("file"), folder / shard)
        result["name"] = shard
        result["size"] = os.path.getsize(folder / shard)
    for left in folder.glob("unit-*.arrow"):  # units without a document
        left.unlink()
    _write_dataset_files(folder, [r["name"] for r in results])
    about |= {
        "documents": documents,
        "tokens": sum(r["tokens"] for r in results),
        "empty_documents": sum(r["empty"] for r in results),
        "max_token_id": max(r["max_token_id"] for r in results),
        "shards": [{"name": r["name"], "size": r["size"]} for r in results],
    }
    (folder / CORPUS_FILE).write_text(json.dumps(about, indent=1))
    logger.info("%s: %d documents, %d tokens", name, documents, about["tokens"])


def _write_dataset_files(folder: Path, shards: list[str]) -> None:
    """dataset_info.json and state.json as the datasets library writes them, with our shards in place of its own."""
    import datasets

    empty = folder / "empty"
    quiet = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    datasets.Dataset.from_dict({"input_ids": []}, features=_features()).save_to_disk(str(empty))
    if not quiet:
        datasets.enable_progress_bars()
    state = json.loads((empty / "state.json").read_text())
    state["_data_files"] = [{"filename": shard} for shard in shards]
    (folder / "state.json").write_text(json.dumps(state, indent=2))
    os.rename(empty / "dataset_info.json", folder / "dataset_info.json")
    shutil.rmtree(empty)


def _features() -> Any:
    import pyarrow as pa
    from datasets import Features

    return Features.from_arrow_schema(pa.schema([("input_ids", pa.list_(pa.int32()))]))


@dataclass(frozen=True)
class _Work:
    """What a worker needs; it is inherited by fork, not sent."""

    folder: Path
    units: list[list[Span]]
    text_field: str
    tokenizer: Tokenizer
    bos: list[int]
    eos: list[int]
    schema: Any


_work: _Work | None = None


def _run(work: _Work, num_proc: int) -> Iterator[dict[str, Any]]:
    """Results of the units in order. An executor, since it notices a worker that was killed; a Pool waits for ever."""
    global _work
    _work = work
    try:
        if num_proc <= 1:
            yield from map(_tokenize_unit, range(len(work.units)))
            return
        fork = multiprocessing.get_context("fork")
        with ProcessPoolExecutor(num_proc, mp_context=fork, initializer=_start_worker) as pool:
            futures: list[Future[dict[str, Any]]] = [pool.submit(_tokenize_unit, i) for i in range(len(work.units))]
            try:
                for future in futures:
                    yield future.result()
            except BrokenProcessPool as error:
                raise UserError(
                    f"Tokenizing failed: {error} Perhaps the system killed it for want of memory; a machine with more, "
                    "or scripts/tokenize_corpus.py with a smaller --num-proc, would do."
                ) from error
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise
    finally:
        _work = None


def _start_worker() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism


def _tokenize_unit(index: int) -> dict[str, Any]:
    """Write one shard; its file name and counts."""
    import pyarrow as pa

    assert _work is not None
    name = f"unit-{index:05d}.arrow"
    result: dict[str, Any] = {"file": name, "documents": 0, "tokens": 0, "empty": 0, "max_token_id": -1}
    lengths: list[int] = []
    parts: list[np.ndarray] = []
    schema = _work.schema

    def flush() -> None:
        if lengths:
            offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
            column = pa.ListArray.from_arrays(offsets, pa.array(np.concatenate(parts)))
            writer.write_batch(pa.record_batch([column], schema=schema))
            lengths.clear()
            parts.clear()

    with pa.OSFile(str(_work.folder / name), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        held = 0
        for text in _texts(_work.units[index], _work.text_field):
            ids = _work.tokenizer.encode(text) if text and not text.isspace() else []
            if not ids:
                result["empty"] += 1
                continue
            tokens = np.array(_work.bos + ids + _work.eos, dtype=np.int32)
            if held + len(tokens) > RECORD_BATCH_TOKENS:
                flush()
                held = 0
            held += len(tokens)
            lengths.append(len(tokens))
            parts.append(tokens)
            result["documents"] += 1
            result["tokens"] += len(tokens)
            result["max_token_id"] = max(result["max_token_id"], int(tokens.max()))
        flush()
    return result


def _texts(spans: list[Span], text_field: str) -> Iterator[str]:
    for span in spans:
        yield from read_documents(span, text_field)


def _with_progress(results: Iterable[dict[str, Any]], units: list[list[Span]], title: str) -> Iterator[dict[str, Any]]:
    """The results as they come, with a bar over bytes of text on a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    sizes = [sum(span.size for span in unit) for unit in units]
    columns = (TextColumn(title), BarColumn(), TextColumn("{task.percentage:.0f}%"), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(title, total=sum(sizes))
        for size, result in zip(sizes, results):
            yield result
            progress.advance(task, size)
