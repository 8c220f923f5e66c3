"""A tokenized source on disk: memory-mapped Arrow with a column `input_ids`, one document a row.

Opening reads Arrow's metadata and offsets, never the tokens: all lengths are there at once and a document is a view
into the mapped file. A folder of ours (with corpus.json) is checked against what it says of itself; a folder that
someone else wrote with datasets' save_to_disk is taken as it is.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from torchtitan.config.job_config import Data, Source
from torchtitan.datasets.hub import is_hub
from torchtitan.datasets.source_files import hash_file, source_path
from torchtitan.datasets.tokenize import tokenize_source
from torchtitan.datasets.units import CORPUS_FILE, FORMAT
from torchtitan.tools.errors import UserError

if TYPE_CHECKING:  # components stand above datasets
    from torchtitan.components.tokenizer import Tokenizer

STATE_FILE = "state.json"  # of datasets' save_to_disk; names the Arrow files in order


class Corpus:
    """Documents of a source; made by open_corpus.

    folder: str. lengths: int64[n], tokens of every document. tokens: their sum. fingerprint: hex, of the content.
    max_token_id: largest id in the corpus, None where the folder does not say.
    """

    def __init__(
        self, folder: str, shards: list[tuple[np.ndarray, np.ndarray]], fingerprint: str, max_token_id: int | None
    ) -> None:
        self.folder = folder
        self.fingerprint = fingerprint
        self.max_token_id = max_token_id
        self._values = [values for _, values in shards]
        self._offsets = [offsets for offsets, _ in shards]
        self._first = np.cumsum([0] + [len(offsets) - 1 for offsets in self._offsets])
        self.lengths = np.concatenate([np.diff(offsets) for offsets in self._offsets]).astype(np.int64)
        self.tokens = int(self.lengths.sum())

    def __len__(self) -> int:
        """Number of documents."""
        return len(self.lengths)

    def document(self, index: int) -> np.ndarray:
        """Tokens of a document, int32[lengths[index]]; a read-only view into the file where that is int32 too."""
        if not 0 <= index < len(self):
            raise IndexError(f"document {index} of {len(self)} in {self.folder}")
        part = int(np.searchsorted(self._first, index, side="right")) - 1
        start, stop = self._offsets[part][index - self._first[part] :][:2]
        return self._values[part][start:stop].astype(np.int32, copy=False)


def resolve_source(source: Source, tokenizer: Tokenizer, data: Data) -> Corpus:
    """The corpus of a source: its tokenized folder, or what tokenize_source makes of it in data.cache_folder."""
    path = source_path(source, data)
    if is_hub(source) or not is_tokenized(path):
        # The cache was just found by its content, so that is not looked at a second time.
        return open_corpus(tokenize_source(source, tokenizer, data), tokenizer.fingerprint, check_text=False)
    about = _read_json(path / CORPUS_FILE) if (path / CORPUS_FILE).is_file() else {}
    for key, wanted in (("add_bos", data.add_bos), ("add_eos", data.add_eos)):
        if about.get(key, wanted) != wanted:
            has, asked = str(about[key]).lower(), str(wanted).lower()
            raise UserError(
                f"data.{key} = {asked}, but {path} of data source {source.name!r} was tokenized with {key} = {has}: "
                f"set data.{key} = {has}, or tokenize the text again."
            )
    return open_corpus(path, tokenizer.fingerprint)


def is_tokenized(path: Path) -> bool:
    """Whether the path is a folder of tokens (of ours or datasets') rather than text."""
    return any((path / name).is_file() for name in (CORPUS_FILE, STATE_FILE, "dataset_dict.json"))


def open_corpus(
    folder: str | os.PathLike[str], tokenizer_fingerprint: str | None = None, check_text: bool = True
) -> Corpus:
    """Open a tokenized folder. With a fingerprint, a corpus.json that names another tokenizer is refused.

    With check_text, text files that corpus.json lists and that are still there must not have changed since.
    """
    path = Path(folder).expanduser()
    if (path / "dataset_dict.json").is_file():
        splits = _read_json(path / "dataset_dict.json").get("splits", [])
        raise UserError(f"{path} holds the splits {', '.join(splits)}: name one of them, e.g. {path / splits[0]}.")
    if not (path / STATE_FILE).is_file():
        raise UserError(
            f"{path} is not a tokenized corpus: it has no {STATE_FILE}, which datasets' save_to_disk writes. Make the "
            "folder again, or name the text as the source."
        )
    about = _read_json(path / CORPUS_FILE) if (path / CORPUS_FILE).is_file() else None
    if about is not None:
        _check(path, about, tokenizer_fingerprint, check_text)
    names = [str(entry["filename"]) for entry in _read_json(path / STATE_FILE).get("_data_files", [])]
    shards = [part for name in names for part in _map_shard(path / name)]
    if not shards or not any(len(offsets) > 1 for offsets, _ in shards):
        raise UserError(
            f"The corpus {path} is empty: {STATE_FILE} names {len(names)} Arrow files, and they hold no document. "
            "Delete the folder and make it again."
        )
    if about is not None:
        corpus = Corpus(str(path), shards, about["fingerprint"], about["max_token_id"])
        if (len(corpus), corpus.tokens) != (about["documents"], about["tokens"]):
            raise UserError(
                f"The corpus {path} holds {len(corpus)} documents and {corpus.tokens} tokens, its {CORPUS_FILE} says "
                f"{about['documents']} and {about['tokens']}: it was changed. Delete the folder and tokenize again."
            )
        return corpus
    identity = hashlib.sha256(json.dumps([[name, os.path.getsize(path / name)] for name in names]).encode())
    for offsets, values in shards:
        identity.update(np.diff(offsets).tobytes())  # a plan made for other lengths would read beyond documents
        for begin in np.linspace(0, max(0, len(values) - 1024), 16).astype(int):  # a sample: all would take minutes
            identity.update(values[begin : begin + 1024].tobytes())
    return Corpus(str(path), shards, identity.hexdigest()[:16], None)


def _check(path: Path, about: dict[str, Any], tokenizer_fingerprint: str | None, check_text: bool) -> None:
    again = "Delete the folder and tokenize the text again."
    if about.get("format") != FORMAT:
        raise UserError(f"{path / CORPUS_FILE} has format {about.get('format')}, this version reads {FORMAT}. {again}")
    if tokenizer_fingerprint is not None and about["tokenizer"] != tokenizer_fingerprint:
        raise UserError(
            f"{path} was tokenized with the tokenizer {about['tokenizer'][:12]} (from {about['tokenizer_folder']}), "
            f"but model.hf_assets_path gives {tokenizer_fingerprint[:12]}: point it at that one, or name the text "
            "as the source to have it tokenized with this one."
        )
    for shard in about["shards"]:
        file = path / shard["name"]
        if not file.is_file():
            raise UserError(f"{file} is missing from the corpus. {again}")
        if file.stat().st_size != shard["size"]:
            raise UserError(
                f"{file} has {file.stat().st_size} bytes, {CORPUS_FILE} says {shard['size']}: it is damaged. {again}"
            )
    for text in about["files"] if check_text else ():
        if not os.path.exists(text["path"]):
            continue  # a corpus outlives its text
        stat = os.stat(text["path"])
        same_size = stat.st_size == text["size"]
        if same_size and (stat.st_mtime_ns == text["mtime_ns"] or hash_file(text["path"]) == text["sha256"]):
            continue
        raise UserError(
            f"{text['path']} has changed since it was tokenized into {path} ({text['size']} bytes then, {stat.st_size} "
            "now): tokenize it again, or name the text as the source to have that done."
        )


def _map_shard(file: Path) -> list[tuple[np.ndarray, np.ndarray]]:
    """(offsets int64[rows + 1], values) of every record batch; the values are views into the mapped file."""
    import pyarrow as pa

    if not file.is_file():
        raise UserError(f"{file} is missing from the corpus: delete the folder and make it again.")
    try:
        with pa.ipc.open_stream(pa.memory_map(str(file))) as reader:
            if "input_ids" not in reader.schema.names:
                there = ", ".join(reader.schema.names)
                raise UserError(f"{file} has no column input_ids (it has {there}): it is not a tokenized corpus.")
            batches = [batch.column("input_ids") for batch in reader]
        parts = []
        for column in batches:
            if len(column) == 0:
                continue
            if not (pa.types.is_list(column.type) or pa.types.is_large_list(column.type)):
                raise UserError(f"{file}: the column input_ids is {column.type}, not a list of integers a row.")
            if not pa.types.is_integer(column.type.value_type) or column.null_count or column.values.null_count:
                raise UserError(f"{file}: the column input_ids ({column.type}) must hold integers without nulls.")
            offsets = column.offsets.to_numpy(zero_copy_only=False).astype(np.int64)
            values = column.values.to_numpy(zero_copy_only=True)
            if not (offsets[0] >= 0 and (np.diff(offsets) >= 0).all() and offsets[-1] <= len(values)):
                raise UserError(f"{file} is a damaged Arrow file: its offsets are out of order.")
            parts.append((offsets, values))
        return parts
    except (pa.ArrowException, OSError, EOFError) as error:
        raise UserError(f"{file} is a damaged Arrow file ({error}): delete the corpus and tokenize again.") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
        assert isinstance(value, dict)
    except (ValueError, AssertionError) as error:
        raise UserError(f"{path} is damaged: {error}. Delete the folder and tokenize again.") from error
    return value
