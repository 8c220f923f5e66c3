"""Where an evaluation's result goes: a JSON file with pictures beside it, TensorBoard's scalars, a line of the log."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from torchtitan.extensions.evaluation.checks import GROUPS, NEEDLE_TASK
from torchtitan.extensions.evaluation.tasks import group_name, mean_at_length
from torchtitan.tools.errors import UserError
from torchtitan.tools.folders import read_json, write_text


def settings_in(file: Path) -> dict[str, Any] | None:
    """The settings ("asked") of the results in a file; None if there are no results, or they do not say."""
    try:
        settings = read_json(file).get("asked")
    except (OSError, UserError):
        return None
    return settings if isinstance(settings, dict) else None


def write_result(result: dict[str, Any], file: Path) -> None:
    """Write the JSON, complete or not at all, and a picture beside it for each part of the result: FILE_TASK.png per
    task with depths, FILE_tasks.png for all others, FILE_positions.png. Pictures of an earlier result are deleted."""
    from torchtitan.extensions.evaluation import plots

    file.parent.mkdir(parents=True, exist_ok=True)
    figures = plots.task_figures(result)
    if result["perplexity"]:
        figures["positions"] = plots.position_figure(result)
    names = {"positions", "tasks", NEEDLE_TASK, *(task for tasks in GROUPS.values() for task in tasks)}
    for name in names - figures.keys():
        file.with_name(f"{file.stem}_{name}.png").unlink(missing_ok=True)
    for name, figure in figures.items():
        plots.save(figure, file.with_name(f"{file.stem}_{name}.png"))
    write_text(file, json.dumps(result, indent=1, allow_nan=False) + "\n")


def scalars(result: dict[str, Any]) -> dict[str, float]:
    """Numbers for TensorBoard by name: per text the mean loss and the loss of its last range; per task or group and
    length the share of exact answers, the log-probability and the score."""
    numbers: dict[str, float | None] = {}
    for name, text in result["perplexity"].items():
        numbers[f"loss/{name}"] = text["mean_nll"]
        numbers[f"loss_of_last_bucket/{name}"] = text["nll"][-1]
    for task, grid in result["tasks"].items():
        for length in grid["lengths"]:
            for what in ("exact", "logprob", "score"):
                numbers[f"{task}_{what}/{length}"] = mean_at_length(grid, what, length)
    for group, means in result["groups"].items():
        for i, length in enumerate(means["lengths"]):
            for what in ("exact", "score"):
                numbers[f"{group}_{what}/{length}"] = means[what][i]
    return {key: value for key, value in numbers.items() if value is not None}


def summary(result: dict[str, Any]) -> str:
    """The result in one line, for the log."""
    parts = []
    for name, text in result["perplexity"].items():
        if text["mean_nll"] is not None:
            parts.append(f"{name} loss {text['mean_nll']:.3f} (perplexity {math.exp(min(text['mean_nll'], 700)):.2f})")
    numbers = scalars(result)
    grouped = {task for group in result["groups"] for task in GROUPS[group]}
    shown = {task: (task, grid["lengths"]) for task, grid in result["tasks"].items() if task not in grouped}
    shown |= {group: (group_name(group, means), means["lengths"]) for group, means in result["groups"].items()}
    for key, (name, lengths) in shown.items():
        for what, words in (("exact", "answered exactly"), ("score", "written")):
            cells = [f"{numbers[k]:.0%} at {n:,}" for n in lengths if (k := f"{key}_{what}/{n}") in numbers]
            if cells:
                parts.append(f"{name} {words} {', '.join(cells)}")
    return "; ".join(parts) or "nothing"
