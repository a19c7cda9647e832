"""The line search: the strong Wolfe conditions hold where it stops, whatever the line looks like."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from weft.optim.wolfe import Point, search

LINES: dict[str, tuple[Callable[[float], float], Callable[[float], float]]] = {
    "a parabola": (lambda t: (t - 3) ** 2, lambda t: 2 * (t - 3)),
    "far away": (lambda t: (t - 1e4) ** 2, lambda t: 2 * (t - 1e4)),
    "near": (lambda t: (t - 1e-5) ** 2, lambda t: 2 * (t - 1e-5)),
    "waves": (lambda t: math.cos(5 * t) + 0.1 * t**2 - t, lambda t: -5 * math.sin(5 * t) + 0.2 * t - 1),
    "a wall": (
        lambda t: -math.log(2 - t) * 0.1 - t if t < 2 else math.nan,
        lambda t: 0.1 / (2 - t) - 1 if t < 2 else math.nan,
    ),
    "too large": (lambda t: t**4 - t if t < 3 else math.inf, lambda t: 4 * t**3 - 1 if t < 3 else math.inf),
}


def along(line: str) -> tuple[Callable[[float], Point], list[float]]:
    value, slope = LINES[line]
    tried: list[float] = []

    def evaluate(t: float) -> Point:
        tried.append(t)
        return Point(t, value(t), torch.empty(0), slope(t))

    return evaluate, tried


@pytest.mark.parametrize("line", LINES)
@pytest.mark.parametrize("first", [1.0, 0.01, 50.0])
@pytest.mark.parametrize("curvature", [0.9, 0.1])
def test_where_a_search_stops_both_conditions_hold(line: str, first: float, curvature: float) -> None:
    evaluate, tried = along(line)
    start = evaluate(0.0)
    found = search(evaluate, start, first, curvature=curvature)
    assert found is not None and found.length in tried and len(tried) <= 26
    assert found.value <= start.value + 1e-4 * found.length * start.slope
    assert abs(found.slope) <= curvature * abs(start.slope)
    assert found.value == LINES[line][0](found.length)


def test_where_nothing_is_lower_it_says_so() -> None:
    def up(t: float) -> Point:  # whose slope lies
        return Point(t, 1.0 + t, torch.empty(0), -1.0 if t == 0 else 1.0)

    assert search(up, up(0.0), 1.0) is None
    assert search(lambda t: Point(t, math.nan, torch.empty(0), math.nan), up(0.0), 1.0) is None


def test_evaluations_end_at_their_limit() -> None:
    evaluate, tried = along("far away")
    start = evaluate(0.0)
    assert search(evaluate, start, 1e-6, max_evaluations=3) is not None and len(tried) == 4
