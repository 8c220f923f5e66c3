"""Tokenizes text (.jsonl, .parquet, .txt) into a corpus folder that a [[data.sources]] path can name.

Training does the same on its own when a source's path is text; this is for doing it ahead, on a machine without GPUs.
Example: python scripts/tokenize_corpus.py --path "books/*.jsonl" --assets ./assets/tokenizer --out-name books
"""
# Not called tokenize.py: Python puts scripts/ first on sys.path and that name would hide the standard library's module.

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass

import tyro

from torchtitan.components.tokenizer import load_tokenizer
from torchtitan.config.job_config import Data, Source
from torchtitan.datasets.corpus import open_corpus
from torchtitan.datasets.tokenize import tokenize_source
from torchtitan.tools.errors import UserError


@dataclass(frozen=True)
class Arguments:
    """Text -> tokenized corpus folder, cached by content and tokenizer."""

    path: str
    """File, folder or glob of .jsonl, .parquet or .txt text."""

    out_name: str = "text"
    """Beginning of the folder's name; a key of content and tokenizer follows."""

    assets: str = "./assets/tokenizer"
    """Folder with the tokenizer (model.hf_assets_path in the TOML)."""

    cache_folder: str = "./data_cache"
    """Folder that the corpus is written to (data.cache_folder in the TOML)."""

    text_field: str = "text"
    """Field of a jsonl or parquet record that holds the text."""

    bos: bool = True
    """Begin every document with BOS (data.add_bos in the TOML)."""

    eos: bool = True
    """End every document with EOS (data.add_eos in the TOML)."""

    num_proc: int | None = None
    """Processes; unset: the cores this process may use."""


def main() -> None:
    arguments = tyro.cli(Arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    source = Source(name=arguments.out_name, path=arguments.path, text_field=arguments.text_field)
    data = Data(add_bos=arguments.bos, add_eos=arguments.eos, cache_folder=arguments.cache_folder)
    try:
        folder = tokenize_source(source, load_tokenizer(arguments.assets), data, arguments.num_proc)
        corpus = open_corpus(folder)
    except UserError as error:
        sys.exit(f"error: {error}")
    print(f"{len(corpus):,} documents, {corpus.tokens:,} tokens in {folder}")


if __name__ == "__main__":
    main()
