"""What a method of rescaling rotary frequencies is: a dataclass in rope_scaling.py (docs/rope.md: adding one).

The fields of its class are its keys in [rope] and in Hugging Face's rope_parameters, unless the class says otherwise.
f_j = theta^(-2j/D) is the frequency of pair j of a head of dimension D, w_j = 2 pi / f_j its wavelength in tokens, L0
the original length. Formulas are written in the order of operations of Hugging Face's code, so that in float32 they
give its very bits; training uses float64.

PyTorch is imported when frequencies are computed, not with this module: a login node without it checks [rope] too.
"""

from __future__ import annotations

from dataclasses import MISSING, dataclass, field, fields
from typing import Any, ClassVar, NamedTuple

from torchtitan.config.schema import Rope
from torchtitan.tools.errors import UserError

ORIGINAL = "original_max_position_embeddings"

Tensor = Any
"""torch.Tensor, which cannot be named here (see above)."""


def waves(theta: float, head_dim: int, dtype: Any = None) -> Tensor:
    """1 / f_j = theta^(2j/D), [D / 2]; dtype: a torch.dtype, None: float64."""
    import torch

    # on the CPU whatever the default device: a model is built on the meta device, and its RoPE is looked at
    return theta ** (torch.arange(0, head_dim, 2, dtype=dtype or torch.float64, device="cpu") / head_dim)


def plain_frequencies(theta: float, head_dim: int, dtype: Any = None) -> Tensor:
    """f_j, [D / 2]."""
    return 1.0 / waves(theta, head_dim, dtype)


def ntk_theta(theta: float, factor: float, head_dim: int) -> float:
    """The base whose slowest pair is `factor` times slower: theta * factor^(D / (D - 2))."""
    return theta * factor ** (head_dim / (head_dim - 2))


class Keys(NamedTuple):
    """Keys of [rope] beside type, theta and layers, which go with every method."""

    needed: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()


@dataclass(frozen=True)
class Scaling:
    """A method; the defaults here are those of a method that only changes the base."""

    rope_type: str = field(default="", init=False)
    """Names the method in manifests, and in Hugging Face's config.json if `from_hf` reads it from there."""

    in_hf: ClassVar[bool] = False
    """Whether config.json knows a rope_type of this name, with this method's fields as its keys."""

    @classmethod
    def toml(cls) -> dict[str, Keys]:
        """The values of rope.type that make it, each with its keys: fields without a default are needed."""
        keys = [f for f in fields(cls) if f.init]
        needed = tuple(f.name for f in keys if f.default is MISSING)
        return {cls.rope_type: Keys(needed, tuple(f.name for f in keys if f.name not in needed))}

    @classmethod
    def from_toml(cls, table: Rope, head_dim: int, n_kv_heads: int) -> Scaling:
        """The method of a checked table; a key that is not set has the default of its field here. UserError if it does
        not fit the model's heads."""
        values = {key: getattr(table, key) for keys in cls.toml()[table.type] for key in keys}
        return cls(**{key: value for key, value in values.items() if value is not None})

    @classmethod
    def from_hf(cls, values: dict[str, Any]) -> Scaling:
        """The inverse of `hf`. values: rope_parameters, in the types of the fields, and max_position_embeddings.
        KeyError for a field without a default that values lacks."""
        names = [f.name for f in fields(cls) if f.init and (f.name in values or f.default is MISSING)]
        return cls(**{name: values[name] for name in names})

    def hf(self, theta: float, head_dim: int) -> dict[str, Any]:
        """Hugging Face's rope_parameters; UserError if Hugging Face has no form for it."""
        if not self.in_hf:
            methods = ("frequencies", "magnitude", "of_tokens", "at_length", "drawn")
            if any(getattr(type(self), name) is not getattr(Scaling, name) for name in methods):
                raise UserError(
                    f'rope.type = "{self.rope_type}" has no form in config.json, so the model cannot be exported: set '
                    f"in_hf in {type(self).__name__} if transformers has this method, or write its form in hf()."
                )
            return {"rope_type": "default", "rope_theta": self.theta(theta, head_dim)}
        values = {name: value for name, value in vars(self).items() if value is not None}
        lists = {name: list(value) for name, value in values.items() if isinstance(value, tuple)}
        return {"rope_type": self.rope_type, "rope_theta": theta, **values, **lists}

    def hf_length(self, trained: int) -> int:
        """max_position_embeddings of a model that was trained for rows of `trained` tokens."""
        return trained

    def theta(self, theta: float, head_dim: int) -> float:
        """The base that the method uses in place of theta."""
        return theta

    def frequencies(self, theta: float, head_dim: int, dtype: Any = None) -> Tensor:
        """Radians per token for every pair, [D / 2] unless the method says otherwise; dtype None: float64."""
        return plain_frequencies(self.theta(theta, head_dim), head_dim, dtype)

    def magnitude(self) -> float:
        """What cos and sin are multiplied by."""
        return 1.0

    def of_tokens(self, frequencies: Tensor, long: Tensor | None, heads: slice) -> Tensor:
        """The frequencies that T tokens and these key-value heads use: a shape that broadcasts to [T, H, D / 2].

        long: bool [T], which tokens stand in rows with documents beyond L0; None: all.
        """
        return frequencies

    def trained_at(self, length: int) -> Scaling:
        """The method in a stage whose rows reach position `length`."""
        return self

    def at_length(self, length: int) -> Scaling:
        """The method for reading a document of `length` tokens, if it depends on the length."""
        return self

    def drawn(self, seq_len: int, seed: int, step: int, micro_batch: int) -> Scaling | None:
        """The method for one micro-batch, a function of the arguments, so that all ranks and a resumed run agree; None:
        it is not drawn."""
        return None


def with_factor(values: dict[str, Any]) -> dict[str, Any]:
    """transformers' rule for a factor that yarn or longrope leaves out."""
    length = values.get("max_position_embeddings")
    return {"factor": length / values[ORIGINAL], **values} if length else values
