"""A model to evaluate, from a Hugging Face folder or one of our checkpoints (step-N/): inspected, then loaded.

`model_on_ranks` loads it in any layout on the ranks of this run, `load` on one device without a process group.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from torchtitan.attention.backends import choose_backend
from torchtitan.components.checkpoint import load as load_checkpoint
from torchtitan.components.manifest import MANIFEST, find_damage, read_manifest
from torchtitan.config.checks import resolve_shard_degree
from torchtitan.config.schema import JobConfig, Rope
from torchtitan.config.toml_file import load_tables
from torchtitan.datasets.ends_of_turn import named_ends
from torchtitan.datasets.tokenizer import Tokenizer, load_tokenizer
from torchtitan.distributed.options.ulysses import check_ulysses
from torchtitan.distributed.parallel_dims import ParallelDims
from torchtitan.distributed.parallelize import build_sharded_model
from torchtitan.distributed.tensor_parallel import check_tensor_parallel
from torchtitan.extensions.convert.weights import open_checkpoint, open_hugging_face
from torchtitan.extensions.evaluation.command_line import check_model_folder
from torchtitan.extensions.evaluation.forward import Ranks
from torchtitan.models.architecture import args_from_manifest
from torchtitan.models.hf.config_in import read_config
from torchtitan.models.hf.weights import check_weights, load_weights
from torchtitan.models.rope_config import build_rope, describe_rope
from torchtitan.models.transformer import Transformer, TransformerArgs
from torchtitan.tools.constants import RANK_VARIABLES
from torchtitan.tools.device import init_process_group, pick_device
from torchtitan.tools.errors import UserError
from torchtitan.tools.logging import logger


@dataclass(frozen=True)
class ModelOnDisk:
    """What a folder holds: inspected, not loaded yet."""

    folder: Path
    args: TransformerArgs
    tokenizer: Tokenizer
    manifest: dict[str, Any] | None
    """Of a checkpoint; None for a Hugging Face folder."""

    rescaled: bool = False
    """Whether `args` has another RoPE than the weights were saved with."""

    @property
    def ends_of_turn(self) -> list[int]:
        """Tokens that end a response: as its stages trained it, or as a Hugging Face folder names them."""
        return named_ends(self.folder) if self.manifest is None else self.manifest.get("ends_of_turn", [])

    @property
    def label(self) -> str:
        """For tables and pictures: "64k, step 1000", or the folder's name."""
        name = self.folder.resolve().name
        if self.manifest is not None:
            name = f"{self.manifest['stage']}, step {self.manifest['step']}"
        return name + ", RoPE rescaled" * self.rescaled


@dataclass(frozen=True)
class Loaded:
    """A model in evaluation mode on one device, its tokenizer, and the one process that it runs in."""

    model: Transformer
    tokenizer: Tokenizer
    ranks: Ranks


def _read_folder(folder: Path, tokenizer_folder: Path | None = None) -> ModelOnDisk:
    """The model in a folder, under its own RoPE.

    tokenizer_folder: if it is not given, the folder itself or, for a checkpoint, what its run's config.toml names.
    UserError for a folder that is neither, for files that are damaged or do not fit, and for a tokenizer that a
    checkpoint was not trained with.
    """
    check_model_folder(folder)
    if not (folder / MANIFEST).is_file():
        args = read_config(folder)
        check_weights(folder, args)
        return ModelOnDisk(folder, args, load_tokenizer(tokenizer_folder or folder), None)
    if damage := find_damage(folder):
        raise UserError(f"--model {folder} is damaged: {damage}")
    manifest = read_manifest(folder)
    tokenizer = load_tokenizer(tokenizer_folder or _tokenizer_of(folder))
    if tokenizer.fingerprint != manifest["tokenizer"]:
        raise UserError(
            f"{folder} was trained with the tokenizer {manifest['tokenizer'][:12]}, but {tokenizer.folder} gives "
            f"{tokenizer.fingerprint[:12]}: name the right tokenizer's folder with --tokenizer."
        )
    return ModelOnDisk(folder, args_from_manifest(manifest["architecture"]), tokenizer, manifest)


def _tokenizer_of(checkpoint: Path) -> Path:
    """The folder that the config.toml beside the checkpoints names; a relative path is relative to the working folder,
    as in the run."""
    config = checkpoint.resolve().parent.parent / "config.toml"
    if not config.is_file():
        raise UserError(
            f"{checkpoint} does not say where its tokenizer is: {config} is missing. Name its folder with --tokenizer."
        )
    return Path(str(load_tables(config).get("model", {}).get("hf_assets_path", "./assets/tokenizer")))


def load(
    folder: Path,
    dtype: str = "bfloat16",
    device: str = "cpu",
    tokenizer_folder: Path | None = None,
    attention_backend: str = "auto",
) -> Loaded:
    """The model in a folder on one device, its parameters in `dtype`. UserError: see _read_folder."""
    on_disk = _read_folder(folder, tokenizer_folder)
    backend = choose_backend(attention_backend, device)
    with torch.device("meta"):  # parameters are never held twice, nor in float32 first
        model = Transformer(on_disk.args, backend).to(getattr(torch, dtype))
    model.to_empty(device=device)
    model.tie_embeddings()
    weights = open_checkpoint(folder) if on_disk.manifest else open_hugging_face(folder)
    for name, parameter in model.named_parameters():
        parameter.detach().copy_(weights.read(name))
    return Loaded(model.eval(), on_disk.tokenizer, Ranks(torch.device(device), backend))


def inspect_model(folder: Path, config: JobConfig, longest: int | None, tokenizer: Path | None = None) -> ModelOnDisk:
    """The model in a folder, under its own RoPE unless config.rope is set: then rescaled for `longest` tokens (None: as
    many as it was trained for). max_position_embeddings stays what the model was trained for.

    UserError for what is damaged or does not fit: files, tokenizer, RoPE, layout.
    """
    on_disk = _read_folder(folder, tokenizer)
    args = on_disk.args
    if config.rope != Rope():
        trained = args.rope.max_position_embeddings
        if longest is None and trained is None:
            raise UserError("--rope.KEY rescales for a length, but the model does not say its own: give --max_length.")
        rope = build_rope(config.rope, args.rope, args.head_dim, args.n_kv_heads, longest or trained or 0)
        rope = replace(rope, max_position_embeddings=trained)
        logger.info(f"RoPE: {describe_rope(rope)}; the model's own: {describe_rope(args.rope)}")
        on_disk = replace(on_disk, args=replace(args, rope=rope), rescaled=rope != args.rope)
    p = config.parallelism
    check_tensor_parallel(args, p.tensor_parallel_degree)
    check_ulysses(args.n_heads, p)
    return on_disk


def check_own_results(options: argparse.Namespace, on_disk: ModelOnDisk) -> None:
    """UserError if the stage's own results file would get the results of another model."""
    if options.of_stage and on_disk.rescaled:
        raise UserError(f"--rope.KEY asks another model than the stage's, whose results are {options.out}: give --out.")


def rank_and_world_size() -> tuple[int, int, int]:
    """(rank, rank on this machine, number of ranks) as the launcher says; (0, 0, 1) without a launcher."""
    rank, local, size = (int(os.environ.get(name, default)) for name, default in RANK_VARIABLES)
    return rank, local, size


@contextmanager
def model_on_ranks(on_disk: ModelOnDisk, config: JobConfig) -> Iterator[tuple[Transformer, Ranks]]:
    """The model in evaluation mode, in the layout of [parallelism], and its ranks. Collective; makes the process group,
    which lives as long as the context."""
    p = config.parallelism
    rank, local_rank, world_size = rank_and_world_size()
    device = pick_device(local_rank)
    init_process_group(device, rank, world_size, config.comm.init_timeout_seconds)
    try:
        shards = resolve_shard_degree(config, world_size)
        degrees = (p.data_parallel_replicate_degree, shards, p.context_parallel_degree, p.tensor_parallel_degree)
        dims = ParallelDims.build(device.type, *degrees)
        group = dist.new_group(backend="gloo")
        model = build_sharded_model(on_disk.args, config, dims, device)
        model.tie_embeddings()
        if on_disk.manifest:
            state = {"model": {name: param.detach() for name, param in model.named_parameters()}}
            load_checkpoint(on_disk.folder, state, group)
        else:
            load_weights(model, on_disk.folder)
        yield model.eval(), Ranks.of(dims, device, config, group)
    finally:
        dist.destroy_process_group()
