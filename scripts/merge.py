"""Average checkpoints, or mix two models, parameter by parameter in float32.

    python scripts/merge.py average outputs/run/checkpoint --last 3 --out ./averaged
    python scripts/merge.py average run/checkpoint/step-10000 run/checkpoint/step-11000 --out ./averaged
    python scripts/merge.py mix ./long/checkpoint/step-104 ./Llama-3-8B --weight 0.5 --out ./merged

`average`: the mean of a folder's last checkpoints, or of named ones (Olmo 3 takes three). `mix`: weight times
the first model plus (1 - weight) times the second (LongRecipe, arXiv 2409.00509, merges 0.5 / 0.5 with the base). An
input is a folder of any format that scripts/convert.py reads without --architecture. The result is OUT/step-0, for
checkpoint.initial_load_path or scripts/convert.py, in the first dtype. At most three tensors are in memory.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields, replace
from pathlib import Path

import torch

from torchtitan.components.manifest import complete_steps
from torchtitan.extensions.convert.conversion import (
    known_ends,
    manifest_entries,
    open_any,
    tokenizer_of,
    with_progress,
)
from torchtitan.extensions.convert.weights import DTYPES, Weights, write_checkpoint
from torchtitan.tools.errors import UserError


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    average = commands.add_parser("average", help="the mean of checkpoints")
    average.add_argument("inputs", type=Path, nargs="+", help="step-N folders, or one folder of them")
    average.add_argument(
        "--last", type=int, default=3, help="how many of the newest checkpoints of one folder to average"
    )
    mix = commands.add_parser("mix", help="a weighted mean of two models")
    mix.add_argument(
        "inputs", type=Path, nargs=2, help="step-N or Hugging Face folders; the result has the first one's RoPE"
    )
    mix.add_argument("--weight", type=float, default=0.5, help="of the first model")
    for command in (average, mix):
        command.add_argument("--out", type=Path, required=True, help="the folder in which step-0 is made")
        command.add_argument("--dtype", choices=tuple(DTYPES), help="of the result (default: the first input's)")
        command.add_argument("--assets", type=Path, help="folder with the tokenizer, if the first input has none")
    options = parser.parse_args(argv)
    try:
        if options.command == "average":
            folders = last_of(options.inputs[0], options.last) if len(options.inputs) == 1 else options.inputs
            print("average of " + ", ".join(map(str, folders)))
            models, shares = [open_any(folder) for folder in folders], [1 / len(folders)] * len(folders)
            models.reverse()  # the newest's RoPE, length and tokens
        else:
            if not 0 <= options.weight <= 1:
                raise UserError(f"--weight {options.weight} must be from 0 to 1: it is the share of the first model.")
            models, shares = [open_any(folder) for folder in options.inputs], [options.weight, 1 - options.weight]
        merged = merge(models, shares).cast(options.dtype)
        manifest = {**manifest_entries(models[0], options.assets or models[0].where), "stage": options.command}
        manifest["ends_of_turn"] = sorted({token for model in models for token in known_ends(model)})
        print(write_checkpoint(with_progress(merged), options.out, manifest))
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def last_of(folder: Path, count: int) -> list[Path]:
    """The newest `count` checkpoints of a folder, oldest first; UserError if there are fewer."""
    steps = complete_steps(folder)
    if count < 2 or len(steps) < count:
        raise UserError(
            f"--last {count} of {folder} cannot be averaged: it holds {len(steps)} complete checkpoints "
            f"({', '.join(f'step-{step}' for step in steps) or 'none'}). Name at least two."
        )
    return [folder / f"step-{step}" for step in steps[-count:]]


def merge(models: list[Weights], shares: list[float]) -> Weights:
    """The sum of share * parameter, in float32, then in the first model's dtype; UserError if architectures differ."""
    first = models[0]
    for other in models[1:]:
        unlike = [f.name for f in fields(first.args) if getattr(first.args, f.name) != getattr(other.args, f.name)]
        if differences := [name for name in unlike if name != "rope"]:
            named = (f"{n} {getattr(first.args, n)} and {getattr(other.args, n)}" for n in differences)
            raise UserError(f"{first.where} and {other.where} are not the same architecture: {', '.join(named)}.")
        if "rope" in unlike:
            print(f"their RoPE differs; the result has that of {first.where}: {first.args.rope}")
        tokenizers = [tokenizer_of(model) for model in (first, other)]
        if all(tokenizers) and tokenizers[0] != tokenizers[1]:
            print(
                f"warning: {first.where} and {other.where} have different tokenizers (the bytes of tokenizer.json or "
                "tokenizer.model, BOS or EOS): do their ids stand for the same tokens?",
                file=sys.stderr,
            )

    def read(name: str) -> torch.Tensor:
        # as differences from the first model: values that all models share come out unchanged
        start = first.read(name).float()
        result = start.clone()
        for share, model in zip(shares[1:], models[1:], strict=True):
            result.add_(model.read(name).float() - start, alpha=share)
        return result.to(first.dtypes[name])

    return replace(first, read=read)


if __name__ == "__main__":
    sys.exit(main())
