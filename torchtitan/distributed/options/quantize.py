"""FP8 matrix products in the blocks' linear layers, through torchao (Micikevicius et al., arXiv 2209.05433).

The layers are replaced by torchao's before anything else is applied to the model, so that tensor parallelism, FSDP2,
recomputation and compilation see them as linear layers. Parameters, gradients and reductions keep their dtypes: values
are rounded to FP8 for each of a layer's three products, with a scale that is computed then.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from torchtitan.config.schema import Quantize
from torchtitan.models.transformer import Transformer, TransformerArgs, parameter_shapes
from torchtitan.tools.errors import UserError

MULTIPLE = 16
"""FP8 kernels (torch._scaled_mm) multiply matrices whose rows and columns are multiples of it."""

CAPABILITY = (8, 9)
"""The first CUDA compute capability with FP8: Ada; Hopper is 9.0. AMD's MI300 says 9.4."""


def fp8_layers(args: TransformerArgs, quantize: Quantize, tp: int = 1) -> dict[str, bool]:
    """Names of the blocks' linear layers, in the model's order, and whether each computes in FP8."""
    chosen = {}
    for name, shape in parameter_shapes(args).items():
        if not name.startswith("layers.") or len(shape) != 2:
            continue
        layer = name.removesuffix(".weight")
        outputs, inputs = shape
        if layer.endswith(("wo", "w2")):  # tensor parallelism cuts their inputs, and the outputs of the others
            inputs //= tp
        else:
            outputs //= tp
        fits = min(outputs, inputs) >= quantize.smallest_features and not (outputs % MULTIPLE or inputs % MULTIPLE)
        chosen[layer] = fits and not any(part in layer for part in quantize.filter_fqns)
    return chosen


def check_quantize(
    args: TransformerArgs, quantize: Quantize, tp: int, tokens: int, mlp_tile_tokens: int | None = None
) -> None:
    """UserError if [quantize] asks for what is impossible with this model or on this machine.

    tokens: of a rank's micro-batch. mlp_tile_tokens: training.mlp_tile_tokens, None without tiles.
    """
    if quantize.recipe_name == "none":
        if quantize.filter_fqns or quantize.emulate:
            raise UserError(
                'quantize.recipe_name = "none" (the default) quantizes nothing, but other keys of [quantize] are set: '
                'choose recipe_name = "rowwise" or "tensorwise", or leave them out.'
            )
        return
    layers = fp8_layers(args, quantize, tp)
    names = [*layers, "output"]
    for part in quantize.filter_fqns:
        if not any(part in name for name in names):
            kinds = dict.fromkeys(name.split(".", 2)[-1] for name in layers)
            raise UserError(
                f'quantize.filter_fqns names "{part}", which is part of no layer\'s name: layers are called layers.N. '
                f"and {', '.join(kinds)}, N from 0 to {args.n_layers - 1}."
            )
    if not any(layers.values()):
        raise UserError(
            f'quantize.recipe_name = "{quantize.recipe_name}" would quantize no layer: those of the blocks are all '
            f"named by quantize.filter_fqns = {list(quantize.filter_fqns)}, or have fewer features (on one of "
            f"{tp} tensor-parallel ranks) than quantize.smallest_features = {quantize.smallest_features}, or a number "
            f'of features that is not a multiple of {MULTIPLE}. Change one of the two, or set recipe_name = "none".'
        )
    _torchao()
    if quantize.emulate:
        return
    why = None
    if not torch.cuda.is_available():
        why = "this machine has no GPU"
    elif torch.cuda.get_device_capability() < CAPABILITY:
        major, minor = torch.cuda.get_device_capability()
        why = f"{torch.cuda.get_device_name()} has compute capability {major}.{minor}"
    if why:
        raise UserError(
            f'quantize.recipe_name = "{quantize.recipe_name}" needs a GPU with FP8 (compute capability 8.9, 9.0 or '
            f'later), but {why}. Set recipe_name = "none" to train in training.mixed_precision_param, or, to see what '
            "FP8 would do to the loss, quantize.emulate = true, which is slower than no FP8."
        )
    if tokens % MULTIPLE:
        raise UserError(
            f"FP8 kernels multiply multiples of {MULTIPLE} tokens, but a rank's micro-batch (training.seq_len * "
            f"local_batch_size / context_parallel_degree) has {tokens} = {tokens // MULTIPLE} * {MULTIPLE} + "
            f"{tokens % MULTIPLE}. Choose a training.seq_len that is a multiple of {MULTIPLE}, or no FP8 "
            '(quantize.recipe_name = "none").'
        )
    tile = tokens if mlp_tile_tokens is None else max(mlp_tile_tokens // tp, 1) * tp  # as tiled_mlp.py cuts it
    if tile < tokens and tile % MULTIPLE:
        raise UserError(
            f"FP8 kernels multiply multiples of {MULTIPLE} tokens, but training.mlp_tile_tokens = {mlp_tile_tokens} "
            f"makes tiles of {tile}"
            + (f" on {tp} tensor-parallel ranks" if tp > 1 else "")
            + f": choose a multiple of {MULTIPLE * tp if tp > 1 else MULTIPLE}."
        )


def apply_quantize(model: Transformer, quantize: Quantize, tp: int) -> None:
    """Replace the chosen layers by torchao's; their parameters stay the same objects under the same names."""
    torchao = _torchao()
    config = replace(torchao.Float8LinearConfig.from_recipe_name(quantize.recipe_name), emulate=quantize.emulate)
    chosen = fp8_layers(model.args, quantize, tp)
    torchao.convert_to_float8_training(
        model, config=config, module_filter_fn=lambda module, name: chosen.get(name, False)
    )


def describe_quantize(args: TransformerArgs, quantize: Quantize, tp: int) -> str:
    """For the log: in how many layers each projection is computed in FP8."""
    layers = fp8_layers(args, quantize, tp)
    kinds = {name.split(".", 2)[-1]: 0 for name in layers}
    for name, is_chosen in layers.items():
        kinds[name.split(".", 2)[-1]] += is_chosen
    counts = ", ".join(f"{kind} {count}" for kind, count in kinds.items())
    how = " (emulated)" if quantize.emulate else ""
    return f"FP8 {quantize.recipe_name}{how} in this many of {args.n_layers} layers: {counts}"


def _torchao() -> Any:
    """The module torchao.float8; UserError if it is not installed."""
    try:
        import torchao.float8
    except ImportError as error:
        raise UserError(
            f"quantize.recipe_name needs the package torchao ({error}): pip install -e '.[fp8]' in the repository."
        ) from None
    return torchao.float8
