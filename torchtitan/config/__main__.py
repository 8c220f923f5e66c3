"""Is this configuration right? `python -m torchtitan.config WORLD_SIZE <arguments of torchtitan.train>`

run_train.sh asks before it starts anything: a mistake is then told once and at once, rather than by every process after
it has imported torch.
"""

from __future__ import annotations

import sys

from torchtitan.config.checks import check_config
from torchtitan.config.manager import load_config
from torchtitan.tools.errors import UserError


def main(args: list[str]) -> int:
    try:
        check_config(load_config(args[1:]), int(args[0]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
