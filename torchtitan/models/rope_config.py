"""RopeArgs from a stage's [rope] table, and from Hugging Face's config.json and back."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, Literal

from torchtitan.config.schema import Rope
from torchtitan.models.rope import RopeArgs, longest_wavelength
from torchtitan.models.rope_scaling import (
    DynamicNTKScaling,
    GeneScaling,
    HarpeScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    NTKScaling,
    Scaling,
    YarnScaling,
    ntk_theta,
)
from torchtitan.tools.errors import UserError


def build_rope(
    table: Rope, model: RopeArgs, head_dim: int, n_kv_heads: int, length: int, before: RopeArgs | None = None
) -> RopeArgs:
    """What [rope] makes of the model's own RoPE for rows that reach position `length`.

    before: the RoPE of the stage before, from which theta = "auto" goes on. The table has been through
    config/checks.py; UserError for what depends on the model: lists of the wrong length, a length that is not known.
    """
    theta = model.theta if table.theta is None else table.theta
    if theta == "auto":
        theta = _auto_theta(before or model, head_dim, length)
    # a stage with shorter rows than the one before goes on with its base
    reach = max(length, (before.max_position_embeddings or 0) if before else 0)
    if table.type == "model":
        scaling = model.scaling
        if isinstance(scaling, DynamicNTKScaling) and scaling.length is None:
            scaling = replace(scaling, length=reach)
    else:
        scaling = _scaling(table, head_dim, n_kv_heads, reach)
    # a later stage can have shorter rows, and GeNE is trained for its whole factor
    covered = max(length, *(rope.max_position_embeddings or 0 for rope in (model, before or model)))
    if isinstance(scaling, GeneScaling):
        covered = max(covered, round(scaling.factor * scaling.original_max_position_embeddings))
    if table.type != "model" and scaling and model.layers == "full_attention" and table.layers == "all":
        raise UserError(
            f'rope.type = "{table.type}" with rope.layers = "all" would rescale every layer of a model whose '
            'sliding-window layers keep their frequencies (Olmo 3): set rope.layers = "full_attention".'
        )
    layers = model.layers if table.type == "model" and table.layers == "all" else table.layers
    return RopeArgs(float(theta), scaling, layers, covered)


def _auto_theta(before: RopeArgs, head_dim: int, length: int) -> float:
    if before.max_position_embeddings is None:
        raise UserError(
            'rope.theta = "auto" raises the base of the stage before by the growth in length, but the length that the '
            'model was trained for is not known: give stage.after, a config.json (model.flavor = "auto"), or a number.'
        )
    theta, scaling = before.theta, before.scaling
    if isinstance(scaling, NTKScaling):
        theta = ntk_theta(theta, scaling.factor, head_dim)
    elif isinstance(scaling, DynamicNTKScaling):
        theta = scaling.theta(theta, head_dim)
    # a stage that is shorter than the one before keeps its base
    return ntk_theta(theta, max(length / before.max_position_embeddings, 1.0), head_dim)


def _scaling(table: Rope, head_dim: int, n_kv_heads: int, length: int) -> Scaling | None:
    factor, original = table.factor or 1.0, table.original_max_position_embeddings or 0
    match table.type:
        case "linear":
            return LinearScaling(factor)
        case "ntk":
            return NTKScaling(factor)
        case "dynamic":
            return DynamicNTKScaling(factor, original, length)
        case "ntk_by_parts":
            return Llama3Scaling(factor, _or(table.beta_slow, 1.0), _or(table.beta_fast, 32.0), original)
        case "llama3":
            return Llama3Scaling(factor, _or(table.low_freq_factor, 1.0), _or(table.high_freq_factor, 4.0), original)
        case "yarn":
            return YarnScaling(
                factor,
                original,
                _or(table.beta_fast, 32.0),
                _or(table.beta_slow, 1.0),
                table.truncate,
                table.attention_factor,
                table.mscale,
                table.mscale_all_dim,
            )
        case "longrope":
            # without rows of their own, short texts have been trained with the long list too
            unset = (1.0,) * (head_dim // 2) if table.mixed_window else table.long_factor
            short = table.short_factor or unset
            for key, values in (("long_factor", table.long_factor), ("short_factor", short)):
                if len(values) != head_dim // 2:
                    raise UserError(
                        f"rope.{key} has {len(values)} numbers, but the model's heads of {head_dim} have "
                        f"{head_dim // 2} pairs, and each needs its own."
                    )
            return LongRopeScaling(original, table.long_factor, short, table.attention_factor, table.factor)
        case "gene":
            return GeneScaling(factor, original)
        case "harpe":
            if len(table.bases) != n_kv_heads:
                raise UserError(
                    f"rope.bases has {len(table.bases)} numbers, but the model has {n_kv_heads} key-value heads, and "
                    "each needs its own (query heads share that of theirs)."
                )
            return HarpeScaling(table.bases)
        case _:
            return None


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


def describe_rope(rope: RopeArgs) -> str:
    """One line for the log: theta, the method and its numbers."""
    text = f"theta {rope.theta:g}"
    if rope.scaling:
        values = {k: v for k, v in vars(rope.scaling).items() if k != "rope_type" and v is not None}
        shown = (f"{k} ({len(v)} numbers)" if isinstance(v, tuple) else f"{k} {v:g}" for k, v in values.items())
        text += f", {rope.scaling.rope_type}: {', '.join(shown)}; cos and sin times {rope.scaling.magnitude():g}"
    return text + (", on full-attention layers only" if rope.scaling and rope.layers == "full_attention" else "")


def rope_warnings(rope: RopeArgs, head_dim: int, length: int) -> list[str]:
    """What looks wrong about a RoPE for rows that reach position `length`, in sentences with the arithmetic."""
    warnings = []
    if isinstance(rope.scaling, YarnScaling):
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


def lost_rope(old: RopeArgs, new: RopeArgs, head_dim: int) -> str | None:
    """How `new` covers less than the RoPE that the weights were trained with, if it does, in words with the numbers.

    What decides is what the model sees: the slowest pair must not turn faster than before, whatever the method is
    called. And the original length of a method must not grow: its factor is against the length before any rescaling.
    """
    was, now = longest_wavelength(old, head_dim), longest_wavelength(new, head_dim)
    change = f"{describe_rope(old)} -> {describe_rope(new)}"
    if now < was * 0.99:
        return f"the slowest pair turned once in {was:,.0f} tokens and would in {now:,.0f} ({change})"
    a, b = (getattr(r.scaling, "original_max_position_embeddings", None) for r in (old, new))
    same = old.scaling and new.scaling and old.scaling.rope_type == new.scaling.rope_type
    if same and a and b and b > a:
        return (
            f"original_max_position_embeddings {a} -> {b}, while a factor is always against the length before any "
            f"rescaling, {a} in every stage ({change})"
        )
    return None


def smallest_theta(length: int, head_dim: int) -> float:
    """The base whose slowest pair turns once in `length` tokens: (length / 2 pi)^(D / (D - 2))."""
    return (length / (2 * math.pi)) ** (head_dim / (head_dim - 2))


def rope_from_hf(config: dict[str, Any], where: str) -> RopeArgs:
    """The RoPE of a config.json; `where` begins the message of a UserError."""
    # transformers 5 keeps everything in rope_parameters; 4 has rope_theta and rope_scaling, which win where both stand
    rope = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
    length = config.get("trained_length") or config.get("max_position_embeddings")  # the former is ours, see rope_to_hf
    # a model with windows has RoPE by kind of layer: {"full_attention": {...}, "sliding_attention": {...}}
    layers: Literal["all", "full_attention"] = "all"
    if "full_attention" in rope:
        sliding = rope.get("sliding_attention", rope["full_attention"])
        layers = "all" if sliding == rope["full_attention"] else "full_attention"
        rope = dict(rope["full_attention"])
    theta = float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0)
    kind = rope.get("rope_type", rope.get("type", "default"))
    original = config.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings")

    def number(key: str, default: float | None = None) -> float:
        value = rope.get(key, default)
        if value is None:
            raise UserError(f"{where}: the {kind} rope scaling lacks {key}.")
        return float(value)

    def original_length() -> int:
        if original is None:
            raise UserError(f"{where}: the {kind} rope scaling lacks original_max_position_embeddings.")
        return int(original)

    def ratio() -> float | None:
        """transformers' rule where longrope and yarn give no factor."""
        return length / original_length() if length else None

    scaling: Scaling | None
    match kind:
        case "default":
            scaling = None
        case "linear":
            scaling = LinearScaling(number("factor"))
        case "dynamic":
            scaling = DynamicNTKScaling(number("factor"), int(original or config.get("max_position_embeddings") or 0))
        case "llama3":
            scaling = Llama3Scaling(
                number("factor"), number("low_freq_factor"), number("high_freq_factor"), original_length()
            )
        case "yarn":
            scaling = YarnScaling(
                number("factor", ratio()),
                original_length(),
                float(rope.get("beta_fast") or 32),
                float(rope.get("beta_slow") or 1),
                rope.get("truncate", True),
                rope.get("attention_factor"),
                rope.get("mscale"),
                rope.get("mscale_all_dim"),
            )
        case "longrope":
            scaling = LongRopeScaling(
                original_length(),
                tuple(map(float, rope["long_factor"])),
                tuple(map(float, rope["short_factor"])),
                rope.get("attention_factor"),
                rope.get("factor") or ratio(),
            )
        case _:
            raise UserError(
                f'{where}: rope_type = "{kind}" is not supported; supported are default, linear, dynamic, llama3, yarn '
                "and longrope."
            )
    return RopeArgs(theta, scaling, layers, length)


def rope_to_hf(rope: RopeArgs, head_dim: int) -> tuple[dict[str, Any], int]:
    """(rope_parameters, max_position_embeddings) for config.json; UserError where Hugging Face has no form for it."""
    length = rope.max_position_embeddings
    if length is None:
        raise UserError(
            "The length that the model was trained for is not known, and config.json needs max_position_embeddings: "
            "give it (scripts/convert.py --max-position-embeddings)."
        )
    if rope.scaling is None:
        return {"rope_type": "default", "rope_theta": rope.theta}, length
    form = rope.scaling.hf(rope.theta, head_dim)
    # transformers says that a factor "must be a float"
    form = {k: float(v) if k in ("rope_theta", "factor", "attention_factor") else v for k, v in form.items()}
    match form["rope_type"]:
        case "linear":  # vLLM multiplies it by the factor
            length = math.ceil(length / max(form["factor"], 1.0))
        case "yarn":  # else transformers warns, and vLLM computes this product itself
            length = round(form["factor"] * form["original_max_position_embeddings"])
        case "dynamic":
            assert isinstance(rope.scaling, DynamicNTKScaling)
            length = rope.scaling.original_max_position_embeddings
        case "llama3":  # transformers wants it longer than the original
            length = max(length, form["original_max_position_embeddings"] + 1)
    return form, length
