"""Conditions on metrics.jsonl without which a stage does not count as ended well, and the stage before: where it wrote,
and whether it is still what this one went on from.

Read without PyTorch.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torchtitan.components.manifest import complete_steps, digest, read_manifest
from torchtitan.config import load_config
from torchtitan.config.schema import Gate, JobConfig
from torchtitan.tools.errors import UserError


def gate_failure(config: JobConfig, dump_folder: Path) -> str | None:
    """failed_gate for a stage that wrote to dump_folder. The stage before is looked for only where a gate asks."""
    gates = config.stage.gates
    compares = any(gate.above_previous is not None for gate in gates)
    return failed_gate(gates, dump_folder / "metrics.jsonl", metrics_before(config) if compares else None)


def failed_gate(gates: tuple[Gate, ...], metrics: Path, metrics_before: Path | None) -> str | None:
    """Which of stage.gates does not hold on metrics.jsonl, in a sentence with the numbers; None: all hold."""
    for gate in gates:
        value = _mean(metrics, gate)
        if gate.at_most is not None and not value <= gate.at_most:
            return f"{gate.metric} is {value:.4f}, more than at_most = {gate.at_most}"
        if gate.at_least is not None and not value >= gate.at_least:
            return f"{gate.metric} is {value:.4f}, less than at_least = {gate.at_least}"
        if gate.above_previous is not None:
            if metrics_before is None:
                raise UserError(f"stage.gates: above_previous of {gate.metric} needs the metrics of a stage before.")
            before = _mean(metrics_before, gate)
            if not value <= before * (1 + gate.above_previous):
                return (
                    f"{gate.metric} is {value:.4f}, and {before:.4f} in the stage before: {value / before - 1:+.2%}, "
                    f"more than above_previous = {gate.above_previous:+.2%}"
                )
    return None


def metrics_before(config: JobConfig) -> Path | None:
    """metrics.jsonl of the stage before."""
    return folder_before(config) / "metrics.jsonl" if config.stage.after else None


def folder_before(config: JobConfig) -> Path:
    """The dump folder of the stage before, which config.stage.after must name."""
    if config.stage.after_dump_folder:
        return Path(config.stage.after_dump_folder)
    return Path(load_config(["--job.config_file", config.stage.after or ""]).job.dump_folder)


def stage_as_run(config: JobConfig) -> JobConfig:
    """The configuration of the stage before: as it was run (config.toml in its dump folder, which holds the overrides),
    else as its file says."""
    as_run = folder_before(config) / "config.toml"
    return load_config(["--job.config_file", str(as_run) if as_run.is_file() else config.stage.after or ""])


def check_before(config: JobConfig, manifest: dict[str, Any] | None) -> None:
    """UserError where a stage and the one before it share a dump folder, or where the stage before is not what this one
    went on from any more: it has been trained anew, or for longer.

    manifest: of this stage's newest checkpoint, None without one.
    """
    if not config.stage.after:
        return
    try:
        before = folder_before(config)
    except UserError:
        return  # a run that starts from there says so; one that is resumed needs nothing of it
    if before.resolve() == Path(config.job.dump_folder).resolve():
        raise UserError(
            f"stage {config.stage.name} and the stage before it ({config.stage.after}) have one job.dump_folder, "
            f"{before}, and would be taken for one another: give this stage another."
        )
    lineage = (manifest or {}).get("stages_before") or [{}]
    step, known = lineage[-1].get("step"), lineage[-1].get("digest")
    if not known:
        return
    try:
        folder = before / stage_as_run(config).checkpoint.folder
        newest = complete_steps(folder)[-1]
        same = newest == step and digest(read_manifest(folder / f"step-{newest}")) == known
    except (IndexError, UserError):
        return  # not there any more, or damaged: nothing of it is needed
    if not same:
        raise UserError(
            f"Stage {config.stage.name} went on from step {step} of {config.stage.after}, which has been trained anew "
            f"or for longer since: {folder}/step-{newest} is another checkpoint. Delete {config.job.dump_folder} to "
            "train this stage from it, choose another job.dump_folder, or name where the old one is "
            "(stage.after_dump_folder)."
        )


def _mean(path: Path, gate: Gate) -> float:
    """Over the last `gate.over` lines that have the metric."""
    values: list[float] = []
    try:
        lines = [json.loads(line) for line in path.read_text().splitlines()]
    except (OSError, json.JSONDecodeError) as e:
        raise UserError(f"stage.gates: {path} cannot be read: {e}.") from None
    known: set[str] = set()
    for line in lines:
        numbers = flat(line)
        known |= {key for key, value in numbers.items() if isinstance(value, (int, float))}
        if isinstance(numbers.get(gate.metric), (int, float)):
            values.append(float(numbers[gate.metric]))
    if not values:
        raise UserError(
            f"stage.gates: {path} has no metric {gate.metric}; there are {', '.join(sorted(known)) or 'none'}."
        )
    recent = values[-gate.over :]
    return sum(recent) / len(recent)


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"rope": {"theta": 1}} -> {"rope.theta": 1}."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        result |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return result
