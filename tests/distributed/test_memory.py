"""What saves memory changes nothing else: losses, gradients, FSDP collectives of every mode, alone and combined."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.distributed.tensor import DTensor

from tests.distributed.harness import TINY, Collectives, flags, run_stage, spawn, write_assets
from torchtitan.components.loss import train_micro_batch
from torchtitan.config import load_config
from torchtitan.config.schema import JobConfig
from torchtitan.distributed.fully_shard import reduce_over_replicas
from torchtitan.distributed.parallelize import build_sharded_model
from torchtitan.extensions.wiring import build_trainer
from torchtitan.models.transformer import Transformer, init_weights
from torchtitan.tools.constants import IGNORED_LABEL
from torchtitan.trainer import Trainer

Z_LOSS = 0.01
# 1 MiB are 64 rows of float32 logits of 4,096 words, 128 of half the words: tiles of 128 tokens, the least.
TILES = {"training.loss_tile_mib": 1, "training.mlp_tile_tokens": 50}  # the last tile of the feed-forward is shorter
AC = "activation_checkpoint"
FULL = {f"{AC}.mode": "full"}
SELECTIVE = {f"{AC}.mode": "selective"}
OFFLOAD = {f"{AC}.offload": True}
MATMULS, OPTION = f"{AC}.selective_ac_matmuls", f"{AC}.selective_ac_option"
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
    logits = model(batch.tokens, batch.positions, batch.masks, batch.long)
    losses = F.cross_entropy(logits, batch.labels, ignore_index=IGNORED_LABEL, reduction="none")
    penalty = (logits.logsumexp(-1).square() * (batch.labels != IGNORED_LABEL)).sum()
    ((losses.sum() + Z_LOSS * penalty) / divisor).backward()
    return losses.detach()


def run(args: list[str], rank: int, world_size: int) -> dict[str, dict[str, Any]]:
    """By mode the loss, the whole gradients, and collectives of the second micro-batch (the first sets FSDP up)."""
    config = load_config(args)
    trainer = build_trainer(config, rank, rank, world_size)
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


def either(case: tuple[str, list[str]], rank: int, world_size: int) -> Any:
    """Both tests' work, so that they share their processes."""
    what, args = case
    return {"modes": run, "stage": run_stage}[what](args, rank, world_size)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Everything that is run, on one process and on dp_shard 2 x cp 2 x tp 2."""
    folder = tmp_path_factory.mktemp("memory")
    assets = write_assets(folder)
    size = {"training__local_batch_size": 4, "training__global_batch_size": 16}

    def stage(out: str, **options: Any) -> tuple[str, list[str]]:
        saves = {"checkpoint__enable": True, "checkpoint__interval": 2, "job__dump_folder": folder / out}
        return "stage", flags(folder, assets, **size, **saves, **options)

    narrow = {"optimizer__state_dtype": "bfloat16", "training__enable_cpu_offload": True}
    recomputed = {f"{AC}__mode": "full", f"{AC}__offload": True}
    half = {"training__steps": 2}  # warmup lasts as long: the rate of these steps does not depend on training.steps
    modes = flags(folder, assets, **size, training__z_loss=Z_LOSS)
    first = {
        "modes": ("modes", modes),
        "whole": stage("whole", **narrow),
        "plain": stage("plain"),
        "first half": stage("halves", **narrow, **half),
        "first half, plain": stage("mixed", **half),
        "second half, narrower": stage("mixed", **narrow),
    }
    degrees = [f"--parallelism.{n}_degree=2" for n in ("data_parallel_shard", "context_parallel", "tensor_parallel")]
    then = {
        "modes": ("modes", modes + degrees),
        "second half": ("stage", stage("halves", **narrow, **recomputed)[1] + degrees),
    }
    return {
        "one": dict(zip(first, spawn(1, either, list(first.values()), folder), strict=True)),
        "eight": dict(zip(then, spawn(8, either, list(then.values()), folder), strict=True)),
    }


def test_moments_in_bfloat16_and_the_host_survive_a_checkpoint(results: dict[str, Any]):
    """Two steps on one process and two on eight are four on one; moments saved in float32 can be read as bfloat16."""
    one, eight = results["one"], results["eight"]
    resumed = one["first half"] + eight["second half"]
    for ours, theirs in zip(resumed, one["whole"], strict=True):
        for key in ("step", "loss", "grad_norm", "lr"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-5), key
    mixed = one["first half, plain"] + one["second half, narrower"]
    for narrow in (one["whole"], mixed):
        assert len(narrow) == len(one["plain"])
        for ours, theirs in zip(narrow, one["plain"], strict=True):
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3)  # rounding of moments moves little
    assert one["whole"][-1]["loss"] != one["plain"][-1]["loss"], "and something"


def test_losses_and_gradients_are_those_of_the_plain_path(results: dict[str, Any]):
    """z-loss in all of it."""
    alone, together = results["one"]["modes"], results["eight"]["modes"]
    plain = alone["plain"]
    wrong = []
    for where, modes in (("one process", alone), ("dp 2 x cp 2 x tp 2", together)):
        for mode, result in modes.items():
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
