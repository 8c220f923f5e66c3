"""What the schedules of a stage ask for at their points, and what its plan reads around these, for the data report."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from torchtitan.datasets.curriculum import integral, schedule_steps
from torchtitan.datasets.mixture import Stream
from torchtitan.datasets.plan import Plan

WINDOW = 100
"""Consecutive steps in which a share must be what was asked for."""

COLUMNS = ("asked", "asked_around", "share_around")
"""Of a stream's entry: the share asked for at each point, and asked for and got in the steps around it."""


def schedule_report(plan: Plan) -> dict[str, Any] | None:
    """What the schedules ask for at their points (at the stage's end, if they lie beyond), and the shares in the WINDOW
    steps around each, asked and got; None without a schedule."""
    points = np.array(schedule_steps(plan.data))
    if not len(points):
        return None
    at = np.unique(np.clip(points, plan.first_step, plan.steps))
    begins, ends = np.maximum(at - WINDOW // 2, plan.first_step), np.minimum(at + WINDOW // 2, plan.steps)
    first, last = begins - plan.first_step, ends - plan.first_step
    of_all = tokens_before(plan, plan.table.length)
    streams = []
    for stream in plan.streams:
        if stream.curve is None:
            continue
        counted = np.zeros_like(plan.table.length)
        parts = plan.parts_of(stream)
        counted[parts] = plan.table.length[parts]
        asked, got = (
            (before[last] - before[first]) / (of_all[last] - of_all[first])
            for before in (asked_before(plan, stream, of_all), tokens_before(plan, counted))
        )
        streams.append(
            {
                "source": plan.names[stream.source],
                "documents": stream.name,
                "asked": np.interp(at, *stream.curve.T).tolist(),
                "asked_around": asked.tolist(),
                "share_around": got.tolist(),
            }
        )
    return {
        "steps": at.tolist(),
        "around": np.stack([begins, ends], axis=1).tolist(),
        "beyond_the_stage": points[points > plan.steps].tolist(),
        "streams": streams,
    }


def tokens_before(plan: Plan, tokens: np.ndarray) -> np.ndarray:
    """int64[steps + 1]: the tokens before each planned step, and in all; `tokens` has those of each part that count."""
    begins = plan.table.offsets[:: plan.rows_per_step][:-1]
    return np.cumsum(np.append(0, np.add.reduceat(tokens, begins, dtype=np.int64)))


def asked_before(plan: Plan, stream: Stream, of_all: np.ndarray) -> np.ndarray:
    """float64[steps + 1]: how many of the tokens before each step should be a stream's. of_all: int64[steps + 1]."""
    if stream.curve is None:
        return stream.share * of_all
    shares = np.diff(integral(stream.curve, np.arange(plan.first_step, plan.steps + 1)))
    return np.cumsum(np.append(0, shares * np.diff(of_all)))


def worst_window(plan: Plan, mine: np.ndarray, streams: Sequence[Stream]) -> float:
    """How far the share of a source (whose parts are `mine`) is from what is asked of its streams in the worst WINDOW
    consecutive steps."""
    width = min(WINDOW, len(plan.planned))
    of_source, of_all = (tokens_before(plan, column) for column in (plan.table.length * mine, plan.table.length))
    too_many = of_source - sum(asked_before(plan, stream, of_all) for stream in streams)
    return float(np.abs((too_many[width:] - too_many[:-width]) / (of_all[width:] - of_all[:-width])).max())


def schedule_notes(report: dict[str, Any]) -> Iterator[str]:
    """Each moving stream at the points of the schedules."""
    schedule = report["schedule"]
    if schedule is None:
        return
    if schedule["beyond_the_stage"]:
        steps = ", ".join(f"{step:,}" for step in schedule["beyond_the_stage"])
        last = report["first_step"] + report["steps"]
        yield (
            f"warning: a schedule has points at the steps {steps}, after the stage's last, {last:,}: the "
            "stage ends on the way to them"
        )
    for stream in schedule["streams"]:
        points = zip(*(schedule[key] for key in ("steps", "around")), *(stream[key] for key in COLUMNS))
        texts = [
            f"{asked:.2%} at step {step:,} (steps {begin:,} to {end:,}: {around:.2%} asked, {share:.2%} got)"
            for step, (begin, end), asked, around, share in points
        ]
        which = "" if stream["documents"] == "all" else f", {stream['documents']}"
        yield f"schedule of {stream['source']}{which}: {'; '.join(texts)}"
