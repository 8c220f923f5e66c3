"""Is this configuration right? `python -m torchtitan.extensions.cluster.check_config WORLD_SIZE <as torchtitan.train>`

run_train.sh asks before it starts anything: a mistake is then reported once and at once, rather than by every process
after it has imported PyTorch.
"""

from __future__ import annotations

import sys

from torchtitan.config.checks import check_config
from torchtitan.config.manager import load_config
from torchtitan.extensions.cluster.stages import chain
from torchtitan.extensions.evaluation.checks import check_evaluation
from torchtitan.models.rope_checks import check_rope
from torchtitan.tools.errors import UserError


def main(args: list[str]) -> int:
    try:
        config = load_config(args[1:])
        # a mistake in the last stage is reported before the first one is paid for
        stages = [stage.config for stage in chain(args[1:])] if config.stage.run_chain else [config]
        for stage in stages:
            check_config(stage, int(args[0]))
            check_evaluation(stage)
            check_rope(stage)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
