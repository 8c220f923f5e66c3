"""What scripts/estimate.py prints: a plan as tables for people, and as plain dictionaries for JSON."""

from __future__ import annotations

from typing import Any

from torchtitan.config import JobConfig, as_tables
from torchtitan.extensions.planner.advice import MARGIN, Change, Keys, host_gib
from torchtitan.extensions.planner.job import Job
from torchtitan.extensions.planner.memory import CONTEXT_GIB, FRAGMENTATION, host, moments, peak, peak_gib, shard
from torchtitan.extensions.planner.speed import Step
from torchtitan.tools.gpus import Gpu

GIB = 2**30


def as_dict(job: Job, gpu: Gpu | None, step: Step | None, ranks_a_host: int) -> dict[str, Any]:
    """Everything that is known beforehand, in bytes, FLOPs and seconds; peak_gib in GiB."""
    top = peak(job)
    result: dict[str, Any] = {
        "gpu": gpu.name if gpu else "cpu",
        "degrees": {"dp_replicate": job.dp_replicate, "dp_shard": job.dp_shard, "cp": job.cp, "tp": job.tp},
        "tokens_per_rank": job.tokens,
        "accumulation": job.accumulation,
        "tokens_per_step": job.step_tokens,
        "parameters_per_rank": shard(job),
        "peak_gib": peak_gib(job),
        "peak_at": top.name,
        "bytes_at_peak": {kind: size for kind, size in top.kinds.items() if size},
        "bytes_by_moment": {moment.name: moment.total for moment in moments(job)},
        "host_gib": host_gib(job, ranks_a_host),
        "host_bytes_per_rank": dict(host(job)),
    }
    if gpu and step:
        ranks = job.world
        result |= {
            "fits": peak_gib(job) <= MARGIN * gpu.memory_gib,
            "model_flops_per_step": step.model_flops,
            "hardware_flops_per_step": step.hardware_flops,
            "seconds_per_step": [step.fastest, step.slowest],
            "tokens_per_second_per_gpu": [job.step_tokens / s / ranks for s in (step.slowest, step.fastest)],
            "mfu": [step.model_flops / s / ranks / gpu.bf16_tflops / 1e12 for s in (step.slowest, step.fastest)],
            "received_bytes_per_step": {
                "fsdp": step.fsdp_bytes,
                "context": step.context_bytes,
                "tensor": step.tensor_bytes,
                "host": step.host_bytes,
            },
        }
    return result


def as_text(job: Job, gpu: Gpu | None, step: Step | None, ranks_a_host: int) -> str:
    """The same as lines."""
    plan = as_dict(job, gpu, step, ranks_a_host)
    top = peak(job)
    whole = f"{job.document:,} tokens" if job.document < job.stream // job.rows else "one a row (the most work)"
    lines = [
        f"{job.world} ranks: dp_replicate {job.dp_replicate}, dp_shard {job.dp_shard}, cp {job.cp}, tp {job.tp}; "
        f"{job.tokens:,} tokens a rank and micro-batch, {job.accumulation} micro-batches, {job.step_tokens:,} tokens a "
        "step",
        f"documents: {whole}",
        "",
        f"memory of a rank at its peak ({top.name}), GiB",
    ]
    for kind, size in sorted(top.kinds.items(), key=lambda item: -item[1]):
        if size:
            lines.append(f"  {kind:<28}{size / GIB:9.2f}")
    if job.device == "cuda":
        lines.append(f"  {'fragmentation':<28}{top.total * FRAGMENTATION / GIB:9.2f}")
        lines.append(f"  {'context, NCCL':<28}{CONTEXT_GIB:9.2f}")
    limit = ""
    if gpu:
        tight = plan["peak_gib"] <= gpu.memory_gib
        verdict = "fits" if plan["fits"] else f"TIGHT: over {MARGIN:.0%}" if tight else "DOES NOT FIT"
        limit = f" of {gpu.memory_gib:g} on {gpu.name}: {verdict}"
    lines.append(f"  {'together':<28}{plan['peak_gib']:9.2f}{limit}")
    lines.append("other moments, GiB: " + ", ".join(f"{m.name} {m.total / GIB:.2f}" for m in moments(job) if m != top))
    if plan["host_gib"]:
        kinds = ", ".join(f"{kind} {size / GIB:.1f}" for kind, size in host(job).items())
        lines.append(f"host memory, GiB: {plan['host_gib']:.1f} for {ranks_a_host} ranks (each: {kinds})")
    if gpu and step:
        slow, fast = plan["tokens_per_second_per_gpu"]
        low, high = plan["mfu"]
        moved = ", ".join(f"{kind} {size / 1e9:.1f}" for kind, size in plan["received_bytes_per_step"].items() if size)
        lines += [
            "",
            f"FLOPs of a step: {step.model_flops:.3e} by the mask, {step.hardware_flops:.3e} with recomputation",
            f"received by a rank in a step, GB: {moved or 'nothing'}",
            f"seconds a step: {step.fastest:,.1f} to {step.slowest:,.1f}, tokens/s a GPU: {slow:,.0f} to {fast:,.0f}, "
            f"MFU {low:.0%} to {high:.0%} (a range by assumed efficiencies: docs/planning.md)",
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
    lines = ["each change that helps by itself, cheapest first: GiB, step time a token"]
    for change in single:
        fits = "  fits" if change.fits(gpu) else ""
        lines.append(f"  {change.gib:8.1f}  {change.slower:+7.1%}  {keys_as_text(change.keys)}{fits}")
    if best:
        lines.append(
            f"the cheapest change that fits: {keys_as_text(best.keys)} "
            f"({best.gib:.1f} GiB of {gpu.memory_gib:g}, step time a token {best.slower:+.1%})"
        )
    return "\n".join(lines)


def fit_toml(config: JobConfig, best: Change, file: str) -> str:
    """A stage that extends `file`, whose configuration is `config`, with all that the change has otherwise."""
    before, after = as_tables(config), as_tables(best.config)
    lines = [f"# {best.gib:.1f} GiB a rank by scripts/estimate.py", f'extends = "{file}"']
    for table, keys in after.items():
        changed = [f"{key} = {_literal(value)}" for key, value in keys.items() if before[table].get(key) != value]
        if changed:
            lines += ["", f"[{table}]", *changed]
    return "\n".join(lines) + "\n"
