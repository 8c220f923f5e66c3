"""Write a small stand-in for every source of a stage, so that the stage can be planned and tried without its data.

    python scripts/build_stand_in.py --job.config_file train_configs/prolong_8b/64k.toml --data.folder /tmp/standin
    python scripts/plan.py --job.config_file train_configs/prolong_8b/64k.toml --data.folder /tmp/standin

For looking at plans and for smoke tests, never for training: the tokens are random bytes (ids 0 to 255, so that every
tokenizer and model has them) and the lengths are made up. A source with a min_length gets documents of one to four
times that; of any other a third of the tokens is in documents above data.long_threshold. Shares, cutting and packing of
the plan are then real, epochs and losses are not. Each source becomes a tokenized folder at its path in data.folder,
half a megabyte or a few documents, the same for the same --seed. Where something exists nothing is written at all.
"""

from __future__ import annotations

import argparse
import sys

from torchtitan.config import load_config
from torchtitan.extensions.ingest.stand_in import build
from torchtitan.tools.errors import UserError


def main(args: list[str]) -> int:
    """Exit code 1, and one line, for what the user has wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="every other --table.key is an override of the TOML's, as with run_train.sh",
        allow_abbrev=False,
    )
    parser.add_argument("--tokens", type=int, default=500_000, help="of a source, or more where its documents are long")
    parser.add_argument("--seed", type=int, default=0, help="of lengths and tokens")
    own, others = parser.parse_known_args(args)
    try:
        if own.tokens < 1 or own.seed < 0:
            raise UserError(f"--tokens {own.tokens} must be at least 1, and --seed {own.seed} at least 0.")
        build(load_config(others), own.tokens, own.seed)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
