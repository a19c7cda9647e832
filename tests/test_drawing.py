"""The graph of a problem says who hands what to whom; pictures and histograms go to the loggers."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import weft
from weft.drawing import draw


def make_problem() -> weft.Problem:
    return weft.Problem(
        [weft.Node(torch.nn.Linear(1, 1), ["p"], ["x"], name="map"), weft.Node(torch.sin, ["x"], ["y"], name="sine")],
        [weft.objective(lambda y, p: (y - p) ** 2, name="fit")],
        [weft.less_equal("x", 1.0, name="limit")],
    )


def test_the_edges_lead_from_who_writes_a_key_to_who_reads_it() -> None:
    assert make_problem().show().edges == [
        ("data", "p", "map"), ("map", "x", "sine"), ("sine", "y", "fit"), ("data", "p", "fit"), ("map", "x", "limit"),
    ]  # fmt: skip


def test_the_text_has_a_line_for_each_node_and_term() -> None:
    lines = [" ".join(line.split()) for line in str(make_problem().show()).splitlines()]
    assert lines == [
        "Problem 'problem'", "p of data --> [map] --> x", "x of map --> [sine] --> y",
        "y of sine, p of data --> (fit, objective)", "x of map --> (limit, constraint <=)",
    ]  # fmt: skip


def test_a_drawing_is_saved_as_its_ending_says(tmp_path: Path) -> None:
    drawing = make_problem().show()
    assert '"map" -> "sine" [label="x"];' in drawing.save(tmp_path / "a.dot").read_text()
    assert drawing.save(tmp_path / "a.txt").read_text() == f"{drawing}\n"
    with pytest.raises(ValueError, match="got '.pdf'"):
        drawing.save(tmp_path / "a.pdf")
    if shutil.which("dot") is None:
        with pytest.raises(RuntimeError, match="graphviz"):
            drawing.save(tmp_path / "a.svg")
        assert drawing._repr_html_().startswith("<pre>")
    else:
        assert "<svg" in drawing.save(tmp_path / "a.svg").read_text()


def test_a_neuromancer_problem_is_drawn_by_its_keys() -> None:
    problems = pytest.importorskip("neuromancer_problems")
    drawing = draw(problems.rosenbrock())
    assert drawing.edges == [("data", "a", "map"), ("data", "p", "map")]


class Recorder:
    """A logger that keeps what it is given."""

    def __init__(self) -> None:
        self.figures: list[tuple[str, int]] = []
        self.histograms: list[tuple[str, int, torch.Tensor]] = []

    def log_metrics(self, metrics: Any, step: int) -> None: ...

    def log_hyperparams(self, params: Any) -> None: ...

    def save(self) -> None: ...

    def finalize(self, status: str) -> None: ...

    def add_figure(self, tag: str, figure: Any, step: int) -> None:
        self.figures.append((tag, step))

    def add_histogram(self, tag: str, values: torch.Tensor, step: int) -> None:
        self.histograms.append((tag, step, values.detach().clone()))


def train(hooks: Any, logger: Any) -> weft.Problem:
    problem, data = make_problem(), weft.DictDataset({"p": torch.rand(8, 1)})
    weft.Trainer(epochs=5, progress=False, hooks=hooks, loggers=logger).fit(problem, weft.Data(data, batch_size=4))
    return problem


def test_figures_and_histograms_are_logged_this_often() -> None:
    from matplotlib.figure import Figure

    logger = Recorder()
    hooks = [weft.hooks.Figures({"picture": lambda trainer: Figure()}, every=2), weft.hooks.WeightHistograms(every=4, gradients=True)]
    problem = train(hooks, logger)
    assert logger.figures == [("picture", 4), ("picture", 8), ("picture", 10)]  # every second epoch, and the last
    assert [(tag, step) for tag, step, _ in logger.histograms] == [
        (f"{kind}/nodes.0.fn.{name}", 8) for kind in ("weights", "gradients") for name in ("weight", "bias")
    ]
    assert not torch.equal(logger.histograms[0][2], problem.nodes[0].fn.weight)  # of epoch 4, trained on in epoch 5


@pytest.mark.parametrize("hook", [lambda: weft.hooks.Figures({}), lambda: weft.hooks.WeightHistograms()])
def test_without_a_logger_that_can_show_them_it_is_an_error(hook: Any) -> None:
    with pytest.raises(ValueError, match="Add loggers='tensorboard'"):
        train(hook(), None)


def test_what_is_no_figure_is_an_error() -> None:
    with pytest.raises(TypeError, match="'picture' returned int"):
        train(weft.hooks.Figures({"picture": lambda trainer: 3}), Recorder())
