"""Metrics of all rows in compiled runs: what they read of each batch comes out of the graph."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import weft


def bent_line(rows: int = 33, seed: int = 0) -> dict[str, Tensor]:
    x = torch.rand(rows, 1, generator=torch.Generator().manual_seed(seed))
    return {"x": x, "y": (3 * x).sin()}


def fitted_line() -> weft.Problem:
    torch.manual_seed(0)
    node = weft.Node(nn.Linear(1, 1), ["x"], ["u"])
    return weft.Problem([node], [weft.objective(lambda u, y: (u - y) ** 2, name="mse")])


class LargestError:
    """The largest error so far, as an object with update, compute and reset."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.value = 0.0

    def update(self, u: Tensor, y: Tensor) -> None:
        assert not u.requires_grad
        self.value = max(self.value, (u - y).abs().max().item())

    def compute(self) -> float:
        return self.value


def of_all_rows() -> dict[str, Any]:
    return {
        "count": weft.whole(lambda y: float(len(y))),
        "rmse": weft.whole(lambda u, y: (u - y).square().mean().sqrt()),
        "largest": LargestError(),
        "mae": lambda u, y: (u - y).abs().mean(),
    }


def history_of(given: Any, compile: Any, **options: Any) -> dict[str, list[float]]:
    trainer = weft.Trainer(**{"epochs": 4, "progress": False, "seed": 0, "compile": compile} | options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = trainer.fit(fitted_line(), given)
    assert not compile or min(trainer.run.graphs.made.values()) >= 1  # type: ignore[union-attr]
    return result.history


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("options", [{}, {"accumulate": 2}, {"optimizer": torch.optim.LBFGS}], ids=str)
def test_graphs_hand_on_what_metrics_of_all_rows_read(options: dict[str, Any]) -> None:
    given = weft.Data(bent_line(), bent_line(20, 1), batch_size=5)
    eager, compiled = (history_of(given, compile, metrics=of_all_rows(), **options) for compile in (False, True))
    assert compiled.keys() == eager.keys()
    assert (compiled["train_count"], compiled["dev_count"]) == ([33.0] * 4, [20.0] * 4)
    for name, values in eager.items():
        assert compiled[name] == pytest.approx(values, rel=1e-4, abs=1e-6), name
    assert len(set(eager["train_rmse"])) > 1


@pytest.mark.usefixtures("uncompiled")
def test_a_supervised_problem_with_such_a_metric_is_compiled() -> None:
    torch.manual_seed(0)
    problem = weft.Supervised(nn.Linear(1, 1), nn.MSELoss(), {"top": weft.whole(lambda u, y: (u - y).abs().max())})
    train, dev = bent_line(), bent_line(9, 1)
    given = weft.Data((train["x"], train["y"]), dev=(dev["x"], dev["y"]), batch_size=8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer = weft.Trainer(epochs=3, progress=False, seed=0, compile=True)
        result = trainer.fit(problem, given)
    assert min(trainer.run.graphs.made.values()) >= 1  # type: ignore[union-attr]
    error = (trainer.predict(dev["x"]) - dev["y"]).abs().max().item()
    assert trainer.validate()["dev_top"] == pytest.approx(error, rel=1e-5)
    assert result.history["dev_top"][result.best_epoch] == pytest.approx(error, rel=1e-5)


class OneBuffer:
    """Yields the same tensors in every step, with other numbers in them."""

    def __init__(self) -> None:
        self.x, self.y = torch.zeros(4, 1), torch.zeros(4, 1)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for i in range(6):
            self.x.fill_(i / 6)
            self.y.fill_(float(i))
            yield {"x": self.x, "y": self.y}

    def __len__(self) -> int:
        return 6


@pytest.mark.long
def test_what_a_compiled_graph_hands_on_is_no_tensor_of_the_batch() -> None:
    seen = {"mean": weft.whole(lambda y: y.mean()), "last": weft.whole(lambda y: y[-1])}
    history = history_of(OneBuffer(), True, metrics=seen)
    assert history["train_mean"] == [2.5] * 4
    assert history["train_last"] == [5.0] * 4
