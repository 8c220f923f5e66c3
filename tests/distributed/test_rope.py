"""RoPE that differs by micro-batch (GeNE), row (LongRoPE2) or head (HARPE), on several ranks against one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.distributed.harness import flags, run_stage, spawn, write_assets

GENE = {"rope__type": "gene", "rope__factor": 8, "rope__original_max_position_embeddings": 64}
MIXED = {
    "rope__type": "longrope",
    "rope__original_max_position_embeddings": 64,
    "rope__mixed_window": True,
    "data__cross_document_attention": True,
    "data__positions": "continue",
}
MIXED_LISTS = ["--rope.long_factor", *(str(1 + j / 2) for j in range(8))]  # head_dim 16
HARPE = ["--rope.type", "harpe", "--rope.bases", "1000", "1000000"]
WIDE = {"parallelism__context_parallel_degree": 2, "parallelism__tensor_parallel_degree": 2}
SIZE = {"training__local_batch_size": 4, "training__steps": 2}
CHECKED = {"parallelism__self_check": True}


def losses(args: list[str], rank: int, world_size: int) -> list[float]:
    steps = run_stage(args, rank, world_size)
    return [step["loss"] for step in steps] + [step["grad_norm"] for step in steps]


def test_several_ranks_agree_with_one(tmp_path: Path):
    """Each kind with the self-check on, whose small model has the same RoPE."""
    assets = write_assets(tmp_path)

    def args(*more: str, **overrides: Any) -> list[str]:
        return [*flags(tmp_path, assets, **(SIZE | overrides)), *more]

    cases = {
        "gene": (args(**GENE), args(**GENE, **WIDE, **CHECKED)),
        "gene, dp": (args(**GENE), args(**GENE, training__local_batch_size=1)),
        "mixed": (args(*MIXED_LISTS, **MIXED), args(*MIXED_LISTS, **MIXED, **WIDE, **CHECKED)),
        "harpe": (args(*HARPE), args(*HARPE, **WIDE, **CHECKED)),
        "recomputed": (args(**GENE), args(**GENE, **WIDE, activation_checkpoint__mode="full")),
        "plain": (args(), args(**WIDE)),
        "ulysses": (args(*HARPE), args(*HARPE, **WIDE, **CHECKED, parallelism__context_parallel_exchange="ulysses")),
    }
    one = dict(zip(cases, spawn(1, losses, [alone for alone, _ in cases.values()], tmp_path), strict=True))
    four = dict(zip(cases, spawn(4, losses, [wide for _, wide in cases.values()], tmp_path), strict=True))
    for name in cases:
        assert four[name] == pytest.approx(one[name], rel=1e-5), name
    for name in ("gene", "mixed", "harpe"):
        assert one[name][0] != pytest.approx(one["plain"][0], rel=1e-6), f"{name} does nothing"
