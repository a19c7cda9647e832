"""Metrics keep what the step reports, and what cannot be predicted or trained is named with the way out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import weft

X = torch.linspace(-1, 1, 12)[:, None]
DATA = {"x": X, "y": X.sin()}


def problem(node: Any = None) -> weft.Problem:
    node = node or weft.Node(nn.Linear(1, 1), ["x"], ["yh"], name="net")
    return weft.Problem([node], [weft.objective(lambda yh, y: (yh - y).square(), name="fit")])


def fit(made: nn.Module | None = None, **options: Any) -> weft.FitResult:
    return weft.Trainer(epochs=1, progress=False, **options).fit(made or problem(), DATA, DATA)


@pytest.mark.parametrize("wraps", [lambda fn: fn, weft.whole])
@pytest.mark.parametrize("name", ["loss", "fit", "objective_loss", "train_loss"])
def test_a_metric_whose_name_is_taken_is_refused_by_name(name: str, wraps: Any) -> None:
    with pytest.raises(ValueError, match=f"'{name.removeprefix('train_')}' would replace 'train_.*another name"):
        fit(metrics={name: wraps(lambda yh: yh.mean())})


def test_a_metric_of_the_name_of_what_a_plain_step_returns_is_refused() -> None:
    def step(trainer: Any, batch: Any) -> Any:
        loss = trainer.problem(batch["x"]).square().mean()
        return {"loss": loss, "mae": loss.detach()}

    with pytest.raises(ValueError, match="'mae' would replace 'train_mae'"):
        fit(nn.Linear(1, 1), training_step=step, validation_step=step, metrics={"mae": lambda x: x.mean()})


def test_other_names_stand_beside_what_the_step_reports() -> None:
    values = fit(metrics={"mae": lambda yh, y: (yh - y).abs().mean(), "top": weft.whole(lambda yh: yh.max())}).history
    assert {"train_loss", "train_fit", "train_mae", "train_top", "dev_mae", "dev_top"} <= values.keys()


@pytest.mark.parametrize(
    ("returned", "says"),
    [
        (lambda y: y, r"Tensor of shape \(12, 1\)"),
        (lambda y: None, "NoneType"),
        (lambda y: {"y": y.detach().numpy()}, "{'y': 'ndarray'}"),
    ],
)
def test_a_predict_step_that_returns_no_dict_of_tensors_says_what_is_expected(returned: Any, says: str) -> None:
    trainer = weft.Trainer(progress=False, predict_step=lambda t, b: returned(t.problem.step(b)["yh"]))
    with pytest.raises(TypeError, match=says + r'.*expected a dict of tensors by key: \{"y": \.\.\.\}'):
        trainer.predict(problem(), DATA)


def test_a_node_whose_function_closes_over_a_module_is_named_with_the_way_out() -> None:
    net = nn.Linear(1, 1)
    with pytest.raises(ValueError, match=r"nothing to train.*node.*net\.weight.*weft.Node\(net, \['x'\], \['yh'\]\)"):
        fit(problem(weft.Node(lambda x: net(x), ["x"], ["yh"])))
    fit(problem(weft.Node(net, ["x"], ["yh"])))


def test_a_node_whose_function_closes_over_a_tensor_is_named() -> None:
    k = torch.ones(1, requires_grad=True)
    with pytest.raises(ValueError, match=r"nothing to train.*node 'node' uses k of shape \(1,\).*problem\.k = k"):
        fit(problem(weft.Node(lambda x: k * x, ["x"], ["yh"])))


def test_a_phase_that_freezes_all_there_is_says_so() -> None:
    with pytest.raises(ValueError, match=r"requires grad.*All parameters are frozen, by Phase\(freeze"):
        fit(phases=[weft.Phase(1, freeze=["net"])])


def test_a_problem_that_was_frozen_before_the_fit_says_so() -> None:
    made = problem()
    weft.hooks.freeze(made, "net")
    with pytest.raises(ValueError, match=r"nothing to train. All its parameters are frozen.*unfreeze"):
        fit(made)
