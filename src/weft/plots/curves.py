"""Curves of a run over its epochs: losses, terms, violations."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from weft.plots.axes import new_axes
from weft.records.repeats import repeated

if TYPE_CHECKING:
    from matplotlib.axes import Axes

STYLES = {"train": "-", "dev": "--", "test": ":"}


def curves(result: Any, ax: Axes | None = None, label: str | None = None) -> Axes:
    """The losses of `result` over its epochs, one line a split, the best epoch marked.

    `ax`: where; None: new axes. Logarithmic if positive. `label` names the run where several are drawn on the same
    axes: its lines have the next colour, and the split decides about their dashes.
    """
    ax = ax if ax is not None else new_axes()
    _draw_group(ax, _splits_of("loss", result.history), result.history, label)
    if label is None:
        _mark_best(ax, result)
    _finish(ax, "loss")
    return ax


def terms(result: Any, axes: Sequence[Axes] | None = None) -> list[Axes]:
    """One axes for each named term and constraint violation of `result`, train and dev in each.

    `axes`: as many as there are terms, or None. Raises ValueError if there are fewer. No terms: an empty list.
    """
    names = _term_names(result.history)
    if axes is None:
        axes = _new_grid(len(names)) if names else []
    axes = list(np.ravel(np.asarray(axes, dtype=object)))
    if len(axes) < len(names):
        raise ValueError(f"plots.terms got {len(axes)} axes for {len(names)} terms: {', '.join(names)}.")
    for ax, name in zip(axes, names, strict=False):
        _draw_group(ax, _splits_of(name, result.history), result.history)
        _mark_best(ax, result, label=False)
        _finish(ax, name.replace("_", " "))
    return axes[: len(names)]


def series(values: Mapping[str, Mapping[int, float]], ax: Axes | None = None, ylabel: str = "") -> Axes:
    """The values of several runs, by name and epoch, one line each under its name.

    `ax`: where; None: new axes. `ylabel`: what they are. Logarithmic if all are positive.
    """
    ax = ax if ax is not None else new_axes()
    for label, by_epoch in values.items():
        found = [(epoch, value) for epoch, value in by_epoch.items() if math.isfinite(value)]
        ax.plot([e for e, _ in found], [v for _, v in found], label=label, linewidth=1.4)
    drawn = [float(v) for line in ax.lines for v in np.asarray(line.get_ydata())]
    if drawn and min(drawn) > 0:
        ax.set_yscale("log")
    _finish(ax, ylabel)
    return ax


def save_summary(result: Any, path: str | os.PathLike[str]) -> None:
    """Write a picture of `result`, curves above all `terms`, to `path` (its ending names the format)."""
    from matplotlib.figure import Figure

    names = _term_names(result.history)
    num_columns = min(3, max(1, len(names)))
    num_rows = math.ceil(len(names) / num_columns)
    figure = Figure(figsize=(max(7.0, 3.6 * num_columns), 3.8 + 2.4 * num_rows), layout="constrained")
    grid = figure.add_gridspec(num_rows + 1, num_columns, height_ratios=[1.5, *[1.0] * num_rows])
    curves(result, figure.add_subplot(grid[0, :]))
    terms(result, [figure.add_subplot(grid[1 + i // num_columns, i % num_columns]) for i in range(len(names))])
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    figure.savefig(path, dpi=120)


def _splits_of(quantity: str, history: Mapping[str, Any]) -> dict[str, str]:
    """The names in `history` of one quantity, by split: {"train": "train_loss", "dev": "dev_loss"}."""
    return {split: f"{split}_{quantity}" for split in STYLES if f"{split}_{quantity}" in history}


def _term_names(history: Mapping[str, Any]) -> list[str]:
    """The quantities of the splits that say more than the loss, in the order of the history."""
    quantities = [name.split("_", 1)[1] for name in history if name.split("_", 1)[0] in STYLES and "_" in name]
    hidden = repeated(history)
    return [name for name in dict.fromkeys(quantities) if name != "loss" and name not in hidden]


def _draw_group(
    ax: Axes, names: Mapping[str, str], history: Mapping[str, Sequence[float]], label: str | None = None
) -> None:
    positive = all((np.asarray(line.get_ydata(), dtype=float) > 0).all() for line in ax.lines)
    runs = len({line.get_color() for line in ax.lines})
    for i, (split, name) in enumerate(names.items()):
        values = np.asarray(history[name], dtype=float)
        there = np.flatnonzero(np.isfinite(values))  # nan: an epoch that was not validated
        if there.size == 0:
            continue
        positive = positive and bool((values[there] > 0).all())
        marker = "o" if there.size == 1 else None
        colour, text = (f"C{i}", split) if label is None else (f"C{runs}", f"{label}, {split}")
        ax.plot(there, values[there], STYLES[split], color=colour, label=text, marker=marker, linewidth=1.4)
    if ax.lines:
        ax.set_yscale("log" if positive else "linear")


def _mark_best(ax: Axes, result: Any, label: bool = True) -> None:
    if result.best_epoch is None or not ax.lines:
        return
    text = f"best: {result.best_metric:.4g} (epoch {result.best_epoch})" if label else None
    ax.axvline(result.best_epoch, color="0.55", linewidth=1.0, linestyle="-.", label=text, zorder=0)


def _finish(ax: Axes, ylabel: str) -> None:
    from matplotlib.ticker import MaxNLocator

    ax.set_xlabel("epoch")
    ax.set_ylabel(ylabel)
    ax.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    ax.grid(True, which="major", alpha=0.3)
    if ax.lines:
        ax.legend(fontsize="small", framealpha=0.9)


def _new_grid(num_axes: int) -> list[Axes]:
    import matplotlib.pyplot as plt

    num_columns = min(3, num_axes)
    num_rows = math.ceil(num_axes / num_columns)
    figure = plt.figure(figsize=(3.6 * num_columns, 2.6 * num_rows), layout="constrained")
    return [figure.add_subplot(num_rows, num_columns, i + 1) for i in range(num_axes)]
