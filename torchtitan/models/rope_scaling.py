"""How rotary frequencies are rescaled for longer contexts: one small dataclass a method.

Each gives, for a base theta and a head dimension D, the radians a token of every pair (`frequencies`), and what cos and
sin are multiplied by (`magnitude`). `hf` is the same as Hugging Face's rope_parameters: what a model that was trained
so must be exported with. Formulas are written in the order of operations of Hugging Face's code, so that in float32
they give its very bits; training uses float64. f_j = theta^(-2j/D) is the frequency of pair j, w_j = 2 pi / f_j its
wavelength in tokens, L0 the original length.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from torchtitan.tools.errors import UserError


def plain_frequencies(theta: float, head_dim: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """f_j, [D / 2]."""
    return 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=dtype) / head_dim)


def ntk_theta(theta: float, factor: float, head_dim: int) -> float:
    """The base whose slowest pair is `factor` times slower: theta * factor^(D / (D - 2))."""
    return theta * factor ** (head_dim / (head_dim - 2))


class _Unit:
    """What most methods share: cos and sin are not scaled."""

    def magnitude(self) -> float:
        return 1.0


@dataclass(frozen=True)
class LinearScaling(_Unit):
    """Position interpolation (arXiv 2306.15595): f_j / factor."""

    factor: float
    rope_type: str = field(default="linear", init=False)

    def frequencies(self, theta: float, head_dim: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
        return plain_frequencies(theta, head_dim, dtype) / self.factor

    def hf(self, theta: float, head_dim: int) -> dict[str, Any]:
        return {"rope_type": "linear", "rope_theta": theta, "factor": self.factor}


@dataclass(frozen=True)
class NTKScaling(_Unit):
    """NTK-aware: the base becomes theta * factor^(D / (D - 2)). Hugging Face has no name for it but the new base."""

    factor: float
    rope_type: str = field(default="ntk", init=False)

    def frequencies(self, theta: float, head_dim: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
        return plain_frequencies(ntk_theta(theta, self.factor, head_dim), head_dim, dtype)

    def hf(self, theta: float, head_dim: int) -> dict[str, Any]:
        return {"rope_type": "default", "rope_theta": ntk_theta(theta, self.factor, head_dim)}


@dataclass(frozen=True)
class DynamicNTKScaling(_Unit):
    """Dynamic NTK for one length: the factor of the NTK-aware rule is factor * length / L0 - (factor - 1).

    A stage has one length, so the base is fixed, and exported as such: Hugging Face's "dynamic" would compute it anew
    from the length at hand.
    """

    factor: float
    original_max_position_embeddings: int
    length: int | None = None
    """Tokens that the frequencies are for; None, and what is shorter than L0: L0. None only of a model that came so
    from Hugging Face and that nothing has fixed to a length."""
    rope_type: str = field(default="dynamic", init=False)

    def theta(self, theta: float, head_dim: int) -> float:
        """The base for `length`."""
        original = self.original_max_position_embeddings
        length = max(self.length or 0, original)
        return ntk_theta(theta, self.factor * length / original - (self.factor - 1), head_dim)

    def frequencies(self, theta: float, head_dim: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
        return plain_frequencies(self.theta(theta, head_dim), head_dim, dtype)

    def hf(self, theta: float, head_dim: int) -> dict[str, Any]:
        if self.length is None:  # as it came from there, never trained for a length
            return {"rope_type": "dynamic", "rope_theta": theta, "factor": self.factor}
        return {"rope_type": "default", "rope_theta": self.theta(theta, head_dim)}


@dataclass(frozen=True)
class Llama3Scaling(_Unit):
    """Llama 3.1's: w_j > L0 / low: f_j / factor; w_j < L0 / high: f_j; in between linear in the rotations L0 / w_j.

    With low = 1 and high = 32 this is NTK-by-parts (arXiv 2309.00071, section 3.2: alpha and beta).
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int
    rope_type: str = field(default="llama3", init=False)

    def frequencies(self, theta: float, head_dim: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
        f = plain_frequencies(theta, head_dim, dtype)
        low, high, original = self.low_freq_factor, self.high_freq_factor, self.original_max_position_embeddings
        wavelength = 2 * math.pi / f
        slowed = torch.where(wavelength > original / low, f / self.factor, f)
        keep = (original / wavelength - low) / (high - low)
        between = (1 - keep) * slowed / self.factor + keep * slowed
        is_between = (wavelength >= original / high) & (wavelength <= original / low)
        return torch.where(is_between, between, slowed)

    def hf(self, theta: float, head_dim: int) -> dict[str, Any]:
        return {
            "rope_type": "llama3",
            "rope_theta": theta,
            "factor": self.factor,
            "low_freq_factor": self.low_freq_factor,
            "high_freq_factor": self.high_freq_factor,
            "original_max_position_embeddings": self.original_max_position_embeddings,
        }


@dataclass(frozen=True)
class YarnScaling:
    """YaRN (arXiv 2309.00071) as its code, Hugging Face and vLLM have it: the ramp is linear in the pair's index.

    The paper's is linear in the rotations (see Llama3Scaling), which is not the same.
    """

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float | None = None
    """None: 0.1 ln factor + 1, or by mscale and mscale_all_dim where both are given (DeepSeek)."""
    mscale: float | None = None
    mscale_all_dim: float | None = None
    rope_type: str = field(default="yarn", init=False)

    def ramp(self, theta: float, head_dim: int) -> tuple[float, float]:
        """First and last pair of the ramp; integers where truncate."""

        def pair(rotations: float) -> float:
            turns = self.original_max_position_embeddings / (rotations * 2 * math.pi)
            return head_dim * math.log(turns) / (2 * math.log(theta))

        low, high = pair(self.beta_fast), pair(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, head_dim - 1)
        return low, high + 0.001 if low == high else high

    def frequencies(self, theta: float, head_dim: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
        wave = theta ** (torch.arange(0, head_dim, 2, dtype=dtype) / head_dim)
        low, high = self.ramp(theta, head_dim)
        keep = 1 - ((torch.arange(head_dim // 2, dtype=dtype) - low) / (high - low)).clamp(0, 1)
        return 1.0 / (self.factor * wave) * (1 - keep) + 1.0 / wave * keep

    def magnitude(self) -> float:
        if self.attention_factor is not None:
            return self.attention_factor

        def of(mscale: float) -> float:
            return 0.1 * mscale * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0

        if self.mscale and self.mscale_all_dim:
            return of(self.mscale) / of(self.mscale_all_dim)
        return of(1.0)

    def hf(self, theta: float, head_dim: int) -> dict[str, Any]:
        return {
            "rope_type": "yarn",
            "rope_theta": theta,
            "factor": self.factor,
            "original_max_position_embeddings": self.original_max_position_embeddings,
            "beta_fast": self.beta_fast,
            "beta_slow": self.beta_slow,
            "truncate": self.truncate,
            "attention_factor": self.magnitude(),
        }


@dataclass(frozen=True)
class LongRopeScaling:
    """LongRoPE (arXiv 2402.13753) and LongRoPE2 (2502.20082): f_j / lambda_j, with one list for rows up to L0 and one
    for longer ones. frequencies gives both: [2, D / 2], short and long."""

    original_max_position_embeddings: int
    long_factor: tuple[float, ...]
    short_factor: tuple[float, ...]
    attention_factor: float | None = None
    """For both lists. None: sqrt(1 + ln factor / ln L0), or 1 without a factor."""
    factor: float | None = None
    rope_type: str = field(default="longrope", init=False)

    def frequencies(self, theta: float, head_dim: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
        lists = torch.tensor([self.short_factor, self.long_factor], dtype=dtype)
        return 1.0 / (lists * theta ** (torch.arange(0, head_dim, 2, dtype=dtype) / head_dim))

    def magnitude(self) -> float:
        if self.attention_factor is not None:
            return self.attention_factor
        if self.factor is None or self.factor <= 1:
            return 1.0
        return math.sqrt(1 + math.log(self.factor) / math.log(self.original_max_position_embeddings))

    def hf(self, theta: float, head_dim: int) -> dict[str, Any]:
        magnitude = self.magnitude()
        return {
            "rope_type": "longrope",
            "rope_theta": theta,
            "short_factor": list(self.short_factor),
            "long_factor": list(self.long_factor),
            "original_max_position_embeddings": self.original_max_position_embeddings,
            "factor": self.factor or max(self.long_factor),
            "attention_factor": magnitude,
            # vLLM reads these two instead of attention_factor
            "short_mscale": magnitude,
            "long_mscale": magnitude,
        }


@dataclass(frozen=True)
class GeneScaling(_Unit):
    """GeNE: f_j / r^(w_j) with w_j from 0 to 1 up to the first pair that turns fewer than 3 times within L0.

    r is `factor`, or in training what `drawn` gives for each micro-batch.
    """

    factor: float
    original_max_position_embeddings: int
    rope_type: str = field(default="gene", init=False)

    def _lambdas(self, theta: float, head_dim: int, dtype: torch.dtype) -> torch.Tensor:
        turns = self.original_max_position_embeddings * plain_frequencies(theta, head_dim) / (2 * math.pi)
        slow = torch.nonzero(turns < ROTATIONS)
        first_slow = int(slow[0]) if len(slow) else head_dim // 2
        weights = (torch.arange(head_dim // 2, dtype=dtype) / max(first_slow, 1)).clamp(0, 1)
        return self.factor**weights

    def frequencies(self, theta: float, head_dim: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
        wave = theta ** (torch.arange(0, head_dim, 2, dtype=dtype) / head_dim)
        return 1.0 / (self._lambdas(theta, head_dim, dtype) * wave)

    def choices(self, seq_len: int) -> tuple[list[int], list[float]]:
        """The factors that a micro-batch of rows of seq_len can draw, ascending, and their probabilities.

        Multiples of r0 = ceil(seq_len / L0) up to factor; with more than four of them, the ends have 1/4 each.
        """
        unit = -(-seq_len // self.original_max_position_embeddings)
        count = max(int(self.factor) // unit, 1)
        probabilities = [0.25, *([0.5 / (count - 2)] * (count - 2)), 0.25] if count > 4 else [1 / count] * count
        return [k * unit for k in range(1, count + 1)], probabilities

    def drawn(self, seq_len: int, seed: int, step: int, micro_batch: int) -> GeneScaling:
        """The scaling of one micro-batch: a function of its arguments, so that all ranks and a resumed run agree."""
        factors, probabilities = self.choices(seq_len)
        random = np.random.default_rng([seed, step, micro_batch, GENE_SEED])
        return GeneScaling(
            float(factors[int(random.choice(len(factors), p=probabilities))]), self.original_max_position_embeddings
        )

    def hf(self, theta: float, head_dim: int) -> dict[str, Any]:
        lambdas = tuple(self._lambdas(theta, head_dim, torch.float64).tolist())
        return LongRopeScaling(self.original_max_position_embeddings, lambdas, lambdas, 1.0, self.factor).hf(
            theta, head_dim
        )


ROTATIONS = 3  # num_rotations of GeNE's code
GENE_SEED = 3  # apart from the data's seeds


@dataclass(frozen=True)
class HarpeScaling(_Unit):
    """HARPE (arXiv 2412.07171): a base for each head; a query head has that of its key-value head. [Hkv, D / 2]."""

    bases: tuple[float, ...]
    rope_type: str = field(default="harpe", init=False)

    def frequencies(self, theta: float, head_dim: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
        return torch.stack([plain_frequencies(base, head_dim, dtype) for base in self.bases])

    def hf(self, theta: float, head_dim: int) -> dict[str, Any]:
        raise UserError(
            f'rope.type = "harpe" has {len(self.bases)} bases, one for each key-value head, and Hugging Face\'s '
            "config.json has a place for one: an export would load with wrong positions. Evaluate from the checkpoint, "
            "or train a last stage with a single base (rope.theta) and export that."
        )


Scaling = (
    LinearScaling
    | NTKScaling
    | DynamicNTKScaling
    | Llama3Scaling
    | YarnScaling
    | LongRopeScaling
    | GeneScaling
    | HarpeScaling
)
