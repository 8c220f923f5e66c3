"""What [data] can be wrong about by itself. Pure arithmetic on the configuration, without PyTorch.

Ranges of single numbers are checked with those of all tables (config/checks.py); files are checked where they are read.
"""

from __future__ import annotations

import re

from torchtitan.config.data_schema import Data, Source
from torchtitan.config.schema import JobConfig
from torchtitan.datasets.curriculum import schedule_steps, weights_at
from torchtitan.datasets.same_data import BY_LENGTH, reads_threshold
from torchtitan.datasets.synthetic_checks import check_in_stage, check_synthetic
from torchtitan.datasets.where import Where
from torchtitan.tools.errors import UserError
from torchtitan.tools.urls import check_not_collapsed, check_url, is_url, join_url

HUB_PATH = re.compile(r"hub:([\w.-]+(/[\w.-]+)?|[./~].*)")
"""A dataset of the Hugging Face hub, or the folder of a local copy."""

SUM_TOLERANCE = 1.001e-3
"""How far the sum of length_shares may be from 1: three shares of a third can be 0.333."""


def check_data(config: JobConfig) -> None:
    """UserError for the first key of [data] or [[data.sources]] that is missing, or that contradicts another."""
    sources = config.data.sources
    if not sources:
        raise UserError(
            "There is nothing to train on: the configuration has no [[data.sources]]. Write one table per source into "
            'the TOML file: [[data.sources]], name = "books", path = "books/*.jsonl".'
        )
    check_sources(config.data)
    for i, source in enumerate(sources):
        _check_source(source, f'data.sources[{i}] ("{source.name}")', config)
        first = next(j for j, earlier in enumerate(sources) if earlier.name == source.name)
        if first != i:
            raise UserError(
                f"data.sources[{first}] ({sources[first].path}) and data.sources[{i}] ({source.path}) have the same "
                f'name "{source.name}": reports and metrics are kept by name, so give each its own.'
            )
    for step in schedule_steps(config.data) or [0]:
        if not any(weights_at(config.data, step)):
            names = ", ".join(source.name for source in sources)
            when = f" at step {step}" if schedule_steps(config.data) else ""
            raise UserError(f"Every source has weight = 0{when} ({names}): at least one must be above 0.")
    _check_strategy(config)
    _check_positions(config)
    _check_change(config)
    if config.data.decontaminate_tokens != Data().decontaminate_tokens and not config.data.decontaminate:
        raise UserError(
            "data.decontaminate_tokens is read with data.decontaminate alone, which names the texts that are not to be "
            "trained on: name some, or leave it out."
        )


def _check_change(config: JobConfig) -> None:
    step, steps = config.data.changed_at_step, config.training.steps
    if step >= steps:
        raise UserError(
            f"data.changed_at_step = {step}, but training.steps = {steps}: no step is left for the other keys of "
            f"[data]. Name an earlier step, or raise training.steps."
        )
    if step and not config.checkpoint.enable:
        raise UserError(
            f"data.changed_at_step = {step} resumes the checkpoint of that step, but checkpoint.enable = false: set it "
            "to true, or leave changed_at_step out."
        )


def check_sources(data: Data) -> None:
    """UserError for the first source without a name or path, or whose path cannot be a URL or a dataset of the hub."""
    if is_url(data.cache_folder):
        raise UserError("data.cache_folder is a URL: it must be a local folder, which the machines of a job share.")
    if is_url(data.folder):
        check_url(f"{data.folder.rstrip('/')}/name", "data.folder")
    for where, path in [("data.folder", data.folder), *((f"data source {s.name!r}", s.path) for s in data.sources)]:
        check_not_collapsed(path, where)
    for i, source in enumerate(data.sources):
        for key in ("name", "path"):
            if not getattr(source, key).strip() and (key == "name" or source.kind != "synthetic"):
                other = source.path if key == "name" else source.name
                which = f" ({other})" if other.strip() else ""
                raise UserError(
                    f'data.sources[{i}]{which} has no {key}: write {key} = "..." into that [[data.sources]].'
                )
        if url := join_url(data.folder, source.path):
            check_url(url, f"data source {source.name!r}")
        if source.path.startswith(("hub:.", "hub:..")) and is_url(data.folder):
            raise UserError(
                f"The path {source.path!r} of data source {source.name!r} is relative to data.folder, which is a URL: "
                "write it from the root (hub:/...)."
            )
        if source.path.startswith("hub:") and not HUB_PATH.fullmatch(source.path):
            raise UserError(
                f"The path {source.path!r} of data source {source.name!r} names no dataset: write hub:OWNER/NAME, or "
                "hub:./folder for a local copy. Subset, split and revision are the keys hub_subset, hub_split and "
                "hub_revision."
            )


def _check_source(source: Source, where: str, config: JobConfig) -> None:
    if source.where:
        Where(source.where, where)
    if source.on_bad_record == "stop" and source.max_bad_share != Source.max_bad_share:
        raise UserError(
            f'{where}: max_bad_share = {source.max_bad_share} is read with on_bad_record = "skip" only; with '
            '"stop" the run ends at the first bad record. Leave it out, or set on_bad_record.'
        )
    _check_columns(source, where)
    check_synthetic(source, where)
    check_in_stage(source, where, config)
    if source.max_length is not None and source.min_length > source.max_length:
        raise UserError(
            f"{where}: min_length = {source.min_length} is more than max_length = {source.max_length}, so that no "
            "document would be left. Swap them, or drop one."
        )
    if source.chunk_length is not None and source.chunk_length > config.training.seq_len:
        raise UserError(
            f"{where}: chunk_length = {source.chunk_length} is more than training.seq_len = {config.training.seq_len}: "
            "a piece cannot be longer than a row. Leave chunk_length out to cut at the row's length."
        )
    raised = source.upsample is not None or source.upsample_to is not None
    if source.upsample is not None and source.upsample_to is not None:
        raise UserError(f"{where}: upsample and upsample_to say the same in two ways; give one of them.")
    if raised and config.data.strategy in BY_LENGTH:
        raise UserError(
            f'{where}: upsample and upsample_to raise one source, data.strategy = "{config.data.strategy}" raises all; '
            'give one of the two (strategy = "original" leaves it to the sources).'
        )
    _check_lengths(source, where, config.data)
    _check_points(source, where, config.data)
    _check_parts(source, where)
    if source.messages_format != "auto" and not source.messages_field:
        raise UserError(
            f'{where}: messages_format = "{source.messages_format}" is read with messages_field, which is not set: '
            'name the field of the conversation ("instruction" of Alpaca), or leave it out.'
        )
    if source.messages_field and source.long_document in (None, "split"):
        raise UserError(
            f'{where}: a conversation (messages_field = "{source.messages_field}") that is longer than a row cannot be '
            'split, because its second part would answer what it does not see: set long_document = "drop" (left out, '
            'and counted in the report) or "truncate" (its end is cut off).'
        )
    if source.messages_field and config.data.packing == "concat":
        raise UserError(
            f'{where}: data.packing = "concat" cuts conversations (messages_field = "{source.messages_field}") '
            'wherever a row ends: use "best_fit", which leaves them whole.'
        )


def _check_lengths(source: Source, where: str, data: Data) -> None:
    """long_threshold, length_bins and length_shares."""
    bins, raised = list(source.length_bins), source.upsample is not None or source.upsample_to is not None
    if source.long_threshold is not None and not reads_threshold(source, data):
        raise UserError(
            f"{where}: long_threshold = {source.long_threshold} is read by upsample, upsample_to and data.strategy = "
            f'"per_source_upsampling" and "global_upsampling" only: give one of these, or leave long_threshold out.'
        )
    shares = [("length_shares", source.length_shares)] if source.length_shares else []
    in_points = [(f"schedule[{i}].length_shares", p.length_shares) for i, p in enumerate(source.schedule)]
    in_points = [(name, given) for name, given in in_points if given]
    if not bins:
        for name, given in [*shares, *in_points]:
            raise UserError(
                f"{where}: {name} = {list(given)} are the shares of length_bins, which is not given: length_bins = "
                "[8192, 65536] makes three bins."
            )
        return
    if any(low >= high for low, high in zip(bins, bins[1:])):
        raise UserError(f"{where}: length_bins = {bins} must rise: they are the largest lengths of the bins, in order.")
    if raised or data.strategy in BY_LENGTH:
        by = (
            "upsample"
            if source.upsample is not None
            else "upsample_to"
            if raised
            else f'data.strategy = "{data.strategy}"'
        )
        raise UserError(f"{where}: length_bins and {by} both decide the shares of lengths; give one of the two.")
    if shares and in_points:
        raise UserError(
            f"{where}: length_shares stands in the source and in its schedule; leave the first out, or make it a point "
            "of the schedule."
        )
    if not shares and not in_points:
        raise UserError(
            f"{where}: length_bins = {bins} has no length_shares: give the share of the tokens in each of the "
            f"{len(bins) + 1} bins, as length_shares = {_even(len(bins) + 1)}."
        )
    for name, given in [*shares, *in_points]:
        if len(given) != len(bins) + 1:
            raise UserError(
                f"{where}: {name} = {list(given)} has {len(given)} shares, but length_bins = {bins} makes "
                f"{len(bins) + 1} bins: up to each of these lengths, and longer."
            )
        if abs(sum(given) - 1) > SUM_TOLERANCE:
            raise UserError(f"{where}: {name} = {list(given)} must sum to 1, not to {sum(given):g}.")


def _even(count: int) -> list[float]:
    """Shares with a sum of 1, for an example."""
    share = round(1 / count, 2)
    return [*[share] * (count - 1), round(1 - share * (count - 1), 2)]


def _check_points(source: Source, where: str, data: Data) -> None:
    """schedule."""
    steps = [point.step for point in source.schedule]
    if any(first >= second for first, second in zip(steps, steps[1:])):
        raise UserError(
            f"{where}: the points of schedule stand at the steps {', '.join(map(str, steps))}: they must rise, and no "
            "two can be the same (a jump is two points one step apart)."
        )
    for i, point in enumerate(source.schedule):
        if point.weight is None and not point.length_shares:
            raise UserError(f"{where}: schedule[{i}] (step {point.step}) gives neither weight nor length_shares.")
    for key, unset in (("weight", None), ("length_shares", ())):
        given = [point for point in source.schedule if getattr(point, key) != unset]
        if len(given) == 1:
            raise UserError(
                f"{where}: schedule gives {key} at step {given[0].step} only, so that it never moves: give it at "
                f"another step too, or write {key} in the source."
            )
        if given and key == "weight" and source.weight != Source.weight:
            raise UserError(
                f"{where}: weight = {source.weight:g} stands in the source and in its schedule; leave the first out."
            )
        if given and key == "weight" and data.strategy in ("domain_upsampling", "global_upsampling"):
            raise UserError(
                f'{where}: a schedule of weight and data.strategy = "{data.strategy}" both decide the shares of the '
                'sources; give one of the two (strategy = "original" leaves it to the schedule).'
            )


def _check_columns(source: Source, where: str) -> None:
    """UserError if keys that speak of the columns of tokenized rows contradict each other or other keys."""
    columns = {key: getattr(source, key) for key in ("ids_field", "mask_field", "labels_field")}
    named = {key: name for key, name in columns.items() if name}
    if not named and not source.ignore_fields:
        return
    first = next(iter(named), "ignore_fields")
    for name in {*named.values(), *source.ignore_fields}:
        keys = [key for key, other in named.items() if other == name] + ["ignore_fields"] * source.ignore_fields.count(
            name
        )
        if len(keys) > 1:
            raise UserError(f"{where}: {' and '.join(keys)} name the same column, {name!r}: it can have one meaning.")
    for key in ("messages_field", "where"):
        if value := getattr(source, key):
            raise UserError(
                f"{where}: {first} speaks of tokenized rows, and {key} = {value!r} of text that is yet to be "
                "tokenized: leave one of them out."
            )
    if source.format != "auto" or source.path.startswith("hub:"):
        given = f'format = "{source.format}"' if source.format != "auto" else f'path = "{source.path}"'
        raise UserError(
            f"{where}: {first} is read for tokenized Parquet, Arrow and MDS, and {given} says that the source is "
            "something else: leave one of them out. Of a dataset of the hub, download the files and name their folder."
        )


def _check_parts(source: Source, where: str) -> None:
    """UserError for keys of documents of several parts that contradict each other or have no effect."""
    outer, mark, inner = source.text_field.partition("[].")
    listed = bool(mark)
    if "[]" in source.text_field and (not outer or not inner or "[]" in outer + inner):
        raise UserError(
            f"{where}: text_field = {source.text_field!r}: write the list, [] and one field of its objects, as in "
            '"files[].content".'
        )
    for key in ("part_order", "part_header"):
        if getattr(source, key) != getattr(Source(), key) and not (listed or source.group_by):
            raise UserError(
                f"{where}: {key} = {getattr(source, key)!r} is read with group_by, or a text_field such as "
                '"files[].content": leave it out.'
            )
    others = {
        'text_field = "files[].content"': listed,
        "messages_field": source.messages_field,
        'on_bad_record = "skip"': source.on_bad_record == "skip",
        "a path of the hub": source.path.startswith("hub:"),
    }
    for other, given in others.items():
        if source.group_by and given:
            raise UserError(
                f"{where}: group_by = {source.group_by!r} cannot be used with {other}: leave out one of them."
            )
    if listed and source.messages_field:
        raise UserError(f"{where}: text_field is not read with messages_field: leave one of them out.")


def _check_strategy(config: JobConfig) -> None:
    data = config.data
    names = [source.name for source in data.sources]
    unknown = [name for name in data.upsampled_sources if name not in names]
    if unknown:
        raise UserError(
            f'data.upsampled_sources names "{unknown[0]}", which is not a source; the sources are {", ".join(names)}.'
        )
    if data.strategy == "domain_upsampling" and not data.upsampled_sources:
        raise UserError(
            'data.strategy = "domain_upsampling" needs data.upsampled_sources, the names of the sources to raise, such '
            f'as upsampled_sources = ["{names[0]}"].'
        )
    if data.strategy != "domain_upsampling" and data.upsampled_sources:
        raise UserError(
            'data.upsampled_sources is read by strategy = "domain_upsampling" only, but data.strategy = '
            f'"{data.strategy}": change one of the two.'
        )


def _check_positions(config: JobConfig) -> None:
    data, seq_len = config.data, config.training.seq_len
    if data.anchor_attention and data.cross_document_attention:
        raise UserError(
            "data.anchor_attention = true shows documents the first token of their row, and "
            "data.cross_document_attention = true the whole row: leave one of the two out."
        )
    if data.anchor_attention and data.positions not in ("continue", "reset"):
        raise UserError(
            "data.anchor_attention = true puts the first token of a row before all its documents, but data.positions = "
            f'"{data.positions}" draws the positions of each document by itself, perhaps below the anchor\'s. Use '
            '"continue".'
        )
    if data.positions in ("reset", "continue"):
        if data.target_seq_len is not None:
            raise UserError(
                f"data.target_seq_len = {data.target_seq_len} is read by data.positions = pose, longrecipe, cream and "
                f'random, but data.positions = "{data.positions}": leave it out, or choose one of these.'
            )
    elif data.target_seq_len is None or data.target_seq_len < seq_len:
        given = "is not set" if data.target_seq_len is None else f"= {data.target_seq_len}"
        raise UserError(
            f'data.positions = "{data.positions}" trains rows of training.seq_len = {seq_len} for a longer context, '
            f"but data.target_seq_len {given}: it must be at least {seq_len}."
        )
