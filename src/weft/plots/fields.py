"""Functions of two variables: maps of a value, and a field with its reference and error."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from weft.plots.axes import array, new_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def solution_map(
    fn: Callable[[np.ndarray, np.ndarray], Any],
    x_range: tuple[float, float],
    y_range: tuple[float, float],
    ax: Axes | None = None,
    *,
    num_points: int = 201,
    levels: int | Sequence[float] = 30,
    labels: tuple[str, str, str] = ("x", "y", "value"),
    log: bool = False,
) -> Axes:
    """Filled contours of `fn(x, y)` over a rectangle, with a colour bar.

    `ax`: where; None: new axes. `x_range`, `y_range`: (lower, upper). `fn` gets two arrays of shape
    (num_points, num_points) and returns one, else ValueError. `labels`: of both axes and of the bar, with units. `log`:
    logarithmic levels; values that are not positive are drawn like the smallest positive one.
    """
    ax = ax if ax is not None else new_axes()
    x, y = np.meshgrid(np.linspace(*x_range, num_points), np.linspace(*y_range, num_points))
    values = np.asarray(fn(x, y), dtype=float)
    if values.shape != x.shape:
        raise ValueError(f"solution_map: fn returned shape {values.shape}, expected {x.shape}, one value a point.")
    options: dict[str, Any] = {"levels": levels, "cmap": "viridis"}
    ticks = None
    if log:
        from matplotlib.colors import LogNorm
        from matplotlib.ticker import LogLocator

        smallest = values[values > 0].min()
        values, ticks = np.maximum(values, smallest), LogLocator()
        if isinstance(levels, int):
            levels = [float(level) for level in np.geomspace(smallest, values.max(), levels)]
        options |= {"levels": levels, "norm": LogNorm()}
    contours = ax.contourf(x, y, values, **options)
    figure = ax.get_figure()
    assert figure is not None
    figure.colorbar(contours, ax=ax, label=labels[2], ticks=ticks)
    ax.set_xlabel(labels[0])
    ax.set_ylabel(labels[1])
    return ax


def field(
    x: Any,
    y: Any,
    values: Any,
    reference: Any = None,
    axes: Sequence[Axes] | None = None,
    *,
    labels: tuple[str, str, str] = ("t", "x", "u"),
) -> list[Axes]:
    """A field over a grid, with a `reference` also that and the absolute error.

    Each is on axes of its own.
    `x` and `y`: coordinates, (columns,) and (rows,). `values`, `reference`: (rows, columns). Field and reference share
    their colours. `labels`: of both axes and of the bar, with units. `axes`: one, or three with a reference; None: new
    ones. Raises ValueError for shapes that do not fit and for too few axes.
    """
    x, y = array(x).ravel(), array(y).ravel()
    shown = [("network" if reference is not None else "", array(values))]
    if reference is not None:
        shown += [("reference", array(reference)), ("absolute error", np.abs(array(values) - array(reference)))]
    for name, found in shown:
        if found.shape != (len(y), len(x)):
            raise ValueError(
                f"field: {name or 'values'} has shape {found.shape}; expected (rows, columns) {len(y), len(x)}."
            )
    axes = _row_of(len(shown)) if axes is None else list(np.ravel(np.asarray(axes, dtype=object)))
    if len(axes) < len(shown):
        raise ValueError(f"field got {len(axes)} axes for {len(shown)} pictures: {', '.join(n for n, _ in shown)}.")
    limits = {"vmin": min(f.min() for _, f in shown[:2]), "vmax": max(f.max() for _, f in shown[:2])}
    for i, (ax, (name, found)) in enumerate(zip(axes, shown, strict=False)):
        options: dict[str, Any] = {"cmap": "magma"} if i == 2 else {"cmap": "RdBu_r", **limits}
        mesh = ax.pcolormesh(x, y, found, shading="nearest", rasterized=True, **options)
        figure = ax.get_figure()
        assert figure is not None
        figure.colorbar(mesh, ax=ax, label="absolute error" if i == 2 else labels[2])
        ax.set(xlabel=labels[0], ylabel=labels[1], title=name)
    return axes[: len(shown)]


def _row_of(num_axes: int) -> list[Axes]:
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(4.2 * num_axes, 3.4), layout="constrained")
    return [figure.add_subplot(1, num_axes, i + 1) for i in range(num_axes)]
