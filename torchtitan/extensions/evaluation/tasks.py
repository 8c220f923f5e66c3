"""The tasks that [evaluation] names, and means over the groups that papers report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torchtitan.extensions.evaluation import recall, ruler
from torchtitan.extensions.evaluation.checks import GROUPS, missing_file
from torchtitan.extensions.evaluation.fitting import Task
from torchtitan.extensions.evaluation.ruler_qa import qa_task


def tasks_of(names: Sequence[str], qa_files: Sequence[Path] = ()) -> list[Task]:
    """Each task once, in the order of names. "ruler" leaves out qa_1 and qa_2 if they have no file. UserError if one of
    these is named and has no file, or for a file that cannot be read."""
    qa_tasks = [qa_task(file) for file in qa_files]
    tasks = ruler.TASKS | recall.TASKS | {task.name: task for task in reversed(qa_tasks)}
    chosen: dict[str, Task] = {}
    for name in names:
        for member in GROUPS.get(name, (name,)):
            if member in tasks:
                chosen[member] = tasks[member]
            elif name not in GROUPS:
                raise missing_file(name)
    return list(chosen.values())


def group_means(grids: dict[str, Any]) -> dict[str, Any]:
    """By group: the mean over its tasks of each task's mean over depths, at the lengths that all of them have.

    grids: by task, as mean_by_length_and_depth gives them. A group of which fewer than two tasks were asked has no
    mean. "tasks" and "of" say how many of how many tasks a mean is over.
    """
    means = {}
    for group, members in GROUPS.items():
        asked = [grids[name] for name in members if name in grids]
        if len(asked) < 2:
            continue
        lengths = sorted(set.intersection(*(set(grid["lengths"]) for grid in asked)))
        means[group] = {
            "lengths": lengths,
            "tasks": len(asked),
            "of": len(members),
            "score": [_mean([mean_at_length(grid, "score", n) for grid in asked]) for n in lengths],
            "exact": [_mean([mean_at_length(grid, "exact", n) for grid in asked]) for n in lengths],
        }
    return means


def group_name(group: str, means: dict[str, Any]) -> str:
    """The group's name and, if some tasks were left out, how many count: "ruler mean over 11 of 13 tasks"."""
    tasks, of = means["tasks"], means["of"]
    return group if tasks == of else f"{group} mean over {tasks} of {of} tasks"


def mean_at_length(grid: dict[str, Any], what: str, length: int) -> float | None:
    """Mean over depths of grid[what] at a length; None if it has no number there."""
    if length not in grid["lengths"]:
        return None
    return _mean([cell for cell in grid[what][grid["lengths"].index(length)] if cell is not None])


def _mean(numbers: Sequence[float | None]) -> float | None:
    """None if there are no numbers, or one is missing."""
    known = [n for n in numbers if n is not None]
    return sum(known) / len(known) if known and len(known) == len(numbers) else None
