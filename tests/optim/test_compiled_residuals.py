"""Residuals, Jacobians and products with them as graphs: what they compute, and when they stay eager."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import weft
from tests.helpers.bitwise import flat_weights, same
from tests.helpers.problems import tanh_net, tanh_points


class Laplace(nn.Module):
    """The Laplacian of a network minus a factor, and its values elsewhere."""

    grad_inference = True

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net, self.factor = tanh_net(2, 1), 1.0

    def residuals(self, batch: Any) -> dict[str, Tensor]:
        x = batch["x"]
        first = torch.autograd.grad(self.net(x).sum(), x, create_graph=True)[0]
        second = [torch.autograd.grad(first[:, i].sum(), x, create_graph=True)[0][:, i] for i in range(2)]
        return {"equation": second[0] + second[1] - self.factor, "values": self.net(x.detach()) - batch["y"]}

    def forward(self, batch: Any) -> Tensor:
        return torch.stack([r.square().mean() for r in self.residuals(batch).values()]).sum()


class DecidesByValue(Laplace):
    """Its residuals depend on a number that is read from a tensor, which no graph may."""

    def residuals(self, batch: Any) -> dict[str, Tensor]:
        found = super().residuals(batch)
        return {**found, "values": found["values"] * (1.0 if float(found["values"].detach().sum()) < 1e9 else 2.0)}


def fit_laplace(
    problem: nn.Module, compile: bool, epochs: int = 3, name: str = "LevenbergMarquardt", **options: Any
) -> Any:
    resume = options.pop("resume", None)
    factory = options.pop("factory", getattr(weft.optim, name))
    trainer = weft.Trainer(
        epochs=epochs, optimizer=factory, precision="64-true", compile=compile, progress=False, patience=None, **options
    )
    trainer.fit(problem, weft.Data(tanh_points(40), shuffle=False, inputs_require_grad=("x",)), resume=resume)
    return trainer


NAMES = ["the Jacobian of equation", "the Jacobian of values", "the residuals"]
PRODUCTS = ["products with the Jacobian", "products with the transposed Jacobian", "the residuals"]


@pytest.mark.long
@pytest.mark.parametrize("name", ["LevenbergMarquardt", "NaturalGradient"])
def test_a_compiled_fit_goes_where_the_eager_one_goes(name: str, tmp_path: Path) -> None:
    eager, compiled = Laplace(), Laplace()
    fit_laplace(eager, False, name=name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        graphs = fit_laplace(compiled, True, name=name).optimizer.rows.by_graph
    assert sorted(graphs.made) == NAMES and None not in graphs.known.values()
    torch.testing.assert_close(flat_weights(compiled), flat_weights(eager), rtol=1e-8, atol=1e-10)
    other = Laplace()
    fit_laplace(other, False, name=name, epochs=2)
    assert not torch.allclose(flat_weights(other), flat_weights(eager), rtol=1e-6)
    # a resumed run takes the same graphs
    files: Any = {"root_dir": str(tmp_path), "run_name": "run", "checkpoint": True}
    fit_laplace(Laplace(), True, name=name, epochs=2, **files)
    resumed = Laplace()
    fit_laplace(resumed, True, name=name, epochs=3, resume="last", **files)
    assert same(flat_weights(resumed), flat_weights(compiled))


@pytest.mark.long
def test_products_with_the_jacobian_are_graphs_where_it_is_too_large() -> None:
    def factory(params: Any) -> Any:
        return weft.optim.LevenbergMarquardt(params, max_dense=4)

    eager, compiled = Laplace(), Laplace()
    fit_laplace(eager, False, factory=factory)
    graphs = fit_laplace(compiled, True, factory=factory).optimizer.rows.by_graph
    assert sorted(graphs.made) == PRODUCTS
    torch.testing.assert_close(flat_weights(compiled), flat_weights(eager), rtol=1e-6, atol=1e-8)


@pytest.mark.long
def test_an_attribute_that_changes_makes_new_graphs() -> None:
    def change(trainer: Any, metrics: Any) -> None:
        trainer.run.problem.factor += 1.0

    eager, compiled = Laplace(), Laplace()
    fit_laplace(eager, False, hooks={"on_epoch_end": change})
    graphs = fit_laplace(compiled, True, hooks={"on_epoch_end": change}).optimizer.rows.by_graph
    torch.testing.assert_close(flat_weights(compiled), flat_weights(eager), rtol=1e-8, atol=1e-10)
    assert graphs.made["the residuals"] == 3


def test_what_cannot_be_a_graph_stays_eager_and_is_told() -> None:
    eager, compiled = DecidesByValue(), DecidesByValue()
    fit_laplace(eager, False)
    with (
        pytest.warns(UserWarning, match=r"the update stays eager"),
        pytest.warns(UserWarning, match=r"residuals stay eager"),
    ):
        fit_laplace(compiled, True)
    assert same(flat_weights(compiled), flat_weights(eager))
