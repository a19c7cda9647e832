"""Pictures of a search for settings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def search(result: Any, axes: Sequence[Axes] | None = None) -> list[Axes]:
    """The values of a sweep's trials in order with the best so far, and over each of its parameters.

    `result`: of `weft.sweep`. `axes`: one more than there are parameters, or None. Raises ValueError if there are
    fewer.
    """
    trials = [t for t in result.trials if t["value"] is not None and math.isfinite(t["value"])]
    names = list(dict.fromkeys(name for t in result.trials for name in t["params"]))
    if axes is None:
        import matplotlib.pyplot as plt

        figure = plt.figure(figsize=(3.4 * (len(names) + 1), 2.8), layout="constrained")
        axes = [figure.add_subplot(1, len(names) + 1, i + 1) for i in range(len(names) + 1)]
    axes = list(np.ravel(np.asarray(axes, dtype=object)))
    if len(axes) <= len(names):
        raise ValueError(
            f"plot.search got {len(axes)} axes; expected {len(names) + 1}, for {', '.join(names)} and order."
        )
    first, *others = axes
    values = [t["value"] for t in trials]
    _dots(first, [t["number"] for t in trials], trials)
    if values:
        best = np.maximum.accumulate(values) if result.mode == "max" else np.minimum.accumulate(values)
        first.step([t["number"] for t in trials], best, where="post", color="C3", linewidth=1.2, label="best so far")
    first.set_xlabel("trial")
    first.set_ylabel("value")
    first.legend(fontsize="small")
    for ax, name in zip(others, names, strict=False):
        having = [t for t in trials if name in t["params"]]
        params = [t["params"][name] for t in having]
        are_numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in params)
        _dots(ax, params if are_numbers else [str(v) for v in params], having)
        if are_numbers and params and min(params) > 0 and max(params) > 20 * min(params):
            ax.set_xscale("log")
        ax.set_xlabel(name)
    for ax in axes[: len(names) + 1]:
        if values and min(values) > 0 and max(values) > 10 * min(values):
            ax.set_yscale("log")
        ax.grid(True, alpha=0.3)
    return axes[: len(names) + 1]


def _dots(ax: Axes, x: Sequence[Any], trials: Sequence[dict[str, Any]]) -> None:
    for state, colour, marker in (("complete", "C0", "o"), ("pruned", "0.6", "x")):
        points = [(a, t["value"]) for a, t in zip(x, trials, strict=True) if t["state"] == state]
        if points:
            ax.scatter(*zip(*points, strict=True), s=22, color=colour, marker=marker, label=state)
