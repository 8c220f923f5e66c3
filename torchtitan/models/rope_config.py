"""RopeArgs from a stage's [rope] table, and what is said of them in the log."""

from __future__ import annotations

import math

from torchtitan.config.schema import Rope
from torchtitan.models.rope import RopeArgs, inverse_frequencies, longest_wavelength
from torchtitan.models.rope_method import ntk_theta
from torchtitan.models.rope_scaling import GeneScaling, LongRopeScaling, YarnScaling, method_of
from torchtitan.tools.errors import UserError


def build_rope(
    table: Rope,
    model: RopeArgs,
    head_dim: int,
    n_kv_heads: int,
    length: int,
    before: RopeArgs | None = None,
    random: bool = False,
) -> RopeArgs:
    """What [rope] makes of the model's own RoPE for rows that reach position `length`.

    before: the RoPE of the previous stage, from which theta = "auto" goes on. random: from random weights, so that the
    length of the model's published weights is not what this one is trained for. The table has been through
    rope_checks.py; UserError for what depends on the model: lists of the wrong length, a length that is not known.
    """
    if head_dim < 4:
        raise UserError(f"Heads of {head_dim} have one pair, so RoPE has no base: a model needs heads of at least 4.")
    theta = model.theta if table.theta is None else table.theta
    if theta == "auto":
        theta = _auto_theta(before or model, head_dim, length)
    # a stage with shorter rows than the previous one goes on with its base
    reach = max(length, (before.max_position_embeddings or 0) if before else 0)
    if table.type == "model":
        scaling = model.scaling
    else:
        method = method_of(table.type)
        scaling = method.from_toml(table, head_dim, n_kv_heads) if method else None
    scaling = scaling and scaling.trained_at(reach)
    # a later stage can have shorter rows, and GeNE is trained for its whole factor
    known = before or (RopeArgs() if random else model)
    covered = max(length, known.max_position_embeddings or 0)
    if isinstance(scaling, GeneScaling):
        covered = max(covered, round(scaling.factor * scaling.original_max_position_embeddings))
    if table.type != "model" and scaling and model.layers == "full_attention" and table.layers == "all":
        raise UserError(
            f'rope.type = "{table.type}" with rope.layers = "all" would rescale every layer of a model whose '
            'sliding-window layers keep their frequencies (Olmo 3): set rope.layers = "full_attention".'
        )
    layers = model.layers if table.type == "model" and table.layers == "all" else table.layers
    rope = RopeArgs(float(theta), scaling, layers, covered)
    check_angles(rope, head_dim, "[rope] and the model")
    return rope


def check_angles(rope: RopeArgs, head_dim: int, where: str) -> None:
    """UserError, which `where` begins, for numbers with which RoPE turns no pair of a text, or is not defined."""
    try:
        frequencies = inverse_frequencies(rope, head_dim)
        slowest, fastest = float(frequencies.min()), float(frequencies.max())
        magnitude = rope.scaling.magnitude() if rope.scaling else 1.0
    except ArithmeticError:  # division by 0, or no float64 is so large
        found = "cannot be computed"
    else:
        if 1e-15 < slowest <= fastest <= 2 * math.pi and 0 < magnitude < 1e4:
            return
        found = (
            f"turns its pairs by {slowest:.3g} to {fastest:.3g} radians per token (1e-15 to 2 pi are possible) and "
            f"multiplies cos and sin by {magnitude:.3g} (above 0 and below 10,000)"
        )
    numbers = {"theta": rope.theta, **(vars(rope.scaling) if rope.scaling else {})}
    shown = ", ".join(f"{k} = {v:g}" for k, v in numbers.items() if isinstance(v, float))
    raise UserError(f"{where}: RoPE with {shown} {found}: one of these numbers is wrong.")


def _auto_theta(before: RopeArgs, head_dim: int, length: int) -> float:
    if before.max_position_embeddings is None:
        raise UserError(
            'rope.theta = "auto" raises the base of the previous stage by the growth in length, but the length that '
            "the model was trained for is not known: give stage.after, a config.json "
            '(model.flavor = "auto"), or a number.'
        )
    theta = before.scaling.theta(before.theta, head_dim) if before.scaling else before.theta
    # a stage that is shorter than the previous one keeps its base
    return ntk_theta(theta, max(length / before.max_position_embeddings, 1.0), head_dim)


def check_mixed_window(mixed_window: bool, rope: RopeArgs) -> None:
    """UserError unless training tells rows apart (rope.mixed_window) if, and only if, LongRoPE's lists differ."""
    scaling = rope.scaling if isinstance(rope.scaling, LongRopeScaling) else None
    if mixed_window and not scaling:
        raise UserError(
            "rope.mixed_window = true tells rows apart for LongRoPE's two lists, but this model does not have them: "
            'leave it out, or set rope.type = "longrope".'
        )
    if scaling and scaling.short_factor != scaling.long_factor and not mixed_window:
        raise UserError(
            "RoPE has a short list for texts up to rope.original_max_position_embeddings = "
            f"{scaling.original_max_position_embeddings}, which is used for them at inference, but every row would be "
            "trained with the long one. Set rope.mixed_window = true, which tells rows apart, or one list for both "
            '(rope.type = "longrope" with long_factor alone).'
        )


def describe_rope(rope: RopeArgs, magnitude: bool = True) -> str:
    """One line for the log: theta, the method and its numbers; by what cos and sin are multiplied, if they are."""
    text = f"theta {rope.theta:g}"
    if rope.scaling:
        values = {k: v for k, v in vars(rope.scaling).items() if k != "rope_type" and v is not None}
        text += f", {rope.scaling.rope_type}: {', '.join(f'{k} {_shown(v)}' for k, v in values.items())}"
        times = rope.scaling.magnitude()
        text += f"; cos and sin times {times:g}" if magnitude and times != 1 else ""
    return text + (", on full-attention layers only" if rope.scaling and rope.layers == "full_attention" else "")


def _shown(value: object) -> str:
    if isinstance(value, tuple):
        return f"{value[0]:g} to {value[-1]:g} ({len(value)} numbers)"
    return str(value).lower() if isinstance(value, bool) else f"{value:g}"


def rope_warnings(rope: RopeArgs, head_dim: int, length: int, compared: bool = False) -> list[str]:
    """What looks wrong about a RoPE for rows that reach position `length`, in sentences with the arithmetic.

    compared: with that of its weights (rope_change.py), which says how far its factor takes them."""
    warnings = []
    if isinstance(rope.scaling, YarnScaling) and not compared:
        covered = rope.scaling.factor * rope.scaling.original_max_position_embeddings
        if covered < length:
            warnings.append(
                f"YaRN's factor {rope.scaling.factor:g} of {rope.scaling.original_max_position_embeddings:,} tokens "
                f"covers {covered:,.0f}, but rows reach position {length:,}: a factor of "
                f"{length / rope.scaling.original_max_position_embeddings:g} would do."
            )
    wave = longest_wavelength(rope, head_dim)
    if wave >= length:
        return warnings
    return [
        *warnings,
        f"RoPE's slowest pair turns once in {wave:,.0f} tokens (2 pi / its frequency, theta = {rope.theta:g}, "
        f"{head_dim // 2} pairs), but rows reach position {length:,}: no pair tells apart what is more than a turn "
        f"away. Without rescaling a theta of {smallest_theta(length, head_dim):.3g} would do.",
    ]


def smallest_theta(length: int, head_dim: int) -> float:
    """The base whose slowest pair turns once in `length` tokens: (length / 2 pi)^(D / (D - 2))."""
    return (length / (2 * math.pi)) ** (head_dim / (head_dim - 2))
