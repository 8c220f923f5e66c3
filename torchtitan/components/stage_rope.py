"""The RoPE of a stage beside that of the weights it starts from: what is refused, warned of and logged."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

from torchtitan.components.reach import reach
from torchtitan.components.start import Start
from torchtitan.config.schema import JobConfig, Rope
from torchtitan.models.architecture import rope_from_manifest
from torchtitan.models.flavor import architecture
from torchtitan.models.rope import RopeArgs
from torchtitan.models.rope_change import (
    Windows,
    beyond_trained,
    changed_magnitude,
    counts_from_less,
    coverage,
    lengths_covered,
    lost_rope,
    piled_up,
    ways_out,
)
from torchtitan.models.rope_config import build_rope, describe_rope, rope_warnings
from torchtitan.models.transformer import TransformerArgs
from torchtitan.tools.errors import UserError


class StageRope(NamedTuple):
    """What is said of a stage's RoPE, in sentences."""

    line: str
    """What it is, how far positions reach, and how far it takes the weights."""

    refused: dict[str, str]
    """Check (as in rope.allow) -> what it found."""

    warnings: list[str]
    change: str = ""
    """Of RoPE from the weights to the stage, in a sentence."""


def rope_of_weights(
    config: JobConfig, resumed: dict[str, Any] | None, stages_before: list[dict[str, Any]], weights: Start | None
) -> RopeArgs | None:
    """RoPE of the weights that a run starts, or started, from; its max_position_embeddings is the length that they were
    trained to. None if they are random, or if it is not known."""
    if resumed and resumed.get("rope_before"):
        # what it started from may be gone, or may have been a Hugging Face folder
        return rope_from_manifest(resumed["rope_before"])
    if stages_before:
        return rope_from_manifest(stages_before[-1]["rope"])
    if weights and weights.args is None:  # a folder without config.json: the flavor says what its weights are
        return architecture(config.model).rope
    return weights.args.rope if weights and weights.args else None


def stage_rope(config: JobConfig, args: TransformerArgs, before: RopeArgs | None) -> StageRope:
    """before: rope_of_weights()."""
    rope, to, model = args.rope, reach(config), architecture(config.model)
    windows: Windows = (None,)
    if args.sliding_window is not None:
        windows = (args.sliding_window,) if args.sliding_share == 1 else (None, args.sliding_window)
    magnitude = changed_magnitude(before, rope) if before else None
    line = f"{describe_rope(rope, magnitude is None)}; positions reach {to:,}"
    refused: dict[str, str] = {}
    compared = before is not None and lengths_covered(before) is not None
    warnings = rope_warnings(rope, args.head_dim, to, compared)
    if piled := piled_up(before or model.rope, rope, args.head_dim, to):
        warnings.append(piled)
    if before is None:
        own = lengths_covered(model.rope)
        if own and beyond_trained(model.rope, rope, args.head_dim, to, windows):
            warnings.append(
                f"The weights are random or not known, so nothing is refused; but the RoPE of {config.model.flavor} is "
                f"made for {own:,} tokens, is not rescaled for more, and positions reach {to:,}."
            )
        return StageRope(line, refused, warnings)
    if not piled and (text := counts_from_less(before, rope)):
        warnings.append(text)
    known = lengths_covered(before)
    trained = before.max_position_embeddings
    line += (
        f"; the weights have {describe_rope(before, False)}, trained to "
        f"{f'{trained:,}' if trained else 'an unknown length'}"
    )
    line += f" and good for {known:,} by their factor" if known and known != trained else ""
    if known is None:
        warnings.append(
            "The length that the weights were trained to is not known (no max_position_embeddings), so whether RoPE "
            f"takes them to {to:,} is not checked."
        )
    elif (covered := coverage(before, rope, args.head_dim, windows, to)) != float("inf"):
        line += f"; starting from them, this is enough for {covered:,.0f} tokens"
    if magnitude:
        line += f"; {magnitude}"
    lost = lost_rope(before, rope, args.head_dim, to, windows)
    if known and (beyond := beyond_trained(before, rope, args.head_dim, to, windows)):
        length = config.data.target_seq_len or config.training.seq_len
        build = partial(_built, model=model, length=length, before=before)
        ways = ways_out(config.rope, build, before, args.head_dim, to, windows)
        shorter = partial(build, length=known)(config.rope)
        only_short = getattr(rope.scaling, "short_factor", ()) != getattr(rope.scaling, "long_factor", ())
        if not lost and not only_short and not lost_rope(before, shorter, args.head_dim, known, windows):
            ways.append(f"documents or rows of at most {known:,} tokens")
        would_do = f" What would do: {'; or '.join(ways)}." if ways else ""
        refused["beyond_trained"] = f"{beyond[0]}{would_do}{'' if lost else f' {beyond[1]}'}"
    if lost:
        refused["faster_than_trained"] = (
            f'{lost} A stage takes its RoPE from its own TOML (rope.type = "{config.rope.type}") and model.flavor, '
            "never from a checkpoint: write there what the weights were trained with, or more."
        )
    was, now = describe_rope(before, False), describe_rope(rope, False)
    return StageRope(
        line, refused, warnings, f"RoPE stays ({was})." if was == now else f"RoPE changes ({was} -> {now})."
    )


def check_stage_rope(
    config: JobConfig, args: TransformerArgs, before: RopeArgs | None, start: Start | None
) -> StageRope:
    """What is said of a stage's RoPE. UserError if it is refused, and rope.allow does not name it.

    start: None also for a stage that is resumed: what it was begun with is said, and not refused.
    """
    found = stage_rope(config, args, before)
    if start and (refused := not_allowed(config, found)):
        raise UserError(f"{start.path}: {refused}")
    return found._replace(warnings=[*found.warnings, *found.refused.values()])


def not_allowed(config: JobConfig, found: StageRope) -> str | None:
    """What is refused and not in rope.allow, in one paragraph."""
    left = {check: text for check, text in found.refused.items() if check not in config.rope.allow}
    if not left:
        return None
    names = ", ".join(f'"{check}"' for check in (*config.rope.allow, *left))
    return f"{' '.join(left.values())} {found.change} If it is meant, set rope.allow = [{names}]."


def _built(table: Rope, model: TransformerArgs, length: int, before: RopeArgs) -> RopeArgs:
    return build_rope(table, model.rope, model.head_dim, model.n_kv_heads, length, before)
