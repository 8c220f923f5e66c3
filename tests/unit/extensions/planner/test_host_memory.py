"""The one estimate of host memory, counted by hand."""

from __future__ import annotations

import math

from torchtitan.config import JobConfig
from torchtitan.config.schema import ActivationCheckpoint, Optimizer, Parallelism, Training
from torchtitan.extensions.planner.host_memory import host_bytes, host_memory_warning
from torchtitan.extensions.planner.stage_numbers import numbers_of
from torchtitan.models.transformer import Transformer, TransformerArgs

LAYERS, DIM = 4, 32
ARGS = TransformerArgs(dim=DIM, n_layers=LAYERS, n_heads=4, n_kv_heads=2, head_dim=8, ffn_dim=64, vocab_size=64)


def needed(config: JobConfig) -> float:
    return host_bytes(numbers_of(config, ARGS, 8))


def test_host_memory_of_offloads() -> None:
    """8 ranks that share the parameters, norms over 4 of them: 4 numbers each, two of them in bfloat16; 1,024 tokens of
    4 layers."""
    numels = {name: p.numel() for name, p in Transformer(ARGS).named_parameters()}
    parameters = sum(numels.values())
    norms = sum(numel for name, numel in numels.items() if "norm" in name)
    cut = Parallelism(context_parallel_degree=2, tensor_parallel_degree=2)
    config = JobConfig(
        training=Training(seq_len=4096, enable_cpu_offload=True),
        parallelism=cut,
        optimizer=Optimizer(state_dtype="bfloat16"),
    )
    assert needed(config) == ((parameters - norms) / 8 + norms / 4) * (4 + 4 + 2 + 2)
    every = ActivationCheckpoint(mode="selective", selective_ac_option="2", offload=True)
    kept = needed(JobConfig(training=config.training, activation_checkpoint=every))
    assert kept == parameters * 16 / 8 + 2 * 4096 * DIM * 2
    full = JobConfig(
        training=Training(seq_len=4096),
        parallelism=cut,
        activation_checkpoint=ActivationCheckpoint(mode="full", offload=True),
    )
    assert needed(full) == LAYERS * 1024 * DIM * 2
    assert math.log2(needed(full) / LAYERS).is_integer()
    assert needed(JobConfig()) == 0


def test_the_warning_says_how_much_is_missing() -> None:
    assert host_memory_warning(2**30, 8, available=9 * 2**30) is None
    assert host_memory_warning(2**30, 8, available=None) is None
    warning = host_memory_warning(2**30, 8, available=8 * 2**30)
    assert warning and "enable_cpu_offload" in warning and "8.0 GiB of host" in warning
    assert "context_parallel_degree" in warning
