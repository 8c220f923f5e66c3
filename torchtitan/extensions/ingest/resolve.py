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
from torchtitan.extensions.ingest.mapped_tables import open_tables
from torchtitan.extensions.ingest.remote import local_source
from torchtitan.extensions.ingest.source_files import source_path
from torchtitan.extensions.ingest.stand_in import check_where
from torchtitan.extensions.ingest.token_files import find_token_files, open_token_files
from torchtitan.extensions.ingest.token_tables import find_tables, refuse_column_keys, warn_of_chunks
from torchtitan.extensions.ingest.tokenize import tokenize_source
from torchtitan.tools.errors import UserError
from torchtitan.tools.folders import read_json

logger = logging.getLogger(__name__)


def resolve_source(source: Source, tokenizer: Tokenizer, data: Data) -> Corpus:
    """The corpus of a source: its tokens, or what tokenize_source makes of its text in data.cache_folder."""
    if source.kind == "synthetic":
        made = tokenize_source(source, tokenizer, data, may_be_less=False)
        return open_corpus(made, tokenizer.fingerprint, check_text=False)
    given, local = source, local_source(source, tokenizer, data)
    if isinstance(local, Path):
        return open_corpus(local, tokenizer.fingerprint, check_text=False)
    source, path = local, source_path(local, data)
    if (corpus := open_in_place(source, tokenizer, data)) is not None:
        return corpus
    if tables := find_tables(source, data):
        corpus = open_corpus(tokenize_source(given, tokenizer, data), tokenizer.fingerprint, check_text=False)
        logger.info(
            "%s: tokenized rows of %d files, copied into %s because %s cannot be mapped; %s; documents: %d, tokens: %d",
            source.name,
            len(tables.files),
            corpus.folder,
            "they" if len(tables.files) > 1 else "it",
            tables.columns.describe(),
            len(corpus),
            corpus.tokens,
        )
        warn_of_chunks(source, tables.columns, corpus)
        return corpus
    if not is_tokenized_source(source, data):
        # The folder was just found by the content of its text, which is not checked a second time.
        made = tokenize_source(given, tokenizer, data, may_be_less=False)
        return open_corpus(made, tokenizer.fingerprint, check_text=False)
    refuse_column_keys(source, f"{path} was written by scripts/tokenize_corpus.py, or for a trial")
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
    return corpus


def open_in_place(source: Source, tokenizer: Tokenizer, data: Data) -> Corpus | None:
    """The corpus of a source that is read where it lies, ids or tokenized Arrow of others; None if it is something
    else, or must be tokenized or copied first."""
    path = source_path(source, data)
    if files := token_files_of(source, data):
        check_where(source, path, {})
        refuse_column_keys(source, f"{files[0]} holds ids alone")
        return open_token_files(source, files, tokenizer, data)
    if (tables := find_tables(source, data)) is None:
        return None
    check_where(source, path, {})
    if source.messages_field and tables.columns.loss is None:
        raise UserError(
            f"Data source {source.name!r} has messages_field = {source.messages_field!r}, but {tables.files[0]} was "
            "tokenized as text: none of its columns says which tokens are the assistant's. Name the conversations as "
            "the source, or leave messages_field out to train on every token."
        )
    if (corpus := open_tables(source, tables, tokenizer, data)) is not None:
        warn_of_chunks(source, tables.columns, corpus)
    return corpus


def _is_mds(path: Path) -> bool:
    from torchtitan.extensions.ingest.mds import find_mds

    return bool(find_mds(path))


def token_files_of(source: Source, data: Data) -> list[Path]:
    """The files of token ids that a source is read from in place; [] if it is something else. UserError if a key that
    speaks of such files is given, and the source is something else."""
    if source.kind == "synthetic":
        return []
    path = source_path(source, data)
    tokenized = is_tokenized_source(source, data)
    if tokenized and source.format != "auto":
        raise UserError(
            f'Data source {source.name!r} has format = "{source.format}", but {path} is a tokenized folder of Arrow '
            "files: leave format out."
        )
    files = [] if tokenized else find_token_files(source, data)
    given = [key for key in ("document_end", "document_start") if getattr(source, key) is not None]
    if given and not files and not find_tables(source, data) and (tokenized or not _is_mds(path)):
        raise UserError(
            f"Data source {source.name!r} has {given[0]} = {getattr(source, given[0])}, which is read for token ids of "
            f"others (.bin, .npy, Parquet, Arrow, MDS) alone, but {source.path} is something else: leave it out, or "
            "correct path."
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
