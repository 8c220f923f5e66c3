"""RoPE: precision at long positions, relativity, the rotation itself."""

from __future__ import annotations

import math
from decimal import Decimal, getcontext

import pytest
import torch

from torchtitan.models.rope import RopeArgs, apply_rope, inverse_frequencies, rope_tables
from torchtitan.models.rope_scaling import Llama3Scaling


def test_frequencies_are_the_definition():
    freqs = inverse_frequencies(RopeArgs(500000.0), 128)
    assert freqs.dtype == torch.float64
    assert freqs[5].item() == pytest.approx(500000.0 ** (-10 / 128), rel=1e-15)


def test_tables_are_right_at_four_million_tokens():
    """float32 angles would be off by 0.25 rad here; ours are exact to float32's last digits."""
    getcontext().prec = 50
    positions = torch.tensor([0, 1, 65535, 2**22 + 1, 2**24 + 3])
    rope, head_dim = RopeArgs(500000.0), 64
    cos, sin = rope_tables(rope, head_dim, positions)
    assert cos.dtype == sin.dtype == torch.float32
    two_pi = 2 * Decimal("3.14159265358979323846264338327950288419716939937510")
    for i, position in enumerate(positions.tolist()):
        for j in range(head_dim // 2):
            frequency = (Decimal(500000).ln() * Decimal(-2 * j) / Decimal(head_dim)).exp()
            angle = float((Decimal(position) * frequency) % two_pi)
            assert cos[i, 0, j].item() == pytest.approx(math.cos(angle), abs=1e-6)
            assert sin[i, 0, j].item() == pytest.approx(math.sin(angle), abs=1e-6)


@pytest.mark.parametrize("scaling", [None, Llama3Scaling(8.0, 1.0, 4.0, 64)])
def test_only_distances_matter(scaling: Llama3Scaling | None):
    """q at m times k at n depends on m - n alone, also a million tokens further on."""
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 2, 32, generator=generator) for _ in range(2))

    def product(m: int, n: int) -> torch.Tensor:
        tables = [rope_tables(RopeArgs(10000.0, scaling), 32, torch.tensor([p])) for p in (m, n)]
        return (apply_rope(q, tables[0]) * apply_rope(k, tables[1])).sum(-1)

    near = product(50, 20)
    assert not torch.allclose(near, product(50, 21), atol=1e-3)
    for shift in (1, 1000, 1_000_000):
        assert torch.allclose(near, product(50 + shift, 20 + shift), atol=1e-5)


def test_rotation_keeps_norms_and_is_done_in_float32():
    x = torch.randn(10, 3, 64, dtype=torch.bfloat16)
    tables = rope_tables(RopeArgs(), 64, torch.arange(10))
    y = apply_rope(x, tables)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, apply_rope(x.float(), tables).bfloat16())
    rotated = apply_rope(x.float(), tables)
    assert torch.allclose(rotated.norm(dim=-1), x.float().norm(dim=-1), rtol=1e-5)
    assert torch.equal(rotated[0], x[0].float()), "position 0 is not rotated"
