"""SSBFGS and SSBroyden against scipy's BFGS, closed forms, and what theory says of their order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.optimize
import torch
from torch import Tensor

from weft.optim import SSBFGS, SSBroyden
from weft.optim.quasi_newton import update

BOTH = pytest.mark.parametrize("kind", [SSBFGS, SSBroyden])


def double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def banana(x: Tensor) -> Tensor:
    return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()


def closure_of(x: Tensor, f: Callable[[Tensor], Tensor]) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        x.grad = None
        value = f(x)
        value.backward()
        return value

    return closure


def minimized(kind: Any, f: Callable[[Tensor], Tensor], start: Tensor, **options: Any) -> tuple[Tensor, Any]:
    x = start.clone().requires_grad_()
    optimizer = kind([x], **({"max_iter": 300} | options))
    optimizer.step(closure_of(x, f))
    return x.detach(), optimizer


def pairs(n: int, count: int) -> list[tuple[Tensor, Tensor]]:
    """Steps and changes of the gradient of a convex quadratic."""
    generator = torch.Generator().manual_seed(n)
    a = torch.randn(n, n, generator=generator, dtype=torch.float64)
    hessian = a @ a.T + torch.eye(n, dtype=torch.float64)
    steps = torch.randn(count, n, generator=generator, dtype=torch.float64)
    return [(s, hessian @ s) for s in steps]


def updated(inverse: Tensor, s: Tensor, y: Tensor, tau: float = 1.0, phi: float = 1.0) -> None:
    hy = inverse @ y
    update(inverse, s, hy, float(y @ s), float(y @ hy), tau, phi)


def test_without_scaling_the_update_is_that_of_scipys_bfgs() -> None:
    reference = scipy.optimize.BFGS(init_scale=1.0)  # pyright: ignore[reportArgumentType]
    reference.initialize(6, "inv_hess")
    ours, other = torch.eye(6, dtype=torch.float64), torch.eye(6, dtype=torch.float64)
    for s, y in pairs(6, 5):
        reference.update(s.numpy(), y.numpy())
        updated(ours, s, y)
        updated(other, s, y, tau=0.5)
    np.testing.assert_allclose(ours.numpy(), reference.get_matrix(), rtol=1e-9)
    assert not np.allclose(other.numpy(), reference.get_matrix(), rtol=1e-3)


@pytest.mark.parametrize(("tau", "phi"), [(1.0, 0.0), (0.3, 1.0), (0.7, 0.4), (0.5, -0.1), (0.9, 1.3)])
def test_every_update_keeps_the_secant_equation_and_symmetry(tau: float, phi: float) -> None:
    inverse = torch.eye(5, dtype=torch.float64)
    for s, y in pairs(5, 4):
        updated(inverse, s, y, tau, phi)
        torch.testing.assert_close(inverse @ y, s, rtol=1e-8, atol=1e-10)
        assert inverse.equal(inverse.T)
        assert not torch.allclose(inverse @ s, y)


def test_the_update_without_bfgss_part_is_that_of_dfp() -> None:
    """DFP: H - Hyy'H / y'Hy + ss' / y's (Nocedal & Wright, 2nd ed., eq. 6.15)."""
    inverse = torch.eye(4, dtype=torch.float64)
    for s, y in pairs(4, 3):
        hy = inverse @ y
        want = inverse - torch.outer(hy, hy) / (y @ hy) + torch.outer(s, s) / (y @ s)
        updated(inverse, s, y, phi=0.0)
        torch.testing.assert_close(inverse, want)


@BOTH
def test_scaling_is_none_where_curvature_is_what_was_expected(kind: Any) -> None:
    """With Bs = y nothing is to be learned: b = h = 1, and the scale is 1."""
    tau, _ = kind([torch.zeros(3)]).scaling(1.0, 1.0, 3)
    assert tau == pytest.approx(1.0)
    assert kind([torch.zeros(3)]).scaling(4.0, 0.5, 3)[0] < 0.5


@BOTH
@pytest.mark.parametrize("n", [2, 10])
def test_rosenbrocks_minimum_is_found_about_as_soon_as_by_scipys_bfgs(kind: Any, n: int) -> None:
    start = torch.full((n,), -0.5, dtype=torch.float64)
    x, optimizer = minimized(kind, banana, start)
    torch.testing.assert_close(x, torch.ones(n, dtype=torch.float64), rtol=1e-11, atol=1e-11)
    by_scipy = scipy.optimize.minimize(
        scipy.optimize.rosen, start.numpy(), jac=scipy.optimize.rosen_der, method="BFGS", options={"gtol": 1e-9}
    )
    assert optimizer.kept["n_iter"] < 1.5 * by_scipy.nit


@BOTH
def test_near_a_minimum_errors_shrink_faster_and_faster(kind: Any) -> None:
    """Superlinear (Dennis and More): twice the digits take less than twice the steps."""

    def steps_from(high: float, low: float, distances: list[float]) -> int:
        return sum(low < d < high for d in distances)

    x = torch.full((2,), -0.5, dtype=torch.float64, requires_grad=True)
    optimizer, distances = kind([x], max_iter=1), []
    for _ in range(30):
        optimizer.step(closure_of(x, banana))
        distances.append(float((x.detach() - 1).norm()))
    assert distances[-1] == 0.0

    def is_superlinear(distances: list[float]) -> bool:
        return steps_from(1e-6, 1e-12, distances) <= 3 < steps_from(1.0, 1e-6, distances)

    assert is_superlinear(distances)
    assert not is_superlinear([0.8**k for k in range(200)])  # steepest descent on a parabola


@BOTH
def test_a_quadratic_is_solved_to_rounding_however_badly_scaled(kind: Any) -> None:
    d = torch.logspace(-3, 3, 8, dtype=torch.float64)
    target = torch.linspace(-1, 1, 8, dtype=torch.float64)
    x, optimizer = minimized(kind, lambda x: (d * (x - target) ** 2).sum(), torch.zeros(8, dtype=torch.float64))
    torch.testing.assert_close(x, target, rtol=1e-6, atol=1e-6)
    assert optimizer.search_stop in ("no lower loss", "tolerance_grad")


@BOTH
def test_what_ends_a_step_is_told(kind: Any) -> None:
    start = double(-1.2, 1.0)
    assert minimized(kind, banana, start, max_iter=3)[1].search_stop == "max_iter"
    assert minimized(kind, banana, start, tolerance_grad=1e-3)[1].search_stop == "tolerance_grad"
    assert minimized(kind, banana, start, tolerance_change=1e-2)[1].search_stop == "tolerance_change"
    assert minimized(kind, lambda x: x.sum() * torch.nan, start)[1].search_stop == "not finite"


@BOTH
def test_steps_of_few_iterations_go_the_way_of_one_long_step(kind: Any) -> None:
    start = double(-1.2, 1.0)
    long = minimized(kind, banana, start, max_iter=12)[0]
    x = start.clone().requires_grad_()
    optimizer = kind([x], max_iter=3)
    for _ in range(4):
        optimizer.step(closure_of(x, banana))
    assert x.detach().equal(long)
    assert not minimized(kind, banana, start, max_iter=11)[0].equal(long)


def test_what_it_cannot_train_is_refused_with_what_to_do() -> None:
    with pytest.raises(ValueError, match=r"dense inverse Hessian: 30,000 parameters take 3\.4 GiB.*LBFGS"):
        SSBroyden([torch.zeros(30_000)])
    with pytest.raises(ValueError, match="one group"):
        groups: Any = [{"params": [torch.zeros(1)]}, {"params": [torch.zeros(1)]}]
        SSBFGS(groups)
    with pytest.raises(TypeError, match="real parameters"):
        SSBFGS([torch.zeros(1, dtype=torch.complex64)])
    with pytest.raises(ValueError, match="one dtype"):
        SSBFGS([torch.zeros(1), torch.zeros(1, dtype=torch.float64)])
    with pytest.raises(ValueError, match="at least 1"):
        SSBFGS([torch.zeros(1)], max_iter=0)


def test_a_closure_that_raises_leaves_the_parameters_where_they_were() -> None:
    x = double(-1.2, 1.0).requires_grad_()
    calls = []

    def closure() -> Tensor:
        calls.append(1)
        if len(calls) == 4:
            raise RuntimeError("no")
        return closure_of(x, banana)()

    with pytest.raises(RuntimeError, match="no"):
        SSBroyden([x]).step(closure)
    assert x.detach().equal(double(-1.2, 1.0))
