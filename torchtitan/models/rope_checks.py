"""Does [rope] make sense by itself? Asked without PyTorch, so that a misspelt key is answered at once."""

from __future__ import annotations

from torchtitan.config.schema import JobConfig, Rope
from torchtitan.models import rope_scaling
from torchtitan.models.rope_method import Keys
from torchtitan.tools.errors import UserError


def check_rope(config: JobConfig) -> None:
    """UserError for keys of [rope] that are missing, that rope.type does not read, or that contradict one another."""
    rope, default = config.rope, Rope()
    keys_of = {"model": Keys(optional=("mixed_window",)), "none": Keys()}
    for method in rope_scaling.methods():
        keys_of |= method.toml()
    needed, optional = keys_of[rope.type]
    if missing := [f"rope.{key}" for key in needed if not getattr(rope, key)]:
        raise UserError(
            f'rope.type = "{rope.type}" needs {" and ".join(missing)}, which {"are" if missing[1:] else "is"} not set.'
        )
    for key, value in vars(rope).items():
        if key not in ("type", "theta", "layers", "allow", *needed, *optional) and value != getattr(default, key):
            readers = [kind for kind, keys in keys_of.items() if key in keys.needed + keys.optional]
            raise UserError(
                f'rope.{key} = {value} is read by rope.type = {", ".join(readers)} only, but rope.type = "{rope.type}"'
                f"{' (the default: as the model says)' if rope.type == 'model' else ''}: nothing would be rescaled by "
                "it. Change one of the two."
            )
    for low, high, standard in (("beta_slow", "beta_fast", (1, 32)), ("low_freq_factor", "high_freq_factor", (1, 4))):
        ends = [standard[i] if getattr(rope, key) is None else getattr(rope, key) for i, key in enumerate((low, high))]
        if ends[0] >= ends[1]:
            raise UserError(f"rope.{low} = {ends[0]:g} must be less than rope.{high} = {ends[1]:g}.")
    if rope.type == "harpe" and rope.theta is not None:
        raise UserError('rope.type = "harpe" takes a base for each head from rope.bases: leave rope.theta out.')
    if rope.mixed_window and config.data.packing != "best_fit":
        raise UserError(
            f"rope.mixed_window = true packs short and long documents into rows of their own, which data.packing = "
            f'"{config.data.packing}" cannot: use "best_fit".'
        )
