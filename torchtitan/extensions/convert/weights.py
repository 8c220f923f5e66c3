"""A model's weights on disk, whatever the format: names and shapes at once, tensors one at a time.

Every reader returns a `Weights` with our parameter names and half-split rotary pairs; every writer takes one. So a
conversion, an average and a merge are each one function, and none holds more than one tensor (two, while a reader
assembles a tensor from its pieces). Nothing here is collective.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from torchtitan.components.checkpoint import WholeWriter, explain_failure
from torchtitan.components.manifest import MANIFEST, MANIFEST_FORMAT, complete_steps, read_manifest
from torchtitan.models.architecture import args_from_manifest, as_json
from torchtitan.models.hf.config_in import read_config
from torchtitan.models.hf.folder import weight_files
from torchtitan.models.hf.weights import SAFETENSORS_DTYPES, check_weights, hf_name
from torchtitan.models.transformer import TransformerArgs, parameter_shapes
from torchtitan.tools.errors import UserError
from torchtitan.tools.folders import new_folder
from torchtitan.tools.logging import logger

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_PREFIXES = ("layers.", "tok_embeddings.", "norm.", "output.")


@dataclass(frozen=True)
class Weights:
    """A model's parameters: what they are, and how to read each."""

    where: Path
    """The folder, for messages."""
    args: TransformerArgs
    shapes: dict[str, tuple[int, ...]]
    """By our names, in the model's order; a tied output matrix is not among them."""
    dtypes: dict[str, torch.dtype]
    read: Callable[[str], torch.Tensor]
    """A parameter by name, whole, on the CPU."""
    manifest: dict[str, Any] = field(default_factory=dict)

    def cast(self, dtype: str | None) -> Weights:
        """The same weights in another dtype, a key of DTYPES; None: as they are."""
        if dtype is None:
            return self
        if dtype not in DTYPES:
            raise UserError(f'dtype = "{dtype}" is not one of {", ".join(DTYPES)}.')
        to, read = DTYPES[dtype], self.read

        def cast(name: str) -> torch.Tensor:
            before = read(name)
            after = before.to(to)
            if (lost := after.isinf() & before.isfinite()).any():
                raise UserError(
                    f"{name} in {self.where} has {before[lost].abs().max():g}, but {dtype} ends at "
                    f'{torch.finfo(to).max:g}: name another dtype ("bfloat16" or "float32").'
                )
            return after

        return replace(self, dtypes=dict.fromkeys(self.shapes, to), read=cast)


def check_shapes(weights: Weights) -> Weights:
    """The weights with exactly the model's parameters, in its order; UserError with the first that do not fit."""
    expected, actual = parameter_shapes(weights.args), dict(weights.shapes)
    if weights.args.tied_embeddings:
        actual.pop("output.weight", None)
    wrong = [
        f"{name} should be {list(expected[name]) if name in expected else 'absent'} and is "
        f"{list(actual[name]) if name in actual else 'missing'}"
        for name in expected | actual
        if expected.get(name) != actual.get(name)
    ]
    if wrong:
        raise UserError(
            f"The weights in {weights.where} do not fit the model: it has {len(expected)} tensors, {len(wrong)} "
            f"differ. First: {'; '.join(wrong[:5])}. Name the architecture that they were trained with."
        )
    return replace(weights, shapes=expected)


class _Reader(FileSystemReader):
    """Reads .metadata once, not once per tensor."""

    _metadata: Metadata | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        if self._metadata is None:
            self._metadata = super().read_metadata(*args, **kwargs)
        return self._metadata


def open_dcp(folder: Path, args: TransformerArgs, manifest: dict[str, Any] | None = None) -> Weights:
    """The model in a DCP folder, each parameter whole, however it was sharded; optimizer state is left out.

    Its keys may begin with "model.". Rotary pairs are as they were saved.
    """
    reader = _Reader(str(folder))
    try:
        entries = reader.read_metadata().state_dict_metadata
    except Exception as e:  # it is a pickle: anything can happen
        raise UserError(
            f"{folder / '.metadata'} cannot be read: {type(e).__name__} {e}. Is the folder whole?"
        ) from None
    prefix = "model." if "model.tok_embeddings.weight" in entries else ""
    tensors = {
        key.removeprefix(prefix): entry
        for key, entry in entries.items()
        if isinstance(entry, TensorStorageMetadata) and key.startswith(tuple(prefix + name for name in _PREFIXES))
    }

    def read(name: str) -> torch.Tensor:
        tensor = torch.empty(tensors[name].size, dtype=tensors[name].properties.dtype)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*single process.*")  # which is what we want
            try:
                dcp.load({prefix + name: tensor}, storage_reader=reader, no_dist=True)
            except CheckpointException as e:  # a BaseException, which `except Exception` would let through
                raise UserError(f"{prefix + name} cannot be read from {folder}, it is damaged: {e}.") from None
        return tensor

    shapes = {name: tuple(entry.size) for name, entry in tensors.items()}
    dtypes = {name: entry.properties.dtype for name, entry in tensors.items()}
    return check_shapes(Weights(folder, args, shapes, dtypes, read, manifest or {}))


def open_checkpoint(folder: Path) -> Weights:
    """Our step-N folder."""
    if not (folder / MANIFEST).is_file() and (steps := complete_steps(folder)):
        raise UserError(
            f"{folder} holds several checkpoints; name one: {', '.join(f'{folder.name}/step-{s}' for s in steps[-5:])}."
        )
    manifest = read_manifest(folder)
    for name, (size, _) in manifest.get("files", {}).items():
        actual = (folder / name).stat().st_size if (folder / name).is_file() else 0
        if actual != size:
            raise UserError(f"{folder / name} should have {size} bytes and has {actual}: it is damaged.")
    return open_dcp(folder, args_from_manifest(manifest["architecture"]), manifest)


def open_hugging_face(folder: Path) -> Weights:
    """A folder with config.json and *.safetensors. Logs a warning about each of these that is not read."""
    weight_files(folder)  # an adapter has no config.json: say first what it is
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} has weights and no config.json, which says of what model they are: fetch it too.")
    args = read_config(folder)
    stored = check_weights(folder, args, logger.warning).tensors
    shapes = parameter_shapes(args)

    def read(name: str) -> torch.Tensor:
        with safe_open(stored[hf_name(name)].file, framework="pt") as f:
            return f.get_tensor(hf_name(name))

    dtypes = {name: SAFETENSORS_DTYPES[stored[hf_name(name)].dtype] for name in shapes}
    return Weights(folder, args, shapes, dtypes, read)


class _StreamingPlanner(DefaultSavePlanner):
    """Plans with tensors on the meta device, and reads each when it is written."""

    def __init__(self, read: Callable[[str], torch.Tensor]):
        super().__init__()
        self._read = read

    def lookup_object(self, index: MetadataIndex) -> torch.Tensor:
        return self._read(index.fqn).contiguous()


def write_dcp(writer: FileSystemWriter, tensors: dict[str, torch.Tensor], read: Callable[[str], torch.Tensor]) -> None:
    """Write a DCP folder from one process, tensor by tensor. tensors: on the meta device, by key.

    The writer needs single_file_per_rank = False: PyTorch holds every tensor of a file until the file is closed.
    """
    assert not writer.single_file_per_rank
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*single process.*")
        dcp.save(tensors, storage_writer=writer, planner=_StreamingPlanner(read), no_dist=True)


def write_checkpoint(weights: Weights, out: Path, manifest: dict[str, Any]) -> Path:
    """Write out/step-0/, which checkpoint.initial_load_path can start from, and return it. It holds the model only.

    manifest: entries that replace the defaults below.
    """
    target = new_folder(out / "step-0")
    entries = {
        "format": MANIFEST_FORMAT,
        "step": 0,
        "tokens_seen": 0,
        "stage": "converted",
        "tokenizer": None,
        "seq_len": None,
    }
    entries |= {"plan": {}, "world_size": 1, **manifest, "architecture": as_json(weights.args)}
    tensors = {f"model.{n}": torch.empty(s, dtype=weights.dtypes[n], device="meta") for n, s in weights.shapes.items()}
    with explain_failure(out):
        writer = WholeWriter(target, entries, single_file_per_rank=False)
        write_dcp(writer, tensors, lambda key: weights.read(key.removeprefix("model.")))
    return target
