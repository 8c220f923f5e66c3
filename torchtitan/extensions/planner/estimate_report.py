"""What scripts/estimate.py prints: a plan as tables for people, and as plain dictionaries for JSON."""

from __future__ import annotations

from typing import Any

from torchtitan.config import JobConfig, as_tables
from torchtitan.extensions.planner.advice import MARGIN, Change, Keys, host_gib
from torchtitan.extensions.planner.host_memory import host_kinds
from torchtitan.extensions.planner.memory import CONTEXT_GIB, FRAGMENTATION, moments, peak, peak_gib, shard
from torchtitan.extensions.planner.speed import Step
from torchtitan.extensions.planner.stage_numbers import StageNumbers
from torchtitan.tools.gpus import Gpu

GIB = 2**30


def as_dict(stage: StageNumbers, gpu: Gpu | None, step: Step | None, ranks_a_host: int) -> dict[str, Any]:
    """Everything that is known beforehand, in bytes, FLOPs and seconds; peak_gib in GiB."""
    top = peak(stage)
    result: dict[str, Any] = {
        "gpu": gpu.name if gpu else "cpu",
        "degrees": {"dp_replicate": stage.dp_replicate, "dp_shard": stage.dp_shard, "cp": stage.cp, "tp": stage.tp},
        "tokens_per_rank": stage.tokens,
        "accumulation": stage.accumulation,
        "tokens_per_step": stage.step_tokens,
        "parameters_per_rank": shard(stage),
        "peak_gib": peak_gib(stage),
        "peak_at": top.name,
        "bytes_at_peak": {kind: size for kind, size in top.kinds.items() if size},
        "bytes_by_moment": {moment.name: moment.total for moment in moments(stage)},
        "host_gib": host_gib(stage, ranks_a_host),
        "host_bytes_per_rank": dict(host_kinds(stage)),
    }
    if gpu and step:
        ranks = stage.world
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
                "host": step.host_bytes,
            },
        }
    return result


def as_text(stage: StageNumbers, gpu: Gpu | None, step: Step | None, ranks_a_host: int) -> str:
    """The same as lines."""
    plan = as_dict(stage, gpu, step, ranks_a_host)
    top = peak(stage)
    whole = (
        f"{stage.document:,} tokens" if stage.document < stage.stream // stage.rows else "one per row (the most work)"
    )
    lines = [
        f"{stage.world} ranks: dp_replicate {stage.dp_replicate}, dp_shard {stage.dp_shard}, cp {stage.cp}, "
        f"tp {stage.tp}; {stage.tokens:,} tokens per rank and micro-batch, {stage.accumulation} micro-batches, "
        f"{stage.step_tokens:,} tokens per step",
        f"documents: {whole}",
        "",
        f"memory per rank at its peak ({top.name}), GiB",
    ]
    for kind, size in sorted(top.kinds.items(), key=lambda item: -item[1]):
        if size:
            lines.append(f"  {kind:<28}{size / GIB:9.2f}")
    if stage.device == "cuda":
        lines.append(f"  {'fragmentation':<28}{top.total * FRAGMENTATION / GIB:9.2f}")
        lines.append(f"  {'context, NCCL':<28}{CONTEXT_GIB:9.2f}")
    limit = ""
    if gpu:
        tight = plan["peak_gib"] <= gpu.memory_gib
        verdict = "fits" if plan["fits"] else f"TIGHT: over {MARGIN:.0%}" if tight else "DOES NOT FIT"
        limit = f" of {gpu.memory_gib:g} on {gpu.name}: {verdict}"
    lines.append(f"  {'together':<28}{plan['peak_gib']:9.2f}{limit}")
    lines.append(
        "other moments, GiB: " + ", ".join(f"{m.name} {m.total / GIB:.2f}" for m in moments(stage) if m != top)
    )
    if plan["host_gib"]:
        kinds = ", ".join(f"{kind} {size / GIB:.1f}" for kind, size in host_kinds(stage).items())
        lines.append(f"host memory, GiB: {plan['host_gib']:.1f} for {ranks_a_host} ranks (each: {kinds})")
    if gpu and step:
        slow, fast = plan["tokens_per_second_per_gpu"]
        low, high = plan["mfu"]
        moved = ", ".join(f"{kind} {size / 1e9:.1f}" for kind, size in plan["received_bytes_per_step"].items() if size)
        lines += [
            "",
            f"FLOPs per step: {step.model_flops:.3e} by the mask, {step.hardware_flops:.3e} with recomputation",
            f"received per rank and step, GB: {moved or 'nothing'}",
            f"seconds per step: {step.fastest:,.1f} to {step.slowest:,.1f}, tokens/s per GPU: {slow:,.0f} to "
            f"{fast:,.0f}, MFU {low:.0%} to {high:.0%} (a range by assumed efficiencies: docs/planning.md)",
        ]
    return "\n".join(lines)


def keys_as_text(keys: Keys) -> str:
    """{"a.b": 1} -> a.b = 1."""
    return ", ".join(f"{name} = {_literal(value)}" for name, value in keys.items()) or "nothing"


def _literal(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, str) else str(value)


def advice_as_text(single: list[Change], best: Change | None, gpu: Gpu) -> str:
    """What each trick does by itself, cheapest first, and the cheapest combination that fits."""
    lines = ["each change that helps by itself, cheapest first: GiB, step time per token"]
    for change in single:
        fits = "  fits" if change.fits(gpu) else ""
        lines.append(f"  {change.gib:8.1f}  {change.slower:+7.1%}  {keys_as_text(change.keys)}{fits}")
    if best:
        lines.append(
            f"the cheapest change that fits: {keys_as_text(best.keys)} "
            f"({best.gib:.1f} GiB of {gpu.memory_gib:g}, step time per token {best.slower:+.1%})"
        )
    return "\n".join(lines)


def fit_toml(config: JobConfig, best: Change, file: str) -> str:
    """A stage that extends `file`, whose configuration is `config`, with all that the change has otherwise."""
    before, after = as_tables(config), as_tables(best.config)
    lines = [f"# {best.gib:.1f} GiB per rank by scripts/estimate.py", f'extends = "{file}"']
    for table, keys in after.items():
        changed = [f"{key} = {_literal(value)}" for key, value in keys.items() if before[table].get(key) != value]
        if changed:
            lines += ["", f"[{table}]", *changed]
    return "\n".join(lines) + "\n"
