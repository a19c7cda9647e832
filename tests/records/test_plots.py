"""Pictures: axes in, axes out; what is drawn is what was measured."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from weft import plots

NAN = math.nan


@pytest.fixture(autouse=True)
def close_figures(leave_no_trace: None) -> Iterator[None]:
    """Figures that pyplot made for a test are closed before the check that none is left."""
    yield
    plt.close("all")


def a_result(**changes: Any) -> Any:
    history = {
        "train_loss": [4.0, 2.0, 1.0, 0.5],
        "train_f": [3.0, 1.0, 0.0, -1.0],
        "train_inner_violation": [1.0, 0.5, 0.25, 0.125],
        "dev_loss": [NAN, 3.0, NAN, 0.75],
        "dev_f": [NAN, 1.0, NAN, 0.5],
        "note": [1.0, 1.0, 1.0, 1.0],
    }
    return SimpleNamespace(**{"history": history, "best_epoch": 3, "best_metric": 0.75, **changes})


def test_curves_show_the_history_and_the_best_epoch() -> None:
    ax = plots.curves(a_result())
    train, dev, best = ax.lines
    assert np.array_equal(train.get_xydata(), [[0, 4], [1, 2], [2, 1], [3, 0.5]])
    assert np.array_equal(dev.get_xydata(), [[1, 3], [3, 0.75]])  # epochs without validation leave no gap
    assert np.array_equal(best.get_xdata(), [3, 3])
    assert (ax.get_xlabel(), ax.get_ylabel(), ax.get_yscale()) == ("epoch", "loss", "log")
    legend = ax.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["train", "dev", "best: 0.75 (epoch 3)"]


def test_axes_that_are_given_are_drawn_on_and_returned() -> None:
    ax = Figure().add_subplot()
    assert plots.curves(a_result(), ax) is ax and ax.lines
    assert plt.get_fignums() == []


@pytest.mark.parametrize("values", [[1.0, 0.0], [-1.0, 2.0]])
def test_the_scale_is_linear_where_a_value_is_not_positive(values: list[float]) -> None:
    ax = plots.curves(a_result(history={"train_loss": values}, best_epoch=None, best_metric=None))
    assert ax.get_yscale() == "linear" and len(ax.lines) == 1


@pytest.mark.parametrize("history", [{}, {"train_loss": []}, {"train_loss": [NAN]}, {"train_loss": [1.0]}])
def test_short_and_empty_histories_are_drawn(history: dict[str, list[float]], tmp_path: Path) -> None:
    result = a_result(history=history, best_epoch=None, best_metric=None)
    assert plots.curves(result).get_xlabel() == "epoch"
    assert plots.terms(result) == []
    plots.save_summary(result, tmp_path / "empty.png")


def test_each_term_has_its_axes_with_both_splits() -> None:
    f, violation = plots.terms(a_result())
    assert (f.get_ylabel(), f.get_yscale(), len(f.lines)) == ("f", "linear", 3)
    assert (violation.get_ylabel(), violation.get_yscale(), len(violation.lines)) == ("inner violation", "log", 2)
    assert f.figure is violation.figure


def test_too_few_axes_for_the_terms_is_an_error_that_names_them() -> None:
    with pytest.raises(ValueError, match="1 axes for 2 terms: f, inner_violation"):
        plots.terms(a_result(), [Figure().add_subplot()])


def test_the_summary_is_a_picture_and_leaves_no_figure_behind(tmp_path: Path) -> None:
    path = tmp_path / "new" / "curves.png"
    plots.save_summary(a_result(), path)
    with Image.open(path) as image:
        assert image.format == "PNG" and min(image.size) > 400
        assert len(np.unique(np.asarray(image).reshape(-1, image.size[0]), axis=0)) > 1  # not blank
    assert plt.get_fignums() == []


def test_a_solution_map_draws_the_function_over_the_rectangle() -> None:
    seen = []

    def rosenbrock(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        seen.append((x.min(), x.max(), y.min(), y.max(), x.shape))
        return (1 - x) ** 2 + 100 * (y - x**2) ** 2

    ax = plots.solution_map(rosenbrock, (-2, 2), (-1, 3), num_points=41, labels=("x", "y", "objective"), log=True)
    assert seen == [(-2, 2, -1, 3, (41, 41))]
    assert (ax.get_xlabel(), ax.get_ylabel(), ax.get_xlim(), ax.get_ylim()) == ("x", "y", (-2, 2), (-1, 3))
    assert ax.figure.axes[1].get_ylabel() == "objective"


def test_a_function_of_the_wrong_shape_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"shape \(\), expected \(5, 5\)"):
        plots.solution_map(lambda x, y: 1.0, (0, 1), (0, 1), num_points=5)


def test_matplotlib_is_loaded_by_the_first_picture_only() -> None:
    code = "import sys, weft.plots; print('matplotlib' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


# ---------------------------------------------------------------- systems and fields


def test_a_rollout_draws_each_trajectory_with_its_bounds_over_time() -> None:
    u = torch.arange(12.0).reshape(2, 6, 1)
    ax = plots.rollout(u, Figure().add_subplot(), bounds=(-1.0, None), dt=0.5, labels=("time (s)", "torque (N m)"))
    assert [np.array_equal(line.get_ydata(), u[i, :, 0]) for i, line in enumerate(ax.lines[:2])] == [True, True]
    assert np.array_equal(ax.lines[0].get_xdata(), [0, 0.5, 1, 1.5, 2, 2.5])
    assert list(ax.lines[2].get_ydata()) == [-1.0, -1.0]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("time (s)", "torque (N m)")
    with pytest.raises(ValueError, match=r"shape \(6,\); expected \(batch, time, features\)"):
        plots.rollout(u[0, :, 0])


def test_a_phase_portrait_draws_paths_their_beginnings_and_the_target() -> None:
    x = torch.randn(3, 7, 2, requires_grad=True)
    ax = plots.phase_portrait(x, Figure().add_subplot(), target=(0, 0), bounds=(-1, 1, -2, 2))
    paths = [line for line in ax.lines if len(line.get_xdata()) == 7]
    assert all(np.array_equal(line.get_xydata(), x[i].detach()) for i, line in enumerate(paths)) and len(paths) == 3
    legend = ax.get_legend()
    assert legend is not None and [text.get_text() for text in legend.get_texts()] == ["target", "bounds"]
    with pytest.raises(ValueError, match=r"expected \(batch, time, 2\)"):
        plots.phase_portrait(torch.zeros(3, 7, 3))


def test_a_spectrum_shows_the_eigenvalues_and_the_known_ones() -> None:
    ax = plots.spectrum(torch.tensor([[0.0, -0.5], [0.5, 0.0]]), np.array([0.5j, -0.5j]), Figure().add_subplot())
    _, known, learned = ax.lines
    assert sorted(learned.get_ydata()) == pytest.approx([-0.5, 0.5]) and list(learned.get_xdata()) == pytest.approx(
        [0, 0]
    )
    assert list(known.get_ydata()) == [0.5, -0.5]
    with pytest.raises(ValueError, match=r"shape \(2, 3\); expected a square one"):
        plots.spectrum(torch.zeros(2, 3))


def test_a_field_has_three_pictures_with_one_scale_and_the_error() -> None:
    t, x = np.linspace(0, 1, 4), np.linspace(-1, 1, 3)
    u = np.arange(12.0).reshape(3, 4)
    axes = plots.field(t, x, u, u + 0.5, labels=("t (s)", "x (m)", "u (m/s)"))
    meshes = [ax.collections[0] for ax in axes]
    assert [ax.get_title() for ax in axes] == ["network", "reference", "absolute error"]
    assert np.array_equal(np.ravel(meshes[0].get_array()), u.ravel()) and np.all(np.ravel(meshes[2].get_array()) == 0.5)
    assert meshes[0].get_clim() == meshes[1].get_clim() == (0.0, 11.5)
    assert len(plots.field(t, x, u)) == 1
    with pytest.raises(ValueError, match=r"shape \(4, 3\); expected \(rows, columns\) \(3, 4\)"):
        plots.field(t, x, u.T)
    with pytest.raises(ValueError, match="1 axes for 3 pictures"):
        plots.field(t, x, u, u, [Figure().add_subplot()])
