"""Held-out text: text files or a tokenized corpus -> the first tokens of documents that are long enough."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from torchtitan.config.data_schema import Data, Source
from torchtitan.datasets.corpus import open_corpus
from torchtitan.datasets.tokenizer import Tokenizer
from torchtitan.extensions.ingest.convert_tables import TokenReader, parts_of, read_part
from torchtitan.extensions.ingest.find_text import find_text_files, is_tokenized_source
from torchtitan.extensions.ingest.text import read_documents, spans_of
from torchtitan.extensions.ingest.token_tables import find_tables
from torchtitan.tools.errors import UserError

SPAN = 64 << 20  # bytes of a .jsonl file that are read at once


def long_documents(
    paths: Sequence[Path],
    tokenizer: Tokenizer,
    tokens: int,
    most: int,
    text_field: str = "text",
    add_bos: bool = False,
    pieces: int = 1,
    option: str = "--text",
) -> list[torch.Tensor]:
    """The first `tokens` tokens, int64, of the first `most` documents that have as many; UserError if none has.

    paths: .txt, .jsonl and .parquet files, folders of these, and tokenized folders (whose BOS stays as it is). pieces:
    how many consecutive pieces of `tokens` tokens one document gives at most. option: what the user calls paths, for
    messages.
    """
    if add_bos and tokenizer.bos_id is None:
        raise UserError(f"--add_bos, but the tokenizer in {tokenizer.folder} has no BOS token.")
    bos = [tokenizer.bos_id] if add_bos and tokenizer.bos_id is not None else []
    long_enough: list[torch.Tensor] = []
    seen = longest = 0
    for path in paths:
        for ids in _documents(path, tokenizer, bos, text_field):
            seen, longest = seen + 1, max(longest, len(ids))
            long_enough += [piece for piece in ids.split(tokens)[:pieces] if len(piece) == tokens]
            if len(long_enough) >= most:
                return long_enough[:most]
    if not long_enough:
        raise UserError(
            f"None of the {seen} documents of {option} has {tokens:,} tokens; the longest has {longest:,}. Give longer "
            "text, or a smaller length."
        )
    return long_enough


def check_vocabulary(largest: int, vocab_size: int, tokenizer: Tokenizer) -> None:
    """UserError if the tokenizer gives an id, `largest`, that the model lacks: it would be an index error later."""
    if largest >= vocab_size:
        raise UserError(
            f"The tokenizer in {tokenizer.folder} gives the id {largest}, but the model has {vocab_size} ids: they do "
            "not belong together. Name the right tokenizer's folder with --tokenizer."
        )


def _documents(path: Path, tokenizer: Tokenizer, bos: list[int], text_field: str) -> Iterator[torch.Tensor]:
    source = Source(name="--text", path=str(path.absolute()), text_field=text_field)
    if tables := find_tables(source, Data()):  # of others; padding and cuts are theirs, a loss is on every token
        reader = TokenReader(tables.columns, tokenizer, [], [])
        for part in (part for file in tables.files for part in parts_of(file)):
            for document in read_part(part, reader):
                yield torch.from_numpy(np.atleast_2d(document)[0].astype("int64"))
        return
    if is_tokenized_source(source, Data()):
        corpus = open_corpus(path, tokenizer.fingerprint)
        for i in range(len(corpus)):
            yield torch.from_numpy(corpus.document(i).astype("int64"))
        return
    for file in find_text_files(source, Data()):
        for span in spans_of(str(file), SPAN):
            for text in read_documents(span, text_field):
                yield torch.tensor(bos + tokenizer.encode(text), dtype=torch.int64)
