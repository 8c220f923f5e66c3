"""A tokenized source on disk: memory-mapped Arrow with a column `input_ids`, one document per row, and perhaps `roles`.

open_corpus is all that the core knows of where data come from; extensions/ingest makes such folders. Opening reads
Arrow's metadata and offsets, never the tokens: all lengths are known at once and a document is a view into a file that
is mapped when it is read (mapped.py). A folder of ours (with corpus.json) is checked against what it says of itself; a
folder that someone else wrote with datasets' save_to_disk is taken as it is.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from torchtitan.datasets.mapped import ArrowFile, MappedNumbers, cannot_read, is_limit
from torchtitan.tools.errors import UserError
from torchtitan.tools.folders import hash_file, read_json

CORPUS_FILE = "corpus.json"
STATE_FILE = "state.json"  # of datasets' save_to_disk; names the Arrow files in order

CORPUS_FORMAT = 1
"""Version of corpus.json and of the way text becomes tokens; part of every key."""

ROLES = ("other", "system", "user", "tool", "assistant")
"""What a token of a conversation belongs to, by its number in the column `roles`; the loss is on the assistant's alone.
Corpora that are made now tell only `assistant` and `other` apart; older ones know the rest."""

ASSISTANT = ROLES.index("assistant")

CONVERSATIONS_LEFT_OUT = {
    "no_response": "without a message of the assistant",
    "empty_response": "with an empty message of the assistant",
    "special_token": "that spell a special token of the tokenizer or the end of a turn, e.g. <|im_end|>",
    "not_trained": "whose messages of the assistant all say that they are not trained (weight 0, train or loss false)",
    "where": "for which where does not hold",
    "no_label": "of whose tokens none is trained (labels, masks)",
}
"""Why conversations (by where, records) are left out, by the key of `left_out`."""

MAKE_AGAIN = "Delete the folder and make it again."

Numbers = np.ndarray | MappedNumbers
"""What is read by slices: an array, or numbers in a file."""


class Corpus:
    """Documents of a source; made by open_corpus.

    folder: str. lengths: int64[n], tokens of every document. tokens: their sum. fingerprint: hex, of the content.
    max_token_id: the largest id in the corpus, None if the folder does not say. has_roles: whether its tokens have
    roles (ROLES), so that only the assistant's are trained on. left_out: how many conversations were left out, by
    reason. shards: of each its bounds and tokens. Bounds: int64[documents + 1] if the documents lie one behind the
    other; if not, int64[2, documents], their starts and stops.
    """

    def __init__(
        self,
        folder: str,
        shards: Sequence[tuple[np.ndarray, Numbers]],
        fingerprint: str,
        max_token_id: int | None,
        roles: Sequence[Numbers] | None = None,
        left_out: dict[str, int] | None = None,
    ) -> None:
        self.folder = folder
        self.fingerprint = fingerprint
        self.max_token_id = max_token_id
        self.has_roles = roles is not None
        self.left_out = left_out or {}
        self.hashes: np.ndarray | None = None
        self.excluded: np.ndarray | None = None
        self._values = [values for _, values in shards]
        self._roles = roles or []
        self._bounds = [bounds if bounds.ndim == 2 else (bounds[:-1], bounds[1:]) for bounds, _ in shards]
        self._first = np.cumsum([0] + [len(starts) for starts, _ in self._bounds])
        self.lengths = np.concatenate([stops - starts for starts, stops in self._bounds]).astype(np.int64)
        self.tokens = int(self.lengths.sum())

    def __len__(self) -> int:
        """Number of documents."""
        return len(self.lengths)

    def document(self, index: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Tokens [start, stop) of a document, int32; all lengths[index] of them by default. A read-only view into the
        file if that holds int32 too."""
        shard, tokens = self._place(index)
        values = self._values[shard][tokens][start:stop]
        ids = values.astype(np.int32, copy=False)
        if ids is not values and values.itemsize >= 4 and not np.array_equal(ids, values):
            raise UserError(f"Document {index} of {self.folder} holds {values.max()}, which is no token id.")
        return ids

    def roles(self, index: int) -> np.ndarray:
        """The role of each of its tokens, int8[lengths[index]]; only if has_roles."""
        shard, tokens = self._place(index)
        return self._roles[shard][tokens]

    def _place(self, index: int) -> tuple[int, slice]:
        """The number of the shard that holds a document, and the document's tokens in it."""
        if not 0 <= index < len(self):
            raise IndexError(f"document {index} of {len(self)} in {self.folder}")
        shard = int(np.searchsorted(self._first, index, side="right")) - 1
        starts, stops = self._bounds[shard]
        return shard, slice(int(starts[index - self._first[shard]]), int(stops[index - self._first[shard]]))


def is_tokenized(path: Path) -> bool:
    """Whether the path is a folder of tokens (of ours or datasets') rather than text."""
    return any((path / name).is_file() for name in (CORPUS_FILE, STATE_FILE, "dataset_dict.json"))


def open_corpus(
    folder: str | os.PathLike[str], tokenizer_fingerprint: str | None = None, check_text: bool = True
) -> Corpus:
    """Open a tokenized folder. With a fingerprint, a corpus.json that names another tokenizer is refused.

    With check_text, text files that corpus.json lists and that still exist must not have changed since.
    """
    path = Path(folder).expanduser()
    if (path / "dataset_dict.json").is_file():
        splits = read_json(path / "dataset_dict.json", MAKE_AGAIN).get("splits", [])
        raise UserError(f"{path} holds the splits {', '.join(splits)}: name one of them, e.g. {path / splits[0]}.")
    if not (path / STATE_FILE).is_file():
        raise UserError(
            f"{path} is not a tokenized corpus: it has no {STATE_FILE}, which datasets' save_to_disk writes. Make the "
            "folder again, or name the text as the source."
        )
    metadata = read_json(path / CORPUS_FILE, MAKE_AGAIN) if (path / CORPUS_FILE).is_file() else None
    if metadata is not None:
        _check(path, metadata, tokenizer_fingerprint, check_text)
    names = [str(entry["filename"]) for entry in read_json(path / STATE_FILE, MAKE_AGAIN).get("_data_files", [])]
    mapped = [batch for name in names for batch in _shards_of(path / name)]
    shards = [(offsets, values) for offsets, values, _ in mapped]
    roles = [values for _, _, values in mapped if values is not None]
    if len(roles) not in (0, len(mapped)):
        raise UserError(f"Some Arrow files of {path} have a column roles and some have none. Make the folder again.")
    if not shards or not any(len(offsets) > 1 for offsets, _ in shards):
        raise UserError(
            f"The corpus {path} is empty: {STATE_FILE} names {len(names)} Arrow files, and they hold no document. "
            "Delete the folder and make it again."
        )
    if metadata is not None:
        left_out = metadata.get("left_out")
        corpus = Corpus(str(path), shards, metadata["fingerprint"], metadata["max_token_id"], roles or None, left_out)
        if (len(corpus), corpus.tokens) != (metadata["documents"], metadata["tokens"]):
            raise UserError(
                f"The corpus {path} holds {len(corpus)} documents and {corpus.tokens} tokens, its {CORPUS_FILE} says "
                f"{metadata['documents']} and {metadata['tokens']}: it was changed. Delete the folder and tokenize "
                "again."
            )
        return corpus
    identity = hashlib.sha256(json.dumps([[name, os.path.getsize(path / name)] for name in names]).encode())
    for offsets, values in shards:
        identity.update(np.diff(offsets).tobytes())  # a plan made for other lengths would read beyond documents
        tokens = values[:]
        for begin in np.linspace(0, max(0, len(tokens) - 1024), 16).astype(int):  # a sample: all would take minutes
            identity.update(tokens[begin : begin + 1024].tobytes())
    for values in roles:
        identity.update(values[:].tobytes())
    return Corpus(str(path), shards, identity.hexdigest()[:16], None, roles or None)


def _check(path: Path, metadata: dict[str, Any], tokenizer_fingerprint: str | None, check_text: bool) -> None:
    again = "Delete the folder and tokenize the text again."
    if metadata.get("format") != CORPUS_FORMAT:
        raise UserError(
            f"{path / CORPUS_FILE} has format {metadata.get('format')}, this version reads {CORPUS_FORMAT}. {again}"
        )
    if tokenizer_fingerprint is not None and metadata["tokenizer"] != tokenizer_fingerprint:
        raise UserError(
            f"{path} was tokenized with the tokenizer {metadata['tokenizer'][:12]} (from "
            f"{metadata['tokenizer_folder']}), but model.hf_assets_path gives {tokenizer_fingerprint[:12]}: point it "
            "at that one, or name the text as the source to have it tokenized with this one."
        )
    for shard in metadata["shards"]:
        file = path / shard["name"]
        if not file.is_file():
            raise UserError(f"{file} is missing from the corpus. {again}")
        if file.stat().st_size != shard["size"]:
            raise UserError(
                f"{file} has {file.stat().st_size} bytes, {CORPUS_FILE} says {shard['size']}: it is damaged. {again}"
            )
    for text in metadata["files"] if check_text else ():
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


def _shards_of(file: Path) -> list[tuple[np.ndarray, MappedNumbers, MappedNumbers | None]]:
    """(offsets int64[rows + 1], tokens, roles or None) of every record batch; no map is kept."""
    import pyarrow as pa

    if not file.is_file():
        raise UserError(f"{file} is missing from the corpus: delete the folder and make it again.")
    try:
        arrow = ArrowFile(file)
        if "input_ids" not in arrow.schema.names:
            names = ", ".join(arrow.schema.names)
            raise UserError(f"{file} has no column input_ids (it has {names}): it is not a tokenized corpus.")
        shards = []
        for batch in arrow.batches:
            column = batch.column("input_ids")
            if len(column) == 0:
                continue
            if not (pa.types.is_list(column.type) or pa.types.is_large_list(column.type)):
                raise UserError(f"{file}: the column input_ids is {column.type}, not a list of integers per row.")
            if not pa.types.is_integer(column.type.value_type) or column.null_count or column.values.null_count:
                raise UserError(f"{file}: the column input_ids ({column.type}) must hold integers without nulls.")
            offsets = column.offsets.to_numpy(zero_copy_only=False).astype(np.int64)
            if not (offsets[0] >= 0 and (np.diff(offsets) >= 0).all() and offsets[-1] <= len(column.values)):
                raise UserError(f"{file} is a damaged Arrow file: its offsets are out of order.")
            ids, roles = arrow.numbers(column.values), None
            if "roles" in batch.schema.names:
                role_column = batch.column("roles")
                if role_column.type.value_type != pa.int8() or not role_column.offsets.equals(column.offsets):
                    raise UserError(f"{file}: the column roles must hold an int8 for each of the input_ids.")
                roles = arrow.numbers(role_column.values)
            if ids is None or ("roles" in batch.schema.names and roles is None):
                raise UserError(f"{file} is compressed, and cannot be mapped. {MAKE_AGAIN}")
            shards.append((offsets, ids, roles))
        return shards
    except (pa.ArrowException, OSError, EOFError) as error:
        if is_limit(error):
            raise cannot_read(file, error) from error
        raise UserError(f"{file} is a damaged Arrow file ({error}): delete the corpus and tokenize again.") from error
