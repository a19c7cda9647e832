"""The graph of a problem says who hands what to whom; pictures and histograms go to the loggers."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

import weft
from weft.problem.drawing import draw


def sine_problem() -> weft.Problem:
    return weft.Problem(
        [weft.Node(torch.nn.Linear(1, 1), ["p"], ["x"], name="map"), weft.Node(torch.sin, ["x"], ["y"], name="sine")],
        [weft.objective(lambda y, p: (y - p) ** 2, name="fit")],
        [weft.less_equal("x", 1.0, name="limit")],
    )


def test_the_edges_lead_from_who_writes_a_key_to_who_reads_it() -> None:
    assert sine_problem().show().edges == [
        ("data", "p", "map"),
        ("map", "x", "sine"),
        ("sine", "y", "fit"),
        ("data", "p", "fit"),
        ("map", "x", "limit"),
    ]


def test_the_text_has_a_line_for_each_node_and_term() -> None:
    lines = [" ".join(line.split()) for line in str(sine_problem().show()).splitlines()]
    assert lines == [
        "Problem 'problem'",
        "p of data --> [map] --> x",
        "x of map --> [sine] --> y",
        "y of sine, p of data --> (fit, objective)",
        "x of map --> (limit, constraint <=)",
    ]


def test_a_drawing_is_saved_as_its_ending_says(tmp_path: Path) -> None:
    drawing = sine_problem().show()
    assert '  0 -> 1 [label="x"];' in drawing.save(tmp_path / "a.dot").read_text()
    assert drawing.save(tmp_path / "a.txt").read_text() == f"{drawing}\n"
    with pytest.raises(ValueError, match="got '.pdf'"):
        drawing.save(tmp_path / "a.pdf")


def test_without_graphviz_a_drawing_is_text_and_says_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    drawing = sine_problem().show()
    with pytest.raises(RuntimeError, match="graphviz"):
        drawing.save(tmp_path / "a.svg")
    assert drawing._repr_html_().startswith("<pre>Problem &#x27;problem&#x27;")


def picture_of(problem: weft.Problem) -> tuple[set[str], list[str]]:
    """What graphviz drew: the words of its boxes and edges, and its edges as "from->to" by graphviz's own titles."""
    root = ElementTree.fromstring(problem.show()._repr_html_())
    name = "{http://www.w3.org/2000/svg}"
    titles = [group.findtext(f"{name}title") or "" for group in root.iter(f"{name}g") if group.get("class") == "edge"]
    return {text.text or "" for text in root.iter(f"{name}text")}, titles


@pytest.mark.skipif(shutil.which("dot") is None, reason="needs graphviz's program dot (Debian's package graphviz)")
def test_graphviz_draws_every_node_term_and_edge_once() -> None:
    words, edges = picture_of(sine_problem())
    assert words == {"data", "map", "sine", "fit: objective", "limit: constraint <=", "p", "x", "y"}
    assert sorted(edges) == ["-1->0", "-1->2", "0->1", "0->3", "1->2"]


@pytest.mark.skipif(shutil.which("dot") is None, reason="needs graphviz's program dot (Debian's package graphviz)")
def test_names_with_marks_of_their_own_and_names_used_twice_are_drawn_as_they_are() -> None:
    name = 'Zähler "a" \\ <b> & data'
    problem = weft.Problem(
        [weft.Node(torch.nn.Linear(1, 1), ["p"], ["x"], name=name), weft.Node(torch.sin, ["x"], ["y"], name="data")],
        [weft.objective(lambda y: y, name="data")],
    )
    words, edges = picture_of(problem)
    assert words == {"data", name, "data: objective", "p", "x", "y"} and sorted(edges) == ["-1->0", "0->1", "1->2"]
    assert str(problem.show()).splitlines()[1].split() == ["p", "of", "data", "-->", *f"[{name}]".split(), "-->", "x"]


def test_a_neuromancer_problem_is_drawn_by_its_keys() -> None:
    from tests.helpers import neuromancer_problems as problems

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


def train_sine(hooks: Any, logger: Any) -> weft.Problem:
    problem, data = sine_problem(), weft.DictDataset({"p": torch.rand(8, 1)})
    weft.Trainer(epochs=5, progress=False, hooks=hooks, loggers=logger).fit(problem, weft.Data(data, batch_size=4))
    return problem


def test_figures_and_histograms_are_logged_this_often() -> None:
    from matplotlib.figure import Figure

    logger = Recorder()
    hooks = [
        weft.hooks.Figures({"picture": lambda trainer: Figure()}, every=2),
        weft.hooks.WeightHistograms(every=4, gradients=True),
    ]
    problem = train_sine(hooks, logger)
    assert logger.figures == [("picture", 4), ("picture", 8), ("picture", 10)]  # every second epoch, and the last
    assert [(tag, step) for tag, step, _ in logger.histograms] == [
        (f"{kind}/nodes.0.fn.{name}", 8) for kind in ("weights", "gradients") for name in ("weight", "bias")
    ]
    assert not torch.equal(logger.histograms[0][2], problem.nodes[0].fn.weight)  # of epoch 4, trained on in epoch 5


@pytest.mark.parametrize("hook", [lambda: weft.hooks.Figures({}), lambda: weft.hooks.WeightHistograms()])
def test_without_a_logger_that_can_show_them_it_is_an_error(hook: Any) -> None:
    with pytest.raises(ValueError, match="Add loggers='tensorboard'"):
        train_sine(hook(), None)


def test_what_is_no_figure_is_an_error() -> None:
    with pytest.raises(TypeError, match="'picture' returned int"):
        train_sine(weft.hooks.Figures({"picture": lambda trainer: 3}), Recorder())
