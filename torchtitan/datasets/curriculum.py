"""Shares that move over the steps of a stage: from the schedules of its sources to curves, and their integrals.

A curve is float64[k, 2], (step, share): linear between its points, constant before the first and after the last. It
does not depend on how many steps a stage has, so that a longer stage begins like a shorter one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from torchtitan.config.data_schema import Data, Source

TOLERANCE = 1e-4
"""How far a curve can be from the share that the schedules ask for, between their points; at them it is exact."""

SHORTEST = 2**-10
"""Steps: points are not put closer, whatever the weights."""

_Point = tuple[float, ...]  # step, values


def schedule_steps(data: Data) -> list[int]:
    """The steps of the points of all sources' schedules, in order; empty without a schedule."""
    return sorted({point.step for source in data.sources for point in source.schedule})


def weights_at(data: Data, step: float) -> list[float]:
    """The weight of each source at a step, not scaled."""
    return [
        _between([(p.step, p.weight) for p in source.schedule if p.weight is not None] or [(0, source.weight)], step)[0]
        for source in data.sources
    ]


def length_shares_at(source: Source, step: float) -> tuple[float, ...]:
    """The share of each of a source's length_bins at a step, of the source's tokens; scaled to a sum of 1."""
    points = [(p.step, *scaled(p.length_shares)) for p in source.schedule if p.length_shares]
    return _between(points or [(0, *scaled(source.length_shares))], step)


def scaled(shares: Sequence[float]) -> list[float]:
    """Shares with a sum of 1, of those that are rounded, such as 0.333 three times."""
    total = sum(shares)
    return [share / total for share in shares]


def _between(points: Sequence[_Point], step: float) -> tuple[float, ...]:
    """The values at a step: linear between points, constant outside."""
    before = [point for point in points if point[0] <= step]
    if not before or len(before) == len(points):
        return (before[-1] if before else points[0])[1:]
    (left, *low), (right, *high) = before[-1], points[len(before)]
    part = (step - left) / (right - left)
    return tuple(a + (b - a) * part for a, b in zip(low, high))


def resolve(shares: Callable[[float], Sequence[float]], steps: Sequence[int]) -> np.ndarray:
    """float64[k, 1 + S], (step, shares): what shares(step) gives at `steps`, and at enough steps between these that
    straight lines are off by at most TOLERANCE (by more for less than a thousandth of a step).

    Between two points shares(step) must be quadratic over linear, as a weight times a length share over the sum of the
    weights is. Such a function, a x + b + c / W(x), bends one way only, and is nowhere farther from its chord than
    twice as far as in the middle: a square is farthest there, and for 1 / W the ratio is
    2 (W0 + W1) / (sqrt W0 + sqrt W1)^2.
    """

    def at(step: float) -> _Point:
        return (float(step), *shares(step))

    def from_to(left: _Point, right: _Point) -> list[_Point]:
        middle = at((left[0] + right[0]) / 2)
        off = max(abs(m - (a + b) / 2) for m, a, b in zip(middle[1:], left[1:], right[1:]))
        is_close = off <= TOLERANCE / 2 or right[0] - left[0] <= SHORTEST
        return [right] if is_close else from_to(left, middle) + from_to(middle, right)

    points = [at(steps[0])]
    for step in steps[1:]:
        points += from_to(points[-1], at(step))
    return np.array(points)


def integral(curve: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """float64, the shape of `steps` (0 or more): the integral of a curve from step 0 to each of them."""
    at, share = np.concatenate([[[0.0, curve[0, 1]]], curve[curve[:, 0] > 0]]).T
    widths, rises = np.diff(at), np.diff(share)
    areas = np.concatenate([[0.0], np.cumsum(widths * (share[:-1] + share[1:]) / 2)])
    slopes = np.append(rises / widths, 0.0)
    left = np.searchsorted(at, steps, side="right") - 1
    beyond = np.asarray(steps, np.float64) - at[left]
    return np.asarray(areas[left] + beyond * (share[left] + slopes[left] * beyond / 2))


def mean(curve: np.ndarray, steps: range) -> float:
    """The share of a curve over these steps."""
    begin, end = integral(curve, np.array([steps.start, steps.stop]))
    return float(end - begin) / max(1, len(steps))
