"""The methods of rescaling rotary frequencies for longer contexts: one small dataclass each (see rope_method.py)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

from torchtitan.config.schema import Rope
from torchtitan.models.rope_method import (
    ORIGINAL,
    Keys,
    Scaling,
    Tensor,
    ntk_theta,
    plain_frequencies,
    waves,
    with_factor,
)
from torchtitan.tools.errors import UserError


@dataclass(frozen=True)
class LinearScaling(Scaling):
    """Position interpolation (arXiv 2306.15595): f_j / factor."""

    factor: float
    rope_type: str = field(default="linear", init=False)
    in_hf = True

    def frequencies(self, theta: float, head_dim: int, dtype: Any = None) -> Tensor:
        return plain_frequencies(theta, head_dim, dtype) / self.factor

    def hf_length(self, trained: int) -> int:
        return math.ceil(trained / self.factor)  # vLLM multiplies it by the factor


@dataclass(frozen=True)
class NTKScaling(Scaling):
    """NTK-aware: the base becomes theta * factor^(D / (D - 2)). Hugging Face has no name for it but the new base."""

    factor: float
    rope_type: str = field(default="ntk", init=False)

    def theta(self, theta: float, head_dim: int) -> float:
        return ntk_theta(theta, self.factor, head_dim)


@dataclass(frozen=True)
class DynamicNTKScaling(Scaling):
    """Dynamic NTK for one length: the factor of the NTK-aware rule is factor * length / L0 - (factor - 1).

    A stage has one length, so the base is fixed and exported as a fixed one: Hugging Face's "dynamic" would compute it
    anew from the length of each text.
    """

    factor: float
    original_max_position_embeddings: int
    length: int | None = None
    """The length in tokens that the frequencies are for, L0 if that is longer. None (as L0): a model from Hugging Face
    that no stage has fixed to a length."""
    rope_type: str = field(default="dynamic", init=False)
    in_hf = True

    @classmethod
    def toml(cls) -> dict[str, Keys]:
        return {"dynamic": Keys(("factor", ORIGINAL))}

    def theta(self, theta: float, head_dim: int) -> float:
        original = self.original_max_position_embeddings
        length = max(self.length or 0, original)
        return ntk_theta(theta, self.factor * length / original - (self.factor - 1), head_dim)

    def trained_at(self, length: int) -> Scaling:
        return replace(self, length=length) if self.length is None else self

    at_length = trained_at

    @classmethod
    def from_hf(cls, values: dict[str, Any]) -> Scaling:
        return super().from_hf({**values, ORIGINAL: values["max_position_embeddings"]})

    def hf(self, theta: float, head_dim: int) -> dict[str, Any]:
        if self.length is None:  # as Hugging Face had it, never trained for a length
            return {"rope_type": "dynamic", "rope_theta": theta, "factor": self.factor}
        return {"rope_type": "default", "rope_theta": self.theta(theta, head_dim)}

    def hf_length(self, trained: int) -> int:
        return self.original_max_position_embeddings if self.length is None else trained


@dataclass(frozen=True)
class Llama3Scaling(Scaling):
    """Llama 3.1's: w_j > L0 / low: f_j / factor; w_j < L0 / high: f_j; in between linear in the rotations L0 / w_j.

    With low = 1 and high = 32 this is NTK-by-parts (arXiv 2309.00071, section 3.2: alpha and beta).
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int
    rope_type: str = field(default="llama3", init=False)
    in_hf = True

    @classmethod
    def toml(cls) -> dict[str, Keys]:
        return {
            "ntk_by_parts": Keys(("factor", ORIGINAL), ("beta_fast", "beta_slow")),
            "llama3": Keys(("factor", ORIGINAL), ("low_freq_factor", "high_freq_factor")),
        }

    @classmethod
    def from_toml(cls, table: Rope, head_dim: int, n_kv_heads: int) -> Scaling:
        low, high, usual = table.low_freq_factor, table.high_freq_factor, 4.0
        if table.type == "ntk_by_parts":
            low, high, usual = table.beta_slow, table.beta_fast, 32.0
        low, high = 1.0 if low is None else low, usual if high is None else high
        return cls(table.factor or 1.0, low, high, table.original_max_position_embeddings or 0)

    def frequencies(self, theta: float, head_dim: int, dtype: Any = None) -> Tensor:
        f = plain_frequencies(theta, head_dim, dtype)
        low, high, original = self.low_freq_factor, self.high_freq_factor, self.original_max_position_embeddings
        wavelength = 2 * math.pi / f
        slowed = (f / self.factor).where(wavelength > original / low, f)
        keep = (original / wavelength - low) / (high - low)
        between = (1 - keep) * slowed / self.factor + keep * slowed
        is_between = (wavelength >= original / high) & (wavelength <= original / low)
        return between.where(is_between, slowed)

    def hf_length(self, trained: int) -> int:
        return max(trained, self.original_max_position_embeddings + 1)  # transformers expects more than the original


@dataclass(frozen=True)
class YarnScaling(Scaling):
    """YaRN (arXiv 2309.00071) as its code, Hugging Face and vLLM have it: the ramp is linear in the pair's index.

    The paper's is linear in the rotations (see Llama3Scaling), which is not the same.
    """

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float | None = None
    """None: 0.1 ln factor + 1, or by mscale and mscale_all_dim if both are set (DeepSeek)."""
    mscale: float | None = None
    mscale_all_dim: float | None = None
    rope_type: str = field(default="yarn", init=False)
    in_hf = True

    def ramp(self, theta: float, head_dim: int) -> tuple[float, float]:
        """First and last pair of the ramp; integers if truncate."""

        def pair(rotations: float) -> float:
            turns = self.original_max_position_embeddings / (rotations * 2 * math.pi)
            return head_dim * math.log(turns) / (2 * math.log(theta))

        low, high = pair(self.beta_fast), pair(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, head_dim - 1)
        return low, high + 0.001 if low == high else high

    def frequencies(self, theta: float, head_dim: int, dtype: Any = None) -> Tensor:
        wave = waves(theta, head_dim, dtype)
        low, high = self.ramp(theta, head_dim)
        keep = 1 - ((wave.new_tensor(range(len(wave))) - low) / (high - low)).clamp(0, 1)
        return 1.0 / (self.factor * wave) * (1 - keep) + 1.0 / wave * keep

    def magnitude(self) -> float:
        if self.attention_factor is not None:
            return self.attention_factor

        def of(mscale: float) -> float:
            return 0.1 * mscale * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0

        if self.mscale and self.mscale_all_dim:
            return of(self.mscale) / of(self.mscale_all_dim)
        return of(1.0)

    @classmethod
    def from_hf(cls, values: dict[str, Any]) -> Scaling:
        if "attention_factor" in values:  # it wins: mscale beside it says the same to servers (see hf)
            values = {key: value for key, value in values.items() if key not in ("mscale", "mscale_all_dim")}
        return super().from_hf(with_factor(values))

    def hf(self, theta: float, head_dim: int) -> dict[str, Any]:
        """The attention factor twice: mlx-lm reads mscale, transformers and vLLM attention_factor, which wins there."""
        magnitude = self.magnitude()
        plain = replace(self, attention_factor=magnitude, mscale=None, mscale_all_dim=None)
        form = super(YarnScaling, plain).hf(theta, head_dim)
        if self.factor <= 1:  # mscale is multiplied by ln factor: it can say nothing but 1
            return form
        step = 0.1 * math.log(self.factor)  # magnitude = (step mscale + 1) / (step mscale_all_dim + 1)
        return form | {"mscale": (magnitude * (step + 1) - 1) / step, "mscale_all_dim": 1.0}

    def hf_length(self, trained: int) -> int:
        # else transformers warns, and vLLM computes this product itself
        return round(self.factor * self.original_max_position_embeddings)


@dataclass(frozen=True)
class LongRopeScaling(Scaling):
    """LongRoPE (arXiv 2402.13753) and LongRoPE2 (2502.20082): f_j / lambda_j, with one list for rows up to L0 and one
    for longer ones. frequencies gives both: [2, D / 2], short and long."""

    original_max_position_embeddings: int
    long_factor: tuple[float, ...]
    short_factor: tuple[float, ...]
    attention_factor: float | None = None
    """For both lists. None: sqrt(1 + ln factor / ln L0), or 1 without a factor."""
    factor: float | None = None
    rope_type: str = field(default="longrope", init=False)
    in_hf = True

    @classmethod
    def toml(cls) -> dict[str, Keys]:
        optional = ("short_factor", "attention_factor", "factor", "mixed_window")
        return {"longrope": Keys((ORIGINAL, "long_factor"), optional)}

    @classmethod
    def from_toml(cls, table: Rope, head_dim: int, n_kv_heads: int) -> Scaling:
        # without rows of their own, short texts have been trained with the long list too
        unset = (1.0,) * (head_dim // 2) if table.mixed_window else table.long_factor
        short = table.short_factor or unset
        for key, values in (("long_factor", table.long_factor), ("short_factor", short)):
            if len(values) != head_dim // 2:
                raise UserError(
                    f"rope.{key} has {len(values)} numbers, but the model's heads of {head_dim} have {head_dim // 2} "
                    "pairs, and each needs its own."
                )
        original = table.original_max_position_embeddings or 0
        return cls(original, table.long_factor, short, table.attention_factor, table.factor)

    def frequencies(self, theta: float, head_dim: int, dtype: Any = None) -> Tensor:
        wave = waves(theta, head_dim, dtype)
        return 1.0 / (wave.new_tensor([self.short_factor, self.long_factor]) * wave)

    def of_tokens(self, frequencies: Tensor, long: Tensor | None, heads: slice) -> Tensor:
        return frequencies[1] if long is None else frequencies[long.long()].unsqueeze(1)

    def magnitude(self) -> float:
        if self.attention_factor is not None:
            return self.attention_factor
        if self.factor is None or self.factor <= 1:
            return 1.0
        return math.sqrt(1 + math.log(self.factor) / math.log(self.original_max_position_embeddings))

    def at_length(self, length: int) -> Scaling:
        """The short list up to the original length, as transformers does by the longest position."""
        return replace(self, long_factor=self.short_factor) if length <= self.original_max_position_embeddings else self

    @classmethod
    def from_hf(cls, values: dict[str, Any]) -> Scaling:
        return super().from_hf(with_factor(values))

    def hf(self, theta: float, head_dim: int) -> dict[str, Any]:
        magnitude = self.magnitude()
        return super().hf(theta, head_dim) | {
            "factor": self.factor or max(self.long_factor),
            "attention_factor": magnitude,
            # vLLM reads these two instead of attention_factor
            "short_mscale": magnitude,
            "long_mscale": magnitude,
        }


@dataclass(frozen=True)
class GeneScaling(Scaling):
    """GeNE: f_j / r^(w_j) with w_j from 0 to 1 up to the first pair that turns fewer than 3 times within L0.

    r is `factor`, or in training what `drawn` gives for each micro-batch.
    """

    factor: float
    original_max_position_embeddings: int
    rope_type: str = field(default="gene", init=False)

    def _lambdas(self, theta: float, head_dim: int, dtype: Any = None) -> Tensor:
        wave = waves(theta, head_dim, dtype)
        turns = self.original_max_position_embeddings * plain_frequencies(theta, head_dim) / (2 * math.pi)
        slow = (turns < ROTATIONS).nonzero()
        first_slow = int(slow[0]) if len(slow) else head_dim // 2
        return self.factor ** (wave.new_tensor(range(len(wave))) / max(first_slow, 1)).clamp(0, 1)

    def frequencies(self, theta: float, head_dim: int, dtype: Any = None) -> Tensor:
        return 1.0 / (self._lambdas(theta, head_dim, dtype) * waves(theta, head_dim, dtype))

    def choices(self, seq_len: int) -> tuple[list[int], list[float]]:
        """The factors that a micro-batch of rows of seq_len can draw, ascending, and their probabilities.

        Multiples of r0 = ceil(seq_len / L0) up to factor; with more than four of them, the ends have 1/4 each.
        """
        unit = -(-seq_len // self.original_max_position_embeddings)
        count = max(int(self.factor) // unit, 1)
        probabilities = [0.25, *([0.5 / (count - 2)] * (count - 2)), 0.25] if count > 4 else [1 / count] * count
        return [k * unit for k in range(1, count + 1)], probabilities

    def drawn(self, seq_len: int, seed: int, step: int, micro_batch: int) -> GeneScaling:
        import numpy as np

        factors, probabilities = self.choices(seq_len)
        random = np.random.default_rng([seed, step, micro_batch, GENE_SEED])
        return replace(self, factor=float(factors[int(random.choice(len(factors), p=probabilities))]))

    def at_length(self, length: int) -> Scaling:
        factor = max(self.factor, math.ceil(length / self.original_max_position_embeddings))
        return replace(self, factor=float(factor))

    def hf(self, theta: float, head_dim: int) -> dict[str, Any]:
        lambdas = tuple(self._lambdas(theta, head_dim).tolist())
        same = LongRopeScaling(self.original_max_position_embeddings, lambdas, lambdas, 1.0, self.factor)
        return same.hf(theta, head_dim)


ROTATIONS = 3  # num_rotations of GeNE's code
GENE_SEED = 3  # apart from the data's seeds


@dataclass(frozen=True)
class HarpeScaling(Scaling):
    """HARPE (arXiv 2412.07171): a base for each head; a query head has that of its key-value head. [Hkv, D / 2]."""

    bases: tuple[float, ...]
    rope_type: str = field(default="harpe", init=False)

    @classmethod
    def from_toml(cls, table: Rope, head_dim: int, n_kv_heads: int) -> Scaling:
        if len(table.bases) != n_kv_heads:
            raise UserError(
                f"rope.bases has {len(table.bases)} numbers, but the model has {n_kv_heads} key-value heads, and each "
                "needs its own (query heads share that of theirs)."
            )
        return cls(table.bases)

    def frequencies(self, theta: float, head_dim: int, dtype: Any = None) -> Tensor:
        import torch

        return torch.stack([plain_frequencies(base, head_dim, dtype) for base in self.bases])

    def of_tokens(self, frequencies: Tensor, long: Tensor | None, heads: slice) -> Tensor:
        return frequencies[heads]

    def hf(self, theta: float, head_dim: int) -> dict[str, Any]:
        raise UserError(
            f'rope.type = "harpe" has {len(self.bases)} bases, one for each key-value head, and Hugging Face\'s '
            "config.json has a place for one: an export would load with wrong positions. Evaluate from the checkpoint, "
            "or train a last stage with a single base (rope.theta) and export that."
        )


def methods() -> list[type[Scaling]]:
    """All methods of this file, in their order."""
    values = globals().values()
    return [
        value for value in values if isinstance(value, type) and issubclass(value, Scaling) and value is not Scaling
    ]


def method_of(rope_type: str) -> type[Scaling] | None:
    """The method that a value of rope.type names; None for "model" and "none"."""
    return next((method for method in methods() if rope_type in method.toml()), None)
