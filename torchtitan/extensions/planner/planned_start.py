"""Where the data of a stage will begin, also if its previous stage has not been trained yet."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torchtitan.components.data_start import DataStart, data_start, fresh_start
from torchtitan.components.resumed import own_manifest
from torchtitan.components.setup import OpenSource, make_plan, model_args
from torchtitan.components.start import find_start
from torchtitan.config.checks import accumulation_steps
from torchtitan.config.manager import previous_stage
from torchtitan.config.schema import JobConfig
from torchtitan.datasets.plan import Plan
from torchtitan.datasets.read_so_far import ReadSoFar, read_until
from torchtitan.datasets.same_data import source_options
from torchtitan.datasets.tokenizer import load_tokenizer
from torchtitan.tools.errors import UserError


def planned_start(
    config: JobConfig, world_size: int, opener: Callable[[JobConfig], OpenSource]
) -> tuple[DataStart, str]:
    """Where the data of a stage begin, and what to say of how that is known.

    From its own checkpoint or that of the previous stage; if there is none, from what the previous stages will have
    read by their plans, with as many processes as this one; if these cannot be made, as if nothing had been read.
    opener: of a stage, what turns its sources into corpora.
    """
    resumed = own_manifest(config)
    if resumed or config.data.changed_at_step or not (config.stage.after or config.checkpoint.initial_load_path):
        return data_start(config, resumed, None), ""
    try:
        return data_start(config, None, find_start(config)), ""
    except UserError as error:
        reason = str(error)
    if config.stage.after:
        try:
            read = read_until(*_planned(config, world_size, opener))
            text = f"{config.stage.after}, which has no finished checkpoint, is taken to read what it plans to read"
            return fresh_start(config, read), text
        except UserError as error:
            reason = str(error)
    return DataStart(), f"how much the previous stages will have read is unknown, nothing is assumed: {reason}"


def _planned(
    config: JobConfig, world_size: int, opener: Callable[[JobConfig], OpenSource]
) -> tuple[ReadSoFar, Plan, int]:
    """Of the previous stage: what its chain has read before it, its plan, its steps."""
    before = previous_stage(config)
    before = replace(
        before,
        data=replace(before.data, cache_folder=config.data.cache_folder),
        rope=replace(before.rope, theta=None if before.rope.theta == "auto" else before.rope.theta),
    )
    here = [source_options(source, "documents") for source in config.data.sources]
    for source in before.data.sources:
        if source.path.startswith("hub:") and source_options(source, "documents") not in here:
            raise UserError(f"{source.path} of {config.stage.after} would have to be downloaded.")
    accumulation_steps(before, world_size)
    begin, text = planned_start(before, world_size, opener)
    if not begin.read.corpora and text:
        raise UserError(text)
    tokenizer = load_tokenizer(before.model.hf_assets_path)
    plan = make_plan(before, world_size, tokenizer, model_args(before), opener(before), begin)
    return begin.read, plan, plan.steps
