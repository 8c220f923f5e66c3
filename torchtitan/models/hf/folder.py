"""A Hugging Face folder: which of its files hold the model, and what each tensor in them is, from the headers alone.

Training, conversion, merging, evaluation and search all ask here, so that they read the same file for a name, whatever
order the folder lists its files in. transformers 5.24 reads model.safetensors if it is there, else the files that
model.safetensors.index.json names; vLLM 0.32 the files that the index names, else every *.safetensors. A folder in
which these are different tensors is refused. (If there is a consolidated*.safetensors, vLLM reads that one alone.
Mistral publishes its models in both forms, so it is passed over here, and said.)
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from os.path import isfile, islink  # which answer for every text, a file name or not
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from torchtitan.tools.errors import UserError
from torchtitan.tools.folders import lfs_pointer, read_json

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_SHARD = re.compile(r"(.*-)(\d+)-of-(\d+)\.safetensors")
_OF_ADAPTERS = re.compile(r"^base_model\.|\.lora_|\bmodules_to_save\b")
_QUANTIZED_KEYS = ("quantization_config", "compression_config", "quantization", "quant_config")
_QUANTIZED_FILES = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")  # ModelOpt, GPTQ, AWQ
DEQUANTIZE = (
    "Quantized weights cannot be trained, converted or evaluated here: dequantize first, or fetch the model as it was "
    "before. With transformers: bitsandbytes by from_pretrained, model.dequantize(), save_pretrained; float8 by "
    "from_pretrained with quantization_config=FineGrainedFP8Config(dequantize=True); others by the tool they are from."
)


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as the header of its file describes it."""

    file: Path
    shape: tuple[int, ...]
    dtype: str
    """As safetensors names it: F32, BF16, I8, F8_E4M3, ..."""


@dataclass(frozen=True)
class StoredWeights:
    """The tensors of a folder, by Hugging Face's names."""

    folder: Path
    tensors: dict[str, StoredTensor]
    passed_over: tuple[str, ...]
    """A sentence for each *.safetensors that is not read."""


def is_hugging_face(folder: Path) -> bool:
    """Whether the folder holds a model or an adapter in Hugging Face's form, whole or not, that can be read or not."""
    patterns = (
        "*.safetensors",
        "*.safetensors.index.json",
        "*.safetensors.incomplete",
        "adapter_config.json",
        "pytorch_model*.bin*",
    )
    return any(path.name[0] != "." for pattern in patterns for path in folder.glob(pattern))


def in_hub_cache(folder: Path) -> str:
    """For a message: which folder is meant, if this one is of the hub's cache and holds the models' folders."""
    snapshots = sorted(path for path in (folder / "snapshots").glob("*") if path.is_dir())
    if not snapshots and folder.name == "snapshots":
        snapshots = sorted(path for path in folder.glob("*") if path.is_dir())
    if not snapshots:
        return ""
    return f" It is of the hub's cache, in which each version has its own folder: name {snapshots[-1]}."


def weight_files(folder: Path, asked: str = "") -> list[Path]:
    """The files that hold the model, from names and JSON files alone; UserError for a folder that cannot be read.

    asked: the TOML keys and values that name the folder, for the message that it has no weights.
    """
    return [folder / name for name in _choose(folder, asked)[0]]


def read_folder(folder: Path) -> StoredWeights:
    """The tensors of the model in the folder. Reads the headers of all *.safetensors, and no data.

    UserError unless each name is in one file of the folder, the one that the index says.
    """
    chosen, weight_map = _choose(folder, "")
    tensors: dict[str, StoredTensor] = {}
    for name in chosen:
        _add(_header(folder / name), tensors)
    for key, name in weight_map.items():
        if key not in tensors or tensors[key].file.name != name:
            where = f"it is in {tensors[key].file.name}" if key in tensors else "no file of the index does"
            raise UserError(
                f"{folder / INDEX} says that {key} is in {name}, which does not hold it ({where}): index and files are "
                "not of one model. Fetch the folder again."
            )
    passed_over = []
    for path in (folder / name for name in _safetensors(folder) if name not in chosen):
        try:
            others = _header(path)
        except UserError:
            passed_over.append(f"{path} is not read: it is damaged, and the model is in other files.")
            continue
        _add(others, dict(tensors))  # refuses the names that the model has
        names = f"{', '.join(list(others)[:2])}, ..." if others else "none"
        vllm = " vLLM reads it instead of these: delete it if it is of another state." * path.name.startswith(
            "consolidated"
        )
        passed_over.append(f"{path} is not read: it holds other names ({names}) than the model's files.{vllm}")
    return StoredWeights(folder, tensors, tuple(passed_over))


def sampled_digest(stored: StoredWeights) -> str:
    """SHA-256 of the names and sizes of the files that hold the tensors, and of 4 KiB at 16 places of each.

    Tells nodes with copies of different models apart without reading them; not a few bytes changed in one copy.
    """
    digest = hashlib.sha256()
    for path in sorted({tensor.file for tensor in stored.tensors.values()}):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            for place in range(16):
                file.seek(max(size - 4096, 0) * place // 15)
                digest.update(file.read(4096))
    return digest.hexdigest()


def _add(header: dict[str, StoredTensor], to: dict[str, StoredTensor]) -> None:
    """Put the tensors of one more file into `to`; UserError if a name is there already, or is that of an adapter."""
    for key, tensor in header.items():
        if _OF_ADAPTERS.search(key):
            raise _adapter(f"{tensor.file} holds {key}, which")
        if key in to:
            raise UserError(
                f"{to[key].file} and {tensor.file.name} both hold {key}: one of them is not of this model, or is an "
                "older copy. Move the one that is not meant, and all that belongs to it, out of the folder."
            )
        to[key] = tensor


def _choose(folder: Path, asked: str) -> tuple[list[str], dict[str, str]]:
    """(names of the files that hold the model, the index's weight_map or {})."""
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    _refuse_adapter(folder)
    _refuse_quantized(folder, config)
    found = _safetensors(folder)
    weight_map: dict[str, str] = {}
    if (folder / INDEX).is_file():
        weight_map = _weight_map(folder)
        chosen = sorted(set(weight_map.values()))
        if SINGLE in found and chosen != [SINGLE]:
            other = next(name for name in chosen if name != SINGLE)
            raise UserError(
                f"{folder} holds {SINGLE} and an index, {INDEX}, that names other files ({other}). transformers would "
                f"read {SINGLE}, vLLM the files of the index. Move the weights that are not meant out of the folder: "
                f"{SINGLE}, or the index and its files."
            )
        expected = chosen
    elif not found:
        raise _no_weights(folder, asked)
    else:
        chosen = [SINGLE] if SINGLE in found else found
        expected = [*chosen, *islice(_absent_shards(chosen), 100)]
    _refuse_incomplete(folder, expected, bool(weight_map))
    named = config.get("transformers_weights")  # transformers reads the file, or the index, of this name
    if named is not None and named != (INDEX if weight_map else SINGLE):
        raise UserError(
            f"{folder / 'config.json'}: transformers_weights = {named!r} says that the model is in another file than "
            f"{chosen[0]}. Keep the files that are meant in the folder, named as usual ({SINGLE}, or {INDEX} and its "
            "files), and delete the key."
        )
    return chosen, weight_map


def _refuse_incomplete(folder: Path, expected: list[str], by_index: bool) -> None:
    missing = [name for name in expected if not isfile(folder / name)]
    if missing:
        why = (
            f"{INDEX} names files that are not there" if by_index else "the names of the others say that there are more"
        )
        links = [name for name in missing if islink(folder / name)]
        link = f" {links[0]} is a link to {(folder / links[0]).readlink()}, which is not there." if links else ""
        more = f", ... ({len(missing)} files)" if len(missing) > 3 else ""
        partial = _partial_file(folder)
        cut = f" {partial} is the beginning of a file: a download was interrupted." if partial else ""
        raise UserError(
            f"{folder} is not whole: {why}. Missing: {', '.join(missing[:3])}{more}.{link}{cut} Fetch the folder again."
        )


def _partial_file(folder: Path) -> str:
    """What an interrupted download left, where hf download and browsers put it; "" for nothing."""
    places = (folder, folder / ".cache" / "huggingface" / "download")
    found = [path for place in places for path in sorted(place.glob("*.incomplete"))]
    return str(found[0].relative_to(folder)) if found else ""


def _safetensors(folder: Path) -> list[str]:
    # a name with a dot first is what macOS leaves beside a file
    return sorted(path.name for path in folder.glob("*.safetensors") if path.name[0] != "." and not path.is_dir())


def _weight_map(folder: Path) -> dict[str, str]:
    path, mend = folder / INDEX, "Fetch it again."
    try:
        weight_map = read_json(path, mend).get("weight_map")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from None
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{path} has no weight_map, which says in which file each tensor is. {mend}")
    for key, name in weight_map.items():
        if not isinstance(name, str) or not name.endswith(".safetensors") or {"/", "\\"} & set(name):
            raise UserError(f"{path}: weight_map.{key} = {name!r} is not the name of a *.safetensors beside it. {mend}")
    return weight_map


def _absent_shards(names: list[str]) -> Iterator[str]:
    """What model-00001-of-00003.safetensors says there should be beside it, and is not among `names`."""
    shards = {match.groups() for name in names if (match := _SHARD.fullmatch(name))}
    for prefix, total in sorted({(prefix, total) for prefix, _, total in shards}):
        numbers = {int(k) for p, k, t in shards if (p, t) == (prefix, total)}
        first = 0 if 0 in numbers else 1
        for number in range(first, first + int(total)):
            if number not in numbers:
                yield f"{prefix}{number:0{len(total)}}-of-{total}.safetensors"


def _no_weights(folder: Path, asked: str) -> UserError:
    if files := sorted(path.name for path in folder.glob("pytorch_model*.bin")):
        return UserError(
            f"{asked or folder}: the folder has its weights in {files[0]}, a form that is not read here, and no "
            "*.safetensors. Convert it with transformers: AutoModelForCausalLM.from_pretrained(FOLDER, dtype='auto')"
            ".save_pretrained(OUT), then copy the tokenizer's files to OUT."
        )
    if partial := _partial_file(folder):
        return UserError(
            f"{asked or folder}: the folder has no *.safetensors, but {partial}, the beginning of a file: a download "
            "was interrupted. Fetch the folder again."
        )
    return UserError(
        f"{asked or folder}: the folder has no *.safetensors.{in_hub_cache(folder)} Name a folder with the weights"
        + (", or leave the first key out to train from scratch." if asked else ".")
    )


def _refuse_adapter(folder: Path) -> None:
    for path in sorted(folder.glob("adapter_*")):
        if path.name == "adapter_config.json" or path.name.startswith("adapter_model."):
            base = None
            with suppress(OSError, UserError):  # the file is named anyway
                base = read_json(folder / "adapter_config.json").get("base_model_name_or_path")
            raise _adapter(str(path), f" adapter_config.json names the model that it is of: {base}." if base else "")


def _adapter(what: str, base: str = "") -> UserError:
    return UserError(
        f"{what} belongs to an adapter (LoRA or another of PEFT's), which is not read here: the model without it is "
        "another model. Merge it first (with PEFT: merge_and_unload, save_pretrained), or move it out of the folder to "
        f"take the weights without it.{base}"
    )


def _refuse_quantized(folder: Path, config: dict[str, Any]) -> None:
    says = [(f"{folder / 'config.json'}: {key}", "the key", value) for key, value in _quantization(config)]
    files = [folder / name for name in _QUANTIZED_FILES if (folder / name).is_file()]
    for where, what, value in says or [(str(path), "the file", read_json(path)) for path in files]:
        raise UserError(
            f'{where} says that the weights are quantized, by "{_method(value)}". {DEQUANTIZE} If they are plain '
            f"numbers already, delete {what}."
        )


def _quantization(config: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The keys, at any depth, that say how the weights are quantized, and their values."""
    for key, value in config.items():
        if key in _QUANTIZED_KEYS and value is not None and value is not False:
            yield prefix + key, value
        elif isinstance(value, dict):
            yield from _quantization(value, f"{prefix}{key}.")


def _method(value: Any) -> str:
    """The name of a method of quantization, from what a configuration says of it."""
    if not isinstance(value, dict):
        return str(value)
    inner = value.get("quantization")
    named = value.get("quant_method") or value.get("quant_algo") or (_method(inner) if inner else None)
    in_bits = "bitsandbytes" if value.get("load_in_8bit") or value.get("load_in_4bit") else None
    return str(named or in_bits or (f"{value['bits']} bits" if "bits" in value else value))


def _header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one file; UserError if it is not safetensors, or not whole."""
    try:
        with safe_open(path, framework="pt") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118  (not a dict)
            return {key: StoredTensor(path, tuple(s.get_shape()), s.get_dtype()) for key, s in slices.items()}
    except (SafetensorError, OSError) as error:
        why = str(error)
    try:
        pointer = lfs_pointer(path.read_bytes()) if path.stat().st_size < 1000 else ""
    except OSError:
        pointer = ""
    raise UserError(f"{path} cannot be read as safetensors: {why}. {pointer or 'Is it whole? Fetch it again.'}")
