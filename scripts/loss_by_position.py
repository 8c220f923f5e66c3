"""How well a model predicts as its context grows: loss by position on long documents, under any RoPE.

    python scripts/loss_by_position.py --model FOLDER --text book.txt --length 16384 --out plain.json --plot plain.png
    python scripts/loss_by_position.py --model FOLDER --text book.txt --length 16384 --label "YaRN 4" --out yarn.json \
        --rope.type yarn --rope.factor 4 --rope.original_max_position_embeddings 8192
    python scripts/loss_by_position.py --draw plain.json yarn.json --plot both.png

FOLDER is a Hugging Face folder or a checkpoint (outputs/checkpoint/step-1000). Every document that is long enough is
read from its beginning, alone; the result is the mean negative log-likelihood by ranges of positions. --windows W ...
measures the same tokens with a context of W / 2 to W - 1 tokens, --reset W ... with a context that begins anew every W
tokens: the difference is what the longer context is worth. --rope.KEY is as in a stage's [rope] table (./run_train.sh
--help) and applied to the model's own RoPE; theta = auto is raised for --length.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from pathlib import Path

from torchtitan.extensions.evaluation.position_curves import (
    add_curve_arguments,
    curves_table,
    measure,
    read_result,
    rope_table,
)
from torchtitan.tools.errors import UserError
from torchtitan.tools.folders import check_can_be_written, write_text


def main(args: list[str]) -> int:
    """0; 1 and one line for a mistake."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add_curve_arguments(parser)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--plot", type=Path, help="PNG file to draw")
    parser.add_argument("--title", default="", help="title of the picture")
    parser.add_argument("--draw", type=Path, nargs="+", metavar="JSON", help="measure nothing, draw these")
    options, others = parser.parse_known_args(args)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        for path in filter(None, (options.out, options.plot)):
            check_can_be_written(path)
        if options.draw:
            results = [read_result(path) for path in options.draw]
            if options.plot is None:
                raise UserError("--draw needs --plot FILE.png, the picture to write.")
        else:
            results = [measure(options, rope_table(others))]
            print(curves_table(results[0]))
            if options.out:
                write_text(options.out, json.dumps(results[0], indent=1) + "\n")
        if options.plot:
            from torchtitan.extensions.evaluation.plots import draw_positions

            draw_positions(results, options.plot, options.title)
            print(options.plot)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
