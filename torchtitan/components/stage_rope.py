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
    line = f"{describe_rope(rope)}; positions reach {to:,}"
    refused: dict[str, str] = {}
    warnings = rope_warnings(rope, args.head_dim, to)
    if piled := piled_up(model.rope, rope, args.head_dim, to):
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
        f"; the weights have {describe_rope(before)}, trained to {f'{trained:,}' if trained else 'an unknown length'}"
    )
    line += f" and good for {known:,} by their factor" if known and known != trained else ""
    if known is None:
        warnings.append(
            "The length that the weights were trained to is not known (no max_position_embeddings), so whether RoPE "
            f"takes them to {to:,} is not checked."
        )
    elif (covered := coverage(before, rope, args.head_dim, windows, to)) != float("inf"):
        line += f"; from there these frequencies cover {covered:,.0f}"
    if text := changed_magnitude(before, rope):
        line += f"; {text}"
    if text := beyond_trained(before, rope, args.head_dim, to, windows):
        length = config.data.target_seq_len or config.training.seq_len
        build = partial(_built, model=model, length=length, before=before)
        ways = ways_out(config.rope, build, before, args.head_dim, to, windows)
        ways.append(f"documents or rows of at most {known:,} tokens")
        refused["beyond_trained"] = f"{text} What would do: {'; or '.join(ways)}."
    if text := lost_rope(before, rope, args.head_dim, to, windows):
        refused["faster_than_trained"] = (
            f"The weights were trained with RoPE that this stage would take back: {text}. A stage takes its RoPE from "
            f'its own TOML (rope.type = "{config.rope.type}") and model.flavor, never from a checkpoint: write there '
            "what the weights were trained with, or more."
        )
    return StageRope(line, refused, warnings)


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
    return f"{' '.join(left.values())} If it is meant, set rope.allow = [{names}]."


def _built(table: Rope, model: TransformerArgs, length: int, before: RopeArgs) -> RopeArgs:
    return build_rope(table, model.rope, model.head_dim, model.n_kv_heads, length, before)
