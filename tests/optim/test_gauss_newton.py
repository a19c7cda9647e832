"""Levenberg-Marquardt and natural gradients against scipy's least squares, and in the order that theory says."""

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

from tests.helpers.problems import tanh_net
from weft.optim import LeastSquares, LevenbergMarquardt, NaturalGradient

BOTH = pytest.mark.parametrize("kind", [LevenbergMarquardt, NaturalGradient])
Function = Callable[[Tensor], Tensor]


class Vector(nn.Module):
    """Residuals as a function of one vector."""

    def __init__(self, f: Function, start: list[float]) -> None:
        super().__init__()
        self.f, self.x = f, nn.Parameter(torch.tensor(start, dtype=torch.float64))

    def residuals(self, batch: Any) -> Tensor:
        return self.f(self.x)


def valley(x: Tensor) -> Tensor:
    return torch.stack([10 * (x[1] - x[0] ** 2), 1 - x[0]])


def jennrich_and_sampson(x: Tensor) -> Tensor:
    """Its residuals are far from zero (More, Garbow, Hillstrom, problem 6)."""
    i = torch.arange(1, 11, dtype=torch.float64)
    return 2 + 2 * i - (torch.exp(i * x[0]) + torch.exp(i * x[1]))


BARD = [0.14, 0.18, 0.22, 0.25, 0.29, 0.32, 0.35, 0.39, 0.37, 0.58, 0.73, 0.96, 1.34, 2.10, 4.39]


def bard(x: Tensor) -> Tensor:
    """More, Garbow, Hillstrom, problem 8."""
    u = torch.arange(1, 16, dtype=torch.float64)
    v = 16 - u
    return torch.tensor(BARD, dtype=torch.float64) - (x[0] + u / (v * x[1] + torch.minimum(u, v) * x[2]))


def exponentials(x: Tensor) -> Tensor:
    t = torch.linspace(0, 4, 30, dtype=torch.float64)
    y = 2 * torch.exp(-0.5 * t) + torch.exp(-3 * t) + 0.01 * torch.cos(40 * t)
    return x[0] * torch.exp(x[1] * t) + x[2] * torch.exp(x[3] * t) - y


PROBLEMS: dict[str, tuple[Function, list[float]]] = {
    "rosenbrock": (valley, [-1.2, 1.0]),
    "jennrich and sampson": (jennrich_and_sampson, [0.3, 0.4]),
    "bard": (bard, [1.0, 1.0, 1.0]),
    "exponentials": (exponentials, [1.0, -1.0, 1.0, -4.0]),
}


def least(kind: Any, f: Function, start: list[float], steps: int = 300, **options: Any) -> tuple[Vector, Any]:
    module = Vector(f, start)
    optimizer = kind(list(module.parameters()), **options)
    closure = LeastSquares(module, {}, rows=optimizer.rows)
    for _ in range(steps):
        optimizer.step(closure)
        if optimizer.search_stop != "max_iter":
            break
    return module, optimizer


@BOTH
@pytest.mark.parametrize("problem", PROBLEMS)
def test_the_optimum_is_that_of_scipys_least_squares(kind: Any, problem: str) -> None:
    f, start = PROBLEMS[problem]
    want = scipy.optimize.least_squares(
        lambda x: f(torch.from_numpy(x)).numpy(), start, method="lm", xtol=1e-15, ftol=1e-15, gtol=1e-15
    )
    found = least(kind, f, start)[0].x.detach().numpy()
    np.testing.assert_allclose(np.sort(found), np.sort(want.x), rtol=1e-6)
    assert not np.allclose(start, want.x, rtol=1e-2)


@BOTH
def test_where_residuals_vanish_the_order_is_quadratic(kind: Any) -> None:
    """Each error about the square of the one before (Nocedal & Wright, ch. 10.3), once damping has gone."""
    module = Vector(valley, [-1.2, 1.0])
    optimizer = kind(list(module.parameters()), damping=1e-8, accelerate=False)
    distances = []
    for _ in range(60):
        optimizer.step(LeastSquares(module, {}))
        distances.append(float((module.x.detach() - 1).norm()))
    near = [(a, b) for a, b in itertools.pairwise(distances) if 1e-7 < a < 1e-1]
    assert near and distances[-1] < 1e-14
    assert near[-1][1] < 10 * near[-1][0] ** 1.5


@BOTH
@pytest.mark.parametrize("accelerate", [True, False])
def test_a_linear_problem_takes_one_step_when_it_is_not_damped(kind: Any, accelerate: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(*size, generator=generator, dtype=torch.float64) for size in ((9, 4), (9,)))
    module = Vector(lambda x: a @ x - b, [0.0] * 4)
    kind(list(module.parameters()), damping=1e-14, accelerate=accelerate).step(LeastSquares(module, {}))
    torch.testing.assert_close(module.x.detach(), torch.linalg.lstsq(a, b[:, None]).solution[:, 0])
    damped = Vector(module.f, [0.0] * 4)
    kind(list(damped.parameters()), damping=1.0, accelerate=accelerate).step(LeastSquares(damped, {}))
    assert not torch.allclose(damped.x, module.x, rtol=1e-3)


@BOTH
@pytest.mark.parametrize(("m", "n"), [(4, 9), (9, 4)])
def test_all_ways_to_the_direction_are_one(kind: Any, m: int, n: int) -> None:
    """By parameters, by residuals and by products: the damped solution of a dense least-squares solver."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(*size, generator=generator, dtype=torch.float64) for size in ((m, n), (m,)))
    found = []
    for max_dense in (2**20, 1):
        module = Vector(lambda x: a @ x - b, [0.1] * n)
        optimizer = kind(list(module.parameters()), damping=1e-3, max_dense=max_dense, cg_iterations=50)
        optimizer.param_groups[0]["damping"] = 1e-3
        closure = LeastSquares(module, {})
        system = optimizer._linearized(closure, float(closure()))
        name = "_ByProducts" if max_dense == 1 else "_InParameters" if n <= m else "_InResiduals"
        assert type(system).__name__ == name
        found.append(system.solve(None, 1e-3))
        x, scaled, right = module.x.detach(), a / m**0.5, b / m**0.5
        upper = torch.cat([scaled, 1e-3**0.5 * torch.eye(n, dtype=torch.float64)])
        below = torch.cat([right - scaled @ x, torch.zeros(n, dtype=torch.float64)])
        torch.testing.assert_close(found[-1], torch.linalg.lstsq(upper, below[:, None]).solution[:, 0])
    assert not torch.allclose(found[0], 2 * found[0])


@BOTH
def test_what_ends_a_step_is_told(kind: Any) -> None:
    assert least(kind, valley, [-1.2, 1.0], steps=2)[1].search_stop == "max_iter"
    assert least(kind, bard, [1.0, 1.0, 1.0], tolerance_grad=1e-4)[1].search_stop == "tolerance_grad"
    assert least(kind, bard, [1.0, 1.0, 1.0])[1].search_stop == "no lower loss"
    assert least(kind, lambda x: x / 0.0, [1.0])[1].search_stop == "not finite"


@BOTH
def test_a_loss_that_is_more_than_its_residuals_is_refused(kind: Any) -> None:
    module = Vector(valley, [-1.2, 1.0])

    def more() -> Tensor:
        loss = module.residuals({}).square().mean() + module.x.sum() ** 2
        (module.x.grad,) = torch.autograd.grad(loss, module.x)
        return loss.detach()

    optimizer = kind(list(module.parameters()))
    with pytest.raises(ValueError, match=r"the loss is 12\.14, but the mean squares of the residuals add up to 12\.1"):
        optimizer.step(LeastSquares(module, {}, evaluate=more))
    with pytest.raises(TypeError, match="needs residuals: step"):
        optimizer.step(more)
    assert module.x.tolist() == [-1.2, 1.0]


class Taught(nn.Module):
    """A net whose second derivatives are to be those of another: differences of large numbers near the solution."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = tanh_net(1, 1).double()
        self.teacher = [p.detach().clone() for p in self.net.parameters()]
        with torch.no_grad():
            for p in self.net.parameters():
                p.mul_(1 + 0.01 * torch.rand_like(p))

    def residuals(self, batch: Any) -> Tensor:
        def curvature(params: Any) -> Tensor:
            named = {name: p for (name, _), p in zip(self.net.named_parameters(), params, strict=True)}
            u = functional_call(self.net, named, (x,))
            (first,) = torch.autograd.grad(u.sum(), x, create_graph=True)
            return 1e3 * torch.autograd.grad(first.sum(), x, create_graph=True)[0][:, 0]

        x = batch["x"].requires_grad_()
        return curvature(self.net.parameters()) - curvature(self.teacher)


@BOTH
def test_rounding_near_a_solution_is_no_disagreement(kind: Any) -> None:
    """Its graphs row by row stay, also those that are made there."""
    module, batch = Taught(), {"x": torch.linspace(-1, 1, 40, dtype=torch.float64)[:, None]}
    closure = LeastSquares(module, batch)
    optimizer = kind(list(module.parameters()))
    first = optimizer.step(closure)
    for _ in range(60):
        last = optimizer.step(closure)
    assert float(last) < 1e-12 * float(first) and not closure.rows.given_up
    there = LeastSquares(module, batch)
    kind(list(module.parameters())).step(there)
    assert [graph is not None for _, graph in there.rows.graphs.values()] == [True]
