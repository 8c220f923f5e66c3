"""The previous stages of a stage: whether they are still what it went on from, and what its manifest says of them.

Read without PyTorch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torchtitan.components.manifest import complete_steps, digest, read_manifest
from torchtitan.components.reach import trained_length
from torchtitan.config.manager import previous_folder, previous_stage
from torchtitan.config.schema import JobConfig
from torchtitan.tools.errors import UserError


def check_previous(config: JobConfig, manifest: dict[str, Any] | None) -> None:
    """UserError if a stage shares its dump folder with the previous one, or if the previous one has been trained anew,
    or for longer, since this one went on from it.

    manifest: of this stage's newest checkpoint; None if it has none.
    """
    if not config.stage.after:
        return
    try:
        before = previous_folder(config)
    except UserError:
        return  # a run that starts from there says so; one that is resumed needs nothing of it
    if before.resolve() == Path(config.job.dump_folder).resolve():
        raise UserError(
            f"stage {config.stage.name} and the previous one ({config.stage.after}) have one job.dump_folder, "
            f"{before}, and would be taken for one another: give this stage another."
        )
    lineage = (manifest or {}).get("stages_before") or [{}]
    step, recorded_digest = lineage[-1].get("step"), lineage[-1].get("digest")
    if not recorded_digest:
        return
    try:
        folder = before / previous_stage(config).checkpoint.folder
        newest = complete_steps(folder)[-1]
        same = newest == step and digest(read_manifest(folder / f"step-{newest}")) == recorded_digest
    except (IndexError, UserError):
        return  # it is gone or damaged: nothing of it is needed
    if not same:
        raise UserError(
            f"Stage {config.stage.name} went on from step {step} of {config.stage.after}, which has been trained anew "
            f"or for longer since: {folder}/step-{newest} is another checkpoint. Delete {config.job.dump_folder} to "
            "train this stage from it, choose another job.dump_folder, or name where the old one is "
            "(stage.after_dump_folder)."
        )


def lineage(manifest: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The stages up to the one of a manifest, the first one first: what the next stage's manifest says of them."""
    if manifest is None:
        return []
    own = {key: manifest.get(key) for key in ("stage", "step", "tokens_seen", "seq_len", "tokenizer")}
    rope = manifest["architecture"]["rope"] | {"max_position_embeddings": trained_length(manifest)}
    own |= {"rope": rope, "digest": digest(manifest)}
    return [*manifest.get("stages_before", []), own]
