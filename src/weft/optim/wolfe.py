"""A line search for the strong Wolfe conditions (Nocedal & Wright, Numerical Optimization, 2nd ed., alg. 3.5, 3.6).

point = search(evaluate, start, length=1.0)     # evaluate(t) -> Point; None where no lower value was found
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass
class Point:
    """On the line: how far along, the value, the gradient there, and its slope along the line."""

    length: float
    value: float
    gradient: Tensor
    slope: float

    @property
    def is_finite(self) -> bool:
        return math.isfinite(self.value) and math.isfinite(self.slope)


def search(
    evaluate: Callable[[float], Point],
    start: Point,
    length: float,
    *,
    decrease: float = 1e-4,
    curvature: float = 0.9,
    max_evaluations: int = 25,
) -> Point | None:
    """A point whose value is low and whose slope is flat enough, or the lowest one once evaluations are used up.

    `start`: at length 0, with slope < 0. `length`: the first one tried. Where a value is not finite it turns back.
    None: no point was lower than the start by what the slope promises.
    """
    before, left = start, max_evaluations
    while left > 0:
        point, left = evaluate(length), left - 1
        if (
            not point.is_finite
            or _too_high(point, start, decrease)
            or (before is not start and point.value >= before.value)
        ):
            return _zoom(evaluate, start, before, point, left, decrease, curvature)
        if abs(point.slope) <= -curvature * start.slope:
            return point
        if point.slope >= 0:
            return _zoom(evaluate, start, point, before, left, decrease, curvature)
        step = point.length - before.length
        guess = _cubic(before, point)
        before, length = point, min(max(guess, point.length + 0.1 * step), point.length + 9.0 * step)
    return before if before is not start else None


def _zoom(
    evaluate: Callable[[float], Point],
    start: Point,
    low: Point,
    high: Point,
    left: int,
    decrease: float,
    curvature: float,
) -> Point | None:
    """Between `low`, the lowest so far, and `high`, where something is wrong, there is a point that will do."""
    while left > 0 and abs(high.length - low.length) > 1e-12 * max(high.length, low.length):
        near, far = sorted((low.length, high.length))
        margin = 0.1 * (far - near)
        guess = _cubic(low, high) if high.is_finite else near + margin
        point, left = evaluate(min(max(guess, near + margin), far - margin)), left - 1
        if not point.is_finite or _too_high(point, start, decrease) or point.value >= low.value:
            high = point
            continue
        if abs(point.slope) <= -curvature * start.slope:
            return point
        if point.slope * (high.length - low.length) >= 0:
            high = low
        low = point
    return low if low is not start else None


def _too_high(point: Point, start: Point, decrease: float) -> bool:
    return point.value > start.value + decrease * point.length * start.slope


def _cubic(a: Point, b: Point) -> float:
    """Where the cubic through two points with their slopes is lowest (N & W, eq. 3.59); else half way."""
    d1 = a.slope + b.slope - 3 * (a.value - b.value) / (a.length - b.length)
    square = d1 * d1 - a.slope * b.slope
    if square >= 0:
        d2 = math.copysign(math.sqrt(square), b.length - a.length)
        below = b.slope - a.slope + 2 * d2
        if below:
            return b.length - (b.length - a.length) * (b.slope + d2 - d1) / below
    return (a.length + b.length) / 2
