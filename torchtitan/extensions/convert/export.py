"""A model out as a Hugging Face folder: complete or absent, with one tensor in memory at a time."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from torchtitan.components.hooks import Hook
from torchtitan.components.manifest import export_folder
from torchtitan.datasets.tokenizer import load_tokenizer
from torchtitan.extensions.convert.weights import Weights, open_checkpoint
from torchtitan.models.hf.config import config_json
from torchtitan.models.hf.weights import hf_name
from torchtitan.tools.errors import UserError
from torchtitan.tools.folders import partial_of, put_aside, read_json, sync, written
from torchtitan.tools.logging import logger

SHARD_BYTES = 5 * 10**9
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
_SAFETENSORS = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_EXPECTED = "expected.json"


class Export(Hook):
    """Writes the last checkpoint of a stage as a Hugging Face folder, if checkpoint.last_save_in_hf is true."""

    def started(self, trainer: Any) -> None:
        """Rank 0 puts aside what an earlier run exported for later steps: it would pass for this run's."""
        if trainer.rank == 0 and (trainer.step == 0 or trainer.config.checkpoint.load_step >= 0):
            folder = export_folder(trainer.config, 0).parent
            if aside := put_aside(folder, trainer.step or -1):
                logger.info(f"what an earlier run left in {folder} is in {aside} now")

    def ended(self, trainer: Any) -> None:
        """Collective. Each rank writes some of the files; a folder that exists is left as it is."""
        config, checkpointer, rank = trainer.config, trainer.checkpointer, trainer.rank
        out = export_folder(config, trainer.step)
        if not (trainer.finished and checkpointer and config.checkpoint.last_save_in_hf) or out.exists():
            return
        ranks = dist.get_world_size()
        path, assets = checkpointer.folder / f"step-{trainer.step}", Path(config.model.hf_assets_path)
        dist.barrier(checkpointer.group)  # every rank has seen that it does not exist
        export(path, out, config.checkpoint.export_dtype, assets, part=rank, parts=ranks)
        dist.barrier(checkpointer.group)
        if rank == 0 and ranks > 1:
            publish(out)
        logger.info(f"Hugging Face folder: {out}")


def export(
    checkpoint: Path,
    out: Path,
    dtype: str | None,
    assets: Path | None = None,
    *,
    part: int = 0,
    parts: int = 1,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write the model of a step-N folder as a Hugging Face folder.

    dtype: "float32", "bfloat16" or "float16"; None: as saved. assets: the folder whose config.json is started from and
    whose tokenizer files are copied. No collectives: each of `parts` processes writes every parts-th shard file into
    out.partial/, part 0 all else; after a barrier, one of them calls publish(out). With parts = 1 that is done here.
    """
    write_hugging_face(
        open_checkpoint(checkpoint).cast(dtype), out, assets, part=part, parts=parts, shard_bytes=shard_bytes
    )


def write_hugging_face(
    weights: Weights,
    out: Path,
    assets: Path | None = None,
    *,
    part: int = 0,
    parts: int = 1,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """As export, from any reader."""
    if out.exists():
        raise UserError(f"{out} exists and is not overwritten: choose another folder, or delete that one.")
    files = _describe(weights, assets)  # first: what has no form there is refused before anything is written
    shards = plan_shards(weights, shard_bytes)
    partial = partial_of(out)
    try:
        partial.mkdir(parents=True, exist_ok=True)
        if part == 0:
            weight_map = {hf_name(name): file for file, names in shards.items() for name in names}
            if len(shards) > 1:
                total = sum(_bytes(weights, name) for name in weights.shapes)
                files["model.safetensors.index.json"] = {"metadata": {"total_size": total}, "weight_map": weight_map}
            for name, content in files.items():
                if isinstance(content, Path):
                    shutil.copyfile(content, partial / name)
                else:
                    (partial / name).write_text(json.dumps(content, indent=2) + "\n")
            (partial / _EXPECTED).write_text(json.dumps([*files, *shards]))
        for file, names in list(shards.items())[part::parts]:
            _write_shard(weights, names, partial / file)
        if parts == 1:
            publish(out)
    except OSError as error:
        there = next(path for path in (partial, *partial.absolute().parents) if path.exists())
        free = shutil.disk_usage(there).free / 2**30
        raise UserError(f"{partial} could not be written: {error}; {free:.2f} GiB are free there.") from error


def publish(out: Path) -> None:
    """Once all parts have been written: check that they are all there, and rename out.partial/ to out/."""
    partial = partial_of(out)
    expected = json.loads((partial / _EXPECTED).read_text())
    if missing := [name for name in expected if not (partial / name).is_file()]:
        raise RuntimeError(f"{partial} lacks {', '.join(missing[:5])}: a part of the export has not been written")
    for path in partial.iterdir():  # what a killed export with other shards left
        if path.name not in expected:
            path.unlink()
    for path in partial.iterdir():
        sync(path)
    partial.rename(out)
    sync(out.parent)


def plan_shards(weights: Weights, shard_bytes: int) -> dict[str, list[str]]:
    """Names by file, in the model's order, each file at most shard_bytes unless one tensor is larger."""
    groups: list[list[str]] = [[]]
    size = 0
    for name in weights.shapes:
        if groups[-1] and size + _bytes(weights, name) > shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += _bytes(weights, name)
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {f"model-{i:05}-of-{len(groups):05}.safetensors": names for i, names in enumerate(groups, 1)}


def _bytes(weights: Weights, name: str) -> int:
    return torch.Size(weights.shapes[name]).numel() * weights.dtypes[name].itemsize


def _write_shard(weights: Weights, names: list[str], path: Path) -> None:
    """One safetensors file: the header's length, the header as JSON, the tensors one after the other.

    By hand, because the safetensors library and PyTorch's HuggingFaceStorageWriter hold a whole file, three times over.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        start, end = end, end + _bytes(weights, name)
        kind = _SAFETENSORS[weights.dtypes[name]]
        header[hf_name(name)] = {"dtype": kind, "shape": list(weights.shapes[name]), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with written(path) as aside, aside.open("wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            f.write(weights.read(name).contiguous().flatten().view(torch.uint8).numpy())  # type: ignore[arg-type]


def _describe(weights: Weights, assets: Path | None) -> dict[str, dict[str, Any] | Path]:
    """All files but the weights: what they hold, or what they are a copy of."""
    original = _json(assets, "config.json")
    bos = eos = wrong = None
    has_tokenizer = assets is not None and any((assets / name).is_file() for name in TOKENIZER_FILES[:2])
    if has_tokenizer and assets is not None:
        try:
            tokenizer = load_tokenizer(assets)
            bos, eos = tokenizer.bos_id, tokenizer.eos_id
            trained_with = weights.manifest.get("tokenizer", tokenizer.fingerprint)
            if trained_with != tokenizer.fingerprint:
                wrong = f"{weights.where} was trained with another tokenizer than that of {assets}"
        except UserError:  # a SentencePiece tokenizer.model: copied, but not read
            pass
    if wrong:
        raise UserError(f"{wrong}: name the folder that it was trained with.")
    dtypes = {str(d).removeprefix("torch.") for d in weights.dtypes.values()}
    if len(dtypes) > 1:
        raise UserError(f"The weights in {weights.where} are {' and '.join(sorted(dtypes))}; name one dtype for all.")
    args = weights.args
    if args.rope.max_position_embeddings is None:
        args = replace(args, rope=replace(args.rope, max_position_embeddings=weights.manifest.get("seq_len")))
    config = config_json(args, dtypes.pop(), original, bos, eos)
    generation = _json(assets, "generation_config.json")
    for key in ("bos_token_id", "eos_token_id"):
        if generation.get(key) is None and config[key] is not None:
            generation[key] = config[key]
    files: dict[str, dict[str, Any] | Path] = {"config.json": config, "generation_config.json": generation}
    for name in TOKENIZER_FILES:
        if assets is not None and (assets / name).is_file():
            files[name] = assets / name
    if "tokenizer_config.json" in files:
        # else the old length stays the limit of whoever asks the tokenizer
        about, length = _json(assets, "tokenizer_config.json"), args.rope.max_position_embeddings or 0
        if about.get("model_max_length", length) < length:
            files["tokenizer_config.json"] = about | {"model_max_length": length}
    return files


def _json(folder: Path | None, name: str) -> dict[str, Any]:
    return {} if folder is None or not (folder / name).is_file() else read_json(folder / name)
