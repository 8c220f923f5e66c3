"""Answers questions of the scripts in multinode/ about a configuration, without PyTorch: a login node may lack it.

    python -m torchtitan.extensions.cluster.slurm QUESTION ...

    stages [--evaluate] <arguments of torchtitan.train>                     the stages of a recipe
    start NODES PER_NODE <arguments of torchtitan.train>                    can this stage start?
    newest <arguments of torchtitan.train>                                  the step of its newest checkpoint
    verdict CODE ASKED NODE_CODES NODES PER_NODE <...>                      how did a start of this stage end?
    evaluation NODES PER_NODE <arguments of scripts/evaluate.py>            can it be evaluated?

`stages` prints shell code, one line per stage, in their order:
    stage NAME DUMP_FOLDER HAS_ENDED SBATCH_OPTIONS... -- ARGUMENTS...
(HAS_ENDED is no for all stages after one that has not ended), and with --evaluate, after each of these lines,
    evaluation NAME DUMP_FOLDER HAS_ENDED_AND_IS_EVALUATED SBATCH_OPTIONS... -- ARGUMENTS...
`verdict` prints the exit code for the job and a word: ended, failed, saved, asked (to stop, before it could save) or
lost.
`start` prints the dump folder and the arguments to train with, as shell code, and exits with 0. It exits with ENDED or
GATE_NOT_HELD if the stage has ended already, and with FAILED and the reason if the stage cannot be trained.
`evaluation` prints the same.
"""

from __future__ import annotations

import contextlib
import io
import shlex
import sys
from pathlib import Path

from torchtitan.components.manifest import complete_steps, results_file
from torchtitan.config import JobConfig, load_config
from torchtitan.config.checks import check_ranges, resolve_shard_degree
from torchtitan.config.manager import config_file, flag_name
from torchtitan.config.toml_file import load_tables
from torchtitan.extensions.cluster.chain import ended
from torchtitan.extensions.cluster.check_config import check_stage, check_tables
from torchtitan.extensions.cluster.requeue import with_load_step
from torchtitan.extensions.cluster.stages import chain, without_flags
from torchtitan.extensions.evaluation.checks import check_asked, check_evaluation, is_answered
from torchtitan.tools.errors import FAILED, GATE_NOT_HELD, LOST_A_RANK, STOPPED, GateError, UserError
from torchtitan.tools.folders import read_json

ENDED = 10
"""Exit code of `start`: the stage has ended, and well."""

TERMINATED = 128 + 15
"""Exit code of a node whose trainers had nothing to save when SIGTERM came."""

DEGREES = ("data_parallel_replicate_degree", "data_parallel_shard_degree")

EVALUATE_FLAGS = ("model", "step", "tokenizer", "processes", "label", "out")
"""The flags of scripts/evaluate.py that are not keys of a stage."""


def stages(args: list[str], evaluates: bool = False) -> int:
    """Print the stages of a recipe; UserError for a mistake whatever the number of processes."""
    leaves_evaluation = not any(flag_name(arg) == "evaluation.at_end" for arg in args)
    at_end = ["--evaluation.at_end", "false"] if leaves_evaluation else []
    all_ended = True
    for stage in chain(args):
        config = stage.config
        check_ranges(config)
        check_stage(config)
        if not config.checkpoint.enable:
            raise UserError(f"stage {config.stage.name}: Slurm's jobs need checkpoints (checkpoint.enable = true).")
        try:
            has_ended = config.checkpoint.load_step < 0 and ended(stage.arguments) == 0  # it goes back to load_step
        except GateError:
            has_ended = False  # its job reports the gate, and stops the jobs after it
        # after a stage that has not ended: the job itself asks again, since what the stage starts from may change
        all_ended = all_ended and has_ended

        def line(what: str, done: bool, more: list[str], config: JobConfig = config) -> str:
            folder, options = str(Path(config.job.dump_folder).absolute()), [*config.stage.sbatch, "--", *more]
            return shlex.join([what, config.stage.name, folder, "yes" if done else "no", *options])

        if not evaluates:
            print(line("stage", all_ended, stage.arguments))
            continue
        try:
            check_asked(config)
            check_evaluation(config)
            evaluated = all_ended and is_evaluated(config)
        except UserError as error:
            raise UserError(f"--evaluate, stage {config.stage.name}: {error}") from None
        print(line("stage", all_ended, stage.arguments + at_end))
        print(line("evaluation", evaluated, stage.arguments))
    return 0


def is_evaluated(config: JobConfig) -> bool:
    """Whether the newest checkpoint has results; UserError if they do not answer what [evaluation] asks now, since
    scripts/evaluate.py does not overwrite such results."""
    steps = complete_steps(Path(config.job.dump_folder) / config.checkpoint.folder)
    if not steps or not (file := results_file(config, steps[-1])).is_file():
        return False
    result = read_json(file, "Delete it, and the stage is evaluated again.")
    if "asked" in result and not is_answered(config, result):
        raise UserError(f"{file} answers other questions than [evaluation] asks now: delete it, and these are asked.")
    return "asked" in result  # results of older versions do not say, and are overwritten


def start(nodes: int, per_node: int, args: list[str], unchanged: bool = True) -> int:
    """Print how to train this stage on nodes * per_node processes, or raise a UserError that says why it cannot be.

    unchanged: see chain.ended; False after a start, which has already gone back to checkpoint.load_step.
    """
    args = args + replicas(args, nodes, per_node)
    config = load_config(args)
    check_tables(config, nodes * per_node)
    goes_back = unchanged and with_load_step(config).checkpoint.load_step >= 0
    if not goes_back and ended(args, unchanged) == 0:
        return ENDED
    return _print_settings(config, args)


def evaluation(nodes: int, per_node: int, args: list[str]) -> int:
    """Print how to evaluate on nodes * per_node processes, with training's layout; UserError if they cannot."""
    keys = without_flags(args, *EVALUATE_FLAGS)
    more = replicas(keys, nodes, per_node)
    config = load_config(keys + more)
    check_asked(config)
    check_ranges(config)
    check_evaluation(config)
    resolve_shard_degree(config, nodes * per_node)
    return _print_settings(config, args + more)


def _print_settings(config: JobConfig, args: list[str]) -> int:
    print(f"DUMP_FOLDER={shlex.quote(str(Path(config.job.dump_folder).absolute()))}")
    print(f"ARGUMENTS=({shlex.join(args)})")
    return 0


def replicas(args: list[str], nodes: int, per_node: int) -> list[str]:
    """HSDP: arguments for one copy of the model per node, unless the TOML file or the command line set a degree.

    data_parallel_shard_degree is then what context and tensor parallelism leave of a node. If these two span nodes,
    nothing is added: the parameters are sharded over the ranks of a row, whatever nodes these are on.
    """
    path = config_file(args)
    table = load_tables(Path(path)).get("parallelism", {}) if path else {}
    flags = {flag_name(arg) for arg in args}
    p = load_config(args).parallelism
    ranks_per_row = p.context_parallel_degree * p.tensor_parallel_degree
    if nodes == 1 or per_node % ranks_per_row or any(k in table or f"parallelism.{k}" in flags for k in DEGREES):
        return []
    print(
        f"HSDP: a copy of the model on each of the {nodes} nodes, sharded over its {per_node} processes. If it is "
        "too large, --parallelism.data_parallel_replicate_degree 1 shards it over all nodes.",
        file=sys.stderr,
    )
    return ["--parallelism.data_parallel_replicate_degree", str(nodes)]


def verdict(code: int, node_codes: list[int], asked: bool, stage: int) -> tuple[int, str]:
    """The job's exit code and how this start ended, from each node's own exit code rather than from srun's.

    stage: what `start` now answers for the stage. If a node has failed, its code counts and not those of the others,
    which Slurm has ended with SIGTERM: by itself SIGTERM is a request to stop.
    """
    if code == 0 and stage == ENDED:
        return 0, "ended"
    if stage == GATE_NOT_HELD:
        return GATE_NOT_HELD, "failed"
    code = code or LOST_A_RANK  # srun returns 0 for a node that was lost, too
    failed = [c for c in node_codes if 0 < c < 128 and c not in (STOPPED, LOST_A_RANK)]
    if failed:
        return failed[0], "failed"
    if STOPPED in node_codes or code == STOPPED:
        return STOPPED, "saved" if node_codes else "asked"
    lost = any(c == LOST_A_RANK or (c >= 128 and c != TERMINATED) for c in node_codes)
    if asked or (TERMINATED in node_codes and not lost):
        return STOPPED, "asked"
    if LOST_A_RANK in node_codes:
        code = LOST_A_RANK  # not the code of a node that Slurm has ended
    return code, "lost" if code == LOST_A_RANK or code >= 128 else "failed"


def main(argv: list[str]) -> int:
    """Answer the question argv[0]; the exit code. A UserError is printed as a paragraph, with FAILED."""
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__)
        return FAILED
    verb, args = argv[0], without_flags(argv[1:], "stage.run_chain")
    try:
        if verb == "stages":
            evaluates = args[:1] == ["--evaluate"]
            return stages(args[evaluates:], evaluates)
        if verb == "newest":
            config = load_config(args)
            print(*complete_steps(Path(config.job.dump_folder) / config.checkpoint.folder)[-1:])
            return 0
        if verb == "verdict":
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                # "judge": the stage that this job has trained has ended, even if its file has changed since
                stage = main(["judge", *args[3:]])
            print(*verdict(int(args[0]), [int(c) for c in args[2].split()], bool(args[1]), stage))
            return 0
        if verb == "evaluation":
            return evaluation(int(args[0]), int(args[1]), args[2:])
        return start(int(args[0]), int(args[1]), args[2:], unchanged=verb != "judge")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return GATE_NOT_HELD if isinstance(error, GateError) else FAILED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
