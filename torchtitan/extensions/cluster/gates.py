"""Conditions on metrics.jsonl without which a stage does not count as ended well, and the stage before: where it wrote,
and whether it is still what this one went on from.

Read without PyTorch.
"""

from __future__ import annotations

import json
from pathlib import Path

from torchtitan.components.lineage import flat, folder_before
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
