"""What a checkpoint says about itself, read without PyTorch: launchers and chains ask before they start a process.

A checkpoint is step-N/ with manifest.json: step, tokens, configuration, architecture, and size and CRC-32 of every
file. components/checkpoint.py writes it. Also here: where the export and the evaluation results of a step are.
"""

from __future__ import annotations

import hashlib
import json
import re
import zlib
from pathlib import Path
from typing import Any

from torchtitan.config.schema import JobConfig
from torchtitan.tools.errors import UserError
from torchtitan.tools.folders import read_json

MANIFEST = "manifest.json"
MANIFEST_FORMAT = 1


def has_ended(config: JobConfig) -> bool:
    """Whether a stage is done: its newest readable checkpoint is of the last step and, if asked for, exported."""
    step, manifest = newest_manifest(config)
    exported = not config.checkpoint.last_save_in_hf or export_folder(config, step).exists()
    return manifest is not None and step >= config.training.steps and exported


def newest_manifest(config: JobConfig) -> tuple[int, dict[str, Any] | None]:
    """Step and manifest of the stage's newest checkpoint that can be read; (-1, None) if there is none."""
    folder = Path(config.job.dump_folder) / config.checkpoint.folder
    for step in reversed(complete_steps(folder)):
        try:
            return step, read_manifest(folder / f"step-{step}")
        except UserError:
            continue  # damaged: the trainer will say so, and resume from the previous one
    return -1, None


def export_folder(config: JobConfig, step: int) -> Path:
    """The folder into which checkpoint.last_save_in_hf exports the model of a step."""
    return Path(config.job.dump_folder) / "export" / f"step-{step}"


def complete_steps(folder: Path) -> list[int]:
    """Steps of the complete checkpoints, ascending."""
    names = (re.fullmatch(r"step-(\d+)", p.name) for p in folder.glob("step-*"))
    return sorted(int(m[1]) for m in names if m)


def check_load_step(folder: Path, load_step: int, steps: list[int]) -> None:
    """UserError if checkpoint.load_step, unless negative, is not among the `steps` of the folder."""
    if load_step >= 0 and load_step not in steps:
        raise UserError(
            f"checkpoint.load_step = {load_step}, but {folder} holds no complete checkpoint of that step; its steps: "
            f"{', '.join(map(str, steps)) or 'none'}. -1 takes the newest, and starts anew if there is none."
        )


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of step-N/; UserError if it is missing, not JSON, or not one of this format."""
    file, mend = path / MANIFEST, "Restore it, or delete that step's folder."
    try:
        manifest = read_json(file, mend)
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}. {mend}") from None
    if manifest.get("format") != MANIFEST_FORMAT:
        raise UserError(f"{file} has format {manifest.get('format')}, but this version reads {MANIFEST_FORMAT}. {mend}")
    return manifest


def digest(manifest: dict[str, Any]) -> str:
    """A hash (16 hex digits) of a manifest and, since it holds the CRCs, of the whole checkpoint."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()[:16]


def find_damage(path: Path, part: int = 0, parts: int = 1) -> str | None:
    """What is wrong with a checkpoint, in a sentence that names the file; None if nothing is.

    Reads the files part, part + parts, ... in the order of their names.
    """
    try:
        manifest = read_manifest(path)
    except UserError as e:
        return str(e)
    for name, expected in sorted(manifest.get("files", {}).items())[part::parts]:
        try:
            actual = size_and_crc(path / name)
        except OSError as e:
            return f"{path / name} cannot be read: {e.strerror}."
        if actual != expected:
            return f"{path / name} has size and CRC-32 {actual}, but the manifest says {expected}."
    return None


def size_and_crc(path: Path) -> list[int]:
    """[bytes, CRC-32] of a file."""
    crc = size = 0
    with path.open("rb") as f:
        while block := f.read(1 << 24):
            crc, size = zlib.crc32(block, crc), size + len(block)
    return [size, crc]


def results_file(config: JobConfig, step: int, suffix: str = "") -> Path:
    """The file with the evaluation results of a stage's checkpoint of a step."""
    return Path(config.job.dump_folder) / "evaluation" / f"step-{step}{suffix}.json"
