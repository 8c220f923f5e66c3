"""Print what a stage will read, before it is paid for: needs no GPU, no weights and no dump folder.

    python scripts/plan.py --job.config_file stage.toml [--world-size 16] [--training.steps 100] [--out plan.json]

The report that training logs at its start: shares asked for and got, epochs, what is left out, what packing cuts, the
work of the ranks; and the RoPE that the stage will have, with what training would refuse about it (the exit code is
then 2). Text that is not in data.cache_folder yet is tokenized into it; the plan is kept there too, where training
finds it. scripts/plot_plan.py draws what --out writes. Without --world-size, the number of processes is NGPU, or else
8. If the stage cannot run on 8, it is the nearest smaller number on which it can, or else the nearest larger.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from dataclasses import replace
from pathlib import Path

from torchtitan.config import JobConfig, load_config
from torchtitan.extensions.cluster.check_config import check_tables
from torchtitan.extensions.cluster.rope_report import REFUSED, is_refused, rope_report
from torchtitan.tools.errors import UserError
from torchtitan.tools.folders import check_can_be_written

USUAL_WORLD_SIZE = 8
MOST_PROCESSES = 1024


def main(args: list[str]) -> int:
    """Exit code 1, and one line, for a mistake of the user; 2 if training would refuse the RoPE of the stage."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="every other --table.key is an override of the TOML's, as with run_train.sh",
        allow_abbrev=False,
    )
    parser.add_argument("--world-size", "--world_size", type=int, help="processes to plan for")
    parser.add_argument("--out", type=Path, help="JSON file to write, as plan.json in a run's dump folder")
    own, others = parser.parse_known_args(args)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("torchtitan").setLevel(logging.INFO)
    try:
        config = load_config(others)
        world_size, why = choose_world_size(config, own.world_size, os.environ.get("NGPU"))
        if own.out is not None:
            check_can_be_written(own.out, "--out")
        text, report, refused = plan_stage(config, world_size)
        print(f"stage {config.stage.name} on {world_size} process{'' if world_size == 1 else 'es'} ({why})\n{text}")
        if own.out is not None:
            own.out.write_text(json.dumps(report, indent=1) + "\n")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return REFUSED if refused else 0


def choose_world_size(config: JobConfig, asked: int | None, ngpu: str | None) -> tuple[int, str]:
    """(processes to plan for, why that number). UserError if the configuration is wrong or cannot run on it."""
    if asked is not None or ngpu:
        name = "--world-size" if asked is not None else "NGPU"
        given = str(asked) if asked is not None else str(ngpu)
        if not given.isdecimal() or int(given) < 1:
            raise UserError(f"{name} = {given} is not a number of processes: it must be 1 or more.")
        check_tables(config, int(given))
        return int(given), f"from {name}"
    try:
        check_tables(config, USUAL_WORLD_SIZE)
        return USUAL_WORLD_SIZE, "the default; --world-size N plans for another number"
    except UserError as error:
        for world_size in [*range(USUAL_WORLD_SIZE - 1, 0, -1), *range(USUAL_WORLD_SIZE + 1, MOST_PROCESSES + 1)]:
            try:
                check_tables(config, world_size)
            except UserError:
                continue
            return world_size, f"it cannot run on {USUAL_WORLD_SIZE}; --world-size N plans for another number"
        raise error from None


def plan_stage(config: JobConfig, world_size: int) -> tuple[str, dict, bool]:
    """The report as text and as JSON values; whether training would refuse the RoPE."""
    # Importing PyTorch takes seconds: a mistake in the TOML must not.
    from torchtitan.components.data_start import describe
    from torchtitan.components.setup import OpenSource, make_plan, model_args
    from torchtitan.datasets.tokenizer import load_tokenizer
    from torchtitan.extensions.ingest.hygiene import cleaning
    from torchtitan.extensions.ingest.stand_in import MARK
    from torchtitan.extensions.planner.data_report import format_report, report_of
    from torchtitan.extensions.planner.planned_start import planned_start

    def opener(config: JobConfig) -> OpenSource:
        return cleaning(config.evaluation)

    rope = rope_report(config)
    if config.rope.theta == "auto":  # the previous stage may not have been trained; rows do not depend on the base
        config = replace(config, rope=replace(config.rope, theta=None))
    args = model_args(config)
    tokenizer = load_tokenizer(config.model.hf_assets_path)
    begin, text = planned_start(config, world_size, opener)
    plan = make_plan(config, world_size, tokenizer, args, opener(config), begin)
    report = report_of(plan, config, world_size, args, begin.read)
    lines = [format_report(report), *([f"data: {text}"] if text else []), *describe(begin, plan), *rope]
    made_up = [s["name"] for s in report["sources"] if (Path(s["folder"]) / MARK).is_file()]
    if made_up:
        which = "all sources" if len(made_up) == len(report["sources"]) else ", ".join(made_up)
        lines.append(
            f"note: stand-ins of random tokens were read for {which}: shares, cutting and packing hold for lengths "
            "that are made up; epochs and the unigram model mean nothing"
        )
    return "\n".join(lines), report, is_refused(rope)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
