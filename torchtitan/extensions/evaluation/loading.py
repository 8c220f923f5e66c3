"""What a Hugging Face folder or one of our checkpoints (step-N/) holds, and its model on one device."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader

from torchtitan.attention.backends import choose_backend
from torchtitan.components.manifest import MANIFEST, find_damage, read_manifest
from torchtitan.config.toml_file import load_tables
from torchtitan.datasets.tokenizer import Tokenizer, load_tokenizer
from torchtitan.extensions.convert.weights import DTYPES
from torchtitan.models.architecture import args_from_manifest
from torchtitan.models.hf.weights import check_weights, load_weights, read_config
from torchtitan.models.transformer import Transformer, TransformerArgs
from torchtitan.tools.errors import UserError


@dataclass(frozen=True)
class Loaded:
    """A model in evaluation mode and what it reads."""

    model: Transformer
    tokenizer: Tokenizer


@dataclass(frozen=True)
class Weights:
    """What a folder holds, looked at and not loaded yet."""

    folder: Path
    args: TransformerArgs
    tokenizer: Tokenizer
    manifest: dict[str, Any] | None
    """Of a checkpoint; None: a Hugging Face folder."""

    rescaled: bool = False
    """Whether they are read under another RoPE than they were saved with."""

    @property
    def label(self) -> str:
        name = self.folder.resolve().name
        if self.manifest is not None:
            name = f"{self.manifest['stage']}, step {self.manifest['step']}"
        return name + ", RoPE rescaled" * self.rescaled


def look_at(folder: Path, tokenizer_folder: Path | None = None) -> Weights:
    """The weights in a folder. UserError for files that are damaged or do not fit, and for a tokenizer that a
    checkpoint was not trained with; tokenizer_folder is as for load()."""
    if not (folder / MANIFEST).is_file():
        args = read_config(folder)
        check_weights(folder, args)
        return Weights(folder, args, load_tokenizer(tokenizer_folder or folder), None)
    if damage := find_damage(folder):
        raise UserError(f"--model {folder} is damaged: {damage}")
    manifest = read_manifest(folder)
    tokenizer = load_tokenizer(tokenizer_folder or _tokenizer_of(folder))
    if tokenizer.fingerprint != manifest["tokenizer"]:
        raise UserError(
            f"{folder} was trained with the tokenizer {manifest['tokenizer'][:12]}, but {tokenizer.folder} gives "
            f"{tokenizer.fingerprint[:12]}: name the folder of that one with --tokenizer."
        )
    return Weights(folder, args_from_manifest(manifest["architecture"]), tokenizer, manifest)


def load(
    folder: Path,
    dtype: str = "bfloat16",
    device: str = "cpu",
    tokenizer_folder: Path | None = None,
    attention_backend: str = "auto",
) -> Loaded:
    """The model in a folder, its parameters in `dtype`.

    tokenizer_folder: unset, the folder itself; of a checkpoint, what its run's config.toml names. UserError for a
    folder that is neither, for weights that do not fit, and for a tokenizer that the checkpoint was not trained with.
    """
    backend = choose_backend(attention_backend, device)
    if not (folder / MANIFEST).is_file() and not (folder / "config.json").is_file():
        steps = sorted(p.name for p in folder.glob("step-*") if p.is_dir())
        there = f"; it holds {', '.join(steps[-3:])}: name one of these" if steps else ""
        what = "has neither config.json nor manifest.json" if folder.is_dir() else "is not a folder"
        raise UserError(
            f"--model {folder} {what}{there}. It should be a Hugging Face folder, or a checkpoint of a run "
            "(outputs/checkpoint/step-1000)."
        )
    weights = look_at(folder, tokenizer_folder)
    model = _empty(weights.args, DTYPES[dtype], device, backend)
    with _one_process():
        if weights.manifest is None:
            load_weights(model, folder)
        else:
            state = {"model": {name: param.detach() for name, param in model.named_parameters()}}
            dcp.load(state, storage_reader=FileSystemReader(str(folder)))
    return Loaded(model, weights.tokenizer)


def _tokenizer_of(checkpoint: Path) -> Path:
    """What the config.toml beside the checkpoints names; a relative path is looked up from here, as the run did."""
    config = checkpoint.resolve().parent.parent / "config.toml"
    if not config.is_file():
        raise UserError(
            f"{checkpoint} does not say where its tokenizer is: there is no {config}. Name its folder with --tokenizer."
        )
    return Path(str(load_tables(config).get("model", {}).get("hf_assets_path", "./assets/tokenizer")))


def _empty(args: TransformerArgs, dtype: torch.dtype, device: str, backend: str) -> Transformer:
    """The model with memory of its own and no values yet: never held twice, nor in float32 first."""
    with torch.device("meta"):
        model = Transformer(args, backend).to(dtype)
    model.to_empty(device=device)
    model.tie_embeddings()
    return model.eval()


@contextmanager
def _one_process() -> Iterator[None]:
    """Without DCP's warnings that it is used by one process, which is meant."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*(single process|no_dist).*")
        yield
