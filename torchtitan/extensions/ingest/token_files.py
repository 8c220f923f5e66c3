"""A source whose files hold token ids, read in place: which files, in which layout, and the corpus over their maps.

The layout is found out unless `format` names it, and logged. What fits two layouts is refused: ids that are read in the
wrong width are ids too. Such files do not say which tokenizer made them; all their ids must be ids of this stage's.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from torchtitan.config.data_schema import Data, Source
from torchtitan.datasets.corpus import Corpus, Numbers
from torchtitan.datasets.tokenizer import Tokenizer
from torchtitan.extensions.ingest.encoder import Encoder, make_encoder
from torchtitan.extensions.ingest.find_text import SPLITS
from torchtitan.extensions.ingest.source_files import files_below, is_hub, matching_files, source_path
from torchtitan.extensions.ingest.token_index import Cut, TokenIndex, index_files
from torchtitan.extensions.ingest.token_layouts import RAW, TokenFile, layout_of, open_tokens
from torchtitan.tools.errors import UserError

logger = logging.getLogger(__name__)

SUFFIXES = {"megatron": (".bin", ".idx"), "llm.c": (".bin",), "npy": (".npy",)}  # in a folder; of the others both
TEXT = re.compile(r".*\.(jsonl?|txt|parquet)(\.\w+)?|.*\.mds(\.\w+)?|.*\.arrow")
MASK = re.compile(r"(^|[\W_])(mask|labels?)s?([\W_]|$)")  # of Olmo's conversations: labels_mask_part_0000.npy
HELD_OUT = {word for word, split in SPLITS.items() if split != "train"}
PROBE = 1 << 20  # bytes at the beginning of a file, by which its width is found out
PROBED = 64  # files


class TokenCorpus(Corpus):
    """A corpus over files of others. Documents that lack the BOS or EOS of data.add_bos and add_eos get it when they
    are read; every id is checked again then, since files may be sampled, and may change.

    lacks: bool[2, documents], which lack a BOS, an EOS. ends: their ids. vocab_size: ids from here on are refused.
    """

    def __init__(
        self,
        folder: str,
        shards: Sequence[tuple[np.ndarray, Numbers]],
        fingerprint: str,
        max_token_id: int,
        lacks: np.ndarray,
        ends: tuple[list[int], list[int]],
        vocab_size: int,
        roles: Sequence[Any] | None = None,
        left_out: dict[str, int] | None = None,
    ) -> None:
        super().__init__(folder, shards, fingerprint, max_token_id, roles, left_out)
        self._lacks, self._ends, self._vocab_size = lacks, ends, vocab_size
        self.lengths += lacks.sum(0)
        self.tokens = int(self.lengths.sum())

    def document(self, index: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Tokens [start, stop) of a document, int32, with the ends that its file lacks."""
        shard, tokens = self._place(index)
        (bos, eos), length = self._lacks[:, index], int(self.lengths[index])
        stop = length if stop is None else min(stop, length)
        ids = self._values[shard][tokens][max(0, start - bos) : max(0, stop - bos)]
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < self._vocab_size:
            raise UserError(
                f"Document {index} of {self.folder} holds ids from {ids.min()} to {ids.max()}, but the tokenizer has "
                f"those below {self._vocab_size}: the files were changed, or made with another tokenizer."
            )
        parts = [ids]
        if bos and start == 0 < stop:
            parts.insert(0, np.array(self._ends[0], np.int32))
        if eos and start < stop == length:
            parts.append(np.array(self._ends[1], np.int32))
        return (
            np.concatenate(parts, dtype=np.int32, casting="unsafe")
            if len(parts) > 1
            else ids.astype(np.int32, copy=False)
        )


def find_token_files(source: Source, data: Data) -> list[Path]:
    """The files of ids that a source names as a file, a glob, a folder or a Megatron dataset without its .bin; sorted.
    [] if it is something else. UserError for files of two kinds, or of several splits."""
    named = f"data source {source.name!r}"
    if is_hub(source) or source.format == "text":
        if source.format not in ("auto", "text"):
            raise UserError(f'{named} has format = "{source.format}", but {source.path} is read as text: leave it out.')
        return []
    path = source_path(source, data)
    if path.is_dir():
        files, other = _in_folder(source, path)
    else:
        files, other = [p for p in matching_files(source, data) if not p.name.endswith(".csv.gz")], ""
        if not files and path.with_name(path.name + ".idx").is_file():
            files = [path.with_name(path.name + ".bin")]
        if source.format == "auto" and (strange := [p for p in files if p.suffix not in (".bin", ".npy", ".idx")]):
            files, other = [p for p in files if p not in strange], strange[0].name
    bins = {p.with_suffix(".bin") for p in files if p.suffix == ".idx"}
    for missing in sorted(p for p in bins if not p.is_file()):
        raise UserError(f"{missing.with_suffix('.idx')} is the index of a Megatron dataset, but {missing} is missing.")
    files = sorted({p.absolute() for p in files if p.suffix != ".idx"} | {p.absolute() for p in bins})
    if files and other and source.format == "auto":
        raise UserError(
            f'{path} of {named} holds {files[0].name} and {other}: set format to "text" for text or another kind of '
            "data, or to the layout of the token ids (megatron, npy, llm.c, raw_uint16, raw_uint32), or name one of "
            "them by a glob."
        )
    for gone in (p for p in files if not p.is_file()):
        raise UserError(f"{gone} is missing: {gone.with_suffix('.idx').name} is the index of it.")
    if not files and source.format != "auto":
        raise UserError(
            f'{named} has format = "{source.format}", but there is no such file in {path}'
            f"{f' (it has {other})' if other else ''}. Correct path, or leave format out."
        )
    return files


def _in_folder(source: Source, path: Path) -> tuple[list[Path], str]:
    """The .bin, .npy and .idx files of a folder, and the name of a file of text or of another kind."""
    below = files_below(path)
    files = [p for p in below if p.suffix in SUFFIXES.get(source.format, (".bin", ".npy", ".idx"))]
    held_out = [p for p in files if HELD_OUT & set(re.split(r"[\W_]+", str(p.relative_to(path).with_suffix(""))))]
    if held_out and len(held_out) < len(files):
        rest = next(p for p in files if p not in held_out)
        raise UserError(
            f"{path} of data source {source.name!r} holds {held_out[0].relative_to(path)}, which looks held out, and "
            f"{rest.relative_to(path)}: name the files to train on, such as path = "
            f'"{source.path}/{rest.relative_to(path)}", or a glob.'
        )
    if any(p.suffix == ".npy" for p in files):
        for lists in (p for p in below if p.name.endswith(".csv.gz")):
            if not (tokens := lists.with_name(lists.name.removesuffix(".csv.gz") + ".npy")).is_file():
                raise UserError(f"{lists} lists the documents of {tokens.name}, which is missing. Copy it again.")
    return files, next((p.name for p in below if TEXT.fullmatch(p.name)), "")


def _check_masks(source: Source, paths: Sequence[Path]) -> None:
    """UserError if files beside the ids say which of them are trained on."""
    for folder in sorted({path.parent for path in paths}):
        masks = (p for p in sorted(folder.iterdir()) if p.suffix in (".npy", ".bin", ".npz") and MASK.search(p.stem))
        if (mask := next(masks, None)) is not None:
            raise UserError(
                f"{mask} beside the token ids of data source {source.name!r} seems to say which of them have a loss, "
                "and is not read: all would. Name the conversations, with messages_field; or move the file away to "
                "train on every token."
            )


def open_token_files(source: Source, paths: list[Path], tokenizer: Tokenizer, data: Data) -> Corpus:
    """The corpus of a source's files, which find_token_files has found; UserError for whatever does not fit."""
    if source.messages_field:
        raise UserError(
            f"Data source {source.name!r} has messages_field = {source.messages_field!r}, but {paths[0]} holds token "
            "ids, and does not say which are the assistant's: leave messages_field out to train on all of them."
        )
    _check_masks(source, paths)
    encoder = make_encoder(source, tokenizer, data)
    guessed = source.format == "auto"
    layout = _guess(source, paths, tokenizer) if guessed else source.format
    try:
        files = [open_tokens(path, layout) for path in paths]
        cut = _cut(source, files, tokenizer)
        indexes = index_files(files, cut, Path(data.cache_folder).expanduser().absolute())
        shards = [(index.offsets, file.map()) for file, index in zip(files, indexes, strict=True)]
    except OSError as error:
        raise UserError(f"The files of data source {source.name!r} cannot be read: {error}.") from error
    _check_ids(paths, indexes, tokenizer)
    searched = [index for file, index in zip(files, indexes, strict=True) if file.beside is None]
    if searched and cut.token is not None:
        _check_cut(source, layout, searched, cut, tokenizer)
    lacks = _lacking(encoder, indexes)
    identity = [layout, [index.digest for index in indexes], encoder.bos, encoder.eos]
    fingerprint = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
    largest = max(index.highest for index in indexes)
    ends = (encoder.bos, encoder.eos)
    corpus = TokenCorpus(source.path, shards, fingerprint, largest, lacks, ends, tokenizer.vocab_size)
    word = "begin" if cut.begins else "end"
    searching = f"documents {word} with the id {cut.token}" if cut.token is not None else "each file is a document"
    logger.info(
        '%s: tokens read in place, format = "%s"%s, files: %d; %s; documents: %d, left out because empty: %d; '
        "tokens: %d; documents that lacked BOS and get it: %d, EOS: %d; %s ids are %d to %d. Such files do not say "
        "which tokenizer made them: only that the ids are ids of %s was checked",
        source.name,
        layout,
        " (found out)" if guessed else "",
        len(files),
        searching if searched else f"documents as the {'.idx' if layout == 'megatron' else '.csv.gz'} files say",
        len(corpus),
        sum(index.empty for index in indexes),
        corpus.tokens,
        *lacks.sum(1),
        "of a sample the" if any(index.sampled for index in indexes) else "the",
        min(index.lowest for index in indexes),
        largest,
        tokenizer.folder,
    )
    return corpus


def _guess(source: Source, paths: list[Path], tokenizer: Tokenizer) -> str:
    layouts = {layout_of(path): path for path in reversed(paths)}
    if len(layouts) > 1:
        (one, first), (two, second), *_ = layouts.items()
        raise UserError(
            f"Data source {source.name!r} has files of several layouts, such as {first} ({one}) and {second} ({two}): "
            "make a source of each, with a glob."
        )
    (layout,) = layouts
    return _guess_width(source, paths, tokenizer) if layout == "raw" else layout


def _guess_width(source: Source, paths: list[Path], tokenizer: Tokenizer) -> str:
    """raw_uint16 or raw_uint32: the one in which the files' beginnings are ids of the tokenizer.

    Ids of 32 bits, read as 16, may all be ids too. But then every second is a high half, below vocab_size / 65,536.
    """
    fits = dict.fromkeys(RAW, True)
    probed = high_halves = 0
    for path in paths[:: -(-len(paths) // PROBED)]:
        with open(path, "rb") as file:
            head = file.read(PROBE)
        size = path.stat().st_size
        for layout, dtype in RAW.items():
            width = np.dtype(dtype).itemsize
            ids = np.frombuffer(head[: len(head) // width * width], dtype)
            fits[layout] &= size % width == 0 and len(ids) > 0 and int(ids.max()) < tokenizer.vocab_size
            if layout == "raw_uint32":
                probed += len(ids)
                high_halves += int(ids[1::2].any())  # of ids of 64 bits, these would be zero
    fits["raw_uint16"] &= tokenizer.vocab_size <= 1 << 16  # else any file would fit
    if fits["raw_uint32"] and probed >= 64 and high_halves:
        return "raw_uint32"  # by chance at most one of 65,536 / (vocab_size / 65,536) pairs of ids would fit
    if fits["raw_uint16"] and not fits["raw_uint32"]:
        return "raw_uint16"
    choices = 'format = "raw_uint16" (nanoGPT, Dolma with a small vocabulary) or "raw_uint32" (Olmo 3)'
    if fits["raw_uint32"]:
        raise UserError(
            f"{paths[0]} of data source {source.name!r} has no header, and its bytes can be read as ids of more than "
            f"one width: set {choices}. Ids of 64 bits are read from NumPy's own .npy."
        )
    raise UserError(
        f"{paths[0]} of data source {source.name!r} has no known header, and neither as uint16 nor as uint32 are its "
        f"numbers ids of the tokenizer in {tokenizer.folder}, which has those below {tokenizer.vocab_size} (16 bits "
        "are tried if they hold all of these). Set model.hf_assets_path to the tokenizer that made it, or set format: "
        'raw_uint16, raw_uint32, or "text" if text beside it is meant.'
    )


def _cut(source: Source, files: Sequence[TokenFile], tokenizer: Tokenizer) -> Cut:
    given = [key for key in ("document_end", "document_start") if getattr(source, key) is not None]
    if len(given) == 2:
        raise UserError(f"Data source {source.name!r} has document_end and document_start: give one of them.")
    if all(file.beside is not None for file in files):
        if given:
            assert files[0].beside is not None
            raise UserError(
                f"Data source {source.name!r} has {given[0]} = {getattr(source, given[0])}, but {files[0].beside} says "
                f"where its documents end: leave {given[0]} out."
            )
        return Cut(None)
    if source.document_start is not None:
        return Cut(source.document_start, begins=True)
    if source.document_end is not None:
        return Cut(source.document_end if source.document_end >= 0 else None)
    begins = files[0].layout == "llm.c"
    ids = (tokenizer.bos_id, tokenizer.eos_id) if begins else (tokenizer.eos_id,)
    token = next((token for token in ids if token is not None), None)
    if token is None:
        raise UserError(
            f"The documents of data source {source.name!r} are cut at the tokenizer's EOS, but the tokenizer in "
            f"{tokenizer.folder} names none: set document_end or document_start to the id that cuts them."
        )
    return Cut(token, begins)


def _check_ids(paths: Sequence[Path], indexes: Sequence[TokenIndex], tokenizer: Tokenizer) -> None:
    for path, index in zip(paths, indexes, strict=True):
        if index.lowest < 0 or index.highest >= tokenizer.vocab_size:
            raise UserError(
                f"{path} holds ids from {index.lowest} to {index.highest}, but the tokenizer in {tokenizer.folder} has "
                f"those from 0 to {tokenizer.vocab_size - 1}: the file was made with another tokenizer, or is in "
                "another format. Set model.hf_assets_path to that tokenizer, or correct format."
            )


def _check_cut(source: Source, layout: str, indexes: Sequence[TokenIndex], cut: Cut, tokenizer: Tokenizer) -> None:
    """UserError if the id cuts nothing, or if the files show that it stands at the documents' other end."""
    choices = (
        "Set document_end, or document_start, to the id that stands between documents; document_end = -1 makes each "
        "file one document."
    )
    if not any(index.found for index in indexes):
        raise UserError(
            f"The id {cut.token}, at which documents are cut, does not occur in the files of data source "
            f'{source.name!r} (format = "{layout}"): its documents are not marked, or another tokenizer made them. '
            f"{choices}"
        )
    if source.document_end is not None or source.document_start is not None:
        return
    # Of shards that are cut anywhere, the first begins with it, or the last ends with it; another may by chance.
    first = [index.first[0] == cut.token for index in indexes]
    last = [index.last[-1] == cut.token for index in indexes]
    if (all(last) and not any(first)) if cut.begins else (any(first) and not any(last)):
        there, key = ("end", "document_end") if cut.begins else ("begin", "document_start")
        raise UserError(
            f"Files of data source {source.name!r} {there} with the id {cut.token}, which is expected at the "
            f"other end of documents: set {key} = {cut.token}. {choices}"
        )


def _lacking(encoder: Encoder, indexes: Sequence[TokenIndex]) -> np.ndarray:
    """bool[2, documents]: which lack the BOS, the EOS that data.add_bos and add_eos ask for."""
    first = np.concatenate([~np.isin(index.first, encoder.bos) for index in indexes])
    last = np.concatenate([~np.isin(index.last, encoder.eos) for index in indexes])
    return np.stack([first & bool(encoder.bos), last & bool(encoder.eos)])
