"""What of a stage's tokens the chain has read before, for the data report."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from torchtitan.datasets.plan import Plan
from torchtitan.datasets.read_so_far import ReadSoFar

OVERLAPS = ("overlap", "overlap_documents")
"""Shares of a plan's tokens, by their key in plan.json: those that earlier stages had read (or this one before its
data changed), in whichever epoch, and not what the plan itself reads again; and those of documents of which they had
read something, which are the rest of long documents too."""


def chain_numbers(plan: Plan, source: int, before: ReadSoFar, after: ReadSoFar) -> dict[str, float]:
    """Of one source: the epochs that the chain has read of its corpus before the plan and after it, and OVERLAPS."""
    corpus, t = plan.corpora[source], plan.table
    document, start, length = (column[t.source == source] for column in (t.document, t.start, t.length))
    had = before.ever(corpus)[document]
    again = np.clip(np.minimum(had, start + length) - start, 0, None)
    tokens = max(1, int(length.sum(dtype=np.int64)))
    overlaps = (int(part.sum(dtype=np.int64)) / tokens for part in (again, length[had > 0]))
    return {
        "epochs_before": before.epochs(corpus),
        "epochs_after": after.epochs(corpus),
        **dict(zip(OVERLAPS, overlaps, strict=True)),
    }


def chain_note(s: dict[str, Any]) -> Iterator[str]:
    """A line on the entry of a source in the report, if the chain has read some of it before."""
    if s["epochs_before"]:
        yield (
            f"{s['name']}: epochs so far {s['epochs_before']:.2f}, {s['epochs_after']:.2f} after this stage; of its "
            f"tokens here {s['overlap']:.1%} were read by earlier stages, {s['overlap_documents']:.1%} are of "
            "documents that these began"
        )


def from_step(report: dict[str, Any]) -> str:
    """Such as `, from step 500 on`, if the plan of a report begins within its stage."""
    return f", from step {report['first_step']} on" if report["first_step"] else ""
