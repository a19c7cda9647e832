"""Dynamical systems: signals over time with their bounds, paths in the state plane, eigenvalues."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from weft.plots.axes import array, new_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_LINES = 10  # trajectories drawn of a batch


def rollout(
    signal: Any,
    ax: Axes | None = None,
    *,
    bounds: tuple[float | None, float | None] = (None, None),
    reference: Any = None,
    dt: float = 1.0,
    steps: bool = False,
    labels: tuple[str, str] = ("time step", "signal"),
) -> Axes:
    """Trajectories over time, one colour each, with their bounds.

    `signal`: (batch, time, features) or (time, features); several features share the colour of their trajectory and
    differ in style. At most 10 trajectories are drawn. `ax`: where; None: new axes. `bounds`: (lower, upper), None for
    none. `reference`: of the same shape, drawn pale. `dt`: time between entries. `steps`: held in between, as controls
    are. `labels`: with units.
    Raises ValueError for another number of dimensions.
    """
    ax = ax if ax is not None else new_axes()
    signal = _batch_of(signal, "rollout: signal")
    time = dt * np.arange(signal.shape[1])
    styles = ("-", "--", ":", "-.")
    if reference is not None:
        for i, rows in enumerate(_batch_of(reference, "rollout: reference")[:MAX_LINES]):
            ax.plot(time[: len(rows)], rows, color=f"C{i}", linewidth=4.0, alpha=0.25)
    for i, rows in enumerate(signal[:MAX_LINES]):
        for j, column in enumerate(rows.T):
            options: dict[str, Any] = {"drawstyle": "steps-post"} if steps else {}
            ax.plot(time, column, styles[j % len(styles)], color=f"C{i}", linewidth=1.4, **options)
    for bound in bounds:
        if bound is not None:
            ax.axhline(bound, color="0.35", linestyle=(0, (6, 3)), linewidth=1.0, zorder=0)
    if any(bound is not None for bound in bounds):
        ax.plot([], [], color="0.35", linestyle=(0, (6, 3)), linewidth=1.0, label="bounds")
    if reference is not None:
        ax.plot([], [], color="0.5", linewidth=4.0, alpha=0.4, label="reference")
    if ax.get_legend_handles_labels()[1]:
        ax.legend(fontsize="small")
    ax.set(xlabel=labels[0], ylabel=labels[1])
    ax.grid(True, alpha=0.3)
    return ax


def phase_portrait(
    states: Any,
    ax: Axes | None = None,
    *,
    reference: Any = None,
    target: Sequence[float] | None = None,
    bounds: tuple[float, float, float, float] | None = None,
    labels: tuple[str, str] = ("$x_0$", "$x_1$"),
) -> Axes:
    """Paths in the plane of two states, a dot where each begins.

    `ax`: where; None: new axes. `states`: (batch, time, 2) or (time, 2); at most 10 are drawn. `reference`: other
    paths, drawn pale. `target`: a point, marked. `bounds`: (x lower, x upper, y lower, y upper), drawn as a box.
    `labels`: with units.
    Raises ValueError for another shape.
    """
    ax = ax if ax is not None else new_axes()
    states = _batch_of(states, "phase_portrait: states", features=2)
    if reference is not None:
        for i, path in enumerate(_batch_of(reference, "phase_portrait: reference", features=2)[:MAX_LINES]):
            ax.plot(*path.T, color=f"C{i}", linewidth=4.0, alpha=0.25)
    for i, path in enumerate(states[:MAX_LINES]):
        ax.plot(*path.T, "-", color=f"C{i}", linewidth=1.4)
        ax.plot(*path[0], "o", color=f"C{i}", markersize=5)
    if target is not None:
        ax.plot(*target, "k+", markersize=12, markeredgewidth=1.5, label="target")
    if bounds is not None:
        left, right, low, high = bounds
        box = [left, right, right, left, left], [low, low, high, high, low]
        ax.plot(*box, color="0.35", linestyle=(0, (6, 3)), linewidth=1.0, label="bounds")
    if ax.get_legend_handles_labels()[1]:
        ax.legend(fontsize="small")
    ax.set(xlabel=labels[0], ylabel=labels[1])
    ax.grid(True, alpha=0.3)
    return ax


def spectrum(matrix: Any, reference: Any = None, ax: Axes | None = None) -> Axes:
    """The eigenvalues of a square matrix in the complex plane, with the unit circle.

    Inside: stable in discrete time. `ax`: where; None: new axes.
    `reference`: known eigenvalues, (n,), drawn as rings. Raises ValueError if the matrix is not square.
    """
    ax = ax if ax is not None else new_axes()
    matrix = array(matrix)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ValueError(f"spectrum: the matrix has shape {matrix.shape}; expected a square one.")
    values = np.linalg.eigvals(matrix)
    angle = np.linspace(0, 2 * np.pi, 181)
    ax.plot(np.cos(angle), np.sin(angle), color="0.6", linewidth=1.0, label="unit circle")
    if reference is not None:
        known = array(reference)
        ax.plot(np.real(known), np.imag(known), "o", markersize=12, markerfacecolor="none", color="C3", label="known")
    ax.plot(values.real, values.imag, "x", color="k", markersize=7, label="learned")
    ax.set(xlabel="real part", ylabel="imaginary part")
    ax.set_aspect("equal")
    ax.grid(True, alpha=0.3)
    ax.legend(fontsize="small", loc="lower left")
    return ax


def _batch_of(values: Any, what: str, features: int | None = None) -> np.ndarray:
    """As (batch, time, features)."""
    found = array(values)
    batch = found[None] if found.ndim == 2 else found
    if batch.ndim != 3 or (features is not None and batch.shape[2] != features):
        expected = f"(batch, time, {features or 'features'}) or (time, {features or 'features'})"
        raise ValueError(f"{what} has shape {found.shape}; expected {expected}.")
    return batch
