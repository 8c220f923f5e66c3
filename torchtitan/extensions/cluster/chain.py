"""Run the stages of a recipe in order.

    python -m torchtitan.extensions.cluster.chain NPROC <arguments of torchtitan.train>

run_train.sh does so for --stage.run_chain. Stages that have ended are skipped: the same command, started again, goes on
in the stage where it stopped, from its last checkpoint.

    python -m torchtitan.extensions.cluster.chain --has-ended <arguments of torchtitan.train>

asks whether a stage is done: exit code 0 if it has ended and its gates hold, NOT_ENDED, GATE_NOT_HELD or, for a mistake
in the configuration, FAILED. PyTorch is not imported, so the question is cheap.
"""

from __future__ import annotations

import sys
from pathlib import Path

from torchtitan.components.changes import changed_since
from torchtitan.components.lineage import check_previous
from torchtitan.components.manifest import has_ended, newest_manifest
from torchtitan.config import JobConfig, load_config
from torchtitan.extensions.cluster.check_config import check_tables
from torchtitan.extensions.cluster.gates import gate_failure
from torchtitan.extensions.cluster.launch import launch
from torchtitan.extensions.cluster.stages import chain
from torchtitan.tools.errors import FAILED, GATE_NOT_HELD, NOT_ENDED, STOPPED, GateError, UserError


def run_chain(args: list[str], nproc: int) -> int:
    """Train the stages that have not ended, in order; the exit code of the first that fails, or 0."""
    stages = chain(args)
    for stage in stages:
        check_tables(stage.config, nproc)
        if not stage.config.checkpoint.enable:
            raise UserError(f"stage {stage.config.stage.name}: a chain needs checkpoints (checkpoint.enable = true).")
    names = " -> ".join(stage.config.stage.name for stage in stages)
    _say(names)
    for stage in stages:
        config = stage.config
        if config.checkpoint.load_step >= 0 or not has_ended(config):  # training goes back to load_step
            _say(f"stage {config.stage.name}, into {config.job.dump_folder}")
            code = launch([sys.executable, "-m", "torchtitan.train", *stage.arguments], nproc)
            if code == STOPPED:  # the trainers have saved, and have said so
                _say(f"stopped in stage {config.stage.name}; start again to go on")
                return code
            if code:
                _say(f"stage {config.stage.name} failed; the chain stops")
                return code
        else:
            _check_unchanged(config)
            _say(f"stage {config.stage.name} has ended")
        _check_gates(config)
    return 0


def _check_unchanged(config: JobConfig) -> None:
    """UserError if a stage that has ended has other data, another architecture or another RoPE now, or if the previous
    stage has been trained again. Other keys (learning rate, where it started from) are not looked at."""
    _, manifest = newest_manifest(config)
    assert manifest  # it has ended
    check_previous(config, manifest)
    if changes := changed_since(manifest, config):
        raise UserError(
            f"Stage {config.stage.name} has ended, but with another configuration than it has now: "
            f"{'; '.join(changes)}. Undo that, choose another job.dump_folder, or delete {config.job.dump_folder} to "
            "train the stage again."
        )


def ended(args: list[str], unchanged: bool = True) -> int:
    """0 if the stage that args describe has ended and its gates hold, NOT_ENDED if it has not ended.

    unchanged: UserError if its configuration, or the previous stage, has changed since.
    """
    config = load_config(args)
    if not config.checkpoint.enable:
        raise UserError("checkpoint.enable = false: whether a stage has ended is read from its checkpoints.")
    if not has_ended(config):
        return NOT_ENDED
    if unchanged:
        _check_unchanged(config)
    _check_gates(config)
    return 0


def _say(message: str) -> None:
    print(f"chain: {message}", file=sys.stderr, flush=True)


def _check_gates(config: JobConfig) -> None:
    if failure := gate_failure(config, Path(config.job.dump_folder)):
        raise GateError(f"A gate of stage {config.stage.name} does not hold: {failure}. The chain stops.")


def main(args: list[str]) -> int:
    if not args or not (args[0] == "--has-ended" or args[0].isdigit()):
        print(__doc__)
        return FAILED
    try:
        if args[:1] == ["--has-ended"]:
            goes_back = load_config(args[1:]).checkpoint.load_step >= 0
            return NOT_ENDED if goes_back else ended(args[1:])
        return run_chain(args[1:], int(args[0]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return GATE_NOT_HELD if isinstance(error, GateError) else FAILED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
