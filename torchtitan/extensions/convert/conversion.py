"""Shared by the scripts that read one model and write another: opening a folder of any format, a line of progress."""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from torchtitan.datasets.ends_of_turn import named_ends
from torchtitan.datasets.tokenizer import load_tokenizer
from torchtitan.extensions.convert.torchtitan_and_meta import open_meta, open_torchtitan
from torchtitan.extensions.convert.weights import Weights, open_checkpoint, open_hugging_face
from torchtitan.models.hf.config_in import read_config
from torchtitan.models.hf.folder import in_hub_cache, is_hugging_face
from torchtitan.models.registry import FLAVORS
from torchtitan.models.transformer import TransformerArgs
from torchtitan.tools.errors import UserError


def open_any(folder: Path, architecture: str | None = None) -> Weights:
    """The weights in a folder of any format that is read here. architecture: see named_architecture."""
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder.")
    if is_hugging_face(folder) and not (folder / "manifest.json").is_file():  # in the order of training
        return open_hugging_face(folder)
    if (folder / "manifest.json").is_file() or any(folder.glob("step-*/manifest.json")):
        return open_checkpoint(folder)
    if (folder / ".metadata").is_file():
        return open_torchtitan(folder, named_architecture(folder, architecture))
    if any(folder.glob("consolidated.*.pth")):
        return open_meta(folder, named_architecture(folder, architecture) if architecture else None)
    raise UserError(
        f"{folder} is none of: a checkpoint of ours (manifest.json), of torchtitan (.metadata), of Meta "
        f"(consolidated.*.pth), a Hugging Face folder (*.safetensors). "
        f"It holds: {', '.join(sorted(p.name for p in folder.iterdir())[:8]) or 'nothing'}." + in_hub_cache(folder)
    )


def named_architecture(folder: Path, architecture: str | None) -> TransformerArgs:
    """`architecture` is a flavor or a folder with config.json; None: `folder` must have a config.json itself."""
    if architecture is not None and architecture in FLAVORS:
        return FLAVORS[architecture]
    source = Path(architecture) if architecture else folder
    if not (source / "config.json").is_file():
        raise UserError(
            f"{folder} does not say which model it holds: give --architecture, one of {', '.join(FLAVORS)}, or a "
            "folder with config.json."
        )
    return read_config(source)


def manifest_entries(weights: Weights, assets: Path) -> dict[str, Any]:
    """What the manifest of a checkpoint of these weights says beside the architecture. assets: the tokenizer's folder,
    read if the weights do not name a tokenizer."""
    known: dict[str, Any] = {"seq_len": weights.args.rope.max_position_embeddings}
    known |= {
        k: weights.manifest[k]
        for k in ("tokenizer", "seq_len", "tokens_seen", "begins_with_bos")
        if k in weights.manifest
    }
    known["ends_of_turn"] = known_ends(weights)
    if known.get("tokenizer") is None:
        try:
            known["tokenizer"] = load_tokenizer(assets).fingerprint
        except UserError as error:
            raise UserError(f"A checkpoint names its tokenizer. {error} Give --assets.") from None
    return known


def tokenizer_of(weights: Weights) -> str | None:
    """Fingerprint of the tokenizer, as the weights' manifest says, or as it lies beside them; None: not known."""
    try:
        return weights.manifest.get("tokenizer") or load_tokenizer(weights.where).fingerprint
    except UserError:
        return None


def known_ends(weights: Weights) -> list[int]:
    """The tokens that end the model's answers, as its manifest or its generation_config.json says."""
    return weights.manifest.get("ends_of_turn", named_ends(weights.where))


def with_progress(weights: Weights) -> Weights:
    """The same weights; a line on standard error counts the tensors that have been read."""
    total, start = len(weights.shapes), time.monotonic()
    count = read_bytes = 0

    def read(name: str) -> torch.Tensor:
        nonlocal count, read_bytes
        tensor = weights.read(name)
        count, read_bytes = count + 1, read_bytes + tensor.nbytes
        seconds = time.monotonic() - start
        end = "\n" if count == total else "" if sys.stderr.isatty() else None
        if end is not None:
            line = f"{count} of {total} tensors, {read_bytes / 1e9:.2f} GB, {seconds:.0f} s"
            print(f"\r{line}", end=end, file=sys.stderr, flush=True)
        return tensor

    return replace(weights, read=read)
