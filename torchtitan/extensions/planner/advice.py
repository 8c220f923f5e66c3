"""Which keys to change so that a stage fits a GPU: every combination of a few is tried, the cheapest that fits wins.

The cost of a change is the step time that it adds a token, by speed.py (what it saves counts for nothing: this
is about memory), and a small price for every key, so that the smaller change is taken of two that cost about the same,
and for rounding the optimizer's state, which changes what is learned.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from torchtitan.config.checks import check_config, rows_per_step
from torchtitan.config.schema import JobConfig
from torchtitan.distributed.options.ulysses import check_ulysses
from torchtitan.extensions.planner.host_memory import host_bytes
from torchtitan.extensions.planner.memory import peak_gib
from torchtitan.extensions.planner.speed import step_of
from torchtitan.extensions.planner.stage_numbers import StageNumbers, numbers_of
from torchtitan.models.transformer import TransformerArgs
from torchtitan.tools.constants import BLOCK
from torchtitan.tools.errors import UserError
from torchtitan.tools.gpus import Gpu

PRICE_OF_A_KEY = 0.005
PRICE_OF_ROUNDED_STATE = 0.02
"""Shares of the step time that a change counts for beside the time that it costs."""

MARGIN = 0.95
"""A change is advised if the peak is at most this share of the GPU's memory."""

Keys = dict[str, Any]


@dataclass(frozen=True)
class Change:
    """Keys and their new values; what becomes of the stage with them."""

    keys: Keys
    config: JobConfig
    stage: StageNumbers
    gib: float
    slower: float
    """Step time a token over that of the stage as it is, less 1."""
    cost: float

    def fits(self, gpu: Gpu) -> bool:
        return self.gib <= MARGIN * gpu.memory_gib


def with_keys(config: JobConfig, keys: Keys) -> JobConfig:
    """`config` with {"table.key": value} replaced."""
    for name, value in keys.items():
        table, _, key = name.partition(".")
        config = replace(config, **{table: replace(getattr(config, table), **{key: value})})
    return config


def options(config: JobConfig, args: TransformerArgs, world_size: int) -> list[list[Keys]]:
    """For each trick the ways to set its keys, the first being as it is now; keys that are as wanted do not occur."""
    p, t, ac = config.parallelism, config.training, config.activation_checkpoint

    def ways(*wanted: Keys) -> list[Keys]:
        return [{}, *(keys for keys in (_changed(config, k) for k in wanted) if keys)]

    tokens = t.seq_len * t.local_batch_size
    degrees = [cp for cp in _doubled(p.context_parallel_degree, world_size) if tokens % (BLOCK * cp) == 0]
    rows: Keys = {}
    if t.global_batch_size is None and t.global_batch_tokens is None:  # else a step would have fewer rows
        rows = {"training.global_batch_tokens": rows_per_step(config, world_size) * t.seq_len}
    recomputing: list[Keys] = [{"activation_checkpoint.mode": "full"}] if ac.mode != "full" else []
    if ac.mode == "none":
        recomputing.insert(
            0, {"activation_checkpoint.mode": "selective", "activation_checkpoint.selective_ac_option": "op"}
        )
    recomputing += [
        {"activation_checkpoint.mode": "full", "activation_checkpoint.offload": True},
        {
            "activation_checkpoint.mode": "selective",
            "activation_checkpoint.selective_ac_option": "op",
            "activation_checkpoint.offload": True,
        },
    ]
    tiles = [{"training.mlp_tile_tokens": n} for n in (16384, 4096) if n < tokens]
    loss = [{"training.loss_tile_mib": mib} for mib in (256, 64) if mib < t.loss_tile_mib]
    rows_at_once: list[Keys] = []
    if t.local_batch_size > 1:
        one = dict(rows) if t.global_batch_size is None and t.global_batch_tokens is None else {}
        rows_at_once.append({"training.local_batch_size": 1, **one})
    result = [
        ways(*rows_at_once),
        ways(*loss),
        ways(*tiles),
        ways(*({"parallelism.context_parallel_degree": cp, **rows} for cp in degrees)),
        ways(*recomputing),
        ways({"optimizer.state_dtype": "bfloat16"}),
        ways({"training.enable_cpu_offload": True}),
    ]
    if p.context_parallel_exchange == "ulysses":
        result.append(ways(*({"parallelism.context_parallel_head_chunks": n} for n in (2, 4))))
    return result


def _changed(config: JobConfig, keys: Keys) -> Keys:
    """Those of the keys that have another value now."""
    result = {}
    for name, value in keys.items():
        table, _, key = name.partition(".")
        if getattr(getattr(config, table), key) != value:
            result[name] = value
    return result


def _doubled(degree: int, most: int) -> list[int]:
    result = []
    while degree * 2 <= most:
        degree *= 2
        result.append(degree)
    return result


def changes(
    config: JobConfig, args: TransformerArgs, world_size: int, gpu: Gpu, document: int | None = None
) -> Iterator[Change]:
    """Every combination that the configuration's own checks let pass, the stage as it is first."""
    make = _maker(config, args, world_size, gpu, document)
    for combination in product(*options(config, args, world_size)):
        keys = {name: value for part in combination for name, value in part.items()}
        if change := make(keys):
            yield change


def _maker(
    config: JobConfig, args: TransformerArgs, world_size: int, gpu: Gpu, document: int | None
) -> Callable[[Keys], Change | None]:
    before = numbers_of(config, args, world_size, document=document)
    time_before = step_of(before, gpu).middle / before.step_tokens

    def make(keys: Keys) -> Change | None:
        changed = with_keys(config, keys)
        p = changed.parallelism
        try:
            check_config(changed, world_size)
            if p.context_parallel_exchange == "ulysses" and p.context_parallel_degree > 1:
                check_ulysses(
                    args.n_heads,
                    p.context_parallel_degree,
                    p.tensor_parallel_degree,
                    p.context_parallel_head_chunks,
                )
            stage = numbers_of(changed, args, world_size, document=document)
        except UserError:
            return None
        slower = step_of(stage, gpu).middle / stage.step_tokens / time_before - 1
        rounded = PRICE_OF_ROUNDED_STATE * ("optimizer.state_dtype" in keys)
        return Change(
            keys, changed, stage, peak_gib(stage), slower, max(slower, 0) + PRICE_OF_A_KEY * len(keys) + rounded
        )

    return make


def host_gib(stage: StageNumbers, ranks: int) -> float:
    """Host memory that the ranks of a machine need together."""
    return host_bytes(stage) * ranks / 2**30


def cheapest(candidates: list[Change], gpu: Gpu, ranks_a_host: int, host_memory_gib: float) -> Change | None:
    """The cheapest that fits the GPU and the host; None where none does. Of those that cost about the same, by less
    than the price of a key, that with the lowest peak: the model of the time is coarser than that."""
    fitting = [c for c in candidates if c.fits(gpu) and host_gib(c.stage, ranks_a_host) <= host_memory_gib]
    least = min((c.cost for c in fitting), default=0.0)
    return min((c for c in fitting if c.cost < least + PRICE_OF_A_KEY), key=lambda c: c.gib, default=None)


def single_tricks(candidates: list[Change], config: JobConfig, args: TransformerArgs, world_size: int) -> list[Change]:
    """Each trick by itself that lowers the peak, cheapest first."""
    single = [keys for ways in options(config, args, world_size) for keys in ways if keys]
    before = candidates[0].gib
    return sorted((c for c in candidates if c.keys in single and c.gib < 0.99 * before), key=lambda c: c.cost)
