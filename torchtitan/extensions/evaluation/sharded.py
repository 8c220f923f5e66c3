"""A model to evaluate, in any layout: from a Hugging Face folder or a checkpoint, on the ranks of this run."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch.distributed as dist

from torchtitan.attention.backends import choose_backend
from torchtitan.components.checkpoint import load as load_checkpoint
from torchtitan.config.checks import resolve_shard_degree
from torchtitan.config.schema import JobConfig, Rope
from torchtitan.distributed.options.ulysses import check_ulysses
from torchtitan.distributed.parallel_dims import ParallelDims
from torchtitan.distributed.parallelize import build_sharded_model
from torchtitan.distributed.tensor_parallel import check_tensor_parallel
from torchtitan.extensions.evaluation.forward import Ranks
from torchtitan.extensions.evaluation.loading import Weights, look_at
from torchtitan.models.hf.weights import load_weights
from torchtitan.models.rope_config import build_rope, describe_rope
from torchtitan.models.transformer import Transformer
from torchtitan.tools.device import init_process_group, pick_device
from torchtitan.tools.errors import UserError
from torchtitan.tools.logging import logger


def weights_for(folder: Path, config: JobConfig, longest: int | None, tokenizer: Path | None = None) -> Weights:
    """The weights in a folder, under their own RoPE unless config has another, for `longest` tokens (None: for as many
    as they were trained for). Rescaled or not, they were trained for no more (max_position_embeddings).

    UserError for what is damaged or does not fit: files, tokenizer, RoPE, layout.
    """
    weights = look_at(folder, tokenizer)
    args = weights.args
    if config.rope != Rope():
        trained = args.rope.max_position_embeddings
        if longest is None and trained is None:
            raise UserError("--rope.KEY rescales for a length, and the model does not say its own: name one.")
        rope = build_rope(config.rope, args.rope, args.head_dim, args.n_kv_heads, longest or trained or 0)
        rope = replace(rope, max_position_embeddings=trained)
        logger.info(f"RoPE: {describe_rope(rope)}; the model's own: {describe_rope(args.rope)}")
        weights = replace(weights, args=replace(args, rope=rope), rescaled=rope != args.rope)
    p = config.parallelism
    check_tensor_parallel(args, p.tensor_parallel_degree)
    if p.context_parallel_exchange == "ulysses":
        check_ulysses(args.n_heads, p.context_parallel_degree, p.tensor_parallel_degree, p.context_parallel_head_chunks)
    return weights


def check_own(own: argparse.Namespace, weights: Weights) -> None:
    """UserError where the results of a stage's own file would be those of another model."""
    if own.of_stage and weights.rescaled:
        raise UserError(f"--rope.KEY asks another model than the stage's, whose results are {own.out}: give --out.")


def rank_and_world_size() -> tuple[int, int, int]:
    """(rank, rank on this machine, number of ranks) that the launcher gave, or one process's."""
    rank, local, size = (int(os.environ.get(*v)) for v in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1")))
    return rank, local, size


@contextmanager
def loaded(weights: Weights, config: JobConfig) -> Iterator[tuple[Transformer, Ranks]]:
    """The model in evaluation mode, in the layout of [parallelism], and its ranks. Collective; the process group is
    made here, and ended at the end."""
    p = config.parallelism
    rank, local_rank, world_size = rank_and_world_size()
    device = pick_device(local_rank)
    backend = choose_backend(config.model.attention_backend, device.type)
    init_process_group(device, rank, world_size, config.comm.init_timeout_seconds)
    try:
        shards = resolve_shard_degree(config, world_size)
        degrees = (p.data_parallel_replicate_degree, shards, p.context_parallel_degree, p.tensor_parallel_degree)
        dims = ParallelDims.build(device.type, *degrees)
        group = dist.new_group(backend="gloo")
        model = build_sharded_model(weights.args, config, dims, device)
        model.tie_embeddings()
        if weights.manifest:
            state = {"model": {name: param.detach() for name, param in model.named_parameters()}}
            load_checkpoint(weights.folder, state, group)
        else:
            load_weights(model, weights.folder)
        layout = (p.context_parallel_layout, p.context_parallel_exchange)
        yield model.eval(), Ranks.of(dims, device, backend, *layout, group)
    finally:
        dist.destroy_process_group()
