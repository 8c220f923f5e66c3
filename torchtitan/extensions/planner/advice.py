"""Which keys to change so that a stage fits a GPU: every combination of a few is tried, the cheapest that fits wins.

The cost of a change is the step time per token that it adds, by speed.py (what it saves counts for nothing: this is
about memory), plus a small price per key, so that the smaller of two changes that cost about the same is taken, and a
price for rounding the optimizer's state, which changes what is learned.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from torchtitan.config.checks import check_config, rows_per_step
from torchtitan.config.schema import JobConfig
from torchtitan.distributed.options.ulysses import check_ulysses
from torchtitan.extensions.planner.host_memory import host_gib
from torchtitan.extensions.planner.memory import peak_gib
from torchtitan.extensions.planner.speed import seconds_per_token
from torchtitan.extensions.planner.stage_numbers import StageNumbers, numbers_of
from torchtitan.models.transformer import TransformerArgs
from torchtitan.tools.constants import BLOCK
from torchtitan.tools.errors import UserError
from torchtitan.tools.gpus import Gpu

PRICE_OF_A_KEY = 0.005
PRICE_OF_ROUNDED_STATE = 0.02
"""Shares of the step time that a change counts for, beside the time that it costs."""

MARGIN = 0.95
"""A change is advised if the peak is at most this share of the GPU's memory."""

NewKeys = dict[str, Any]
"""New values by "table.key"."""


@dataclass(frozen=True)
class Change:
    """Keys and their new values; what becomes of the stage with them."""

    keys: NewKeys
    config: JobConfig
    stage: StageNumbers
    gib: float
    """Peak memory of a rank."""
    slower: float
    """Step time per token over that of the stage as it is, less 1."""
    cost: float

    def fits(self, gpu: Gpu) -> bool:
        return self.gib <= MARGIN * gpu.memory_gib


def with_keys(config: JobConfig, keys: NewKeys) -> JobConfig:
    """`config` with {"table.key": value} replaced."""
    for name, value in keys.items():
        table, _, key = name.partition(".")
        config = replace(config, **{table: replace(getattr(config, table), **{key: value})})
    return config


def options(config: JobConfig, world_size: int) -> list[list[NewKeys]]:
    """For each trick the ways to set its keys, first the one that changes nothing. Only keys that change are named."""
    p, t = config.parallelism, config.training

    def ways(*proposed: NewKeys) -> list[NewKeys]:
        changes = [
            {name: value for name, value in keys.items() if with_keys(config, {name: value}) != config}
            for keys in proposed
        ]
        return [{}, *filter(None, changes)]

    tokens = t.seq_len * t.local_batch_size
    degrees = [
        cp for i in range(1, 20) if (cp := p.context_parallel_degree << i) <= world_size and tokens % (BLOCK * cp) == 0
    ]
    rows: NewKeys = {}  # what keeps the rows of a step as many as they are
    if t.global_batch_size is None and t.global_batch_tokens is None:
        rows = {"training.global_batch_tokens": rows_per_step(config, world_size) * t.seq_len}
    full: NewKeys = {"activation_checkpoint.mode": "full"}
    selective: NewKeys = {"activation_checkpoint.mode": "selective", "activation_checkpoint.selective_ac_option": "op"}
    offload: NewKeys = {"activation_checkpoint.offload": True}
    recomputing = [selective] if config.activation_checkpoint.mode == "none" else []
    recomputing += [full, full | offload, selective | offload]
    result = [
        ways(*([{"training.local_batch_size": 1, **rows}] if t.local_batch_size > 1 else [])),
        ways(*({"training.loss_tile_mib": mib} for mib in (256, 64) if mib < t.loss_tile_mib)),
        ways(*({"training.mlp_tile_tokens": n} for n in (16384, 4096) if n < tokens)),
        ways(*({"parallelism.context_parallel_degree": cp, **rows} for cp in degrees)),
        ways(*recomputing),
        ways({"optimizer.state_dtype": "bfloat16"}),
        ways({"training.enable_cpu_offload": True}),
    ]
    if p.context_parallel_exchange == "ulysses":
        result.append(ways(*({"parallelism.context_parallel_head_chunks": n} for n in (2, 4))))
    return result


def possible_changes(
    config: JobConfig, args: TransformerArgs, world_size: int, gpu: Gpu, document: int | None = None
) -> Iterator[Change]:
    """Every combination that the configuration's own checks let pass, the stage as it is first.

    config: has passed them. document: length in tokens of all documents; None: one per row.
    """
    seconds_now = seconds_per_token(numbers_of(config, args, world_size, document=document), gpu)
    for combination in product(*options(config, world_size)):
        keys = {name: value for part in combination for name, value in part.items()}
        changed = with_keys(config, keys)
        try:
            check_config(changed, world_size)
            check_ulysses(args.n_heads, changed.parallelism)
            stage = numbers_of(changed, args, world_size, document=document)
        except UserError:
            continue
        slower = seconds_per_token(stage, gpu) / seconds_now - 1
        rounded = PRICE_OF_ROUNDED_STATE * ("optimizer.state_dtype" in keys)
        cost = max(slower, 0) + PRICE_OF_A_KEY * len(keys) + rounded
        yield Change(keys, changed, stage, peak_gib(stage), slower, cost)


def cheapest(candidates: list[Change], gpu: Gpu, ranks_per_host: int, host_memory_gib: float) -> Change | None:
    """The cheapest change that fits the GPU and the host; None if none does.

    Of those that cost about the same (to less than the price of a key) the one with the lowest peak: the model of the
    time is not more precise than that.
    """
    fitting = [c for c in candidates if c.fits(gpu) and host_gib(c.stage, ranks_per_host) <= host_memory_gib]
    least = min((c.cost for c in fitting), default=0.0)
    return min((c for c in fitting if c.cost < least + PRICE_OF_A_KEY), key=lambda c: c.gib, default=None)


def single_tricks(candidates: list[Change], config: JobConfig, world_size: int) -> list[Change]:
    """Each trick by itself that lowers the peak by more than 1%, cheapest first."""
    single = [keys for ways in options(config, world_size) for keys in ways if keys]
    before = candidates[0].gib
    return sorted((c for c in candidates if c.keys in single and c.gib < 0.99 * before), key=lambda c: c.cost)
