"""The architecture as JSON in a checkpoint's manifest, and back."""

from __future__ import annotations

import json
from dataclasses import asdict, fields, replace
from typing import Any

from torchtitan.models import rope_scaling
from torchtitan.models.rope import RopeArgs
from torchtitan.models.transformer import TransformerArgs
from torchtitan.tools.errors import UserError


def as_json(args: TransformerArgs | RopeArgs) -> dict[str, Any]:
    """The architecture, or its RoPE alone, as JSON for a manifest; its rope_type names a scaling."""
    return json.loads(json.dumps(asdict(args)))


def complete(architecture: dict[str, Any]) -> dict[str, Any]:
    """An older manifest's architecture with the fields that were added since, so that it can be compared."""
    return as_json(args_from_manifest(architecture))


def args_from_manifest(architecture: dict[str, Any]) -> TransformerArgs:
    """The inverse of as_json. Fields that an older manifest lacks have their defaults; UserError for unknown fields."""
    rope = rope_from_manifest(architecture["rope"])
    values = {k: v for k, v in architecture.items() if k != "rope"}
    return replace(_build(TransformerArgs, values, ""), rope=rope)


def rope_from_manifest(rope: dict[str, Any]) -> RopeArgs:
    """The same for the RoPE alone."""
    rope = dict(rope)
    scaling = rope.get("scaling")
    if scaling is not None:
        kind = scaling["rope_type"]
        methods = {method.rope_type: method for method in rope_scaling.methods()}
        if kind not in methods:
            raise UserError(
                f'The manifest has rope.scaling.rope_type = "{kind}", which this version does not know; it knows '
                f"{', '.join(methods)}. It was written by a newer version: use that."
            )
        rope["scaling"] = _build(methods[kind], scaling, "rope.scaling.")
    return _build(RopeArgs, rope, "rope.")


def _build(cls: type, values: dict[str, Any], prefix: str) -> Any:
    """The frozen dataclass; JSON's lists are tuples there."""
    known = {field.name: field.init for field in fields(cls)}
    if unknown := sorted(set(values) - set(known)):
        raise UserError(
            f"The manifest's architecture has {prefix}{unknown[0]} = {values[unknown[0]]!r}, which this version does "
            "not know. It was written by a newer version: use that."
        )
    return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items() if known[k]})
