"""Tokenizes the sources of a stage ahead of training, or one source that is named by its path.

Training does the same by itself; this does it on machines without GPUs, on several at once if you like:
python scripts/tokenize_corpus.py --config-file stage.toml --shard-index 3 --num-shards 8     (one of 8 shards)
python scripts/tokenize_corpus.py --path "books/*.jsonl" --assets ./assets/tokenizer --out-name books
A run that was stopped continues where it was. Shards may run in any order, at once, and twice.
--check reads and checks everything, but tokenizes and writes nothing; exit code 2: tokenizing would end with an error.
"""
# Not called tokenize.py: Python puts scripts/ first on sys.path and that name would hide the standard library's module.

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal

import tyro

from torchtitan.config import JobConfig, load_config
from torchtitan.config.checks import check_ranges
from torchtitan.config.data_schema import Data, Source
from torchtitan.config.schema import Training
from torchtitan.datasets.corpus import open_corpus
from torchtitan.datasets.data_checks import check_sources
from torchtitan.datasets.tokenizer import Tokenizer, load_tokenizer
from torchtitan.extensions.cluster.check_config import check_tables
from torchtitan.extensions.ingest.check import check_source
from torchtitan.extensions.ingest.find_text import is_tokenized_source
from torchtitan.extensions.ingest.remote import local_source
from torchtitan.extensions.ingest.resolve import open_in_place, resolve_source
from torchtitan.extensions.ingest.token_tables import find_tables
from torchtitan.extensions.ingest.tokenize import tokenize_shard
from torchtitan.tools.errors import UserError


@dataclass(frozen=True)
class Single:
    """One source without a TOML file; every key is one of the TOML's."""

    path: str | None = None
    """File, folder or glob of text (docs/sources.md), folder of MDS shards, a URL of these, or hub:OWNER/NAME."""

    out_name: str = "text"
    """Beginning of the folder's name; a key of content and tokenizer follows."""

    assets: str = "./assets/tokenizer"
    """Folder with the tokenizer (model.hf_assets_path in the TOML)."""

    cache_folder: str = "./data_cache"
    """Folder that the corpus is written to (data.cache_folder in the TOML)."""

    format: Literal["auto", "text"] = "auto"
    """text: leave out files of token ids beside the text, which are read in place otherwise."""

    ids_field: str = ""
    """Column of tokenized rows (Parquet, Arrow, MDS) that holds the token ids; unset: found out."""

    mask_field: str = ""
    """Column of such rows that is 1 for tokens to train on."""

    labels_field: str = ""
    """Or: column of such rows with labels."""

    text_field: str = "text"
    """Field of a jsonl, parquet or hub record that holds the text."""

    group_by: str = ""
    """Field whose equal values make one document of several records."""

    part_order: str = "path"
    """Field that these, or the files of "files[].content", are sorted by."""

    part_header: str = ""
    """Text before each of them."""

    where: str = ""
    """Only records for which this expression holds (docs/sources.md)."""

    messages_field: str = ""
    """Or: field that holds a conversation, for the chat template of the tokenizer's folder."""

    messages_format: Literal["auto", "openai", "sharegpt", "alpaca"] = "auto"
    """What that field holds; auto: found out."""

    on_bad_record: Literal["stop", "skip"] = "stop"
    """skip: leave out records that cannot be read, and count them."""

    max_bad_share: float = Source.max_bad_share
    """With --on-bad-record skip: the largest share of them."""

    hub_subset: str = ""
    """Configuration of a hub dataset."""

    hub_split: str = "train"
    """Split of a hub dataset."""

    hub_revision: str = "main"
    """Branch, tag or commit of a hub dataset."""

    max_documents: int | None = None
    """Of a hub dataset: download no more than this many documents."""

    bos: bool = True
    """Begin every document with BOS (data.add_bos in the TOML)."""

    eos: bool = True
    """End every document with EOS (data.add_eos in the TOML)."""


@dataclass(frozen=True)
class Arguments:
    """Sources -> tokenized corpus folders, cached by content and tokenizer. Give --config-file or --path."""

    single: tyro.conf.OmitArgPrefixes[Single]

    config_file: str | None = None
    """TOML file of a stage: its sources, tokenizer, BOS/EOS policy and cache folder are used. With keys of [training],
    it is checked first, as training does."""

    source: str | None = None
    """Name of the only source of config_file to tokenize; unset: all of them."""

    check: bool = False
    """Read all records, and tokenize and write nothing: what is there, and what is wrong with it."""

    shard_index: int = 0
    """Which of the num_shards parts of the work to do, counted from 0."""

    num_shards: int = 1
    """Into how many parts the work is cut; each is a command on some machine, all with the same cache folder."""

    num_proc: int | None = None
    """Processes of this command; unset: one per core that it may use."""


def sources_of(arguments: Arguments) -> tuple[list[Source], Data, str]:
    """The sources to tokenize, their [data] table, and the folder of their tokenizer."""
    one = arguments.single
    if (arguments.config_file is None) == (one.path is None):
        raise UserError("Give either --config-file, a stage's TOML, or --path, a single source.")
    if one.path is not None:
        if arguments.source is not None:
            raise UserError("--source names a source of --config-file, which is not given.")
        source = Source(
            name=one.out_name,
            path=one.path,
            format=one.format,
            ids_field=one.ids_field,
            mask_field=one.mask_field,
            labels_field=one.labels_field,
            text_field=one.text_field,
            group_by=one.group_by,
            part_order=one.part_order,
            part_header=one.part_header,
            where=one.where,
            messages_field=one.messages_field,
            messages_format=one.messages_format,
            on_bad_record=one.on_bad_record,
            max_bad_share=one.max_bad_share,
            hub_subset=one.hub_subset,
            hub_split=one.hub_split,
            hub_revision=one.hub_revision,
            max_documents=one.max_documents,
        )
        return [source], Data(add_bos=one.bos, add_eos=one.eos, cache_folder=one.cache_folder), one.assets
    given = [f"--{f.name.replace('_', '-')}" for f in fields(one) if getattr(one, f.name) != f.default]
    if given:
        raise UserError(f"{', '.join(given)} cannot be given with --config-file, whose own keys say the same.")
    config = load_config(["--job.config_file", str(arguments.config_file)])
    names = [source.name for source in config.data.sources]
    if arguments.source is not None and arguments.source not in names:
        raise UserError(
            f"--source {arguments.source}: {arguments.config_file} has no such source; it has "
            f"{', '.join(names) or 'none'}."
        )
    if config.training != Training():  # a whole stage, which training must take too; else data alone
        p = config.parallelism
        others = p.data_parallel_replicate_degree * p.context_parallel_degree * p.tensor_parallel_degree
        check_tables(config, others * max(1, p.data_parallel_shard_degree))
    wanted = [source for source in config.data.sources if arguments.source in (None, source.name)]
    return wanted, config.data, config.model.hf_assets_path


def print_check(given: Source, tokenizer: Tokenizer, data: Data, num_proc: int | None) -> bool:
    """Print what is found in a source; whether it can be tokenized, or read."""
    lines, wrong = [], ""
    try:
        source = local_source(given, tokenizer, data)
        if isinstance(source, Path):
            lines = [f"its text is not here; {source} was made of it"]
        elif (corpus := open_in_place(source, tokenizer, data)) is not None:
            lines = [f"tokens that are read in place: {len(corpus):,} documents, {corpus.tokens:,} tokens"]
        elif is_tokenized_source(source, data) and not find_tables(source, data):
            corpus = resolve_source(source, tokenizer, data)
            lines = [f"tokenized already: {len(corpus):,} documents, {corpus.tokens:,} tokens"]
        else:
            lines, wrong = check_source(source, tokenizer, data, num_proc)
    except UserError as error:
        wrong = str(error)
    print("\n".join([f"{given.name}: {given.path}", *(f"    {line}" for line in lines)]))
    print(f"    tokenizing would end with an error: {wrong}" if wrong else "    can be read")
    return not wrong


def main() -> None:
    """Tokenize; exit code 1 and one paragraph for a mistake of the user."""
    arguments = tyro.cli(Arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("torchtitan").setLevel(logging.INFO)
    try:
        sources, data, assets = sources_of(arguments)
        check_ranges(JobConfig(data=replace(data, sources=tuple(sources))))
        check_sources(replace(data, sources=tuple(sources)))
        tokenizer = load_tokenizer(assets)
        if arguments.check:
            bad = [source for source in sources if not print_check(source, tokenizer, data, arguments.num_proc)]
            sys.exit(2 if bad else 0)
        for given in sources:
            source = local_source(given, tokenizer, data)
            if isinstance(source, Path):
                print(f"{given.name}: {given.path} is tokenized already, in {source}")
                continue
            corpus = open_in_place(source, tokenizer, data)  # finds the ends of documents, and keeps them
            if corpus is not None:
                print(f"{source.name}: {given.path} is read in place: {len(corpus):,} documents")
                continue
            if is_tokenized_source(source, data) and not find_tables(source, data):
                print(f"{source.name}: {given.path} is tokenized already")
                continue
            folder = tokenize_shard(
                given, tokenizer, data, arguments.shard_index, arguments.num_shards, arguments.num_proc
            )
            if folder is not None:
                corpus = open_corpus(folder)
                print(f"{source.name}: {len(corpus):,} documents, {corpus.tokens:,} tokens in {folder}")
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
