"""Is this configuration right? `python -m torchtitan.extensions.cluster.check_config WORLD_SIZE <as torchtitan.train>`

run_train.sh asks before it starts anything: a mistake is then reported once and immediately, not by every process after
it has imported PyTorch. Every command that checks a configuration uses the list of checks in check_tables().
"""

from __future__ import annotations

import sys

from torchtitan.config import JobConfig, load_config
from torchtitan.config.checks import check_config, check_start_keys
from torchtitan.datasets.data_checks import check_data
from torchtitan.extensions.cluster.gates import check_gates
from torchtitan.extensions.cluster.stages import chain
from torchtitan.extensions.evaluation.checks import check_evaluation
from torchtitan.models.rope_checks import check_rope
from torchtitan.tools.errors import UserError


def check_tables(config: JobConfig, world_size: int) -> None:
    """UserError for any mistake that shows in the configuration alone; reads no file and imports no PyTorch."""
    check_config(config, world_size)
    check_data(config)
    check_rope(config)
    check_evaluation(config)
    check_stage(config)


def check_stage(config: JobConfig) -> None:
    """UserError for a mistake in [stage], whatever the number of processes."""
    check_start_keys(config)
    check_gates(config)
    for option in config.stage.sbatch:
        if not option.startswith("-") or option == "--":
            raise UserError(
                f'stage.sbatch has "{option}", which sbatch would take for the script: write an option and its value '
                'as one string, such as "--nodes=8".'
            )


def main(args: list[str]) -> int:
    """The exit code: 0, or 1 after printing a mistake as one paragraph."""
    if not args or not args[0].isdigit():
        print(__doc__)
        return 1
    try:
        config = load_config(args[1:])
        # a mistake in the last stage is reported before the first stage is trained
        stages = [stage.config for stage in chain(args[1:])] if config.stage.run_chain else [config]
        for stage in stages:
            check_tables(stage, int(args[0]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
