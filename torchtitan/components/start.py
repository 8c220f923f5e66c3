"""The boundary between two stages: where a stage starts from, and what cannot change there.

A stage is one TOML file. The manifest of its checkpoints holds the configuration, the architecture and the tokenizer
that it was trained with, and the stages before it. The next stage reads all of that here. It takes the tensors that
stage.carry names and nothing else: RoPE, schedule, step counter and data are those of its own TOML.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchtitan.components.changes import changes, flat
from torchtitan.components.manifest import complete_steps, read_manifest
from torchtitan.config.manager import previous_folder, previous_stage
from torchtitan.config.schema import JobConfig
from torchtitan.models.architecture import args_from_manifest, as_json
from torchtitan.models.hf.config_in import read_config
from torchtitan.models.hf.folder import in_hub_cache, is_hugging_face, weight_files
from torchtitan.models.transformer import TransformerArgs
from torchtitan.tools.errors import UserError


@dataclass(frozen=True)
class Start:
    """What a fresh run starts from."""

    path: Path
    """A checkpoint's step-N folder, or a Hugging Face folder."""

    parts: tuple[str, ...]
    """What is taken: "model", "optimizer" or both."""

    manifest: dict[str, Any] | None
    """Of the checkpoint; None for a Hugging Face folder."""

    args: TransformerArgs | None
    """What the weights were trained as; None for a Hugging Face folder without config.json."""


def find_start(config: JobConfig) -> Start | None:
    """Where [stage] and [checkpoint] say that a fresh run starts from; None: from scratch, or initial_load_in_hf."""
    if config.stage.after:
        return _from_previous_stage(config)
    if config.checkpoint.initial_load_path:
        return _elsewhere(config)
    return None


def _from_previous_stage(config: JobConfig) -> Start:
    after = Path(config.stage.after or "")
    if not after.is_file():
        what = "is a folder" if after.is_dir() else "does not exist"
        raise UserError(f"stage.after = {after} {what}: it must name the TOML file of the previous stage.")
    before, dump_folder = previous_stage(config), previous_folder(config)
    folder = dump_folder / before.checkpoint.folder
    how = (
        f"Train it first (./run_train.sh --job.config_file {after}, or this stage with --stage.run_chain), name where "
        'it wrote (stage.after_dump_folder), or try this stage alone (--stage.after "").'
    )
    steps = complete_steps(folder)
    if not steps:
        state = "is an empty folder" if folder.is_dir() else "does not exist"
        left = sorted(p.name for p in folder.glob("step-*"))
        unfinished = f" (there are {', '.join(left)}, which are not complete)" if left else ""
        raise UserError(
            f"stage.after = {after}: there is no complete checkpoint of that stage. Looked for {folder}/step-N, and "
            f"{folder} {'holds none' if left else state}{unfinished}. {how}"
        )
    manifest = _sound_manifest(folder / f"step-{steps[-1]}")
    last_step = manifest.get("config", {}).get("training", {}).get("steps", before.training.steps)
    if manifest["step"] < last_step:
        raise UserError(
            f"stage.after = {after}: that stage has not ended. Its newest complete checkpoint, "
            f"{folder}/step-{steps[-1]}, is of step {manifest['step']} of {last_step}. {how}"
        )
    return _start(folder / f"step-{steps[-1]}", config.stage.carry, manifest)


def _start(path: Path, parts: tuple[str, ...], manifest: dict[str, Any]) -> Start:
    return Start(path, parts, manifest, args_from_manifest(manifest["architecture"]))


def hugging_face_start(path: Path, asked: str) -> Start:
    """A folder of safetensors; its config.json says what the weights were trained as. asked: see weight_files."""
    weight_files(path, asked)
    return Start(path, ("model",), None, read_config(path) if (path / "config.json").is_file() else None)


def _elsewhere(config: JobConfig) -> Start:
    path = Path(config.checkpoint.initial_load_path or "").expanduser()
    parts = tuple(p for p in config.stage.carry if p not in config.checkpoint.exclude_from_loading)
    key = f"checkpoint.initial_load_path = {path}"
    if "model" not in parts:
        raise UserError(
            f"{key} without the model loads nothing: it must be in stage.carry, and not in "
            "checkpoint.exclude_from_loading."
        )
    if not path.is_dir():
        raise UserError(
            f"{key} is not a folder: it must be a step-N folder, a folder of these, or a Hugging Face folder."
        )
    if (path / "manifest.json").is_file():
        return _start(path, parts, _sound_manifest(path))
    if is_hugging_face(path):
        return hugging_face_start(path, key)
    for folder in (path, path / config.checkpoint.folder):
        if steps := complete_steps(folder):
            newest = folder / f"step-{steps[-1]}"
            return _start(newest, parts, _sound_manifest(newest))
    if (path / ".metadata").is_file():
        raise UserError(
            f"{key} is a DCP checkpoint without this project's manifest.json, torchtitan's perhaps: turn it into one "
            "with scripts/convert.py."
        )
    raise UserError(
        f"{key} holds neither a checkpoint (manifest.json, or folders step-N) nor a Hugging Face model (*.safetensors)."
        + in_hub_cache(path)
    )


def _sound_manifest(path: Path) -> dict[str, Any]:
    # only whether the files exist: the ranks of the trainer read all of them, each rank a part
    manifest = read_manifest(path)
    missing = [name for name in manifest.get("files", {}) if not (path / name).is_file()]
    if missing:
        raise UserError(
            f"{path} is damaged: {missing[0]} is missing. Restore that file, or delete the folder and start from an "
            "earlier checkpoint (a previous stage must first be trained to its end again)."
        )
    return manifest


def check_start(start: Start, args: TransformerArgs, tokenizer: str) -> None:
    """UserError if a stage cannot go on from what it would start from. tokenizer: the stage's fingerprint."""
    if start.args is None:
        return
    old, new = (flat({**as_json(a), "rope": {}}) for a in (start.args, args))
    if differences := changes(old, new):
        raise UserError(
            f"{start.path} has another architecture: {'; '.join(differences)}. Name the model that it was trained with "
            "(model.flavor, model.hf_assets_path), or start from another checkpoint."
        )
    if start.manifest and start.manifest["tokenizer"] != tokenizer:
        raise UserError(
            f"{start.path} was trained with another tokenizer than the one in model.hf_assets_path: its embeddings "
            "would stand for other tokens."
        )
