"""The stages of a recipe in order, found from the last: its TOML file, the file in its stage.after, and so on."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from torchtitan.config.manager import check_circle, config_file, flag_name, flag_value, load_config
from torchtitan.config.schema import JobConfig
from torchtitan.tools.errors import UserError

OF_ONE_STAGE = ("stage.run_chain", "stage.after", "stage.name", "stage.after_dump_folder", "job.dump_folder")
"""Keys that cannot have the same value in every stage of a chain."""


@dataclass(frozen=True)
class ChainedStage:
    """One stage of a chain: the command line that trains it alone, and its configuration."""

    arguments: list[str]
    config: JobConfig


def chain(args: list[str]) -> list[ChainedStage]:
    """The stages up to the one in `args` (a command line with --job.config_file), in their order.

    Overrides hold for every stage, except that each stage gets a folder of its name below --job.dump_folder. UserError
    for a file that does not exist, stages that form a circle, and two stages that would write to the same folder.
    """
    path = config_file(args)
    if path is None:
        raise UserError("--stage.run_chain needs --job.config_file: the last stage's TOML file.")
    files, after = [Path(path)], load_config(without_flags(args, "stage.run_chain")).stage.after
    while after:
        check_circle(after, tuple(str(file.resolve()) for file in reversed(files)))
        if not Path(after).is_file():
            raise UserError(f"{files[-1]} has stage.after = {after}, which does not exist.")
        files.append(Path(after))
        after = load_config(["--job.config_file", after]).stage.after
    of_one = ("stage.name", "the name"), ("stage.after_dump_folder", "the folder before it")
    for key, what in (*of_one, ("data.changed_at_step", "a step")):
        if len(files) > 1 and flag_value(args, key) is not None:
            raise UserError(
                f"--{key} is {what} of one stage, and {path} is the last of a chain of {len(files)}, which would not "
                "go by it: leave it out, or train that stage alone. --job.dump_folder gives each stage of a chain a "
                "folder of its own."
            )
    shared = without_flags(args, "job.config_file", *OF_ONE_STAGE)
    top, first_after = flag_value(args, "job.dump_folder"), flag_value(args, "stage.after")
    stages: list[ChainedStage] = []
    for file in reversed(files):
        arguments = ["--job.config_file", str(file), *shared]
        if not stages and len(files) > 1:  # the first stage has no data to go on with, which is refused of a lone one
            arguments = without_flags(arguments, "stage.continue_data", "stage.no_continue_data")
        if file == files[0] and first_after is not None:
            arguments += ["--stage.after", first_after]
        if top is not None:
            arguments += ["--job.dump_folder", os.path.join(top, load_config(arguments).stage.name)]
        if stages:
            arguments += ["--stage.after_dump_folder", stages[-1].config.job.dump_folder]
        config = load_config(arguments)
        for other in stages:
            if Path(other.config.job.dump_folder).resolve() == Path(config.job.dump_folder).resolve():
                raise UserError(
                    f"The stages {other.config.stage.name} and {config.stage.name} would both write to "
                    f"{config.job.dump_folder}: give each its own job.dump_folder (or stage.name)."
                )
        stages.append(ChainedStage(arguments, config))
    return stages


def without_flags(args: list[str], *names: str) -> list[str]:
    """`args` without the flags `names` and their values."""
    kept, rest = [], list(args)
    while rest:
        arg = rest.pop(0)
        if flag_name(arg) not in names:
            kept.append(arg)
        elif "=" not in arg and rest and not rest[0].startswith("--"):
            rest.pop(0)
    return kept
