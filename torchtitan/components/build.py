"""Builds the parts of a Trainer from the configuration, in the order in which the Trainer needs them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from torchtitan.attention.backends import choose_backend
from torchtitan.components.changes import differences
from torchtitan.components.checkpoint import Checkpointer, damage_of_all, load, saved_parts, set_random_state
from torchtitan.components.data_start import describe
from torchtitan.components.loss import train_micro_batch
from torchtitan.components.manifest import read_manifest
from torchtitan.components.metrics import MetricsLogger
from torchtitan.components.setup import StageInputs
from torchtitan.components.start import Start
from torchtitan.config import JobConfig, dump_toml
from torchtitan.config.checks import accumulation_steps, resolve_shard_degree
from torchtitan.datasets.loader import build_loader
from torchtitan.distributed.context_parallel.local_batch import LocalBatch, local_batch
from torchtitan.distributed.options.quantize import describe_quantize
from torchtitan.distributed.parallel_dims import ParallelDims
from torchtitan.distributed.parallelize import build_sharded_model
from torchtitan.distributed.self_check import run_self_check
from torchtitan.models.architecture import as_json
from torchtitan.models.hf.weights import load_weights
from torchtitan.models.transformer import Transformer, TransformerArgs, init_weights, parameter_counts
from torchtitan.tools.device import host_names, init_process_group, make_deterministic, pick_device, record_collectives
from torchtitan.tools.errors import UserError
from torchtitan.tools.folders import write_text
from torchtitan.tools.logging import logger
from torchtitan.tools.torch_compat import set_timeout

State = dict[str, dict[str, torch.Tensor]]
"""The tensors of a checkpoint: {"model" | "optimizer" | "rng": {name: tensor}}."""


def connect(
    config: JobConfig, rank: int, local_rank: int, world_size: int
) -> tuple[torch.device, ParallelDims, dist.ProcessGroup, list[str]]:
    """Collective. The device, the mesh, a gloo group of all ranks for small messages, and each rank's host name."""
    device, p = pick_device(local_rank), config.parallelism
    if device.type == "cuda" and config.comm.trace_buf_size:
        folder = Path(config.job.dump_folder) / config.comm.save_traces_folder
        record_collectives(folder, config.comm.trace_buf_size)
    init_process_group(device, rank, world_size, config.comm.init_timeout_seconds)
    dims = ParallelDims.build(
        device.type,
        p.data_parallel_replicate_degree,
        resolve_shard_degree(config, world_size),
        p.context_parallel_degree,
        p.tensor_parallel_degree,
    )
    group = dist.new_group(backend="gloo")  # its collectives block no stream of the GPU
    return device, dims, group, host_names(group)


def build_model(
    config: JobConfig, args: TransformerArgs, dims: ParallelDims, device: torch.device, group: dist.ProcessGroup
) -> tuple[int, Transformer]:
    """Collective. The micro-batches per step and rank, and the sharded model, whose parameters have no values yet.

    If there are several ranks, the self-check first proves their combination of layout, exchange, backend and degrees
    (distributed/self_check.py).
    """
    torch.manual_seed(config.training.seed)
    if config.training.deterministic:
        make_deterministic()
    accumulation = accumulation_steps(config, dist.get_world_size())
    if config.parallelism.self_check and dist.get_world_size() > 1:
        run_self_check(args, config, dims, device, group, accumulation, train_micro_batch)
    return accumulation, build_sharded_model(args, config, dims, device)


def load_state(
    config: JobConfig,
    inputs: StageInputs,
    model: Transformer,
    state: Callable[[], State],
    checkpointer: Checkpointer | None,
    group: dist.ProcessGroup,
) -> dict[str, Any] | None:
    """Collective. Load the state of this stage's newest complete checkpoint; without one, the weights that the stage
    starts from; without these, random weights. The manifest of the checkpoint, or None for a fresh run.

    state: Trainer.state, which returns the tensors to load into.
    """
    path = None
    if checkpointer:
        checkpointer.prepare()
        path = checkpointer.find(inputs.plan.first_step)
        group = checkpointer.group
    if path:
        tensors = state()
        load(path, tensors, group)
        set_random_state(tensors["rng"])
        logger.info(f"resumed from {path}")
        return read_manifest(path)
    if inputs.start:
        _start_from(inputs.start, config, inputs, model, state(), group)
        for line in describe(inputs.data_start, inputs.plan):
            logger.info(f"  {line}")
    elif config.checkpoint.initial_load_in_hf:
        load_weights(model, Path(config.model.hf_assets_path))
        logger.info(f"weights from {config.model.hf_assets_path}")
    else:
        init_weights(model, config.training.seed)
    return None


def _start_from(
    start: Start,
    config: JobConfig,
    inputs: StageInputs,
    model: Transformer,
    state: State,
    group: dist.ProcessGroup,
) -> None:
    """Collective. Load what the stage takes from the previous stage, or from another checkpoint; log what changes."""
    if start.manifest is None:
        load_weights(model, start.path)
        logger.info(f"weights from {start.path}")
        return
    if damage := damage_of_all(start.path, group):
        raise UserError(f"{start.path}, from which this run would start, is damaged: {damage}")
    parts = saved_parts(start.path)
    taken = [part for part in start.parts if part in parts]
    load(start.path, {part: state[part] for part in taken}, group)
    name, anew = start.manifest["stage"], [part for part in ("model", "optimizer") if part not in taken]
    logger.info(
        f"{' and '.join(taken)} from {start.path}: stage {name}, step {start.manifest['step']}, "
        f"{start.manifest['tokens_seen']:,} tokens" + (f"; {', '.join(anew)} anew" if anew else "")
    )
    logger.info(f"what changes from stage {name} to {config.stage.name}:")
    for line in differences(start.manifest, config, as_json(inputs.args)):
        logger.info(f"  {line}")


def build_batches(
    config: JobConfig, inputs: StageInputs, dims: ParallelDims, device: torch.device, start_step: int
) -> Iterator[LocalBatch]:
    """This rank's part of its micro-batches, beginning after start_step finished steps."""
    p, args = config.parallelism, inputs.args
    loader = build_loader(
        inputs.plan,
        dp_rank=dims.dp_rank,
        dp_degree=dims.dp_degree,
        local_batch_size=config.training.local_batch_size,
        start_step=start_step,
        num_workers=config.data.num_workers,
        pin_memory=device.type == "cuda",
        finish=partial(
            local_batch,
            backend=choose_backend(config.model.attention_backend, device.type),
            layout=p.context_parallel_layout,
            exchange=p.context_parallel_exchange,
            cp=p.context_parallel_degree,
            rank=dims.cp_rank,
            sliding_window=args.sliding_window,
            sliding_share=args.sliding_share,
        ),
    )
    return iter(loader)


def open_metrics(config: JobConfig, step: int) -> MetricsLogger:
    """For rank 0. step: finished steps; lines of an earlier run for later steps are moved aside."""
    keep_going = config.checkpoint.on_failed_save == "go_on"
    folder = Path(config.job.dump_folder)
    return MetricsLogger(config.metrics, folder, config.stage.name, asdict(config), step, keep_going)


def log_stage(config: JobConfig, inputs: StageInputs, dims: ParallelDims, device: torch.device) -> None:
    """For rank 0: write config.toml, and log the stage, its RoPE, the model and the degrees."""
    folder, args = Path(config.job.dump_folder), inputs.args
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "config.toml", dump_toml(config))
    logger.info(f"stage {config.stage.name}: {config.job.description}".rstrip(": "))
    logger.info(f"RoPE: {inputs.rope.line}")
    for warning in inputs.rope.warnings:
        logger.warning(warning)
    if config.quantize.recipe_name != "none":
        logger.info(describe_quantize(args, config.quantize, dims.size("tp")))
    total = parameter_counts(args)[0]
    sizes = ", ".join(f"{name} {dims.size(name)}" for name in ("dp_replicate", "dp_shard", "cp", "tp"))
    logger.info(f"model {config.model.flavor}: {total / 1e6:,.1f}M parameters on {device.type}; {sizes}")


def shorten_timeouts(config: JobConfig, dims: ParallelDims, group: dist.ProcessGroup) -> None:
    """After the first step, which compiles: collectives wait at most comm.train_timeout_seconds from now on."""
    assert dist.group.WORLD is not None
    set_timeout(config.comm.train_timeout_seconds, [*dims.groups(), dist.group.WORLD, group])
