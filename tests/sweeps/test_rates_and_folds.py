"""A learning rate found by trying, and cross-validation: against the loop by hand, sums of rows, closed forms."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from torch import nn

import weft
from weft.sweeps import rates as rates_module

X = torch.linspace(-1, 1, 30)[:, None]
Y = 3 * X + 0.5


def make_line() -> weft.Problem:
    torch.manual_seed(0)
    net = weft.Node(nn.Linear(1, 1), ["x"], ["u"], name="net")
    return weft.Problem([net], [weft.objective(lambda u, y: (u - y) ** 2, name="fit")])


OPTIONS: dict[str, Any] = {"accelerator": "cpu", "optimizer": lambda p: torch.optim.SGD(p, lr=1.0)}


def test_the_losses_of_the_rates_are_those_of_the_loop_by_hand() -> None:
    found = weft.find_lr(make_line(), {"x": X, "y": Y}, low=1e-4, high=1.0, steps=20, **OPTIONS)
    net = nn.Linear(1, 1)
    torch.manual_seed(0)
    net.reset_parameters()
    losses = []
    for rate in found.rates:
        loss = ((net(X) - Y) ** 2).mean()
        losses.append(loss.item())
        net.zero_grad()
        loss.backward()
        with torch.no_grad():
            for p in net.parameters():
                assert p.grad is not None
                p.add_(p.grad, alpha=-rate)
    assert found.losses == losses and found.rates == pytest.approx(np.geomspace(1e-4, 1.0, 20).tolist())
    assert found.losses != losses[::-1]


def test_the_suggestion_trains_and_the_rate_at_which_the_loss_diverges_is_not_suggested() -> None:
    bent = torch.sin(5 * X)  # which a line does not meet: the loss stays above 0
    found = weft.find_lr(make_line(), {"x": X, "y": bent}, low=1e-5, high=100.0, steps=200, **OPTIONS)
    hessian = 2 * np.array([[float((X**2).mean()), float(X.mean())], [float(X.mean()), 1.0]])
    stable = 2 / float(np.linalg.eigvalsh(hessian)[-1])  # gradient descent on a quadratic diverges above
    assert found.suggestion is not None and 1e-3 < found.suggestion < stable < found.rates[-1] * 1.0001
    assert len(found.rates) < 200  # the test ended when the loss had grown


@pytest.mark.parametrize("seed", range(4))
def test_batches_that_scatter_do_not_decide_about_the_rate(seed: int) -> None:
    torch.manual_seed(seed)
    x = torch.rand(600, 2)
    make = lambda: nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 1))
    data = weft.Data((x, x.prod(1, keepdim=True)), batch_size=32)
    found = weft.find_lr(weft.Supervised(make(), nn.MSELoss()), data, accelerator="cpu")
    assert found.suggestion is not None and 5e-4 < found.suggestion < 0.1
    falls = np.diff(found.smoothed)[: int(np.argmin(found.smoothed)) - 1]  # of two neighbours alone
    told = found.rates[int(np.argmin(falls)) + 1]
    assert seed or told < 1e-5  # what one would have been told by them
    rates, noise = list(np.geomspace(1e-7, 1, 80)), np.random.default_rng(seed).normal(1.0, 0.1, 80).tolist()
    assert rates_module._steepest(rates, [1.0] * 80, 79) is None
    falling = [1.0 - 1e-3 * i for i in range(80)]
    assert rates_module._steepest(rates, [a + b / 1e6 for a, b in zip(falling, noise, strict=True)], 79) is not None


def test_the_problem_and_the_random_state_are_afterwards_as_they_were() -> None:
    problem = make_line()
    before, random = {k: v.clone() for k, v in problem.state_dict().items()}, torch.get_rng_state()
    found = weft.find_lr(problem, {"x": X, "y": Y}, steps=30, **OPTIONS)
    assert all(torch.equal(v, before[k]) for k, v in problem.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random) and problem.training
    assert "suggests" in repr(found)
    lines = found.plot(Figure().add_subplot()).lines
    assert np.array_equal(lines[0].get_ydata(), found.losses) and lines[2].get_xdata()[0] == found.suggestion


def test_a_test_of_rates_refuses_what_would_disturb_it() -> None:
    with pytest.raises(ValueError, match="expected 0 < low < high"):
        weft.find_lr(make_line(), {"x": X, "y": Y}, low=1.0, high=0.1)
    with pytest.raises(ValueError, match="'scheduler' has no place in a test of rates"):
        weft.find_lr(make_line(), {"x": X, "y": Y}, scheduler=lambda o: None)
    with pytest.raises(TypeError, match="did you mean 'precision'"):
        weft.find_lr(make_line(), {"x": X, "y": Y}, precison="64-true")


def test_every_row_is_in_one_dev_set_and_each_fold_is_the_fit_by_hand() -> None:
    found = weft.cross_validate(make_line, {"x": X, "y": Y}, folds=4, epochs=5, progress=False, **OPTIONS)
    assert sorted(row for rows in found.rows for row in rows) == list(range(30))
    assert [len(rows) for rows in found.rows] == [8, 8, 7, 7]
    for rows, score, problem in zip(found.rows, found.scores, found.problems, strict=True):
        train = [row for row in range(30) if row not in rows]
        sets = [{"x": X[part], "y": Y[part]} for part in (train, rows)]
        mine = make_line()
        assert weft.Trainer(epochs=5, progress=False, **OPTIONS).fit(mine, *sets).best_metric == score
        assert all(torch.equal(a, b) for a, b in zip(mine.parameters(), problem.parameters(), strict=True))
    assert found.mean == pytest.approx(np.mean(found.scores)) and found.std == pytest.approx(
        np.std(found.scores, ddof=1)
    )
    assert "4 folds" in repr(found) and found.to_dataframe()["score"].tolist() == found.scores
    assert len(found.plot(Figure().add_subplot()).lines) == 4
    other = weft.cross_validate(make_line, {"x": X, "y": Y}, folds=4, seed=1, epochs=1, progress=False, **OPTIONS)
    assert other.rows != found.rows


@pytest.mark.parametrize("kind", ["pair", "arrays", "data", "tables", "flat"])
def test_folds_of_x_and_y_are_those_of_a_dict(kind: str) -> None:
    import pandas

    def make() -> weft.Supervised:
        torch.manual_seed(0)
        return weft.Supervised(nn.Linear(1, 1), nn.MSELoss(), metrics=["r2"])

    given: Any = {
        "pair": (X, Y),
        "arrays": (X.numpy(), Y.numpy()),
        "data": weft.Data((X, Y)),
        "tables": (pandas.DataFrame(X.numpy(), columns=["a"]), pandas.DataFrame(Y.numpy(), columns=["b"])),
        "flat": (X.numpy(), Y[:, 0].numpy()),
    }[kind]
    one, two = (
        weft.cross_validate(make, data, folds=3, epochs=3, progress=False, **OPTIONS)
        for data in ({"x": X, "y": Y}, given)
    )
    assert one.scores == two.scores and one.rows == two.rows
    assert [r.history["dev_r2"] for r in one.results] == [r.history["dev_r2"] for r in two.results]
    assert one.scores != one.scores[::-1]


def test_the_batch_size_of_the_data_holds_in_each_fold(tmp_path: Any) -> None:
    data = weft.Data({"x": X, "y": Y}, batch_size=6)
    own = {"root_dir": str(tmp_path), "run_name": "a", "progress": False}
    found = weft.cross_validate(make_line, data, folds=3, epochs=2, **own, **OPTIONS)
    assert [r.steps for r in found.results] == [2 * math.ceil(20 / 6)] * 3
    assert [run.folder.name for run in weft.runs(tmp_path)] == ["fold-0", "fold-1", "fold-2"]


def test_what_cannot_be_divided_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 2"):
        weft.cross_validate(make_line, {"x": X}, folds=1)
    with pytest.raises(TypeError, match="make_problem is a module"):
        weft.cross_validate(make_line(), {"x": X})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="has a dev set"):
        weft.cross_validate(make_line, weft.Data({"x": X}, {"x": X}))
    with pytest.raises(ValueError, match="3 rows cannot be divided into 5"):
        weft.cross_validate(make_line, {"x": X[:3]})
    with pytest.raises(TypeError, match="expected tensors by key"):
        weft.cross_validate(make_line, [{"x": X}])


# ------------------------------------------------------------------------------------------------ pictures of sweeps


def a_sweep(mode: str = "min") -> Any:
    from pathlib import Path

    from weft.sweeps.settings import SweepResult

    values = [4.0, 2.0, None, 3.0, 0.5]
    trials = [
        {
            "number": i,
            "state": "complete" if value else "fail",
            "value": value,
            "params": {"lr": 10.0**-i, "kind": "ab"[i % 2]},
        }
        for i, value in enumerate(values)
    ]
    return SweepResult({"lr": 1e-4}, 0.5, 4, trials, Path("runs/s"), "s", "sqlite:///runs/s/sweep.db", mode)  # type: ignore[arg-type]


def test_a_sweep_has_a_picture_of_its_trials_and_of_each_parameter() -> None:
    from matplotlib.collections import PathCollection

    figure = Figure()
    order, rate, kind = a_sweep().plot([figure.add_subplot(1, 3, i + 1) for i in range(3)])
    (best,) = order.lines
    assert best.get_ydata().tolist() == [4.0, 2.0, 2.0, 0.5]  # the failed trial has no value
    (dots,) = [c for c in rate.collections if isinstance(c, PathCollection)]
    assert dots.get_offsets().tolist() == [[1.0, 4.0], [0.1, 2.0], [1e-3, 3.0], [1e-4, 0.5]]
    assert rate.get_xscale() == "log" and kind.get_xlabel() == "kind"
    largest = a_sweep("max").plot([Figure().add_subplot() for _ in range(3)])[0].lines[0]
    assert largest.get_ydata().tolist() == [4.0] * 4
    with pytest.raises(ValueError, match="got 1 axes; expected 3"):
        a_sweep().plot([Figure().add_subplot()])


def test_a_sweep_names_the_command_of_its_dashboard_and_shows_its_trials_in_a_notebook() -> None:
    html = a_sweep()._repr_html_()
    assert a_sweep().dashboard == "optuna-dashboard sqlite:///runs/s/sweep.db" and a_sweep().dashboard in html
    assert "<svg" in html and html.count("<tr>") == 6
