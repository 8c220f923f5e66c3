"""Gates: conditions on metrics.jsonl that must hold for a stage to count as ended well.

They are evaluated without PyTorch.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from torchtitan.components.changes import flat
from torchtitan.components.hooks import Hook
from torchtitan.components.manifest import complete_steps, newest_manifest
from torchtitan.config.manager import previous_folder, previous_stage
from torchtitan.config.schema import Gate, JobConfig
from torchtitan.tools.errors import GateError, UserError

logger = logging.getLogger(__name__)  # not tools.logging: a launcher should not wait for the import of rich


class Gates(Hook):
    """GateError on all ranks, after the last step of a stage, if a gate of the stage does not hold."""

    def ended(self, trainer: Any) -> None:
        gates, name = trainer.config.stage.gates, trainer.config.stage.name
        if not (trainer.finished and gates):
            return
        import torch.distributed as dist

        failure: list[str | None] = [None]
        if trainer.rank == 0:
            try:
                failure[0] = gate_failure(trainer.config, trainer.dump_folder)
            except UserError as e:
                failure[0] = str(e)
        dist.broadcast_object_list(failure, src=0, group=trainer.cpu_group)
        if failure[0]:
            raise GateError(
                f"A gate of stage {name} does not hold: {failure[0]}. The checkpoint of step {trainer.step} is kept, "
                "but the stage does not count as ended well, and its chain stops here."
            )
        logger.info(f"gates: {', '.join(gate.metric for gate in gates)} hold")


def check_gates(config: JobConfig) -> None:
    """UserError for a gate without a metric or a bound, or one that compares with a previous stage if there is none."""
    for i, gate in enumerate(config.stage.gates):
        where = f"stage.gates[{i}]"
        if not gate.metric:
            raise UserError(f'{where} has no metric: name a number of metrics.jsonl, such as metric = "loss".')
        if (gate.at_most, gate.at_least, gate.above_previous) == (None, None, None):
            raise UserError(f"{where} ({gate.metric}) has no bound: set at_most, at_least or above_previous.")
        if gate.above_previous is not None and not config.stage.after:
            raise UserError(f"{where}: above_previous compares with the previous stage, but stage.after is not set.")


def check_previous_gates(config: JobConfig) -> None:
    """UserError if this stage would start from a previous stage that has ended but whose gates do not hold.

    components/start.py checks that the previous stage exists and has ended.
    """
    if not config.stage.after or not Path(config.stage.after).is_file() or newest_manifest(config)[1] is not None:
        return
    previous, folder = previous_stage(config), previous_folder(config)
    steps = complete_steps(folder / previous.checkpoint.folder)
    if not steps or steps[-1] < previous.training.steps:
        return
    if failure := gate_failure(previous, folder):
        raise UserError(f"stage.after = {config.stage.after}: a gate of that stage does not hold: {failure}.")


def gate_failure(config: JobConfig, dump_folder: Path) -> str | None:
    """failed_gate for a stage that has written to dump_folder; reads the previous stage only if a gate needs it."""
    gates = config.stage.gates
    compares = config.stage.after and any(gate.above_previous is not None for gate in gates)
    previous = previous_folder(config) / "metrics.jsonl" if compares else None
    return failed_gate(gates, dump_folder / "metrics.jsonl", previous)


def failed_gate(gates: tuple[Gate, ...], metrics: Path, previous_metrics: Path | None) -> str | None:
    """The first gate that does not hold for metrics.jsonl, in a sentence with the numbers; None if all hold."""
    for gate in gates:
        value = _mean(metrics, gate)
        if gate.at_most is not None and not value <= gate.at_most:
            return f"{gate.metric} is {value:.4f}, more than at_most = {gate.at_most}"
        if gate.at_least is not None and not value >= gate.at_least:
            return f"{gate.metric} is {value:.4f}, less than at_least = {gate.at_least}"
        if gate.above_previous is not None:
            if previous_metrics is None:
                raise UserError(f"stage.gates: above_previous of {gate.metric} needs the metrics of a previous stage.")
            before = _mean(previous_metrics, gate)
            if not value <= before * (1 + gate.above_previous):
                change = f"{value / before - 1:+.2%}, " if before else ""
                return (
                    f"{gate.metric} is {value:.4f}, and {before:.4f} in the previous stage: {change}more than "
                    f"above_previous = {gate.above_previous:+.2%}"
                )
    return None


def _mean(path: Path, gate: Gate) -> float:
    """The mean of gate.metric over the last `gate.over` lines that have it."""
    values: list[float] = []
    try:
        lines = [json.loads(line) for line in path.read_text().splitlines()]
    except (OSError, ValueError) as e:
        raise UserError(f"stage.gates: {path} cannot be read: {e}.") from None
    if not all(isinstance(line, dict) for line in lines):
        raise UserError(f"stage.gates: {path} has lines that are not JSON objects.")
    metrics: set[str] = set()
    for line in lines:
        numbers = {key: value for key, value in flat(line).items() if isinstance(value, (int, float))}
        metrics |= set(numbers)
        if gate.metric in numbers:
            values.append(float(numbers[gate.metric]))
    if not values:
        raise UserError(
            f"stage.gates: {path} has no metric {gate.metric}; there are {', '.join(sorted(metrics)) or 'none'}."
        )
    recent = values[-gate.over :]
    return sum(recent) / len(recent)
