"""Every row with every other is told wherever rows are computed with, and a pairwise loss that is meant trains."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import weft
from weft.problem.pairs import PairWatch

N = 8
X = torch.linspace(-1, 1, N)[:, None]
DATA = {"x": X, "y1": X[:, 0].sin(), "y": X.sin()}


def problem(fn: Any = lambda yh, y: (yh - y).square()) -> weft.Problem:
    return weft.Problem([weft.Node(nn.Linear(1, 1), ["x"], ["yh"])], [weft.objective(fn, name="fit")])


def told(fit: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit()
    return [str(w.message) for w in caught if "every row with every other" in str(w.message)]


def fitted(made: nn.Module | None = None, kind: Any = weft.Trainer, **options: Any) -> list[str]:
    trainer = kind(epochs=3, progress=False, **options)
    return told(lambda: trainer.fit(made or problem(), weft.Data(DATA, DATA, DATA, batch_size=4)))


@pytest.mark.parametrize("wraps", [lambda fn: fn, weft.whole])
def test_a_metric_that_pairs_rows_is_told_once_by_name(wraps: Any) -> None:
    (message,) = fitted(metrics={"mae": wraps(lambda yh, y1: (yh - y1).abs().mean())})
    assert "'mae'" in message and "x[:, None]" in message
    assert not fitted(metrics={"mae": wraps(lambda yh, y: (yh - y).abs().mean())})


@pytest.mark.parametrize("step", ["validation_step", "test_step"])
def test_an_evaluation_that_pairs_rows_is_told(step: str) -> None:
    def of(key: str, trainer: Any, batch: Any) -> Tensor:
        return (trainer.problem.step(batch)["yh"].tanh() - batch[key]).abs().mean()

    def fit(key: str) -> list[str]:
        trainer = weft.Trainer(epochs=2, progress=False, **{step: lambda trainer, b: of(key, trainer, b)})
        made = problem()
        return told(lambda: (trainer.fit(made, weft.Data(DATA, DATA)), trainer.test(made, DATA)))

    assert len(fit("y1")) == 1
    assert not fit("y")


def test_an_update_of_ones_own_that_pairs_rows_is_told() -> None:
    class Own(weft.Trainer):
        key = "y1"

        def update(self, batch: Any) -> Any:
            loss = (self.problem(batch)["yh"] - batch[self.key]).square().mean()
            self.backward(loss)
            self.step()
            return loss

    assert len(fitted(kind=Own)) == 1
    assert not fitted(kind=type("Right", (Own,), {"key": "y"}))


def test_series_with_as_many_times_as_rows_are_refused_where_they_pair() -> None:
    data = {"x": torch.rand(N, N, 1), "y": torch.rand(N, N), "z": torch.rand(N, N, 1)}
    with pytest.raises(ValueError, match="every row with every other"):
        weft.Trainer(epochs=1, progress=False).fit(problem(), data)
    assert not told(lambda: weft.Trainer(epochs=1, progress=False).fit(problem(lambda yh, z: (yh - z) ** 2), data))
    step = {"training_step": lambda trainer, b: (trainer.problem.step(b)["yh"] - b["y"]).square().mean()}
    assert len(told(lambda: weft.Trainer(epochs=1, progress=False, **step).fit(problem(), data))) == 1


MEANT: dict[str, Any] = {
    "written out": lambda yh, y1: ((yh[:, 0][:, None] - yh[:, 0][None]) - (y1[:, None] - y1[None])).square(),
    "distances": lambda yh, y1: torch.cdist(yh, y1[:, None]),
    "a product": lambda yh, y1: yh @ y1[None],
}


@pytest.mark.parametrize("kind", MEANT)
def test_an_objective_of_pairs_that_are_meant_trains_without_a_word(kind: str) -> None:
    assert not fitted(problem(MEANT[kind]))


def test_the_ways_out_that_a_refusal_names_work() -> None:
    with pytest.raises(ValueError, match=r"x\[:, None\] and y\[None, :\].*\.mean\(\)"):
        fitted(problem(lambda yh, y1: (yh - y1) ** 2))
    assert not fitted(problem(lambda yh, y1: (yh - y1[None, :]) ** 2))
    fitted(problem(lambda yh, y1: ((yh - y1) ** 2).mean()))


def test_after_a_first_batch_of_several_rows_and_on_single_rows_nothing_is_watched(monkeypatch: Any) -> None:
    watched = []
    monkeypatch.setattr("weft.problem.terms.PairWatch", lambda read: watched.append(1) or PairWatch(read))
    for rows, count in ((1, 0), (N, 1)):
        watched.clear()
        weft.Trainer(epochs=4, progress=False).fit(problem(), {key: value[:rows] for key, value in DATA.items()})
        assert len(watched) == count
