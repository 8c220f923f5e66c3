"""What the scripts of evaluation have in common: the command line, where results go, tables of text.

Imports no PyTorch, which takes seconds: a mistake should be reported at once.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from torchtitan.components.manifest import MANIFEST, complete_steps, read_manifest, results_file
from torchtitan.config import JobConfig, load_config
from torchtitan.config.checks import check_ranges, resolve_shard_degree
from torchtitan.config.data_schema import Data
from torchtitan.config.manager import config_file, flag_name
from torchtitan.config.schema import Rope
from torchtitan.datasets.tokenizer import load_tokenizer
from torchtitan.models.hf.folder import in_hub_cache, is_hugging_face, weight_files
from torchtitan.models.rope_checks import check_rope
from torchtitan.tools.errors import UserError


def parser_of(description: str | None) -> argparse.ArgumentParser:
    """A parser of the options that say which weights are evaluated, and in how many processes; every other --table.key
    is left to load_config."""
    parser = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="every other --table.key is one of a stage's TOML (./run_train.sh --help)",
        allow_abbrev=False,
    )
    parser.add_argument("--model", type=Path, help="Hugging Face folder or checkpoint, instead of the stage's own")
    parser.add_argument("--step", type=int, help="the stage's checkpoint of this step, not its newest")
    parser.add_argument("--tokenizer", type=Path, help="folder of the tokenizer, if it is not the model's or the run's")
    parser.add_argument("--processes", type=int, default=1, help="how many processes to start here (1)")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    return parser


def check_given(options: argparse.Namespace, *names: str) -> None:
    """UserError for the first of these options that was not given."""
    for name in names:
        if getattr(options, name) is None:
            raise UserError(f"--{name} is not given; see --help.")


def check_at_least(options: argparse.Namespace, **minimum: int) -> None:
    """UserError for the first option with a number, or one of several numbers, below its minimum; None passes."""
    for name, least in minimum.items():
        value = getattr(options, name)
        for number in value if isinstance(value, list) else [value]:
            if number is not None and number < least:
                raise UserError(f"--{name} = {number} must be at least {least}.")


def check_model_folder(folder: Path) -> None:
    """UserError unless the folder is a Hugging Face folder or a checkpoint's step-N folder."""
    if (folder / MANIFEST).is_file():
        return
    if is_hugging_face(folder):
        weight_files(folder)  # an adapter has no config.json: say first what it is
    if (folder / "config.json").is_file():
        return
    steps = [f"step-{step}" for step in complete_steps(folder)[-3:]] if folder.is_dir() else []
    instead = f"; it holds {', '.join(steps)}: name one of these" if steps else ""
    what = "has neither config.json nor manifest.json" if folder.is_dir() else "is not a folder"
    raise UserError(
        f"--model {folder} {what}{instead}. It should be a Hugging Face folder, or a checkpoint of a run "
        "(outputs/checkpoint/step-1000)." + in_hub_cache(folder)
    )


def resolve_request(options: argparse.Namespace, overrides: list[str], suffix: str = "") -> tuple[JobConfig, Path]:
    """The configuration, with training.dtype set to the dtype of matrix products, and the folder of the weights.

    Its [rope] is that of TOML and command line if the command line sets a key of it, otherwise the default: a stage's
    checkpoint has the RoPE of the TOML already, and other weights have their options. options.of_stage is set: whether
    options.out was not given and is now the stage's own results_file(). UserError for options that cannot work.
    """
    config = load_config(overrides)
    rescale = any(flag_name(arg).startswith("rope.") for arg in overrides)
    in_file, config = config.rope, config if rescale else replace(config, rope=Rope())
    check_at_least(options, processes=1)
    if options.model is None and config_file(overrides) is None:
        raise UserError("Nothing to evaluate: give --model FOLDER, or --job.config_file STAGE.toml.")
    if options.model is not None and options.step is not None:
        raise UserError("--step is for a stage's own checkpoints; --model names a checkpoint's folder (.../step-1000).")
    check_ranges(config)
    check_rope(config)
    resolve_shard_degree(config, int(os.environ.get("WORLD_SIZE", options.processes)))
    folder, options.of_stage = options.model, False
    if folder is None:
        checkpoints = Path(config.job.dump_folder) / config.checkpoint.folder
        steps = complete_steps(checkpoints)
        if options.step is not None and options.step not in steps:
            raise UserError(f"--step = {options.step}: {checkpoints} has {', '.join(map(str, steps)) or 'none'}.")
        if not steps:
            raise UserError(f"{checkpoints} has no complete checkpoint: train the stage first, or give --model.")
        step = steps[-1] if options.step is None else options.step
        folder = checkpoints / f"step-{step}"
        if options.out is None:
            options.out, options.of_stage = results_file(config, step, suffix), True
    check_model_folder(folder)
    flags = {flag_name(arg) for arg in overrides}
    says_bos = config_file(overrides) is not None or bool(flags & {"data.add_bos", "data.no_add_bos"})
    if not says_bos:
        config = replace(config, data=replace(config.data, add_bos=begins_with_bos(folder, options.tokenizer)))
    first = os.environ.get("RANK", "0") == "0" and (options.processes == 1 or "RANK" in os.environ)
    if not rescale and in_file != Rope() and not (folder / MANIFEST).is_file() and first:
        print(f"note: {folder} keeps its own RoPE; the stage's [rope] is not applied to it.", file=sys.stderr)
    training = replace(config.training, dtype=config.training.mixed_precision_param)
    return replace(config, training=training), folder


def begins_with_bos(folder: Path, tokenizer_folder: Path | None = None) -> bool:
    """Whether texts that a model is asked begin with BOS: as a checkpoint's stage was trained; for a Hugging Face
    folder, and a checkpoint that was converted from one, as the tokenizer does by itself."""
    manifest = read_manifest(folder) if (folder / MANIFEST).is_file() else {}
    trained = manifest.get("begins_with_bos")
    if trained is None:
        trained = manifest.get("config", {}).get("data", {}).get("add_bos")
    if trained is None and manifest and tokenizer_folder is None:
        return Data().add_bos  # no other file says more
    return load_tokenizer(tokenizer_folder or folder).adds_bos if trained is None else trained


def text_table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows as lines: columns as wide as their longest cell, flush right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
