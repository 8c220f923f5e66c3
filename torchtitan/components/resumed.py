"""The checkpoint that a stage resumes: its manifest, and whether this configuration can go on from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torchtitan.components.changes import changed_keys, changes, flat
from torchtitan.components.data_start import DataStart, plan_differences
from torchtitan.components.manifest import check_load_step, complete_steps, newest_manifest, read_manifest
from torchtitan.config import JobConfig
from torchtitan.datasets.plan import Plan
from torchtitan.datasets.tokenizer import Tokenizer
from torchtitan.models.architecture import as_json, complete
from torchtitan.models.transformer import TransformerArgs
from torchtitan.tools.errors import UserError
from torchtitan.tools.logging import logger


def own_manifest(config: JobConfig) -> dict[str, Any] | None:
    """The manifest of this stage's own checkpoint of load_step, or of the newest that can be read; None if there is
    none."""
    if not config.checkpoint.enable:
        return None
    folder = Path(config.job.dump_folder) / config.checkpoint.folder
    steps = complete_steps(folder)
    check_load_step(folder, config.checkpoint.load_step, steps)
    if config.checkpoint.load_step >= 0:
        return read_manifest(folder / f"step-{config.checkpoint.load_step}")
    return newest_manifest(config)[1]


def check_resumable(
    config: JobConfig,
    manifest: dict[str, Any],
    args: TransformerArgs,
    tokenizer: Tokenizer,
    plan: Plan,
    begin: DataStart,
) -> None:
    """UserError for a checkpoint folder of another model or of other data, which would be overwritten. Logs what
    data.changed_at_step changes on purpose."""
    folder = Path(config.job.dump_folder) / config.checkpoint.folder
    steps = complete_steps(folder)
    differences = changes(flat(complete(manifest["architecture"])), flat(as_json(args)))
    if manifest["tokenizer"] != tokenizer.fingerprint:
        differences.append("the tokenizer")
    refused, accepted = plan_differences(manifest["plan"], plan, begin)
    differences += refused + changed_keys(manifest, config)
    if differences:
        raise UserError(
            f"{folder} holds checkpoints of another run ({', '.join(f'step {s}' for s in steps[-3:])}), which this one "
            f"would resume from and overwrite. Changed: {'; '.join(differences)}. Set that back, choose another "
            "job.dump_folder, or delete that folder."
        )
    for line in accepted:
        logger.info(f"changed from step {begin.first_step} on: {line}")
