"""Checkpoints of torchtitan (DCP) and of Meta's Llama (consolidated.*.pth), in and out.

Both rotate neighbouring rows of a head, (0, 1), (2, 3), ..., while Hugging Face and we rotate row j with row j + D / 2:
so the rows of wq and wk are reordered. These formats are known for Llama only: no biases, no query-key norms.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemWriter

from torchtitan.components.checkpoint import explain_failure
from torchtitan.extensions.convert.weights import Weights, check_shapes, open_dcp, write_dcp
from torchtitan.models.registry import FLAVORS
from torchtitan.models.rope import RopeArgs
from torchtitan.models.rope_scaling import Llama3Scaling
from torchtitan.models.transformer import TransformerArgs
from torchtitan.tools.errors import UserError
from torchtitan.tools.folders import new_folder, read_json, sync, written

_BY_COLUMN = ("attention.wo.weight", "feed_forward.w2.weight")  # cut by inputs over Meta's model-parallel files
_NOT_PARAMETERS = ("freqs_cis", "rope.freqs")  # tables that older versions saved


def to_half_split(rows: torch.Tensor, head_dim: int) -> torch.Tensor:
    """[H * D, dim] with pairs (2j, 2j + 1) -> with pairs (j, j + D / 2)."""
    return rows.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)


def to_interleaved(rows: torch.Tensor, head_dim: int) -> torch.Tensor:
    """The inverse of to_half_split."""
    return rows.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)


def _reordered(
    read: Callable[[str], torch.Tensor], reorder: Callable[[torch.Tensor, int], torch.Tensor], head_dim: int
) -> Callable[[str], torch.Tensor]:
    def read_reordered(name: str) -> torch.Tensor:
        tensor = read(name)
        return reorder(tensor, head_dim) if name.endswith(("wq.weight", "wk.weight")) else tensor

    return read_reordered


def _check_llama(args: TransformerArgs, whose: str) -> None:
    for key in ("qkv_bias", "qk_norm", "sliding_window"):
        if getattr(args, key):
            raise UserError(
                f"{whose} format is known for Llama only, and this model has {key}: use Hugging Face's format."
            )


# ---- torchtitan -------------------------------------------------------------------------------------------------


def open_torchtitan(folder: Path, args: TransformerArgs) -> Weights:
    """A DCP folder of torchtitan's Llama 3."""
    _check_llama(args, "torchtitan's")
    weights = open_dcp(folder, args)
    return replace(weights, read=_reordered(weights.read, to_half_split, args.head_dim))


def write_torchtitan(weights: Weights, out: Path) -> None:
    """Write what torchtitan loads with initial_load_path and initial_load_model_only: flat keys, no optimizer."""
    args = weights.args
    _check_llama(args, "torchtitan's")
    read, names = _reordered(weights.read, to_interleaved, args.head_dim), _with_output(weights)
    tensors = {n: torch.empty(s, dtype=weights.dtypes[of], device="meta") for n, (of, s) in names.items()}
    with explain_failure(out.parent), written(new_folder(out), durable=True) as partial:
        writer = FileSystemWriter(str(partial), single_file_per_rank=False)
        write_dcp(writer, tensors, lambda name: read(names[name][0]))


def _with_output(weights: Weights) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name to (our name, shape). A tied output matrix, which we do not save, is saved in these formats."""
    names = {name: (name, shape) for name, shape in weights.shapes.items()}
    return {**names, "output.weight": names.get("output.weight", names["tok_embeddings.weight"])}


# ---- Meta -------------------------------------------------------------------------------------------------------


def open_meta(folder: Path, args: TransformerArgs | None = None) -> Weights:
    """A folder with params.json and consolidated.*.pth, mapped into memory; model-parallel pieces are joined.

    args: the architecture, instead of what params.json says.
    """
    files = sorted(folder.glob("consolidated.*.pth"))
    if not files:
        raise UserError(
            f"{folder} has no consolidated.*.pth. Name Meta's folder, with params.json beside the .pth files."
        )
    try:
        shards = [torch.load(file, map_location="cpu", mmap=True, weights_only=True) for file in files]
    except Exception as e:  # a zip of pickles: anything can happen
        raise UserError(f"The .pth files in {folder} cannot be read: {type(e).__name__} {e}. Are they whole?") from None
    first = {name: tensor for name, tensor in shards[0].items() if not name.endswith(_NOT_PARAMETERS)}
    params = _params(folder)
    if params.get("sliding_window"):
        raise UserError(
            f"{folder / 'params.json'} has a sliding_window, which is read from Hugging Face's format only."
        )

    def cut(name: str) -> int | None:
        """The dimension along which the files' pieces are joined; None: each file has the whole tensor."""
        if len(shards) == 1 or first[name].ndim == 1:
            return None
        if name == "tok_embeddings.weight":  # by words in Llama 3, by features in Llama 1 and 2
            return 0 if first[name].shape[1] == params["dim"] else 1
        return 1 if name.endswith(_BY_COLUMN) else 0

    def shape(name: str) -> tuple[int, ...]:
        sizes, dim = list(first[name].shape), cut(name)
        if dim is not None:
            sizes[dim] *= len(shards)
        return tuple(sizes)

    def read(name: str) -> torch.Tensor:
        dim = cut(name)
        return first[name] if dim is None else torch.cat([shard[name] for shard in shards], dim)

    shapes = {name: shape(name) for name in first}
    args = args or args_from_params(params, shapes)
    _check_llama(args, "Meta's")
    dtypes = {name: tensor.dtype for name, tensor in first.items()}
    return check_shapes(Weights(folder, args, shapes, dtypes, _reordered(read, to_half_split, args.head_dim)))


def write_meta(weights: Weights, out: Path) -> None:
    """Write params.json and one consolidated.00.pth. torch.save needs the whole model in memory."""
    args = weights.args
    _check_llama(args, "Meta's")
    params = json.dumps(params_json(args), indent=1) + "\n"
    read = _reordered(weights.read, to_interleaved, args.head_dim)
    with written(new_folder(out), durable=True) as partial:
        partial.mkdir()
        (partial / "params.json").write_text(params)
        tensors = {name: read(of).contiguous() for name, (of, _) in _with_output(weights).items()}
        torch.save(tensors, partial / "consolidated.00.pth")
        sync(partial / "consolidated.00.pth")


def params_json(args: TransformerArgs) -> dict[str, Any]:
    """Meta's params.json; UserError for a RoPE or head_dim that it has no key for."""
    scaling = args.rope.scaling
    if scaling is not None and scaling != _llama3(args, scaled=True):
        raise UserError(
            f"Meta's params.json has no form for {scaling}, only for plain RoPE and that of Llama 3.1 and 3.2: use "
            "Hugging Face's format."
        )
    if args.head_dim * args.n_heads != args.dim:
        raise UserError(
            f"Meta's params.json has no head_dim, and {args.n_heads} heads of {args.head_dim} are not {args.dim}."
        )
    return {
        "dim": args.dim,
        "n_layers": args.n_layers,
        "n_heads": args.n_heads,
        "n_kv_heads": args.n_kv_heads,
        "vocab_size": args.vocab_size,
        # its rule is multiple_of * ceil(int(multiplier * int(8 / 3 dim)) / multiple_of)
        "ffn_dim_multiplier": (args.ffn_dim + 0.5) / int(8 * args.dim / 3),
        "multiple_of": 1,
        "norm_eps": args.norm_eps,
        "rope_theta": args.rope.theta,
        "use_scaled_rope": scaling is not None,
    }


def _params(folder: Path) -> dict[str, Any]:
    try:
        return read_json(folder / "params.json")
    except OSError as e:
        raise UserError(f"{folder / 'params.json'} cannot be read: {e.strerror}.") from None


def args_from_params(params: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> TransformerArgs:
    """The inverse of params_json; a published model is recognised by its sizes."""
    heads = params["n_heads"]
    scaled = bool(params.get("use_scaled_rope"))
    args = TransformerArgs(
        dim=params["dim"],
        n_layers=params["n_layers"],
        n_heads=heads,
        n_kv_heads=params.get("n_kv_heads") or heads,
        head_dim=params["dim"] // heads,
        ffn_dim=shapes["layers.0.feed_forward.w1.weight"][0],  # rather than by the rule of params_json
        vocab_size=shapes["tok_embeddings.weight"][0],  # -1 in Llama 2's file
        norm_eps=params["norm_eps"],
        rope=RopeArgs(float(params.get("rope_theta", 10000.0))),
    )
    # the file says neither the published lengths nor that the small models of Llama 3.2 have tied embeddings
    for known in FLAVORS.values():
        same = replace(args, rope=known.rope, tied_embeddings=known.tied_embeddings) == known
        if same and known.rope.theta == args.rope.theta and scaled == (known.rope.scaling is not None):
            return known
    return replace(args, rope=replace(args.rope, scaling=_llama3(args, scaled)))


def _llama3(args: TransformerArgs, scaled: bool) -> Llama3Scaling | None:
    """Meta's use_scaled_rope: a factor of 8, or of 32 in Llama 3.2's text models, whose embeddings are tied."""
    return Llama3Scaling(32.0 if args.tied_embeddings else 8.0, 1.0, 4.0, 8192) if scaled else None
