"""What scripts/estimate.py prints: the estimate as JSON values and as text; advice; a stage that fits as TOML."""

from __future__ import annotations

from typing import Any

from torchtitan.config import JobConfig, as_tables
from torchtitan.extensions.planner.advice import MARGIN, Change, NewKeys
from torchtitan.extensions.planner.host_memory import host_gib, host_kinds
from torchtitan.extensions.planner.memory import CONTEXT_GIB, FRAGMENTATION, moments, peak, peak_gib, shard_numel
from torchtitan.extensions.planner.speed import step_of
from torchtitan.extensions.planner.stage_numbers import StageNumbers
from torchtitan.tools.gpus import Gpu

GIB = 2**30


def make_estimate(stage: StageNumbers, gpu: Gpu | None, ranks_per_host: int) -> dict[str, Any]:
    """Everything that is known before a run, in bytes, FLOPs and seconds; keys that end in _gib in GiB. gpu: None for
    the CPU, whose time is not estimated."""
    top = peak(stage)
    result: dict[str, Any] = {
        "gpu": gpu.name if gpu else "cpu",
        "degrees": {"dp_replicate": stage.dp_replicate, "dp_shard": stage.dp_shard, "cp": stage.cp, "tp": stage.tp},
        "tokens_per_rank": stage.tokens,
        "accumulation": stage.accumulation,
        "tokens_per_step": stage.step_tokens,
        "parameters_per_rank": shard_numel(stage),
        "peak_gib": peak_gib(stage),
        "peak_at": top.name,
        "bytes_at_peak": {kind: size for kind, size in top.kinds.items() if size},
        "bytes_by_moment": {moment.name: moment.total for moment in moments(stage)},
        "host_gib": host_gib(stage, ranks_per_host),
        "host_bytes_per_rank": dict(host_kinds(stage)),
    }
    if gpu:
        step, ranks = step_of(stage, gpu), stage.world
        result |= {
            "fits": peak_gib(stage) <= MARGIN * gpu.memory_gib,
            "model_flops_per_step": step.model_flops,
            "hardware_flops_per_step": step.hardware_flops,
            "seconds_per_step": [step.fastest, step.slowest],
            "tokens_per_second_per_gpu": [stage.step_tokens / s / ranks for s in (step.slowest, step.fastest)],
            "mfu": [step.model_flops / s / ranks / gpu.bf16_tflops / 1e12 for s in (step.slowest, step.fastest)],
            "received_bytes_per_step": {
                "fsdp": step.fsdp_bytes,
                "context": step.context_bytes,
                "tensor": step.tensor_bytes,
                "host": step.host_link_bytes,
            },
        }
    return result


def format_estimate(estimate: dict[str, Any], stage: StageNumbers, gpu: Gpu | None, ranks_per_host: int) -> str:
    """make_estimate's result as lines."""
    documents = f"{stage.document:,} tokens"
    if stage.document >= stage.stream // stage.rows:
        documents = "one per row (the most work)"
    memory = sorted(estimate["bytes_at_peak"].items(), key=lambda item: -item[1])
    if stage.device == "cuda":
        memory += [("fragmentation", peak(stage).total * FRAGMENTATION), ("context, NCCL", CONTEXT_GIB * GIB)]
    limit = ""
    if gpu:
        tight = estimate["peak_gib"] <= gpu.memory_gib
        verdict = "fits" if estimate["fits"] else f"TIGHT: over {MARGIN:.0%}" if tight else "DOES NOT FIT"
        limit = f" of {gpu.memory_gib:g} on {gpu.name}: {verdict}"
    others = (f"{m} {size / GIB:.2f}" for m, size in estimate["bytes_by_moment"].items() if m != estimate["peak_at"])
    lines = [
        f"{stage.world} ranks: dp_replicate {stage.dp_replicate}, dp_shard {stage.dp_shard}, cp {stage.cp}, "
        f"tp {stage.tp}; {stage.tokens:,} tokens per rank and micro-batch, {stage.accumulation} micro-batches, "
        f"{stage.step_tokens:,} tokens per step",
        f"documents: {documents}",
        "",
        f"memory per rank at its peak ({estimate['peak_at']}), GiB",
        *(f"  {kind:<28}{size / GIB:9.2f}" for kind, size in memory),
        f"  {'together':<28}{estimate['peak_gib']:9.2f}{limit}",
        f"other moments, GiB: {', '.join(others)}",
    ]
    if estimate["host_gib"]:
        kinds = ", ".join(f"{kind} {size / GIB:.1f}" for kind, size in estimate["host_bytes_per_rank"].items())
        lines.append(f"host memory, GiB: {estimate['host_gib']:.1f} for {ranks_per_host} ranks (each: {kinds})")
    if gpu:
        fastest, slowest = estimate["seconds_per_step"]
        slow, fast = estimate["tokens_per_second_per_gpu"]
        low, high = estimate["mfu"]
        moved = [f"{kind} {size / 1e9:.1f}" for kind, size in estimate["received_bytes_per_step"].items() if size]
        lines += [
            "",
            f"FLOPs per step: {estimate['model_flops_per_step']:.3e} by the mask, "
            f"{estimate['hardware_flops_per_step']:.3e} with recomputation",
            f"received per rank and step, GB: {', '.join(moved) or 'nothing'}",
            f"seconds per step: {fastest:,.1f} to {slowest:,.1f}, tokens/s per GPU: {slow:,.0f} to "
            f"{fast:,.0f}, MFU {low:.0%} to {high:.0%} (a range by assumed efficiencies: docs/planning.md)",
        ]
    return "\n".join(lines)


def format_keys(keys: NewKeys) -> str:
    """{"a.b": 1} -> a.b = 1."""
    return ", ".join(f"{name} = {_toml(value)}" for name, value in keys.items()) or "nothing"


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, str) else str(value)


def format_advice(single: list[Change], best: Change | None, gpu: Gpu) -> str:
    """What each trick does by itself, cheapest first, and the cheapest combination that fits."""
    lines = ["each change that helps by itself, cheapest first: GiB, step time per token"]
    for change in single:
        fits = "  fits" if change.fits(gpu) else ""
        lines.append(f"  {change.gib:8.1f}  {change.slower:+7.1%}  {format_keys(change.keys)}{fits}")
    if best:
        lines.append(
            f"the cheapest change that fits: {format_keys(best.keys)} "
            f"({best.gib:.1f} GiB of {gpu.memory_gib:g}, step time per token {best.slower:+.1%})"
        )
    return "\n".join(lines)


def fit_toml(config: JobConfig, best: Change, file: str) -> str:
    """A stage that extends `file`, whose configuration is `config`, with every key that differs after the change."""
    before, after = as_tables(config), as_tables(best.config)
    lines = [f"# {best.gib:.1f} GiB per rank by scripts/estimate.py", f'extends = "{file}"']
    for table, keys in after.items():
        changed = [f"{key} = {_toml(value)}" for key, value in keys.items() if before[table].get(key) != value]
        if changed:
            lines += ["", f"[{table}]", *changed]
    return "\n".join(lines) + "\n"
