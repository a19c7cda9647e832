"""What is estimated from measurements, by networks or by NeuroMANCER's systems, is what scipy's least squares finds."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.optimize
import torch
from torch import Tensor, nn
from torch.func import functional_call

import weft
from tests.helpers.bitwise import flat_weights

BOTH = pytest.mark.parametrize("name", ["LevenbergMarquardt", "NaturalGradient"])


def minimised(problem: nn.Module, data: Any, name: str, epochs: int) -> weft.FitResult:
    trainer = weft.Trainer(
        epochs=epochs, optimizer=getattr(weft.optim, name), precision="64-true", progress=False, patience=None
    )
    return trainer.fit(problem, data)


def by_scipy(residuals: Callable[[Any], Any], start: Any, jac: Any = "3-point") -> Any:
    """The optimum as well as float64 can have it."""
    return scipy.optimize.least_squares(residuals, start, jac=jac, xtol=1e-15, ftol=1e-15, gtol=1e-15, max_nfev=2000)


# ---- the viscosity in Burgers' equation ------------------------------------------------------------------------------


class Inverse(nn.Module):
    """A network that solves Burgers' equation and passes through measurements, with the viscosity unknown."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1))
        self.viscosity = nn.Parameter(torch.tensor(0.2))

    def residuals(self, batch: Any) -> dict[str, Tensor]:
        x = batch["inside"]["x"]
        u = self.net(x)
        (first,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        second = torch.autograd.grad(first[:, 1].sum(), x, create_graph=True)[0][:, 1]
        equation = first[:, 0] + u[:, 0] * first[:, 1] - self.viscosity * second
        size = 0.01 * torch.cat([p.reshape(-1) for p in self.net.parameters()])  # else some weights grow for ever
        return {
            "equation": equation,
            "measured": self.net(batch["measured"]["x"]) - batch["measured"]["u"],
            "size": size,
        }

    def forward(self, batch: Any) -> Tensor:
        return torch.stack([r.square().mean() for r in self.residuals(batch).values()]).sum()


def wave(x: Tensor, viscosity: float = 0.1) -> Tensor:
    """A solution of Burgers' equation that moves with speed 1/2."""
    return 0.5 - 0.5 * torch.tanh((x[:, 1:] - 0.5 * x[:, :1]) / (4 * viscosity))


def measurements() -> dict[str, Any]:
    """Points (t, x) of the equation, and noisy values at others."""
    draw = torch.Generator().manual_seed(0)
    corner, size = torch.tensor([0.0, -1.0]), torch.tensor([1.0, 2.0])
    inside, places = (corner + size * torch.rand(n, 2, generator=draw).double() for n in (200, 80))
    noise = 0.02 * torch.randn(80, 1, generator=draw).double()
    return {"inside": {"x": inside}, "measured": {"x": places, "u": wave(places) + noise}}


@pytest.mark.long
@BOTH
def test_the_viscosity_is_that_of_scipys_optimum(name: str) -> None:
    """scipy starts a little away from where the fit ended, as a network has several optima."""
    problem, parts = Inverse(), measurements()
    sizes = {key: len(part["x"]) for key, part in parts.items()}
    data = weft.Data(parts, batch_size=sizes, shuffle=False, inputs_require_grad=("x",))
    result = minimised(problem, data, name, 200)
    names, shapes = zip(*((key, p.shape) for key, p in problem.named_parameters()), strict=True)
    batch = {key: {k: v.clone().requires_grad_(k == "x") for k, v in part.items()} for key, part in parts.items()}

    def read(vector: Tensor) -> Tensor:
        cut = vector.split([shape.numel() for shape in shapes])
        params = {f"p.{key}": part.view(shape) for key, part, shape in zip(names, cut, shapes, strict=True)}
        found = functional_call(AsForward(problem), params, (batch,))
        return torch.cat([r.reshape(-1) / r.numel() ** 0.5 for r in found.values()])

    def residuals(x: Any) -> Any:
        return read(torch.from_numpy(x)).detach().numpy()

    def jacobian(x: Any) -> Any:
        return torch.autograd.functional.jacobian(read, torch.from_numpy(x), vectorize=True).numpy()

    found = flat_weights(problem).numpy()
    start = found * (1 + 1e-3 * np.random.default_rng(0).standard_normal(len(found)))
    want = by_scipy(residuals, start, jacobian)
    place = next(itertools.accumulate(shapes[i].numel() for i in range(names.index("viscosity"))), 0)
    assert found[place] == float(problem.viscosity.detach()) != 0.2
    assert result.history["train_loss"][-1] == pytest.approx(2 * want.cost, rel=1e-6)
    assert found[place] == pytest.approx(want.x[place], rel=1e-6)
    assert start[place] != pytest.approx(want.x[place], rel=1e-5) and abs(want.x[place] - 0.1) < 0.02


class AsForward(nn.Module):
    """The residuals of a problem as a module's forward."""

    def __init__(self, problem: Any) -> None:
        super().__init__()
        self.p = problem

    def forward(self, batch: Any) -> Any:
        return self.p.residuals(batch)


# ---- NeuroMANCER's parameter estimation ------------------------------------------------------------------------------

STEPS, WIDTH = 20, 0.1
Field = Callable[[Any, Any], Any]


def rolled_out(field: Field, parameters: Any, x: Any) -> Any:
    """(runs, 1 + STEPS, 2) by Runge and Kutta's fourth order, in numpy."""
    path = [x]
    for _ in range(STEPS):
        k1 = field(x, parameters)
        k2 = field(x + WIDTH / 2 * k1, parameters)
        k3 = field(x + WIDTH / 2 * k2, parameters)
        k4 = field(x + WIDTH * k3, parameters)
        x = x + WIDTH / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        path.append(x)
    return np.stack(path, 1)


def brusselator(x: Any, p: Any) -> Any:
    production = x[:, 1] * x[:, 0] ** 2
    return np.stack([p[0] + production - p[1] * x[:, 0] - x[:, 0], p[1] * x[:, 0] - production], 1)


def hunters(x: Any, p: Any) -> Any:
    """Lotka and Volterra's, of which NeuroMANCER estimates the growth of the prey."""
    meals = x[:, 0] * x[:, 1]
    return np.stack([p[0] * x[:, 0] - 0.4 * meals, 0.1 * meals - 0.4 * x[:, 1]], 1)


ESTIMATIONS: dict[str, tuple[str, Field, list[float], list[float], tuple[float, float]]] = {
    "brusselator": ("BrusselatorParam", brusselator, [1.0, 2.1], [5.0, 5.0], (0.5, 1.5)),
    "hunters": ("LotkaVolterraParam", hunters, [0.7], [1.0], (1.0, 5.0)),
}


@BOTH
@pytest.mark.parametrize("system", ESTIMATIONS)
def test_what_neuromancers_systems_estimate_is_what_scipy_finds(name: str, system: str) -> None:
    kind, field, true, first, (low, high) = ESTIMATIONS[system]
    draw = np.random.default_rng(0)
    x0 = draw.uniform(low, high, (6, 2))
    seen = rolled_out(field, np.array(true), x0)
    seen = seen + 0.05 * draw.standard_normal(seen.shape)
    problem = estimation(kind)
    rows = {"xn": torch.from_numpy(x0)[:, None], "seen": torch.from_numpy(seen)}
    minimised(problem, weft.Data(rows, shuffle=False), name, 12)
    want = by_scipy(lambda p: (rolled_out(field, p, x0) - seen).ravel(), first).x
    found = flat_weights(problem).numpy()
    assert found == pytest.approx(want, rel=1e-6)
    assert found != pytest.approx(true, rel=1e-5) and np.allclose(found, true, rtol=0.1)  # noise moves the optimum


def estimation(kind: str) -> Any:
    """As in NeuroMANCER's tutorials: a system rolled out, whose states are to be those that were seen."""
    from neuromancer.constraint import variable as made
    from neuromancer.dynamics import integrators, ode
    from neuromancer.loss import PenaltyLoss
    from neuromancer.problem import Problem
    from neuromancer.system import Node, System

    variable: Any = made  # its class is called without its arguments everywhere
    model = Node(integrators.RK4(getattr(ode, kind)(), h=WIDTH), ["xn"], ["xn"], name="model")
    objective = 1.0 * (variable("xn") == variable("seen")) ^ 2
    return Problem([System([model], nsteps=STEPS)], PenaltyLoss([objective], []))
