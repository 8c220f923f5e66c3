"""What model.flavor names: a published size, a config.json, or an architecture of the user's own."""

from __future__ import annotations

from pathlib import Path

from torchtitan.config.schema import Model
from torchtitan.models.hf.config_in import read_config
from torchtitan.models.registry import FLAVORS
from torchtitan.models.transformer import TransformerArgs
from torchtitan.tools.errors import UserError
from torchtitan.tools.user_code import import_named


def architecture(model: Model) -> TransformerArgs:
    """The architecture that [model] names; UserError if there is none."""
    if model.flavor == "auto":
        return read_config(Path(model.hf_assets_path))
    if ":" in model.flavor:
        return _load(model.flavor)
    if model.flavor not in FLAVORS:
        raise UserError(
            f'model.flavor = "{model.flavor}" is not known; use auto, "module:NAME" (a TransformerArgs of your own) or '
            f"one of {', '.join(FLAVORS)}."
        )
    return FLAVORS[model.flavor]


def _load(flavor: str) -> TransformerArgs:
    """The TransformerArgs of "module:NAME"; UserError that says what is missing."""
    module, _, name = flavor.partition(":")
    key = f'model.flavor = "{flavor}"'
    args = import_named(flavor, key, ' must be a flavor or "module:NAME", e.g. "my_models:TINY".')
    if not isinstance(args, TransformerArgs):
        what = f"does not have {name}" if args is None else f"has {name} as a {type(args).__name__}"
        raise UserError(f"{key}, but {module} {what}; it must be a torchtitan.models.transformer.TransformerArgs.")
    return args
