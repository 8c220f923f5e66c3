"""What saves memory changes nothing else: losses, gradients, FSDP collectives of every mode, alone and combined."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.distributed.tensor import DTensor

from tests.distributed.harness import TINY, Collectives, flags, spawn, write_assets
from torchtitan.components.loss import train_micro_batch
from torchtitan.config import load_config
from torchtitan.config.job_config import JobConfig
from torchtitan.datasets.loader import IGNORED_LABEL
from torchtitan.distributed.fully_shard import reduce_over_replicas
from torchtitan.distributed.parallelize import build_sharded_model
from torchtitan.inputs import prepare_inputs
from torchtitan.models.transformer import Transformer, init_weights
from torchtitan.trainer import Trainer

Z_LOSS = 0.01
# 1 MiB are 64 rows of float32 logits of 4,096 words, 128 of half the words: tiles of 128 tokens, the least.
TILES = {"training.loss_tile_mib": 1, "training.mlp_tile_tokens": 50}  # the last tile of the feed-forward is shorter
FULL = {"activation_checkpoint.mode": "full"}
SELECTIVE = {"activation_checkpoint.mode": "selective"}
OFFLOAD = {"activation_checkpoint.offload": True}
MATMULS, OPTION = "activation_checkpoint.selective_ac_matmuls", "activation_checkpoint.selective_ac_option"
COMPILED = {"compile.enable": True, "compile.backend": "aot_eager"}
HOST = {"training.enable_cpu_offload": True}
MODES: dict[str, dict[str, Any]] = {
    "nothing": {},
    "tiled loss": {"training.loss_tile_mib": 1},
    "tiled feed-forward": {"training.mlp_tile_tokens": 50},
    "full": FULL,
    "full, offloaded": FULL | OFFLOAD,
    "selective": SELECTIVE,
    "selective, no products": SELECTIVE | {MATMULS: 0},
    "selective, all products": SELECTIVE | {MATMULS: 1},
    "every second block, offloaded": SELECTIVE | OFFLOAD | {OPTION: "2"},
    "parameters on the host": HOST,
    "full, with everything": FULL | OFFLOAD | TILES | HOST,
    "selective, with everything": SELECTIVE | OFFLOAD | TILES | HOST,
    "compiled, full, with everything": FULL | OFFLOAD | TILES | HOST | COMPILED,
    "compiled, selective, with everything": SELECTIVE | OFFLOAD | TILES | HOST | COMPILED,
}


def changed(config: JobConfig, options: dict[str, Any]) -> JobConfig:
    for name, value in options.items():
        table, key = name.split(".")
        config = replace(config, **{table: replace(getattr(config, table), **{key: value})})
    return config


def plain_micro_batch(model: Transformer, batch: Any, divisor: float) -> torch.Tensor:
    """The whole logits, and PyTorch's own cross-entropy."""
    logits = model(batch.tokens, batch.positions, batch.mask, batch.long)
    losses = F.cross_entropy(logits, batch.labels, ignore_index=IGNORED_LABEL, reduction="none")
    penalty = (logits.logsumexp(-1).square() * (batch.labels != IGNORED_LABEL)).sum()
    ((losses.sum() + Z_LOSS * penalty) / divisor).backward()
    return losses.detach()


def run(args: list[str], rank: int, world_size: int) -> dict[str, dict[str, Any]]:
    """By mode the loss, the whole gradients, and collectives of the second micro-batch (the first sets FSDP up)."""
    config = load_config(args)
    trainer = Trainer(config, prepare_inputs(config, world_size), rank, rank, world_size)
    batches = list(islice(trainer.batches, trainer.accumulation))
    results = {"plain": one_step(trainer, config, batches, plain_micro_batch)} if world_size == 1 else {}
    for name, options in MODES.items():
        results[name] = one_step(trainer, changed(config, options), batches, train_micro_batch)
    trainer.close()
    return results


def one_step(
    trainer: Trainer, config: JobConfig, batches: list[Any], train: Callable[..., torch.Tensor]
) -> dict[str, Any]:
    torch.compiler.reset()
    model = build_sharded_model(trainer.inputs.args, config, trainer.dims, trainer.device)
    init_weights(model, seed=3)
    losses = torch.zeros(())
    with Collectives() as seen:
        for i, batch in enumerate(batches):
            reduce_over_replicas(model, i == len(batches) - 1)
            seen.counts.clear()
            losses += train(model, batch, 1000.0).sum() * trainer.dims.counts_here
    torch.distributed.all_reduce(losses)
    gradients = {}
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        gradients[name] = p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
    return {"loss": float(losses), "gradients": gradients, "collectives": dict(seen.counts)}


def test_losses_and_gradients_are_those_of_the_plain_path(tmp_path: Path):
    """On one process, and on dp_shard 2 x cp 2 x tp 2; z-loss in all of it."""
    size = {"training__local_batch_size": 4, "training__global_batch_size": 16, "training__z_loss": Z_LOSS}
    base = flags(tmp_path, write_assets(tmp_path), **size, parallelism__self_check=False)
    degrees = [f"--parallelism.{n}_degree=2" for n in ("data_parallel_shard", "context_parallel", "tensor_parallel")]
    (alone,) = spawn(1, run, [base], tmp_path)
    (together,) = spawn(8, run, [base + degrees], tmp_path)
    plain = alone["plain"]
    wrong = []
    for where, results in (("one process", alone), ("dp 2 x cp 2 x tp 2", together)):
        for mode, result in results.items():
            errors = {
                name: float((gradient - plain["gradients"][name]).norm() / plain["gradients"][name].norm())
                for name, gradient in result["gradients"].items()
            }
            worst = max(errors, key=lambda name: errors[name])
            print(f"{where}, {mode}: loss {result['loss'] / plain['loss'] - 1:.1e}, {worst} {errors[worst]:.1e}")
            if errors[worst] > 1e-6 or result["loss"] != pytest.approx(plain["loss"], rel=1e-6):
                wrong.append(f"{where}, {mode}: {worst} is off by {errors[worst]:.1e}, the loss is {result['loss']}")
    assert not wrong, "\n".join(wrong)
    # blocks and embedding are gathered again for backward, norm and head are not; each gradient is reduced once
    groups = TINY["num_hidden_layers"] + 2
    for mode, result in together.items():
        counts = result["collectives"]
        assert counts["_reduce_scatter_base_"] == groups, mode
        assert counts["_allgather_base_"] == 2 * (groups - 1) + 1, mode
