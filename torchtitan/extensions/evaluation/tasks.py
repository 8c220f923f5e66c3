"""Names of [evaluation] tasks -> tasks, and the means over the groups that papers report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torchtitan.extensions.evaluation import recall, ruler
from torchtitan.extensions.evaluation.questions import Task
from torchtitan.extensions.evaluation.ruler_qa import qa_task, read

GROUPS = {"ruler": ruler.ALL, "recall": tuple(recall.TASKS)}


def tasks_of(names: Sequence[str], qa_files: Sequence[Path] = ()) -> list[Task]:
    """Each once, in the order of names. Of the group "ruler", qa_1 and qa_2 are left out if no file is for them;
    UserError if one is named that has none, or for a file that cannot be read."""
    files = tuple(qa_files)
    there = {read(file).task for file in files}
    wanted: dict[str, None] = {}
    for name in names:
        members = [one for one in GROUPS[name] if one not in ruler.QA or one in there] if name in GROUPS else [name]
        wanted |= dict.fromkeys(members)
    known = ruler.TASKS | recall.TASKS
    return [known[name] if name in known else qa_task(name, files) for name in wanted]


def group_means(grids: dict[str, Any]) -> dict[str, Any]:
    """By group: the mean over its tasks of each task's mean over depths, for the lengths that all of these have.

    grids: by task, as mean_by_length_and_depth gives them. A group of which fewer than two tasks were asked has no
    mean. "tasks" and "of" say over how many of how many tasks.
    """
    found = {}
    for group, members in GROUPS.items():
        asked = [grids[name] for name in members if name in grids]
        if len(asked) < 2:
            continue
        lengths = sorted(set.intersection(*(set(grid["lengths"]) for grid in asked)))
        found[group] = {
            "lengths": lengths,
            "tasks": len(asked),
            "of": len(members),
            "score": [_mean([at_length(grid, "score", n) for grid in asked]) for n in lengths],
            "exact": [_mean([at_length(grid, "exact", n) for grid in asked]) for n in lengths],
        }
    return found


def group_name(group: str, means: dict[str, Any]) -> str:
    """ "recall", or "ruler mean over 11 of 13 tasks": what was left out is said."""
    tasks, of = means["tasks"], means["of"]
    return group if tasks == of else f"{group} mean over {tasks} of {of} tasks"


def at_length(grid: dict[str, Any], what: str, length: int) -> float | None:
    """Mean of a grid's row over depths; None where it has nothing."""
    if length not in grid["lengths"]:
        return None
    return _mean([cell for cell in grid[what][grid["lengths"].index(length)] if cell is not None])


def _mean(numbers: Sequence[float | None]) -> float | None:
    there = [n for n in numbers if n is not None]
    return sum(there) / len(there) if there and len(there) == len(numbers) else None
