"""Stand-ins of random tokens for the sources of a stage, for scripts/build_stand_in.py and scripts/try_recipe.py."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import numpy as np

from torchtitan.config import JobConfig
from torchtitan.config.data_schema import Data, Source
from torchtitan.datasets.corpus import ASSISTANT
from torchtitan.datasets.eligible import long_threshold
from torchtitan.extensions.ingest.source_files import is_hub, source_path
from torchtitan.tools.errors import UserError
from torchtitan.tools.urls import join_url

VOCABULARY = 256
SHORTEST = 64
LONGEST = 1 << 18  # unless min_length is larger
LONG_SHARE = 1 / 3
FEWEST = 4
MARK = "STAND-IN.txt"
"""Beside the tokens; scripts/plan.py looks for it."""


def build(config: JobConfig, tokens: int, seed: int = 0) -> None:
    """Write a stand-in of about `tokens` tokens for each source, and print a line about it; UserError if that fails."""
    for folder, source in folders_of(config).items():
        documents = make_documents(source, config.data, config.training.seq_len, tokens, seed)
        write(folder, documents, with_roles=bool(source.messages_field))
        sizes = [len(document) for document in documents]
        print(f"{source.name}: {len(sizes)} documents of {min(sizes):,} to {max(sizes):,} tokens in {folder}")


def folders_of(config: JobConfig) -> dict[Path, Source]:
    """The folder of each stand-in, and its source; UserError if a stand-in cannot be written there."""
    folder = Path(config.data.folder).expanduser().resolve()
    folders: dict[Path, Source] = {}
    if not config.data.sources:
        raise UserError("The configuration has no [[data.sources]]: name a stage's TOML with --job.config_file.")
    for number, source in enumerate(config.data.sources):
        if source.kind == "synthetic":
            continue  # is made
        named = f'Data source "{source.name}"'
        elsewhere = f"Give it one for this trial, here and to scripts/plan.py: --data.sources.{number}.path NAME."
        if is_hub(source) or join_url(config.data.folder, source.path) or any(c in source.path for c in "*?["):
            raise UserError(f'{named} has path = "{source.path}", which names no folder. {elsewhere}')
        path = source_path(source, config.data).resolve()
        if folder not in path.parents:
            raise UserError(
                f'{named} has path = "{source.path}", which does not lie in data.folder = {folder}, and a stand-in is '
                f"not put among other data. {elsewhere}"
            )
        folders.setdefault(path, source)
    for path in folders:
        for taken in (path, *path.parents):
            if taken == path and taken.exists() or taken.exists() and not taken.is_dir():
                raise UserError(
                    f"{taken} exists, and a stand-in never overwrites anything. Name another data.folder, or delete it "
                    "if you know what it is."
                )
    return folders


def check_where(source: Source, path: Path, metadata: dict[str, Any]) -> None:
    """UserError if `where` would choose from tokens, which have no fields, or on_bad_record speaks of their records:
    only a stand-in needs none."""
    if source.on_bad_record == "skip" and not (path / MARK).is_file():
        raise UserError(
            f'Data source {source.name!r} has on_bad_record = "skip", which is about records of text, but {path} holds '
            "tokens: leave it out, or name the text."
        )
    if source.group_by and metadata.get("group_by") != source.group_by and not (path / MARK).is_file():
        raise UserError(
            f"Data source {source.name!r} has group_by = {source.group_by!r}, but {path} is tokenized: leave it out, "
            "or name the text."
        )
    if source.where and metadata.get("where") != source.where.strip() and not (path / MARK).is_file():
        raise UserError(
            f"Data source {source.name!r} has where = {source.where!r}, but {path} is tokenized, and its documents "
            "have no fields: leave where out, or name the text."
        )


def make_documents(source: Source, data: Data, seq_len: int, tokens: int, seed: int) -> list[np.ndarray]:
    """Documents uint8[n] of `tokens` tokens in all, or a little more; at least FEWEST are long, or of each bin."""
    # Seeded by the path, so that a source is the same beside other sources.
    random = np.random.default_rng([seed, zlib.crc32(source.path.encode())])
    shortest = max(source.min_length, SHORTEST)
    longest = max(min(2 * seq_len, LONGEST), 2 * shortest)
    if source.max_length is not None:
        longest = min(longest, source.max_length)
    shortest = min(shortest, longest)
    ranges = [(shortest, longest, tokens)]
    threshold = long_threshold(source, data)
    if source.length_bins:
        shortest = max(source.min_length, min(SHORTEST, source.length_bins[0]))
        edges = [shortest - 1, *source.length_bins, max(longest, 2 * source.length_bins[-1])]
        ranges = [(low + 1, high, tokens // len(edges)) for low, high in zip(edges, edges[1:])]
        if source.max_length is not None:
            ranges = [(low, min(high, source.max_length), n) for low, high, n in ranges if low <= source.max_length]
        ranges = [(low, high, n) for low, high, n in ranges if low <= high]
    elif shortest < threshold < longest:
        long = int(tokens * LONG_SHARE)
        ranges = [(shortest, threshold, tokens - long), (threshold + 1, longest, long)]
    elif source.min_length:
        ranges = [(shortest, min(4 * shortest, longest), tokens)]
    lengths = [n for low, high, wanted in ranges for n in draw_lengths(low, high, wanted, random)]
    random.shuffle(lengths)
    return [random.integers(0, VOCABULARY, n, np.uint8) for n in lengths]


def draw_lengths(low: int, high: int, tokens: int, random: np.random.Generator) -> list[int]:
    """Lengths, log-uniform in [low, high], until they sum to `tokens`; at least FEWEST."""
    lengths: list[int] = []
    while len(lengths) < FEWEST or sum(lengths) < tokens:
        lengths.append(min(high, int(np.exp(random.uniform(np.log(low), np.log(high + 1))))))
    return lengths


def write(folder: Path, documents: list[np.ndarray], with_roles: bool) -> None:
    """One document per row, as datasets' save_to_disk writes it. In conversations all but the first quarter is the
    assistant's."""
    from datasets import Dataset, Features, Sequence, Value, disable_progress_bars

    disable_progress_bars()
    columns = Features({"input_ids": Sequence(Value("uint8"))})
    rows = {"input_ids": documents}
    if with_roles:
        columns["roles"] = Sequence(Value("int8"))
        rows["roles"] = [np.where(np.arange(len(d)) < len(d) // 4, 0, ASSISTANT).astype(np.int8) for d in documents]
    try:
        folder.mkdir(parents=True)
        (folder / MARK).write_text("Random tokens, written by scripts/build_stand_in.py. Not for training.\n")
        Dataset.from_dict(rows, columns).save_to_disk(folder)
    except OSError as error:
        raise UserError(f"The stand-in {folder} cannot be written: {error}.") from error
