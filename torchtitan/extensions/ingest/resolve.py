"""A source of [[data.sources]] -> its corpus: a tokenized folder or files of ids as they are, anything else tokenized
first."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from torchtitan.config.data_schema import Data, Source
from torchtitan.datasets.corpus import CORPUS_FILE, MAKE_AGAIN, Corpus, open_corpus
from torchtitan.datasets.tokenizer import Tokenizer
from torchtitan.extensions.ingest.find_text import is_tokenized_source
from torchtitan.extensions.ingest.remote import local_source
from torchtitan.extensions.ingest.source_files import source_path
from torchtitan.extensions.ingest.stand_in import check_where
from torchtitan.extensions.ingest.token_files import find_token_files, open_token_files
from torchtitan.extensions.ingest.tokenize import tokenize_source
from torchtitan.tools.errors import UserError
from torchtitan.tools.folders import read_json

logger = logging.getLogger(__name__)

IDS_LOOKED_AT = 1 << 30
"""Of a folder of Arrow files that someone else wrote, at every start."""


def resolve_source(source: Source, tokenizer: Tokenizer, data: Data) -> Corpus:
    """The corpus of a source: its tokens, or what tokenize_source makes of its text in data.cache_folder."""
    given, local = source, local_source(source, tokenizer, data)
    if isinstance(local, Path):
        return open_corpus(local, tokenizer.fingerprint, check_text=False)
    source, path = local, source_path(local, data)
    if files := token_files_of(source, data):
        check_where(source, path, {})
        return open_token_files(source, files, tokenizer, data)
    if not is_tokenized_source(source, data):
        # The folder was just found by the content of its text, which is not checked a second time.
        return open_corpus(tokenize_source(given, tokenizer, data), tokenizer.fingerprint, check_text=False)
    metadata = read_json(path / CORPUS_FILE, MAKE_AGAIN) if (path / CORPUS_FILE).is_file() else {}
    check_where(source, path, metadata)
    for key, wanted in (("add_bos", data.add_bos), ("add_eos", data.add_eos)):
        if metadata.get(key, wanted) != wanted:
            has, asked = str(metadata[key]).lower(), str(wanted).lower()
            raise UserError(
                f"data.{key} = {asked}, but {path} of data source {source.name!r} was tokenized with {key} = {has}: "
                f"set data.{key} = {has}, or tokenize the text again."
            )
    corpus = open_corpus(path, tokenizer.fingerprint)
    _check_chat(source, path, metadata, corpus, tokenizer)
    if corpus.max_token_id is None:
        _check_ids(source, path, corpus, tokenizer)
    return corpus


def _check_ids(source: Source, path: Path, corpus: Corpus, tokenizer: Tokenizer) -> None:
    """UserError unless a folder that someone else wrote holds ids of the tokenizer; a huge one is sampled."""
    lowest, highest, sampled = corpus.id_range(IDS_LOOKED_AT)
    if lowest < 0 or highest >= tokenizer.vocab_size:
        raise UserError(
            f"{path} of data source {source.name!r} holds ids from {lowest} to {highest}, but the tokenizer in "
            f"{tokenizer.folder} has those from 0 to {tokenizer.vocab_size - 1}: set model.hf_assets_path to the "
            "tokenizer that made it."
        )
    corpus.max_token_id = highest
    if sampled:
        logger.info(
            "%s: of %d tokens some %d were compared with the tokenizer's ids", source.name, corpus.tokens, IDS_LOOKED_AT
        )


def token_files_of(source: Source, data: Data) -> list[Path]:
    """The files of token ids that a source is read from in place; [] if it is something else. UserError if a key that
    speaks of such files is given, and the source is something else."""
    path = source_path(source, data)
    tokenized = is_tokenized_source(source, data)
    if tokenized and source.format != "auto":
        raise UserError(
            f'Data source {source.name!r} has format = "{source.format}", but {path} is a tokenized folder of Arrow '
            "files: leave format out."
        )
    files = [] if tokenized else find_token_files(source, data)
    for key in ("document_end", "document_start"):
        if not files and getattr(source, key) is not None:
            raise UserError(
                f"Data source {source.name!r} has {key} = {getattr(source, key)}, which is read for files of token ids "
                f"(.bin, .npy) alone, but {source.path} is something else: leave it out, or correct path."
            )
    return files


def _check_chat(source: Source, path: Path, metadata: dict[str, Any], corpus: Corpus, tokenizer: Tokenizer) -> None:
    """UserError unless a tokenized folder agrees with messages_field and with the model's present chat template."""
    if source.messages_field and not corpus.has_roles:
        raise UserError(
            f"Data source {source.name!r} has messages_field = {source.messages_field!r}, but {path} was tokenized as "
            "text: it has no column roles. Name the conversations as the source, or leave messages_field out to train "
            "on every token."
        )
    made_by = metadata.get("chat_template")
    if made_by and not source.messages_field:
        raise UserError(
            f"{path} of data source {source.name!r} holds conversations: set messages_field = "
            f'"{metadata["messages_field"]}", which is the field they were read from.'
        )
    if made_by:
        from torchtitan.extensions.ingest.chat_template import load_chat_template

        now = load_chat_template(tokenizer)
        if made_by != now.fingerprint:
            raise UserError(
                f"{path} was made with another chat template ({made_by}) than {now.path} has ({now.fingerprint}): name "
                "the conversations as the source to have them tokenized again, or put the template back."
            )
