"""Convert a model's weights between our checkpoints, Hugging Face, torchtitan's DCP and Meta's consolidated.*.pth.

    python scripts/convert.py outputs/demo/checkpoint/step-300 ./export --to huggingface --dtype bfloat16 --assets ./hf
    python scripts/convert.py ./Llama-3.1-8B ./start --to checkpoint
    python scripts/convert.py ./torchtitan/step-1000 ./hf --to huggingface --architecture llama3_8b --assets ./hf_assets

The files of the input tell its format. One tensor at a time is in memory, but `--to meta` needs the whole
model. The output is written as OUT.partial and renamed, so it is complete or absent. `--to checkpoint` makes
OUT/step-0, the folder for checkpoint.initial_load_path (the model only: the optimizer starts anew).
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from torchtitan.extensions.convert.conversion import manifest_entries, open_any, with_progress
from torchtitan.extensions.convert.export import SHARD_BYTES, write_hugging_face
from torchtitan.extensions.convert.torchtitan_and_meta import write_meta, write_torchtitan
from torchtitan.extensions.convert.weights import DTYPES, Weights, write_checkpoint
from torchtitan.models.rope_config import describe_rope
from torchtitan.tools.errors import UserError

NO_ROPE = "note: this format does not store the RoPE ({}): set it where you load the model"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "input", type=Path, help="a step-N folder, or a folder with *.safetensors or consolidated.*.pth"
    )
    parser.add_argument("output", type=Path, help="the folder to make")
    parser.add_argument("--to", required=True, choices=("checkpoint", "huggingface", "torchtitan", "meta"))
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="of the output (default: the input's)")
    parser.add_argument("--assets", type=Path, help="folder with the tokenizer and config.json (default: the input's)")
    parser.add_argument("--architecture", help="a model.flavor or a folder with config.json, if the input has none")
    parser.add_argument(
        "--max-position-embeddings",
        type=int,
        help="the length in tokens that the model was trained for, if the input does not say",
    )
    parser.add_argument(
        "--shard-gb", type=float, default=SHARD_BYTES / 1e9, help="size of the largest safetensors file (default: 5)"
    )
    options = parser.parse_args(argv)
    try:
        convert(options)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def assets_of(weights: Weights) -> Path | None:
    """The folder with the tokenizer that a checkpoint's run names, if it exists."""
    named = weights.manifest.get("config", {}).get("model", {}).get("hf_assets_path")
    return Path(named) if named and Path(named).is_dir() else None


def convert(options: argparse.Namespace) -> None:
    if options.assets and not options.assets.is_dir():
        raise UserError(f"--assets {options.assets} is not a folder.")
    weights = open_any(options.input, options.architecture)
    if options.max_position_embeddings is not None:
        known = weights.args.rope.max_position_embeddings or weights.manifest.get("seq_len")
        if options.max_position_embeddings < 1:
            raise UserError(f"--max-position-embeddings = {options.max_position_embeddings} must be at least 1.")
        if known not in (None, options.max_position_embeddings):
            print(f"note: --max-position-embeddings replaces {known} tokens, the trained length that the input says")
        rope = replace(weights.args.rope, max_position_embeddings=options.max_position_embeddings)
        manifest = weights.manifest | {"seq_len": options.max_position_embeddings}
        weights = replace(weights, args=replace(weights.args, rope=rope), manifest=manifest)
    weights = with_progress(weights.cast(options.dtype))
    assets = options.assets or assets_of(weights) or options.input
    if options.to == "huggingface":
        for note in write_hugging_face(weights, options.output, assets, shard_bytes=int(options.shard_gb * 1e9)):
            print(f"note: {note}")
    elif options.to == "checkpoint":
        print(f"{write_checkpoint(weights, options.output, manifest_entries(weights, assets))}")
    elif options.to == "torchtitan":
        write_torchtitan(weights, options.output)
        print(NO_ROPE.format(describe_rope(weights.args.rope)))
    else:
        write_meta(weights, options.output)
        print(NO_ROPE.format(describe_rope(weights.args.rope)))


if __name__ == "__main__":
    sys.exit(main())
