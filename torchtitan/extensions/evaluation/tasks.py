"""Names of [evaluation] tasks -> tasks, and the means over the groups that papers report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torchtitan.extensions.evaluation import recall, ruler
from torchtitan.extensions.evaluation.fitting import Task
from torchtitan.extensions.evaluation.ruler_qa import qa_task, read

GROUPS = {"ruler": ruler.ALL, "recall": tuple(recall.TASKS)}


def tasks_of(names: Sequence[str], qa_files: Sequence[Path] = ()) -> list[Task]:
    """Each task once, in the order of names. "ruler" leaves out qa_1 and qa_2 if no file is for them. UserError if one
    of these is named and has no file, or for a file that cannot be read."""
    files = tuple(qa_files)
    with_file = {read(file).task for file in files}
    chosen: dict[str, None] = {}
    for name in names:
        members = [one for one in GROUPS[name] if one not in ruler.QA or one in with_file] if name in GROUPS else [name]
        chosen |= dict.fromkeys(members)
    made = ruler.TASKS | recall.TASKS
    return [made[name] if name in made else qa_task(name, files) for name in chosen]


def group_means(grids: dict[str, Any]) -> dict[str, Any]:
    """By group: the mean over its tasks of each task's mean over depths, for the lengths that all of these have.

    grids: by task, as mean_by_length_and_depth gives them. A group of which fewer than two tasks were asked has no
    mean. "tasks" and "of" say over how many of how many tasks.
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
            "score": [_mean([at_length(grid, "score", n) for grid in asked]) for n in lengths],
            "exact": [_mean([at_length(grid, "exact", n) for grid in asked]) for n in lengths],
        }
    return means


def group_name(group: str, means: dict[str, Any]) -> str:
    """ "recall", or "ruler mean over 11 of 13 tasks" if some were left out."""
    tasks, of = means["tasks"], means["of"]
    return group if tasks == of else f"{group} mean over {tasks} of {of} tasks"


def at_length(grid: dict[str, Any], what: str, length: int) -> float | None:
    """Mean over depths of a grid's row; None if it has nothing."""
    if length not in grid["lengths"]:
        return None
    return _mean([cell for cell in grid[what][grid["lengths"].index(length)] if cell is not None])


def _mean(numbers: Sequence[float | None]) -> float | None:
    known = [n for n in numbers if n is not None]
    return sum(known) / len(known) if known and len(known) == len(numbers) else None
